"""The labels of multilabel examples, as people write them: lists, text with separators, and 0 and 1 for each label."""

import ast
import json
import re
from typing import Any

from bertlite.config.finetune_settings import InputSettings
from bertlite.core.errors import UserError
from bertlite.data.columns import get_column
from bertlite.data.formats import Record, is_empty
from bertlite.finetuning.labels import name_label, sort_labels

FLAGS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
UNKNOWN = "-1"  # in each 0/1 column of an example that nobody labelled, as in Jigsaw's test set

# How a cell may hold labels, for messages.
LIST, LIST_IN_TEXT, VECTOR, TEXT = "a list", "a list in a text", "a vector of 0 and 1", "text with separators"


def read_label_list(record: Record, settings: InputSettings) -> list[str]:
    """Read the labels of a record; there may be none. Raises UserError for a cell that holds no labels."""
    if len(settings.label) > 1:
        return [name for name in settings.label if _read_flag(record, name)]
    kind, items = split_cell(record, settings)
    texts = [str(item).strip() for item in items]
    if kind == VECTOR:
        names = settings.label_names or [str(index) for index in range(len(texts))]
        return [name for name, text in zip(names, texts, strict=True) if FLAGS[text.lower()]]
    return [name_label(text, record, settings) for text in texts if text]


def _read_flag(record: Record, name: str) -> bool:
    cell = str(get_column(record, name, "task.label")).strip().lower()
    if cell not in FLAGS:
        raise UserError(f"{record.location}: the column {name!r} is {cell!r}, which is neither 0 nor 1")
    return FLAGS[cell]


def split_cell(record: Record, settings: InputSettings) -> tuple[str, list[Any]]:
    """Return how the cell of a record's labels is written, "" for an empty one, and its items.

    Text in brackets is a list as JSON, Python, pandas and NumPy write it; other text is split at `label_separator`. As
    many zeros and ones as `label_names` has names are a vector. Raises UserError for items that are no texts.
    """
    cell = get_column(record, settings.label[0], "task.label")
    if is_empty(cell):
        return "", []
    kind, items = (LIST, cell) if isinstance(cell, list) else _split_text(str(cell).strip(), record, settings)
    if any(isinstance(item, list | dict) or item is None for item in items):
        raise UserError(f"{record.location}: the labels in column {settings.label[0]!r} are not texts: {cell!r}")
    if settings.label_names and len(items) == len(settings.label_names) and _are_flags(items):
        kind = VECTOR
    return kind, items


def _split_text(text: str, record: Record, settings: InputSettings) -> tuple[str, list[Any]]:
    is_default = settings.label_separator == ","
    if text.startswith("[") and text.endswith("]"):
        items = parse_list(text)
        if items is not None:
            return LIST_IN_TEXT, items
        if is_default:
            raise UserError(
                f"{record.location}: the labels {text[:60]!r} look like a list, but are none, such as ['a', 'b']; if "
                "brackets belong to the labels, separate those by another sign, in task.label_separator"
            )
    if is_default and re.fullmatch(r"[01](\s+[01])+", text):
        return TEXT, text.split()
    return TEXT, text.split(settings.label_separator)


def _are_flags(items: list[Any]) -> bool:
    return all(str(item).strip().lower() in FLAGS for item in items)


def parse_list(text: str) -> list[Any] | None:
    """Parse a list in a text: ["a", "b"], ['a', 'b'], or without commas, as NumPy prints it. None if it is not one."""
    quoted = "'" in text or '"' in text
    with_commas = re.sub(r"(?<=['\"])\s+(?=['\"])" if quoted else r"(?<=\d)\.?\s+(?=[-\d])", ", ", text)
    for parse, source in ((json.loads, text), (ast.literal_eval, with_commas)):
        try:
            value = parse(source)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(value, list):
            return value
    return None


def have_label_columns(records: list[Record], settings: InputSettings, known_labels: list[str]) -> list[bool]:
    """Return which records are labelled: those whose 0/1 columns are not all -1; an empty cell means no labels."""
    if len(settings.label) == 1:
        return [True] * len(records)
    cells = ([str(record.columns.get(name)).strip() for name in settings.label] for record in records)
    return [set(values) != {UNKNOWN} for values in cells]


def check_one_form(records: list[Record], settings: InputSettings) -> None:
    """Raise UserError if the column holds labels in several forms, or vectors of 0 and 1 without names."""
    if len(settings.label) > 1:
        return
    forms: dict[str, str] = {}
    items_of = []
    for record in records:
        kind, items = split_cell(record, settings)
        if kind:
            forms.setdefault(kind, record.location)
            items_of.append([str(item).strip() for item in items])
    if len(forms) > 1:
        (first, where), (second, other), *_ = forms.items()
        raise UserError(
            f"{other}: the labels in column {settings.label[0]!r} are {second}, but {first} at {where}; write all alike"
        )
    lengths = {len(items) for items in items_of}
    repeated = any(len(set(items)) < len(items) for items in items_of)
    if settings.label_names is None and len(lengths) == 1 and repeated and all(map(_are_flags, items_of)):
        raise UserError(
            f"task.label: the column {settings.label[0]!r} holds vectors of {lengths.pop()} zeros and ones; name their "
            "labels in order, in task.label_names"
        )


def collect_labels(records: list[Record], settings: InputSettings) -> list[str]:
    """Return the names of a model's outputs, from the training records. Raises UserError if no record has a label."""
    found = {label for record in records for label in read_label_list(record, settings)}
    if not found:
        raise UserError(f"task.train: no example has a label in column {settings.label[0]!r}")
    return settings.label if len(settings.label) > 1 else settings.label_names or sort_labels(found)
