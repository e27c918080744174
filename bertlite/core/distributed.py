"""The ranks of a run, and communication between them. torch is imported late: `--help` needs only the rank."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def get_rank() -> int:
    """Return the rank that torchrun gave this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def barrier() -> None:
    """Wait for all ranks."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensors: "list[torch.Tensor]") -> None:
    """Sum tensors over all ranks, in place."""
    import torch.distributed as dist

    if dist.is_initialized():
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()


def all_reduce_max(number: int, device: "torch.device") -> int:
    """Return the largest number of all ranks."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return number
    shared = torch.tensor(number, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared.item())


def leave_process_group() -> None:
    """Disconnect from the other ranks, at the end of a run that succeeded."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
