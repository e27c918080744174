"""Examples packed into sequences."""

import numpy as np
import pytest
import torch
from tiny_tasks import make_experiment
from tokenizers import processors

from bertlite.config.finetune_settings import SavedTask
from bertlite.core.errors import UserError
from bertlite.data.masking import IGNORED
from bertlite.data.tokenizer import load_tokenizer
from bertlite.finetuning.batches import ExampleBatches, choose_sequence_length, count_sequences
from bertlite.finetuning.choices import encode_choices
from bertlite.finetuning.examples import encode_texts
from bertlite.finetuning.experiment import make_train_settings


def test_batches_are_a_pure_function_of_seed_and_index_with_little_padding(write):
    experiment = make_experiment(write(task__train="sample", task__validation="sample", task__max_length=64))
    batches = experiment.splits["train"].batches
    again = ExampleBatches(batches.examples, 0, batches.seed, batches.sequence_length)
    assert batches.padding <= 0.05
    num_sequences = batches.num_sequences
    assert batches.lengths.sum() / (num_sequences * batches.sequence_length) == pytest.approx(1 - batches.padding)
    for first in (3 * num_sequences + 5, 0, num_sequences - 1):  # in any order, across the ends of epochs
        batch, same = batches.training(first, 3), again.training(first, 3)
        assert all(torch.equal(a, b) for a, b in zip(vars(batch).values(), vars(same).values(), strict=True))
        assert batch.input_ids.shape == (3, batches.sequence_length)
    seen = []
    for epoch in range(2):
        batch = batches.training(epoch * num_sequences, num_sequences)
        assert batch.tokens() == batches.lengths.sum()
        counts = torch.bincount(batch.labels[batch.labels != IGNORED], minlength=7)
        assert counts.tolist() == np.bincount(batches.examples.targets, minlength=7).tolist()
        sequences = [tuple(sorted(batches.members(epoch, sequence).tolist())) for sequence in range(num_sequences)]
        assert sorted(member for members in sequences for member in members) == list(range(1330))
        seen.append(set(sequences))
    assert len(seen[0] & seen[1]) < num_sequences / 2  # each epoch packs other examples together
    other = ExampleBatches(batches.examples, 0, 1, batches.sequence_length).training(0, 3)
    assert not torch.equal(other.input_ids, batches.training(0, 3).input_ids)


def test_an_epoch_has_all_examples_and_a_step_about_global_batch_size(write):
    sample = {"task__train": "sample", "task__validation": "sample"}
    config = write(**sample, train__max_steps=None, train__num_train_epochs=3, train__global_batch_size=32)
    batches = make_experiment(config).splits["train"].batches
    settings = make_train_settings(config.train, batches, 0)
    samples = range(settings.max_steps * settings.global_batch_size)
    seen = sum(len(batches.members(*divmod(sample, batches.num_sequences))) for sample in samples)
    assert seen == pytest.approx(3 * 1330, rel=0.05)
    assert seen / settings.max_steps == pytest.approx(32, rel=0.1)


@pytest.mark.parametrize("lengths", [[12], [140, 9], [90, 60, 61, 130, 20, 77, 50, 52, 30, 100]])
def test_few_examples_are_packed_with_little_padding(lengths):
    """Where no sequence length packs them well, there is still less padding than there are tokens."""
    sequence_length = choose_sequence_length(np.array(lengths))
    assert count_sequences(np.array(lengths), sequence_length) * sequence_length < 2 * sum(lengths) + 8
    assert sequence_length % 8 == 0 and sequence_length >= max(lengths)


def test_a_text_without_tokens_is_an_error(vocabulary):
    tokenizer = load_tokenizer(str(vocabulary))
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    examples = encode_texts([("a",), ("",)], tokenizer, SavedTask(type="classification"))
    with pytest.raises(UserError, match="a text has no tokens: it is empty"):
        ExampleBatches(examples, 0)


def test_scores_of_choices_are_those_of_their_examples_where_a_sequence_has_as_many_places_as_tokens(vocabulary):
    many, few = ("a", *["b b b b"] * 13), ("a", "b b", "b b b")  # 13 choices of 8 tokens; 2 choices of 13 tokens
    examples = encode_choices([many, few], load_tokenizer(str(vocabulary)), SavedTask(type="multiple-choice"))
    batches = ExampleBatches(examples, 0, sequence_length=104)
    found = {}
    for sequence in range(batches.num_sequences):
        batch = batches.evaluation(sequence, 1)
        assert batch.example_indices.shape == batch.input_ids.shape
        found |= batches.unpack(batch.example_indices[..., None], batch)
    assert {index: scores.tolist() for index, scores in found.items()} == {index: [index] for index in range(15)}
