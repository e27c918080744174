"""The errors that end a command with a message instead of a traceback, and the message of other libraries' errors."""


class UserError(Exception):
    """A mistake in what the user gave. The message names the file or key, the value and the fix; exit code 2."""


class Failure(Exception):
    """A valid request that failed, or a check that found a difference; exit code 1."""


class DiskFull(Failure):
    """The disk is full. What was complete before is intact."""


class DataLost(Failure):
    """Files of a corpus were removed or truncated while they were in use. Everything else is intact."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message; of one without a message, the name of its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
