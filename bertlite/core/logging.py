"""The `bertlite` logger. As in any library, its messages are shown only if the program configures `logging`."""

import logging
import sys

from tqdm import tqdm

from bertlite.core.distributed import get_rank

logger = logging.getLogger("bertlite")
logger.addHandler(logging.NullHandler())


class _TqdmHandler(logging.Handler):
    """Write messages to standard error without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


_terminal = _TqdmHandler()


def log_to_terminal() -> None:
    """Show messages on standard error, as commands do; under torchrun, those of rank 0."""
    logger.addHandler(_terminal)
    logger.setLevel(logging.INFO if get_rank() == 0 else logging.ERROR)
    logger.propagate = False
