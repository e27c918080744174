"""Read the texts and labels of records: what the cells of a labelled table mean."""

import math
import re
from collections import Counter
from typing import Any

import numpy as np

from bertlite.config.finetune_settings import InputSettings
from bertlite.core.errors import UserError
from bertlite.core.logging import logger, without_controls
from bertlite.data.columns import get_column
from bertlite.data.formats import Record, is_empty

MAX_LISTED, MAX_CHARACTERS = 10, 70  # labels that a message lists
MAX_RARE = 20  # labels that may have fewer than two examples on average


def read_texts(record: Record, settings: InputSettings) -> tuple[str, ...]:
    """Read the text or the two texts of a record. Raises UserError for a cell that is empty or holds no text."""
    cells = tuple(get_column(record, name, "task.text") for name in settings.text)
    for name, cell in zip(settings.text, cells, strict=True):
        if not isinstance(cell, str) or not cell.strip():
            problem = "is empty" if is_empty(cell) else "holds no text"
            raise UserError(f"{record.location}: the column {name!r} {problem}: {cell!r}")
    return cells


def read_input_texts(records: list[Record], settings: InputSettings) -> list[tuple[str, ...]]:
    """Read the texts of records. Raises UserError as `read_texts` does."""
    return [read_texts(record, settings) for record in records]


def read_unlabelled(record: Record, settings: InputSettings) -> tuple[str, ...]:
    """Read the text or the two texts of a record to predict for. An empty cell is an empty text.

    Raises UserError for a cell that holds no text.
    """
    cells = tuple(get_column(record, name, "--column") for name in settings.text)
    for name, cell in zip(settings.text, cells, strict=True):
        if cell is not None and not isinstance(cell, str):
            raise UserError(f"{record.location}: the column {name!r} holds {type(cell).__name__}, not text")
    return tuple(cell or "" for cell in cells)


def split_line(text: str, location: str, settings: InputSettings) -> Record:
    """Make a record of a line to predict for: a text or, if the model reads pairs, two texts with a tab between."""
    names = settings.text
    texts = [text] if len(names) == 1 else text.split("\t")
    if len(texts) != len(names):
        raise UserError(
            f"{location}: should be two texts, {' and '.join(names)}, separated by a tab, which the model reads: "
            f"{text[:60]!r}; in a shell, type $'one\\ttwo', or name a table by --file"
        )
    return Record(location, dict(zip(names, texts, strict=True)))


def read_cells(records: list[Record], settings: InputSettings) -> list[str]:
    """Read the label column as texts, "" where it is empty or missing. Raises UserError if no record has it."""
    column = settings.label[0]
    if not any(column in record.columns for record in records):
        get_column(records[0], column, "task.label")
    cells = [unwrap(record.columns.get(column)) for record in records]
    return ["" if is_empty(cell) else str(cell).strip() for cell in cells]


def have_label(records: list[Record], settings: InputSettings, known_labels: list[str]) -> list[bool]:
    """Return which records have a label: those whose cell is neither empty nor a mark for a missing label.

    `known_labels` are those of the training examples.
    """
    cells = read_cells(records, settings)
    marks = find_missing_marks({*cells, *known_labels}, settings)
    return [cell not in marks for cell in cells]


def have_number(records: list[Record], settings: InputSettings, known_labels: list[str]) -> list[bool]:
    """Return which records have a regression target."""
    return [cell not in {"", *(settings.no_label or [])} for cell in read_cells(records, settings)]


def find_missing_marks(labels: set[str], settings: InputSettings) -> set[str]:
    """Return the labels that mean that there is none: `no_label` or, without it, what data sets write by convention.

    That is -1 beside two or more labels that are words, not numbers, or that `label_names` has names for, as in
    exports of the datasets library; and - beside three or more labels, as in SNLI. So -1, 0 and 1 are three labels.
    """
    if settings.no_label is not None:
        return {"", *settings.no_label}
    others = labels - {"", "-1", "-"}
    words = len(others) >= 2 and all(any(map(str.isalpha, label)) for label in others)
    marks = {"-1"} if words or settings.label_names else set()
    if len(others) >= 3 and all(any(map(str.isalnum, label)) for label in others):
        marks.add("-")
    return {"", *marks} - set(settings.label_names or [])


def read_label(record: Record, settings: InputSettings) -> str:
    """Read the label of a record that has exactly one."""
    column = settings.label[0]
    cell = unwrap(get_column(record, column, "task.label"))
    if isinstance(cell, list | dict):
        advice = "; task.type: multilabel reads several" if isinstance(cell, list) else ""
        raise UserError(f"{record.location}: the label in column {column!r} is {cell!r}, not a single text{advice}")
    if is_empty(cell):
        raise UserError(f"{record.location}: the label in column {column!r} is empty: {cell!r}")
    return name_label(str(cell).strip(), record, settings)


