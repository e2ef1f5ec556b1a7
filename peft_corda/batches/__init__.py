"""Batches of a model: their values, masks, and what decoders are given."""
