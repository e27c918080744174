"""The `bertlite` logger. As in any library, its messages are shown only if the program configures `logging`."""

import logging
import re
import sys

from tqdm import tqdm

from bertlite.core.distributed import get_rank

logger = logging.getLogger("bertlite")
logger.addHandler(logging.NullHandler())


MAX_MESSAGE = 1000  # characters of a line; a value in it may be of any length

# Characters that move the cursor, change colours or the direction of text.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class _TqdmHandler(logging.Handler):
    """Write messages to standard error without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(format_message(self.format(record)), file=sys.stderr)


def printable(text: str) -> str:
    """Escape the control characters of a text for a terminal, except line breaks and tabs."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def without_controls(text: str) -> str:
    """Replace what cannot be shown in a line, such as control characters and line breaks, by blanks."""
    return "".join(character if character.isprintable() else " " for character in text)


def format_message(text: str) -> str:
    """Make a message printable, and leave out the middle of lines that are too long."""
    lines = printable(text).splitlines()
    return "\n".join(
        f"{line[: MAX_MESSAGE - 300]} … {line[-297:]}" if len(line) > MAX_MESSAGE else line for line in lines
    )


_terminal = _TqdmHandler()


def log_to_terminal() -> None:
    """Show messages on standard error, as commands do; under torchrun, those of rank 0."""
    logger.addHandler(_terminal)
    logger.setLevel(logging.INFO if get_rank() == 0 else logging.ERROR)
    logger.propagate = False


def count(number: int, noun: str) -> str:
    """Return a number with its noun, such as 1 seed or 2 seeds."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
