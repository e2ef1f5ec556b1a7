"""What a run sees of a model: its layers, what goes into them, and where they are."""
