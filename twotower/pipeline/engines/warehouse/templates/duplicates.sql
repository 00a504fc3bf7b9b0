
-- One row of each user and item, the $choice one.
CREATE OR REPLACE TEMP TABLE kept AS
SELECT kept.*
FROM kept
JOIN (
  SELECT $function(position) AS position
  FROM kept
  GROUP BY user_code, item_code
) AS chosen ON kept.position = chosen.position;
