"""Speed and memory, each against a real peer on the same machine in the same run: `make bench`."""
