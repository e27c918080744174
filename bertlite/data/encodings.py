"""Decode text: UTF-8, or the encoding that the settings name; guess the encoding of bytes that are not UTF-8."""

import codecs
import re
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain

import charset_normalizer

from bertlite.core.errors import UserError
from bertlite.core.logging import logger

# One encoding for each kind of script; the names are known to Python and, in upper case, to iconv.
EAST_ASIAN = ["gb18030", "big5", "shift_jis", "euc_jp", "cp949"]
NOT_LATIN = ["cp1251", "koi8_r", "cp1253", "cp1255", "cp1256", "tis_620"]
LATIN = ["cp1252", "cp1250", "cp1254"]

SAMPLE_BYTES = 1 << 16
MIN_FOREIGN_BYTES = 100  # not ASCII, in a sample that shows its encoding


def guess_encodings(sample: bytes) -> list[str]:
    """Return up to two encodings that a text is likely to be in, the most likely one first; [] for none."""
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return ["utf-16"]
    if 4 * sample.count(0) > len(sample):
        odd, even = sample[1::2].count(0), sample[::2].count(0)
        return ["utf-16le" if odd > even else "utf-16be"]
    if decodes(sample, "utf-8"):
        return ["utf-8"]
    matches = charset_normalizer.from_bytes(sample, cp_isolation=EAST_ASIAN + NOT_LATIN + LATIN)
    guesses: list[str] = []
    for match in matches:  # encodings that give the same text are one match
        names = sorted(match.could_be_from_charset, key=lambda name: name != "cp1252")
        guesses.append(names[0])
    return guesses[:2]


def decodes(sample: bytes, encoding: str) -> bool:
    """Return whether all bytes are valid in an encoding."""
    try:
        sample.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def advise(sample: bytes, setting: str) -> str:
    """Return what to do about a text that is not UTF-8: convert it from its encoding, which is guessed, or set that."""
    guesses = guess_encodings(sample)
    if not guesses:
        return "if it is text at all, convert it to UTF-8"
    iconv = f"iconv -f {iconv_name(guesses[0])} -t UTF-8"
    return f"perhaps {' or '.join(guesses)}; convert it ({iconv})" + (f", or set {setting}" if setting else "")


def decode_line(line: bytes, number: int, location: str, setting: str = "") -> str:
    """Decode line `number` of a UTF-8 text, counted from 1, without its end or a byte order mark.

    Raises UserError for other bytes, and for a first line with so many zero bytes that it is UTF-16 or binary.
    `setting` is the one that names an encoding, "" if there is none.
    """
    is_utf16 = number == 1 and 4 * line.count(0) > len(line)
    bad_byte = 0
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        if not is_utf16:
            return text.rstrip("\r\n")
    except UnicodeDecodeError as error:
        bad_byte = line[error.start]
    readable = line.decode("utf-8", "ignore")
    is_mostly_utf8 = not readable.isascii() and 4 * (len(line) - len(readable.encode())) <= len(line)
    if is_mostly_utf8 and not is_utf16:
        advice = "if only a few bytes are wrong, remove them: iconv -c -f utf-8 -t utf-8"
    else:
        advice = advise(line, setting)
    raise UserError(f"{location}:{number}: not UTF-8 text (byte 0x{bad_byte:02x}); {advice}")


def decode_lines(chunks: Iterable[bytes], encoding: str, location: str) -> Iterator[str]:
    """Decode a text in chunks that end at bytes 0x0A; yield its lines, without their ends.

    Raises UserError, naming the line, for bytes that the encoding does not have, and for an unknown encoding.
    """
    unknown = UserError(
        f"{location}: the encoding is {encoding!r}, which Python does not know; it is utf-8, latin-1, gb18030, …"
    )
    try:
        decoder = codecs.getincrementaldecoder("utf-8-sig" if is_utf8(encoding) else encoding)()
    except (LookupError, ValueError):  # ValueError: a name with a null byte
        raise unknown from None
    rest, number, is_first = "", 1, True
    for chunk in chain(chunks, [b""]):
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            advice = f"if only a few bytes are wrong, remove them: iconv -c -f {iconv_name(encoding)} -t UTF-8"
            guesses = guess_encodings(chunk) if sum(byte > 127 for byte in chunk) >= MIN_FOREIGN_BYTES else []
            if guesses and decodes(chunk, guesses[0]):
                advice = f"it looks like {guesses[0]}"
            bad_byte = error.object[error.start]
            raise UserError(f"{location}:{number}: not {encoding} (byte 0x{bad_byte:02x}); {advice}") from None
        except (ValueError, TypeError):  # a codec of something else than text
            raise unknown from None
        *lines, rest = (rest + (text.removeprefix("\ufeff") if is_first else text)).split("\n")
        number, is_first = number + len(lines), False
        yield from (line.removesuffix("\r") for line in lines)
    if rest:
        yield rest


def iconv_name(encoding: str) -> str:
    """Return the name that iconv has for an encoding that Python knows."""
    name = codecs.lookup(encoding).name.upper().replace("_", "-")
    return re.sub(r"^(UTF-(?:16|32))-", r"\1", name)


def warn_of_other_encoding(sample: bytes, encoding: str, location: str) -> None:
    """Warn, once, if the start of a text is valid in the encoding of the settings, but looks like another one.

    Latin-1 never fails, whatever the bytes are. Whether a text is in cp1252 or cp1250 cannot be told reliably.
    """
    sample = sample[: sample.rfind(b"\n") + 1] or sample  # of whole characters
    foreign = sum(byte > 127 for byte in sample)
    guesses = guess_encodings(sample) if foreign >= MIN_FOREIGN_BYTES else []
    if not guesses or guesses[0] in LATIN or not decodes(sample, encoding):
        return
    texts = [sample.decode(guess, "ignore") for guess in guesses]
    if sample.decode(encoding, "ignore") not in texts:
        _warn_once(f"{location}: read as {encoding}, but it looks like {guesses[0]}")


@cache  # a text is read to train the tokenizer, and again to be tokenized
def _warn_once(message: str) -> None:
    logger.warning(message)


def is_utf8(encoding: str) -> bool:
    """Return whether this is a name of UTF-8."""
    return encoding.lower().replace("_", "-") in ("utf-8", "utf8")
