-- Prepares the log of a configuration: numbered and coded rows with their parts, and the codes.
DECLARE users_are_digits, items_are_digits BOOL;
DECLARE rows_before, rows_of_conditions, rows_of_pairs, num_rows INT64;
DECLARE validation_begin, test_begin INT64;
DECLARE held_out INT64 DEFAULT 0;
DECLARE share_of_rows FLOAT64;

-- The source is read once, so that all that follows sees the same rows.
CREATE OR REPLACE TEMP TABLE typed AS
SELECT
  *,
  -- Number of the first condition that a row does not satisfy.
  $failed_condition AS failed_condition
FROM (
  SELECT
    $typed
  FROM $source
) AS source;
