
-- One text for each ${side}, however its id is written: all ids are whole numbers, or all are text.
CREATE OR REPLACE TEMP TABLE spelt_${side}s AS
SELECT ${side}_id AS written, TRIM(${side}_id) AS trimmed
FROM typed
WHERE ${side}_id IS NOT NULL
GROUP BY ${side}_id;

SET ${side}s_are_digits = (
  SELECT
    COUNTIF(REGEXP_CONTAINS(trimmed, $whole)) > 0
    AND COUNTIF(
      NOT REGEXP_CONTAINS(trimmed, $whole)
      AND NOT REGEXP_CONTAINS(trimmed, $missing)
      AND trimmed != ''
    ) = 0
  FROM spelt_${side}s
);

-- Several texts may be one to Unicode, as both ways to write an accent: the first of them stands.
CREATE OR REPLACE TEMP TABLE known_${side}s AS
SELECT
  written,
  IF(${side}s_are_digits, normal, MIN(trimmed) OVER (PARTITION BY normal)) AS id
FROM (
  SELECT
    written,
    trimmed,
    CASE
      WHEN NOT ${side}s_are_digits THEN NULLIF(NORMALIZE(trimmed, NFC), '')
      WHEN REGEXP_CONTAINS(trimmed, $whole)
        THEN REGEXP_REPLACE(trimmed, $fraction, '')
    END AS normal
  FROM spelt_${side}s
) AS spelt
WHERE normal IS NOT NULL;
