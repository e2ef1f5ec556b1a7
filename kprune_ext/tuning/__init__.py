"""Step 3: weight tuning, a fit of the remaining weights to the teacher."""
