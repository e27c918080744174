"""Text becomes token ids on the disk: complete, once, resumable after a kill, for any content of the files."""

import bz2
import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from itertools import chain, groupby, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import SHARED
from tiny_tokenizers import make_tokenizer

from bertlite.config.settings import DataSettings, Source
from bertlite.core.errors import DataLost, UserError
from bertlite.core.files import lock
from bertlite.data import corpus as corpus_module
from bertlite.data import sources as sources_module
from bertlite.data.corpus import Corpus, cache_folder, prepare_corpus
from bertlite.data.sources import digest_file, find_source_files, read_documents
from bertlite.data.tokenizer import wrap_tokenizer
from bertlite.data.vocabulary import SPECIAL_TOKENS, build_word_piece, train_word_piece

(SAMPLE,) = find_source_files(Source(path="sample"), "data.train")
PRETRAIN = SHARED / "pretrain"
MODES = ["blank-line", "line"]
COMPRESS = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.fixture(scope="module")
def tokenizer():
    """A small tokenizer, trained on English and on some other scripts."""
    text = SAMPLE.read_text(encoding="utf-8")[:100_000]
    return wrap_tokenizer(train_word_piece([text, "日本語 中文 Ünïcode ß абв " * 9], 800, True))


@pytest.fixture
def prepare(tokenizer, tmp_path):
    """Prepare files with the small tokenizer and the test's own cache."""

    def run(*paths, tokenizer=tokenizer, cache=tmp_path / "cache", **settings) -> Corpus:
        data = DataSettings(train=[str(path) for path in paths], cache_dir=str(cache), **settings)
        return prepare_corpus(data.train, tokenizer, data, "data.train")

    return run


def documents_of(path: Path, document: str) -> list[str]:
    return list(read_documents(Source(path=str(path)), document, "data.train"))


def found(*names: str, setting: str = "data.train") -> list[str]:
    return [str(path) for name in names for path in find_source_files(Source(path=name), setting)]


def reference_documents(content: bytes, document: str) -> list[str]:
    """What the documents of one file are, read whole and grouped by blank lines."""
    lines = [line.rstrip("\r\n") for line in content.decode("utf-8").removeprefix("\ufeff").split("\n")]
    if document == "line":
        return [line for line in lines if line.strip()]
    return ["\n".join(group) for blank, group in groupby(lines, key=lambda line: not line.strip()) if not blank]


def encoded(tokenizer, documents) -> list[list[int]]:
    """Token ids, one document at a time, without those that leave none."""
    ids = [tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in documents]
    return [document for document in ids if document]


def read_back(corpus: Corpus) -> list[list[int]]:
    return [corpus.document(index).tolist() for index in range(len(corpus))]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*") if path.is_file()}


