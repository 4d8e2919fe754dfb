"""The replicated state: tables, exact indexes, queries over them, who waits for which change, and the log's applier.

Everything here is a deterministic function of the entries applied, in order: two servers that applied the same
entries, with or without a snapshot in between, hold the same rows, indexes and snapshot bytes.
"""
