"""Pack documents into sequences of one length, once, and keep the plan beside the corpus."""

# Shapes: R rows, T positions of a row, P prediction slots of a row.
import json
from array import array
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bertlite.core.errors import DataLost, UserError
from bertlite.core.files import atomic_folder, fingerprint, lock, write_json
from bertlite.core.random import (
    PACKING,
    choose_validation,
    draw_uint32,
)
from bertlite.data.corpus import Corpus

PLAN_VERSION = 3  # raise it when the same corpus would give other rows
LEAST_PIECE = 8  # tokens of a long document that are worth a piece of their own


class Packing:
    """A table of rows. Record r holds pieces `row_starts[r]` to `row_starts[r + 1]`, which lie in the corpus's tokens
    at `piece_starts` and are `piece_lengths` long, [CLS] and [SEP] not counted. `groups` says how many rows, one
    behind the other, have which weight."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.span_starts: NDArray[np.int64] = np.load(folder / "piece_starts.npy", mmap_mode="r")
            self.span_lengths: NDArray[np.int32] = np.load(folder / "piece_lengths.npy", mmap_mode="r")
            self.sequence_starts: NDArray[np.int64] = np.load(folder / "row_starts.npy", mmap_mode="r")
            self.groups: list[tuple[float, int]] = json.loads((folder / "groups.json").read_text())
        except (OSError, EOFError, ValueError) as error:
            raise DataLost(f"{folder}: damaged ({error}); remove it, and it will be made again") from None

    def __len__(self) -> int:
        return len(self.sequence_starts) - 1

    def tokens(self) -> int:
        """Tokens of all rows, [CLS] and [SEP] included."""
        return int(self.span_lengths.sum(dtype=np.int64)) + 2 * len(self.span_lengths)


def choose_validation_documents(corpus: Corpus, share: float) -> NDArray[np.bool_]:
    """Which documents are held out for validation. Raises UserError when there is only one."""
    if len(corpus) < 2:
        raise UserError(
            "data.train holds only one document, so none can be held out; name a file in data.validation or, where "
            "each line is a document, set data.document to line"
        )
    return choose_validation(len(corpus), share)


def pack_corpus(
    corpus: Corpus,
    sequence_length: int,
    weights: Sequence[float] | None = None,
    share: float | None = None,
    part: Literal["all", "train", "held-out"] = "all",
) -> Packing:
    """The packed sequences of a corpus, or of one split of it; read from the disk where they have been made before.

    `weights`, one for each source of the corpus, are how often its text is seen, 1 being once an epoch. Documents
    share rows with documents of their weight.
    """
    sources = corpus.summary.source_documents
    weights = list(weights or [1.0] * len(sources))[: len(sources)]
    folder = corpus.folder / f"plan-{fingerprint([PLAN_VERSION, sequence_length, weights, share, part])}"
    with lock(folder):
        if not folder.exists():
            everything = np.ones(len(corpus), dtype=bool)
            wanted = everything if share is None else choose_validation_documents(corpus, share) == (part == "held-out")
            with atomic_folder(folder) as aside:
                _write_plan(aside, corpus, sequence_length, wanted, np.repeat(weights, sources))
    return Packing(folder)


def _write_plan(
    folder: Path, corpus: Corpus, T: int, wanted: NDArray[np.bool_], weight_of: NDArray[np.float64]
) -> None:
    weights = np.unique(weight_of[wanted]).tolist()
    documents = [np.flatnonzero(wanted & (weight_of == weight)) for weight in weights]
    every = np.diff(corpus.starts)
    starts, lengths, rows = zip(
        *(pack_documents(corpus.starts[these], every[these], T) for these in documents), strict=True
    )
    np.save(folder / "piece_starts.npy", np.concatenate(starts))
    np.save(folder / "piece_lengths.npy", np.concatenate(lengths).astype(np.int32))
    np.save(folder / "row_starts.npy", np.cumsum(np.concatenate([[0], *map(np.diff, rows)])))
    write_json(folder / "groups.json", [(weight, len(one) - 1) for weight, one in zip(weights, rows, strict=True)])


def pack_documents(starts: NDArray[np.int64], lengths: NDArray[np.int64], T: int) -> tuple[NDArray[np.int64], ...]:
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

    order = np.lexsort((draw_uint32(len(lengths), (seed, PACKING), epoch), lengths))  # by length, shuffled within each
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


def collate(rows: list[list[Any]], length: int, fill: int) -> tuple[NDArray[np.int64], ...]:
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
