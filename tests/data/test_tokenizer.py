"""Tokenizers are the same in every process and the same as Hugging Face's, from every kind of file."""

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import SHARED
from tiny_tokenizers import make_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    DataCollatorForLanguageModeling,
    DistilBertTokenizer,
    PreTrainedTokenizerFast,
)

from bertlite.config.settings import Source, TokenizerSettings
from bertlite.core.errors import UserError
from bertlite.data.sources import read_documents
from bertlite.data.tokenizer import (
    describe_vocabulary,
    load_tokenizer,
    prepare_tokenizer,
    save_tokenizer,
    wrap_tokenizer,
)
from bertlite.data.vocabulary import SPECIAL_TOKENS, build_word_piece, choose_new_tokens, train_word_piece
from bertlite.data.words import mark_word_starts

VOCABULARIES = {name: SHARED / "vocab" / name for name in ("bert-base-uncased", "bert-base-chinese")}
needs_vocabularies = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
ODD_TEXT = [
    "Héllo WORLD, isn't it? naïve café ÅNGSTRÖM",
    "東京は日本の首都です。北京是中华人民共和国的首都,人口2189万。",
    "a[MASK]b [MASK] [SEP] [UNK] [mask]",
    "tabs\tnew\nlines\r\nnul\x00 zero\u200bwidth \ufeff soft\u00adhyphen  two  blanks",
    "🙂🙃 emoji; e\u0301 combining; ﬁ ligature; Ⅷ; ½; 1e-4; C++; 100%; foo_bar; x=y; ##ing",
    "antidisestablishmentarianism" * 5,
    "   ",
]


def read(path: Path | str, document: str, count: int | None = None) -> list[str]:
    """The first documents of a file."""
    return list(islice(read_documents(Source(path=str(path)), document, "data.train"), count))


@cache
def real_text() -> list[str]:
    """Lines of the sample and, where they are, of Wikipedia and PubMed, and what is odd."""
    paths = [SHARED / "pretrain" / f"{name}_valid.txt" for name in ("enwiki", "pubmed", "zhwiki")]
    lines = [
        line for path in ["sample", *paths] if path == "sample" or path.exists() for line in read(path, "line", 40)
    ]
    return lines + ODD_TEXT


def same_ids(first, second) -> None:
    """Equal ids, types and masks for single texts and for pairs."""
    texts = real_text()
    mates = random.Random(0).sample(texts, len(texts))
    for pair in (None, mates):
        left, right = first(texts, pair), second(texts, pair)
        assert left["input_ids"] == right["input_ids"]
        assert left["token_type_ids"] == right["token_type_ids"]
        assert left["attention_mask"] == right["attention_mask"]


def first_of_the_sample() -> list[str]:
    return read("sample", "blank-line", 20)


def never():
    raise AssertionError("the text was read")


@pytest.fixture(scope="module", params=[True, False], ids=["uncased", "cased"])
def trained(request, tmp_path_factory):
    """A tokenizer trained on a part of the sample, and whether it lower-cases."""
    chosen = TokenizerSettings(vocab_size=3000, lowercase=request.param)
    cache = tmp_path_factory.mktemp("tokenizers")
    return prepare_tokenizer(chosen, None, first_of_the_sample, "sample", cache), request.param


def test_training_is_the_same_in_every_process():
    """Whatever the seeds of Python's and Rust's hash maps, and the number of threads."""
    program = """
import hashlib
from itertools import islice
from bertlite.config.settings import Source
from bertlite.data.sources import read_documents
from bertlite.data.vocabulary import train_word_piece

documents = list(islice(read_documents(Source(path="sample"), "blank-line", "data.train"), 8))
for lowercase in (True, False):
    print(hashlib.sha256(train_word_piece(documents, 800, lowercase).to_str().encode()).hexdigest())
"""
    here = [train_word_piece(first_of_the_sample()[:8], 800, lowercase).to_str() for lowercase in (True, False)]
    assert here[0] != here[1]
    for seed, threads in [("1", "1"), ("2", "4")]:
        environment = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        output = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True, timeout=120)
        assert output.split() == [hashlib.sha256(text.encode()).hexdigest() for text in here]


def test_training_does_not_depend_on_the_order_of_ties():
    """Every word is as frequent as every other, so each merge is a tie."""
    words = [first + second for first in "abcdefghijklmnop" for second in "qrstuvwxyz"]
    texts = {train_word_piece([" ".join(words * 2)], 120, True).to_str() for _ in range(5)}
    assert len(texts) == 1


