"""`python -m kprune_ext` is the command `kprune`."""

from .cli import main

main()
