"""Consul's HTTP API: the server, how requests are read and answers written, and one module per API family."""
