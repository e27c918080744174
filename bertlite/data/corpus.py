"""Tokenize documents into files of token ids, which are memory-mapped and reused while nothing changes."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from bertlite.config.loading import choose
from bertlite.config.settings import DataSettings, Source
from bertlite.core.errors import DataLost, UserError
from bertlite.core.files import disk_full_as_error, fingerprint, lock, read_json, remove_leftovers, write_json
from bertlite.core.logging import logger
from bertlite.data.sources import digest_source, find_source_files, read_documents
from bertlite.data.summary import Summary, warn
from bertlite.data.vocabulary import find_long_words, strips_marks
from bertlite.data.words import SEGMENTERS, mark_segmented_words, mark_word_starts

CORPUS_VERSION = 2  # raise it when the same text would give other files
BATCH_CHARACTERS = 1 << 20  # tokenized together; limits the memory
BATCHES_PER_SYNC = 16  # an interrupted process resumes from the last sync
Ints = NDArray[np.int64]
Id = np.unsignedinteger[Any]  # of a token: two bytes where the vocabulary is small enough, else four


class Corpus:
    """Documents as token ids, without [CLS] and [SEP], in the order of the text.

    Document i is `tokens[starts[i]:starts[i + 1]]`. `word_starts` marks the tokens that start a word, for text that was
    segmented; otherwise it is None, and the vocabulary marks them (`words.mark_word_starts`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            content = json.loads((folder / "corpus.json").read_text())
            self.summary, dtype = Summary(**content["summary"]), np.dtype(content["dtype"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataLost(f"{folder}: damaged ({error}); remove it, and it will be rebuilt") from None
        self.sizes = expected_sizes(folder, self.summary, dtype, content.get("segmented", False))
        check_sizes(self.sizes)
        self.tokens: NDArray[Id] = np.memmap(folder / "tokens.bin", dtype=dtype, mode="r")
        self.starts: Ints = np.memmap(folder / "document_starts.bin", dtype="<i8", mode="r")
        words = folder / "word_starts.bin"
        self.word_starts: NDArray[np.uint8] | None = (
            np.memmap(words, dtype=np.uint8, mode="r") if words in self.sizes else None
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def document(self, index: int) -> NDArray[Id]:
        return self.tokens[self.starts[index] : self.starts[index + 1]]


def expected_sizes(folder: Path, summary: Summary, dtype: np.dtype[Any], segmented: bool) -> dict[Path, int]:
    """Return the files of a corpus and their sizes in bytes."""
    sizes = {"tokens.bin": summary.tokens * dtype.itemsize, "document_starts.bin": 8 * (summary.documents + 1)}
    if segmented:
        sizes["word_starts.bin"] = summary.tokens
    return {folder / name: size for name, size in sizes.items()}


def check_sizes(sizes: dict[Path, int]) -> None:
    """Raise DataLost if a file is missing or truncated."""
    for path, size in sizes.items():
        if not path.exists() or path.stat().st_size != size:
            raise _missing(path)


def read_slices(array: NDArray[Any], bounds: Iterable[Sequence[int] | Ints]) -> list[NDArray[Any]]:
    """Read slices of a memory-mapped array, given by start and end, from its file. Raises DataLost.

    The map itself serves only where nobody can truncate the file: to read past the file's end would kill the process.
    """
    assert isinstance(array, np.memmap) and array.filename
    path, slices = Path(array.filename), []
    try:
        with path.open("rb", buffering=0) as file:
            for start, end in bounds:
                values = np.empty(end - start, array.dtype)
                file.seek(array.offset + int(start) * array.itemsize)
                if file.readinto(values.data) != values.nbytes:
                    raise _missing(path)
                slices.append(values)
    except OSError:
        raise _missing(path) from None
    return slices


def _missing(path: Path) -> DataLost:
    return DataLost(f"{path}: missing or truncated; remove {path.parent}, and it will be rebuilt")


def cache_folder(setting: str | None) -> Path:
    """Return the folder for corpora and tokenizers: the setting, $BERTLITE_CACHE, or ~/.cache/bertlite."""
    folder = setting or os.environ.get("BERTLITE_CACHE") or "~/.cache/bertlite"
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise UserError(
            f"{folder}: this user has no home folder; set data.cache_dir or the environment variable BERTLITE_CACHE"
        ) from None


def prepare_corpus(
    sources: list[Source], tokenizer: PreTrainedTokenizerBase, data: DataSettings, setting: str
) -> Corpus:
    """Load the corpus of `sources` from the cache; first tokenize what is missing there.

    `setting` names the sources in messages. Raises UserError if they hold no text.
    """
    cache = cache_folder(data.cache_dir)
    backend = tokenizer.backend_tokenizer
    inputs = {
        "the tokenizer": backend.to_str(),
        "the text": [digest_source(source, setting, cache) for source in sources],
        "the settings": [CORPUS_VERSION, data.document, data.min_characters, data.max_characters,
                         data.remove_duplicates, data.segmenter],
    }  # fmt: skip
    folder = cache / "corpora" / fingerprint(inputs)
    with lock(folder):
        if not (folder / "corpus.json").exists():
            _log_changes(sources, inputs, cache, setting)
            _tokenize(sources, backend, tokenizer.unk_token_id, data, folder, setting)
    corpus = Corpus(folder)
    logger.info(f"{setting}: {corpus.summary.describe()} ({folder})")
    warn(corpus.summary, setting)
    return corpus


def _log_changes(sources: list[Source], inputs: dict[str, Any], cache: Path, setting: str) -> None:
    """Log what has changed since the same sources were last prepared, and record the present inputs."""
    names = [[source.path and str(Path(source.path).absolute()), source.dataset, source.name] for source in sources]
    record = cache / "prepared" / f"{fingerprint([setting, names])}.json"
    current = {name: fingerprint(value) for name, value in inputs.items()}
    if last := read_json(record):
        changed = " and ".join(name for name in current if last.get(name) != current[name])
        if changed:
            logger.info(f"{setting}: preparing the corpus again, because of changes in {changed}")
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, current)


def _tokenize(
    sources: list[Source], tokenizer: Tokenizer, unknown_id: int, data: DataSettings, folder: Path, setting: str
) -> None:
    """Append the documents to the files of a corpus; `progress.json` counts those that are synced to the disk.

    After an interruption the files are truncated to that point, so that the result is the same, byte for byte.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, "*.json")
    logger.info(f"{setting}: tokenizing the documents")
    progress = folder / "progress.json"
    summary = Summary(**(read_json(progress) or {}))
    with disk_full_as_error(folder), _progress_bar(sources, setting) as bar, ExitStack() as stack:
        writer = _CorpusWriter(folder, tokenizer, unknown_id, data, summary, stack)
        for number, batch in enumerate(_read_batches(sources, data, summary, setting, bar), 1):
            writer.write(batch)
            if number % BATCHES_PER_SYNC == 0:
                writer.sync()
                write_json(progress, asdict(summary))
        if not summary.tokens:
            names = ", ".join(str(source.path or source.dataset) for source in sources)
            raise UserError(f"{setting}: {names}: there is no text in it; {summary.read:,} documents read, none kept")
        writer.sync()
        content = {"dtype": writer.dtype.str, "segmented": writer.segment is not None, "summary": asdict(summary)}
        write_json(folder / "corpus.json", content)
        progress.unlink(missing_ok=True)


class _CorpusWriter:
    """Tokenize batches of documents, and append them to the files of a corpus."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        unknown_id: int,
        data: DataSettings,
        summary: Summary,
        stack: ExitStack,
    ) -> None:
        self.tokenizer, self.unknown_id, self.summary = tokenizer, unknown_id, summary
        self.dtype = np.dtype("<u2" if tokenizer.get_vocab_size() <= 1 << 16 else "<u4")
        self.strips_marks = strips_marks(tokenizer)
        self.starts_word = mark_word_starts(tokenizer)  # (V,)
        self.segment = choose(SEGMENTERS, data.segmenter, "data.segmenter") if data.segmenter else None
        sizes = expected_sizes(folder, summary, self.dtype, self.segment is not None)
        self.files = {path.name: stack.enter_context(_open_at(path, size)) for path, size in sizes.items()}

    def write(self, batch: list[tuple[int, str]]) -> None:
        """Append documents, given by the index of their source and their text."""
        chunks = [_split_text(text) for _, text in batch]
        encodings = self._encode([chunk for document in chunks for chunk in document])
        for (source, text), document in zip(batch, chunks, strict=True):
            encoded = [next(encodings) for _ in document]
            ids, word_starts = (np.concatenate(arrays) for arrays in zip(*encoded, strict=True))
            if not len(ids):
                self.summary.empty += 1
                continue
            if self.segment:
                self.files["word_starts.bin"].write(word_starts.tobytes())
            self._count(source, text, ids, int(word_starts.sum()))
            self.files["tokens.bin"].write(ids.tobytes())
            self.files["document_starts.bin"].write(np.array(self.summary.tokens, "<i8").tobytes())

    def _encode(self, chunks: list[str]) -> Iterator[tuple[NDArray[Id], NDArray[Any]]]:
        """Yield token ids and word starts of each chunk; keep few of the library's large encodings in memory."""
        encode = self.tokenizer.encode_batch if self.segment else self.tokenizer.encode_batch_fast
        offsets = accumulate(map(len, chunks), initial=0)
        for _, group in groupby(zip(chunks, offsets, strict=False), lambda pair: pair[1] // BATCH_CHARACTERS):
            texts = [chunk for chunk, _ in group]
            for text, encoding in zip(texts, encode(texts, add_special_tokens=False), strict=True):
                ids = np.array(encoding.ids, dtype=self.dtype)
                segment = self.segment
                yield ids, mark_segmented_words(text, encoding.offsets, segment) if segment else self.starts_word[ids]

    def sync(self) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

    def _count(self, source: int, text: str, ids: NDArray[Id], words: int) -> None:
        summary = self.summary
        summary.source_documents += [0] * (source + 1 - len(summary.source_documents))
        summary.source_documents[source] += 1
        summary.documents += 1
        summary.tokens += len(ids)
        unknown_tokens = int((ids == self.unknown_id).sum())
        summary.unknown_tokens += unknown_tokens
        if unknown_tokens:
            summary.long_word_bytes += sum(len(word.encode()) for word in find_long_words(text, self.tokenizer))
        if self.strips_marks:
            summary.count_marks(text)
        summary.words += words
        summary.bytes += len(text) if text.isascii() else len(text.encode("utf-8"))


def _read_batches(
    sources: list[Source], data: DataSettings, summary: Summary, setting: str, bar: "tqdm[Any]"
) -> Iterator[list[tuple[int, str]]]:
    """Yield documents to keep, about BATCH_CHARACTERS at a time; skip those that `summary` has counted before."""
    skip = summary.read
    seen: set[bytes] = set()
    batch: list[tuple[int, str]] = []
    characters = number = 0
    for source_number, source in enumerate(sources):
        for text in read_documents(source, data.document, setting, bar.update):
            number += 1
            duplicate = data.remove_duplicates and _is_duplicate(text, seen)
            if number <= skip:
                continue
            summary.read += 1
            if not text.strip():
                summary.empty += 1
            elif duplicate:
                summary.duplicates += 1
            elif len(text) < data.min_characters:
                summary.too_short += 1
            elif data.max_characters and len(text) > data.max_characters:
                summary.too_long += 1
            else:
                batch.append((source_number, text))
                characters += len(text)
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _is_duplicate(text: str, seen: set[bytes]) -> bool:
    """Return whether the text is in `seen`, about 100 bytes of memory per document, and add it."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
    duplicate = digest in seen
    seen.add(digest)
    return duplicate


def _split_text(text: str) -> list[str]:
    """Split a text into chunks of at most BATCH_CHARACTERS, before white space where there is any."""
    chunks, start = [], 0
    while len(text) - start > BATCH_CHARACTERS:
        end = start + BATCH_CHARACTERS
        space = max(text.rfind(character, start + 1, end) for character in " \n\t")
        chunks.append(text[start : space if space > 0 else end])
        start += len(chunks[-1])
    return [*chunks, text[start:]]


def _progress_bar(sources: list[Source], setting: str) -> "tqdm[Any]":
    paths = [path for source in sources for path in find_source_files(source, setting)]
    total = None if any(source.dataset for source in sources) else sum(path.stat().st_size for path in paths)
    return tqdm(desc=f"tokenizing {setting}", total=total, unit="B", unit_scale=True, disable=None)


def _open_at(path: Path, size: int) -> BinaryIO:
    """Open a file to append after its first `size` bytes; truncate it, or fill it with zeros, to that size."""
    file = path.open("r+b" if path.exists() else "w+b")
    file.truncate(size)
    file.seek(size)
    return file
