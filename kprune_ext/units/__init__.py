"""Heads, key-value groups and neurons of one model: find them, cut them, record them."""
