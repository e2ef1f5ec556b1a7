"""Step 1: how much each unit knows."""
