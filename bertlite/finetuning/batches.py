"""Examples packed into sequences of one length, and batches of such sequences."""

# Shapes: B sequences, T positions of a sequence, E places for examples in a sequence, R places for groups of them.
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bertlite.core.errors import UserError
from bertlite.core.random import EPOCH_ORDER, permute
from bertlite.data.batches import Batch
from bertlite.data.masking import IGNORED
from bertlite.data.packing import collate, pack_lengths
from bertlite.finetuning.examples import Examples

MAX_PADDING = 0.05  # of the positions; longer sequences pack better …
MAX_SEQUENCE_LENGTH = 1024  # … but attention costs more in them


@dataclass(frozen=True)
class TaskBatch(Batch):
    """Packed examples.

    `prediction_positions` (B,E) are the first tokens of the examples. Labels are (B,E) or (B,E,·), one per example,
    (B,T), one per token, or (B,R), one per group of examples; without an example they are IGNORED or, among
    floating-point labels, NaN. The examples of a group have as many places as the largest group has examples.
    """

    token_type_ids: Tensor  # (B,T)
    example_indices: Tensor  # (B,E), -1 where there is no example


class ExampleBatches:
    """Batches of examples packed into sequences of one length, as in pretraining: a pure function of the seed and the
    index of the first sequence, always of one shape.

    `sequence_length` is used if the examples fit in it; otherwise, and by default, a length that packs well is chosen.
    Raises UserError for an example without tokens.
    """

    def __init__(self, examples: Examples, pad_id: int, seed: int = 0, sequence_length: int = 0) -> None:
        self.examples, self.pad_id, self.seed = examples, pad_id, seed
        self.lengths = np.array([len(encoding) for encoding in examples.encodings])
        if not self.lengths.all():
            raise UserError("a text has no tokens: it is empty, and the tokenizer adds none such as [CLS]")
        groups = examples.record_indices if examples.grouped else range(len(self.lengths))
        self.group_starts = np.append(np.unique(groups, return_index=True)[1], len(self.lengths))
        self.group_lengths = np.add.reduceat(self.lengths, self.group_starts[:-1])
        self.group_size = int(np.diff(self.group_starts).max())  # examples of the largest group
        if sequence_length < self.group_lengths.max():
            sequence_length = choose_sequence_length(self.group_lengths)
        self.sequence_length = sequence_length
        self.num_sequences = count_sequences(self.group_lengths, sequence_length)
        self.max_groups = sequence_length // self.group_lengths.min()  # of a sequence
        self.packings: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}  # by epoch, the last two

    @property
    def padding(self) -> float:
        """The share of the positions that are padding."""
        return float(1 - self.lengths.sum() / (self.num_sequences * self.sequence_length))

    def training(self, first: int, count: int) -> TaskBatch:
        """Return sequences `first` to `first + count` of an endless stream; each epoch packs and shuffles again."""
        samples = np.arange(first, first + count)
        epochs = samples // self.num_sequences
        order = permute(samples % self.num_sequences, self.num_sequences, (self.seed, EPOCH_ORDER), epochs)
        return self._batch([self.members(*pair) for pair in zip(epochs.tolist(), order.tolist(), strict=True)])

    def evaluation(self, first: int, count: int) -> TaskBatch:
        """Return sequences `first` to `first + count` in order; past the last one they are empty."""
        return self._batch([self.members(0, sequence) for sequence in range(first, first + count)])

    def members(self, epoch: int, sequence: int) -> NDArray[np.int64]:
        """Return the indices of the groups in a sequence of an epoch's packing; past the last sequence, none.

        A group is an example, or all examples of a record that are computed together.
        """
        if epoch not in self.packings:
            self.packings = {number: packing for number, packing in self.packings.items() if number >= epoch - 1}
            self.packings[epoch] = pack_lengths(self.group_lengths, self.sequence_length, self.seed, epoch)
        order, starts = self.packings[epoch]
        return order[starts[sequence] : starts[sequence + 1]] if sequence < self.num_sequences else order[:0]

    def _batch(self, sequences: list[NDArray[np.int64]]) -> TaskBatch:
        encodings = self.examples.encodings
        indices = np.full((len(sequences), self.max_groups * self.group_size), -1)
        for row, groups in zip(indices, sequences, strict=True):
            for place, group in enumerate(groups):
                members = np.arange(*self.group_starts[group : group + 2])
                row[place * self.group_size :][: len(members)] = members
        lengths = np.where(indices >= 0, self.lengths[indices], 0)
        starts = np.where(indices >= 0, lengths.cumsum(axis=1) - lengths, 0)
        members_of_sequences = [row[row >= 0] for row in indices]
        token_ids = [[encodings[member].ids for member in members] for members in members_of_sequences]
        type_ids = [[encodings[member].type_ids for member in members] for members in members_of_sequences]
        ids, positions, documents = collate(token_ids, self.sequence_length, self.pad_id)
        types, *_ = collate(type_ids, self.sequence_length, 0)
        labels = self._labels(indices[:, :: self.group_size], starts[:, :: self.group_size])
        return TaskBatch(*map(torch.from_numpy, (ids, positions, documents, starts, labels, types, indices)))

    def _labels(self, indices: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.generic]:
        """Lay out the targets of the examples `indices` (B,E), whose first tokens are at `starts` (B,E)."""
        per_token, targets = self.examples.targets_per_token, self.examples.targets
        first_target = np.asarray(targets[0])
        shape = (len(indices), self.sequence_length) if per_token else (*indices.shape, *first_target.shape)
        missing = math.nan if first_target.dtype.kind == "f" else IGNORED
        labels = np.full(shape, missing, first_target.dtype)
        for sequence, place in zip(*np.nonzero(indices >= 0), strict=True):
            index, start = indices[sequence, place], starts[sequence, place]
            labels[sequence, slice(start, start + self.lengths[index]) if per_token else place] = targets[index]
        return labels

    def unpack(self, values: Tensor, batch: TaskBatch) -> dict[int, NDArray[np.float32]]:
        """Return each example's values, by its index: (…) of (B,E,…), or (n,…) of (B,T,…) for its n tokens."""
        unpacked: dict[int, NDArray[np.float32]] = {}
        # A sequence has more tokens than examples, but may have as many places for choices, which have no token scores.
        per_token = values.shape[1] == self.sequence_length and not self.examples.grouped
        for indices, sequence in zip(batch.example_indices.tolist(), values.float().cpu().numpy(), strict=True):
            members = [index for index in indices if index >= 0]
            each = (
                np.split(sequence, np.cumsum(self.lengths[members])) if per_token else sequence[np.array(indices) >= 0]
            )
            unpacked.update(zip(members, each, strict=False))  # what is left over is padding
        return unpacked


def choose_sequence_length(lengths: NDArray[np.int64]) -> int:
    """Choose the shortest sequence length that packs examples of these lengths with little padding.

    Candidates are the multiples of the longest example's length, rounded up to a multiple of 8. If none packs well,
    which happens with few examples, the one with the least padding is chosen. Example: lengths 50, 30 and 30 give the
    candidates 56, 104, 152, …; 56 takes three sequences, a third of them padding; 104 takes two, with more padding;
    152 holds all three examples in one sequence, so the search ends.
    """
    longest = int(lengths.max())
    options = []
    for number in range(1, max(1, MAX_SEQUENCE_LENGTH // longest) + 1):
        sequence_length = 8 * math.ceil(number * longest / 8)
        num_sequences = count_sequences(lengths, sequence_length)
        num_positions = num_sequences * sequence_length
        options.append((num_positions, num_sequences, sequence_length))
        if 1 - lengths.sum() / num_positions <= MAX_PADDING or num_sequences == 1:
            break
    return min(options)[-1]


def count_sequences(lengths: NDArray[np.int64], sequence_length: int) -> int:
    """Return how many sequences examples of these lengths are packed into."""
    return len(pack_lengths(lengths, sequence_length)[1]) - 1
