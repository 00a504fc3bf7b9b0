
-- Part 0 is training, 1 validation and 2 test; null where rows are divided when they have come.
CREATE OR REPLACE TABLE $rows AS
SELECT
  position,
  user_code,
  item_code,
  $columns,
  $part AS part
FROM kept;

CREATE OR REPLACE TABLE $counts AS
SELECT
  rows_of_conditions AS rows_of_conditions,
  rows_of_pairs AS rows_of_pairs,
  num_rows AS num_rows,
  users_are_digits AS users_are_digits,
  items_are_digits AS items_are_digits,
  counted.*
FROM (
  SELECT
    $counted
  FROM log
) AS counted;
