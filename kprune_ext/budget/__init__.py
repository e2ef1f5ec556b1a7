"""Step 2: what a unit costs, and which units stay."""
