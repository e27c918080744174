"""WordPiece vocabularies: train one on a text, extend one by the words of a text, pad one to a size."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import count as count_up

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from bertlite.core.logging import logger
from bertlite.core.random import TOKENIZER_SAMPLE, draw_uint32

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
UNUSED = re.compile(r"\[unused\d+\]")  # tokens that BERT's vocabularies reserve for their users
CHARACTER_COVERAGE = 0.9999  # of the text; rarer characters become [UNK], which leaves room for longer tokens
TEXTS_PER_BATCH = 1000  # tokenized together; limits the memory
MAX_WORD_CHARACTERS = 100  # BERT's WordPiece makes [UNK] of longer words
# Divides a long word, where another option is [UNK]; the marks of a letter, such as Thai vowels, stay with it.
WORD_PARTS = r".{1,80}\p{M}{0,20}"
_LONG_RUN = re.compile(rf"\S{{{MAX_WORD_CHARACTERS + 1},}}")
MIN_SHARE = 0.001  # of the characters, that long words or decomposed letters have where a new tokenizer minds them


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


def build_word_piece(
    vocabulary: dict[str, int],
    lowercase: bool,
    strip_accents: bool | None = None,
    compose: bool = False,
    divide: bool = False,
) -> Tokenizer:
    """Build BERT's tokenizer: clean, split at punctuation and around Chinese characters, WordPiece.

    `strip_accents` None means BERT's own rule: as `lowercase`. What BERT lacks: `compose` makes one character of a
    letter and its mark where Unicode has it (NFC), and `divide` divides words that are too long for WordPiece.
    """
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_CHARACTERS))
    bert: normalizers.Normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), bert]) if compose else bert
    words: pre_tokenizers.PreTokenizer = pre_tokenizers.BertPreTokenizer()
    parts = pre_tokenizers.Split(Regex(WORD_PARTS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, parts]) if divide else words
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def train_word_piece(
    documents: list[str],
    vocab_size: int,
    lowercase: bool,
    special_tokens: Sequence[str] = (),
    strip_accents: bool | None = None,
) -> Tokenizer:
    """Train BERT's tokenizer on documents. Its vocabulary begins with BERT's special tokens and `special_tokens`.

    The tokenizer composes letters and divides long words only if the documents need it, which is logged: it is no
    longer the one that the name BertTokenizer stands for.
    """
    if special_tokens:  # the letters of those in the text are no words
        pattern = re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))))
        documents = [pattern.sub(" ", document) for document in documents]
    compose = _share_of_decomposed(documents) > MIN_SHARE and not (
        lowercase if strip_accents is None else strip_accents
    )
    untrained = build_word_piece({"[UNK]": 0}, lowercase, strip_accents, compose)
    long_words = [word for document in documents for word in find_long_words(document, untrained)]
    divide = sum(map(len, long_words)) > MIN_SHARE * sum(map(len, documents))
    if compose:
        logger.info("tokenizer: letters and marks that follow them are composed (NFC), as the text has both forms")
    if divide:
        logger.info(
            f"tokenizer: words of more than {MAX_WORD_CHARACTERS} characters, such as {long_words[0][:20]}…, are "
            "divided, or they would be unknown"
        )
    untrained = build_word_piece({"[UNK]": 0}, lowercase, strip_accents, compose, divide)
    first_tokens = list(dict.fromkeys([*SPECIAL_TOKENS, *special_tokens]))
    vocabulary = train_vocabulary(documents, vocab_size, untrained, first_tokens)
    return build_word_piece(vocabulary, lowercase, strip_accents, compose, divide)


def find_long_words(text: str, tokenizer: Tokenizer) -> Iterator[str]:
    """Find the words of a text of which the tokenizer makes [UNK] because of their length."""
    for run in _LONG_RUN.findall(text):
        words = [(run, (0, 0))]
        if tokenizer.pre_tokenizer is not None:
            words = tokenizer.pre_tokenizer.pre_tokenize_str(_normalize(run, tokenizer))
        yield from (word for word, _ in words if len(word) > MAX_WORD_CHARACTERS)


def strips_marks(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer makes e of é."""
    return "é" not in unicodedata.normalize("NFC", _normalize("é", tokenizer))


def find_marked_letters(text: str) -> tuple[int, Counter[str]]:
    """Count the letters of a text, and which of them have a mark that stripping removes, such as é and न्."""
    letters, marked, last = 0, Counter[str](), ""
    for character in unicodedata.normalize("NFD", text):
        category = unicodedata.category(character)
        if category == "Mn" and last:
            marked[unicodedata.normalize("NFC", last + character)] += 1
        last = character if category.startswith("L") else ""  # a second mark of a letter does not count again
        letters += bool(last)
    return letters, marked


def _share_of_decomposed(documents: list[str]) -> float:
    """Return the share of the characters that composing letters and marks would save."""
    total = sum(map(len, documents))
    saved = (len(text) - len(unicodedata.normalize("NFC", text)) for text in documents if not text.isascii())
    return sum(number for number in saved if number > 0) / max(1, total)


