"""Documents to token ids on disk: made once, memory-mapped, and used again while nothing has changed."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
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
from bertlite.data.words import SEGMENTERS, mark_segmented_words, mark_word_starts

CORPUS_VERSION = 2  # raise it when the same text would give other files
BATCH_CHARACTERS = 1 << 20  # tokenised at a time, which bounds the memory that a corpus takes
MANY_TOKENS_A_WORD, MANY_UNKNOWN = 2.5, 0.02  # signs of a vocabulary that is not this text's
BATCHES_PER_SYNC = 16  # after so many, what is on the disk is certain and an interruption goes on from there
Id = np.unsignedinteger[Any]  # of a token, of two bytes where the vocabulary allows it, else four


@dataclass
class Summary:
    """What a corpus holds and what was dropped, counted while it was made."""

    read: int = 0  # documents, of which these were dropped:
    empty: int = 0
    duplicates: int = 0
    too_short: int = 0
    too_long: int = 0
    documents: int = 0  # and these kept:
    tokens: int = 0
    unknown_tokens: int = 0
    words: int = 0
    bytes: int = 0
    source_documents: list[int] = field(default_factory=list)  # of each source, those kept

    def text(self) -> str:
        dropped = ", ".join(
            f"{count:,} {name.replace('_', ' ')}"
            for name, count in asdict(self).items()
            if name in ("empty", "duplicates", "too_short", "too_long") and count
        )
        return (
            f"{self.documents:,} documents, {self.bytes / 1e6:,.1f} MB, {self.tokens:,} tokens, "
            f"{self.tokens / max(1, self.words):.2f} a word, {self.unknown_tokens / max(1, self.tokens):.2%} unknown"
            + (f"; dropped: {dropped}" if dropped else "")
        )

    def doubt(self) -> str:
        """Why the vocabulary seems too small, or another text's; or nothing."""
        what = "the vocabulary is too small, or of other text"
        if self.unknown_tokens > MANY_UNKNOWN * self.tokens:
            return f"{self.unknown_tokens / self.tokens:.1%} of the tokens are unknown ones; {what}"
        if self.tokens > MANY_TOKENS_A_WORD * self.words:
            return f"{self.tokens / max(1, self.words):.1f} tokens a word, where 1 to 2 are usual; {what}"
        return ""


