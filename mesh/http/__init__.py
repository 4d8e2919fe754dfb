"""HTTP/1.1 without I/O: one codec for the data plane and the agent's API server."""
