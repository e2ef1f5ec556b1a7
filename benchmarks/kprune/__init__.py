"""Benchmarks of pruning with K-prune."""
