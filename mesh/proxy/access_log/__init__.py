"""The access log: one line per request, in the formats of Envoy."""
