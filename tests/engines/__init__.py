"""Engines of other languages that read and write Arka's tables: Spark, and Iceberg's own Java library."""
