"""Step 1: measuring the knowledge of each unit."""
