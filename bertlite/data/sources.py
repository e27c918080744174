"""Sources of text: which files or dataset a source means, a digest of its content, and its documents."""

import glob
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

from bertlite.config.settings import DataLocation, Source
from bertlite.core.errors import UserError, first_line
from bertlite.core.files import disk_full_as_error, fingerprint, read_json, sha256, write_json
from bertlite.core.logging import logger
from bertlite.core.packages import require
from bertlite.data.encodings import is_utf8
from bertlite.data.formats import READERS, Record, Report, TableFile, file_format, find_format

LARGE_FILE = 1 << 30  # bytes, which take some seconds to read


def find_source_files(source: DataLocation, setting: str) -> list[Path]:
    """List the files of a source: one file, the matches of a glob, the files in a folder, or the sample.

    Raises UserError for a path that matches nothing, and for an empty file.
    """
    if source.path is None:
        return []
    if source.path == "sample":
        return [Path(str(files("bertlite") / "sample" / "pretrain.txt"))]
    name = source.path
    paths: list[Path] = []
    for match in sorted([name] if os.path.lexists(name) else glob.glob(name, recursive=True)):
        inside = glob.glob(f"{glob.escape(match)}/**", recursive=True) if os.path.isdir(match) else [match]
        paths += sorted(path for path in map(Path, inside) if not path.is_dir())  # glob leaves out hidden files
    if not paths:
        reason = "no file matches" if glob.has_magic(name) else "there is no such file"
        if os.path.isdir(name):
            reason = "there is no file in it"
        raise UserError(f"{setting}: {name}: {reason} (paths are relative to the current directory)")
    for path in paths:
        if not path.exists():
            raise UserError(f"{setting}: {path}: a broken link")
        if path.is_file() and path.stat().st_size == 0:  # a pipe may hold something
            raise UserError(f"{setting}: {path} is empty")
    return list(dict.fromkeys(paths))  # ** matches a folder and its files


def digest_source(source: Source, setting: str, cache: Path) -> list[Any]:
    """Return a value that changes whenever the text of a source changes."""
    digest: list[Any] = [source.column or "text", *filter(None, [source.field])]
    if not is_utf8(source.encoding):
        digest.append({"encoding": source.encoding})
    for path in find_source_files(source, setting):
        digest.append([find_format(path, source.given_format), digest_file(path, cache)])
    if source.dataset is None:
        return digest
    folder = Path(source.dataset)
    local = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    digest += [source.dataset, source.name, source.split, source.revision]
    return digest + [digest_file(path, cache) for path in local]


def forget_digests(sources: Iterable[Source], setting: str, cache: Path) -> None:
    """Remove the stored digests of the files of sources, so that their content is read again."""
    for path in (path for source in sources for path in find_source_files(source, setting)):
        _digest_record(path, cache).unlink(missing_ok=True)


def _digest_record(path: Path, cache: Path) -> Path:
    return cache / "digests" / f"{fingerprint(str(path.resolve()))}.json"


