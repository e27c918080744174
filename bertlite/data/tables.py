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
from bertlite.core.logging import count, logger
from bertlite.data.conll import group_words, read_conll
from bertlite.data.formats import READERS, Record, TableFile, file_format, find_format, read_json
from bertlite.data.sources import find_source_files, read_dataset

DELIMITERS = {".tsv": "\t", ".csv": ","}


def read_records(location: DataLocation, settings: InputSettings, setting: str) -> list[Record]:
    """Read the records of tables, of folders of texts, or of a dataset.

    Of the sample it is the split that is the last part of `setting`, such as task.train.

    Raises UserError, naming file and line, for what cannot be read.
    """
    if location.dataset is not None:
        return [add_nested(record, settings) for record in read_dataset(location, setting, name_labels=True)]
    table = TableFile(
        Path(str(location.path)),
        format=location.given_format,
        field=location.field,
        encoding=settings.encoding,
        encoding_setting="task.encoding",
        advice="; see task.columns, task.delimiter and task.quoting",
        bad_rows=[] if settings.on_bad_example == "skip" else None,
    )
    paths = find_table_files(location, setting)
    if table.path.is_dir() and all(is_class_text(path, table.path) for path in paths):
        records = [read_class_text(replace(table, path=path), settings) for path in paths]
    else:
        records = [record for path in paths for record in read_table(replace(table, path=path), settings)]
    if table.bad_rows:
        logger.warning(
            f"{setting}: left out for their number of columns: {count(len(table.bad_rows), 'row')}: {table.bad_rows[0]}"
        )
    if not records:
        raise UserError((table.bad_rows or [f"{setting}: {location.path} holds no examples"])[0])
    return records


def read_table(table: TableFile, settings: InputSettings) -> Iterator[Record]:
    """Read the records of a table with the columns, delimiter and quoting of a task.

    READERS has the formats. Files of none of them hold columns with tabs between or, for token classification, a word
    and its tag per line. Raises UserError, naming file and line, for what cannot be read.
    """
    extension = find_format(table.path, table.format)
    if extension in DELIMITERS and table.path.is_file() and settings.columns is not None:
        settings = use_header(settings, next(table.lines(), ""), extension, table.path)
    readers, default = READERS | {".json": read_json_or_squad, ".jsonl": read_json_or_squad}, READERS[".tsv"]
    if settings.type == "token-classification" and settings.sentence is None:
        default = partial(read_conll, word_column=settings.text[0], tag_column=settings.label[0])
        readers |= {".csv": default, ".tsv": default}
    table = replace(table, columns=settings.columns, delimiter=settings.delimiter, quoting=settings.quoting)
    records = readers.get(extension, default)(table)
    if settings.sentence:
        return group_words(records, settings.sentence, settings.text[0], settings.label[0])
    return (add_nested(record, settings) for record in records)


def use_header(settings: InputSettings, first: str, extension: str, path: Path) -> InputSettings:
    """Return the settings without `columns` if the first line of a table names those of the texts.

    Some tasks, such as CoLA, have a header only in the test set.
    """
    if settings.columns is None or not names_texts(first, DELIMITERS[extension], settings):
        return settings
    logger.info(f"{path}: its first line names the columns, in place of task.columns")
    return settings.model_copy(update={"columns": None})


def names_texts(first: str, delimiter: str, settings: InputSettings) -> bool:
    """Return whether a line names the columns of the texts, among others."""
    fields = [name.strip('"') for name in first.split(settings.delimiter or delimiter)]
    return len(fields) > 1 and set(settings.text) <= set(fields)


def add_nested(record: Record, settings: InputSettings) -> Record:
    """Add the values that the task's columns name by keys of nested objects, and numbers of lists: `data.texts.0`."""
    nested = {}
    for name in {*settings.text, *settings.label, *settings.choices} - record.columns.keys():
        value: Any = record.columns
        for key in name.split("."):
            is_index = isinstance(value, list) and key.isdecimal() and int(key) < len(value)
            value = value[int(key)] if is_index else value.get(key) if isinstance(value, dict) else None
        if value is not None:
            nested[name] = value
    return Record(record.location, record.columns | nested) if nested else record


def find_table_files(location: DataLocation, setting: str) -> list[Path]:
    """Return the files of a table: one, the matches of a glob, those in a folder, or the sample's.

    Raises UserError if there is none.
    """
    if location.path != "sample":
        return find_source_files(location, setting)
    split = setting.split(".")[-1]
    return [Path(str(files("bertlite") / "sample" / f"subject_{'dev' if split == 'validation' else split}.tsv"))]


def is_class_text(path: Path, folder: Path) -> bool:
    """Return whether a file is a text in a folder with the name of its label, inside of `folder`."""
    return path.parent.parent == folder and file_format(path) not in READERS


def read_class_text(table: TableFile, settings: InputSettings) -> Record:
    """Read a file as one text, of which the folder's name is the label."""
    return Record(
        str(table.path), {settings.text[0]: "\n".join(table.lines()), settings.label[0]: table.path.parent.name}
    )


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
        elif setting.endswith("label"):
            advice = "; texts without labels are for bertlite predict"
        raise UserError(f"{record.location}: {setting}: there is no column {name!r}; there are {names}{advice}")
    return record.columns[name]


def read_json_or_squad(table: TableFile) -> Iterator[Record]:
    """Read JSON, and questions in the formats of SQuAD (Rajpurkar et al. 2016) and CMRC 2018 (Cui et al. 2019)."""
    for record in read_json(table):
        if {"context_text", "qas"} <= record.columns.keys():
            yield from read_cmrc(record, table.path)
            continue
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


def read_cmrc(record: Record, path: Path) -> Iterator[Record]:
    """Yield the questions of a text of CMRC 2018, whose answers begin where they first occur in the text."""
    try:
        context = record.columns["context_text"]
        for question in record.columns["qas"]:
            texts = list(dict.fromkeys(question["answers"]))
            location = f"{path}: question {question['query_id']}"
            if absent := [text for text in texts if text not in context]:
                raise UserError(f"{location}: the answer {absent[0][:40]!r} is not in its context_text")
            answers = {"text": texts, "answer_start": [context.index(text) for text in texts]}
            columns = {"id": question["query_id"], "question": question["query_text"], "context": context}
            yield Record(location, {**columns, "answers": answers})
    except (KeyError, TypeError) as error:
        raise UserError(f"{record.location}: differs from CMRC 2018: {error} is missing or of another type") from None
