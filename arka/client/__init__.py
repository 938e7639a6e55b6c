"""What speaks to a server from outside, through stock ``pyarrow.flight``: nothing that serves uses it."""
