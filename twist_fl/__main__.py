"""`python -m twist_fl`: the command `twist-fl`."""

from twist_fl.cli.app import main

main()
