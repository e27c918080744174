"""Tables of labelled examples in whatever form they lie, as rows of named columns."""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from bertlite.config.finetune_settings import TaskSettings
from bertlite.config.settings import DataLocation
from bertlite.core.errors import UserError
from bertlite.data.sources import (
    DAMAGED,
    DECOMPRESSORS,
    datasets_library,
    delimited_rows,
    file_format,
    guess_encoding,
    load_dataset,
    parquet_rows,
    parse_json,
    read_json_lines,
)


class Record(NamedTuple):
    """A row: where it stands, for people, and its columns."""

    location: str
    columns: dict[str, Any]


def read_records(place: DataLocation, settings: TaskSettings, setting: str) -> list[Record]:
    """All rows of a file or a dataset; `sample` is the sample's part that `setting` ends with.

    The file's ending says what it is: .parquet, .jsonl, .json (SQuAD's own, or a list of objects), .csv or .tsv; all
    else is lines of columns or, for token classification, a word a line with a blank line between sentences. Raises
    UserError, naming file and line, for what cannot be read.
    """
    if place.dataset is not None:
        return list(_dataset(place, setting))
    path = find_table_file(place, setting)
    kind = file_format(path)
    if kind == ".parquet":
        found: Iterator[tuple[str, Any]] = parquet_rows(path)
    else:
        text = _decoded(path, settings.encoding)
        lines = [line.removesuffix("\r") for line in text.split("\n")]
        if kind in (".jsonl", ".ndjson"):
            found = read_json_lines(lines, path)
        elif kind == ".json":
            found = _json_document(parse_json(text, str(path)), path)
        elif settings.type == "token-classification":
            found = _sentences(lines, path, settings)
        else:
            quoting = settings.quoting if settings.quoting is not None else kind == ".csv"
            delimiter = settings.delimiter or ("," if kind == ".csv" else "\t")
            advice = "; see task.columns, task.delimiter and task.quoting"
            found = delimited_rows(lines, path, delimiter, quoting, settings.columns, advice)
    rows = [Record(*one) for one in found]
    if not rows:
        raise UserError(f"{setting}: {path} holds no rows")
    for row in rows:
        if not isinstance(row.columns, dict):
            raise UserError(f'{row.location}: should hold an object with named columns, such as {{"text": …}}')
    return rows


def find_table_file(place: DataLocation, setting: str) -> Path:
    """The file that a place means. Raises UserError when there is none."""
    path = Path(str(place.path))
    if place.path == "sample":
        part = {"validation": "dev"}.get(setting.split(".")[-1], setting.split(".")[-1])
        path = Path(str(files("bertlite") / "sample" / f"subject_{part}.tsv"))
    if not path.is_file():
        raise UserError(f"{setting}: {path}: there is no such file (paths are relative to the current directory)")
    return path


def get_column(row: Record, name: str, setting: str) -> Any:
    """A row's value in a column. Raises UserError, listing the columns there are, when there is none."""
    if name not in row.columns:
        there = ", ".join(map(repr, row.columns))
        raise UserError(f"{row.location}: {setting}: there is no column {name!r}; there are {there}")
    return row.columns[name]


def _decoded(path: Path, encoding: str) -> str:
    try:
        with path.open("rb") as raw, DECOMPRESSORS.get(path.suffix.lower(), nullcontext)(raw) as file:
            content: bytes = file.read()
        return content.decode("utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding)
    except LookupError:
        raise UserError(f"task.encoding is {encoding!r}, which Python does not know; it is utf-8, latin-1, …") from None
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{number}: not {encoding} (byte 0x{content[error.start]:02x}); if it is text at all, set "
            f"task.encoding, perhaps to {guess_encoding(content)}"
        ) from None
    except DAMAGED as error:
        raise UserError(f"{path}: damaged or cut off: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _sentences(lines: list[str], path: Path, settings: TaskSettings) -> Iterator[tuple[str, Any]]:
    """CoNLL's form: a word a line, its tag in the last column or in that which `columns` calls the label."""
    words: list[str] = []
    tags: list[str] = []
    names = settings.columns or [settings.text[0], settings.label]
    word, tag = (names.index(name) if name in names else None for name in (settings.text[0], settings.label))
    if word is None or tag is None:
        raise UserError(f"task.columns should name {settings.text[0]!r} and {settings.label!r} (task.text, task.label)")
    first = 0
    for number, line in enumerate([*lines, ""], 1):
        line = line.strip("\r ")
        if not line.strip() or line.startswith("-DOCSTART-"):
            if words:
                yield f"{path}:{first}", {settings.text[0]: words, settings.label: tags}
            words, tags = [], []
            continue
        separator = re.escape(settings.delimiter) if settings.delimiter else "\t" if "\t" in line else " +"
        fields = re.split(separator, line)
        if len(fields) < 2 or (settings.columns and len(fields) != len(names)):
            raise UserError(f"{path}:{number}: {line!r} should be {' '.join(names)}")
        first = first if words else number
        words.append(fields[word])
        tags.append(fields[tag if settings.columns else -1])


def _json_document(content: Any, path: Path) -> Iterator[tuple[str, Any]]:
    """A list of objects, or SQuAD's articles, paragraphs and questions (Rajpurkar et al. 2016) as flat rows."""
    articles = content.get("data") if isinstance(content, dict) else content
    if not isinstance(articles, list):
        raise UserError(f"{path}: should be a list of objects, or have one under the key data, as SQuAD does")
    for number, article in enumerate(articles, 1):
        if not (isinstance(article, dict) and "paragraphs" in article):
            yield f"{path}: object {number}", article
            continue
        try:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    answers = {key: [answer[key] for answer in question["answers"]] for key in ("text", "answer_start")}
                    columns = {"id": question["id"], "question": question["question"], "context": paragraph["context"]}
                    yield f"{path}: question {question['id']}", {**columns, "answers": answers}
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path}: article {number} is not as SQuAD's: {error} is missing or of another kind"
            ) from None


def _dataset(place: DataLocation, setting: str) -> Iterator[Record]:
    """A dataset of the hub or on the disk; numbers that have names become their names."""
    with datasets_library(f"{setting}: {place.dataset}") as datasets:
        table = load_dataset(datasets, place)
        for number, columns in enumerate(table, 1):
            for key, feature in table.features.items():
                names = getattr(feature, "feature", feature)  # of a list, its members
                if hasattr(names, "int2str") and columns[key] not in (-1, None):
                    columns[key] = names.int2str(columns[key])
            yield Record(f"{place.dataset}, {place.split}: row {number}", columns)
