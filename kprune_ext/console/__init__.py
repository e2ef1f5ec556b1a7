"""What both commands share, and how their packages are imported without what a command does not need."""
