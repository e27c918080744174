"""Read files of lines or of records, compressed or not. A new format is one function and one entry in READERS."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from bertlite.core.errors import UserError
from bertlite.core.packages import require

csv.field_size_limit(1 << 30)

Report = Callable[[int], object]  # called with the number of bytes read since the last call


class Record(NamedTuple):
    """A record of a table: its location, for messages, and its columns."""

    location: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class TableFile:
    """A file of records, and how to read it; the defaults are those of pretraining."""

    path: Path
    report: Report | None = None
    encoding: str | None = None  # None: UTF-8, decoded line by line
    columns: list[str] | None = None  # names of the columns, for a file without a header
    delimiter: str | None = None  # None: the format's own
    quoting: bool | None = None  # None: the format's own
    advice: str = ""  # for messages: settings that concern columns

    def lines(self) -> Iterator[str]:
        """Read the lines of the file, without their ends."""
        if self.encoding is None:
            return read_lines(self.path, self.report)
        return (line.removesuffix("\r") for line in _read_text(self.path, self.encoding).split("\n"))


class _ZstandardFile(io.RawIOBase):
    """Decompress a .zst file; zstandard's own reader does not notice that a file is truncated."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self.zstandard = zstandard
        self.file = file
        self.frame: Any = None
        self.ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            ended = self.frame is None or self.frame.eof
            compressed = (self.frame.unused_data if self.frame and ended else b"") or self.file.read(1 << 17)
            if not compressed and ended:
                return 0
            if not compressed:
                raise EOFError("compressed file ended before the end of its frame")
            if ended:
                self.frame = self.zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                self.ready = self.frame.decompress(compressed)
            except self.zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size


DECOMPRESSORS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
    ".zst": lambda file: io.BufferedReader(_ZstandardFile(file), 1 << 20),
}


# What decompressors raise for a file that is damaged or truncated.
DAMAGED = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error)


def file_format(path: Path) -> str:
    """Return the extension in lower case, without that of a compression: .jsonl for `a.jsonl.gz`."""
    compressed = path.suffix.lower() in DECOMPRESSORS
    return (Path(path.stem).suffix if compressed else path.suffix).lower()


@contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, Any]]:
    """Open a file, and yield it compressed and decompressed. Raises UserError if it cannot be read or is damaged."""
    try:
        with path.open("rb") as raw, DECOMPRESSORS.get(path.suffix.lower(), nullcontext)(raw) as content:
            yield raw, content
    except DAMAGED as error:
        raise UserError(f"{path}: damaged or truncated: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_lines(path: Path, report: Report | None = None) -> Iterator[str]:
    """Read the lines of a UTF-8 file, without their ends.

    Raises UserError for a file that cannot be read and, naming the line, for one that is damaged or not UTF-8.
    """
    number = reported = 0
    with _open(path) as (raw, content):
        try:
            for number, line in enumerate(content, 1):
                yield decode_line(line, number, str(path))
                if report and number % 100 == 0 and raw.seekable():  # a pipe is not
                    report(raw.tell() - reported)
                    reported = raw.tell()
        except DAMAGED as error:
            raise UserError(f"{path}: damaged or truncated after line {number}: {error}") from None
        if report:
            report(path.stat().st_size - reported)


def decode_line(line: bytes, number: int, location: str) -> str:
    """Decode line `number` of a UTF-8 text, counted from 1, without its end or a byte order mark.

    Raises UserError for other bytes, and for a first line with so many zero bytes that it is UTF-16 or binary.
    """
    encoding = guess_encoding(line) if number == 1 else "latin-1"
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        if encoding != "utf-16":
            return text.rstrip("\r\n")
        bad_byte = 0
    except UnicodeDecodeError as error:
        bad_byte = line[error.start]
    readable = line.decode("utf-8", "ignore")
    mostly_utf8 = not readable.isascii() and 4 * (len(line) - len(readable.encode())) <= len(line)
    advice = f"if it is text at all, convert it, for example: iconv -f {encoding} -t utf-8"
    if encoding != "utf-16" and mostly_utf8:
        advice = "if only a few bytes are wrong, remove them: iconv -c -f utf-8 -t utf-8"
    raise UserError(f"{location}:{number}: not UTF-8 text (byte 0x{bad_byte:02x}); {advice}")


def guess_encoding(text: bytes) -> str:
    """Guess an encoding: utf-16, utf-8 or latin-1."""
    if text.startswith((b"\xff\xfe", b"\xfe\xff")) or 4 * text.count(0) > len(text):
        return "utf-16"
    try:
        text.decode()
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"


def _read_text(path: Path, encoding: str) -> str:
    """Read a file in the encoding of a task. Raises UserError as `read_lines` does."""
    with _open(path) as (_, file):
        content: bytes = file.read()
    try:
        return content.decode("utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding)
    except LookupError:
        raise UserError(f"task.encoding is {encoding!r}, which Python does not know; it is utf-8, latin-1, …") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: not {encoding} (byte 0x{content[error.start]:02x}); if it is text at all, set "
            f"task.encoding, perhaps to {guess_encoding(content)}"
        ) from None


def read_json_lines(table: TableFile) -> Iterator[Record]:
    """Read one JSON object from each line that is not blank."""
    return _parse_json_lines(table.lines(), table.path)


def read_json(table: TableFile) -> Iterator[Record]:
    """Read a JSON list of objects, or JSON lines."""
    lines = table.lines()
    first = next(lines, "")
    lines = chain([first], lines)
    if not first.lstrip().startswith("["):
        yield from _parse_json_lines(lines, table.path)
        return
    for number, value in enumerate(parse_json("\n".join(lines), str(table.path)), 1):
        yield json_record(f"{table.path}: object {number}", value)


def _parse_json_lines(lines: Iterator[str], path: Path) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield json_record(f"{path}:{number}", parse_json(line, f"{path}:{number}"))


def json_record(location: str, value: Any) -> Record:
    """Make a record of a JSON value. Raises UserError if it is not an object."""
    if not isinstance(value, dict):
        raise UserError(f'{location}: not a JSON object, such as {{"text": …}}')
    return Record(location, value)


def parse_json(text: str, location: str) -> Any:
    """Parse JSON, and replace half surrogate pairs, such as those of truncated emoji. Raises UserError if invalid."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: not valid JSON: {error}") from None
    if "\\ud" not in text.lower():
        return value
    valid = json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return json.loads(valid)


def read_delimited(table: TableFile, delimiter: str, quoting: bool) -> Iterator[Record]:
    """Read records of columns, named by `table.columns` or else by the first record; blank ones are skipped.

    With `quoting`, a value in double quotes may hold delimiters and line breaks. Both arguments are defaults for those
    of the table. Raises UserError for more or fewer columns than names.
    """
    delimiter = table.delimiter or delimiter
    quoting = quoting if table.quoting is None else table.quoting
    rows = _split_quoted(table, delimiter) if quoting else _split_unquoted(table, delimiter)
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
            raise UserError(f"{table.path}:{line}: {expected}{table.advice}")


def _split_unquoted(table: TableFile, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Split lines, numbered from 1; the last one of `table.columns` takes the rest of its line."""
    splits = len(table.columns) - 1 if table.columns else -1
    return ((n, line.split(delimiter, splits)) for n, line in enumerate(table.lines(), 1) if line.strip(" "))


def _split_quoted(table: TableFile, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Split records with quoted values; the number of a record is that of its first line."""
    reader = csv.reader((f"{line}\n" for line in table.lines()), delimiter=delimiter, strict=True)
    start = 1
    try:
        for values in reader:
            if values:
                yield start, values
            start = reader.line_num + 1
    except csv.Error as error:
        advice = "close each quote that opens a value, and double each quote inside of one"
        raise UserError(f"{table.path}:{start}: the record that starts here is not valid: {error}; {advice}") from None


def read_parquet(table: TableFile) -> Iterator[Record]:
    """Read a Parquet file. Raises UserError if it is not one."""
    require(f"{table.path}: Parquet", "pyarrow", "pyarrow")
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(table.path) as file:
            rows = (row for batch in file.iter_batches(1000) for row in batch.to_pylist())
            yield from (Record(f"{table.path}: row {number}", row) for number, row in enumerate(rows, 1))
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{table.path}: not a readable Parquet file: {reason}") from None
    if table.report:
        table.report(table.path.stat().st_size)


# By extension; files with other extensions hold lines. Quotes have no meaning in .tsv, as in GLUE.
READERS: dict[str, Callable[[TableFile], Iterator[Record]]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": partial(read_delimited, delimiter=",", quoting=True),
    ".tsv": partial(read_delimited, delimiter="\t", quoting=False),
    ".parquet": read_parquet,
}
