"""`bertlite embed`: sentences to vectors."""

# Shapes: N texts, B rows, T positions, D hidden size.
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib import format as npy
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from bertlite.config.loading import choose
from bertlite.core.errors import UserError
from bertlite.core.files import atomic_file
from bertlite.inference.batching import like_lengths, padded, parts
from bertlite.model.bert import Encoder

TEXTS_AT_A_TIME = 8192  # read, sorted by length and computed; what memory holds does not depend on the file


def mean(hidden: Tensor, real: Tensor) -> Tensor:
    """The mean over the tokens of a text, [CLS] and [SEP] too, as sentence-transformers has it."""
    return (hidden * real).sum(1) / real.sum(1)


def cls(hidden: Tensor, real: Tensor) -> Tensor:
    """The vector of the first token."""
    return hidden[:, 0]


def maximum(hidden: Tensor, real: Tensor) -> Tensor:
    """The largest value of each coordinate over the tokens of a text."""
    return hidden.masked_fill(real == 0, -torch.inf).amax(1)


# Each takes hidden states (B,T,D) in fp32 and a mask (B,T,1), 1 for real tokens, and returns (B,D).
POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": mean, "cls": cls, "max": maximum}


@dataclass(frozen=True)
class Embedder:
    """Turns texts into vectors, by an encoder that is ready for use (`inference.for_use`).

    `layer` counts from 0, the embeddings, as in Hugging Face's hidden_states; -1 is the last. Texts are cut at
    `sequence_length` tokens, by default the tokenizer's model_max_length. Raises UserError for what the model lacks.
    """

    encoder: Encoder
    tokenizer: PreTrainedTokenizerBase
    pooling: str = "mean"
    layer: int = -1
    normalize: bool = False
    sequence_length: int | None = None

    def __post_init__(self) -> None:
        layers, limit = len(self.encoder.layers), self.encoder.config.max_position_embeddings
        choose(POOLINGS, self.pooling, "--pooling")
        if not -layers - 1 <= self.layer <= layers:
            raise UserError(f"--layer is {self.layer}; the model's go from 0, the embeddings, to {layers}")
        if self.sequence_length and not 2 < self.sequence_length <= limit:
            raise UserError(f"--sequence-length is {self.sequence_length}; the model takes from 3 to {limit}")

    def __call__(self, texts: list[str]) -> np.ndarray:
        """The vectors of texts: (N,D) in fp32, in their order."""
        return self._vectors(self._token_ids(texts))

    def file(self, texts: Iterable[str], out: Path) -> tuple[int, int]:
        """Write the vectors of texts to a .npy file, which appears whole or not at all; returns its shape.

        While some are computed, the next are read and tokenised.
        """
        rows, size = 0, self.encoder.config.hidden_size
        header = {"descr": npy.dtype_to_descr(np.dtype("<f4")), "fortran_order": False, "shape": (0, size)}
        with (
            atomic_file(out) as file,
            ThreadPoolExecutor(1, "tokens") as executor,
            tqdm(disable=None, unit=" texts") as bar,
        ):
            npy.write_array_header_1_0(file, header)
            chunks = map(self._token_ids, parts(texts, TEXTS_AT_A_TIME))
            coming = executor.submit(next, chunks, None)
            while ids := coming.result():
                coming = executor.submit(next, chunks, None)
                file.write(self._vectors(ids).tobytes())
                rows += len(ids)
                bar.update(len(ids))
            file.seek(0)  # the header leaves room for any number of rows
            npy.write_array_header_1_0(file, header | {"shape": (rows, size)})
        return rows, size

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        limit = min(self.tokenizer.model_max_length, self.encoder.config.max_position_embeddings)
        length = self.sequence_length or limit
        return self.tokenizer(texts, truncation=True, max_length=length)["input_ids"] if texts else []

    def _vectors(self, ids: list[list[int]]) -> np.ndarray:
        device = self.encoder.embeddings.word.weight.device
        depth = self.layer % (len(self.encoder.layers) + 1)
        vectors = np.empty((len(ids), self.encoder.config.hidden_size), np.float32)
        with torch.inference_mode():
            for numbers in like_lengths([len(row) for row in ids], device):
                inputs = padded([ids[number] for number in numbers], self.tokenizer.pad_token_id, device)
                hidden = self.encoder(*inputs, depth=depth).float()
                pooled = POOLINGS[self.pooling](hidden, inputs[2][..., None])
                vectors[numbers] = (F.normalize(pooled, dim=1) if self.normalize else pooled).cpu().numpy()
        return vectors
