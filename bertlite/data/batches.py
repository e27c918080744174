"""Batches as a pure function of the configuration and the step."""

# Shapes: B sequences, T positions, P predictions per sequence, V vocabulary.
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bertlite.config.settings import MaskingSettings, TrainSettings
from bertlite.core.random import EPOCH_ORDER, EVALUATION_MASKS, SOURCE_ORDER, TRAINING_MASKS, permute
from bertlite.data.corpus import Corpus, read_slices
from bertlite.data.masking import IGNORED, Vocabulary, mask_tokens, max_predictions
from bertlite.data.packing import Packing, collate
from bertlite.data.tokenizer import describe_vocabulary
from bertlite.data.words import mark_word_starts

COUNTED_SEQUENCES = 10_000  # from which the frequencies of tokens are estimated
DEFAULT_TRAINING = TrainSettings()
EVALUATION_MASKING = MaskingSettings()  # the same for every run, so that validation losses are comparable


@dataclass(frozen=True)
class Batch:
    """Inputs and labels of the model; see `model.Encoder` for the shapes. Unused predictions have the label IGNORED."""

    input_ids: Tensor  # (B,T)
    position_ids: Tensor  # (B,T), from 0 in each document
    document_ids: Tensor  # (B,T), from 1 in each sequence; 0 is padding
    prediction_positions: Tensor  # (B,P)
    labels: Tensor  # (B,P)

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device) -> Self:
        return type(self)(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))

    def slice(self, start: int, end: int) -> Self:
        """Return sequences `start` to `end`."""
        return type(self)(*(tensor[start:end] for tensor in vars(self).values()))

    def tokens(self) -> int:
        """Count the tokens, without padding."""
        return int((self.document_ids > 0).sum())


