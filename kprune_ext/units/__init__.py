"""Heads, key-value groups and neurons of one model: finding, removing and recording them."""
