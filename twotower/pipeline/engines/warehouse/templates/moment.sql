
-- The last $share of the rows, and those held out before; halves are rounded to even numbers.
SET share_of_rows = num_rows * CAST($share AS FLOAT64);
SET held_out = held_out + CAST(FLOOR(share_of_rows) AS INT64) + CASE
  WHEN share_of_rows - FLOOR(share_of_rows) > 0.5 THEN 1
  WHEN share_of_rows - FLOOR(share_of_rows) = 0.5 THEN MOD(CAST(FLOOR(share_of_rows) AS INT64), 2)
  ELSE 0
END;
-- Rows of one second stay together, so a part may have more rows than its share.
SET $variable = (SELECT log_timestamp FROM kept WHERE position = num_rows - held_out);
