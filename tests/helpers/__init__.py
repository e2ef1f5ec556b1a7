"""What tests share: tiny models, data, oracles of what a command prints, processes."""
