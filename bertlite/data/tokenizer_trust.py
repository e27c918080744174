"""What the files of a tokenizer from a stranger may contain.

The tokenizers library trusts them: parts in a row may multiply a text without limit, a regular expression may take
forever, and a failure inside of it may end the process. So they are checked before the library reads them.
"""

import base64
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from bertlite.core.errors import UserError
from bertlite.data.vocabulary import WORD_PARTS

MAX_FILE_BYTES = 1 << 27  # the largest tokenizer.json in use have about 35 MB
MAX_SETTINGS_BYTES = 1 << 24  # of the JSON files beside it
MAX_VOCABULARY = 4_000_000
MAX_ADDED_TOKENS = 10_000
MAX_TOKEN_CHARACTERS = 1000
MAX_PARTS = 16  # normalizers, or pre-tokenizers, … in a row
MAX_GROWTH = 64  # how many times as long a text may become; NFKC makes 18 characters of one
MAX_WORDPIECE_CHARACTERS = 1000  # WordPiece takes time in the square of it

PARTS = {
    "normalizer": "BertNormalizer ByteLevel Lowercase NFC NFD NFKC NFKD Nmt Precompiled Prepend Replace Sequence Strip"
    " StripAccents",
    "pre_tokenizer": "BertPreTokenizer ByteLevel CharDelimiterSplit Digits FixedLength Metaspace Punctuation Sequence"
    " Split UnicodeScripts Whitespace WhitespaceSplit",
    "post_processor": "BertProcessing ByteLevel RobertaProcessing Sequence TemplateProcessing",
    "decoder": "BPEDecoder ByteFallback ByteLevel CTC Fuse Metaspace Replace Sequence Strip WordPiece",
}

# One character, class or escape after the other, of which the last may be repeated: matched without going back.
ATOM = (
    r"(?:[^\\\[\](){}|*+?.^$]|\\[^\W\d_]|\\\W|\\[pP]\{\^?\w+\}|\[\^?(?:[^\\\[\]&]|\\[^\W\d_]|\\\W|\\[pP]\{\w+\})+\]|\.)"
)
SEQUENCE = rf"\^?{ATOM}*{ATOM}(?:\+|\{{[1-9]\d{{0,2}}(?:,\d{{0,3}})?\}})?\$?"
PLAIN_REGEX = re.compile(rf"{SEQUENCE}(?:\|{SEQUENCE})*")

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN_REGEXES = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",  # SmolLM
    r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",  # CLIP
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES,  # cl100k, Llama 3
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES,  # Qwen 2
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES,  # Qwen 3.5
    " +▁",  # SeamlessM4T
    WORD_PARTS,  # bertlite's own, of at most a hundred characters
}


class Part(BaseModel):
    """A normalizer, pre-tokenizer, post-processor or decoder: the fields of all of them that are checked."""

    type: Annotated[str, Field(max_length=100)]
    normalizers: list["Part"] = []
    pretokenizers: list["Part"] = []
    processors: list["Part"] = []
    decoders: list["Part"] = []
    pattern: dict[Literal["String", "Regex"], Annotated[str, Field(min_length=1, max_length=1000)]] | str | None = None
    content: str = ""  # of Replace, Strip
    prepend: str = ""
    precompiled_charsmap: str | None = None
    single: list[dict[Literal["SpecialToken", "Sequence"], dict[str, Any]]] = []
    pair: list[dict[Literal["SpecialToken", "Sequence"], dict[str, Any]]] = []

    def flatten(self) -> Iterator["Part"]:
        """Yield the parts of a sequence, of any depth, one after the other."""
        parts = [*self.normalizers, *self.pretokenizers, *self.processors, *self.decoders]
        if self.type != "Sequence":
            yield self
        for part in parts:
            yield from part.flatten()


class AddedToken(BaseModel):
    """A token that is found in the text before it is split."""

    content: Annotated[str, Field(max_length=MAX_TOKEN_CHARACTERS)]


Token = Annotated[str, Field(max_length=MAX_TOKEN_CHARACTERS)]
Merge = Annotated[str, Field(max_length=2 * MAX_TOKEN_CHARACTERS)] | tuple[Token, Token]


class Model(BaseModel):
    """WordPiece, BPE, Unigram or WordLevel. Old files do not name the type."""

    type: Literal["WordPiece", "BPE", "Unigram", "WordLevel"] | None = None
    vocab: (
        Annotated[dict[Token, int], Field(max_length=MAX_VOCABULARY)]
        | Annotated[list[tuple[Token, float]], Field(max_length=MAX_VOCABULARY)]
    )
    merges: Annotated[list[Merge], Field(max_length=MAX_VOCABULARY)] = []
    max_input_chars_per_word: Annotated[int, Field(le=MAX_WORDPIECE_CHARACTERS)] = 100
    continuing_subword_prefix: Annotated[str, Field(max_length=100)] | None = None
    end_of_word_suffix: Annotated[str, Field(max_length=100)] | None = None


class Padding(BaseModel):
    """To what length sequences are padded."""

    strategy: Literal["BatchLongest"] | dict[Literal["Fixed"], Annotated[int, Field(le=1 << 20)]]
    pad_to_multiple_of: Annotated[int, Field(le=1 << 20)] | None = None


class Truncation(BaseModel):
    """After how many tokens a text is truncated."""

    max_length: Annotated[int, Field(gt=0)]
    stride: int = 0


class TokenizerFile(BaseModel):
    """tokenizer.json."""

    added_tokens: Annotated[list[AddedToken], Field(max_length=MAX_ADDED_TOKENS)] = []
    normalizer: Part | None = None
    pre_tokenizer: Part | None = None
    model: Model
    post_processor: Part | None = None
    decoder: Part | None = None
    padding: Padding | None = None
    truncation: Truncation | None = None