def train_vocabulary(
    documents: list[str], vocab_size: int, splitter: Tokenizer, special_tokens: list[str]
) -> dict[str, int]:
    """Train a WordPiece vocabulary (Devlin et al. 2018, section 3), the same in every process.

    The words are those of `splitter`, a tokenizer whose normalizer and pre-tokenizer alone are used. The library would
    number the tokens that continue a word in the order of a hash map, and break ties by these numbers. Passing them as
    special tokens fixes their order.
    """
    alphabet = _alphabet(documents, vocab_size - len(special_tokens), splitter)
    continuing = [f"##{character}" for character in alphabet if _continues_words(character, splitter)]
    tokenizer = _with_splitter_of(splitter, models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.train_from_iterator(
        documents,
        trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=special_tokens + continuing,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            continuing_subword_prefix="##",
            show_progress=False,
        ),
    )
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return {token: number for number, (token, _) in enumerate(tokens)}


def choose_new_tokens(documents: list[str], tokenizer: Tokenizer, count: int) -> list[str]:
    """Choose at most `count` tokens to extend a WordPiece tokenizer by: those that occur most often in the documents.

    The candidates are the tokens that a vocabulary uses which is trained on the words that the tokenizer makes of the
    documents. Its size is the tokenizer's or, if that gives too few, a multiple of it.
    """
    old = tokenizer.get_vocab()
    for size in count_up(len(old), step=len(old)):
        vocabulary = train_vocabulary(documents, size, tokenizer, SPECIAL_TOKENS)
        trained = _with_splitter_of(tokenizer, models.WordPiece(vocabulary, unk_token="[UNK]"))
        candidates = [token for token, _ in _most_frequent_first(_count_tokens(documents, trained)) if token not in old]
        chosen = _choose_occurring(candidates, documents, tokenizer, count)
        if len(chosen) == count or len(vocabulary) < size:
            break
    return chosen


def _choose_occurring(candidates: list[str], documents: list[str], tokenizer: Tokenizer, count: int) -> list[str]:
    """Choose the first `count` candidates that occur in the documents when all of them extend the tokenizer.

    Others do not: WordPiece prefers longer tokens, and added tokens such as [E1] are not split.
    """
    while True:
        chosen = candidates[:count]
        counts = _count_tokens(documents, with_vocabulary(tokenizer, extend_vocabulary(tokenizer.get_vocab(), chosen)))
        dead = {token for token in chosen if not counts[token]}
        if not dead:
            return chosen
        candidates = [token for token in candidates if token not in dead]


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


def with_vocabulary(tokenizer: Tokenizer, vocabulary: dict[str, int]) -> Tokenizer:
    """Return a copy of a WordPiece tokenizer with another vocabulary, which has the same added tokens."""
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"] = vocabulary
    return Tokenizer.from_str(json.dumps(content))


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


def _random_numbers() -> Iterator[int]:
    for first in count_up(step=4096):
        yield from draw_uint32(4096, (0, TOKENIZER_SAMPLE), first=first).tolist()


def _with_splitter_of(splitter: Tokenizer, model: models.Model) -> Tokenizer:
    """Return a tokenizer with the normalizer and the pre-tokenizer of another one, which may lack either."""
    tokenizer = Tokenizer(model)
    if splitter.normalizer is not None:
        tokenizer.normalizer = splitter.normalizer
    if splitter.pre_tokenizer is not None:
        tokenizer.pre_tokenizer = splitter.pre_tokenizer
    return tokenizer


def _count_tokens(documents: list[str], tokenizer: Tokenizer) -> Counter[str]:
    """Count how often each token occurs in the documents."""
    counts: Counter[int] = Counter()  # of ids, which alone the fast encoding has
    for start in range(0, len(documents), TEXTS_PER_BATCH):
        texts = documents[start : start + TEXTS_PER_BATCH]
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            counts.update(encoding.ids)
    return Counter({token: counts[number] for token, number in tokenizer.get_vocab().items() if number in counts})


def _alphabet(documents: Iterable[str], room: int, splitter: Tokenizer) -> list[str]:
    """Choose the most frequent characters that cover the text and fit into `room` places, sorted."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(_normalize(document, splitter))
    counts = Counter({character: count for character, count in counts.items() if not character.isspace()})
    alphabet: list[str] = []
    remaining = counts.total()
    for character, count in _most_frequent_first(counts):
        room -= 1 + _continues_words(character, splitter)
        if room < 0 or remaining <= counts.total() * (1 - CHARACTER_COVERAGE):
            break
        alphabet.append(character)
        remaining -= count
    return sorted(alphabet)


def _normalize(text: str, splitter: Tokenizer) -> str:
    return text if splitter.normalizer is None else splitter.normalizer.normalize_str(text)


def _continues_words(character: str, splitter: Tokenizer) -> bool:
    """Return whether a character may continue a word: BERT's punctuation and Chinese characters may not."""
    text = _normalize("a" + character, splitter)
    return splitter.pre_tokenizer is None or len(splitter.pre_tokenizer.pre_tokenize_str(text)) == 1


def _most_frequent_first(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
