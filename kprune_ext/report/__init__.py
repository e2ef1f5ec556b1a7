"""Report of a pruning run: units kept, cost and error."""
