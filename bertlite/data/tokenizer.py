"""Load, prepare and save tokenizers, which are Hugging Face's and have BERT's five special tokens."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from bertlite.config.settings import TokenizerSettings
from bertlite.core.errors import UserError, first_line
from bertlite.core.files import atomic_folder, fingerprint, lock
from bertlite.core.logging import logger
from bertlite.core.trust import check_model_folder
from bertlite.data.masking import Vocabulary
from bertlite.data.tokenizer_trust import check_tokenizer
from bertlite.data.vocabulary import (
    SPECIAL_TOKENS,
    build_word_piece,
    choose_new_tokens,
    extend_vocabulary,
    pad_vocabulary,
    sample_documents,
    train_word_piece,
    with_vocabulary,
)

TOKEN_NAMES = ["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"]  # what transformers calls them
TOKENIZER_FILES = ["*token*.json", "vocab.*", "merges.txt", "*.model", "config.json"]  # of a name on the hub
TRAINER_VERSION = 2  # raise it when the same text would give another vocabulary
EXTENSION_VERSION = 2  # raise it when the same text would extend a vocabulary by other tokens


def load_tokenizer(name: str, lowercase: bool = True, strip_accents: bool | None = None) -> PreTrainedTokenizerBase:
    """Load `vocab.txt`, `tokenizer.json`, a Hugging Face folder or a hub name.

    `lowercase` and `strip_accents` are for `vocab.txt`; the others bring these settings. Raises UserError for a name
    without a tokenizer, and for one that lacks a special token or is not a fast tokenizer.
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
        check_tokenizer(path if path.exists() else Path(snapshot_download(name, allow_patterns=TOKENIZER_FILES)))
        if path.is_file() and path.suffix == ".txt":
            tokenizer = wrap_tokenizer(build_word_piece(_read_vocabulary(path), lowercase, strip_accents))
        else:
            tokenizer = _from_file(path) if path.is_file() else _from_folder_or_hub(name, local)
        tokenizer.decode(tokenizer("a [MASK]", verbose=False)["input_ids"])  # some wrong settings raise only here
        if tokenizer.model_max_length < 8:
            raise UserError(f"{name}: model_max_length is {tokenizer.model_max_length}; it should be 8 or more")
    except UserError:
        raise
    except BaseException as error:  # AutoTokenizer raises many types; tokenizers' PanicException is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{name}: no tokenizer could be loaded from it: {first_line(error)}") from None
    if not tokenizer.is_fast:
        raise UserError(f"{name}: the tokenizer has no tokenizer.json; save it by transformers' fast tokenizers first")
    if max(tokenizer.get_vocab().values(), default=-1) >= len(tokenizer):
        raise UserError(f"{name}: the ids of its tokens have gaps; they should be 0 to {len(tokenizer) - 1}")
    added = [*tokenizer.backend_tokenizer.encode("").ids, *tokenizer.backend_tokenizer.encode("", "").ids]
    if max(added, default=-1) >= len(tokenizer):
        raise UserError(
            f"{name}: post_processor: adds the id {max(added)}; the vocabulary has {len(tokenizer):,} tokens"
        )
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
    loaded = None if base is None else load_tokenizer(base, settings.lowercase, settings.strip_accents)
    if loaded is not None and not (settings.extend or settings.special_tokens or settings.pad_to_multiple_of):
        return loaded
    base_key = None if loaded is None else [loaded.backend_tokenizer.to_str(), settings.extend, EXTENSION_VERSION]
    training_key = [settings.vocab_size, settings.lowercase, _choose_stripping(settings),
                    settings.pad_to_multiple_of, settings.train_characters]  # fmt: skip
    folder = (
        cache
        / "tokenizers"
        / fingerprint([TRAINER_VERSION, digest, base_key, [*training_key, *settings.special_tokens]])
    )
    with lock(folder):
        if not folder.exists():
            with atomic_folder(folder) as unfinished:
                _save_prepared(unfinished, loaded, documents, settings)
    tokenizer = load_tokenizer(str(folder))
    logger.info(f"tokenizer: vocabulary of {len(tokenizer):,} ({folder})")
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    """Wrap a tokenizer in transformers' class, which saves files for AutoTokenizer."""
    normalizer = tokenizer.normalizer
    if isinstance(normalizer, normalizers.BertNormalizer) and isinstance(
        tokenizer.pre_tokenizer, pre_tokenizers.BertPreTokenizer
    ):
        options: dict[str, Any] = {"do_lower_case": normalizer.lowercase, "strip_accents": normalizer.strip_accents}
        return BertTokenizer(tokenizer_object=tokenizer, **options)
    return _wrap_other(tokenizer)


