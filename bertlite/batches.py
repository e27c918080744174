"""Which documents share a row, and batch n as a pure function of the configuration and n.

Documents are packed whole where they fit, each as it will be at use, `[CLS] … [SEP]`; longer ones are cut where a row
ends. The plan of all rows is made once, kept beside the corpus, and memory-mapped.
"""

# Shapes: R rows, T positions of a row, P prediction slots of a row.
import json
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bertlite.config import MaskingSettings, TrainSettings
from bertlite.corpus import Corpus, check_sizes
from bertlite.errors import DataLost, UserError
from bertlite.files import fingerprint, locked, new_folder, write_json
from bertlite.masking import IGNORED, Vocabulary, mask_rows, prediction_slots
from bertlite.philox import EVALUATION_MASKS, MATES, ROW_ORDER, SOURCE_ORDER, TRAINING_MASKS, draw, held_out, permute
from bertlite.tokenizer import vocabulary_of
from bertlite.words import word_start_table

PLAN_VERSION = 3  # raise it when the same corpus would give other rows
LEAST_PIECE = 8  # tokens of a long document that are worth a piece of their own
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


class Plan:
    """A table of rows. Row r holds pieces `row_starts[r]` to `row_starts[r + 1]`, which lie in the corpus's tokens
    at `piece_starts` and are `piece_lengths` long, [CLS] and [SEP] not counted. `groups` says how many rows, one
    behind the other, have which weight."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.piece_starts: NDArray[np.int64] = np.load(folder / "piece_starts.npy", mmap_mode="r")
            self.piece_lengths: NDArray[np.int32] = np.load(folder / "piece_lengths.npy", mmap_mode="r")
            self.row_starts: NDArray[np.int64] = np.load(folder / "row_starts.npy", mmap_mode="r")
            self.groups: list[tuple[float, int]] = json.loads((folder / "groups.json").read_text())
        except (OSError, EOFError, ValueError) as error:
            raise DataLost(f"{folder}: damaged ({error}); remove it, and it will be made again") from None

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    def tokens(self) -> int:
        """Tokens of all rows, [CLS] and [SEP] included."""
        return int(self.piece_lengths.sum(dtype=np.int64)) + 2 * len(self.piece_lengths)


def split_documents(corpus: Corpus, share: float) -> NDArray[np.bool_]:
    """Which documents are held out for validation. Raises UserError when there is only one."""
    if len(corpus) < 2:
        raise UserError(
            "data.train holds only one document, so none can be held out; name a file in data.validation or, where "
            "each line is a document, set data.document to line"
        )
    return held_out(len(corpus), share)


def make_plan(
    corpus: Corpus,
    sequence_length: int,
    weights: Sequence[float] | None = None,
    share: float | None = None,
    part: Literal["all", "train", "held-out"] = "all",
) -> Plan:
    """The rows of a corpus, or of what `split_documents` keeps or holds out of it; from the disk where it lies.

    `weights`, one for each source of the corpus, are how often its text is seen, 1 being once an epoch. Documents
    share rows with documents of their weight.
    """
    sources = corpus.summary.source_documents
    weights = list(weights or [1.0] * len(sources))[: len(sources)]
    folder = corpus.folder / f"plan-{fingerprint([PLAN_VERSION, sequence_length, weights, share, part])}"
    with locked(folder):
        if not folder.exists():
            everything = np.ones(len(corpus), dtype=bool)
            wanted = everything if share is None else split_documents(corpus, share) == (part == "held-out")
            with new_folder(folder) as aside:
                _write_plan(aside, corpus, sequence_length, wanted, np.repeat(weights, sources))
    return Plan(folder)


def _write_plan(
    folder: Path, corpus: Corpus, T: int, wanted: NDArray[np.bool_], weight_of: NDArray[np.float64]
) -> None:
    weights = np.unique(weight_of[wanted]).tolist()
    documents = [np.flatnonzero(wanted & (weight_of == weight)) for weight in weights]
    every = np.diff(corpus.starts)
    starts, lengths, rows = zip(*(fill_rows(corpus.starts[these], every[these], T) for these in documents), strict=True)
    np.save(folder / "piece_starts.npy", np.concatenate(starts))
    np.save(folder / "piece_lengths.npy", np.concatenate(lengths).astype(np.int32))
    np.save(folder / "row_starts.npy", np.cumsum(np.concatenate([[0], *map(np.diff, rows)])))
    write_json(folder / "groups.json", [(weight, len(one) - 1) for weight, one in zip(weights, rows, strict=True)])


def fill_rows(starts: NDArray[np.int64], lengths: NDArray[np.int64], T: int) -> tuple[NDArray[np.int64], ...]:
    """Lay documents, given by where they start and how long they are, into rows of T positions.

    Those that fit a row are packed whole. Longer ones are then poured, one after the other, into the room that is left
    and into new rows, and cut where a row ends. Returns where each piece starts, its length, and where each row starts
    among the pieces.
    """
    whole = lengths <= T - 2
    order, row_starts = pack(lengths[whole] + 2, T)
    piece_starts, piece_lengths = starts[whole][order], lengths[whole][order]
    piece_rows = np.repeat(np.arange(len(row_starts) - 1), np.diff(row_starts))
    used = np.bincount(piece_rows, piece_lengths + 2, minlength=len(row_starts) - 1).astype(np.int64)
    poured = _pour(starts[~whole], lengths[~whole], T, T - 2 - used)
    piece_starts, piece_lengths, piece_rows = (
        np.concatenate(both) for both in zip((piece_starts, piece_lengths, piece_rows), poured, strict=True)
    )
    by_row = np.argsort(piece_rows, kind="stable")
    row_starts = np.concatenate([[0], np.cumsum(np.bincount(piece_rows))])
    return piece_starts[by_row], piece_lengths[by_row], row_starts


def _pour(
    starts: NDArray[np.int64], lengths: NDArray[np.int64], T: int, rooms: NDArray[np.int64]
) -> tuple[NDArray[np.int64], ...]:
    """Cut long documents so that they fill the rooms of the first rows, and then rows of their own.

    Returns start, length and row of each piece. Rooms for fewer than LEAST_PIECE tokens stay empty.
    """
    piece_starts, piece_lengths, piece_rows = array("q"), array("q"), array("q")
    open_rows = [(row, room) for row, room in enumerate(rooms.tolist()) if room >= LEAST_PIECE]
    next_row = len(rooms)
    for start, left in zip(starts.tolist(), lengths.tolist(), strict=True):
        while left:
            row, room = open_rows.pop() if open_rows else (next_row, T - 2)
            next_row = max(next_row, row + 1)
            taken = min(left, room)
            piece_starts.append(start)
            piece_lengths.append(taken)
            piece_rows.append(row)
            start, left, room = start + taken, left - taken, room - taken - 2
            if room >= LEAST_PIECE:
                open_rows.append((row, room))
    return tuple(np.array(column, dtype=np.int64) for column in (piece_starts, piece_lengths, piece_rows))


def pack(
    lengths: NDArray[np.int64], capacity: int, seed: int = 0, epoch: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pack pieces into rows of `capacity`: best fit, longest first, mates drawn at random, as many rows each time.

    Works on the histogram of lengths (Krell et al. 2021, "Efficient sequence packing without cross-contamination"),
    so that the search does not grow with the corpus. Returns the pieces in row order, and where each row starts.
    """
    open_rows: dict[int, list[tuple[tuple[int, ...], int]]] = defaultdict(list)  # free room → (lengths, how many rows)
    open_rows[capacity] = [((), len(lengths))]
    histogram = np.bincount(lengths, minlength=capacity + 1)
    for length in range(capacity, 0, -1):
        left = int(histogram[length])
        while left:
            room = min(space for space, rows in open_rows.items() if space >= length and rows)
            pattern, rows = open_rows[room].pop()
            each = min(room // length, left)  # the same row stays the best fit until it is full
            filled = min(rows, left // each)
            if rows > filled:
                open_rows[room].append((pattern, rows - filled))
            open_rows[room - each * length].append((pattern + (length,) * each, filled))
            left -= each * filled

    order = np.lexsort((draw(len(lengths), (seed, MATES), epoch), lengths))  # by length, shuffled within each
    taken = np.cumsum(histogram) - histogram  # where in `order` the next piece of each length stands
    pieces, sizes = [np.zeros(0, np.int64)], [np.zeros(1, np.int64)]
    for pattern, rows in chain.from_iterable(open_rows.values()):
        if not pattern:
            continue
        columns = []
        for length in pattern:
            columns.append(order[taken[length] : taken[length] + rows])
            taken[length] += rows
        pieces.append(np.stack(columns, axis=1).ravel())
        sizes.append(np.full(rows, len(pattern)))
    return np.concatenate(pieces), np.cumsum(np.concatenate(sizes))


def lay_out(rows: list[list[Any]], length: int, fill: int) -> tuple[NDArray[np.int64], ...]:
    """Rows of pieces, one behind the other, and then `fill`; the place of each number in its piece, and the number of
    the piece, from 1. All are (R,T), T = `length`."""
    numbers = np.full((len(rows), length), fill, dtype=np.int64)
    positions, documents = np.zeros_like(numbers), np.zeros_like(numbers)
    for row, pieces in enumerate(rows):
        end = 0
        for number, piece in enumerate(pieces, 1):
            at, end = end, end + len(piece)
            numbers[row, at:end], positions[row, at:end], documents[row, at:end] = piece, np.arange(len(piece)), number
    return numbers, positions, documents


class Batches:
    """Makes batches of one plan. Two objects with equal arguments make equal batches, in any order, on any rank."""

    def __init__(
        self,
        corpus: Corpus,
        plan: Plan,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        masking: MaskingSettings = EVALUATION_MASKING,
        train: TrainSettings = NO_TRAINING,
    ) -> None:
        self.corpus, self.plan, self.masking, self.train = corpus, plan, masking, train
        self.tokenizer = tokenizer
        self.vocabulary: Vocabulary = vocabulary_of(tokenizer)
        self.begins_word = word_start_table(tokenizer.backend_tokenizer)
        self.cls_id, self.sep_id, self.pad_id = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
        self.sequence_length = sequence_length
        files = [*corpus.folder.glob("*.bin"), *plan.folder.glob("*.npy")]
        self.sizes = {path: path.stat().st_size for path in files}

    def training(self, first: int, count: int) -> Batch:
        """Samples `first` to `first + count` of the endless stream, masked at the rate of their step."""
        samples = np.arange(first, first + count)
        steps = samples // self.train.global_batch_size
        line = self.masking.line()
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
            result[inside] = first_row + permute(number % size, size, (seed, ROW_ORDER), number // size)
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
            begins_word = lay_out([self._pieces(row, segmented, 0, 0) for row in rows], self.sequence_length, 0)[0] > 0
        slots = prediction_slots(self.sequence_length, masking)
        inputs, places, labels = mask_rows(
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
        return lay_out(pieces, self.sequence_length, self.pad_id)

    def _pieces(self, row: int, values: NDArray[Any], first: int, last: int) -> list[NDArray[Any]]:
        """What the corpus has for the tokens of each piece of a row, with what stands for [CLS] and [SEP]."""
        if row < 0:
            return []
        part = slice(*self.plan.row_starts[row : row + 2])
        pieces = zip(self.plan.piece_starts[part], self.plan.piece_lengths[part], strict=True)
        return [np.concatenate([[first], values[start : start + length], [last]]) for start, length in pieces]
