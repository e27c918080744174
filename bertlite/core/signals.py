"""SIGINT and SIGTERM end a process where nothing is lost."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType

PATIENCE = 5  # seconds until a signal that Python did not get to ends the process


class Stopped(BaseException):
    """SIGINT or SIGTERM asked this process to end; exit code 128 + the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequest:
    """SIGINT or SIGTERM: raises Stopped at once or, inside `deferred()`, is kept in `number` for the loop to act on."""

    def __init__(self) -> None:
        self.number = 0
        self.is_deferred = False

    @contextmanager
    def deferred(self, is_deferred: bool = True) -> Iterator[None]:
        """Defer signals inside the block; with False, let them end an outer block at once where nothing would be lost.

        A signal that came before the block is not raised again: test `number`.
        """
        outer, self.is_deferred = self.is_deferred, is_deferred
        try:
            yield
        finally:
            self.is_deferred = outer

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if not self.is_deferred:
            raise Stopped(number)


stop_request = StopRequest()


def listen() -> None:
    """From now on, SIGINT and SIGTERM go to `stop_request`; a library's long computation does not hold them up."""
    _watch()
    signal.signal(signal.SIGINT, stop_request.receive)
    signal.signal(signal.SIGTERM, stop_request.receive)


@cache
def _watch() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # written to at once, whatever Python is waiting for
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

    def end_when_ignored() -> None:
        while True:
            number = os.read(reader, 1)[0]
            time.sleep(PATIENCE)
            if number in (signal.SIGINT, signal.SIGTERM) and not (stop_request.number or stop_request.is_deferred):
                print(f"bertlite: stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
                os._exit(128 + number)

    threading.Thread(target=end_when_ignored, daemon=True).start()