def describe_vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Return what masking needs to know about a tokenizer. [UNK] is a special token, as in Hugging Face."""
    special = np.array(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)
    ordinary = np.setdiff1d(np.arange(len(tokenizer), dtype=np.int64), special)
    if not len(ordinary):
        raise UserError("tokenizer: the vocabulary holds nothing but special tokens")
    return Vocabulary(len(tokenizer), tokenizer.mask_token_id, special, ordinary)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer so that transformers 4 and 5 load the same one, as do the programs that build on them.

    Its class is BertTokenizer if that gives the same tokens, else PreTrainedTokenizerFast, which reads tokenizer.json
    as it is. Version 5 itself would write names and fields that version 4 does not know.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("backend", "is_local", "local_files_only", "auto_map"):
        config.pop(name, None)
    if "extra_special_tokens" in config:
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    bert_options = _find_bert_options(tokenizer)
    config |= bert_options or {}
    config["tokenizer_class"] = "PreTrainedTokenizerFast" if bert_options is None else "BertTokenizer"
    path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _find_bert_options(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """Return the options with which BertTokenizer gives the same tokens; None if there are none."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    normalizer, added_tokens = content["normalizer"] or {}, content["added_tokens"]
    if normalizer.get("type") != "BertNormalizer":
        return None
    options = {
        "do_lower_case": normalizer["lowercase"],
        "strip_accents": normalizer["strip_accents"],
        "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
    }
    special = {name: getattr(tokenizer, name) for name in TOKEN_NAMES}
    ids = tokenizer.get_vocab()
    vocabulary = {token: ids[token] for token in special.values()}
    bert = json.loads(BertTokenizer(vocabulary, **options, **special).backend_tokenizer.to_str())
    for tokenizer_content in (content, bert):
        del tokenizer_content["model"]["vocab"], tokenizer_content["added_tokens"]
    # BertTokenizer knows special tokens that are found in the text as they are.
    flags = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    plain = all(token | flags == token for token in added_tokens)
    return options if content == bert and plain else None


def _save_prepared(
    folder: Path,
    loaded: PreTrainedTokenizerBase | None,
    documents: Callable[[], Iterable[str]],
    settings: TokenizerSettings,
) -> None:
    """Save the loaded tokenizer or train one, with the vocabulary that is configured."""
    tokenizer = _train(documents(), settings) if loaded is None else loaded
    special_tokens: dict[str, Any] = {"additional_special_tokens": settings.special_tokens}
    tokenizer.add_special_tokens(special_tokens, replace_extra_special_tokens=False)
    vocabulary = tokenizer.get_vocab()
    if settings.extend:
        _check_word_piece(tokenizer)
        vocabulary = _extend_by_text(vocabulary, tokenizer.backend_tokenizer, documents(), settings)
    if multiple := settings.pad_to_multiple_of:
        vocabulary = pad_vocabulary(vocabulary, multiple)
    save_tokenizer(tokenizer, folder)
    if vocabulary != tokenizer.get_vocab():
        _check_word_piece(tokenizer)
        with_vocabulary(tokenizer.backend_tokenizer, vocabulary).save(str(folder / "tokenizer.json"))
        (folder / "vocab.txt").unlink(missing_ok=True)  # it would hold the old vocabulary


def _choose_stripping(settings: TokenizerSettings) -> bool | None:
    """Return the `strip_accents` of a new tokenizer; None, BERT's rule, where that is the same as `lowercase`.

    So the tokenizers and corpora of cased text, and of text without accents, are those of earlier versions.
    """
    strip = bool(settings.strip_accents)
    return None if strip == settings.lowercase else strip


def _train(documents: Iterable[str], settings: TokenizerSettings) -> PreTrainedTokenizerBase:
    logger.info(f"tokenizer: training a vocabulary of {settings.vocab_size:,}")
    sample = sample_documents(documents, settings.train_characters)
    trained = train_word_piece(
        sample, settings.vocab_size, settings.lowercase, settings.special_tokens, _choose_stripping(settings)
    )
    if trained.get_vocab_size() < settings.vocab_size:
        logger.info(f"tokenizer: the text gives only {trained.get_vocab_size():,} tokens")
    return wrap_tokenizer(trained)


def _extend_by_text(
    vocabulary: dict[str, int], tokenizer: Tokenizer, documents: Iterable[str], settings: TokenizerSettings
) -> dict[str, int]:
    """Add the tokens that the text needs most."""
    logger.info(f"tokenizer: extending a vocabulary of {len(vocabulary):,} by {settings.extend:,}")
    sample = sample_documents(documents, settings.train_characters)
    new_tokens = choose_new_tokens(sample, tokenizer, settings.extend)
    if len(new_tokens) < settings.extend:
        logger.info(f"tokenizer: the text gives only {len(new_tokens):,} new tokens")
    return extend_vocabulary(vocabulary, new_tokens)


def _check_word_piece(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError for a vocabulary that cannot be changed."""
    name = type(tokenizer.backend_tokenizer.model).__name__
    if name != "WordPiece":
        raise UserError(f"tokenizer: a {name} vocabulary cannot be extended or padded, only WordPiece")


def _from_file(path: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer.json of any model type, with BERT's special tokens."""
    tokenizer = Tokenizer.from_file(str(path))
    missing = [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
    if missing:
        raise UserError(f"{path}: the vocabulary lacks {', '.join(missing)}, which masked language modelling needs")
    return _wrap_other(tokenizer)


def _wrap_other(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    """Wrap a tokenizer that is not BERT's, with BERT's special tokens and its way to add them, if it has no own."""
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
