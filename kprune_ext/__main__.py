"""`python -m kprune_ext` is the command `kprune`."""

from .cli.main import main

main()
