"""Errors as a user of the command line sees them."""

import re

INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended


class UsageError(ValueError):
    """The command was called wrongly: exit status 2 and a line of usage."""


def error_line(error: BaseException) -> str:
    """One line for any error: its message, with its type where the message alone says too little."""
    text = str(error).strip()
    if text.startswith("Caught ") and "Original Traceback" in text:  # from a data loading process
        text = re.sub(r"^[\w.]+: ", "", text.splitlines()[-1])
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    line = text.splitlines()[0] if text else ""
    if isinstance(error, ValueError | OSError) or type(error).__module__.startswith("sparse_ft"):
        return line or type(error).__name__
    return f"{type(error).__name__}: {line}".rstrip(": ")