def check_tokenizer(path: Path) -> None:
    """Raise UserError if reading or using a tokenizer, a file or a folder, could run out of memory, hang or crash.

    Raises ValueError for what is not JSON.
    """
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.name == "tokenizer.json" or (file == path and file.suffix == ".json"):
            _check_tokenizer_json(file)
        elif file.name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
            _check_settings(file, _read_json(file, MAX_SETTINGS_BYTES))
        elif file.name in ("vocab.txt", "vocab.json", "merges.txt") or file == path or file.suffix == ".model":
            _check_size(file, MAX_FILE_BYTES)
            if file.suffix == ".txt":
                _check_lines(file)


def _check_tokenizer_json(path: Path) -> None:
    try:
        content = TokenizerFile.model_validate(_read_json(path, MAX_FILE_BYTES))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(name) for name in first["loc"])[:200] or "content"
        raise UserError(f"{path}: no tokenizer could be loaded from it: {place}: {first['msg']}") from None
    for kind, allowed in PARTS.items():
        part = getattr(content, kind)
        parts = [] if part is None else list(part.flatten())
        if len(parts) > MAX_PARTS:
            raise UserError(f"{path}: {kind}: {len(parts):,} in a row; at most {MAX_PARTS} are allowed")
        for part in parts:
            if part.type not in allowed.split():
                raise UserError(f"{path}: {kind}: {part.type} is unknown; bertlite allows {', '.join(allowed.split())}")
            _check_part(path, kind, part)
        growth = math.prod(map(_growth, parts)) if kind in ("normalizer", "decoder") else 1
        if growth > MAX_GROWTH:
            raise UserError(
                f"{path}: {kind}: makes a text up to {min(growth, 10**12):,} times as long; at most {MAX_GROWTH}"
            )
    if content.truncation and content.truncation.stride >= content.truncation.max_length:
        raise UserError(f"{path}: truncation: stride should be less than max_length; set truncation to null")


def _check_part(path: Path, kind: str, part: Part) -> None:
    """Raise UserError for a regular expression that may backtrack, and for templates that repeat the text."""
    regex = part.pattern.get("Regex") if isinstance(part.pattern, dict) else None
    if regex is not None and regex not in KNOWN_REGEXES and not PLAIN_REGEX.fullmatch(regex):
        raise UserError(
            f"{path}: {kind}: the regular expression {regex[:60]!r} may take forever; bertlite allows those of "
            f"well-known tokenizers, and alternatives that repeat only their last character"
        )
    if part.type != "TemplateProcessing":
        return
    for name, expected in (("single", ["A"]), ("pair", ["A", "B"])):
        template = getattr(part, name)
        texts = [str(item["Sequence"].get("id")) for item in template if "Sequence" in item]
        if sorted(texts) != expected or len(template) > MAX_ADDED_TOKENS:
            raise UserError(f"{path}: {kind}: {name} should hold {' and '.join(expected)} once; it has {texts[:5]}")


def _growth(part: Part) -> int:
    """Return how many times as many characters a part may make of a text."""
    if part.type == "Replace" and isinstance(part.pattern, dict):
        return max(1, -(-len(part.content) // len(part.pattern.get("String", "a"))))
    if part.type == "Precompiled":
        return _longest_replacement(part.precompiled_charsmap or "")
    return {"Prepend": 1 + len(part.prepend), "ByteLevel": 2}.get(part.type, 1)


def _longest_replacement(charsmap: str) -> int:
    """Return the characters of the longest replacement: after the size of a trie and the trie, texts that end in 0."""
    binary = base64.b64decode(charsmap)
    (size,) = struct.unpack_from("<I", binary.ljust(4, b"\0"))
    return max(1, *(len(text.decode(errors="replace")) for text in binary[4 + size :].split(b"\0")))


def _check_settings(path: Path, value: Any) -> None:
    """Raise UserError for too many tokens and tokens that are too long, in JSON of any structure."""
    if isinstance(value, str) and len(value) > MAX_TOKEN_CHARACTERS:
        raise UserError(f"{path}: {value[:30]!r}… has {len(value):,} characters; at most {MAX_TOKEN_CHARACTERS:,}")
    if isinstance(value, dict | list) and len(value) > MAX_ADDED_TOKENS:
        raise UserError(f"{path}: {len(value):,} tokens; at most {MAX_ADDED_TOKENS:,} can be added to a vocabulary")
    if isinstance(value, dict):
        for key in value.keys() - {"chat_template", "response_schema"}:  # which bertlite does not use
            _check_settings(path, key)
            _check_settings(path, value[key])
    elif isinstance(value, list):
        for item in value:
            _check_settings(path, item)


def _check_lines(path: Path) -> None:
    """Raise UserError for a vocabulary or merges of too many lines, or lines that are too long."""
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(8 * MAX_TOKEN_CHARACTERS + 1), b""), 1):
            if number > MAX_VOCABULARY or len(line) > 8 * MAX_TOKEN_CHARACTERS:
                limit = f"{MAX_VOCABULARY:,} tokens of {MAX_TOKEN_CHARACTERS:,} characters"
                raise UserError(f"{path}:{number}: the file is too long or the token is; at most {limit}")


def _check_size(path: Path, limit: int) -> None:
    if path.stat().st_size > limit:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes are too many for a tokenizer; at most {limit:,}")


def _read_json(path: Path, limit: int) -> Any:
    """Read JSON. Raises UserError for a name that occurs twice, of which each reader may take another."""

    def read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            name = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise UserError(f"{path}: the name {name[:60]!r} occurs twice")
        return found

    _check_size(path, limit)
    return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=read_object)
