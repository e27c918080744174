"""Load, train, extend and pad tokenizers, which are Hugging Face's and have BERT's five special tokens."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import count as count_up
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from bertlite.config.settings import TokenizerSettings
from bertlite.core.errors import UserError, first_line
from bertlite.core.files import atomic_folder, fingerprint, lock
from bertlite.core.logging import logger
from bertlite.core.random import TOKENIZER_SAMPLE, draw_uint32
from bertlite.core.trust import check_model_folder
from bertlite.data.masking import Vocabulary

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOKEN_NAMES = ["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"]  # what transformers calls them
TRAINER_VERSION = 1  # raise it when the same text would give another vocabulary
UNUSED = re.compile(r"\[unused\d+\]")  # tokens that BERT's vocabularies reserve for their users
CHARACTER_COVERAGE = 0.9999  # of the text; rarer characters become [UNK], which leaves room for longer tokens


def load_tokenizer(name: str, lowercase: bool = True) -> PreTrainedTokenizerBase:
    """Load `vocab.txt`, `tokenizer.json`, a Hugging Face folder or a hub name.

    `lowercase` is for `vocab.txt`; the others bring this setting. Raises UserError for a name without a tokenizer, and
    for one that lacks a special token or is not a fast tokenizer.
    """
    path, local = Path(name), Path(name).is_dir()
    if local:
        check_model_folder(path)
    if local and not (path / "tokenizer_config.json").exists():  # which AutoTokenizer needs
        path = path / ("tokenizer.json" if (path / "tokenizer.json").exists() else "vocab.txt")
    if not path.exists() and (path.suffix in (".txt", ".json") or path.is_absolute() or name.startswith(".")):
        advice = "no tokenizer in it; put its tokenizer.json or vocab.txt there"
        raise UserError(f"{name}: {advice}" if local else f"{path}: no such tokenizer")
    try:
        if path.is_file() and path.suffix == ".txt":
            tokenizer = wrap_tokenizer(build_word_piece(_read_vocabulary(path), lowercase))
        else:
            tokenizer = _from_file(path) if path.is_file() else _from_folder_or_hub(name, local)
        tokenizer.decode(tokenizer("a [MASK]")["input_ids"])  # some wrong settings raise only here
        if tokenizer.model_max_length < 8:
            raise UserError(f"{name}: model_max_length is {tokenizer.model_max_length}; it should be 8 or more")
    except UserError:
        raise
    except Exception as error:  # tokenizers raises no narrower class, and AutoTokenizer raises many
        raise UserError(f"{name}: no tokenizer could be loaded from it: {first_line(error)}") from None
    if not tokenizer.is_fast:
        raise UserError(f"{name}: the tokenizer has no tokenizer.json; save it by transformers' fast tokenizers first")
    if max(tokenizer.get_vocab().values(), default=-1) >= len(tokenizer):
        raise UserError(f"{name}: the ids of its tokens have gaps; they should be 0 to {len(tokenizer) - 1}")
    missing = [name for name in TOKEN_NAMES if getattr(tokenizer, f"{name}_id") is None]
    if missing:
        raise UserError(f"{name}: the tokenizer lacks {', '.join(missing)}, which masked language modelling needs")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def prepare_tokenizer(
    settings: TokenizerSettings, base: str | None, documents: Callable[[], Iterable[str]], digest: Any, cache: Path
) -> PreTrainedTokenizerBase:
    """Train a tokenizer on the documents or load `base`; extend and pad it as configured.

    A trained or changed tokenizer is cached; `digest` identifies its documents. Raises UserError if `base` cannot be
    loaded or changed.
    """
    loaded = None if base is None else load_tokenizer(base, settings.lowercase)
    if loaded is not None and not settings.extend and not settings.pad_to_multiple_of:
        return loaded
    base_key = None if loaded is None else [loaded.backend_tokenizer.to_str(), settings.extend]
    training_key = settings.vocab_size, settings.lowercase, settings.pad_to_multiple_of, settings.train_characters
    folder = cache / "tokenizers" / fingerprint([TRAINER_VERSION, digest, base_key, training_key])
    with lock(folder):
        if not folder.exists():
            with atomic_folder(folder) as unfinished:
                _save_tokenizer(unfinished, loaded, documents, settings)
    tokenizer = load_tokenizer(str(folder))
    logger.info(f"tokenizer: vocabulary of {len(tokenizer):,} ({folder})")
    return tokenizer


def sample_documents(documents: Iterable[str], limit: int) -> list[str]:
    """Choose documents with at most `limit` characters in total at random, the same every time.

    A document is kept while its random number is below a threshold, which is halved whenever the total is too large.
    """
    kept: list[tuple[int, str]] = []
    threshold, characters = 1 << 32, 0
    for random, text in zip(_random_numbers(), documents, strict=False):
        if random < threshold:
            kept.append((random, text))
            characters += len(text)
        while characters > limit and len(kept) > 1:
            threshold //= 2
            kept = [pair for pair in kept if pair[0] < threshold] or [min(kept)]
            characters = sum(len(text) for _, text in kept)
    return [text[:limit] for _, text in kept]


def train_word_piece(documents: list[str], vocab_size: int, lowercase: bool) -> Tokenizer:
    """Train a WordPiece vocabulary (Devlin et al. 2018, section 3), the same in every process.

    The library would number the tokens that continue a word in the order of a hash map, and break ties by these
    numbers. Passing them as special tokens fixes their order.
    """
    alphabet = _alphabet(documents, vocab_size, lowercase)
    continuing = [f"##{character}" for character in alphabet if _continues_words(character, lowercase)]
    tokenizer = build_word_piece({"[UNK]": 0}, lowercase)
    tokenizer.train_from_iterator(
        documents,
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
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return build_word_piece({token: number for number, (token, _) in enumerate(tokens)}, lowercase)


def extend_vocabulary(vocabulary: dict[str, int], new_tokens: list[str]) -> dict[str, int]:
    """Replace [unusedN] tokens, in order of their ids, by new tokens, and append the others."""
    by_id = {number: token for token, number in vocabulary.items()}
    unused_ids = sorted(number for number, token in by_id.items() if UNUSED.fullmatch(token))
    new_ids = [*unused_ids, *range(len(by_id), len(by_id) + len(new_tokens))]
    by_id |= dict(zip(new_ids, new_tokens, strict=False))
    return {by_id[number]: number for number in sorted(by_id)}


def pad_vocabulary(vocabulary: dict[str, int], multiple: int) -> dict[str, int]:
    """Append [unusedN] tokens up to a multiple, so that tokenizer and embedding have the same size."""
    names = (f"[unused{number}]" for number in count_up() if f"[unused{number}]" not in vocabulary)
    padded_size = -(-len(vocabulary) // multiple) * multiple
    return vocabulary | {next(names): number for number in range(len(vocabulary), padded_size)}


def spell_token(token: str, vocabulary: dict[str, int]) -> list[int]:
    """Split a token into ids of a vocabulary that lacks it, longest match first; [] if that is impossible.

    Example: with `un` and `##it` in the vocabulary, `unit` gives the ids of these two.
    """
    text, prefix, ids = token.removeprefix("##"), "##" if token.startswith("##") else "", []
    while text:
        end = next((end for end in range(len(text), 0, -1) if prefix + text[:end] in vocabulary), 0)
        if not end:
            return []
        ids.append(vocabulary[prefix + text[:end]])
        text, prefix = text[end:], "##"
    return ids


def build_word_piece(vocabulary: dict[str, int], lowercase: bool) -> Tokenizer:
    """Build BERT's tokenizer: clean, split at punctuation and around Chinese characters, WordPiece."""
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    """Wrap a tokenizer in transformers' class, which saves files for AutoTokenizer."""
    return BertTokenizer(tokenizer_object=tokenizer, do_lower_case=tokenizer.normalizer.lowercase)