def states(folder: Path) -> dict[Path, tuple[int, int]]:
    """What changes when a file is written again."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*") if path.suffix != ".lock"}


# Reading

LINES = st.lists(
    st.tuples(
        st.one_of(
            st.sampled_from(
                [
                    "",
                    "",
                    " ",
                    "\t",
                    "\u3000",
                    "\x0c",
                    "a zero \x00",
                    "\u200b",
                    "a",
                    "The state.",
                    "日本",
                    "[SEP]",
                    "\ufeffa",
                ]
            ),
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\0"), max_size=20),
        ),
        st.sampled_from(["\n", "\n", "\r\n"]),
    ),
    max_size=15,
)
FILES = st.lists(st.tuples(st.booleans(), LINES, st.booleans()), min_size=1, max_size=3)


def as_bytes(byte_order_mark: bool, lines: list[tuple[str, str]], last_line_open: bool) -> bytes:
    text = "".join(line + end for line, end in lines)
    text = ("\ufeff" if byte_order_mark else "") + (text.rstrip("\r\n") if last_line_open else text)
    return text.encode() or b"\n"  # a file without a byte is an error


@pytest.mark.parametrize("document", MODES)
@settings(deadline=None, max_examples=50)
@given(files=FILES, batch_characters=st.sampled_from([1, 10, 1000]), batches_per_sync=st.integers(1, 3))
def test_every_document_is_read_back_in_order(
    document, files, batch_characters, batches_per_sync, tokenizer, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("text")
    paths, expected = [], []
    for number, parts in enumerate(files):
        paths.append(folder / f"{number}.txt")
        paths[-1].write_bytes(as_bytes(*parts))
        expected += reference_documents(as_bytes(*parts), document)
    assert [text for path in paths for text in documents_of(path, document)] == expected
    ids = encoded(tokenizer, expected)
    data = DataSettings(train=[str(path) for path in paths], document=document, cache_dir=str(folder / "cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "BATCH_CHARACTERS", batch_characters)
        patch.setattr(corpus_module, "BATCHES_PER_SYNC", batches_per_sync)
        patch.setattr(
            corpus_module, "_split_text", lambda text: [text]
        )  # a document larger than a batch has its own test
        if not ids:
            with pytest.raises(UserError, match=r"data\.train: .*0\.txt.*no text"):
                prepare_corpus(data.train, tokenizer, data, "data.train")
            return
        corpus = prepare_corpus(data.train, tokenizer, data, "data.train")
    assert read_back(corpus) == ids
    assert corpus.starts[0] == 0 and corpus.starts[-1] == len(corpus.tokens)
    summary = corpus.summary
    assert summary.documents == len(corpus) == len(ids)
    assert summary.read == len(expected) and summary.empty == len(expected) - len(ids)
    assert summary.duplicates == summary.too_short == summary.too_long == 0
    assert sum(summary.source_documents) == len(ids)
    assert summary.tokens == sum(map(len, ids))
    assert summary.bytes == sum(len(text.encode()) for text in expected if encoded(tokenizer, [text]))
    assert summary.unknown_tokens == sum(document.count(tokenizer.unk_token_id) for document in ids)
    pieces = tokenizer.convert_ids_to_tokens(list(chain(*ids)))
    assert summary.words == sum(not piece.startswith("##") for piece in pieces)


@pytest.mark.parametrize("document", MODES)
@pytest.mark.parametrize("name", ["sample", "pubmed_valid.txt"])
def test_a_whole_real_file_is_read_back(name, document, tokenizer, prepare):
    if name != "sample" and not PRETRAIN.exists():
        pytest.skip("needs ../shared/data")
    path = SAMPLE if name == "sample" else PRETRAIN / name
    documents = reference_documents(path.read_bytes(), document)
    assert len(documents) > 100
    corpus = prepare(path, document=document)
    # The reference encodes in one call; that a call's grouping does not matter is tested above.
    encodings = tokenizer.backend_tokenizer.encode_batch(documents, add_special_tokens=False)
    assert len(corpus) == len(documents) and corpus.summary.empty == 0
    assert np.array_equal(corpus.tokens, np.concatenate([encoding.ids for encoding in encodings]))
    assert np.diff(corpus.starts).tolist() == [len(encoding.ids) for encoding in encodings]


@pytest.mark.parametrize("extension", COMPRESS)
@pytest.mark.parametrize("parts", [1, 3])
def test_compressed_text_equals_plain_text(extension, parts, tmp_path, prepare):
    """Also where compressed files were joined by `cat`."""
    text = "".join(f"\ufeffDocument {number}: Ünïcode 日本\r\n\n" for number in range(3000)).encode()
    plain, packed = tmp_path / "text.txt", tmp_path / f"text.txt{extension}"
    plain.write_bytes(text)
    size = -(-len(text) // parts)
    packed.write_bytes(b"".join(COMPRESS[extension](text[at : at + size]) for at in range(0, len(text), size)))
    for document in MODES:
        assert documents_of(packed, document) == documents_of(plain, document)
    assert contents(prepare(packed).folder) == contents(prepare(plain).folder)


def test_a_document_ends_at_the_end_of_its_file(tmp_path):
    for name, text in {"a.txt": "one\ntwo", "b.txt": "three\n\nfour"}.items():
        (tmp_path / name).write_text(text)
    for name in (tmp_path, tmp_path / "*.txt"):
        assert documents_of(name, "blank-line") == ["one\ntwo", "three", "four"]
        assert documents_of(name, "line") == ["one", "two", "three", "four"]


# Finding


def test_globs_are_sorted_and_names_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ["b.txt", "a.txt", "c10.txt", "c9.txt", "deep/er/d.txt", "other.log"]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("text")
    assert found("*.txt") == ["a.txt", "b.txt", "c10.txt", "c9.txt"]
    assert found("other.log", "c?.txt", "a.txt") == ["other.log", "c9.txt", "a.txt"]
    assert found("**/*.txt")[-1] == "deep/er/d.txt"
    assert found("~/a.txt") == [str(tmp_path / "a.txt")]
    assert found("deep") == ["deep/er/d.txt"] and found("~") == found(str(tmp_path)) and len(found("~")) == 6


@pytest.mark.parametrize("name", ["../texts", "../.hidden/texts", ".", "../texts/../texts", "../t*"])
def test_only_what_is_hidden_inside_a_folder_is_left_out(name, tmp_path, monkeypatch):
    """Not what lies in a folder whose own name, or a parent's, begins with a dot."""
    for folder in ("texts", ".hidden/texts"):
        (tmp_path / folder / ".git").mkdir(parents=True)
        for file in ("a.txt", ".b.txt", ".git/c.txt"):
            (tmp_path / folder / file).write_text("text")
    monkeypatch.chdir(tmp_path / "texts")
    assert [Path(path).name for path in found(name)] == ["a.txt"]
    assert [Path(path).name for path in found(str(Path(name).absolute()))] == ["a.txt"]


