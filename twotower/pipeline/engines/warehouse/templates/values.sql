(
  SELECT $number AS condition_number, value, first_row
  FROM (
    SELECT $column, $column AS value, MIN(position) AS first_row
    FROM log
    WHERE user_id IS NOT NULL AND item_id IS NOT NULL
    GROUP BY $column
  ) AS texts
  -- Those that are compared with come first, however many others there are.
  ORDER BY COALESCE($is_meant, FALSE) DESC, first_row
  LIMIT $limit
)
