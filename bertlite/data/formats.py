"""Read files of lines or of records, compressed or not. A new format is one function and one entry in READERS."""

import csv
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from bertlite.core.errors import UserError, first_line
from bertlite.core.packages import require
from bertlite.core.trust import MAX_CELL_CHARACTERS, MAX_JSON_BYTES, MAX_LINE_BYTES
from bertlite.data.compression import DAMAGED, DECOMPRESSORS, open_file
from bertlite.data.encodings import SAMPLE_BYTES, decode_line, decode_lines, is_utf8, warn_of_other_encoding

csv.field_size_limit(MAX_CELL_CHARACTERS)

FASTTEXT_LABEL = re.compile(r"(?<!\S)__label__(\S+)\s*")
MAX_RECORD_LINES = 1_000_000  # of a record with quotes; one that is longer has a quote that never closes
PARQUET_ROWS = 32  # decoded together; a few bytes of a file may stand for a long text

Report = Callable[[int], object]  # called with the number of bytes read since the last call


class Record(NamedTuple):
    """A record of a table: its location, for messages, and its columns."""

    location: str
    columns: dict[str, Any]


def is_empty(cell: Any) -> bool:
    """Return whether a cell of a record holds nothing: null, NaN, blanks or an empty list."""
    return cell in (None, []) or (isinstance(cell, float) and math.isnan(cell)) or str(cell).strip() == ""


@dataclass(frozen=True)
class TableFile:
    """A file of records, and how to read it; the defaults are those of pretraining."""

    path: Path
    report: Report | None = None
    format: str | None = None  # None: as `find_format` finds it
    encoding: str = "utf-8"
    encoding_setting: str = ""  # for messages: the setting that names the encoding
    columns: list[str] | None = None  # names of the columns, for a file without a header or JSON lists of values
    field: str | None = None  # keys, separated by dots, that lead to the list of records in a JSON file
    delimiter: str | None = None  # None: the format's own
    quoting: bool | None = None  # None: the format's own
    advice: str = ""  # for messages: settings that concern columns
    bad_rows: list[str] | None = None  # what is wrong with rows that are left out; None: such a row is an error

    def lines(self) -> Iterator[str]:
        """Read the lines of the file, without their ends."""
        return read_lines(self.path, self.report, self.encoding, self.encoding_setting)


# How the content of a format begins that is recognized under any file name.
BEGINNINGS = {
    ".parquet": re.compile(b"PAR1"),
    ".jsonl": re.compile(rb'(\xef\xbb\xbf)?\s*(\[\s*)?\{\s*"([^"\\]|\\.)*"\s*:'),  # objects, one a line or in a list
    ".fasttext": re.compile(rb"(\xef\xbb\xbf)?__label__\S"),
}


def file_format(path: Path) -> str:
    """Return the extension in lower case, without that of a compression: .jsonl for `a.jsonl.gz`."""
    compressed = path.suffix.lower() in DECOMPRESSORS
    return (Path(path.stem).suffix if compressed else path.suffix).lower()


def find_format(path: Path, given: str | None) -> str:
    """Return the format of a file: as given, or its extension if READERS has it, or as its content begins.

    Files of other extensions and contents hold lines. What is not a regular file, such as a pipe, is not opened: it can
    be read only once.
    """
    extension = file_format(path)
    if given is not None or extension in READERS or not path.is_file():
        return f".{given}" if given else extension
    with open_file(path) as (_, content):
        start = content.peek(1 << 13)
    return next((form for form, beginning in BEGINNINGS.items() if beginning.match(start)), extension)


def read_lines(
    path: Path, report: Report | None = None, encoding: str = "utf-8", encoding_setting: str = ""
) -> Iterator[str]:
    """Read the lines of a file, without their ends, in bounded memory.

    Raises UserError for a file that cannot be read and, naming the line, for one that is damaged or in another
    encoding; `encoding_setting` is what to advise for that. Warns of a text that looks like another encoding.
    """
    with open_file(path) as (raw, content):
        pieces = _report_pieces(split_lines(content, str(path)), path, raw, report)
        if is_utf8(encoding):
            yield from (decode_line(line, n, str(path), encoding_setting) for n, line in enumerate(pieces, 1))
        else:
            warn_of_other_encoding(content.peek(SAMPLE_BYTES), encoding, str(path))
            yield from decode_lines(pieces, encoding, str(path))


def _report_pieces(lines: Iterator[bytes], path: Path, raw: BinaryIO, report: Report | None) -> Iterator[bytes]:
    """Yield the lines of a file, and report the bytes that were read; a pipe does not know them."""
    number = reported = 0
    try:
        for number, line in enumerate(lines, 1):
            yield line
            if report and number % 100 == 0 and raw.seekable():
                report(raw.tell() - reported)
                reported = raw.tell()
    except DAMAGED as error:
        raise UserError(f"{path}: damaged or truncated after line {number}: {error}") from None
    if report and raw.seekable():
        report(raw.tell() - reported)


