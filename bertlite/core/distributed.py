"""The ranks of a run, and communication between them. torch is imported late: `--help` needs only the rank."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bertlite.core.errors import Failure, UserError

if TYPE_CHECKING:
    import torch


def get_rank() -> int:
    """Return the rank that torchrun gave this process; 0 without torchrun."""
    return _read_number("RANK", 0)


def get_world_size() -> int:
    """Return the number of ranks that torchrun started; 1 without torchrun."""
    return _read_number("WORLD_SIZE", 1)


def check_environment() -> None:
    """Raise UserError if the environment variables of torchrun are not those of torchrun."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        value = os.environ.get(name, "")
        if value and not value.isdecimal():
            raise UserError(
                f"the environment variable {name} is {value[:60]!r}, not a number; unset it or use torchrun"
            )
    if get_rank() >= max(1, get_world_size()):
        raise UserError(
            f"the environment variable RANK is {get_rank()}, but WORLD_SIZE is {get_world_size()}; "
            "start the ranks by torchrun, or unset both"
        )
    if get_world_size() > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise UserError(
                f"the environment variable WORLD_SIZE is {get_world_size()}, but {' and '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not set; start the ranks by torchrun, or unset WORLD_SIZE"
            )


def _read_number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def barrier() -> None:
    """Wait for all ranks."""
    import torch.distributed as dist

    if dist.is_initialized():
        with _explain_lost_rank():
            dist.barrier()


def all_reduce_sum(tensors: "list[torch.Tensor]") -> None:
    """Sum tensors over all ranks, in place."""
    import torch.distributed as dist

    if dist.is_initialized():
        with _explain_lost_rank():
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()


def all_reduce_max(number: int, device: "torch.device") -> int:
    """Return the largest number of all ranks."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return number
    shared = torch.tensor(number, device=device)
    with _explain_lost_rank():
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared.item())


def leave_process_group() -> None:
    """Disconnect from the other ranks, at the end of a run that succeeded."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _explain_lost_rank() -> Iterator[None]:
    """Raise Failure if the block fails because another rank has ended."""
    try:
        yield
    except RuntimeError as error:  # torch has no narrower class: gloo and NCCL describe it in words
        if not any(words in str(error) for words in ("Connection", "connection", "remote process", "peer")):
            raise
        raise Failure("another rank has ended; resume the run from its newest checkpoint with --resume") from None
