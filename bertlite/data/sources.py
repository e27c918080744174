"""Text in whatever form it lies: files, compressed or not, tables, and Hugging Face datasets, as documents."""

import bz2
import csv
import glob
import gzip
import io
import json
import logging
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.resources import files
from itertools import chain, groupby
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from bertlite.config.settings import DataLocation, Source
from bertlite.core.errors import UserError
from bertlite.core.files import disk_full_as_error, fingerprint, read_json, sha256, write_json
from bertlite.core.logging import logger


class _Zstandard(io.RawIOBase):
    """Decompresses a .zst file; zstandard's own reader takes a file that is cut off for one that ends."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.frame: Any = None
        self.ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            ended = self.frame is None or self.frame.eof
            packed = (self.frame.unused_data if self.frame and ended else b"") or self.file.read(1 << 17)
            if not packed and ended:
                return 0
            if not packed:
                raise EOFError("compressed file ended before the end of its frame")
            if ended:
                self.frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self.ready = self.frame.decompress(packed)
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size


DECOMPRESSORS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
    ".zst": lambda file: io.BufferedReader(_Zstandard(file), 1 << 20),
}
DAMAGED = (EOFError, lzma.LZMAError, zstandard.ZstdError, gzip.BadGzipFile, zlib.error)
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
csv.field_size_limit(1 << 30)


def find_source_files(source: Source, setting: str) -> list[Path]:
    """The files that a source's path means, in their order: a file, a glob, all files of a folder, or `sample`.

    Raises UserError for a name that matches nothing, and for an empty file.
    """
    if source.path is None:
        return []
    if source.path == "sample":
        return [Path(str(files("bertlite") / "sample" / "pretrain.txt"))]
    found: list[Path] = []
    name = source.path
    for match in sorted([name] if os.path.lexists(name) else glob.glob(name, recursive=True)):
        inside = glob.glob(f"{glob.escape(match)}/**", recursive=True) if os.path.isdir(match) else [match]
        found += sorted(path for path in map(Path, inside) if not path.is_dir())  # glob leaves out hidden ones
    if not found:
        what = "no file matches" if glob.has_magic(name) else "there is no such file"
        if os.path.isdir(name):
            what = "there is no file in it"
        raise UserError(f"{setting}: {source.path}: {what} (paths are relative to the current directory)")
    for path in found:
        if not path.exists():
            raise UserError(f"{setting}: {path}: a link to nowhere")
        if path.is_file() and path.stat().st_size == 0:  # a pipe may hold something
            raise UserError(f"{setting}: {path} is empty")
    return list(dict.fromkeys(found))  # ** matches a folder and its files


def digest_source(source: Source, setting: str, cache: Path) -> list[Any]:
    """What stands for a source's text: the same digest, the same text."""
    paths = find_source_files(source, setting)
    about = [source.column, *([file_format(path), digest_file(path, cache)] for path in paths)]
    if source.dataset is None:
        return about
    folder = Path(source.dataset)
    inside = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return [*about, source.dataset, source.name, source.split, source.revision,
            *(digest_file(path, cache) for path in inside)]  # fmt: skip