def test_a_glob_takes_no_file_twice(tmp_path, monkeypatch):
    """Also where it matches a folder and what is in it."""
    monkeypatch.chdir(tmp_path)
    for name in ["a.txt", "deep/b.txt", "deep/er/c.txt"]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("text")
    assert found("*") == ["a.txt", "deep/b.txt", "deep/er/c.txt"]
    assert found("**") == ["a.txt", "deep/b.txt", "deep/er/c.txt"]


def test_the_sample_ships_with_the_package():
    assert SAMPLE.stat().st_size > 1_000_000
    assert len(documents_of("sample", "blank-line")) > 100


def test_a_dataset_has_no_files():
    assert find_source_files(Source(dataset="somebody/something"), "data.train") == []


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("nowhere.txt", "there is no such file"),
        ("folder/nowhere.txt", "there is no such file"),
        ("nowhere/*.txt", "no file matches"),
        ("*.nothing", "no file matches"),
        ("folder", "no"),  # there is nothing in it
        ("fol*", "no file matches"),
        ("other", "empty.txt is empty"),
        ("empty.txt", "is empty"),
        ("e*.txt", "is empty"),
        ("dangling.txt", ""),
        ("circle.txt", ""),
        ("d*.txt", ""),
    ],
)
def test_files_that_are_not_there_are_named(pattern, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "empty.txt").touch()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "dangling.txt").symlink_to("gone.txt")
    (tmp_path / "circle.txt").symlink_to("circle.txt")
    with pytest.raises(UserError) as caught:
        found("text.txt", pattern, setting="data.validation")
    message = str(caught.value)
    named = {"e*.txt": "empty.txt", "d*.txt": "dangling.txt"}.get(pattern, pattern)
    assert message.startswith("data.validation: ") and named in message and reason in message
    assert len(message.splitlines()) == 1


# Bad text


