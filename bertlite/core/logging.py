"""The `bertlite` logger: what a command tells the person who runs it."""

import logging
import os
import sys

from tqdm import tqdm

logger = logging.getLogger("bertlite")


class _BesideProgressBars(logging.Handler):
    """Writes lines to standard error without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def log_to_terminal() -> None:
    """Show the logger's lines on standard error, from rank 0 alone; in Python, nothing is shown unless asked for."""
    if not any(isinstance(handler, _BesideProgressBars) for handler in logger.handlers):
        logger.addHandler(_BesideProgressBars())
    logger.setLevel(logging.INFO if rank_from_environment() == 0 else logging.ERROR)
    logger.propagate = False


def rank_from_environment() -> int:
    """The rank that torchrun gave this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))
