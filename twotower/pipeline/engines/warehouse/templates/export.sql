
EXPORT DATA OPTIONS (
  uri = $uri,
  format = 'PARQUET',
  compression = 'SNAPPY',
  overwrite = TRUE
) AS
SELECT * FROM $table;