@pytest.mark.parametrize("extension", ["", *COMPRESS])
@pytest.mark.parametrize(
    ("content", "line", "byte", "advice"),
    [
        ("caf\xe9\n".encode("latin-1"), 1, "0xe9", "iconv -f CP1252 -t UTF-8"),
        (b"one\n\ntwo\nthree \xff\n", 4, "0xff", "convert it"),
        (b"\n" * 99 + b"\xc3", 100, "0xc3", "convert it"),
        ("\u5317\u4eac".encode() + b"\xe6\x98\n", 1, "0xe6", "iconv -c -f utf-8 -t utf-8"),
        ("\u8fd9\u662f\u4e2d\u56fd\u7684\u9996\u90fd\n".encode("utf-16"), 1, "0xff", "iconv -f UTF-16 -t UTF-8"),
        ("\u5b66\u4e60\u4e2d\u6587\n".encode("gbk"), 1, "0xd6", "gb18030"),
        ("wide\n".encode("utf-16"), 1, "0xff", "iconv -f UTF-16 -t UTF-8"),
        ("wide\n".encode("utf-16-le"), 1, "0x00", "iconv -f UTF-16LE -t UTF-8"),
        (b"\x7fELF\0\0\n", 1, "0x00", "convert it"),
        (b"ok\n\xed\xa0\x80\n", 2, "0xed", "convert it"),
    ],
)
def test_text_that_is_not_utf_8_is_named_with_its_line(content, line, byte, advice, extension, tmp_path):
    path = tmp_path / f"latin.txt{extension}"
    path.write_bytes(COMPRESS.get(extension, bytes)(content))
    with pytest.raises(UserError) as caught:
        documents_of(path, "blank-line")
    assert str(caught.value).startswith(f"{path}:{line}: not UTF-8") and byte in str(caught.value)
    assert advice in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("extension", COMPRESS)
def test_cut_off_files_are_named(extension, share, tmp_path, prepare):
    """As a download leaves them; even where only the last byte is missing."""
    random = np.random.default_rng(0)
    text = "\n\n".join(" ".join(map(str, random.integers(0, 10**6, 20))) for _ in range(5000)).encode()
    packed = COMPRESS[extension](text)
    path = tmp_path / f"text.txt{extension}"
    path.write_bytes(packed[: max(1, int(len(packed) * share) - 1)])
    with pytest.raises(UserError) as caught:
        documents_of(path, "line")
    assert str(caught.value).startswith(f"{path}: ") and len(str(caught.value).splitlines()) == 1
    with pytest.raises(UserError, match=extension):
        prepare(path)
    assert not list(tmp_path.rglob("corpus.json"))


@pytest.mark.parametrize("extension", COMPRESS)
def test_files_that_are_not_what_their_name_says_are_named(extension, tmp_path):
    path = tmp_path / f"text.txt{extension}"
    path.write_bytes(b"this is plain text\n" * 100)
    with pytest.raises(UserError) as caught:
        documents_of(path, "line")
    assert str(caught.value).startswith(f"{path}: ")


@contextmanager
def without_privileges():
    """The superuser may read everything, so become nobody for a while."""
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(65534)
    try:
        yield
    finally:
        if superuser:
            os.seteuid(0)


@pytest.mark.parametrize(
    "step",
    [lambda path, cache: documents_of(path, "line"), digest_file],
    ids=["reading", "digest"],
)
def test_files_that_may_not_be_read_are_named(step):
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)  # pytest's own folders are closed to others
        (folder / "secret.txt").write_text("text")
        (folder / "secret.txt").chmod(0)
        with without_privileges(), pytest.raises(UserError, match=r"secret\.txt.*[Pp]ermission"):
            step(folder / "secret.txt", folder / "cache")


@pytest.mark.parametrize("text", ["\n", "\n \r\n\t\n\u3000\n", "\ufeff", " \u3000\x00\n\x00\x00\n", "\u200b"])
def test_files_without_text_are_named(text, tmp_path, prepare):
    path = tmp_path / "blank.txt"
    path.write_text(text, encoding="utf-8")
    for _ in range(2):  # what the first attempt left does not count as a corpus
        with pytest.raises(UserError, match=r"data\.train: .*blank\.txt: .*no text"):
            prepare(path)


def test_a_damaged_file_can_be_repaired(tmp_path, prepare, monkeypatch):
    """A failed attempt does not stand in the way of the repaired text."""
    monkeypatch.setattr(corpus_module, "BATCH_CHARACTERS", 10)
    monkeypatch.setattr(corpus_module, "BATCHES_PER_SYNC", 1)
    path = tmp_path / "text.txt"
    good = b"one document\n\n" * 20
    path.write_bytes(good + b"\xff\n" + good)
    with pytest.raises(UserError, match=r"text\.txt:41: "):
        prepare(path)
    path.write_bytes(good + b"mended\n" + good)
    corpus = prepare(path)
    assert len(corpus) == 40
    assert contents(corpus.folder) == contents(prepare(path, cache=tmp_path / "other").folder)


