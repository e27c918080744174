"""Labelled rows as tokenised examples, and examples as packed batches."""

# Shapes: R rows, T positions of a row, P places of a row for an example, L labels.
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from bertlite.config.finetune_settings import TaskSettings
from bertlite.core.errors import UserError
from bertlite.core.logging import logger
from bertlite.core.random import EPOCH_ORDER, permute
from bertlite.data.batches import Batch
from bertlite.data.formats import Record
from bertlite.data.masking import IGNORED
from bertlite.data.packing import collate, pack_lengths
from bertlite.data.tables import get_column
from bertlite.model.heads import QuestionAnswerer, TokenClassifier

MOST_PADDING = 0.05  # of the positions; longer rows pack better …
LONGEST_ROW = 1024  # … but attention costs more in them


@dataclass
class Examples:
    """Tokenised examples. A target is a number, a vector, a tag number for each piece, or where an answer starts and
    ends. `owners` says which row of the table an example is from; `spans` is what decoding needs to know."""

    ids: list[list[int]]
    types: list[list[int]]
    spans: list[Any]
    owners: list[int]
    targets: list[Any]
    cut: int  # examples of which `max_length` left a part out


@dataclass(frozen=True)
class TaskBatch(Batch):
    """Packed examples. `prediction_positions` (R,P) are where they begin; labels are (R,P) or (R,P,·), one for each
    example, or (R,T), one for each token; places without an example have the label IGNORED or, among numbers, NaN."""

    token_type_ids: Tensor  # (R,T)


