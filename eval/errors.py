"""The one exception that a program shows its user as a sentence instead of a traceback."""


class UserError(Exception):
    """Something the user can put right; the message says what, where, what is allowed, and what to do next."""