@pytest.mark.parametrize(
    "name, size",
    [("tokens.bin", 10), ("tokens.bin", 11), ("document_starts.bin", 8), ("word_starts.bin", 3), ("tokens.bin", None)],
)
def test_a_truncated_corpus_is_named(name, size, tmp_path, prepare):
    (tmp_path / "text.txt").write_text("one document\n\nanother one")
    settings = {"segmenter": "jieba"} if name == "word_starts.bin" else {}
    corpus = prepare(tmp_path / "text.txt", **settings)
    (corpus.folder / name).unlink() if size is None else os.truncate(corpus.folder / name, size)
    with pytest.raises(DataLost, match=f"{name}: missing or truncated; remove {corpus.folder}, and it will be rebuilt"):
        prepare(tmp_path / "text.txt", **settings)
    os.truncate(corpus.folder / "corpus.json", 10)
    with pytest.raises(DataLost, match=f"{corpus.folder}: damaged .*; remove it, and it will be rebuilt"):
        prepare(tmp_path / "text.txt", **settings)


# The cache


def test_cache_folder_is_the_setting_or_the_environment_or_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BERTLITE_CACHE", str(tmp_path / "environment"))
    assert cache_folder(str(tmp_path / "setting")) == tmp_path / "setting"
    assert cache_folder("~/setting") == tmp_path / "setting"
    assert cache_folder(None) == tmp_path / "environment"
    monkeypatch.delenv("BERTLITE_CACHE")
    assert cache_folder(None) == tmp_path / ".cache" / "bertlite"


def test_unchanged_text_is_tokenized_once(tmp_path, prepare, capsys):
    """Which is logged before it starts, because it may take long."""
    path = tmp_path / "text.txt"
    path.write_text("one document\n\nanother document\n")
    first = prepare(path)
    assert capsys.readouterr().err.startswith("data.train: tokenizing the documents\n")
    before = states(tmp_path)
    again = prepare(path)
    assert "tokenizing" not in capsys.readouterr().err
    assert states(tmp_path) == before
    assert again.folder == first.folder and read_back(again) == read_back(first)


def test_a_new_time_alone_changes_nothing(tmp_path, prepare):
    path = tmp_path / "text.txt"
    path.write_text("one document\n\nanother document\n")
    first = prepare(path)
    before = states(first.folder)
    os.utime(path, (1, 1))
    assert prepare(path).folder == first.folder
    assert states(first.folder) == before


def test_a_moved_file_is_the_same_text(tmp_path, prepare):
    (tmp_path / "a.txt").write_text("one document\n\nanother document\n")
    shutil.copy(tmp_path / "a.txt", tmp_path / "b.txt")
    assert prepare(tmp_path / "a.txt").folder == prepare(tmp_path / "b.txt").folder


@pytest.mark.parametrize("names", [("rows.txt", "rows.jsonl"), ("rows.csv", "rows.tsv")])
def test_a_file_of_another_form_is_another_text(names, tmp_path, prepare):
    """The same bytes are other documents where the name says that they are a table."""
    row = {"rows.txt": '{"text": "one document"}\n', "rows.csv": "text\na,b\tc\n"}[names[0]]
    corpora = []
    for name in names:
        (tmp_path / name).write_text(row)
        with suppress(UserError):
            corpora.append(prepare(tmp_path / name, cache=tmp_path / "cache"))
            alone = prepare(tmp_path / name, cache=tmp_path / f"cache of {name}")
            assert read_back(corpora[-1]) == read_back(alone)
    assert len({corpus.folder for corpus in corpora}) == len(corpora)


