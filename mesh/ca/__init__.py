"""The certificate authority and what a valid identity is: certificates as values; no sockets, clock or key making."""
