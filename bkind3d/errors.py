"""The one error that a user is meant to read."""


class InputError(ValueError):
    """Bad input from the user, in one line: which file, camera or option, what was expected, and the mend.

    The command line prints it as ``bkind3d: error: <message>`` and exits with code 2, without a traceback.
    """
