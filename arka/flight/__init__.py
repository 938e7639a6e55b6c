"""Arrow Flight over gRPC over HTTP/2 on trio streams: from the socket to accepted writes and back."""
