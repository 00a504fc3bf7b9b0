
CREATE OR REPLACE TEMP TABLE unordered AS
SELECT
  users.id AS user_id,
  items.id AS item_id,
  typed.* EXCEPT (user_id, item_id),
  -- Rows are numbered hour by hour, since no worker holds all of them.
  COALESCE(DIV(typed.log_timestamp, 3600), 9223372036854775807) AS hour
FROM typed
LEFT JOIN known_users AS users ON typed.user_id = users.written
LEFT JOIN known_items AS items ON typed.item_id = items.written;

-- Rows of a warehouse have no order: theirs is by time, user, item, and then the other columns.
CREATE OR REPLACE TEMP TABLE log AS
SELECT
  hours.earlier + ROW_NUMBER() OVER (
    PARTITION BY unordered.hour
    ORDER BY
      $sorted
  ) - 1 AS position,
  unordered.* EXCEPT (hour)
FROM unordered
JOIN (
  SELECT hour, SUM(COUNT(*)) OVER (ORDER BY hour) - COUNT(*) AS earlier
  FROM unordered
  GROUP BY hour
) AS hours ON unordered.hour = hours.hour;
