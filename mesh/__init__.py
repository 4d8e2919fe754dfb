"""The mesh as a library: pure and deterministic. Time and randomness are arguments; sockets and disks: see `agent`."""
