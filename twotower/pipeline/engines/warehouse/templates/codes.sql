
-- Codes of ${side}s follow the first row that has them.
CREATE OR REPLACE TEMP TABLE first_${side}s AS
SELECT
  ${side}_id,
  COUNT(*) AS num_rows,
  MIN(position) AS first_row,
  -- Of the rows with both ids; null where there is none.
  MIN(IF(${other}_id IS NULL, NULL, position)) AS first_whole_row,
  DIV(MIN(position), 1048576) AS block
FROM log
WHERE ${side}_id IS NOT NULL
GROUP BY ${side}_id;

CREATE OR REPLACE TABLE $table AS
SELECT
  blocks.earlier + ROW_NUMBER() OVER (PARTITION BY firsts.block ORDER BY firsts.first_row) - 1
    AS code,
  firsts.${side}_id,
  firsts.num_rows,
  firsts.first_whole_row
FROM first_${side}s AS firsts
JOIN (
  SELECT block, SUM(COUNT(*)) OVER (ORDER BY block) - COUNT(*) AS earlier
  FROM first_${side}s
  GROUP BY block
) AS blocks ON firsts.block = blocks.block;
