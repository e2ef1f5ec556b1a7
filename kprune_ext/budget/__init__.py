"""Step 2: cost of a unit, and the choice of units to keep."""
