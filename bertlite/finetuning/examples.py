"""Tokenized examples: texts as token ids, and labels as the targets that a loss compares with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from bertlite.config.finetune_settings import InputSettings
from bertlite.data.formats import Record
from bertlite.data.masking import IGNORED
from bertlite.finetuning.label_lists import check_one_form, read_label_list
from bertlite.finetuning.labels import find_label_indices, read_input_texts, read_label, read_number


@dataclass(frozen=True)
class Examples:
    """The tokenized examples of a table. A record gives one example, a long text of some tasks several.

    A record with choices gives one for each choice. They are `grouped`: computed in one sequence.

    Per example: `encodings`, the tokenizer's; `record_indices`, the record that it is from; `targets`, which the loss
    compares with: an index, a vector, a number, an index per token (`targets_per_token`), or the first and the last
    token of an answer. Per record: `texts`, and `references`, which the metrics compare with.
    """

    encodings: list[Encoding]
    record_indices: list[int]
    targets: list[Any]
    texts: list[tuple[Any, ...]]
    references: list[Any]
    targets_per_token: bool = False
    grouped: bool = False

    @property
    def num_truncated(self) -> int:
        """Records that lost tokens to `max_length`; a context that is split into several examples loses none."""
        if len(self.texts) < len(self.encodings) and not self.grouped:
            return 0
        pairs = zip(self.record_indices, self.encodings, strict=True)
        return len({index for index, encoding in pairs if encoding.overflowing})

    def count_unknown(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
        """Return how many tokens are [UNK], and how many there are without special tokens."""
        unknown = sum(encoding.ids.count(tokenizer.unk_token_id) for encoding in self.encodings)
        return unknown, sum(len(encoding.ids) - sum(encoding.special_tokens_mask) for encoding in self.encodings)


def encode_texts(
    texts: Sequence[tuple[str, ...]], tokenizer: PreTrainedTokenizerBase, settings: InputSettings
) -> Examples:
    """Tokenize single texts or pairs, truncated to `max_length`."""
    columns = map(list, zip(*texts, strict=True))
    encodings = tokenizer(*columns, truncation=True, max_length=settings.max_length, verbose=False).encodings
    return without_labels(encodings, list(range(len(texts))), texts, tokenizer)


def without_labels(
    encodings: list[Encoding],
    record_indices: list[int],
    texts: Sequence[tuple[Any, ...]],
    tokenizer: PreTrainedTokenizerBase,
) -> Examples:
    """Return examples of `texts`, one per encoding, without targets and references."""
    tokenizer.backend_tokenizer.no_truncation()  # it would be saved with the tokenizer
    return Examples(encodings, record_indices, [IGNORED] * len(encodings), list(texts), [])


# The labelled examples of records, for each type of task.
def classification_examples(
    records: list[Record], labels: list[str], tokenizer: PreTrainedTokenizerBase, settings: InputSettings
) -> Examples:
    """The target is the index of the label."""
    examples = encode_texts(read_input_texts(records, settings), tokenizer, settings)
    targets = [find_label_indices([read_label(record, settings)], labels, record)[0] for record in records]
    return replace(examples, targets=targets, references=targets)


def multilabel_examples(
    records: list[Record], labels: list[str], tokenizer: PreTrainedTokenizerBase, settings: InputSettings
) -> Examples:
    """The target is a vector with 1 for each label that the record has, else 0."""
    check_one_form(records, settings)
    examples = encode_texts(read_input_texts(records, settings), tokenizer, settings)
    targets = [np.zeros(len(labels), np.float32) for _ in records]
    for record, target in zip(records, targets, strict=True):
        target[find_label_indices(read_label_list(record, settings), labels, record)] = 1
    return replace(examples, targets=targets, references=[target.astype(int) for target in targets])


def regression_examples(
    records: list[Record], labels: list[str], tokenizer: PreTrainedTokenizerBase, settings: InputSettings
) -> Examples:
    """The target is a number."""
    examples = encode_texts(read_input_texts(records, settings), tokenizer, settings)
    targets = [np.float32(read_number(record, settings)) for record in records]
    return replace(examples, targets=targets, references=[float(target) for target in targets])
