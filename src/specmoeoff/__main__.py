"""``python -m specmoeoff`` is the command line."""

from specmoeoff.cli import main

main()