def digest_file(path: Path, cache: Path) -> str:
    """The content's SHA-256, read again only when the file's size or time has changed since the last time."""
    status = path.stat()
    if not path.is_file():
        raise UserError(f"{path}: not a file, and it is read more than once; write the text into a file")
    record = cache / "digests" / f"{fingerprint(str(path.resolve()))}.json"
    now = {"path": str(path.resolve()), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    known = read_json(record)
    if known is None or {**known, **now} != known:
        try:
            now["sha256"] = sha256(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
        if known is not None and known["sha256"] != now["sha256"]:
            logger.info(f"{path} has changed since it was last prepared")
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, now)
        known = now
    return str(known["sha256"])


def read_documents(
    source: Source, document: str, setting: str, report: Callable[[int], object] = lambda count: None
) -> Iterator[str]:
    """The documents of a source, one after the other; `report` is told of bytes of its files that are done.

    `document` says what a document is in a text file: "blank-line" (it ends at a blank line, or with its file) or
    "line"; of a table or dataset each row is one. A byte order mark is dropped. Raises UserError for what cannot be
    read, is damaged, or is not UTF-8, with the file and, where it can be known, the line.
    """
    for path in find_source_files(source, setting):
        if file_format(path) in TABLES:
            yield from _column(_read_table(path, report), source.column)
        else:
            yield from _read_text(path, document, report)
    if source.dataset is not None:
        yield from _read_dataset(source, setting)


def read_file_texts(path: Path, column: str) -> Iterator[str]:
    """Each line of a text file, or `column` of each row of a table, also when it is empty.

    Raises UserError as `read_documents` does.
    """
    yield from _column(_read_table(path), column) if file_format(path) in TABLES else read_lines(path)


def file_format(path: Path) -> str:
    """The ending that says what a file holds: without that of its compression."""
    packed = path.suffix.lower() in DECOMPRESSORS
    return (Path(path.stem).suffix if packed else path.suffix).lower()


def _read_text(path: Path, document: str, report: Callable[[int], object]) -> Iterator[str]:
    lines = read_lines(path, report)
    if document == "line":
        yield from filter(str.strip, lines)
    else:
        yield from ("\n".join(part) for full, part in groupby(lines, lambda line: bool(line.strip())) if full)


def read_lines(path: Path, report: Callable[[int], object] = lambda count: None) -> Iterator[str]:
    """The lines of a text file, compressed or not; `report` and errors as for `read_documents`."""
    number = done = 0
    try:
        with path.open("rb") as raw, DECOMPRESSORS.get(path.suffix.lower(), nullcontext)(raw) as file:
            for number, line in enumerate(file, 1):
                yield decode_line(line, number, str(path))
                if number % 100 == 0 and raw.seekable():  # a pipe is not
                    report(raw.tell() - done)
                    done = raw.tell()
        report(path.stat().st_size - done)
    except DAMAGED as error:
        raise UserError(f"{path}: damaged or cut off after line {number}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def decode_line(line: bytes, number: int, where: str) -> str:
    """Line `number`, counted from 1, of a text, without its end. Raises UserError, naming `where`, for what is no text.

    A first line with many zero bytes is a binary file's, or UTF-16's; a few do no harm.
    """
    encoding = guess_encoding(line) if number == 1 else "latin-1"
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        if encoding != "utf-16":
            return text.rstrip("\r\n")
        byte = 0
    except UnicodeDecodeError as error:
        byte = line[error.start]
    advice = f"if it is text at all, convert it, for example: iconv -f {encoding} -t utf-8"
    whole = line.decode("utf-8", "ignore")
    if encoding != "utf-16" and not whole.isascii() and 4 * (len(line) - len(whole.encode())) <= len(line):
        advice = "if it is UTF-8 but for a few bytes, leave them out: iconv -c -f utf-8 -t utf-8"
    raise UserError(f"{where}:{number}: not UTF-8 text (byte 0x{byte:02x}); {advice}")


def guess_encoding(text: bytes) -> str:
    """What a text may be in, by its beginning and by whether it is UTF-8."""
    if text.startswith((b"\xff\xfe", b"\xfe\xff")) or 4 * text.count(0) > len(text):
        return "utf-16"
    try:
        text.decode()
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"


def _read_table(path: Path, report: Callable[[int], object] = lambda count: None) -> Iterator[tuple[str, Any]]:
    """The rows of a table, each with where it stands."""
    kind = file_format(path)
    if kind == ".parquet":
        yield from parquet_rows(path)
        report(path.stat().st_size)
        return
    lines = read_lines(path, report)
    first = next(lines, "")
    lines = chain([first], lines)
    if kind == ".json" and first.lstrip().startswith("["):
        for number, row in enumerate(parse_json("\n".join(lines), str(path)), 1):
            yield f"{path}: object {number}", row
    elif kind in (".csv", ".tsv"):
        yield from delimited_rows(lines, path, "," if kind == ".csv" else "\t", kind == ".csv")
    else:
        yield from read_json_lines(lines, path)


def read_json_lines(lines: Iterable[str], path: Path) -> Iterator[tuple[str, Any]]:
    """The values of JSON lines, each with where it stands; blank lines are none."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{path}:{number}", parse_json(line, f"{path}:{number}")


def parse_json(text: str, where: str) -> Any:
    """A JSON text's value; half a character, such as a cut emoji, is replaced. Raises UserError, naming `where`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    if "\\ud" not in text.lower():
        return value
    whole = json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return json.loads(whole)


def delimited_rows(
    lines: Iterable[str], path: Path, delimiter: str, quoting: bool, names: list[str] | None = None, advice: str = ""
) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of columns, each with where it begins; without `names` the first row is the columns'.

    With `quoting`, a field in quotes may hold delimiters and new lines; without it, the last of `names` takes what is
    left of its line. Raises UserError, with `advice`, for a row of more or fewer columns.
    """
    splits = len(names) - 1 if names else -1
    split = ((number, line.split(delimiter, splits)) for number, line in enumerate(lines, 1) if line.strip(" "))
    records = _quoted(lines, path, delimiter) if quoting else split
    if names is None:
        names = next(records, (0, []))[1]
        if len(set(names)) < len(names):
            raise UserError(f"{path}: a column's name stands there twice: {', '.join(names)}{advice}")
    for number, fields in records:
        if len(fields) != len(names) and not any(map(str.strip, fields)):
            continue  # a line with nothing on it
        if len(fields) != len(names):
            raise UserError(
                f"{path}:{number}: {len(fields)} columns, but {len(names)} are named ({', '.join(names)}){advice}"
            )
        yield f"{path}:{number}", dict(zip(names, fields, strict=True))


def _quoted(lines: Iterable[str], path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Records of fields, some in quotes, with the line where each begins."""
    reader = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True)
    number = 1
    try:
        for fields in reader:
            if fields:
                yield number, fields
            number = reader.line_num + 1
    except csv.Error as error:
        advice = "each quote that opens a field is closed, and a quote inside of one is written twice"
        raise UserError(f"{path}:{number}: the row that begins here is not valid: {error}; {advice}") from None


def parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a Parquet file, each with where it stands. Raises UserError for what is none."""
    import pyarrow.parquet  # only data that need it import it

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(1000) for row in batch.to_pylist())
            yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a readable Parquet file: {reason}") from None


def _read_dataset(source: Source, setting: str) -> Iterator[str]:
    name = f"{setting}: {source.dataset}"
    with datasets_library(name) as datasets:
        batches = load_dataset(datasets, source, source.streaming).iter(batch_size=1000)
        rows = (dict(zip(batch, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True))
        yield from _column(((f"{name}: row {number}", row) for number, row in enumerate(rows, 1)), source.column)


@contextmanager
def datasets_library(name: str) -> Iterator[Any]:
    """The datasets library, quiet, to read `name`: what its readers raise becomes a UserError of one line."""
    try:
        import datasets  # only data that need it import it
    except ImportError:
        raise UserError(f"{name}: the datasets library reads it, and is not installed: pip install datasets") from None
    import pyarrow

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs as an error comes back as an exception
    theirs = (datasets.exceptions.DatasetsError, pyarrow.ArrowException)
    try:
        with disk_full_as_error(Path(datasets.config.HF_DATASETS_CACHE)):
            yield datasets
    except (*theirs, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: cannot be read as a dataset: {reason}") from None


def load_dataset(datasets: Any, place: DataLocation, streaming: bool = False) -> Any:
    """The dataset that a place means: one that was saved to a folder, alone or with others, or one of the hub."""
    folder = Path(str(place.dataset))
    if (folder / "dataset_dict.json").exists():
        parts = datasets.load_from_disk(str(folder))
        if place.split not in parts:
            raise UserError(f"{place.dataset}: there is no split {place.split!r}; there are {', '.join(parts)}")
        return parts[place.split]
    if (folder / "state.json").exists():
        return datasets.load_from_disk(str(folder))
    return datasets.load_dataset(
        place.dataset, place.name, split=place.split, revision=place.revision, streaming=streaming
    )


def _column(rows: Iterator[tuple[str, Any]], column: str) -> Iterator[str]:
    """One column's texts; a row that lacks it is empty, unless it is the first."""
    for number, (where, row) in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f'{where}: should hold an object with named columns, such as {{"{column}": …}}')
        if number == 0 and column not in row:
            raise UserError(
                f"{where}: there is no column {column!r}; there are {', '.join(row)} (set column, or --column)"
            )
        text = row.get(column)
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where}: the column {column!r} holds {type(text).__name__}, not text")
        yield text or ""
