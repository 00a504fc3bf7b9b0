
-- Dropping a rare user may make an item rare: until nothing changes.
WHILE rows_before IS NULL OR rows_before != num_rows DO
  SET rows_before = num_rows;
  CREATE OR REPLACE TEMP TABLE kept AS
  SELECT kept.*
  FROM kept
  JOIN (
    SELECT user_code FROM kept GROUP BY user_code HAVING COUNT(*) >= $k
  ) AS users ON kept.user_code = users.user_code
  JOIN (
    SELECT item_code FROM kept GROUP BY item_code HAVING COUNT(*) >= $k
  ) AS items ON kept.item_code = items.item_code;
  SET num_rows = (SELECT COUNT(*) FROM kept);
END WHILE;
