"""SIGINT, SIGTERM and SIGHUP end a process without losing work."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType

PATIENCE = 5  # seconds that Python has to handle a signal
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(BaseException):
    """One of SIGNALS asked this process to end; exit code 128 + the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequest:
    """Handles SIGNALS: raises Stopped, once, or, inside `deferred()`, sets `number` for the loop to act on."""

    def __init__(self) -> None:
        self.number = 0
        self.is_deferred = False
        self.is_raised = False
        self.save: Callable[[], None] | None = None
        self.saving = threading.Lock()

    @contextmanager
    def deferred(self, is_deferred: bool = True) -> Iterator[None]:
        """Defer signals inside the block; with False, raise Stopped at once again, inside a deferring block.

        Leaving the block does not raise for a signal that arrived inside it: test `number`.
        """
        outer, self.is_deferred = self.is_deferred, is_deferred
        try:
            yield
        except Stopped:
            self.is_raised = True  # the process is ending: another signal would interrupt what cleans up
            raise
        finally:
            self.is_deferred = outer

    @contextmanager
    def saves_when_late(self, save: Callable[[], None]) -> Iterator[None]:
        """Let the watchdog call `save` and end the process if the block runs for PATIENCE seconds after a signal.

        `save` runs in another thread while the block goes on: it may only use what the block does not change.
        """
        with self.saving:
            self.save = save
        try:
            yield
        finally:
            with self.saving:
                self.save = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if not self.is_deferred and not self.is_raised:  # a second one would interrupt what the first one cleans up
            self.is_raised = True
            raise Stopped(number)


stop_request = StopRequest()


def listen() -> None:
    """Send SIGNALS to `stop_request`; end the process if a long call into a library blocks them.

    SIGHUP stays ignored where nohup made it so.
    """
    if os.name == "posix":
        _start_watchdog()
    for number in SIGNALS:
        if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop_request.receive)


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
            with stop_request.saving:
                if number in SIGNALS and (stop_request.save or not (stop_request.number or stop_request.is_deferred)):
                    if stop_request.save:
                        stop_request.save()
                    print(f"bertlite: stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
                    os._exit(128 + number)

    threading.Thread(target=watch, daemon=True).start()
