"""`python -m asyncflow.cli` is the same as `asyncflow`."""

from asyncflow.cli.main import main

main()