class ExampleBatches:
    """Batches of examples packed into rows of one length, like those of pretraining: a pure function of the seed and
    the number of the first row, with hardly any padding and always of one shape.

    `length` is a length of rows to keep to; where examples are longer, or without it, the shortest that packs well, or
    else that which packs best.
    """

    def __init__(self, examples: Examples, head: type[nn.Module], pad_id: int, seed: int = 0, length: int = 0) -> None:
        self.examples, self.head, self.pad_id, self.seed = examples, head, pad_id, seed
        self.lengths = np.array([len(ids) for ids in examples.ids])
        longest = int(self.lengths.max())
        multiples = range(1, max(1, LONGEST_ROW // longest) + 1)
        found: dict[int, tuple[float, int]] = {}
        for one in [length] if length >= longest else [8 * math.ceil(n * longest / 8) for n in multiples]:
            rows = len(pack_lengths(self.lengths, one)[1]) - 1
            found[one] = 1 - self.lengths.sum() / (rows * one), rows
            if found[one][0] <= MOST_PADDING or rows == 1:
                break
        self.length = min(found, key=found.__getitem__)  # of few examples, none may pack well
        self.padding, self.rows = found[self.length]
        self.places = self.length // self.lengths.min()
        self.packings: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def training(self, first: int, count: int) -> TaskBatch:
        """Rows `first` to `first + count` of the endless stream; each epoch packs and shuffles the examples anew."""
        samples = np.arange(first, first + count)
        epochs = samples // self.rows
        places = permute(samples % self.rows, self.rows, (self.seed, EPOCH_ORDER), epochs)
        return self.batch([self.members(*one) for one in zip(epochs.tolist(), places.tolist(), strict=True)])

    def members(self, epoch: int, row: int) -> NDArray[np.int64]:
        """The examples of a row in an epoch's packing; past the last row, none."""
        if epoch not in self.packings:
            self.packings = {number: kept for number, kept in self.packings.items() if number >= epoch - 1}
            self.packings[epoch] = pack_lengths(self.lengths, self.length, self.seed, epoch)
        order, starts = self.packings[epoch]
        return order[starts[row] : starts[row + 1]] if row < self.rows else order[:0]

    def batch(self, rows: list[NDArray[np.int64]]) -> TaskBatch:
        """A batch of rows that hold these examples."""
        examples, by_token = self.examples, self.head is TokenClassifier
        pieces = [[examples.ids[member] for member in members] for members in rows]
        ids, positions, documents = collate(pieces, self.length, self.pad_id)
        types, *_ = collate([[examples.types[member] for member in members] for members in rows], self.length, 0)
        firsts = np.zeros((len(rows), self.places), np.int64)
        target = np.asarray(examples.targets[0])
        none = math.nan if target.dtype.kind == "f" else IGNORED
        labels = np.full(ids.shape if by_token else (*firsts.shape, *target.shape), none, target.dtype)
        for out, members in enumerate(rows):
            ends = np.cumsum(self.lengths[members])
            firsts[out, 1 : len(members)] = ends[:-1]
            for place, (member, at, end) in enumerate(zip(members, firsts[out], ends, strict=False)):
                target = examples.targets[member]
                if self.head is QuestionAnswerer:
                    target = np.where(target == IGNORED, IGNORED, target + at)
                labels[out, slice(at, end) if by_token else place] = target
        return TaskBatch(*map(torch.from_numpy, (ids, positions, documents, firsts, labels, types)))

    def apart(self, values: Tensor, rows: list[NDArray[np.int64]]) -> dict[int, NDArray[np.float32]]:
        """Each example's own part of a batch's values: (…) of (R,P,…), or (n,…) of (R,T,…) for its n tokens."""
        found: dict[int, NDArray[np.float32]] = {}
        by_token = values.shape[1] == self.length  # of which there are always more than examples
        for members, row in zip(rows, values.float().cpu().numpy(), strict=True):
            each = np.split(row, np.cumsum(self.lengths[members])) if by_token else row
            found.update(zip(members.tolist(), each, strict=False))  # the last of what was split is padding
        return found


def encode_texts(
    texts: Sequence[tuple[Any, ...]], tokenizer: PreTrainedTokenizerBase, settings: TaskSettings, words: bool = False
) -> Examples:
    """Single texts or pairs, each a list of its words with `words`, cut to `max_length`; the spans are the tokenizer's
    own encodings."""
    columns = map(list, zip(*texts, strict=True))
    found = tokenizer(
        *columns, is_split_into_words=words, truncation=True, max_length=settings.max_length, verbose=False
    ).encodings
    return _examples(found, found, list(range(len(found))), tokenizer)


def encode_questions(
    texts: list[tuple[str, ...]], tokenizer: PreTrainedTokenizerBase, settings: TaskSettings
) -> Examples:
    """Questions with their contexts, long ones in pieces that overlap by `doc_stride`; the spans are the characters of
    the context that a piece stands for, None outside of it."""
    room = settings.max_length - settings.doc_stride - 4  # for the question, and a token beyond what overlaps
    if room < 1:
        raise UserError(
            f"task.doc_stride is {settings.doc_stride}, which leaves no room for the question in task.max_length "
            f"{settings.max_length}; raise the second"
        )
    questions, contexts = map(list, zip(*texts, strict=True))
    for number, pieces in enumerate(tokenizer(questions, add_special_tokens=False, verbose=False).encodings):
        if len(pieces) > room:
            questions[number] = questions[number][: pieces.offsets[room - 1][1]]
    found = tokenizer(
        questions,
        contexts,
        truncation="only_second",
        max_length=settings.max_length,
        stride=settings.doc_stride,
        return_overflowing_tokens=True,
        verbose=False,
    )
    spans = [
        [offset if part == 1 else None for offset, part in zip(one.offsets, one.sequence_ids, strict=True)]
        for one in found.encodings
    ]
    return _examples(found.encodings, spans, found["overflow_to_sample_mapping"], tokenizer)


def _examples(found: list[Any], spans: list[Any], owners: list[int], tokenizer: PreTrainedTokenizerBase) -> Examples:
    tokenizer.backend_tokenizer.no_truncation()  # it would be saved with the tokenizer
    ids, types = [one.ids for one in found], [one.type_ids for one in found]
    cut = 0 if len(set(owners)) < len(owners) else sum(bool(one.overflowing) for one in found)
    return Examples(ids, types, spans, owners, [IGNORED] * len(found), cut)


def texts_of(rows: list[Record], settings: TaskSettings) -> list[tuple[str, ...]]:
    """The texts of the rows' columns. Raises UserError for one that is empty or no text."""
    texts = []
    for row in rows:
        values = tuple(get_column(row, name, "task.text") for name in settings.text)
        for name, value in zip(settings.text, values, strict=True):
            if not isinstance(value, str) or not value.strip():
                what = "is empty" if value is None or isinstance(value, str) else "holds no text"
                raise UserError(f"{row.location}: the column {name!r} {what}: {value!r}")
        texts.append(values)
    return texts


def sorted_labels(labels: set[str]) -> list[str]:
    """Labels in the order of their numbers, if they are numbers, or of the alphabet."""
    return sorted(labels, key=int if all(label.isdecimal() for label in labels) else None)


def one_label(row: Record, settings: TaskSettings) -> str:
    value = get_column(row, settings.label, "task.label")
    if isinstance(value, list | dict):
        raise UserError(f"{row.location}: the label in column {settings.label!r} is {value!r}; it should be one text")
    if value is None or (isinstance(value, float) and math.isnan(value)) or str(value).strip() == "":
        raise UserError(f"{row.location}: the label in column {settings.label!r} is empty: {value!r}")
    return str(value).strip()


def several_labels(row: Record, settings: TaskSettings) -> list[str]:
    """A list, or a text cut at `label_separator`; it may be empty."""
    value = get_column(row, settings.label, "task.label")
    parts = value if isinstance(value, list) else str("" if value is None else value).split(settings.label_separator)
    return [str(part).strip() for part in parts if str(part).strip()]


def one_number(row: Record, settings: TaskSettings) -> float:
    value = get_column(row, settings.label, "task.label")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise UserError(
            f"{row.location}: the target in column {settings.label!r} is {value!r}, which is no finite number"
        )
    return number


def words_and_tags(row: Record, settings: TaskSettings) -> tuple[list[str], list[str]]:
    """A sentence's words and tags, the tags as IOB2: in IOB1, IOB2, BMES and BILOU alike, what follows no part of
    its own kind begins an entity, and so do B, S and U."""
    words, tags = (get_column(row, name, "task") for name in (settings.text[0], settings.label))
    if not isinstance(words, list) or not isinstance(tags, list):
        raise UserError(
            f"{row.location}: {settings.text[0]!r} and {settings.label!r} should be lists of words and of tags"
        )
    if len(words) != len(tags):
        raise UserError(f"{row.location}: {len(words)} words, but {len(tags)} tags")
    if not words:
        raise UserError(f"{row.location}: the sentence is empty")
    result, before = [], ""
    for tag in map(str, tags):
        place, _, kind = tag.partition("-")
        if tag != "O" and (place not in ("B", "I", "M", "E", "S", "L", "U") or not kind):
            raise UserError(
                f"{row.location}: {tag!r} is no tag; they are O, B-KIND, I-KIND, or with M-, E-, S-, L-, U-"
            )
        begins = place in ("B", "S", "U") or kind != before
        result.append("O" if tag == "O" else f"{'B' if begins else 'I'}-{kind}")
        before = "" if place in ("E", "S", "L", "U") else kind
    return [str(word) for word in words], result


def answers_of(row: Record) -> tuple[list[str], list[int]]:
    """The texts and starts of a question's answers."""
    answers = get_column(row, "answers", "SQuAD's form")
    try:
        return [str(text) for text in answers["text"]], [int(start) for start in answers["answer_start"]]
    except (TypeError, KeyError, ValueError, OverflowError):
        raise UserError(f"{row.location}: answers should hold the lists text and answer_start") from None


def class_labels(rows: list[Record], settings: TaskSettings) -> list[str]:
    labels = sorted_labels({one_label(row, settings) for row in rows})
    if len(labels) < 2:
        raise UserError(
            f"task.train: all {len(rows):,} rows have the label {labels[0]!r}; there is nothing to tell apart"
        )
    return labels


def multilabel_labels(rows: list[Record], settings: TaskSettings) -> list[str]:
    labels = sorted_labels({label for row in rows for label in several_labels(row, settings)})
    if not labels:
        raise UserError(f"task.train: no row has a label in column {settings.label!r}")
    return labels


def tag_labels(rows: list[Record], settings: TaskSettings) -> list[str]:
    kinds = sorted({tag[2:] for row in rows for tag in words_and_tags(row, settings)[1]} - {""})
    if not kinds:
        raise UserError(f"task.train: all tags in column {settings.label!r} are O; there is nothing to find")
    return ["O", *(f"{place}-{kind}" for kind in kinds for place in "BI")]


def _numbers(labels: list[str], wanted: list[str], row: Record) -> list[int]:
    for label in wanted:
        if label not in labels:
            shown = ", ".join(labels[:10]) + (", …" if len(labels) > 10 else "")
            raise UserError(f"{row.location}: the label {label!r} does not occur in task.train, which has {shown}")
    return [labels.index(label) for label in wanted]


def class_examples(rows: list[Record], labels: list[str], tokenizer: Any, settings: TaskSettings) -> Examples:
    examples = encode_texts(texts_of(rows, settings), tokenizer, settings)
    examples.targets = [_numbers(labels, [one_label(row, settings)], row)[0] for row in rows]
    return examples


def multilabel_examples(rows: list[Record], labels: list[str], tokenizer: Any, settings: TaskSettings) -> Examples:
    examples = encode_texts(texts_of(rows, settings), tokenizer, settings)
    examples.targets = [np.zeros(len(labels), np.float32) for _ in rows]
    for row, target in zip(rows, examples.targets, strict=True):
        target[_numbers(labels, several_labels(row, settings), row)] = 1
    return examples


def regression_examples(rows: list[Record], labels: list[str], tokenizer: Any, settings: TaskSettings) -> Examples:
    examples = encode_texts(texts_of(rows, settings), tokenizer, settings)
    examples.targets = [np.float32(one_number(row, settings)) for row in rows]
    return examples


def tag_examples(rows: list[Record], labels: list[str], tokenizer: Any, settings: TaskSettings) -> Examples:
    """Sentences of words; the spans are the first piece of each word, by its number, and it alone has a target."""
    sentences = [words_and_tags(row, settings) for row in rows]
    examples = encode_texts([(words,) for words, _ in sentences], tokenizer, settings, words=True)
    for number, (row, (_, tags)) in enumerate(zip(rows, sentences, strict=True)):
        tag_numbers, firsts, target = _numbers(labels, tags, row), {}, np.full(len(examples.ids[number]), IGNORED)
        for place, word in enumerate(examples.spans[number].word_ids):
            if word is not None and word not in firsts:
                firsts[word], target[place] = place, tag_numbers[word]
        examples.spans[number], examples.targets[number] = firsts, target
    return examples


def answer_examples(rows: list[Record], labels: list[str], tokenizer: Any, settings: TaskSettings) -> Examples:
    """Where a piece of the context does not hold the answer, its target is [CLS]."""
    examples = encode_questions(texts_of(rows, settings), tokenizer, settings)
    answers = [_answer_in_context(row, settings) for row in rows]
    astray = [row.location for row, answer in zip(rows, answers, strict=True) if answer is None]
    if astray:
        logger.info(
            f"{len(astray):,} of {len(rows):,} questions have no answer where answer_start says, such as {astray[0]}; "
            "they are left out of the loss"
        )
    for number, (owner, spans) in enumerate(zip(examples.owners, examples.spans, strict=True)):
        target = np.full(2, IGNORED if answers[owner] is None else 0)
        start, end = answers[owner] or (0, 0)
        inside = [place for place, span in enumerate(spans) if span and span[0] < end and span[1] > start]
        if inside and spans[inside[0]][0] <= start and spans[inside[-1]][1] >= end:
            target[:] = inside[0], inside[-1]
        examples.targets[number] = target
    return examples


def _answer_in_context(row: Record, settings: TaskSettings) -> tuple[int, int] | None:
    """Where the first answer begins and ends; None unless the context has it there."""
    texts, starts = answers_of(row)
    if not (texts and starts and texts[0]):
        return None
    start, end = starts[0], starts[0] + len(texts[0])
    return (start, end) if row.columns[settings.text[1]][start:end] == texts[0] else None
