"""The one exception that means "the user can fix this"."""

__all__ = ["EbmPriorError"]


class EbmPriorError(ValueError):
    """Bad input, described in one line that says what is wrong and what to do.

    The command line prints the message as `Error: ...` and exits with code 1;
    a library user may catch it as a `ValueError`.
    """