def test_a_digest_is_computed_once_from_the_content(tmp_path, monkeypatch):
    path, cache = tmp_path / "abc", tmp_path / "cache"
    path.write_bytes(b"abc")
    digest = digest_file(path, cache)
    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    monkeypatch.setattr(sources_module, "sha256", lambda path: "read again")
    assert digest_file(path, cache) == digest_file(tmp_path / "." / "abc", cache) == digest
    os.utime(path, (1, 1))
    assert digest_file(path, cache) == "read again"


def test_changed_text_is_tokenized_again_and_logged(tmp_path, prepare, capfd):
    path = tmp_path / "text.txt"
    path.write_text("one document\n\nanother document\n")
    first = prepare(path)
    capfd.readouterr()
    path.write_text("one document\n\nanother documents\n")
    second = prepare(path)
    assert second.folder != first.folder
    assert str(path) in capfd.readouterr().err
    path.write_text("two document\n\nanother documents\n")  # the size is the same
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    third = prepare(path)
    assert read_back(first) != read_back(second) != read_back(third) != read_back(first)


def test_every_setting_that_matters_gives_another_corpus(tmp_path, prepare, tokenizer):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("One document\nof two lines\n\nAnother")
    second.write_text("More text")
    other = make_tokenizer([*SPECIAL_TOKENS, "one", "document"])
    cased = wrap_tokenizer(build_word_piece(tokenizer.get_vocab(), False))
    corpora = [
        prepare(first),
        prepare(first, document="line"),
        prepare(first, tokenizer=other),
        prepare(first, tokenizer=cased),
        prepare(first, second),
        prepare(second, first),
        prepare(first, min_characters=8),
        prepare(first, max_characters=8),
        prepare(first, remove_duplicates=True),
        prepare(first, segmenter="jieba"),
    ]
    assert len({corpus.folder for corpus in corpora}) == len(corpora)
    assert [len(corpus) for corpus in corpora] == [2, 3, 2, 2, 3, 3, 1, 1, 2, 2]
    assert read_back(corpora[4]) == read_back(corpora[0]) + read_back(corpora[5])[:1]


