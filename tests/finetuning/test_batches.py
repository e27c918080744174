"""Examples packed into sequences."""

import numpy as np
import pytest
import torch
from tiny_tasks import prepared

from bertlite.data.masking import IGNORED
from bertlite.finetuning.batches import ExampleBatches, choose_sequence_length, count_sequences
from bertlite.finetuning.experiment import make_train_settings


def test_batches_are_a_pure_function_of_seed_and_index_with_little_padding(write):
    work = prepared(write(task__train="sample", task__validation="sample", task__max_length=64))
    batches = work.splits["train"].batches
    again = ExampleBatches(batches.examples, 0, batches.seed, batches.sequence_length)
    assert batches.padding <= 0.05
    assert batches.lengths.sum() / (batches.num_sequences * batches.sequence_length) == pytest.approx(
        1 - batches.padding
    )
    for first in (
        3 * batches.num_sequences + 5,
        0,
        batches.num_sequences - 1,
    ):  # in any order, across the ends of epochs
        one, other = batches.training(first, 3), again.training(first, 3)
        assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))
        assert one.input_ids.shape == (3, batches.sequence_length)
    seen = []
    for epoch in range(2):
        batch = batches.training(epoch * batches.num_sequences, batches.num_sequences)
        assert batch.tokens() == batches.lengths.sum()
        counts = torch.bincount(batch.labels[batch.labels != IGNORED], minlength=7)
        assert counts.tolist() == np.bincount(batches.examples.targets, minlength=7).tolist()
        members = [sorted(batches.members(epoch, row).tolist()) for row in range(batches.num_sequences)]
        assert sorted(one for row in members for one in row) == list(range(1330))
        seen.append(sorted(map(tuple, members)))
    assert len(set(seen[0]) & set(seen[1])) < batches.num_sequences / 2  # other mates in each epoch
    other = ExampleBatches(batches.examples, 0, 1, batches.sequence_length).training(0, 3)
    assert not torch.equal(other.input_ids, batches.training(0, 3).input_ids)


def test_an_epoch_has_all_examples_and_a_step_about_global_batch_size(write):
    sample = {"task__train": "sample", "task__validation": "sample"}
    config = write(**sample, train__max_steps=None, train__num_train_epochs=3, train__global_batch_size=32)
    batches = prepared(config).splits["train"].batches
    settings = make_train_settings(config.train, batches, 0)
    rows = range(settings.max_steps * settings.global_batch_size)
    seen = sum(len(batches.members(*divmod(row, batches.num_sequences))) for row in rows)
    assert seen == pytest.approx(3 * 1330, rel=0.05)
    assert seen / settings.max_steps == pytest.approx(32, rel=0.1)


@pytest.mark.parametrize("lengths", [[12], [140, 9], [90, 60, 61, 130, 20, 77, 50, 52, 30, 100]])
def test_few_examples_are_packed_with_little_padding(lengths):
    """Less than as many again as there are tokens, where no length of rows packs them well."""
    sequence_length = choose_sequence_length(np.array(lengths))
    assert count_sequences(np.array(lengths), sequence_length) * sequence_length < 2 * sum(lengths) + 8
    assert sequence_length % 8 == 0 and sequence_length >= max(lengths)
