"""Batch n as a pure function of the configuration and n."""

# Shapes: R rows, T positions of a row, P prediction slots of a row.
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bertlite.config.settings import MaskingSettings, TrainSettings
from bertlite.core.random import EPOCH_ORDER, EVALUATION_MASKS, SOURCE_ORDER, TRAINING_MASKS, permute
from bertlite.data.corpus import Corpus, check_sizes
from bertlite.data.masking import IGNORED, Vocabulary, mask_tokens, max_predictions
from bertlite.data.packing import Packing, collate
from bertlite.data.tokenizer import describe_vocabulary
from bertlite.data.words import mark_word_starts

COUNTED_ROWS = 10_000  # that tell how often tokens occur
NO_TRAINING = TrainSettings()
EVALUATION_MASKING = MaskingSettings()  # held-out text is masked alike whatever the training does: losses compare


@dataclass(frozen=True)
class Batch:
    """Rows for the model; see `model.Encoder` for the shapes. Unused prediction slots have the label IGNORED."""

    input_ids: Tensor  # (R,T)
    position_ids: Tensor  # (R,T), from 0 in each document
    document_ids: Tensor  # (R,T), from 1 in each row; 0 is padding
    prediction_positions: Tensor  # (R,P)
    labels: Tensor  # (R,P)

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device) -> Self:
        return type(self)(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))

    def slice(self, start: int, end: int) -> Self:
        """Rows start to end."""
        return type(self)(*(tensor[start:end] for tensor in vars(self).values()))

    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.document_ids > 0).sum())


class Batches:
    """Makes batches of one plan. Two objects with equal arguments make equal batches, in any order, on any rank."""

    def __init__(
        self,
        corpus: Corpus,
        plan: Packing,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        masking: MaskingSettings = EVALUATION_MASKING,
        train: TrainSettings = NO_TRAINING,
    ) -> None:
        self.corpus, self.plan, self.masking, self.train = corpus, plan, masking, train
        self.tokenizer = tokenizer
        self.vocabulary: Vocabulary = describe_vocabulary(tokenizer)
        self.begins_word = mark_word_starts(tokenizer.backend_tokenizer)
        self.cls_id, self.sep_id, self.pad_id = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
        self.sequence_length = sequence_length
        files = [*corpus.folder.glob("*.bin"), *plan.folder.glob("*.npy")]
        self.sizes = {path: path.stat().st_size for path in files}

    def training(self, first: int, count: int) -> Batch:
        """Samples `first` to `first + count` of the endless stream, masked at the rate of their step."""
        samples = np.arange(first, first + count)
        steps = samples // self.train.global_batch_size
        line = self.masking.schedule()
        done = np.minimum(1.0, steps / max(1, self.train.max_steps - 1))
        rates = line.start + (line.end - line.start) * done  # a constant rate in every bit
        return self._batch(self.rows(samples), samples, self.masking, rates, (self.train.seed, TRAINING_MASKS))

    def rows(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of the plan that are samples of the stream: in every epoch each once, times its weight.

        An epoch shuffles the turns of the groups among each other; a group's turns go through its own rows, shuffled
        anew each time they have all been seen. All in closed form.
        """
        seed = self.train.seed
        turns = np.array([max(1, round(weight * rows)) for weight, rows in self.plan.groups])
        epochs, place = samples // turns.sum(), samples % turns.sum()
        if len(turns) > 1:
            place = permute(place, int(turns.sum()), (seed, SOURCE_ORDER), epochs)
        result = np.empty_like(samples)
        first_turn = first_row = 0
        for (_, size), count in zip(self.plan.groups, turns.tolist(), strict=True):
            inside = (place >= first_turn) & (place < first_turn + count)
            number = epochs[inside] * count + place[inside] - first_turn
            result[inside] = first_row + permute(number % size, size, (seed, EPOCH_ORDER), number // size)
            first_turn, first_row = first_turn + count, first_row + size
        return result

    def evaluation(self, first: int, count: int) -> Batch:
        """Rows `first` to `first + count` of the plan with masks that never change; past its end rows are empty."""
        samples = np.arange(first, first + count)
        rows = np.where(samples < len(self.plan), samples, -1)
        rates = np.full(count, EVALUATION_MASKING.rate)
        return self._batch(rows, samples, EVALUATION_MASKING, rates, (0, EVALUATION_MASKS))

    def _batch(
        self,
        rows: NDArray[np.int64],
        samples: NDArray[np.int64],
        masking: MaskingSettings,
        rates: NDArray[np.float64],
        key: tuple[int, int],
    ) -> Batch:
        check_sizes(self.sizes)
        ids, positions, documents = self._rows(rows)
        if (segmented := self.corpus.word_starts) is None:
            begins_word = self.begins_word[ids]
        else:
            begins_word = collate([self._pieces(row, segmented, 0, 0) for row in rows], self.sequence_length, 0)[0] > 0
        slots = max_predictions(self.sequence_length, masking)
        inputs, places, labels = mask_tokens(
            ids, begins_word, samples, self.vocabulary, masking.strategy, rates, slots, key
        )
        return Batch(*map(torch.from_numpy, (inputs, positions, documents, places, labels)))

    @cached_property
    def token_counts(self) -> NDArray[np.int64]:
        """How often each token that is not special occurs in the first samples: (V,)."""
        first = self._rows(self.rows(np.arange(COUNTED_ROWS)))[0]
        counts = np.bincount(first.ravel(), minlength=self.vocabulary.size)
        counts[self.vocabulary.special_ids] = 0
        return counts

    def unigram_entropy(self) -> float:
        """The loss, in nats, of predicting tokens by their frequencies alone."""
        counts = self.token_counts
        frequencies = counts[counts > 0] / counts.sum()
        return float(-(frequencies * np.log(frequencies)).sum())

    def describe(self, batch: Batch) -> list[list[str]]:
        """The documents of each row, as text with `{what the model sees → what it has to predict}` where it has to."""
        rows, piece_of = [], self.tokenizer.convert_ids_to_tokens
        for row in range(len(batch)):
            pieces = np.array(piece_of(batch.input_ids[row].tolist()), dtype=object)
            for place, label in zip(batch.prediction_positions[row].tolist(), batch.labels[row].tolist(), strict=True):
                if label != IGNORED:
                    pieces[place] = f"{{{pieces[place]} → {piece_of(label)}}}"
            documents = batch.document_ids[row].numpy()
            rows.append([" ".join(pieces[documents == number]) for number in range(1, documents.max() + 1)])
        return rows

    def _rows(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """Token ids, positions and document numbers (R,T) of the plan's rows; -1 is empty."""
        pieces = [self._pieces(row, self.corpus.tokens, self.cls_id, self.sep_id) for row in rows]
        return collate(pieces, self.sequence_length, self.pad_id)

    def _pieces(self, row: int, values: NDArray[Any], first: int, last: int) -> list[NDArray[Any]]:
        """What the corpus has for the tokens of each piece of a row, with what stands for [CLS] and [SEP]."""
        if row < 0:
            return []
        part = slice(*self.plan.sequence_starts[row : row + 2])
        pieces = zip(self.plan.span_starts[part], self.plan.span_lengths[part], strict=True)
        return [np.concatenate([[first], values[start : start + length], [last]]) for start, length in pieces]
