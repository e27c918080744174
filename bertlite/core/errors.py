"""The two ways in which a command ends badly."""


class UserError(Exception):
    """A mistake in what the user gave. The message names the file or key, the value and the fix; exit code 2."""


class Failure(Exception):
    """Something that was right to ask for did not work out, or a check did not hold; exit code 1."""


class DiskFull(Failure):
    """There is no room for what was to be written; all else is intact."""


class DataLost(Failure):
    """The files of a corpus vanished or were cut while they were in use; all else is intact."""