def split_lines(content: Any, location: str) -> Iterator[bytes]:
    """Split a stream of bytes into lines, with their ends. Raises UserError for one above MAX_LINE_BYTES."""
    for number in count(1):
        line = content.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        if len(line) > MAX_LINE_BYTES:
            raise UserError(
                f"{location}:{number}: longer than {MAX_LINE_BYTES:,} bytes, so not a line of text; "
                "divide it into lines, or check that the file holds text"
            )
        yield line


def read_json(table: TableFile) -> Iterator[Record]:
    """Read JSON lines, or JSON over any number of lines: records one after the other, or a list of them.

    The list may be within objects: under the keys `table.field` or, as in SQuAD, under `data`. Raises UserError for
    invalid JSON, and for an object of which it is unknown where the records are.
    """
    lines, head, num_filled = table.lines(), [], 0
    for line in lines:
        head.append(line)
        num_filled += bool(line.strip())
        if num_filled == 2:
            break
    first = next((line.strip() for line in head if line.strip()), "")
    one_object = first.startswith("{") and file_format(table.path) in (".jsonl", ".ndjson")
    if (num_filled == 2 or one_object) and table.field is None and not _continues(first):
        for number, line in enumerate(chain(head, lines), 1):
            location = f"{table.path}:{number}"
            if line.strip():
                yield json_record(location, parse_json(line, location), table.columns)
        return
    values = parse_json(_join(chain(head, lines), table.path), str(table.path), _load_json_values)
    for number, value in enumerate(_find_records(values, table), 1):
        yield json_record(f"{table.path}: object {number}", value, table.columns)


def _join(lines: Iterator[str], path: Path) -> str:
    """Join the lines of a JSON value. Raises UserError if they are too many to be read at once."""
    text, size = [], 0
    for line in lines:
        text.append(line)
        size += len(line) + 1
        if size > MAX_JSON_BYTES:
            raise UserError(
                f"{path}: JSON over several lines is read at once, up to {MAX_JSON_BYTES:,} characters; "
                "write one object a line (.jsonl)"
            )
    return "\n".join(text)