class Corpus:
    """Documents as token ids, without [CLS] and [SEP], in the order of the text.

    `tokens` (all tokens,) holds one document after the other; document i is `tokens[starts[i]:starts[i + 1]]`.
    `word_starts` (all tokens,) says where words begin; None where the vocabulary says it (`words.mark_word_starts`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            about = json.loads((folder / "corpus.json").read_text())
            self.summary, dtype = Summary(**about["summary"]), np.dtype(about["dtype"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataLost(f"{folder}: damaged ({error}); remove it, and it will be rebuilt") from None
        self.sizes = file_sizes(folder, self.summary, dtype, about.get("segmented", False))
        check_sizes(self.sizes)
        self.tokens: NDArray[Id] = np.memmap(folder / "tokens.bin", dtype=dtype, mode="r")
        self.starts: NDArray[np.int64] = np.memmap(folder / "document_starts.bin", dtype="<i8", mode="r")
        words = folder / "word_starts.bin"
        self.word_starts: NDArray[np.uint8] | None = (
            np.memmap(words, dtype=np.uint8, mode="r") if words in self.sizes else None
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def document(self, index: int) -> NDArray[Id]:
        return self.tokens[self.starts[index] : self.starts[index + 1]]


def file_sizes(folder: Path, summary: Summary, dtype: np.dtype[Any], segmented: bool) -> dict[Path, int]:
    """The files of a corpus, with their bytes; where words begin stands in one only if a segmenter said it."""
    sizes = {"tokens.bin": summary.tokens * dtype.itemsize, "document_starts.bin": 8 * (summary.documents + 1)}
    if segmented:
        sizes["word_starts.bin"] = summary.tokens
    return {folder / name: size for name, size in sizes.items()}


def check_sizes(sizes: dict[Path, int]) -> None:
    """Raise DataLost when a file has vanished or changed its size: touching what was cut off ends a process."""
    for path, size in sizes.items():
        if not path.exists() or path.stat().st_size != size:
            raise DataLost(f"{path}: vanished or was cut; remove {path.parent}, and it will be rebuilt")


def cache_folder(setting: str | None) -> Path:
    """Where corpora and tokenizers are kept: the setting, $BERTLITE_CACHE, or ~/.cache/bertlite."""
    return Path(setting or os.environ.get("BERTLITE_CACHE") or "~/.cache/bertlite").expanduser()


def prepare_corpus(
    sources: list[Source], tokenizer: PreTrainedTokenizerBase, data: DataSettings, setting: str
) -> Corpus:
    """The corpus of these sources: from the cache, finished from where it was interrupted, or made now.

    `setting` is where the sources are configured. Raises UserError when they hold no text.
    """
    cache = cache_folder(data.cache_dir)
    backend = tokenizer.backend_tokenizer
    parts = {
        "the tokenizer": backend.to_str(),
        "the text": [digest_source(source, setting, cache) for source in sources],
        "the settings": [CORPUS_VERSION, data.document, data.min_characters, data.max_characters,
                         data.remove_duplicates, data.segmenter],
    }  # fmt: skip
    key = fingerprint(parts)
    folder = cache / "corpora" / key
    with lock(folder):
        if not (folder / "corpus.json").exists():
            _say_what_changed(sources, parts, cache, setting)
            _tokenize(sources, backend, tokenizer.unk_token_id, data, folder, setting)
    corpus = Corpus(folder)
    logger.info(f"{setting}: {corpus.summary.text()} ({folder})")
    if doubt := corpus.summary.doubt():
        advice = (
            ": without tokenizer.path a vocabulary is trained on the text, tokenizer.vocab_size makes it larger, and "
            "tokenizer.extend adds words to another"
        )
        logger.info(f"{setting}: warning: {doubt}{advice if setting.startswith('data.') else ''}")
    return corpus


def _say_what_changed(sources: list[Source], parts: dict[str, Any], cache: Path, setting: str) -> None:
    """Compare with what the same sources were last prepared by, and remember this time."""
    names = [[source.path and str(Path(source.path).absolute()), source.dataset, source.name] for source in sources]
    record = cache / "prepared" / f"{fingerprint([setting, names])}.json"
    now = {part: fingerprint(value) for part, value in parts.items()}
    if before := read_json(record):
        changed = " and ".join(part for part in now if before.get(part) != now[part])
        if changed:
            logger.info(f"{setting}: preparing the corpus, for the first time with {changed} as now")
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, now)


def _tokenize(
    sources: list[Source], tokenizer: Tokenizer, unknown_id: int, data: DataSettings, folder: Path, setting: str
) -> None:
    """Append documents to the corpus's files; `progress.json` says how much of them is certain.

    After an interruption, what lies beyond is cut off and work goes on from there: the same bytes in the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, "*.json")
    progress = folder / "progress.json"
    summary = Summary(**(read_json(progress) or {}))
    with disk_full_as_error(folder), _bar(sources, setting) as bar, ExitStack() as stack:
        writer = _Writer(folder, tokenizer, unknown_id, data, summary, stack)
        for number, batch in enumerate(_batches(sources, data, summary, setting, bar), 1):
            writer.write(batch)
            if number % BATCHES_PER_SYNC == 0:
                writer.sync()
                write_json(progress, asdict(summary))
        if not summary.tokens:
            places = ", ".join(str(source.path or source.dataset) for source in sources)
            raise UserError(f"{setting}: {places}: there is no text in it; {summary.read:,} documents read, none kept")
        writer.sync()
        about = {"dtype": writer.dtype.str, "segmented": writer.segment is not None, "summary": asdict(summary)}
        write_json(folder / "corpus.json", about)
        progress.unlink(missing_ok=True)


