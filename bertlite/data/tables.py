"""Tables of labelled examples, as records of named columns."""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from bertlite.config.finetune_settings import InputSettings
from bertlite.config.settings import DataLocation
from bertlite.core.errors import UserError
from bertlite.data.conll import group_words, read_conll
from bertlite.data.formats import READERS, Record, TableFile, find_format, read_json
from bertlite.data.sources import read_dataset


def read_records(location: DataLocation, settings: InputSettings, setting: str) -> list[Record]:
    """Read a table or dataset; of the sample, the split that `setting` ends with.

    Raises UserError, naming file and line, for what cannot be read.
    """
    if location.dataset is not None:
        return list(read_dataset(location, setting, name_labels=True))
    path = find_table_file(location, setting)
    advice = "; see task.columns, task.delimiter and task.quoting"
    table = TableFile(
        path, format=location.given_format, field=location.field, encoding=settings.encoding, advice=advice
    )
    records = list(read_table(table, settings))
    if not records:
        raise UserError(f"{setting}: {path} holds no examples")
    return records


def read_table(table: TableFile, settings: InputSettings) -> Iterator[Record]:
    """Read the records of a table with the columns, delimiter and quoting of a task.

    READERS has the formats. Files of none of them hold columns with tabs between or, for token classification, a word
    and its tag per line. Raises UserError, naming file and line, for what cannot be read.
    """
    readers, default = READERS | {".json": read_json_or_squad, ".jsonl": read_json_or_squad}, READERS[".tsv"]
    if settings.type == "token-classification" and settings.sentence is None:
        default = partial(read_conll, word_column=settings.text[0], tag_column=settings.label[0])
        readers |= {".csv": default, ".tsv": default}
    table = replace(table, columns=settings.columns, delimiter=settings.delimiter, quoting=settings.quoting)
    records = readers.get(find_format(table.path, table.format), default)(table)
    return (
        group_words(records, settings.sentence, settings.text[0], settings.label[0]) if settings.sentence else records
    )


def find_table_file(location: DataLocation, setting: str) -> Path:
    """Return the file of a table. Raises UserError if there is none."""
    path = Path(str(location.path))
    if location.path == "sample":
        split = setting.split(".")[-1]
        path = Path(str(files("bertlite") / "sample" / f"subject_{'dev' if split == 'validation' else split}.tsv"))
    if not path.is_file():
        raise UserError(f"{setting}: {path}: there is no such file (paths are relative to the current directory)")
    return path


def get_column(record: Record, name: str, setting: str) -> Any:
    """Return the value of a column. Raises UserError, listing the columns, if there is no such column."""
    if name not in record.columns:
        columns = list(map(str, record.columns))
        names = ", ".join(repr(column if len(column) <= 40 else f"{column[:39]}…") for column in columns)
        advice = ""
        if any(column.replace(".", "", 1).isdecimal() or len(column.split()) > 4 for column in columns):
            advice = "; if these are an example and no header, name the columns in task.columns"
        elif len(columns) == 1 and re.search(r"[,;|\t]", columns[0]):
            advice = "; task.delimiter sets what separates columns"
        raise UserError(f"{record.location}: {setting}: there is no column {name!r}; there are {names}{advice}")
    return record.columns[name]


def read_json_or_squad(table: TableFile) -> Iterator[Record]:
    """Read JSON, and the questions of articles in SQuAD's format (Rajpurkar et al. 2016)."""
    for record in read_json(table):
        if "paragraphs" not in record.columns:
            yield record
            continue
        try:
            for paragraph in record.columns["paragraphs"]:
                for question in paragraph["qas"]:
                    answers = {key: [answer[key] for answer in question["answers"]] for key in ("text", "answer_start")}
                    columns = {"id": question["id"], "question": question["question"], "context": paragraph["context"]}
                    if "is_impossible" in question:  # as in SQuAD 2.0
                        columns["is_impossible"] = question["is_impossible"]
                    yield Record(f"{table.path}: question {question['id']}", {**columns, "answers": answers})
        except (KeyError, TypeError) as error:
            raise UserError(f"{record.location}: differs from SQuAD: {error} is missing or of another type") from None