def test_special_tokens_come_first(trained):
    tokenizer, _ = trained
    assert tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) == [0, 1, 2, 3, 4]
    assert [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id] == [0, 1, 2]
    assert [tokenizer.sep_token_id, tokenizer.mask_token_id] == [3, 4]
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_saved_folder_gives_the_same_ids_with_auto_tokenizer(trained, tmp_path):
    tokenizer, _ = trained
    tokenizer.save_pretrained(tmp_path)
    same_ids(tokenizer, AutoTokenizer.from_pretrained(tmp_path))


def test_trained_vocabulary_gives_the_same_ids_with_bert_tokenizer(trained, tmp_path):
    """Google's and Hugging Face's own splitting, from the list of tokens; as a file and as a folder."""
    tokenizer, lowercase = trained
    pieces = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    reference = BertTokenizer.from_pretrained(tmp_path, do_lower_case=lowercase, strip_accents=False)
    same_ids(tokenizer, reference)
    same_ids(load_tokenizer(str(tmp_path), lowercase, False), reference)
    same_ids(load_tokenizer(str(tmp_path / "vocab.txt"), lowercase, False), reference)


def test_case_is_kept_or_not(trained):
    tokenizer, lowercase = trained
    assert (tokenizer("The State")["input_ids"] == tokenizer("the state")["input_ids"]) == lowercase
    assert tokenizer.tokenize("the") == ["the"]


def test_the_vocabulary_covers_its_text_and_is_used(trained):
    tokenizer, _ = trained
    ids = [number for text in tokenizer(first_of_the_sample())["input_ids"] for number in text]
    assert ids.count(tokenizer.unk_token_id) / len(ids) < 0.001
    assert len(set(ids)) > 0.8 * len(tokenizer)
    assert len(tokenizer) == 3000


def test_chinese_characters_are_tokens_of_their_own():
    text = "北京是中华人民共和国的首都。"
    tokenizer = wrap_tokenizer(train_word_piece([text, "人口 2189 万, in Beijing"], 200, True))
    assert tokenizer.tokenize(text) == list(text)
    assert tokenizer.tokenize("在Beijing北京") == ["[UNK]", *tokenizer.tokenize("beijing"), "北", "京"]
    assert not any(piece.startswith("##") and piece[2:] in text for piece in tokenizer.get_vocab())


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "pretrain" / "zhwiki_valid.txt").exists(), reason="needs ../shared/data")
def test_chinese_wikipedia_has_few_unknown_tokens():
    train, valid = (SHARED / "pretrain" / f"zhwiki_{name}" for name in ("train.txt.xz", "valid.txt"))
    tokenizer = wrap_tokenizer(train_word_piece(read(train, "line", 6_000), 21_128, True))
    assert len(tokenizer) <= 21_128
    ids = [number for text in tokenizer(read(valid, "line"))["input_ids"] for number in text]
    assert ids.count(tokenizer.unk_token_id) / len(ids) < 0.005


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("size", [6, 7, 8, 9, 50, 300, 1000])
def test_vocabulary_is_no_larger_than_asked(size, lowercase):
    """Also where the text has more characters than the vocabulary has room."""
    alphabet = (
        "".join(map(chr, range(0x4E00, 0x4E00 + 2000))) + "abcdefghijklmnopqrstuvwxyzéß АБВ абв हिन्दी ไทย العربية"
    )
    trained = train_word_piece([alphabet, "the theme of them " * 20], size, lowercase)
    assert trained.get_vocab_size() <= size
    assert [trained.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert sorted(trained.get_vocab().values()) == list(range(trained.get_vocab_size()))


@settings(deadline=None, max_examples=50)
@given(
    documents=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=50), max_size=5),
    size=st.integers(6, 60),
    lowercase=st.booleans(),
)
def test_any_text_trains_a_vocabulary_of_at_most_that_size(documents, size, lowercase):
    trained = train_word_piece(documents, size, lowercase)
    assert 5 <= trained.get_vocab_size() <= size
    assert [trained.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert trained.to_str() == train_word_piece(documents, size, lowercase).to_str()


def test_frequent_characters_come_first():
    text = "e " * 100 + "q " * 3 + "t " * 50
    pieces = train_word_piece([text], 9, True).get_vocab()
    assert set(pieces) == {*SPECIAL_TOKENS, "e", "##e", "t", "##t"}


def test_a_vocabulary_of_special_tokens_alone_is_refused():
    with pytest.raises(UserError, match=r"tokenizer.*special tokens"):
        describe_vocabulary(wrap_tokenizer(train_word_piece(["", " \n"], 100, True)))


# Loading


@needs_vocabularies
@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("name", VOCABULARIES)
def test_vocab_txt_gives_hugging_faces_ids(name, lowercase, tmp_path):
    """As a file, and as a folder that holds nothing else."""
    source = VOCABULARIES[name] / "vocab.txt"
    (tmp_path / "vocab.txt").write_bytes(source.read_bytes())
    reference = BertTokenizer.from_pretrained(tmp_path, do_lower_case=lowercase)
    same_ids(load_tokenizer(str(source), lowercase), reference)
    same_ids(load_tokenizer(str(tmp_path), lowercase), reference)


@needs_vocabularies
def test_tokenizer_json_gives_hugging_faces_ids():
    folder = VOCABULARIES["bert-base-uncased"]
    reference = BertTokenizer.from_pretrained(folder, do_lower_case=True)  # 5.0 did not by itself
    same_ids(load_tokenizer(str(folder / "tokenizer.json")), reference)


@needs_vocabularies
@pytest.mark.parametrize("name", VOCABULARIES)
def test_published_folder_gives_hugging_faces_ids(name):
    """bert-base-uncased holds tokenizer.json and vocab.txt, bert-base-chinese vocab.txt alone."""
    reference = BertTokenizer.from_pretrained(VOCABULARIES[name], do_lower_case=True)
    same_ids(load_tokenizer(str(VOCABULARIES[name])), reference)


def test_saved_folder_loads_and_says_its_own_case(trained, tmp_path):
    """`lowercase` counts for a bare vocab.txt alone."""
    tokenizer, lowercase = trained
    tokenizer.save_pretrained(tmp_path)
    for name in (str(tmp_path), str(tmp_path / "tokenizer.json")):
        loaded = load_tokenizer(name, not lowercase)
        same_ids(tokenizer, loaded)
        assert loaded.mask_token_id == 4 and loaded.is_fast


def test_a_folder_of_tokenizer_json_alone_gives_the_same_ids(trained, tmp_path):
    """transformers does not know what such a folder is; its case and special tokens are in the file."""
    tokenizer, lowercase = trained
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path), not lowercase)
    same_ids(tokenizer, loaded)
    assert loaded.convert_tokens_to_ids(SPECIAL_TOKENS) == [0, 1, 2, 3, 4] and loaded.mask_token_id == 4


