"""Engines that are broken on purpose, and the tests that have to catch them."""
