"""What it costs to start a command, or to import a package."""
