"""Text in whatever form it lies: files, compressed or not, tables, and Hugging Face datasets, as documents."""

import bz2
import glob
import gzip
import io
import json
import logging
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from bertlite.config import Place, Source
from bertlite.errors import UserError
from bertlite.files import fingerprint, sha256, write_json
from bertlite.runtime import say


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
                self.frame = zstandard.ZstdDecompressor().decompressobj()
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
# Tables, by the datasets library's name of their reader, and its options.
TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".ndjson": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
}


def source_files(source: Source, setting: str) -> list[Path]:
    """The files that a source's path means, in their order: a file, a glob, all files of a folder, or `sample`.

    Raises UserError for a name that matches nothing, and for an empty file.
    """
    if source.path is None:
        return []
    if source.path == "sample":
        return [Path(str(files("bertlite") / "sample" / "pretrain.txt"))]
    found: list[Path] = []
    for match in sorted(Path(name) for name in glob.glob(os.path.expanduser(source.path), recursive=True)):
        if match.is_dir():
            inside = (path for path in sorted(match.rglob("*")) if path.is_file())
            found += [
                path for path in inside if not any(part.startswith(".") for part in path.relative_to(match).parts)
            ]
        else:
            found.append(match)
    if not found:
        what = "no file matches" if glob.has_magic(source.path) else "there is no such file"
        if Path(source.path).is_dir():
            what = "there is no file in it"
        raise UserError(f"{setting}: {source.path}: {what} (paths are relative to the current directory)")
    for path in found:
        if not path.exists():
            raise UserError(f"{setting}: {path}: a link to nowhere")
        if path.stat().st_size == 0:
            raise UserError(f"{setting}: {path} is empty")
    return list(dict.fromkeys(found))  # ** matches a folder and its files


def source_digest(source: Source, setting: str, cache: Path) -> list[Any]:
    """What stands for a source's text: the same digest, the same text."""
    paths = source_files(source, setting)
    about = [source.column, *([kind_of(path), file_digest(path, cache)] for path in paths)]
    if source.dataset is None:
        return about
    folder = Path(source.dataset)
    inside = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return [*about, source.dataset, source.name, source.split, source.revision,
            *(file_digest(path, cache) for path in inside)]  # fmt: skip


def file_digest(path: Path, cache: Path) -> str:
    """The content's SHA-256, read again only when the file's size or time has changed since the last time."""
    status = path.stat()
    record = cache / "digests" / f"{fingerprint(str(path.resolve()))}.json"
    now = {"path": str(path.resolve()), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    known = json.loads(record.read_text()) if record.exists() else None
    if known is None or {**known, **now} != known:
        try:
            now["sha256"] = sha256(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
        if known is not None and known["sha256"] != now["sha256"]:
            say(f"{path} has changed since it was last prepared")
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
    for path in source_files(source, setting):
        kind = kind_of(path)
        if kind in TABLES:
            yield from _read_table(path, kind, source.column)
            report(path.stat().st_size)
        else:
            yield from _read_text(path, document, report)
    if source.dataset is not None:
        yield from _read_dataset(source, setting)


def read_rows(path: Path, column: str) -> Iterator[str]:
    """Each line of a text file, or `column` of each row of a table, also when it is empty; raises as above."""
    kind = kind_of(path)
    yield from _read_table(path, kind, column) if kind in TABLES else read_lines(path)


def kind_of(path: Path) -> str:
    """The ending that says what a file holds: without that of its compression."""
    return Path(path.stem).suffix if path.suffix in DECOMPRESSORS else path.suffix


def _read_text(path: Path, document: str, report: Callable[[int], object]) -> Iterator[str]:
    lines: list[str] = []
    for line in read_lines(path, report):
        if line.strip():
            lines.append(line)
            if document == "blank-line":
                continue
        if lines:
            yield "\n".join(lines)
            lines = []
    if lines:
        yield "\n".join(lines)


def read_lines(path: Path, report: Callable[[int], object] = lambda count: None) -> Iterator[str]:
    """The lines of a text file, compressed or not; `report` and errors as for `read_documents`."""
    number = done = 0
    try:
        with path.open("rb") as raw, DECOMPRESSORS.get(path.suffix, nullcontext)(raw) as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if number % 100 == 0 and raw.seekable():  # a pipe is not
                    report(raw.tell() - done)
                    done = raw.tell()
        report(path.stat().st_size - done)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{path}:{number}: not UTF-8 (byte 0x{byte:02x}); convert it, for example: iconv -f latin1 -t utf-8"
        ) from None
    except DAMAGED as error:
        raise UserError(f"{path}: damaged or cut off after line {number}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read_table(path: Path, kind: str, column: str) -> Iterator[str]:
    builder, options = TABLES[kind]
    with datasets_library(str(path), lambda: _broken_line(path) if builder == "json" else None) as datasets:
        table = datasets.load_dataset(builder, data_files=[str(path)], split="train", streaming=True, **options)
        yield from _column(table, column, str(path))


def _read_dataset(source: Source, setting: str) -> Iterator[str]:
    name = f"{setting}: {source.dataset}"
    with datasets_library(name) as datasets:
        yield from _column(load_dataset(datasets, source, source.streaming), source.column, name)


@contextmanager
def datasets_library(name: str, explain: Callable[[], str | None] = lambda: None) -> Iterator[Any]:
    """The datasets library, quiet, to read `name`: whatever its readers raise becomes a UserError of one line, the one
    that `explain` finds if it finds any. Only data that need it import it.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name}: the datasets library reads it, and is not installed: pip install datasets") from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs as an error comes back as an exception
    try:
        yield datasets
    except UserError:
        raise
    except Exception as error:  # the library raises whatever its readers do
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(explain() or f"{name}: cannot be read as a dataset: {reason}") from None


def load_dataset(datasets: Any, place: Place, streaming: bool = False) -> Any:
    """The dataset that a place means: one that was saved to a folder, alone or with others, or one of the hub."""
    folder = Path(str(place.dataset))
    if (folder / "dataset_dict.json").exists():
        return datasets.load_from_disk(str(folder))[place.split]
    if (folder / "state.json").exists():
        return datasets.load_from_disk(str(folder))
    return datasets.load_dataset(
        place.dataset, place.name, split=place.split, revision=place.revision, streaming=streaming
    )


def _column(table: Any, column: str, name: str) -> Iterator[str]:
    for rows in table.iter(batch_size=1000):
        if column not in rows:
            raise UserError(
                f"{name}: there is no column {column!r}; there are {', '.join(rows)} (set column, or --column)"
            )
        for text in rows[column]:
            if text is not None and not isinstance(text, str):
                raise UserError(f"{name}: the column {column!r} holds {type(text).__name__}, not text")
            yield text or ""


def _broken_line(path: Path) -> str | None:
    """Where a JSON lines file breaks, found by reading it line by line; None when each line is valid."""
    for number, line in enumerate(read_lines(path), 1):
        try:
            if line.strip():
                json.loads(line)
        except ValueError as error:
            return f"{path}:{number}: not valid JSON: {error}"
    return None
