"""The Cython hot path: buffers, framing, LSNs, partition transforms and the wire."""
