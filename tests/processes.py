"""Commands in processes of their own, forked from a server that has imported the libraries already.

Importing torch and transformers takes seconds of every new interpreter; a fork has them at once.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "transformers", "bertlite.cli", "bertlite.pretraining.pretrain"])


def _run_command(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    from bertlite import cli

    os.environ.update(environment)
    for stream, name in ((1, os.devnull), (2, log)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), stream)
    sys.argv = ["bertlite", *arguments]
    cli.main()


class Command:
    """`bertlite ARGUMENTS`, started; the methods are those of subprocess.Popen."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        self.log = tempfile.NamedTemporaryFile("r")  # noqa: SIM115, it lives as long as the command
        self.process = SERVER.Process(target=_run_command, args=([*map(str, arguments)], self.log.name, environment))
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 60) -> tuple[None, str]:
        """Wait until the process ends, and return its standard error; only once."""
        self.process.join(timeout)
        with self.log:
            errors = self.log.read()
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.process.name, timeout, stderr=errors)
        return None, errors


def start_ranks(*arguments: object, ranks: int = 2) -> list[Command]:
    """Start a command in several ranks, with the environment that torchrun gives them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    return [Command(*arguments, RANK=str(rank), LOCAL_RANK=str(rank), **address) for rank in range(ranks)]


def run_ranks(*arguments: object, ranks: int = 2) -> None:
    """Run a command in several ranks to its end."""
    for command in start_ranks(*arguments, ranks=ranks):
        errors = command.communicate(timeout=200)[1]
        assert command.returncode == 0, errors