def describe_vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Return what masking needs to know about a tokenizer. [UNK] is a special token, as in Hugging Face."""
    special = np.array(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)
    ordinary = np.setdiff1d(np.arange(len(tokenizer), dtype=np.int64), special)
    if not len(ordinary):
        raise UserError("tokenizer: the vocabulary holds nothing but special tokens")
    return Vocabulary(len(tokenizer), tokenizer.mask_token_id, special, ordinary)


def _save_tokenizer(
    folder: Path,
    loaded: PreTrainedTokenizerBase | None,
    documents: Callable[[], Iterable[str]],
    settings: TokenizerSettings,
) -> None:
    """Save the loaded tokenizer or train one, and change the vocabulary in its files."""
    tokenizer = _train(documents(), settings) if loaded is None else loaded
    tokenizer.save_pretrained(folder)
    if loaded is not None and settings.extend:
        _change_vocabulary(folder, lambda vocabulary: _extend_by_text(vocabulary, loaded, documents(), settings))
    if multiple := settings.pad_to_multiple_of:
        _change_vocabulary(folder, lambda vocabulary: pad_vocabulary(vocabulary, multiple))


def _train(documents: Iterable[str], settings: TokenizerSettings) -> PreTrainedTokenizerBase:
    logger.info(f"tokenizer: training a vocabulary of {settings.vocab_size:,}")
    sample = sample_documents(documents, settings.train_characters)
    tokenizer = wrap_tokenizer(train_word_piece(sample, settings.vocab_size, settings.lowercase))
    if len(tokenizer) < settings.vocab_size:
        logger.info(f"tokenizer: the text gives only {len(tokenizer):,} tokens")
    return tokenizer


def _extend_by_text(
    vocabulary: dict[str, int], loaded: PreTrainedTokenizerBase, documents: Iterable[str], settings: TokenizerSettings
) -> dict[str, int]:
    """Add the new tokens that a tokenizer trained on the documents uses most often."""
    logger.info(f"tokenizer: extending a vocabulary of {len(vocabulary):,} by {settings.extend:,}")
    sample = sample_documents(documents, settings.train_characters)
    lowercase = getattr(loaded.backend_tokenizer.normalizer, "lowercase", False)
    trained = train_word_piece(sample, len(vocabulary), lowercase)
    uses: Counter[str] = Counter()
    for text in sample:
        uses.update(trained.encode(text, add_special_tokens=False).tokens)
    new_tokens = [token for token, _ in _most_frequent_first(uses) if token not in vocabulary]
    if len(new_tokens) < settings.extend:
        logger.info(f"tokenizer: the text gives only {len(new_tokens):,} new tokens")
    return extend_vocabulary(vocabulary, new_tokens[: settings.extend])


def _change_vocabulary(folder: Path, change: Callable[[dict[str, int]], dict[str, int]]) -> None:
    """Change the vocabulary of a saved WordPiece tokenizer."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    if model["type"] != "WordPiece":
        raise UserError(f"tokenizer: a {model['type']} vocabulary cannot be extended or padded, only WordPiece")
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    model["vocab"] = change(model["vocab"] | added)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
    (folder / "vocab.txt").unlink(missing_ok=True)  # it would hold the old vocabulary


