"""Contact with the base model: its layers, weights and hooks."""
