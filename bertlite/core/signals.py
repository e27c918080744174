"""SIGINT and SIGTERM end a process without losing work."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType

PATIENCE = 5  # seconds that Python has to handle a signal


class Stopped(BaseException):
    """SIGINT or SIGTERM asked this process to end; exit code 128 + the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequest:
    """Handles SIGINT and SIGTERM: raises Stopped or, inside `deferred()`, sets `number` for the loop to act on."""

    def __init__(self) -> None:
        self.number = 0
        self.is_deferred = False

    @contextmanager
    def deferred(self, is_deferred: bool = True) -> Iterator[None]:
        """Defer signals inside the block; with False, raise Stopped at once again, inside a deferring block.

        Leaving the block does not raise for a signal that arrived inside it: test `number`.
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
    """Send SIGINT and SIGTERM to `stop_request`; end the process if a long call into a library blocks them."""
    if os.name == "posix":
        _start_watchdog()
    signal.signal(signal.SIGINT, stop_request.receive)
    signal.signal(signal.SIGTERM, stop_request.receive)


@cache
def _start_watchdog() -> None:
    """Start a thread that ends the process if Python has not handled a signal after PATIENCE seconds.

    Python calls a signal handler only after a long call into a library has returned, but writes to the wakeup
    descriptor at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

    def watch() -> None:
        while True:
            number = os.read(reader, 1)[0]
            time.sleep(PATIENCE)
            handled = stop_request.number or stop_request.is_deferred
            if number in (signal.SIGINT, signal.SIGTERM) and not handled:
                print(f"bertlite: stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
                os._exit(128 + number)

    threading.Thread(target=watch, daemon=True).start()
