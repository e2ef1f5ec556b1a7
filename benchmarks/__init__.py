"""Benchmarks of both packages. What they measured is kept in `benchmarks/results`."""
