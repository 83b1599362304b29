"""The errors that a user is meant to read, and other errors in the words that they take from them."""

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 80, 80, 40


class InputError(ValueError):
    """Bad input from the user, in one line: which file, camera or option, what was expected, and the mend.

    The command line prints it as ``bkind3d: error: <message>`` and exits with code 2, without a traceback.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM ended what was going on, in an orderly way: a scheduler wants the machine back.

    The command line prints it as ``bkind3d: <message>`` and exits with code 143.
    """


def reason(error: Exception) -> str:
    """What went wrong, as the system says it where the system does."""
    return str(getattr(error, "strerror", None) or error)


def first_line(error: Exception) -> str:
    """An error in one line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def brief(text: str, most: int = 300) -> str:
    """A text, cut where it is longer than a message should be."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def shown(value: object) -> str:
    """A value as Python writes it, cut: one from a file may be as large as the file."""
    return _SHORT.repr(value)