def with_byte_pairs() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer.train_from_iterator(first_of_the_sample(), trainer)
    return tokenizer


def with_a_unigram_model() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIAL_TOKENS, unk_token="[UNK]", show_progress=False
    )
    tokenizer.train_from_iterator(first_of_the_sample(), trainer)
    return tokenizer


def with_another_normalizer() -> Tokenizer:
    tokenizer = build_word_piece(
        {piece: number for number, piece in enumerate([*SPECIAL_TOKENS, "the", "##s", "1"])}, False
    )
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


@pytest.mark.parametrize("make", [with_byte_pairs, with_a_unigram_model, with_another_normalizer])
def test_a_tokenizer_json_of_any_kind_is_saved_as_it_is(make, tmp_path):
    """What a run folder holds in the end gives the ids that the model was trained on."""
    backend = make()
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    loaded.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in [*real_text(), "①"]:
        ids = backend.encode(text, add_special_tokens=False).ids
        assert loaded(text, add_special_tokens=False)["input_ids"] == ids
        assert saved(text, add_special_tokens=False)["input_ids"] == ids


def with_accents() -> Tokenizer:
    tokenizer = build_word_piece(LETTERS, True)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    return tokenizer


def without_splitting_chinese() -> Tokenizer:
    tokenizer = build_word_piece(LETTERS, False)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, handle_chinese_chars=False)
    return tokenizer


def with_a_token_found_after_lowercasing() -> Tokenizer:
    tokenizer = build_word_piece(LETTERS, True)
    tokenizer.add_tokens([AddedToken("e-mail", normalized=True)])
    return tokenizer


def with_long_words() -> Tokenizer:
    tokenizer = build_word_piece({}, True)
    tokenizer.model = models.WordPiece(LETTERS, unk_token="[UNK]", max_input_chars_per_word=200)
    return tokenizer


