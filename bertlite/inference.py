"""What all uses of a model share: the fastest faithful arithmetic of the machine, and batches of like lengths."""

# Shapes: B rows, T positions.
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bertlite.model import Linear, MaskedLMHead
from bertlite.runtime import Runtime

# Positions that are computed together: few enough for a processor's cache, many enough to fill a GPU.
TOKENS_AT_A_TIME = {"cpu": 1024, "cuda": 65_536}

Module = TypeVar("Module", bound=nn.Module)
Item = TypeVar("Item")


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear by oneDNN. In fp32 torch would call MKL, which is less than half as fast on processors not Intel's."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


class OneDnnLinear(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight, self.bias)

    def part(self, x: Tensor, coordinates: slice) -> Tensor:
        return _linear(x, self.weight[coordinates], self.bias[coordinates])


class OneDnnHead(MaskedLMHead):
    def forward(self, hidden: Tensor, word_embedding: Tensor) -> Tensor:
        return _linear(self.norm(self.activation(self.dense(hidden))), word_embedding, self.bias)


ONE_DNN: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: OneDnnLinear,
    Linear: OneDnnLinear,
    MaskedLMHead: OneDnnHead,
}


def for_use(model: Module, runtime: Runtime) -> Module:
    """Make a model ready to be used and no longer trained, in place: on the device, without dropout."""
    model.to(runtime.device).eval()
    one_dnn = torch.backends.mkldnn.is_available()
    if one_dnn and runtime.device.type == "cpu" and runtime.dtype == torch.float32:
        for module in model.modules():
            module.__class__ = ONE_DNN.get(type(module), type(module))
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
    input_ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad_token_id)
    position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    document_ids = (position_ids < torch.tensor([[len(row)] for row in rows])).long()
    return input_ids.to(device), position_ids.to(device), document_ids.to(device)
