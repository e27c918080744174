"""Lines for the person who watches a command."""

import os
import sys

from tqdm import tqdm


def rank_from_environment() -> int:
    """The rank that torchrun gave this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def say(text: str) -> None:
    """A line for the person who watches: on standard error, from rank 0 alone."""
    if rank_from_environment() == 0:
        tqdm.write(text, file=sys.stderr)
