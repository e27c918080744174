"""What the ranks of a run share."""

import torch
import torch.distributed as dist


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensors: list[torch.Tensor]) -> None:
    """Add up tensors over all ranks, in place."""
    if dist.is_initialized():
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()


def agreed_maximum(number: int, device: torch.device) -> int:
    """The largest of the ranks' numbers, the same on all ranks."""
    if not dist.is_initialized():
        return number
    shared = torch.tensor(number, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared.item())


def leave_process_group() -> None:
    """Part from the other ranks, at the end of a run that went well."""
    if dist.is_initialized():
        dist.destroy_process_group()
