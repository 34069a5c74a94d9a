"""The one error that reading a dataset raises."""


class DataError(ValueError):
    """A dataset cannot be used as asked; the message says what is wrong, where, and what to do, in one line."""