CHARACTERS = sorted(set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZéÉäöüßÖ北京é,.'-?"))
LETTERS = {
    token: number
    for number, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS, *(f"##{character}" for character in CHARACTERS)])
}


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: build_word_piece(LETTERS, True), "BertTokenizer"),
        (with_accents, "BertTokenizer"),
        (without_splitting_chinese, "BertTokenizer"),
        (with_another_normalizer, "PreTrainedTokenizerFast"),
        (with_byte_pairs, "PreTrainedTokenizerFast"),
        (with_a_token_found_after_lowercasing, "PreTrainedTokenizerFast"),
        (with_long_words, "PreTrainedTokenizerFast"),
    ],
)
def test_a_saved_folder_names_a_class_that_transformers_4_and_5_know(make, expected, tmp_path):
    """And AutoTokenizer, which rebuilds a BertTokenizer from its options, gives the same ids."""
    make().save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    save_tokenizer(loaded, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == expected
    assert not config.keys() & {"backend", "is_local", "local_files_only", "extra_special_tokens"}
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    same_ids(loaded, saved)
    assert loaded("Größe É 北京 e-mail E-Mail " + "a" * 150) == saved("Größe É 北京 e-mail E-Mail " + "a" * 150)


def test_a_tokenizer_of_another_class_with_berts_pipeline_is_saved_as_berts(tmp_path):
    """DistilBERT's, which as such gives no token types, so that pairs would be read as one text."""
    backend = build_word_piece(LETTERS, True)
    DistilBertTokenizer(backend.get_vocab()).save_pretrained(tmp_path / "theirs")
    loaded = load_tokenizer(str(tmp_path / "theirs"))
    save_tokenizer(loaded, tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    ours = [loaded.backend_tokenizer.encode(*pair) for pair in (("Größe", "É 北京"), ("a", "b"))]
    assert saved(["Größe", "a"], ["É 北京", "b"])["input_ids"] == [encoding.ids for encoding in ours]
    assert saved(["Größe", "a"], ["É 北京", "b"])["token_type_ids"] == [encoding.type_ids for encoding in ours]


def test_windows_line_ends_in_vocab_txt_are_not_part_of_the_tokens(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes("\r\n".join([*SPECIAL_TOKENS, "the", "##s", ""]).encode())
    assert load_tokenizer(str(path))("thes the")["input_ids"] == [2, 5, 6, 5, 3]


def test_special_tokens_anywhere_in_vocab_txt(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["the", "[MASK]", "a", "[SEP]", "[PAD]", "[CLS]", "[UNK]"]), encoding="utf-8")
    tokenizer = load_tokenizer(str(path))
    assert tokenizer("the zebra [MASK]", "a")["input_ids"] == [5, 0, 6, 1, 3, 2, 3]
    vocabulary = describe_vocabulary(tokenizer)
    assert vocabulary.size == 7 and vocabulary.mask_id == 1
    assert vocabulary.special_ids.tolist() == [1, 3, 4, 5, 6] and vocabulary.ordinary_ids.tolist() == [0, 2]


def test_a_tokenizers_own_truncation_and_padding_are_switched_off(trained, tmp_path):
    backend = Tokenizer.from_str(trained[0].backend_tokenizer.to_str())
    backend.enable_truncation(8)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    for text in ("short", "a long text " * 20):
        assert loaded.backend_tokenizer.encode(text).ids == trained[0].backend_tokenizer.encode(text).ids


def test_masking_knows_special_and_ordinary_ids(trained):
    tokenizer, _ = trained
    vocabulary = describe_vocabulary(tokenizer)
    assert vocabulary.size == len(tokenizer) and vocabulary.mask_id == tokenizer.mask_token_id
    assert vocabulary.special_ids.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(vocabulary.ordinary_ids, np.arange(5, len(tokenizer)))


def test_added_special_tokens_are_special_too(trained, tmp_path):
    trained[0].save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.add_special_tokens({"additional_special_tokens": ["[E1]", "[E2]"]})
    size = len(trained[0])
    vocabulary = describe_vocabulary(tokenizer)
    assert vocabulary.size == size + 2
    assert vocabulary.special_ids.tolist() == [0, 1, 2, 3, 4, size, size + 1]
    assert vocabulary.ordinary_ids.max() == size - 1


# As configured


WORDS = "alpha beta gamma delta"
DOMAIN = "zyloprim zyloprim qoph betamax kappa " * 5


@pytest.fixture
def base(tmp_path):
    """The folder of a small tokenizer that knows every letter, four words and two unused places."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*SPECIAL_TOKENS, "[unused0]", *WORDS.split(), "[unused1]", *letters, *(f"##{sign}" for sign in letters)]
    make_tokenizer(pieces).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_the_same_text_and_settings_train_once(tmp_path, capfd):
    def texts():
        return iter(["some words and some more words"] * 3)

    chosen = TokenizerSettings(vocab_size=60)
    first = prepare_tokenizer(chosen, None, texts, ["digest"], tmp_path)
    assert "training a vocabulary of 60" in capfd.readouterr().err
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("tokenizers/*/*")}
    again = prepare_tokenizer(chosen, None, never, ["digest"], tmp_path)
    assert "training" not in capfd.readouterr().err
    assert files and {path: path.stat().st_mtime_ns for path in tmp_path.glob("tokenizers/*/*")} == files
    assert again.backend_tokenizer.to_str() == first.backend_tokenizer.to_str()

    others = [
        (["digest"], {"vocab_size": 59}),
        (["digest"], {"lowercase": False}),
        (["digest"], {"strip_accents": True}),
        (["digest"], {"train_characters": 40}),
        (["digest"], {"pad_to_multiple_of": 7}),
        (["other"], {}),
        (["digest", "other"], {}),
    ]
    for digest, changes in others:
        wanted = TokenizerSettings(**{"vocab_size": 60, **changes})
        with pytest.raises(AssertionError, match="was read"):
            prepare_tokenizer(wanted, None, never, digest, tmp_path)
        prepare_tokenizer(wanted, None, texts, digest, tmp_path)
        assert "training" in capfd.readouterr().err
    assert len(list(tmp_path.glob("tokenizers/[!.]*"))) == 1 + len(others)


def test_training_that_fails_leaves_nothing_behind(tmp_path):
    def broken():
        yield "some text"
        raise UserError("bad line")

    chosen = TokenizerSettings(vocab_size=60)
    with pytest.raises(UserError, match="bad line"):
        prepare_tokenizer(chosen, None, broken, ["digest"], tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert len(prepare_tokenizer(chosen, None, lambda: iter(["some text"]), ["digest"], tmp_path)) > 5


def test_training_sees_no_more_characters_than_asked(tmp_path):
    texts = [f"{chr(ord('a') + number)} " * 100 for number in range(20)]
    letters = []
    for characters in (200, 1000, 10**6):
        chosen = TokenizerSettings(vocab_size=100, train_characters=characters)
        tokenizer = prepare_tokenizer(chosen, None, lambda: iter(texts), "digest", tmp_path)
        letters.append(sum(len(piece) == 1 for piece in tokenizer.get_vocab()))
    assert letters[0] == 1 < letters[1] <= 5 and letters[2] == 20


@pytest.mark.parametrize("multiple", [1, 7, 64])
def test_a_trained_vocabulary_is_padded(multiple, tmp_path):
    def texts():
        return [WORDS * 3]

    plain = prepare_tokenizer(TokenizerSettings(vocab_size=50), None, texts, "digest", tmp_path).get_vocab()
    chosen = TokenizerSettings(vocab_size=50, pad_to_multiple_of=multiple)
    tokenizer = prepare_tokenizer(chosen, None, texts, "digest", tmp_path)
    vocabulary = tokenizer.get_vocab()
    assert len(tokenizer) == -(-len(plain) // multiple) * multiple
    assert sorted(vocabulary.values()) == list(range(len(tokenizer))) and plain.items() <= vocabulary.items()
    assert all(piece.startswith("[unused") for piece in vocabulary.keys() - plain.keys())
    assert describe_vocabulary(tokenizer).special_ids.tolist() == [0, 1, 2, 3, 4]


def test_a_given_tokenizer_is_used_as_it_is(base, tmp_path):
    """Neither the text nor the settings of training reach it, and nothing is kept."""
    tokenizer = prepare_tokenizer(TokenizerSettings(vocab_size=60), base, never, "digest", tmp_path / "cache")
    same_ids(tokenizer, load_tokenizer(base))
    assert not (tmp_path / "cache").exists()


def test_a_given_tokenizer_is_padded_without_the_text(base, tmp_path):
    chosen = TokenizerSettings(pad_to_multiple_of=64)
    tokenizer = prepare_tokenizer(chosen, base, never, "digest", tmp_path / "cache")
    assert len(tokenizer) == 64
    same_ids(tokenizer, load_tokenizer(base))


def test_an_extended_tokenizer_spells_new_words_whole_and_old_ones_as_before(base, tmp_path):
    before = load_tokenizer(base)
    chosen = TokenizerSettings(extend=4)
    after = prepare_tokenizer(chosen, base, lambda: iter([DOMAIN]), "digest", tmp_path / "cache")
    new = {piece: number for piece, number in after.get_vocab().items() if piece not in before.get_vocab()}
    places = [number for piece, number in before.get_vocab().items() if piece.startswith("[unused")]
    assert sorted(new.values()) == [*sorted(places), len(before), len(before) + 1]
    assert after.tokenize("zyloprim qoph") == ["zyloprim", "qoph"]
    assert after.get_vocab()["zyloprim"] == min(places), "the most frequent piece comes first"
    assert after(WORDS)["input_ids"] == before(WORDS)["input_ids"]
    assert after.convert_tokens_to_ids(SPECIAL_TOKENS) == before.convert_tokens_to_ids(SPECIAL_TOKENS)

    saved = AutoTokenizer.from_pretrained(next((tmp_path / "cache" / "tokenizers").glob("[!.]*")))
    assert saved.get_vocab() == after.get_vocab() and saved.tokenize("zyloprim") == ["zyloprim"]


def test_what_was_extended_is_kept_until_something_changes(base, tmp_path):
    def extend(documents, base=base, digest="digest", **changes):
        chosen = TokenizerSettings(**{"extend": 3, **changes})
        return prepare_tokenizer(chosen, base, documents, digest, tmp_path / "cache").get_vocab()

    first = extend(lambda: iter([DOMAIN]))
    assert extend(never) == first
    other = tmp_path / "other"
    wrap_tokenizer(
        build_word_piece(load_tokenizer(base).get_vocab() | {"##ing": len(load_tokenizer(base))}, True)
    ).save_pretrained(other)
    for changes in ({"extend": 2}, {"digest": "other"}, {"base": str(other)}, {"train_characters": 20},
                    {"pad_to_multiple_of": 8}):  # fmt: skip
        with pytest.raises(AssertionError, match="was read"):
            extend(never, **changes)


@pytest.mark.parametrize("changes", [{"extend": 3}, {"pad_to_multiple_of": 8}])
def test_only_word_piece_is_extended_or_padded(changes, tmp_path):
    with_byte_pairs().save(str(tmp_path / "tokenizer.json"))
    special = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    other = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **special)
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"BPE.*WordPiece"):
        chosen = TokenizerSettings(**changes)
        prepare_tokenizer(chosen, str(tmp_path / "base"), lambda: iter([DOMAIN]), "digest", tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_word_piece_without_a_normalizer_is_extended(base, tmp_path):
    """A cased tokenizer of others need not have BERT's normalizer."""
    backend = Tokenizer.from_str(load_tokenizer(base).backend_tokenizer.to_str())
    backend.normalizer = None
    backend.save(str(tmp_path / "tokenizer.json"))
    chosen, path = TokenizerSettings(extend=1), str(tmp_path / "tokenizer.json")
    tokenizer = prepare_tokenizer(chosen, path, lambda: iter([DOMAIN]), "digest", tmp_path / "cache")
    assert tokenizer.tokenize("zyloprim") == ["zyloprim"]


ACCENTS = "Die größte Öffnung möchte Müller, größer als die Größe der Öffnungen im Café. " * 20
CASED = "The HTTP server of Zürich, the FTP servers of Genève and the HTTPS Server. " * 20
CHINESE = "北京大学 在 北京 ， 北京大学 的 学生 。 " * 20
MARKED = "[E1]Zürich[/E1] lies at the [E1]Limmat[/E1], Zürich on the Limmat. " * 20
SPLITTERS = {
    "uncased, which keeps accents": (normalizers.BertNormalizer(lowercase=True, strip_accents=False), ACCENTS),
    "cased, which strips accents": (normalizers.BertNormalizer(lowercase=False, strip_accents=True), CASED),
    "Chinese words": (normalizers.BertNormalizer(lowercase=False, handle_chinese_chars=False), CHINESE),
    "a sequence": (normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]), ACCENTS),
    "decomposed": (normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()]), ACCENTS),
    "as in BERT": (normalizers.BertNormalizer(lowercase=True), CASED),
    "none": (None, CASED),
    "added tokens": (normalizers.BertNormalizer(lowercase=True), MARKED),
}


