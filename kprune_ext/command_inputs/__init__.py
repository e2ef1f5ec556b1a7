"""What the subcommands of `kprune` take: options, models, data and scores."""
