"""The one exception that speaks to the user: one line, no traceback, exit code 2."""


class UserError(Exception):
    """What is wrong, where (file, key, sample), and how to mend it, in one line."""
