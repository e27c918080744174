"""Multiple choice: the choices of records, an example for each choice, the loss, and the choice that scores mean."""

# Shapes: B sequences, E places for examples in a sequence, R places for records; E = R × the largest number of choices.
import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bertlite.config.finetune_settings import InputSettings
from bertlite.core.errors import UserError
from bertlite.core.logging import logger
from bertlite.data.columns import get_column
from bertlite.data.formats import Record
from bertlite.data.masking import IGNORED
from bertlite.finetuning.batches import TaskBatch
from bertlite.finetuning.decoding import Outputs, Scores, softmax
from bertlite.finetuning.examples import Examples, without_labels
from bertlite.finetuning.label_lists import parse_list
from bertlite.finetuning.labels import read_cells, read_label, read_texts
from bertlite.finetuning.labels import read_unlabelled as read_unlabelled_texts

TEXT = "text"  # the only label of a model whose choices are called by their text


def read_choices(record: Record, settings: InputSettings, may_be_empty: bool = False) -> list[str]:
    """Read the choices of a record: a column for each, or one with a list of them, also as a text, or of their `text`.

    The last columns may be empty. Raises UserError for fewer than two choices, for one that is no text and, unless they
    `may_be_empty`, for an empty one.
    """
    cells: Any = [get_column(record, name, "task.choices") for name in settings.choices]
    if len(cells) == 1:
        (cells,) = cells
        if isinstance(cells, dict):
            cells = cells.get("text")
        elif isinstance(cells, str):
            cells = parse_list(cells) or cells
    while isinstance(cells, list) and cells and cells[-1] in (None, ""):
        cells = cells[:-1]
    if not isinstance(cells, list) or len(cells) < 2:
        raise UserError(
            f"{record.location}: task.choices {settings.choices} should be a column with a list of two texts or more, "
            f"or a column for each choice; it holds {cells!r}"
        )
    if may_be_empty:
        cells = ["" if cell is None else cell for cell in cells]
    for cell in cells:
        if not isinstance(cell, str) or not (cell.strip() or may_be_empty):
            raise UserError(f"{record.location}: a choice {'holds no text' if cell else 'is empty'}: {cell!r}")
    return cells


def read_fields(record: Record, settings: InputSettings) -> tuple[str, ...]:
    """Read the texts of a record and its choices. Raises UserError for an empty text, and as `read_choices` does."""
    return (*read_texts(record, settings), *read_choices(record, settings))


def read_unlabelled(record: Record, settings: InputSettings) -> tuple[str, ...]:
    """Read the texts of a record to predict for, and its choices; each may be empty."""
    return (*read_unlabelled_texts(record, settings), *read_choices(record, settings, may_be_empty=True))


def split_line(text: str, location: str, settings: InputSettings) -> Record:
    """Make a record of a line that holds the task's texts and then the choices, separated by tabs."""
    fields, num_texts = text.split("\t"), len(settings.text)
    texts, choices = dict(zip(settings.text, fields, strict=False)), fields[num_texts:]
    if len(choices) < 2:
        raise UserError(
            f"{location}: should be {' and '.join(settings.text)} and at least two choices, separated by tabs: "
            f"{text[:60]!r}"
        )
    if len(settings.choices) == 1:
        return Record(location, {**texts, settings.choices[0]: choices})
    if len(choices) > len(settings.choices):
        raise UserError(
            f"{location}: holds {len(choices)} choices; the model's columns are {', '.join(settings.choices)}"
        )
    named = dict(zip(settings.choices, choices, strict=False))
    return Record(location, dict.fromkeys(settings.choices) | texts | named)


def have_right_choice(records: list[Record], settings: InputSettings, known_labels: list[str]) -> list[bool]:
    """Return which records have a label: it is neither empty nor in `no_label`, by default -1."""
    marks = {"", *(["-1"] if settings.no_label is None else settings.no_label)}
    return [cell not in marks for cell in read_cells(records, settings)]


def read_names(record: Record, settings: InputSettings) -> list[str]:
    """Read the names that a record itself gives its choices, beside their `text`: its `label`; most have none."""
    cell = record.columns[settings.choices[0]]
    return [str(name) for name in cell.get("label", [])] if isinstance(cell, dict) else []


def collect_choice_names(records: list[Record], settings: InputSettings) -> list[str]:
    """Find how the labels call the choices, and log it: by index, number, letter, names in the records, or text.

    Raises UserError, naming a record, if none of these holds for all of them.
    """
    cells = [read_label(record, settings) for record in records]
    choices = [read_choices(record, settings) for record in records]
    most = max(map(len, choices))
    forms = {
        "index, from 0": [str(index) for index in range(most)],
        "number, from 1": [str(index + 1) for index in range(most)],
        "letter": list(string.ascii_uppercase[:most]),
        "small letter": list(string.ascii_lowercase[:most]),
    }
    own_names = [read_names(record, settings) for record in records]
    if all(cell in names for cell, names in zip(cells, own_names, strict=True)):
        logger.info("the right choice is given by the name that the choice has")
        return max(own_names, key=len)
    for form, names in forms.items():
        if all(cell in names[: len(texts)] for cell, texts in zip(cells, choices, strict=True)):
            logger.info(f"the right choice is given by its {form}, such as {cells[0]}")
            return names
    for record, cell, texts in zip(records, cells, choices, strict=True):
        if cell not in texts:
            raise UserError(
                f"{record.location}: the label {cell!r} is no choice; labels should all be indices (0, 1, …), numbers "
                f"(1, 2, …), letters (A, B, …) or texts of the choices, which are {texts}"
            )
    logger.info("the right choice is given by its text")
    return [TEXT]


