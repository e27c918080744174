"""Pack documents into sequences of one length, and store the result beside the corpus."""

# Shapes: B sequences of a batch, T positions of a sequence.
import json
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bertlite.core.errors import DataLost, UserError
from bertlite.core.files import atomic_folder, fingerprint, lock, write_json
from bertlite.core.logging import logger
from bertlite.core.random import PACKING, choose_validation, draw_uint32
from bertlite.data.corpus import Corpus, Ints, read_slices

PLAN_VERSION = 3  # raise it when the same corpus would give other sequences
MANY_DOCUMENTS = 1_000_000  # which take some seconds to pack
MIN_SPAN = 8  # tokens; only the last span of a long document may have fewer


class Packing:
    """The spans of the corpus that make up each sequence, as memory-mapped tables.

    A span is a document, or a part of a long one: `span_lengths` tokens from `span_starts` on, without [CLS] and [SEP].
    Sequence i consists of spans `sequence_starts[i]` to `sequence_starts[i + 1]`. `groups` lists each weight and its
    number of sequences, in their order. File names are those of version 0.1, whose caches are still read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.span_starts: Ints = np.load(folder / "piece_starts.npy", mmap_mode="r")
            self.span_lengths: NDArray[np.int32] = np.load(folder / "piece_lengths.npy", mmap_mode="r")
            self.sequence_starts: Ints = np.load(folder / "row_starts.npy", mmap_mode="r")
            self.groups: list[tuple[float, int]] = json.loads((folder / "groups.json").read_text())
        except (OSError, EOFError, ValueError) as error:
            raise DataLost(f"{folder}: damaged ({error}); remove it, and it will be rebuilt") from None

    def __len__(self) -> int:
        return len(self.sequence_starts) - 1

    def read_spans(self, sequences: Ints) -> list[list[tuple[int, int]]]:
        """Return start and end in the corpus of each span of the sequences. Raises DataLost."""
        bounds = read_slices(self.sequence_starts, [(sequence, sequence + 2) for sequence in sequences.tolist()])
        starts, lengths = read_slices(self.span_starts, bounds), read_slices(self.span_lengths, bounds)
        return [list(zip(first, first + count, strict=True)) for first, count in zip(starts, lengths, strict=True)]

    def tokens(self) -> int:
        """Count the tokens of all sequences, with [CLS] and [SEP]."""
        return int(self.span_lengths.sum(dtype=np.int64)) + 2 * len(self.span_lengths)


def pack_corpus(
    corpus: Corpus,
    sequence_length: int,
    weights: Sequence[float] | None = None,
    validation_split: float | None = None,
    split: Literal["all", "train", "validation"] = "all",
) -> Packing:
    """Pack a corpus, or a split of it, into sequences, unless the result is stored already.

    `weights`, one for each source of the corpus, say how often a source is seen per epoch; only documents of equal
    weight share a sequence. `validation_split` is the fraction of validation documents. Raises UserError for a split of
    a single document.
    """
    sources = corpus.summary.source_documents
    weights = list(weights or [1.0] * len(sources))[: len(sources)]
    split_name = "held-out" if split == "validation" else split  # as in version 0.1, whose caches are still used
    key = fingerprint([PLAN_VERSION, sequence_length, weights, validation_split, split_name])
    folder = corpus.folder / f"plan-{key}"
    with lock(folder):
        if not folder.exists():
            in_split = np.ones(len(corpus), dtype=bool)
            if validation_split is not None:
                if len(corpus) < 2:
                    raise UserError(
                        "data.train holds only one document, which cannot be split into training and validation text; "
                        "name a file in data.validation or, where each line is a document, set data.document to line"
                    )
                in_split = choose_validation(len(corpus), validation_split) == (split == "validation")
            if len(corpus) > MANY_DOCUMENTS:
                logger.info(f"packing {len(corpus):,} documents into sequences of {sequence_length}")
            with atomic_folder(folder) as unfinished:
                _write_packing(unfinished, corpus, sequence_length, in_split, np.repeat(weights, sources))
    return Packing(folder)


def _write_packing(
    folder: Path, corpus: Corpus, T: int, in_split: NDArray[np.bool_], document_weights: NDArray[np.float64]
) -> None:
    """Pack the documents of a split, separately for each weight."""
    starts, lengths = corpus.starts[:-1], np.diff(corpus.starts)
    weights = np.unique(document_weights[in_split]).tolist()
    groups = [np.flatnonzero(in_split & (document_weights == weight)) for weight in weights]
    packed = [pack_documents(starts[documents], lengths[documents], T) for documents in groups]
    span_starts, span_lengths, sequence_starts = zip(*packed, strict=True)
    spans_per_sequence = np.concatenate([np.diff(starts) for starts in sequence_starts])
    np.save(folder / "piece_starts.npy", np.concatenate(span_starts))
    np.save(folder / "piece_lengths.npy", np.concatenate(span_lengths).astype(np.int32))
    np.save(folder / "row_starts.npy", _offsets(spans_per_sequence))
    sizes = [len(starts) - 1 for starts in sequence_starts]
    write_json(folder / "groups.json", list(zip(weights, sizes, strict=True)))


def pack_documents(starts: Ints, lengths: Ints, T: int) -> tuple[Ints, Ints, Ints]:
    """Pack documents, given by start and length in the corpus, into sequences of T positions.

    Documents that fit a sequence stay whole. Longer ones are then split, and fill the positions that are left and new
    sequences. Returns the starts and the lengths of the spans, in the order of the sequences, and the index of the
    first span of each sequence, with the number of spans at the end.

    Example: a sequence of 24 positions has room for 22 tokens beside [CLS] and [SEP]. Documents of 10 and 30 tokens
    make the spans 10, 10 and 20. The first two share a sequence: 12 + 12 positions.
    """
    fits = lengths <= T - 2
    order, sequence_starts = pack_lengths(lengths[fits] + 2, T)
    whole_starts, whole_lengths = starts[fits][order], lengths[fits][order]
    num_sequences = len(sequence_starts) - 1
    whole_sequences = np.repeat(np.arange(num_sequences), np.diff(sequence_starts))
    used_positions = np.bincount(whole_sequences, whole_lengths + 2, minlength=num_sequences).astype(np.int64)
    split_starts, split_lengths, split_sequences = _split_documents(
        starts[~fits], lengths[~fits], T, free_tokens=T - 2 - used_positions
    )
    sequences = np.concatenate([whole_sequences, split_sequences])
    by_sequence = np.argsort(sequences, kind="stable")
    return (
        np.concatenate([whole_starts, split_starts])[by_sequence],
        np.concatenate([whole_lengths, split_lengths])[by_sequence],
        _offsets(np.bincount(sequences)),
    )


def _split_documents(starts: Ints, lengths: Ints, T: int, free_tokens: Ints) -> tuple[Ints, ...]:
    """Split long documents into spans that fill `free_tokens` of the existing sequences, then new sequences.

    Returns start, length and sequence of each span. A sequence with fewer than MIN_SPAN free tokens gets none.
    """
    span_starts, span_lengths, span_sequences = array("q"), array("q"), array("q")
    open_sequences = [(sequence, free) for sequence, free in enumerate(free_tokens.tolist()) if free >= MIN_SPAN]
    next_sequence = len(free_tokens)
    for start, remaining in zip(starts.tolist(), lengths.tolist(), strict=True):
        while remaining:
            sequence, free = open_sequences.pop() if open_sequences else (next_sequence, T - 2)
            next_sequence = max(next_sequence, sequence + 1)
            length = min(remaining, free)
            span_starts.append(start)
            span_lengths.append(length)
            span_sequences.append(sequence)
            start, remaining, free = start + length, remaining - length, free - length - 2
            if free >= MIN_SPAN:
                open_sequences.append((sequence, free))
    return tuple(np.array(column, dtype=np.int64) for column in (span_starts, span_lengths, span_sequences))


def pack_lengths(lengths: Ints, capacity: int, seed: int = 0, epoch: int = 0) -> tuple[Ints, Ints]:
    """Pack items into sequences of `capacity` positions: best fit, longest first, at random among equal lengths.

    Returns the items in the order of the sequences, and the index of the first item of each sequence, with the number
    of items at the end. `seed` and `epoch` do not change the number of sequences.

    Example: with lengths 7, 5, 3 and capacity 10, the order is [1, 0, 2] and the starts are [0, 1, 3]: item 1 is alone,
    items 0 and 2 share a sequence.
    """
    histogram = np.bincount(lengths, minlength=capacity + 1)
    by_length = np.lexsort((draw_uint32(len(lengths), (seed, PACKING), epoch), lengths))  # shuffled within each length
    next_index = np.cumsum(histogram) - histogram  # in `by_length`, of the next item of each length
    order, spans_per_sequence = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for pattern, count in _find_patterns(histogram, capacity):
        columns = []
        for length in pattern:
            columns.append(by_length[next_index[length] : next_index[length] + count])
            next_index[length] += count
        order.append(np.stack(columns, axis=1).ravel())
        spans_per_sequence.append(np.full(count, len(pattern)))
    return np.concatenate(order), _offsets(np.concatenate(spans_per_sequence))


def _find_patterns(histogram: Ints, capacity: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Find the combinations of lengths that share a sequence, and how many sequences have each.

    Best fit, longest first, on the histogram of lengths (Krell et al. 2021, "Efficient sequence packing without
    cross-contamination"), so that the time does not grow with the corpus.
    """
    open_patterns: dict[int, list[tuple[tuple[int, ...], int]]] = defaultdict(list)  # by free positions
    open_patterns[capacity] = [((), int(histogram.sum()))]
    for length in range(capacity, 0, -1):
        remaining = int(histogram[length])
        while remaining:
            free = min(free for free, patterns in open_patterns.items() if free >= length and patterns)
            pattern, count = open_patterns[free].pop()
            repeats = min(free // length, remaining)  # the same sequence stays the best fit until it is full
            filled = min(count, remaining // repeats)
            if count > filled:
                open_patterns[free].append((pattern, count - filled))
            open_patterns[free - repeats * length].append((pattern + (length,) * repeats, filled))
            remaining -= repeats * filled
    return ((pattern, count) for pattern, count in chain.from_iterable(open_patterns.values()) if pattern)


def collate(sequences: list[list[Any]], length: int, pad_value: int) -> tuple[Ints, Ints, Ints]:
    """Join the spans of each sequence, and pad to `length`.

    Returns the values, their positions within their span, and the number of their span, from 1; all (B,T), T =
    `length`. Padding has position 0 and span number 0.
    """
    values = np.full((len(sequences), length), pad_value, dtype=np.int64)
    positions, numbers = np.zeros_like(values), np.zeros_like(values)
    for index, spans in enumerate(sequences):
        end = 0
        for number, span in enumerate(spans, 1):
            start, end = end, end + len(span)
            values[index, start:end] = span
            positions[index, start:end] = np.arange(len(span))
            numbers[index, start:end] = number
    return values, positions, numbers


def _offsets(counts: Ints) -> Ints:
    """Return where each group starts, and the total: [2, 3] gives [0, 2, 5]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
