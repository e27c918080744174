"""What all uses of a model share: the fastest faithful arithmetic of the machine, and batches of like lengths."""

# Shapes: B rows, T positions.
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor, nn

from bertlite.core.runtime import Runtime
from bertlite.data.packing import collate
from bertlite.model.heads import MaskedLMHead
from bertlite.model.layers import Linear

# Positions that are computed together: few enough for a processor's cache, many enough to fill a GPU.
TOKENS_AT_A_TIME = {"cpu": 1024, "cuda": 65_536}

Module = TypeVar("Module", bound=nn.Module)
Item = TypeVar("Item")


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear by oneDNN. In fp32 torch would call MKL, which is less than half as fast on processors not Intel's."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def for_use(model: Module, runtime: Runtime) -> Module:
    """Make a model ready to be used and no longer trained, in place: on the device, without dropout."""
    model.to(runtime.device).eval()
    one_dnn = torch.backends.mkldnn.is_available()
    if one_dnn and runtime.device.type == "cpu" and runtime.dtype == torch.float32:
        for module in model.modules():
            if isinstance(module, Linear | MaskedLMHead):
                module.product = _linear
    return model


def parts(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, one after the other; the last may be shorter."""
    stream = iter(items)
    while part := list(islice(stream, size)):
        yield part


def like_lengths(lengths: Sequence[int], device: torch.device) -> Iterator[list[int]]:
    """Numbers of rows that are computed together, the longest rows first, so that little is padded."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    while order:
        count = max(1, TOKENS_AT_A_TIME[device.type] // lengths[order[0]])
        yield order[:count]
        del order[:count]


def padded(rows: list[list[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of token ids as the encoder takes them: input_ids, position_ids and document_ids, (B,T) each."""
    arrays = collate([[row] for row in rows], max(map(len, rows)), pad_token_id)
    input_ids, position_ids, document_ids = (torch.from_numpy(array).to(device) for array in arrays)
    return input_ids, position_ids, document_ids
