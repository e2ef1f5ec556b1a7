"""What was kept, as a value."""