def test_other_settings_reuse_the_corpus(tmp_path, prepare, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("One document\n\nAnother")
    folder = prepare(path).folder
    cache_dir = str(tmp_path / "cache")
    for changes in ({"sequence_length": 64}, {"validation_split": 0.5}, {"validation": ["sample"]}):
        assert prepare(path, **changes).folder == folder
    data = DataSettings(train=[{"path": str(path), "weight": 3.0}], cache_dir=cache_dir)
    assert prepare_corpus(data.train, tokenizer, data, "data.train").folder == folder


# What is dropped, and where words begin


@settings(deadline=None, max_examples=50)
@given(
    texts=st.lists(st.lists(st.sampled_from(["a", "a b", "the state", "of the state " * 3, "\x00"]), max_size=12),
                   min_size=1, max_size=3),
    minimum=st.integers(0, 12),
    maximum=st.none() | st.integers(1, 40),
    remove_duplicates=st.booleans(),
    batch_characters=st.sampled_from([40, 1000]),
)  # fmt: skip
def test_documents_are_dropped_as_the_settings_say(
    texts, minimum, maximum, remove_duplicates, batch_characters, tokenizer, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("text")
    seen, kept, by_source = set(), [], []
    for number, lines in enumerate(texts):
        (folder / f"{number}.txt").write_text("\n".join(["the first", *lines]))
        mine = []
        for line in ["the first", *lines]:
            if not (remove_duplicates and line in seen) and minimum <= len(line) <= (maximum or 99) and line != "\x00":
                mine.append(line)
            seen.add(line)
        kept += mine
        by_source.append(len(mine))
    train = [str(folder / f"{number}.txt") for number in range(len(texts))]
    data = DataSettings(
        train=train,
        document="line",
        min_characters=minimum,
        max_characters=maximum,
        remove_duplicates=remove_duplicates,
        cache_dir=str(folder / "cache"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "BATCH_CHARACTERS", batch_characters)
        if not kept:
            with pytest.raises(UserError, match="none kept"):
                prepare_corpus(data.train, tokenizer, data, "data.train")
            return
        corpus = prepare_corpus(data.train, tokenizer, data, "data.train")
    assert read_back(corpus) == encoded(tokenizer, kept)
    summary = corpus.summary
    assert [*summary.source_documents, *[0] * len(texts)][: len(texts)] == by_source
    dropped = summary.empty + summary.duplicates + summary.too_short + summary.too_long
    assert summary.read == sum(map(len, texts)) + len(texts) == summary.documents + dropped


def test_a_segmenter_says_where_words_begin(tmp_path, prepare):
    text = "北京是中华人民共和国的首都，人口 2189 万。 Unbelievable, isn't it?"
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    pieces = sorted({*text.lower(), *(f"##{sign}" for sign in "abcdefghijklmnopqrstuvwxyz0123456789")} - {" "})
    letters = make_tokenizer([*SPECIAL_TOKENS, *pieces])
    plain, corpus = (prepare(tmp_path / "text.txt", tokenizer=letters, segmenter=name) for name in (None, "jieba"))
    assert plain.word_starts is None and read_back(plain) == read_back(corpus)
    words: list[str] = []
    for piece, begins in zip(letters.convert_ids_to_tokens(corpus.document(0)), corpus.word_starts, strict=True):
        if begins:
            words.append("")
        words[-1] += piece.removeprefix("##")
    assert " ".join(words) == "北京 是 中华人民共和国 的 首都 ， 人口 2189 万 。 unbelievable , isn ' t it ?"
    assert corpus.summary.words == len(words) < corpus.summary.tokens


@pytest.mark.parametrize("segmenter", [None, "jieba"])
def test_a_document_larger_than_a_batch_is_cut_where_it_does_not_matter(segmenter, tmp_path, prepare, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text(SAMPLE.read_text(encoding="utf-8")[:20_000].replace("\n\n", "\n"), encoding="utf-8")
    whole = prepare(path, segmenter=segmenter, cache=tmp_path / "whole")
    monkeypatch.setattr(corpus_module, "BATCH_CHARACTERS", 100)
    cut = prepare(path, segmenter=segmenter)
    assert len(whole) == 1 and contents(cut.folder) == contents(whole.folder)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_document_without_white_space_is_cut_anywhere(size, tmp_path, prepare, monkeypatch):
    """Chinese characters are tokens of their own, so that nothing is lost."""
    path = tmp_path / "text.txt"
    path.write_text("日本語中文" * 50, encoding="utf-8")
    whole = prepare(path, cache=tmp_path / "whole")
    monkeypatch.setattr(corpus_module, "BATCH_CHARACTERS", size)
    assert read_back(prepare(path)) == read_back(whole)


@pytest.mark.parametrize(("size", "dtype"), [(65_535, "<u2"), (65_536, "<u2"), (65_537, "<u4"), (70_000, "<u4")])
def test_large_vocabularies_keep_their_ids(size, dtype, tmp_path, prepare):
    pieces = [*SPECIAL_TOKENS, *(f"w{number}" for number in range(5, size))]
    large = make_tokenizer(pieces)
    path = tmp_path / "text.txt"
    path.write_text(f"w5 w{size - 1}\n\nw{size - 2} w32768\n")
    corpus = prepare(path, tokenizer=large)
    assert corpus.tokens.dtype == np.dtype(dtype)
    assert read_back(corpus) == [[5, size - 1], [size - 2, 32768]]


# Interruptions

KILLS = 4

DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path
from bertlite.data import corpus
from bertlite.config.settings import DataSettings
from bertlite.data.tokenizer import load_tokenizer
from bertlite.data.words import segment_with_jieba

settings, vocabulary, cache, attempts = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
corpus.BATCH_CHARACTERS, corpus.BATCHES_PER_SYNC = 4000, 4
data = DataSettings(cache_dir=cache, **settings)
tokenizer = load_tokenizer(vocabulary)
if data.segmenter:
    segment_with_jieba("")  # its dictionary is loaded once, before all attempts

def start():
    child = os.fork()
    if child == 0:
        corpus.prepare_corpus(data.train, tokenizer, data, "data.train")
        os._exit(0)
    return child

def progress():
    found = list(Path(cache).glob("corpora/*/progress.json"))
    return found[0].read_text() if found else ""

seconds = random.Random(0)
for attempt in range(attempts):
    before = progress()
    child = start()
    while progress() == before:  # every attempt gets a little further
        time.sleep(0.002)
    time.sleep(seconds.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "".join(progress().split()), flush=True)
"""


@pytest.mark.parametrize("settings", [{}, {"remove_duplicates": True, "min_characters": 50}, {"segmenter": "jieba"}])
def test_a_killed_process_loses_only_its_last_batches(settings, prepare, tokenizer, tmp_path):
    """The files equal those of an uninterrupted process, and what was synced is not tokenized again."""
    cache = tmp_path / "cut"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = SAMPLE.read_bytes()
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_bytes(text[:60_000].rsplit(b"\n", 1)[0] + "\n北京是中华人民共和国的首都".encode())
    second.write_bytes(
        text[: 120_000 if "segmenter" in settings else 300_000].rsplit(b"\n", 1)[0]
        + b"\x00\nthe very last "
        + b"document " * 5
    )
    settings = {"document": "line", **settings}
    certain = kill_often({"train": [str(first), str(second)], **settings}, tmp_path / "tokenizer", cache)
    assert all(before["read"] < after["read"] for before, after in pairwise(certain))
    (folder,) = (entry for entry in (cache / "corpora").iterdir() if entry.is_dir())
    names = {"tokens.bin", "document_starts.bin"} | ({"word_starts.bin"} if "segmenter" in settings else set())
    for name in names:  # as a crash of the machine may leave them
        with (folder / name).open("ab") as file:
            file.write(b"\xff" * 4097)
    shutil.copytree(cache, tmp_path / "marked")
    with (tmp_path / "marked" / "corpora" / folder.name / "tokens.bin").open("r+b") as file:
        file.write(b"mark")

    undisturbed = prepare(first, second, cache=tmp_path / "whole", **settings)
    assert certain[-1]["read"] < undisturbed.summary.read
    assert undisturbed.summary.duplicates > 50 or "remove_duplicates" not in settings
    finished = prepare(first, second, cache=cache, **settings)
    assert finished.folder == folder
    assert contents(finished.folder) == contents(undisturbed.folder)
    assert set(contents(finished.folder)) == {"corpus.json", *names}
    last = tokenizer("the very last" + " document" * 5, add_special_tokens=False)["input_ids"]
    assert read_back(finished)[-1] == last
    marked = contents(prepare(first, second, cache=tmp_path / "marked", **settings).folder)
    assert marked["tokens.bin"] == b"mark" + contents(finished.folder)["tokens.bin"][4:]


def kill_often(settings: dict, vocabulary: Path, cache: Path) -> list[dict]:
    """Kill tokenising at several moments; return what was certain after each kill."""
    output = subprocess.check_output(
        [sys.executable, "-c", DRIVER, json.dumps(settings), vocabulary, cache, str(KILLS)],
        env={**os.environ, "RAYON_NUM_THREADS": "1"},
        text=True,
        timeout=120,
        stderr=subprocess.DEVNULL,
    )
    kills = [line.split(" ", 1) for line in output.splitlines()]
    assert [code for code, _ in kills] == ["-9"] * KILLS, "killed while it worked"
    return [json.loads(progress) for _, progress in kills]


def test_unfinished_files_of_a_killed_process_are_removed(prepare, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one document\n\nanother document\n")
    folder = prepare(path).folder
    whole = contents(folder)
    (folder / "corpus.json").unlink()
    (folder / ".progress.json.x4y2z4w2").write_text('{"documents"')
    prepare(path)
    assert {entry.name: entry.read_bytes() for entry in folder.iterdir()} == whole


def test_only_one_process_at_a_time_is_inside_a_lock(tmp_path):
    inside = threading.Event()

    def enter():
        with lock(tmp_path / "new" / "name"):
            inside.set()

    with lock(tmp_path / "new" / "name"):
        with lock(tmp_path / "new" / "other"):
            pass
        other = threading.Thread(target=enter)
        other.start()
        assert not inside.wait(0.2)
    assert inside.wait(10)
    other.join()
