
CREATE OR REPLACE TEMP TABLE kept AS
SELECT
  log.position,
  users.code AS user_code,
  items.code AS item_code,
  log.* EXCEPT (position, user_id, item_id, failed_condition)
FROM log
JOIN $users AS users ON log.user_id = users.user_id
JOIN $items AS items ON log.item_id = items.item_id
-- Rows that satisfy all conditions have the number behind the last.
WHERE log.failed_condition = $num_conditions;

SET rows_of_conditions = (SELECT COUNT(*) FROM kept);
