"""Pruned models as ordinary checkpoints."""
