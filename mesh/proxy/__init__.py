"""What a proxy decides, without a socket: configuration, balancing, pooling, retries, limits, exchanges."""
