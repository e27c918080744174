"""Open files, compressed or not. Their first bytes tell how they are compressed, and what does not hold text."""

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from bertlite.core.errors import UserError

# Compressed bytes that are decompressed at once: zstandard makes up to 32,768 bytes of one.
ZSTANDARD_CHUNK = 1 << 9


class _ZstandardFile(io.RawIOBase):
    """Decompress a .zst file; zstandard's own reader does not notice that a file is truncated."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self.zstandard = zstandard
        self.file = file
        self.frame: Any = None
        self.ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            ended = self.frame is None or self.frame.eof
            compressed = (self.frame.unused_data if self.frame and ended else b"") or self.file.read(ZSTANDARD_CHUNK)
            if not compressed and ended:
                return 0
            if not compressed:
                raise EOFError("compressed file ended before the end of its frame")
            if ended:
                self.frame = self.zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                self.ready = memoryview(self.frame.decompress(compressed))
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

# The first bytes of compressed files, whatever their names are.
COMPRESSED = {
    re.compile(rb"\x1f\x8b\x08"): ".gz",
    re.compile(rb"\xfd7zXZ\x00"): ".xz",
    re.compile(rb"BZh[1-9]1AY&SY"): ".bz2",
    re.compile(rb"\x28\xb5\x2f\xfd"): ".zst",
}

# What decompressors raise for a file that is damaged or truncated.
DAMAGED = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error)

# Where and which bytes of a file tell that it holds no text: what it is, and what to do.
NO_TEXT: dict[tuple[int, bytes], tuple[str, str]] = {
    (0, b"PK\x03\x04"): ("a zip archive or an office file", "unpack it, or save a spreadsheet as .csv"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"): ("an old office file", "save it as .csv or as plain text"),
    (257, b"ustar"): ("a tar archive", "unpack it (tar -xf)"),
    (0, b"7z\xbc\xaf\x27\x1c"): ("a 7z archive", "unpack it"),
    (0, b"Rar!\x1a\x07"): ("a rar archive", "unpack it"),
    (0, b"%PDF-"): ("a PDF", "extract its text, for example with pdftotext"),
    (0, b"SQLite format 3\x00"): ("an SQLite database", "export the table as .csv"),
    (0, b"ARROW1\x00\x00"): ("an Arrow file", "save the table as Parquet, or name its dataset's folder by dataset"),
}


@contextmanager
def open_file(path: Path) -> Iterator[tuple[BinaryIO, Any]]:
    """Open a file, and yield it compressed and decompressed; both can `peek`.

    Raises UserError if it cannot be read, is damaged, or is an archive or something else that holds no text.
    """
    try:
        with path.open("rb") as raw, _decompressor(path, raw.peek(16))(raw) as content:
            start = content.peek(512)
            for (offset, magic), (what, advice) in NO_TEXT.items():
                if start.startswith(magic, offset):
                    raise UserError(f"{path}: {what}, not a file of text or a table; {advice}")
            yield raw, content
    except DAMAGED as error:
        raise UserError(f"{path}: damaged or truncated: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _decompressor(path: Path, start: bytes) -> Callable[[BinaryIO], Any]:
    """Return the function that decompresses a file, by its name or else by its first bytes."""
    by_content = next((suffix for magic, suffix in COMPRESSED.items() if magic.match(start)), "")
    suffix = path.suffix.lower()
    return DECOMPRESSORS.get(suffix if suffix in DECOMPRESSORS else by_content, nullcontext)