def _random_numbers() -> Iterator[int]:
    for first in count_up(step=4096):
        yield from draw_uint32(4096, (0, TOKENIZER_SAMPLE), first=first).tolist()


def _alphabet(documents: Iterable[str], vocab_size: int, lowercase: bool) -> list[str]:
    """Choose the most frequent characters that cover the text and fit into the vocabulary, sorted."""
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(normalizer.normalize_str(document))
    counts = Counter({character: count for character, count in counts.items() if not character.isspace()})
    alphabet: list[str] = []
    free, remaining = vocab_size - len(SPECIAL_TOKENS), counts.total()
    for character, count in _most_frequent_first(counts):
        free -= 1 + _continues_words(character, lowercase)
        if free < 0 or remaining <= counts.total() * (1 - CHARACTER_COVERAGE):
            break
        alphabet.append(character)
        remaining -= count
    return sorted(alphabet)


def _most_frequent_first(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _continues_words(character: str, lowercase: bool) -> bool:
    """Return whether a character may continue a word: punctuation and Chinese characters may not."""
    text = normalizers.BertNormalizer(lowercase=lowercase).normalize_str("a" + character)
    return len(pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text)) == 1


def _from_file(path: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer.json of any model type, with BERT's special tokens."""
    tokenizer = Tokenizer.from_file(str(path))
    missing = [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
    if missing:
        raise UserError(f"{path}: the vocabulary lacks {', '.join(missing)}, which masked language modelling needs")
    if tokenizer.post_processor is None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **dict(zip(TOKEN_NAMES, SPECIAL_TOKENS, strict=True)),
    )


def _from_folder_or_hub(name: str, local: bool) -> PreTrainedTokenizerBase:
    """Load what transformers saved."""
    config, path = Path(name) / "tokenizer_config.json", Path(name) / "tokenizer.json"
    if local and "fast_tokenizer_files" in config.read_text(encoding="utf-8"):
        raise UserError(f"{config}: fast_tokenizer_files names other files; remove it")
    # Some versions of transformers would read the tokenizer_file that tokenizer_config.json names, anywhere.
    tokenizer_file = {"tokenizer_file": str(path)} if path.exists() else {}
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=local, **tokenizer_file)


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:
        tokens = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path}: the vocabulary is not UTF-8") from None
    missing = [token for token in SPECIAL_TOKENS if token not in tokens]
    if missing:
        raise UserError(f"{path}: {len(tokens):,} tokens, without {', '.join(missing)}; add them, one per line")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        token = next(token for token, count in Counter(tokens).items() if count > 1)
        raise UserError(f"{path}: duplicate token {token!r}")
    return vocabulary
