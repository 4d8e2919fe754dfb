"""Consensus: a sans-I/O Raft core. Start at `mesh.raft.node`.

"Paper" in comments is Ongaro and Ousterhout, ATC 2014, extended version; "dissertation" is Ongaro, Stanford 2014.
"""
