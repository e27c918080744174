"""Read the texts and labels of records: what the cells of a labelled table mean."""

import math

import numpy as np

from bertlite.config.finetune_settings import InputSettings
from bertlite.core.errors import UserError
from bertlite.data.formats import Record
from bertlite.data.tables import get_column

MAX_LISTED = 10  # labels that a message lists


def read_input_texts(records: list[Record], settings: InputSettings) -> list[tuple[str, ...]]:
    """Read the text or the two texts of each record. Raises UserError for a cell that is empty or holds no text."""
    texts = []
    for record in records:
        cells = tuple(get_column(record, name, "task.text") for name in settings.text)
        for name, cell in zip(settings.text, cells, strict=True):
            if not isinstance(cell, str) or not cell.strip():
                problem = "is empty" if cell is None or isinstance(cell, str) else "holds no text"
                raise UserError(f"{record.location}: the column {name!r} {problem}: {cell!r}")
        texts.append(cells)
    return texts


def read_label(record: Record, settings: InputSettings) -> str:
    """Read the label of a record that has exactly one."""
    cell = get_column(record, settings.label, "task.label")
    if isinstance(cell, list | dict):
        raise UserError(f"{record.location}: the label in column {settings.label!r} is {cell!r}, not a single text")
    if cell is None or (isinstance(cell, float) and math.isnan(cell)) or str(cell).strip() == "":
        raise UserError(f"{record.location}: the label in column {settings.label!r} is empty: {cell!r}")
    return str(cell).strip()


def read_label_list(record: Record, settings: InputSettings) -> list[str]:
    """Read the labels of a record: a list, or a text split at `label_separator`. There may be none."""
    cell = get_column(record, settings.label, "task.label")
    labels = cell if isinstance(cell, list) else str("" if cell is None else cell).split(settings.label_separator)
    return [str(label).strip() for label in labels if str(label).strip()]


def read_number(record: Record, settings: InputSettings) -> float:
    """Read a regression target. Raises UserError for a cell that is not a finite fp32 number."""
    cell = get_column(record, settings.label, "task.label")
    try:
        number = float(cell)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise UserError(f"{record.location}: the target in column {settings.label!r} is {cell!r}, not a finite number")
    return number


# The names of a model's outputs, from the training records.
def collect_classes(records: list[Record], settings: InputSettings) -> list[str]:
    labels = sort_labels({read_label(record, settings) for record in records})
    if len(labels) < 2:
        raise UserError(f"task.train: all {len(records):,} examples have the label {labels[0]!r}; there should be two")
    return labels


def collect_labels(records: list[Record], settings: InputSettings) -> list[str]:
    labels = sort_labels({label for record in records for label in read_label_list(record, settings)})
    if not labels:
        raise UserError(f"task.train: no example has a label in column {settings.label!r}")
    return labels


def sort_labels(labels: set[str]) -> list[str]:
    """Sort labels as numbers if all of them are, else alphabetically."""
    return sorted(labels, key=int if all(label.isdecimal() for label in labels) else None)


def list_some(labels: list[str]) -> str:
    """Join the first labels for a message."""
    return ", ".join(labels[:MAX_LISTED]) + (", …" if len(labels) > MAX_LISTED else "")


def find_label_indices(names: list[str], labels: list[str], record: Record) -> list[int]:
    """Return the index of each name among `labels`. Raises UserError for one that the training set does not have."""
    for name in names:
        if name not in labels:
            raise UserError(
                f"{record.location}: the label {name!r} does not occur in task.train, which has {list_some(labels)}"
            )
    return [labels.index(name) for name in names]
