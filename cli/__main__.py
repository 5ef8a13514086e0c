"""`python -m afd_cli` is `afd`."""

from .commands import main

main(prog_name="afd")
