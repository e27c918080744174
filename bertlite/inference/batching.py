"""Models prepared for inference, and batches of sequences of similar lengths."""

# Shapes: B batch, T tokens.
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from bertlite.core.errors import UserError
from bertlite.core.runtime import Runtime
from bertlite.data.packing import collate
from bertlite.model.heads import set_linear

# Tokens of a batch, padding included: few enough for a processor's cache, enough to fill a GPU.
CHUNK_CHARACTERS = 1 << 20  # tokenized together; limits the memory
TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 65_536}

Module = TypeVar("Module", bound=nn.Module)
Item = TypeVar("Item")


def inference_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute F.linear by oneDNN, without gradients. In fp32 torch calls MKL, which is slow on AMD and ARM."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def prepare_for_inference(model: Module, runtime: Runtime) -> Module:
    """Move a model to the device, in eval mode and with the fastest linear layers, in place, for good."""
    model.to(runtime.device).eval()
    has_onednn = torch.backends.mkldnn.is_available()
    if has_onednn and runtime.device.type == "cpu" and runtime.dtype == torch.float32:
        set_linear(model, inference_linear)
    return model


def chunks(items: Iterable[Item], size: int, characters: Callable[[Item], int] = lambda _: 0) -> Iterator[list[Item]]:
    """Yield lists of `size` consecutive items, or fewer if they have CHUNK_CHARACTERS, or at the end."""
    chunk: list[Item] = []
    total = 0
    for item in items:
        chunk.append(item)
        total += characters(item)
        if len(chunk) == size or total >= CHUNK_CHARACTERS:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


def batches_by_length(lengths: Sequence[int], device: torch.device) -> Iterator[list[int]]:
    """Yield the indices of sequences for one batch at a time, the longest first, so that there is little padding.

    Raises UserError for a sequence without tokens.
    """
    if min(lengths, default=1) == 0:
        raise UserError("a text has no tokens, as it is empty and the tokenizer adds none; leave it out")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        size = max(1, TOKENS_PER_BATCH[device.type] // lengths[order[0]])
        yield order[:size]
        del order[:size]


def pad(sequences: list[list[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Pad lists of token ids to the encoder's input_ids, position_ids and document_ids, (B,T) each."""
    longest = max(map(len, sequences))
    arrays = collate([[sequence] for sequence in sequences], longest, pad_token_id)
    input_ids, position_ids, document_ids = (torch.from_numpy(array).to(device) for array in arrays)
    return input_ids, position_ids, document_ids
