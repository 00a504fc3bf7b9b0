
-- Positions count the rows that are left.
CREATE OR REPLACE TEMP TABLE kept AS
SELECT
  blocks.earlier + ROW_NUMBER() OVER (PARTITION BY rows_left.block ORDER BY rows_left.position) - 1
    AS position,
  rows_left.* EXCEPT (block, position)
FROM (
  SELECT *, DIV(position, 1048576) AS block FROM kept
) AS rows_left
JOIN (
  SELECT block, SUM(COUNT(*)) OVER (ORDER BY block) - COUNT(*) AS earlier
  FROM (SELECT DIV(position, 1048576) AS block FROM kept) AS rows_left
  GROUP BY block
) AS blocks ON rows_left.block = blocks.block;
