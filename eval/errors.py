"""The one exception that a program shows its user as a sentence instead of a traceback."""


class UserError(Exception):
    """Something the user can put right; the message says what, where, what is allowed, and what to do next."""


class NotInstalled(UserError):
    """A library that one setting needs and this machine does not have: an experiment leaves the setting out."""


def check_count(name: str, value: object, optional: bool = False) -> None:
    """Raise UserError unless `value` is a whole number from 1, or None where that is allowed."""
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name}={value} is not allowed: it must be a whole number from 1{', or null' * optional}")
