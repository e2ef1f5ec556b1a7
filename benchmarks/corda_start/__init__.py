"""Benchmarks of where a CorDA adapter starts: time, memory and accuracy of the decompositions."""
