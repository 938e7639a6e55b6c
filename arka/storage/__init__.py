"""Adapters to the world: local disk, object stores, the Iceberg catalog. ``ports`` says what the tiers need."""
