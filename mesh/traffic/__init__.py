"""What is to happen to requests, said once and neutrally: resources of every kind compile to it."""