def _continues(line: str) -> bool:
    """Return whether a JSON value that begins in a line ends in a later one."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line)
    except (ValueError, RecursionError):  # parse_json explains them
        pass
    return False


def _load_json_values(text: str) -> list[Any]:
    """Parse JSON values that follow each other, with white space between."""
    decoder, not_blank, position, values = json.JSONDecoder(), re.compile(r"\S"), 0, []
    while start := not_blank.search(text, position):
        value, position = decoder.raw_decode(text, start.start())
        values.append(value)
    return values


def _find_records(values: list[Any], table: TableFile) -> list[Any]:
    """Return the records among the values of a JSON file: the values themselves, or a list in the only one."""
    if len(values) != 1:
        return values
    (value,) = values
    has_data = isinstance(value, dict) and isinstance(value.get("data"), list)
    for key in table.field.split(".") if table.field else ["data"] if has_data else []:
        if not isinstance(value, dict) or key not in value:
            keys = ", ".join(value) if isinstance(value, dict) else f"no keys in a {type(value).__name__}"
            raise UserError(f"{table.path}: field is {table.field!r}, but there is no {key!r}; there are {keys}")
        value = value[key]
    if isinstance(value, list):
        return value
    holds_lists = isinstance(value, dict) and any(isinstance(inner, list | dict) for inner in value.values())
    if value and isinstance(value, dict) and not (holds_lists and file_format(table.path) == ".json"):
        return [value]
    keys = f" (its keys are {', '.join(value)})" if value and isinstance(value, dict) else ""
    raise UserError(
        f"{table.path}: should be a list of objects; name the list in it{keys}: --field KEY on the command line, "
        f"{{path: …, field: KEY}} in YAML"
    )


def json_record(location: str, value: Any, columns: list[str] | None = None) -> Record:
    """Make a record of a JSON object, or of a list of values for `columns`. Raises UserError for anything else."""
    if isinstance(value, list) and columns:
        if len(value) != len(columns):
            raise UserError(f"{location}: {len(value)} values, but task.columns names {len(columns)}")
        value = dict(zip(columns, value, strict=True))
    if not isinstance(value, dict):
        advice = "; task.columns names the values of a list" if isinstance(value, list) else ""
        raise UserError(f'{location}: not a JSON object, such as {{"text": …}}{advice}')
    return Record(location, value)


def parse_json(text: str, location: str, load: Callable[[str], Any] = json.loads) -> Any:
    """Parse JSON, and replace half surrogate pairs, such as those of truncated emoji. Raises UserError if invalid."""
    try:
        value = load(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: not valid JSON: {error}") from None
    if "\\ud" not in text.lower():
        return value
    valid = json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return json.loads(valid)


def read_delimited(table: TableFile, delimiter: str, quoting: bool) -> Iterator[Record]:
    """Read records of columns, named by `table.columns` or else by the first record; blank ones are skipped.

    With `quoting`, a value in double quotes may hold delimiters and line breaks. Both arguments are defaults for those
    of the table; a first line `sep=;`, which Excel understands, names the delimiter. Raises UserError for more or fewer
    columns than names.
    """
    lines = enumerate(table.lines(), 1)
    first = next(lines, (1, ""))
    named_by_file = re.fullmatch(r'"?sep=(.)"?', first[1])
    delimiter = table.delimiter or (named_by_file[1] if named_by_file else delimiter)
    quoting = quoting if table.quoting is None else table.quoting
    others = [sign for sign in ";|\t" if sign in first[1] and delimiter not in first[1] and not table.delimiter]
    guess = f", but {others[0]!r} seems to be: let the file begin with a line sep={others[0]}" if others else ""
    table = replace(table, advice=f"; the delimiter is {delimiter!r}{guess}{table.advice}")
    split = _split_quoted if quoting else _split_unquoted
    rows = split(lines if named_by_file else chain([first], lines), table, delimiter)
    names = table.columns
    if names is None:
        names = next(rows, (0, []))[1]
        if len(set(names)) < len(names):
            raise UserError(f"{table.path}: duplicate column among {', '.join(names)}{table.advice}")
    for line, values in rows:
        if len(values) == len(names):
            yield Record(f"{table.path}:{line}", dict(zip(names, values, strict=True)))
        elif any(map(str.strip, values)):
            expected = f"{len(values)} columns, but {len(names)} are named ({', '.join(names)})"
            if table.bad_rows is None:
                raise UserError(f"{table.path}:{line}: {expected}{table.advice}")
            table.bad_rows.append(f"{table.path}:{line}: {expected}{table.advice}")


def _split_unquoted(
    lines: Iterator[tuple[int, str]], table: TableFile, delimiter: str
) -> Iterator[tuple[int, list[str]]]:
    """Split numbered lines; the last one of `table.columns` takes the rest of its line, blanks or commas included.

    Texts do not hold tabs: a row with too many of them has columns that are not named.
    """
    splits = len(table.columns) - 1 if table.columns and delimiter != "\t" else -1
    return ((number, line.split(delimiter, splits)) for number, line in lines if line.strip(" "))


def _split_quoted(
    lines: Iterator[tuple[int, str]], table: TableFile, delimiter: str
) -> Iterator[tuple[int, list[str]]]:
    """Split records with quoted values, from numbered lines; the number of a record is that of its first line."""
    start = 0  # of the record, 0 between two of them

    def follow_lines() -> Iterator[str]:
        nonlocal start
        for number, line in lines:
            start = start or number
            if number - start > MAX_RECORD_LINES:
                raise csv.Error(f"more than {MAX_RECORD_LINES:,} lines")
            yield f"{line}\n"

    try:
        for values in csv.reader(follow_lines(), delimiter=delimiter, strict=True):
            if values:
                yield start, values
            start = 0
    except csv.Error as error:
        advice = f"close each quote, and double those inside of a value{table.advice}"
        raise UserError(f"{table.path}:{start}: the record that starts here is not valid: {error}; {advice}") from None


def read_fasttext(table: TableFile) -> Iterator[Record]:
    """Read lines of words and labels, `__label__a __label__b text`, as fastText does.

    The columns are label, a list, and text.
    """
    for number, line in enumerate(table.lines(), 1):
        if line.strip():
            columns = {"label": FASTTEXT_LABEL.findall(line), "text": FASTTEXT_LABEL.sub("", line).strip()}
            yield Record(f"{table.path}:{number}", columns)


def read_parquet(table: TableFile) -> Iterator[Record]:
    """Read a Parquet file. Raises UserError if it is not one."""
    require(f"{table.path}: Parquet", "pyarrow", "pyarrow")
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(table.path) as file:
            rows = (row for batch in file.iter_batches(PARQUET_ROWS) for row in batch.to_pylist())
            yield from (Record(f"{table.path}: row {number}", row) for number, row in enumerate(rows, 1))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{table.path}: not a readable Parquet file: {first_line(error)}") from None
    if table.report:
        table.report(table.path.stat().st_size)


# By extension; files with other extensions hold lines. Quotes have no meaning in .tsv, as in GLUE.
READERS: dict[str, Callable[[TableFile], Iterator[Record]]] = {
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".csv": partial(read_delimited, delimiter=",", quoting=True),
    ".tsv": partial(read_delimited, delimiter="\t", quoting=False),
    ".parquet": read_parquet,
    ".fasttext": read_fasttext,
}
