"""The command `afd`: a table of contents.

Reads a recipe, calls the Python API (afd_data, afd_train) and turns a user's mistake into one message and exit code 2.
Whatever is heavy is imported inside the commands: `afd --help` and `--dry-run` need neither torch nor datasets.
"""

from .commands import main

__all__ = ["main"]
