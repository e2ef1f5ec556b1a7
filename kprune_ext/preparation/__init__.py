"""What a run starts from: options, the model that was given, its copy, and checks before any work."""
