"""Where the command line meets its user: standard streams, the environment, messages about errors, and exit codes."""

import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from bertlite.core.distributed import check_environment, get_rank
from bertlite.core.errors import Failure, UserError
from bertlite.core.logging import format_message, log_to_terminal, printable
from bertlite.core.signals import Stopped, listen, stop_request


def run_app(app: Callable[[], object]) -> None:
    """Run the commands. A user's mistake ends with one or two lines and exit code 2, never with a traceback."""
    _open_standard_streams()
    # torch reads this when it is imported: large tensors in huge pages make a step about a tenth faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # OpenMP reads this: threads that wait for another one sleep after microseconds instead of a millisecond. Beside a
    # busy process, for which the other one has to wait, training is 1.6 to 1.8 times as fast (scripts/README.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    log_to_terminal()
    listen()
    try:
        check_environment()
        app()
    except SystemExit as end:
        if end.code == 2:  # typer has printed what is wrong with the arguments
            for hint in _explain_arguments(*sys.argv[1:]):
                print(f"bertlite: {hint}", file=sys.stderr)
        raise
    except BrokenPipeError:  # whoever read the output has ended, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except (Exception, Stopped) as error:
        explained = _explain(error)
        if explained is None:
            raise
        message, code = explained
        if get_rank() == 0 or code == 1:
            for line in format_message(message).splitlines():
                print(f"bertlite: {line}", file=sys.stderr)
        sys.exit(code)
    finally:
        stop_request.is_deferred = True  # the process ends anyway


def _open_standard_streams() -> None:
    """Open /dev/null for standard streams that are closed, and let the others print every text and file name."""
    for name in ("stdin", "stdout", "stderr"):  # in this order, so that each gets the number that it should have
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if stream.encoding.lower() == "utf-8" else "backslashreplace")


def _explain_arguments(command: str = "", *arguments: str) -> Iterator[str]:
    """Explain how to write what was given in another place: texts, files and settings."""
    from bertlite.config.loading import find_settings

    if command in ("predict", "fill"):
        texts = [text for text in arguments if re.match("-[^-].* |-[^a-z-]", text)]
        yield from (f"to read {text!r} as a text, write -- before it" for text in texts)
    if command == "evaluate" and len(arguments) > 1 and not any(text.startswith("-") for text in arguments[:2]):
        yield f"to measure on {arguments[1]}, write --data {arguments[1]}"
    yield from find_settings(command, *arguments)


def _explain(error: BaseException) -> tuple[str, int] | None:
    """Return the message for an error and the exit code; None for a bug, which needs its traceback."""
    from bertlite.core.files import find_full_disk

    if isinstance(error, Stopped):
        return f"stopped by {error}", 128 + error.number
    if isinstance(error, UserError | Failure):
        return str(error), 2 if isinstance(error, UserError) else 1
    if reason := find_full_disk(error):
        name = error.filename if isinstance(error, OSError) else None
        return f"{name or 'temporary files (TMPDIR), the cache or the output'}: {reason}", 1
    if isinstance(error, OSError):  # such as a folder that cannot be written, or a file that disappeared
        return f"{error.filename or 'the system'}: {error.strerror or error}", 2
    if isinstance(error, MemoryError | RuntimeError):
        from bertlite.core.runtime import is_out_of_memory

        if is_out_of_memory(error):
            return "out of memory; lower the batch size, train.per_device_train_batch_size or the size of the model", 1
    return None


def print_result(result: Any, as_json: bool, format_text: Callable[[Any], str]) -> None:
    """Print the result of a command as JSON or as text, on rank 0."""
    ensure_ascii = sys.stdout.encoding.lower() != "utf-8"
    print_text(json.dumps(result, ensure_ascii=ensure_ascii) if as_json else printable(format_text(result)))


def print_text(result: object) -> None:
    """Print the result of a command, on rank 0."""
    if get_rank() == 0:
        print(result, flush=True)
