"""Arka: Arrow Flight ingestion with an acknowledgement at every durability tier."""