def name_choices(labels: list[str], names: list[str], texts: Sequence[str]) -> list[str]:
    """Return what the choices of a record are called: by its own `names`, by the model's labels, or by their texts.

    Choices beyond the labels are called by their indices.
    """
    if names:
        return names
    if labels == [TEXT]:
        return list(texts)
    return [*labels, *map(str, range(len(labels), len(texts)))][: len(texts)]


def describe_choice(index: int, labels: list[str]) -> str:
    """Return what a choice is called, or its index if that is by its text."""
    return labels[index] if labels != [TEXT] and index < len(labels) else str(index)


def find_right_choice(record: Record, labels: list[str], settings: InputSettings) -> int:
    """Return the index of the right choice. Raises UserError for a label that no choice has."""
    names = name_choices(labels, read_names(record, settings), read_choices(record, settings))
    cell = read_label(record, settings)
    if cell not in names:
        raise UserError(f"{record.location}: the label {cell!r} is no choice; they are called {', '.join(names)}")
    return names.index(cell)


def encode_choices(
    texts: Sequence[tuple[str, ...]], tokenizer: PreTrainedTokenizerBase, settings: InputSettings
) -> Examples:
    """Tokenize a pair for each choice, truncated to `max_length`: a context, and a choice.

    Each tuple holds the record's texts and its choices. A second text, such as a question, precedes the choice (Zellers
    et al. 2018, SWAG).
    """
    num_texts = len(settings.text)
    pairs = [
        (first, " ".join((*rest[: num_texts - 1], choice)))
        for first, *rest in texts
        for choice in rest[num_texts - 1 :]
    ]
    record_indices = [index for index, fields in enumerate(texts) for _ in fields[num_texts:]]
    columns = map(list, zip(*pairs, strict=True))
    encodings = tokenizer(*columns, truncation=True, max_length=settings.max_length, verbose=False).encodings
    return replace(without_labels(encodings, record_indices, texts, tokenizer), grouped=True)


def choice_examples(
    records: list[Record], labels: list[str], tokenizer: PreTrainedTokenizerBase, settings: InputSettings
) -> Examples:
    """The target of each choice's example is the index of the right choice."""
    rights = [find_right_choice(record, labels, settings) for record in records]
    examples = encode_choices([read_fields(record, settings) for record in records], tokenizer, settings)
    return replace(examples, targets=[rights[index] for index in examples.record_indices], references=rights)


def choice_loss(scores: Tensor, batch: TaskBatch) -> tuple[Tensor, Tensor]:
    """Cross entropy, in nats, among the choices of each record: (B,E), at its first choice. `labels` are (B,R)."""
    (B, E), R = batch.example_indices.shape, batch.labels.shape[1]
    scores = scores[..., 0].float().masked_fill(batch.example_indices < 0, torch.finfo(torch.float32).min)
    losses = F.cross_entropy(scores.view(B * R, -1), batch.labels.flatten(), ignore_index=IGNORED, reduction="none")
    values = torch.stack([losses.view(B, R), batch.labels != IGNORED], -1)
    losses, counted = F.pad(values[:, :, None], (0, 0, 0, E // R - 1)).view(B, E, 2).unbind(-1)
    return losses, counted.bool()


def scores_of_records(outputs: Outputs) -> list[Scores]:
    """Return the scores of the choices of each record."""
    counts = np.bincount(outputs.examples.record_indices)
    return np.split(np.concatenate(outputs.scores), np.cumsum(counts)[:-1])


def decode_choices(outputs: Outputs) -> list[int]:
    """Return the index of the choice with the highest score, for each record."""
    return [int(scores.argmax()) for scores in scores_of_records(outputs)]


def rank_choices(outputs: Outputs, top_k: int) -> list[Any]:
    """Return `label, score, choice` of each record's best choice or, with `top_k` above 1, a list of so many.

    `label` is what the choice is called, `choice` its text, and scores sum to 1.
    """
    rankings = []
    for scores, texts in zip(scores_of_records(outputs), outputs.examples.texts, strict=True):
        choices = texts[len(outputs.settings.text) :]
        names, probabilities = name_choices(outputs.labels, [], choices), softmax(scores)
        best = np.argsort(-probabilities, kind="stable")[:top_k].tolist()
        rankings.append(
            [{"label": names[index], "score": float(probabilities[index]), "choice": choices[index]} for index in best]
        )
    return [ranking[0] for ranking in rankings] if top_k == 1 else rankings