def unwrap(cell: Any) -> Any:
    """Return the only item of a list that has one."""
    return cell[0] if isinstance(cell, list) and len(cell) == 1 else cell


def name_label(label: str, record: Record, settings: InputSettings) -> str:
    """Return the name of a label that is a name or, where `label_names` has no numbers, the number of one."""
    names = settings.label_names
    if names is None or label in names:
        return label
    if label.isdecimal() and int(label) < len(names) and not any(map(str.isdecimal, names)):
        return names[int(label)]
    raise UserError(f"{record.location}: the label {label!r} is neither one of task.label_names nor the number of one")


def read_number(record: Record, settings: InputSettings) -> float:
    """Read a regression target. Raises UserError for a cell that is not a finite fp32 number."""
    column = settings.label[0]
    cell = get_column(record, column, "task.label")
    try:
        number = float(cell)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= float(np.finfo(np.float32).max):
        advice = "; write decimals with a point" if re.fullmatch(r"\s*[-+]?\d+,\d+\s*", str(cell)) else ""
        raise UserError(f"{record.location}: the target in column {column!r} is {cell!r}, not a finite number{advice}")
    return number


def check_number(record: Record, settings: InputSettings) -> list[str]:
    """Return no label for a regression target. Raises UserError as `read_number` does."""
    read_number(record, settings)
    return []


def collect_classes(records: list[Record], settings: InputSettings) -> list[str]:
    """Return the names of a model's outputs, from the training records. Raises UserError if all have one label."""
    labels = sort_labels({read_label(record, settings) for record in records})
    if len(labels) < 2:
        raise UserError(f"task.train: all {len(records):,} examples have the label {labels[0]!r}; there should be two")
    if len(labels) > max(MAX_RARE, len(records) / 2):
        doubt = f"is {settings.label[0]!r} their column? Numbers to predict need task.type: regression"
        logger.warning(f"task.train: {len(labels):,} labels among {len(records):,} examples; {doubt}")
    if settings.no_label is None and {"-1", "0", "1"} <= set(labels):
        logger.info("task.train: -1 is a label like 0 and 1; if it means that there is none, set task.no_label: [-1]")
    return settings.label_names or labels


def choose_positive_label(records: list[Record], labels: list[str], settings: InputSettings) -> dict[str, Any]:
    """Return the setting `positive_label`: 1 of the labels 0 and 1, else the rarer of two among the training examples.

    Of more labels, and without training examples, it is null. Raises UserError if it is set and not one of two labels.
    """
    chosen = settings.positive_label
    if chosen is not None and (len(labels) != 2 or chosen not in labels):
        raise UserError(f"task.positive_label is {chosen!r}, which is not one of two labels; there are {labels}")
    if chosen is not None or len(labels) != 2:
        return {}
    if labels == ["0", "1"]:
        return {"positive_label": "1"}
    if not records:
        return {}
    counts = Counter(read_label(record, settings) for record in records)
    rarer = min(reversed(labels), key=lambda label: counts[label])
    logger.info(f"f1, precision and recall are those of {rarer!r}, the rarer label (task.positive_label)")
    return {"positive_label": rarer}


def sort_labels(labels: set[str]) -> list[str]:
    """Sort labels as numbers if all of them are, else alphabetically."""
    are_numbers = all(map(str.isdecimal, labels))
    return sorted(labels, key=lambda label: (int(label), label) if are_numbers else label)


def list_some(labels: list[str]) -> str:
    """Join the first labels for a message of one line."""
    return ", ".join(map(in_one_line, labels[:MAX_LISTED])) + (", …" if len(labels) > MAX_LISTED else "")


def list_counts(counts: Counter[str]) -> str:
    """Join labels and their counts for a message of one line, the most frequent first."""
    entries = [f"{in_one_line(label)} {count:,}" for label, count in counts.most_common(MAX_LISTED)]
    while len(entries) > 1 and len(", ".join(entries)) > MAX_CHARACTERS:
        entries.pop()
    rest = len(counts) - len(entries)
    return ", ".join(entries) + (f" and {rest:,} more" if rest else "")


def in_one_line(label: str) -> str:
    """Return a label without line ends and control characters, and cut if it is long."""
    text = " ".join(without_controls(label).split())
    return text if len(text) <= 30 else f"{text[:29]}…"


def find_label_indices(names: list[str], labels: list[str], record: Record) -> list[int]:
    """Return the index of each name among `labels`. Raises UserError for one that the training set does not have."""
    for name in names:
        if name not in labels:
            raise UserError(
                f"{record.location}: the label {name!r} is none of those of the training examples: {list_some(labels)}"
            )
    return [labels.index(name) for name in names]
