"""The durability tiers: a write goes down them, watermarks come back up."""
