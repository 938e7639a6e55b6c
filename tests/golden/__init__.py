"""Data directories of older commits, and what today's server must find in them."""
