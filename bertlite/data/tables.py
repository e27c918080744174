"""Tables of labelled examples, as records of named columns."""

import json
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
    has_classes = settings.type in ("classification", "multilabel", "regression")
    if has_classes and table.path.is_dir() and all(is_class_text(path, table.path) for path in paths):
        records = [read_class_text(replace(table, path=path), settings) for path in paths]
    else:
        records = [record for path in paths for record in read_table(replace(table, path=path), settings)]
    if table.bad_rows:
        logger.warning(
            f"{setting}: left out for their number of columns: {count(len(table.bad_rows), 'row')}: {table.bad_rows[0]}"
        )
    records = leave_out_rejected(records, settings, setting)
    if not records:
        raise UserError((table.bad_rows or [f"{setting}: {location.path} holds no examples"])[0])
    return records


def leave_out_rejected(records: list[Record], settings: InputSettings, setting: str) -> list[Record]:
    """Leave out, and count, what an annotator rejected or ignored in Prodigy, unless that answer is the label."""
    if "answer" in settings.label:
        return records
    accepted = [
        record
        for record in records
        if not ("_task_hash" in record.columns and record.columns.get("answer") in ("reject", "ignore"))
    ]
    if len(accepted) < len(records):
        left_out = count(len(records) - len(accepted), "record")
        logger.info(f"{setting}: left out {left_out} of which Prodigy's answer is reject or ignore")
    return accepted


def read_table(table: TableFile, settings: InputSettings) -> Iterator[Record]:
    """Read the records of a table with the columns, delimiter and quoting of a task.

    READERS has the formats. Files of none of them hold columns with tabs between or, for token classification, a word
    and its tag per line. Raises UserError, naming file and line, for what cannot be read.
    """
    readers, default = READERS | {".json": read_json_or_squad, ".jsonl": read_json_or_squad}, READERS[".tsv"]
    extension = find_format(table.path, table.format)
    is_conll = settings.type == "token-classification" and settings.sentence is None
    is_delimited = not is_conll and (extension in DELIMITERS or extension not in readers)
    if is_delimited and settings.columns is not None and table.path.is_file():  # a pipe can be read only once
        settings = use_header(settings, next(table.lines(), ""), extension, table.path)
    if is_conll:
        default = partial(read_conll, word_column=settings.text[0], tag_column=settings.label[0])
        readers |= {".csv": default, ".tsv": default}
    table = replace(table, columns=settings.columns, delimiter=settings.delimiter, quoting=settings.quoting)
    records = readers.get(extension, default)(table)
    if extension == ".parquet" and (names := read_class_names(table.path)):
        records = (name_classes(record, names) for record in records)
    if settings.sentence:
        return group_words(records, settings.sentence, settings.text[0], settings.label[0])
    return (add_nested(record, settings) for record in records)


def read_class_names(path: Path) -> dict[str, list[str]]:
    """Return the names of classes that the datasets library writes into Parquet files, by the column."""
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        types = {column: feature.get("feature", feature) for column, feature in features.items()}  # of list items
        names = {column: list(kind["names"]) for column, kind in types.items() if kind.get("_type") == "ClassLabel"}
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}  # another program wrote the file, or the reader of its rows says what is wrong
    return names


def name_classes(record: Record, names: dict[str, list[str]]) -> Record:
    """Return a record with the names of classes in place of their numbers; -1 is the mark of a missing label."""

    def find_name(cell: Any, column: str) -> Any:
        if isinstance(cell, list):
            return [find_name(item, column) for item in cell]
        is_number = isinstance(cell, int) and 0 <= cell < len(names[column])
        return str(names[column][cell]) if is_number else None if cell == -1 else cell

    named = {column: find_name(record.columns[column], column) for column in names.keys() & record.columns.keys()}
    return Record(record.location, record.columns | named)


def use_header(settings: InputSettings, first: str, extension: str, path: Path) -> InputSettings:
    """Return the settings without `columns` if the first line of a table names those of the texts.

    Some tasks, such as CoLA, have a header only in the test set.
    """
    if settings.columns is None or not names_texts(first, DELIMITERS.get(extension, "\t"), settings):
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


def read_json_or_squad(table: TableFile) -> Iterator[Record]:
    """Read JSON, and the questions in SQuAD's format (Rajpurkar et al. 2016) or in that of CMRC 2018 (Cui et al. 2019).

    The latter has a context in each object, and answers without positions: they stand where they first occur.
    """
    for record in read_json(table):
        columns = record.columns
        if {"article", "questions", "options", "answers"} <= columns.keys():
            yield from read_race(record)
            continue
        if "paragraphs" not in columns and not ("qas" in columns and "context_text" in columns):
            yield record
            continue
        try:
            for paragraph in columns.get("paragraphs", [columns]):
                context = paragraph["context_text" if "context_text" in paragraph else "context"]
                for question in paragraph["qas"]:
                    fields = read_question(question, context)
                    yield Record(f"{table.path}: question {fields['id']}", fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{record.location}: differs from SQuAD: {error} is missing or of another type") from None


def read_race(record: Record) -> Iterator[Record]:
    """Yield the questions of an article of RACE (Lai et al. 2017), with the columns that the hub's version has."""
    article, identifier = record.columns["article"], record.columns.get("id", record.location)
    lists = [record.columns[name] for name in ("questions", "options", "answers")]
    if not all(isinstance(values, list) and len(values) == len(lists[0]) for values in lists):
        raise UserError(f"{record.location}: questions, options and answers should be lists of one length, as in RACE")
    for number, (question, options, answer) in enumerate(zip(*lists, strict=True), 1):
        columns = {"example_id": identifier, "article": article, "question": question}
        yield Record(f"{record.location}, question {number}", columns | {"options": options, "answer": answer})


def read_question(question: dict[str, Any], context: str) -> dict[str, Any]:
    """Return the columns of a question of SQuAD or CMRC 2018; those of test sets have no answers."""
    prefix = "query_" if "query_text" in question else ""
    columns = {"id": question[f"{prefix}id"], "question": question["query_text" if prefix else "question"]}
    columns["context"] = context
    if "answers" in question:
        answers = [
            {"text": answer, "answer_start": context.find(answer)} if isinstance(answer, str) else answer
            for answer in question["answers"]
        ]
        columns["answers"] = {key: [answer[key] for answer in answers] for key in ("text", "answer_start")}
    if "is_impossible" in question:  # as in SQuAD 2.0
        columns["is_impossible"] = question["is_impossible"]
    return columns
