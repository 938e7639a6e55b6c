"""What runs in the worker processes: Parquet encoding and the Iceberg commit."""
