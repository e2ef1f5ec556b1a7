"""Benchmarks of training with CorDA adapters, and of calibrating for it."""
