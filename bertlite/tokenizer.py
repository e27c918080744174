"""Tokenizers: train WordPiece from text, or load one; always a Hugging Face tokenizer with the five special tokens."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerBase

from bertlite.config import TokenizerSettings
from bertlite.errors import UserError
from bertlite.files import fingerprint, new_folder
from bertlite.masking import Vocabulary
from bertlite.runtime import say

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TRAINER_VERSION = 1  # raise it when the same text would give another vocabulary
CHARACTER_COVERAGE = 0.9999  # of the text; rarer characters become [UNK] rather than take room in the vocabulary


def load_tokenizer(name: str, lowercase: bool = True) -> PreTrainedTokenizerBase:
    """Load `vocab.txt`, `tokenizer.json`, a Hugging Face folder or a hub name.

    `lowercase` counts for a bare `vocab.txt` alone: the others say it themselves. Raises UserError when there is no
    such tokenizer, or it lacks a special token or the fast form.
    """
    path = Path(name)
    if path.is_dir() and not any((path / file).exists() for file in ("tokenizer.json", "tokenizer_config.json")):
        path = path / "vocab.txt"
    if not path.exists() and (path.suffix in (".txt", ".json") or path.is_absolute() or name.startswith(".")):
        raise UserError(f"{path}: no such tokenizer")
    try:
        if path.is_file() and path.suffix == ".txt":
            tokenizer = wrap(word_piece(_read_vocabulary(path), lowercase))
        elif path.is_file():
            tokenizer = BertTokenizerFast(tokenizer_object=Tokenizer.from_file(str(path)))
        else:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises no narrower class, and AutoTokenizer raises many
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: no tokenizer could be loaded from it: {reason}") from None
    if not tokenizer.is_fast:
        raise UserError(f"{name}: the tokenizer has no tokenizer.json; save it by transformers' fast tokenizers first")
    kinds = ("pad_token_id", "unk_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
    missing = [kind.removesuffix("_id") for kind in kinds if getattr(tokenizer, kind) is None]
    if missing:
        raise UserError(f"{name}: the tokenizer lacks {', '.join(missing)}, which masked language modelling needs")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def trained_tokenizer(
    documents: Callable[[], Iterable[str]], digests: list[str], settings: TokenizerSettings, cache: Path
) -> PreTrainedTokenizerBase:
    """A WordPiece tokenizer of these documents: from the cache, or trained now and kept there.

    `digests` stand for the text: the same digests and settings give the same tokenizer.
    """
    key = fingerprint([TRAINER_VERSION, digests, settings.vocab_size, settings.lowercase])
    folder = cache / "tokenizers" / key
    if not folder.exists():
        say(f"tokenizer: training a vocabulary of {settings.vocab_size:,} pieces")
        tokenizer = wrap(train_word_piece(documents, settings.vocab_size, settings.lowercase))
        with new_folder(folder) as aside:
            tokenizer.save_pretrained(aside)
    tokenizer = load_tokenizer(str(folder))
    say(f"tokenizer: {len(tokenizer):,} pieces, {'lower-cased' if settings.lowercase else 'cased'} ({folder})")
    return tokenizer


def train_word_piece(documents: Callable[[], Iterable[str]], vocab_size: int, lowercase: bool) -> Tokenizer:
    """Train WordPiece as BERT has it (Devlin et al. 2018, section 3), the same in every process.

    The library numbers the pieces that continue a word in the order of a hash map, and breaks ties by these numbers.
    So they are given to it beforehand, sorted, as if they were special tokens.
    """
    alphabet = _alphabet(documents(), vocab_size, lowercase)
    continuing = [f"##{character}" for character in alphabet if _continues_words(character, lowercase)]
    tokenizer = word_piece({"[UNK]": 0}, lowercase)
    tokenizer.train_from_iterator(
        documents(),
        trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=SPECIAL_TOKENS + continuing,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            continuing_subword_prefix="##",
            show_progress=False,
        ),
    )
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return word_piece({piece: number for number, (piece, _) in enumerate(pieces)}, lowercase)


def word_piece(vocabulary: dict[str, int], lowercase: bool) -> Tokenizer:
    """BERT's own pipeline around a vocabulary: clean, split off Chinese characters and punctuation, WordPiece."""
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    if "[SEP]" in vocabulary:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
        )
        tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    """The same tokenizer as transformers' class, which saves what AutoTokenizer reads."""
    return BertTokenizerFast(tokenizer_object=tokenizer, do_lower_case=tokenizer.normalizer.lowercase)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """What masking needs of the tokenizer; [UNK] counts as special, as with Hugging Face."""
    special = np.array(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)
    ordinary = np.setdiff1d(np.arange(len(tokenizer), dtype=np.int64), special)
    if not len(ordinary):
        raise UserError("tokenizer: the vocabulary holds nothing but special tokens")
    return Vocabulary(len(tokenizer), tokenizer.mask_token_id, special, ordinary)


def _alphabet(documents: Iterable[str], vocab_size: int, lowercase: bool) -> list[str]:
    """The most frequent characters that cover the text and fit the vocabulary, sorted."""
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(normalizer.normalize_str(document))
    for character in [character for character in counts if character.isspace()]:
        del counts[character]
    alphabet: list[str] = []
    room = vocab_size - len(SPECIAL_TOKENS)
    uncovered = counts.total() * (1 - CHARACTER_COVERAGE)
    remaining = counts.total()
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        room -= 1 + _continues_words(character, lowercase)
        if room < 0 or remaining <= uncovered:
            break
        alphabet.append(character)
        remaining -= count
    return sorted(alphabet)


def _continues_words(character: str, lowercase: bool) -> bool:
    """Whether BERT's splitting ever leaves this character inside a word: not so for punctuation and Chinese."""
    text = normalizers.BertNormalizer(lowercase=lowercase).normalize_str("a" + character)
    return len(pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text)) == 1


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:
        pieces = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path}: the vocabulary is not UTF-8") from None
    missing = [token for token in SPECIAL_TOKENS if token not in pieces]
    if missing:
        raise UserError(f"{path}: {len(pieces):,} pieces, without {', '.join(missing)}; add them, one a line")
    if len(set(pieces)) < len(pieces):
        piece = next(piece for piece, count in Counter(pieces).items() if count > 1)
        raise UserError(f"{path}: the piece {piece!r} stands there twice")
    return {piece: number for number, piece in enumerate(pieces)}
