"""SIGINT and SIGTERM end a process where nothing is lost."""

import signal
from types import FrameType


class Stopped(BaseException):
    """SIGINT or SIGTERM asked this process to end; exit code 128 + the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequest:
    """SIGINT or SIGTERM: ends the process at once or, while `deferred`, is kept in `number` for the work to act on."""

    def __init__(self) -> None:
        self.number = 0
        self.deferred = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if not self.deferred:
            raise Stopped(number)


stop_request = StopRequest()


def listen() -> None:
    """From now on, SIGINT and SIGTERM go to `stop_request`."""
    signal.signal(signal.SIGINT, stop_request.receive)
    signal.signal(signal.SIGTERM, stop_request.receive)