def digest_file(path: Path, cache: Path) -> str:
    """Return the SHA-256 of a file; compute it again only if its size, inode or times have changed.

    No program can set the change time of an inode, as rsync and cp -p set the modification time.
    """
    status = path.stat()
    if not path.is_file():
        raise UserError(f"{path}: not a regular file, so it cannot be read twice; write the text into a file")
    record = _digest_record(path, cache)
    state = {"path": str(path.resolve()), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    state |= {"ctime_ns": status.st_ctime_ns, "inode": status.st_ino}
    known = read_json(record)
    if known is None or {**known, **state} != known:
        if status.st_size > LARGE_FILE:
            logger.info(f"{path}: reading {status.st_size / 1e9:,.1f} GB, to notice later whether they have changed")
        try:
            state["sha256"] = sha256(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
        if known is not None and known["sha256"] != state["sha256"]:
            logger.info(f"{path} has changed since it was last prepared")
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, state)
        known = state
    return str(known["sha256"])


def read_documents(source: Source, document: str, setting: str, report: Report | None = None) -> Iterator[str]:
    """Read the documents of a source.

    `document` is a key of SPLITTERS, for files of lines; each record of a table or dataset is a document. Raises
    UserError, naming file and line where possible, for what cannot be read, is damaged, or is not UTF-8.
    """
    encoding_setting = "{path: …, encoding: …}" if setting.startswith("data.") else ""
    for path in find_source_files(source, setting):
        table = TableFile(path, report, source.given_format, source.encoding, encoding_setting, field=source.field)
        yield from read_file_texts(table, source.column, SPLITTERS[document])
    if source.dataset is not None:
        yield from _select_column(read_dataset(source, setting, source.streaming), source.column or "text")


def read_file_texts(
    table: TableFile, column: str | None, split: Callable[[Iterator[str]], Iterator[str]] = iter
) -> Iterator[str]:
    """Read each line of a text file, or what `split` makes of the lines, or a column of each record of a table.

    A pipe holds JSON lines if a column is given. Raises UserError as `read_documents` does, for a column of a file that
    has none, and for records in a file of another name, if neither its column nor its format is given.
    """
    path, format = table.path, find_format(table.path, table.format)
    if column is not None and not path.is_file() and format not in READERS:
        format = ".jsonl"
    if format not in READERS:
        if column is not None:
            advice = "leave column out, or name another format: {path: …, format: jsonl, column: …}"
            raise UserError(f"{path}: read as lines of text, which have no column {column!r}; {advice}")
        return split(table.lines())
    if column is None and table.format is None and format in (".jsonl", ".fasttext") and format != file_format(path):
        form = "JSON" if format == ".jsonl" else "labels and texts as of fastText"
        advice = "name its column (column: text, --column text), or read its lines as they are: {path: …, format: text}"
        raise UserError(f"{path}: holds {form}, not lines of text; {advice}")
    return _select_column(READERS[format](table), column or "text")


MAX_DOCUMENT_CHARACTERS = 1 << 27  # of a file without blank lines


def split_at_blank_lines(lines: Iterator[str]) -> Iterator[str]:
    """Join lines to documents, which end at blank lines, and after MAX_DOCUMENT_CHARACTERS."""
    document: list[str] = []
    size = 0
    for line in chain(lines, [""]):
        is_blank = not line.strip()
        if document and (is_blank or size > MAX_DOCUMENT_CHARACTERS):
            yield "\n".join(document)
            document, size = [], 0
        if not is_blank:
            document.append(line)
            size += len(line)


# From the lines of a file to its documents; a document never continues in another file.
SPLITTERS: dict[str, Callable[[Iterator[str]], Iterator[str]]] = {
    "blank-line": split_at_blank_lines,
    "line": lambda lines: filter(str.strip, lines),
}


def _select_column(records: Iterator[Record], column: str) -> Iterator[str]:
    """Yield the texts of a column, which the first record must have; where it is missing or null, an empty text."""
    for number, (location, columns) in enumerate(records):
        if number == 0 and column not in columns:
            raise UserError(
                f"{location}: there is no column {column!r}; there are {', '.join(columns)} (set column, or --column)"
            )
        text = columns.get(column)
        if text is not None and not isinstance(text, str):
            raise UserError(f"{location}: the column {column!r} holds {type(text).__name__}, not text")
        yield text or ""


def read_dataset(
    location: DataLocation, setting: str, streaming: bool = False, name_labels: bool = False
) -> Iterator[Record]:
    """Read a dataset of the Hugging Face hub or of a folder; `name_labels` replaces class labels by their names.

    Raises UserError for what the datasets library cannot read.
    """
    name = f"{setting}: {location.dataset}"
    with _datasets_library(name) as datasets:
        dataset = _load_dataset(datasets, location, streaming)
        features = dataset.features if name_labels else {}
        types = {column: getattr(feature, "feature", feature) for column, feature in features.items()}  # of list items
        label_names = {column: type.int2str for column, type in types.items() if hasattr(type, "int2str")}
        batches = dataset.iter(batch_size=1000)
        rows = (dict(zip(batch, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True))
        for number, columns in enumerate(rows, 1):
            for column, to_name in label_names.items():
                missing = columns[column] in (-1, None)  # -1 is the library's convention for a missing label
                columns[column] = None if missing else to_name(columns[column])
            yield Record(f"{name}, {location.split}: row {number}", columns)


@contextmanager
def _datasets_library(name: str) -> Iterator[Any]:
    """Yield the datasets library, without its output; its exceptions become a UserError of one line with `name`."""
    require(name, "datasets", "datasets", "pyarrow")
    import datasets
    import pyarrow

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it raises what it logs as an error
    raised = (datasets.exceptions.DatasetsError, pyarrow.ArrowException)
    try:
        with disk_full_as_error(Path(datasets.config.HF_DATASETS_CACHE)):
            yield datasets
    except (*raised, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise UserError(f"{name}: cannot be read as a dataset: {first_line(error)}") from None


def _load_dataset(datasets: Any, location: DataLocation, streaming: bool) -> Any:
    """Load a dataset that was saved to a folder, alone or in a DatasetDict, or one of the hub."""
    folder = Path(str(location.dataset))
    if (folder / "dataset_dict.json").exists():
        splits = datasets.load_from_disk(str(folder))
        if location.split not in splits:
            raise UserError(f"{location.dataset}: there is no split {location.split!r}; there are {', '.join(splits)}")
        return splits[location.split]
    if (folder / "state.json").exists():
        return datasets.load_from_disk(str(folder))
    return datasets.load_dataset(
        location.dataset, location.name, split=location.split, revision=location.revision, streaming=streaming
    )
