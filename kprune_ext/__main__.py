"""`python -m kprune_ext` is the command `kprune`."""

from kprune_ext.cli import main

main()