@pytest.mark.parametrize("count", [5, 30])
@pytest.mark.parametrize("kind", SPLITTERS)
def test_each_token_that_is_added_occurs_in_the_text(kind, count, tmp_path):
    """Whatever the normalizer: transformers finds each of them, and the text has fewer tokens than before."""
    normalizer, text = SPLITTERS[kind]
    backend = build_word_piece(LETTERS, True)
    backend.normalizer = normalizer
    backend.add_special_tokens(["[E1]", "[/E1]"])
    backend.save(str(tmp_path / "tokenizer.json"))
    old = load_tokenizer(str(tmp_path / "tokenizer.json"))
    chosen = TokenizerSettings(extend=count)
    prepare_tokenizer(chosen, str(tmp_path / "tokenizer.json"), lambda: iter([text]), "digest", tmp_path / "cache")
    new = AutoTokenizer.from_pretrained(next((tmp_path / "cache" / "tokenizers").glob("[!.]*")))
    added = new.get_vocab().keys() - old.get_vocab().keys()
    assert 5 <= len(added) <= count
    assert added <= set(new.tokenize(text)) and len(new.tokenize(text)) < len(old.tokenize(text))
    assert new.tokenize(text).count("[E1]") == text.count("[E1]")


def test_a_part_of_words_that_are_known_whole_is_not_added(tmp_path):
    """By itself, a new vocabulary would have the stem of these words, each of which the text has once."""
    known = [f"walk{ending}" for ending in ("ing", "ed", "er", "s", "able", "out", "way", "over", "about")]
    make_tokenizer([*LETTERS, *known]).save_pretrained(tmp_path / "base")
    text = " ".join([*known, "zyloprim zyloprim qoph qoph"])
    assert "walk" in train_word_piece([text], len(LETTERS) + len(known), True).get_vocab()
    chosen = TokenizerSettings(extend=20)
    new = prepare_tokenizer(chosen, str(tmp_path / "base"), lambda: iter([text]), "digest", tmp_path / "cache")
    added = new.get_vocab().keys() - LETTERS.keys() - set(known)
    assert {"zyloprim", "qoph"} <= added <= set(new.tokenize(text))


