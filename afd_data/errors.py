"""The one exception for what a user can mend: shown as one message and exit code 2, never as a traceback."""


class UserError(ValueError):
    """Says what was wrong, where, and what to do about it."""
