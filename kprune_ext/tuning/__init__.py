"""Step 3: what stays is fitted to the teacher."""
