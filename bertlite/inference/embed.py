"""`bertlite embed`: texts to vectors."""

# Shapes: N texts, B batch, T tokens, D hidden size.
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
from bertlite.core.logging import logger
from bertlite.core.runtime import check_finite
from bertlite.core.trust import MAX_TEXT_CHARACTERS
from bertlite.inference.batching import batches_by_length, chunks, pad
from bertlite.model.encoder import Encoder

TEXTS_PER_CHUNK = 8192  # sorted by length together; memory does not grow with the file


# Each takes hidden states (B,T,D) in fp32 and a mask (B,T,1), 1 for real tokens, and returns (B,D). As in
# sentence-transformers, [CLS] and [SEP] are real tokens.
POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda hidden, real: (hidden * real).sum(1) / real.sum(1),
    "cls": lambda hidden, real: hidden[:, 0],
    "max": lambda hidden, real: hidden.masked_fill(real == 0, -torch.inf).amax(1),
}


@dataclass(frozen=True)
class Embedder:
    """Embeds texts by an encoder that is prepared for inference.

    `layer` counts from 0, the embeddings, as in Hugging Face's hidden_states; -1 is the last. Texts are truncated to
    `sequence_length` tokens, by default the tokenizer's model_max_length; how many are is logged. `lowercase` changes
    them before. Raises UserError for a pooling, layer or length that the model does not have.
    """

    encoder: Encoder
    tokenizer: PreTrainedTokenizerBase
    pooling: str = "mean"
    layer: int = -1
    normalize: bool = False
    sequence_length: int | None = None
    lowercase: bool = False

    def __post_init__(self) -> None:
        layers, positions = len(self.encoder.layers), self.encoder.config.max_position_embeddings
        choose(POOLINGS, self.pooling, "--pooling")
        if not -layers - 1 <= self.layer <= layers:
            raise UserError(f"--layer is {self.layer}; the model has 0, the embeddings, to {layers}")
        if self.sequence_length and not 2 < self.sequence_length <= positions:
            raise UserError(f"--sequence-length is {self.sequence_length}; the model takes 3 to {positions} tokens")

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Return the vectors of texts in their order, (N,D) in fp32."""
        sequences, num_truncated = self._tokenize(texts)
        self._log_truncated(num_truncated, len(texts))
        return self._embed(sequences)

    def write(self, texts: Iterable[str], out: Path) -> tuple[int, int]:
        """Write the vectors of texts to a .npy file, whole or not at all, and return its shape (N,D).

        The next texts are read and tokenized while the vectors of the current ones are computed.
        """
        count, num_truncated, size = 0, 0, self.encoder.config.hidden_size
        header = {"descr": npy.dtype_to_descr(np.dtype("<f4")), "fortran_order": False, "shape": (0, size)}
        with (
            atomic_file(out) as file,
            ThreadPoolExecutor(1, "tokenize") as executor,
            tqdm(disable=None, unit=" texts", delay=0.5) as progress_bar,
        ):
            npy.write_array_header_1_0(file, header)
            tokenized = map(self._tokenize, chunks(texts, TEXTS_PER_CHUNK, len))
            future = executor.submit(next, tokenized, None)
            while chunk := future.result():
                sequences, num_truncated_in_chunk = chunk
                future = executor.submit(next, tokenized, None)
                file.write(self._embed(sequences).tobytes())
                count += len(sequences)
                num_truncated += num_truncated_in_chunk
                progress_bar.update(len(sequences))
            file.seek(0)  # the header has room for any number of texts
            npy.write_array_header_1_0(file, header | {"shape": (count, size)})
        self._log_truncated(num_truncated, count)
        return count, size

    @property
    def max_length(self) -> int:
        """Tokens after which texts are truncated."""
        limit = min(self.tokenizer.model_max_length, self.encoder.config.max_position_embeddings)
        return self.sequence_length or limit

    def _tokenize(self, texts: list[str]) -> tuple[list[list[int]], int]:
        """Return the token ids of texts, and how many texts were truncated."""
        if not texts:
            return [], 0
        texts = [text[:MAX_TEXT_CHARACTERS] for text in texts]
        texts = [text.lower() for text in texts] if self.lowercase else texts
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length)
        return encoded["input_ids"], sum(bool(encoding.overflowing) for encoding in encoded.encodings)

    def _log_truncated(self, number: int, total: int) -> None:
        if number:
            logger.warning(f"{number:,} of {total:,} texts have more than {self.max_length} tokens and were truncated")

    def _embed(self, sequences: list[list[int]]) -> np.ndarray:
        device = self.encoder.embeddings.word.weight.device
        depth = self.layer % (len(self.encoder.layers) + 1)
        vectors = np.empty((len(sequences), self.encoder.config.hidden_size), np.float32)
        with torch.inference_mode():
            for indices in batches_by_length([len(sequence) for sequence in sequences], device):
                batch = [sequences[index] for index in indices]
                input_ids, position_ids, document_ids = pad(batch, self.tokenizer.pad_token_id, device)
                hidden = self.encoder(input_ids, position_ids, document_ids, depth=depth).float()
                pooled = POOLINGS[self.pooling](hidden, document_ids[..., None])
                check_finite(pooled)
                vectors[indices] = (F.normalize(pooled, dim=1) if self.normalize else pooled).cpu().numpy()
        return vectors
