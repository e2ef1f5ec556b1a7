"""The command `kprune`."""
