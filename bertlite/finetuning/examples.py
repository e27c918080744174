"""Tokenized examples: texts as token ids, and labels as the targets that a loss compares with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from bertlite.config.finetune_settings import InputSettings
from bertlite.core.errors import UserError
from bertlite.core.logging import logger
from bertlite.data.formats import Record
from bertlite.data.masking import IGNORED
from bertlite.finetuning.labels import (
    find_first_answer,
    find_label_indices,
    read_answers,
    read_input_texts,
    read_label,
    read_label_list,
    read_number,
)


@dataclass(frozen=True)
class Examples:
    """The tokenized examples of a table. A record gives one example, a question with a long context several.

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

    @property
    def num_truncated(self) -> int:
        """Examples that lost tokens to `max_length`; a context that is split into several examples loses none."""
        if len(self.texts) < len(self.encodings):
            return 0
        return sum(bool(encoding.overflowing) for encoding in self.encodings)


def encode_texts(
    texts: Sequence[tuple[Any, ...]], tokenizer: PreTrainedTokenizerBase, settings: InputSettings, words: bool = False
) -> Examples:
    """Tokenize single texts or pairs, truncated to `max_length`; with `words`, each text is a list of its words."""
    columns = map(list, zip(*texts, strict=True))
    encodings = tokenizer(
        *columns, is_split_into_words=words, truncation=True, max_length=settings.max_length, verbose=False
    ).encodings
    return _without_labels(encodings, list(range(len(texts))), texts, tokenizer)


def encode_questions(
    texts: Sequence[tuple[str, ...]], tokenizer: PreTrainedTokenizerBase, settings: InputSettings
) -> Examples:
    """Tokenize questions with their contexts. A long context gives examples that overlap by `doc_stride` tokens.

    Questions are truncated so that a context token beyond the overlap fits. Raises UserError if none would fit.
    """
    max_question = settings.max_length - settings.doc_stride - 4  # [CLS], [SEP], [SEP], and that context token
    if max_question < 1:
        raise UserError(
            f"task.doc_stride is {settings.doc_stride}, which leaves no room for the question in task.max_length "
            f"{settings.max_length}; raise task.max_length"
        )
    questions, contexts = map(list, zip(*texts, strict=True))
    for number, encoding in enumerate(tokenizer(questions, add_special_tokens=False, verbose=False).encodings):
        if len(encoding) > max_question:
            questions[number] = questions[number][: encoding.offsets[max_question - 1][1]]
    encoded = tokenizer(
        questions,
        contexts,
        truncation="only_second",
        max_length=settings.max_length,
        stride=settings.doc_stride,
        return_overflowing_tokens=True,
        verbose=False,
    )
    return _without_labels(encoded.encodings, encoded["overflow_to_sample_mapping"], texts, tokenizer)


def _without_labels(
    encodings: list[Encoding],
    record_indices: list[int],
    texts: Sequence[tuple[Any, ...]],
    tokenizer: PreTrainedTokenizerBase,
) -> Examples:
    tokenizer.backend_tokenizer.no_truncation()  # it would be saved with the tokenizer
    return Examples(encodings, record_indices, [IGNORED] * len(encodings), list(texts), [])


def context_offsets(encoding: Encoding) -> NDArray[np.int64]:
    """Return the characters (n,2), start and end, of the context that each token stands for; (0, 0) outside of it."""
    in_context = np.array(encoding.sequence_ids, dtype=object) == 1
    return np.where(in_context[:, None], np.array(encoding.offsets), 0)


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


def answer_examples(
    records: list[Record], labels: list[str], tokenizer: PreTrainedTokenizerBase, settings: InputSettings
) -> Examples:
    """The target is the first and the last token of the answer, or [CLS] twice in an example without the answer."""
    examples = encode_questions(read_input_texts(records, settings), tokenizer, settings)
    answers = [find_first_answer(record, settings) for record in records]
    missing = [record.location for record, answer in zip(records, answers, strict=True) if answer is None]
    if missing:
        logger.warning(
            f"{len(missing):,} of {len(records):,} questions have no answer at their answer_start, such as "
            f"{missing[0]}; they do not count in the loss"
        )
    targets = [
        answer_tokens(encoding, answers[index])
        for encoding, index in zip(examples.encodings, examples.record_indices, strict=True)
    ]
    return replace(examples, targets=targets, references=[read_answers(record)[0] or [""] for record in records])


def answer_tokens(encoding: Encoding, answer: tuple[int, int] | None) -> NDArray[np.int64]:
    """Return the positions of an answer's first and last token, given its characters (start, end) in the context.

    Returns [0, 0], which is [CLS], if the encoding does not hold the whole answer; IGNORED for an unknown answer.
    """
    if answer is None:
        return np.full(2, IGNORED)
    starts, ends = context_offsets(encoding).T
    tokens = np.flatnonzero((starts < answer[1]) & (ends > answer[0]))
    if len(tokens) and starts[tokens[0]] <= answer[0] and ends[tokens[-1]] >= answer[1]:
        return tokens[[0, -1]]
    return np.zeros(2, np.int64)
