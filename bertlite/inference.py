"""What all uses of a model share: the fastest faithful arithmetic of the machine, and batches of like lengths."""

# Shapes: B rows, T positions.
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bertlite.model import Linear, MaskedLMHead
from bertlite.runtime import Runtime

# Positions that are computed together: few enough for a processor's cache, many enough to fill a GPU.
TOKENS_AT_A_TIME = {"cpu": 1024, "cuda": 65_536}

Module = TypeVar("Module", bound=nn.Module)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear by oneDNN. In fp32 torch would call MKL, which is less than half as fast on processors not Intel's."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDnnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return _linear(input, self.weight, self.bias)


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
    if runtime.device.type == "cpu" and runtime.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        for module in model.modules():
            module.__class__ = ONE_DNN.get(type(module), type(module))
    return model


def like_lengths(lengths: Sequence[int], device: torch.device) -> Iterator[list[int]]:
    """Numbers of rows that are computed together, the longest rows first, so that little is padded."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    while order:
        count = max(1, TOKENS_AT_A_TIME[device.type] // lengths[order[0]])
        yield order[:count]
        del order[:count]


def padded(rows: list[list[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of token ids as the encoder takes them: input_ids, position_ids and document_ids, (B,T) each."""
    tensors = [torch.tensor(row) for row in rows]
    input_ids = pad_sequence(tensors, batch_first=True, padding_value=pad_token_id)
    position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    lengths = torch.tensor([len(row) for row in rows])
    document_ids = (position_ids < lengths[:, None]).long()
    return input_ids.to(device), position_ids.to(device), document_ids.to(device)