def test_as_many_tokens_are_added_as_the_text_has(tmp_path):
    """Also to a vocabulary so small that one of its size, trained on the text, has fewer."""
    words = [f"{first}{second}{last}o" for first in "bdfghjvz" for second in "aeiu" for last in "klmnprst"]
    new = choose_new_tokens([" ".join(words * 3)], build_word_piece(LETTERS, True), 400)
    assert set(words) <= set(new)


def test_letters_of_added_tokens_make_no_tokens(tmp_path):
    """Their characters are not those of words, which alone should fill the new places."""
    tokens = [*LETTERS, "[", "]", "##[", "##]", "1", "##1"]
    backend = build_word_piece({token: number for number, token in enumerate(tokens)}, True)
    backend.add_special_tokens(["[entity1]"])
    documents = ["[entity1] the cat"] * 9 + ["zyloprim"] * 3
    new_tokens = choose_new_tokens(documents, backend, 3)
    assert new_tokens == ["cat", "the", "zyloprim"]


@pytest.mark.parametrize("of_existing", [False, True])
def test_special_tokens_are_never_split_and_never_masked(of_existing, base, tmp_path):
    """In the saved folder, too, where transformers' own collator leaves them unmasked."""
    tokens, text = ["[E1]", "[/E1]"], "the [E1]alpha[/E1] and E1"
    chosen = TokenizerSettings(vocab_size=60, special_tokens=tokens)
    documents = [f"{text} {WORDS} " * 5]
    made = prepare_tokenizer(chosen, base if of_existing else None, lambda: iter(documents), "", tmp_path / "cache")
    save_tokenizer(made, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["additional_special_tokens"] == tokens
    for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        pieces = tokenizer.tokenize(text)
        assert pieces[pieces.index("[E1]") :][:3] == ["[E1]", "alpha", "[/E1]"]
        assert set(tokenizer.convert_tokens_to_ids(tokens)) < set(tokenizer.all_special_ids)
        assert not any("[" in token for token in tokenizer.get_vocab() if token not in tokenizer.all_special_tokens
                       and not token.startswith("[unused"))  # fmt: skip
    assert set(made.convert_tokens_to_ids(tokens)) < set(describe_vocabulary(made).special_ids.tolist())
    if not of_existing:
        assert len(made) <= 60 and made.convert_tokens_to_ids(tokens) == [5, 6]
    collate = DataCollatorForLanguageModeling(made, mlm_probability=0.99)
    labels = collate([made(text)])["labels"]
    assert not set(labels.flatten().tolist()) & set(made.convert_tokens_to_ids(tokens))


def test_two_processes_may_train_the_same_at_once(tmp_path):
    """As runs do that are started together and share a cache; here the second begins while the first reads."""
    chosen = TokenizerSettings(vocab_size=60)
    texts = ["some words and some more words"] * 3
    trained = []

    def train(documents):
        trained.append(prepare_tokenizer(chosen, None, documents, ["digest"], tmp_path).backend_tokenizer.to_str())

    second = threading.Thread(target=train, args=[lambda: iter(texts)])

    def starting_the_second():
        if not second.ident:
            second.start()
        second.join(0.5)  # it finishes first, or it waits
        return iter(texts)

    train(starting_the_second)
    second.join()
    assert len(trained) == 2 and trained[0] == trained[1]


# Bad input


def written(name: str, content: str | bytes):
    def write(folder: Path) -> str:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(folder / name)

    return write


def without_mask() -> Tokenizer:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the"]
    tokenizer = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def json_without_mask(folder: Path) -> str:
    without_mask().save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def folder_without_mask(folder: Path) -> str:
    PreTrainedTokenizerFast(
        tokenizer_object=without_mask(),
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
    return str(folder)


def broken_folder(folder: Path) -> str:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "mod')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return str(folder)


def folder_of_a_slow_tokenizer(folder: Path) -> str:
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CanineTokenizer"}')
    return str(folder)


def json_with_a_gap(folder: Path) -> str:
    pieces = {piece: number for number, piece in enumerate([*SPECIAL_TOKENS, "the"])} | {"a": 40}
    tokenizer = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def folder_for_short_texts(folder: Path) -> str:
    tokenizer = make_tokenizer([*SPECIAL_TOKENS, "the"])
    tokenizer.model_max_length = 7
    tokenizer.save_pretrained(folder)
    return str(folder)


ALL = "\n".join(SPECIAL_TOKENS)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: str(folder / "nowhere" / "vocab.txt"), "no such tokenizer"),
        (lambda folder: str(folder / "nowhere.json"), "no such tokenizer"),
        (lambda folder: str(folder / "nowhere"), "no such tokenizer"),
        (lambda folder: "./nowhere", "no such tokenizer"),
        (lambda folder: "nowhere.txt", "no such tokenizer"),
        (lambda folder: str(folder), "no tokenizer in it"),  # it is empty
        (lambda folder: "nobody/has-published-this", "no tokenizer could be loaded"),
        (lambda folder: "nobody-has-published-this", "no tokenizer could be loaded"),
        (lambda folder: "not/a/hub/name", "no tokenizer could be loaded"),
        (written("vocab.txt", "[PAD]\n[CLS]\n[SEP]\n[MASK]\nthe\n"), "[UNK]"),
        (written("vocab.txt", "the\na\n"), "[PAD], [UNK], [CLS], [SEP], [MASK]"),
        (written("vocab.txt", ""), "[PAD], [UNK], [CLS], [SEP], [MASK]"),
        (written("vocab.txt", f"{ALL}\nthe\na\nthe\n"), "duplicate token 'the'"),
        (written("vocab.txt", f"{ALL}\nthe\n[MASK]\n"), "duplicate token '[MASK]'"),
        (written("vocab.txt", f"{ALL}\ncafé".encode("latin-1")), "not UTF-8"),
        (written("tokenizer.json", '{"version": "1.0", "mod'), "no tokenizer could be loaded"),
        (written("tokenizer.json", "{}"), "no tokenizer could be loaded"),
        (written("tokenizer.json", ""), "no tokenizer could be loaded"),
        (written("tokenizer.json", b"\xff\xfe\x00"), "no tokenizer could be loaded"),
        (broken_folder, "no tokenizer could be loaded"),
        (json_without_mask, "mask"),
        (json_with_a_gap, "the ids of its tokens have gaps; they should be 0 to 6"),
        (folder_without_mask, "mask"),
        (folder_of_a_slow_tokenizer, "tokenizer.json"),
        (folder_for_short_texts, "model_max_length is 7; it should be 8 or more"),
    ],
)
def test_what_is_not_a_tokenizer_is_named(make, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = make(tmp_path)
    with pytest.raises(UserError) as caught:
        load_tokenizer(name)
    message = str(caught.value)
    assert name.removeprefix("./") in message and reason.lower() in message.lower()
    assert len(message.splitlines()) == 1


def test_tokens_that_start_words_are_recognized_by_the_marks_of_each_model():
    pieces = ["Ġthe", "the", "▁a", "##b", "[UNK]"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    byte_pairs, word_pieces = models.BPE(vocabulary, []), models.WordPiece(vocabulary, unk_token="[UNK]")
    assert mark_word_starts(Tokenizer(byte_pairs)).tolist() == [True, False, True, False, False]
    assert mark_word_starts(Tokenizer(word_pieces)).tolist() == [True, True, True, False, True]
    assert mark_word_starts(Tokenizer(models.BPE({"a": 0, "b": 1}, []))).all()  # none is marked
