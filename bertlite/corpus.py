"""Text files to token ids on disk: made once, memory-mapped, and used again while nothing has changed."""

import bz2
import fcntl
import glob
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zstandard
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from bertlite.config import DataSettings
from bertlite.errors import UserError
from bertlite.files import fingerprint, full_disk_named, sha256, write_json
from bertlite.runtime import say

CORPUS_VERSION = 1  # raise it when the same text would give other files
BATCH_CHARACTERS = 1 << 20  # tokenised at a time, which bounds the memory that a corpus takes
BATCHES_PER_SYNC = 16  # after so many, what is on the disk is certain and an interruption goes on from there
OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
    ".zst": lambda path: io.BufferedReader(zstandard.open(path, "rb"), 1 << 20),
}


@dataclass
class Summary:
    """What a corpus holds, counted while it was made."""

    documents: int = 0
    empty_documents: int = 0
    tokens: int = 0
    unknown_tokens: int = 0
    characters: int = 0

    def text(self) -> str:
        unknown = self.unknown_tokens / max(1, self.tokens)
        return f"{self.documents:,} documents, {self.tokens:,} tokens, {unknown:.2%} unknown"


class Corpus:
    """Documents as token ids, without [CLS] and [SEP], in the order of the text.

    `tokens` (all tokens,) holds one document after the other; document i is `tokens[starts[i]:starts[i + 1]]`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        about = json.loads((folder / "corpus.json").read_text())
        self.summary = Summary(**about["summary"])
        self.tokens: NDArray = np.memmap(folder / "tokens.bin", dtype=about["dtype"], mode="r")
        self.starts: NDArray[np.int64] = np.memmap(folder / "document_starts.bin", dtype="<i8", mode="r")

    def __len__(self) -> int:
        return len(self.starts) - 1

    def document(self, index: int) -> NDArray:
        return self.tokens[self.starts[index] : self.starts[index + 1]]


def cache_folder(setting: str | None) -> Path:
    """Where corpora and tokenizers are kept: the setting, $BERTLITE_CACHE, or ~/.cache/bertlite."""
    return Path(setting or os.environ.get("BERTLITE_CACHE") or "~/.cache/bertlite").expanduser()


def find_files(patterns: list[str], setting: str) -> list[Path]:
    """The files that names and globs mean, in their order; `sample` is the text that ships with bertlite.

    Raises UserError for a name or glob that matches nothing, and for an empty file.
    """
    found: list[Path] = []
    for pattern in patterns:
        if pattern == "sample":
            found.append(Path(str(files("bertlite") / "sample" / "pretrain.txt")))
            continue
        matches = sorted(Path(match) for match in glob.glob(os.path.expanduser(pattern), recursive=True))
        if not matches:
            what = "no file matches" if glob.has_magic(pattern) else "there is no such file"
            raise UserError(f"{setting}: {pattern}: {what} (paths are relative to the current directory)")
        for match in matches:
            if match.is_dir():
                raise UserError(f"{setting}: {match} is a folder; name its files, for example {match}/*.txt")
            if match.stat().st_size == 0:
                raise UserError(f"{setting}: {match} is empty")
        found += matches
    return found


def read_documents(paths: Iterable[Path], document: str) -> Iterator[str]:
    """The documents of text files, plain or compressed, one after the other.

    `document` is "blank-line" (a document ends at a blank line or the end of its file) or "line". A byte order mark is
    dropped. Raises UserError for a file that cannot be read, is damaged, or is not UTF-8, with the line.
    """
    for path in paths:
        lines: list[str] = []
        for line in _read_lines(path):
            if line.strip():
                lines.append(line)
                if document == "blank-line":
                    continue
            if lines:
                yield "\n".join(lines)
                lines = []
        if lines:
            yield "\n".join(lines)


def file_digests(paths: Iterable[Path], cache: Path) -> list[str]:
    """The contents' SHA-256, read again only when a file's size or time has changed since the last time."""
    digests = []
    for path in paths:
        status = path.stat()
        record = cache / "digests" / f"{fingerprint(str(path.resolve()))}.json"
        now = {"path": str(path.resolve()), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
        known = json.loads(record.read_text()) if record.exists() else None
        if known is None or {**known, **now} != known:
            now["sha256"] = sha256(path)
            if known is not None and known["sha256"] != now["sha256"]:
                say(f"corpus: {path} has changed since it was last prepared")
            record.parent.mkdir(parents=True, exist_ok=True)
            write_json(record, now)
            known = now
        digests.append(str(known["sha256"]))
    return digests


def prepare_corpus(paths: list[Path], tokenizer: PreTrainedTokenizerBase, data: DataSettings, name: str) -> Corpus:
    """The corpus of these files: from the cache, finished from where it was interrupted, or made now.

    `name` is the setting that the files come from. Raises UserError when the files hold no text.
    """
    cache = cache_folder(data.cache_dir)
    backend = tokenizer.backend_tokenizer
    key = fingerprint([CORPUS_VERSION, file_digests(paths, cache), data.document, backend.to_str()])
    folder = cache / "corpora" / key
    with locked(cache / "corpora", key):
        if not (folder / "corpus.json").exists():
            _tokenize(paths, backend, tokenizer.unk_token_id, data.document, folder, name)
    corpus = Corpus(folder)
    say(f"{name}: {corpus.summary.text()} ({folder})")
    return corpus


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Only one process at a time is inside; the operating system frees the lock when that process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _tokenize(paths: list[Path], tokenizer: Tokenizer, unknown_id: int, document: str, folder: Path, name: str) -> None:
    """Append documents to the corpus's files; `progress.json` says how much of them is certain.

    After an interruption, what lies beyond is cut off and work goes on from there: the same bytes in the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    progress = folder / "progress.json"
    summary = Summary(**json.loads(progress.read_text())) if progress.exists() else Summary()
    dtype = np.dtype("<u2" if tokenizer.get_vocab_size() <= 1 << 16 else "<u4")
    with ExitStack() as stack:
        stack.enter_context(full_disk_named(folder))
        tokens = stack.enter_context(_open_at(folder / "tokens.bin", summary.tokens * dtype.itemsize))
        starts = stack.enter_context(_open_at(folder / "document_starts.bin", (summary.documents + 1) * 8))
        bar = stack.enter_context(tqdm(desc=f"tokenizing {name}", unit="char", unit_scale=True, disable=None))
        bar.update(summary.characters)
        done = summary.documents + summary.empty_documents
        for number, batch in enumerate(_batches(read_documents(paths, document), skip=done), 1):
            encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            for text, encoding in zip(batch, encodings, strict=True):
                ids = np.array(encoding.ids, dtype=dtype)
                summary.characters += len(text)
                summary.documents += len(ids) > 0
                summary.empty_documents += len(ids) == 0
                summary.tokens += len(ids)
                summary.unknown_tokens += int((ids == unknown_id).sum())
                if len(ids):
                    tokens.write(ids.tobytes())
                    starts.write(np.array(summary.tokens, "<i8").tobytes())
            bar.update(sum(map(len, batch)))
            if number % BATCHES_PER_SYNC == 0:
                _sync_files(tokens, starts)
                write_json(progress, asdict(summary))
        if not summary.tokens:
            raise UserError(f"{name}: {', '.join(map(str, paths))}: there is no text in it, only blank lines")
        _sync_files(tokens, starts)
        write_json(folder / "corpus.json", {"dtype": dtype.str, "summary": asdict(summary)})
        progress.unlink(missing_ok=True)


def _batches(documents: Iterator[str], skip: int) -> Iterator[list[str]]:
    """Lists of documents of about BATCH_CHARACTERS together, after the first `skip` documents."""
    batch: list[str] = []
    characters = 0
    for number, text in enumerate(documents):
        if number < skip:
            continue
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _open_at(path: Path, size: int) -> BinaryIO:
    """Open for appending after the first `size` bytes (zeros where the file is new), and drop the rest."""
    file = path.open("r+b" if path.exists() else "w+b")
    file.truncate(size)
    file.seek(size)
    return file


def _sync_files(*open_files: BinaryIO) -> None:
    for file in open_files:
        file.flush()
        os.fsync(file.fileno())


def _read_lines(path: Path) -> Iterator[str]:
    number = 0
    try:
        with OPENERS.get(path.suffix, lambda plain: plain.open("rb"))(path) as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{path}:{number}: not UTF-8 (byte 0x{byte:02x}); convert it, for example: iconv -f latin1 -t utf-8"
        ) from None
    except (EOFError, lzma.LZMAError, zstandard.ZstdError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged or cut off after line {number}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
