"""A model and batches give factors."""