class _Writer:
    """Tokenises batches of documents and appends them to the files of a corpus."""

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
        self.begins_word = mark_word_starts(tokenizer)
        self.segment = choose(SEGMENTERS, data.segmenter, "data.segmenter") if data.segmenter else None
        sizes = file_sizes(folder, summary, self.dtype, self.segment is not None)
        self.files = {path.name: stack.enter_context(_open_at(path, size)) for path, size in sizes.items()}

    def write(self, batch: list[tuple[int, str]]) -> None:
        """Append documents, given with the number of their source."""
        chunks = [_chunks(text) for _, text in batch]
        encoded = self._encode([chunk for document in chunks for chunk in document])
        for (source, text), document in zip(batch, chunks, strict=True):
            parts = [next(encoded) for _ in document]
            ids, begins_word = (np.concatenate(column) for column in zip(*parts, strict=True))
            if not len(ids):
                self.summary.empty += 1
                continue
            if self.segment:
                self.files["word_starts.bin"].write(begins_word.tobytes())
            self._count(source, text, ids, int(begins_word.sum()))
            self.files["tokens.bin"].write(ids.tobytes())
            self.files["document_starts.bin"].write(np.array(self.summary.tokens, "<i8").tobytes())

    def _encode(self, chunks: list[str]) -> Iterator[tuple[NDArray[Id], NDArray[Any]]]:
        """Token ids and beginnings of words of each chunk; the library's large encodings live for a few chunks only."""
        encode = self.tokenizer.encode_batch if self.segment else self.tokenizer.encode_batch_fast
        starts = accumulate(map(len, chunks), initial=0)
        for _, group in groupby(zip(chunks, starts, strict=False), lambda pair: pair[1] // BATCH_CHARACTERS):
            few = [chunk for chunk, _ in group]
            for chunk, encoding in zip(few, encode(few, add_special_tokens=False), strict=True):
                ids = np.array(encoding.ids, dtype=self.dtype)
                segment = self.segment
                yield ids, mark_segmented_words(chunk, encoding.offsets, segment) if segment else self.begins_word[ids]

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
        summary.unknown_tokens += int((ids == self.unknown_id).sum())
        summary.words += words
        summary.bytes += len(text) if text.isascii() else len(text.encode("utf-8"))


def _batches(
    sources: list[Source], data: DataSettings, summary: Summary, setting: str, bar: "tqdm[Any]"
) -> Iterator[list[tuple[int, str]]]:
    """Lists of documents to keep, of about BATCH_CHARACTERS together, after those that `summary` has read already."""
    skip = summary.read
    seen: set[bytes] = set()
    batch: list[tuple[int, str]] = []
    characters = number = 0
    for source_number, source in enumerate(sources):
        for text in read_documents(source, data.document, setting, bar.update):
            number += 1
            duplicate = data.remove_duplicates and _is_known(text, seen)
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


def _is_known(text: str, seen: set[bytes]) -> bool:
    """Whether the same text has come before; about 100 bytes of memory a document."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
    known = digest in seen
    seen.add(digest)
    return known


def _chunks(text: str) -> list[str]:
    """A text as parts of at most BATCH_CHARACTERS, cut before white space where there is any: memory stays bounded."""
    chunks, at = [], 0
    while len(text) - at > BATCH_CHARACTERS:
        end = at + BATCH_CHARACTERS
        space = max(text.rfind(sign, at + 1, end) for sign in " \n\t")
        chunks.append(text[at : space if space > 0 else end])
        at += len(chunks[-1])
    return [*chunks, text[at:]]


def _bar(sources: list[Source], setting: str) -> "tqdm[Any]":
    files = [path for source in sources for path in find_source_files(source, setting)]
    total = None if any(source.dataset for source in sources) else sum(path.stat().st_size for path in files)
    return tqdm(desc=f"tokenizing {setting}", total=total, unit="B", unit_scale=True, disable=None)


def _open_at(path: Path, size: int) -> BinaryIO:
    """Open for appending after the first `size` bytes (zeros where the file is new), and drop the rest."""
    file = path.open("r+b" if path.exists() else "w+b")
    file.truncate(size)
    file.seek(size)
    return file
