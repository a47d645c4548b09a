"""Decisions in pure Python: scheduling and the memory ledger. No mlx, threads, sockets or clock."""