class Batches:
    """The batches of a packed corpus. Equal arguments give equal batches, in any order and on any rank."""

    def __init__(
        self,
        corpus: Corpus,
        packing: Packing,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        masking: MaskingSettings = EVALUATION_MASKING,
        train: TrainSettings = DEFAULT_TRAINING,
    ) -> None:
        self.corpus, self.packing, self.masking, self.train = corpus, packing, masking, train
        self.tokenizer = tokenizer
        self.vocabulary: Vocabulary = describe_vocabulary(tokenizer)
        self.starts_word = mark_word_starts(tokenizer.backend_tokenizer)  # (V,)
        self.sequence_length = sequence_length

    def training(self, first: int, count: int) -> Batch:
        """Make samples `first` to `first + count` of the endless training stream, masked at their rates."""
        samples = np.arange(first, first + count)
        steps = samples // self.train.global_batch_size
        schedule = self.masking.schedule()
        progress = np.minimum(1.0, steps / max(1, self.train.max_steps - 1))
        rates = schedule.start + (schedule.end - schedule.start) * progress  # exact where the rate is constant
        key = (self.train.seed, TRAINING_MASKS)
        return self._make_batch(self.select_sequences(samples), samples, self.masking, rates, key)

    def select_sequences(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sequence of the packing that each sample of the training stream shows.

        An epoch holds `round(weight × size)` samples of each group, mixed. A group shows all of its sequences in random
        order before it shuffles them again.

        Example: groups (0.5, 100) and (2.0, 60) make epochs of 50 + 120 samples. Two epochs show each sequence of the
        first group once and each of the second four times.
        """
        seed = self.train.seed
        group_samples = np.array([max(1, round(weight * size)) for weight, size in self.packing.groups])
        epoch_samples = int(group_samples.sum())
        epochs, slots = samples // epoch_samples, samples % epoch_samples
        if len(group_samples) > 1:
            slots = permute(slots, epoch_samples, (seed, SOURCE_ORDER), epochs)
        sequences = np.empty_like(samples)
        first_slot = first_sequence = 0
        for (_, size), count in zip(self.packing.groups, group_samples.tolist(), strict=True):
            in_group = (slots >= first_slot) & (slots < first_slot + count)
            index = epochs[in_group] * count + slots[in_group] - first_slot  # in the samples of the group
            sequences[in_group] = first_sequence + permute(index % size, size, (seed, EPOCH_ORDER), index // size)
            first_slot, first_sequence = first_slot + count, first_sequence + size
        return sequences

    def evaluation(self, first: int, count: int) -> Batch:
        """Make sequences `first` to `first + count` with masks that never change; empty past the last sequence."""
        samples = np.arange(first, first + count)
        sequences = np.where(samples < len(self.packing), samples, -1)
        rates = np.full(count, EVALUATION_MASKING.rate)
        return self._make_batch(sequences, samples, EVALUATION_MASKING, rates, (0, EVALUATION_MASKS))

    def _make_batch(
        self,
        sequences: NDArray[np.int64],
        samples: NDArray[np.int64],
        masking: MaskingSettings,
        rates: NDArray[np.float64],
        key: tuple[int, int],
    ) -> Batch:
        ids, position_ids, document_ids = self._read_ids(sequences)
        if self.corpus.word_starts is None:
            word_starts = self.starts_word[ids]
        else:
            word_starts = self._read(self.corpus.word_starts, sequences, 0, 0, 0)[0] > 0
        num_predictions = max_predictions(self.sequence_length, masking)
        input_ids, prediction_positions, labels = mask_tokens(
            ids, word_starts, samples, self.vocabulary, masking.strategy, rates, num_predictions, key
        )
        return Batch(*map(torch.from_numpy, (input_ids, position_ids, document_ids, prediction_positions, labels)))

    def read_sequences(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return token ids and document ids (B,T) of training samples, without masks."""
        ids, _, document_ids = self._read_ids(self.select_sequences(samples))
        return ids, document_ids

    @cached_property
    def token_counts(self) -> NDArray[np.int64]:
        """Occurrences of each token in the first samples, 0 for special tokens: (V,)."""
        ids, _, _ = self._read_ids(self.select_sequences(np.arange(COUNTED_SEQUENCES)))
        counts = np.bincount(ids.ravel(), minlength=self.vocabulary.size)
        counts[self.vocabulary.special_ids] = 0
        return counts

    def unigram_entropy(self) -> float:
        """Return the loss, in nats, of a model that predicts tokens by their frequency alone."""
        counts = self.token_counts
        frequencies = counts[counts > 0] / counts.sum()
        return float(-(frequencies * np.log(frequencies)).sum())

    def describe(self, batch: Batch) -> list[list[str]]:
        """Return the documents of each sequence as text, with predictions as `{input token → label}`."""
        descriptions, to_tokens = [], self.tokenizer.convert_ids_to_tokens
        for input_ids, _, document_ids, positions, labels in zip(*vars(batch).values(), strict=True):
            tokens = np.array(to_tokens(input_ids.tolist()), dtype=object)
            for position, label in zip(positions.tolist(), labels.tolist(), strict=True):
                if label != IGNORED:
                    tokens[position] = f"{{{tokens[position]} → {to_tokens(label)}}}"
            documents = range(1, int(document_ids.max()) + 1)
            descriptions.append([" ".join(tokens[(document_ids == document).numpy()]) for document in documents])
        return descriptions

    def _read_ids(self, sequences: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """Return token ids, positions and document ids (B,T) of sequences of the packing; sequence -1 is empty."""
        tokenizer = self.tokenizer
        special_ids = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
        return self._read(self.corpus.tokens, sequences, *special_ids)

    def _read(
        self, values: NDArray[Any], sequences: NDArray[np.int64], at_cls: int, at_sep: int, at_padding: int
    ) -> tuple[NDArray[np.int64], ...]:
        """Collate `values` of the corpus's tokens, with the given values for [CLS], [SEP] and padding."""
        stored = iter(self.packing.read_spans(sequences[sequences >= 0]))
        bounds = [next(stored) if sequence >= 0 else [] for sequence in sequences]
        spans = iter(read_slices(values, chain.from_iterable(bounds)))
        framed = [[np.concatenate([[at_cls], next(spans), [at_sep]]) for _ in sequence] for sequence in bounds]
        return collate(framed, self.sequence_length, at_padding)


def format_batch(sequences: list[list[str]]) -> str:
    """Format the result of `Batches.describe`: numbered sequences, a line for each document."""
    lines = []
    for number, documents in enumerate(sequences, 1):
        lines += [f"sequence {number}", *(f"  {document}" for document in documents)]
    return "\n".join(lines)
