"""Attacks: clients that try to buy more of a server than they pay for, and what a neighbour feels beside them.

``make attack`` runs them against a real server and prints a table (docs/hardening.md); ``test_attacks.py`` is the
quick form. Each attack is one function with a docstring in one of the ``over_*`` modules.
"""
