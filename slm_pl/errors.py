"""The one exception a user is meant to read."""


class UsageError(Exception):
    """Something the user gave cannot be used.

    The message says what was got, what is allowed and the fix. The command line prints it without a traceback and exits
    with status 1.
    """
