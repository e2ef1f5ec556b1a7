"""Access to the base model: its layers, weights and hooks."""
