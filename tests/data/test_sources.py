"""Sources of text in every format, and messages about text that cannot be read."""

import csv
import gzip
import json
import lzma
import os
import random

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from bertlite.config.settings import DataSettings, Source
from bertlite.core.errors import UserError
from bertlite.data import corpus as corpus_module
from bertlite.data.corpus import prepare_corpus
from bertlite.data.formats import TableFile
from bertlite.data.packing import pack_corpus
from bertlite.data.sources import digest_source, find_source_files, read_documents, read_file_texts
from bertlite.data.tokenizer import load_tokenizer

DOCUMENTS = [f'Document {number}, with "quotes", a\ttab and é, 中文.\nTwo lines.' for number in range(50)]
ROWS = [{"id": number, "body": text} for number, text in enumerate(DOCUMENTS)]


def documents(path, document="blank-line", **source) -> list[str]:
    return list(read_documents(Source(path=str(path), **source), document, "data.train"))


def write_jsonl(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")


def write_csv(path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "body"])
        writer.writeheader()
        writer.writerows(ROWS)


WRITERS = {
    "rows.jsonl": write_jsonl,
    "rows.json": lambda path: path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8"),
    "rows.csv": write_csv,
    "rows.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
    "rows.txt": lambda path: path.write_text("\n\n".join(DOCUMENTS), encoding="utf-8"),
}


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text(
        "\n".join(
            [
                "[PAD]",
                "[UNK]",
                "[CLS]",
                "[SEP]",
                "[MASK]",
                *"abcdefghijklmnopqrstuvwxyz0123456789.,",
                *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789"),
            ]
        )
    )
    return load_tokenizer(str(tmp_path / "vocab.txt"))


def prepare(tmp_path, tokenizer, train, **data):
    settings = DataSettings.model_validate({"train": train, "cache_dir": str(tmp_path / "cache"), **data})
    return prepare_corpus(settings.train, tokenizer, settings, "data.train")


COLUMN = {name: {} if name == "rows.txt" else {"column": "body"} for name in WRITERS}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert documents(tmp_path / name, **COLUMN[name]) == DOCUMENTS


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "latin-1"])
def test_text_in_the_encoding_of_its_source_is_the_same_corpus(encoding, tmp_path, tokenizer):
    texts = [text.replace("中文", "ü" if encoding == "latin-1" else "中文") for text in DOCUMENTS]
    (tmp_path / "utf8.txt").write_text("\n\n".join(texts), encoding="utf-8")
    (tmp_path / "other.txt.gz").write_bytes(gzip.compress("\n\n".join(texts).encode(encoding)))
    (tmp_path / "other.csv").write_text("body\n" + "\n".join(f'"{text[:9]}"' for text in texts), encoding=encoding)
    source = {"path": str(tmp_path / "other.txt.gz"), "encoding": encoding}
    corpora = [prepare(tmp_path, tokenizer, train) for train in (str(tmp_path / "utf8.txt"), source)]
    assert corpora[0].tokens.tolist() == corpora[1].tokens.tolist() and corpora[0].folder != corpora[1].folder
    assert documents(tmp_path / "other.csv", encoding=encoding, column="body") == [text[:9] for text in texts]


def test_lines_of_fasttext_are_not_taken_for_text(tmp_path):
    (tmp_path / "a.txt").write_text("__label__a fine\n__label__b good\n")
    with pytest.raises(UserError, match=r"a\.txt: holds labels and texts as of fastText"):
        documents(tmp_path / "a.txt")
    assert documents(tmp_path / "a.txt", column="text") == ["fine", "good"]
    assert documents(tmp_path / "a.txt", document="line", format="text") == ["__label__a fine", "__label__b good"]


def test_names_may_be_in_capitals(tmp_path):
    write_csv(tmp_path / "rows.csv")
    (tmp_path / "ROWS.CSV.GZ").write_bytes(gzip.compress((tmp_path / "rows.csv").read_bytes()))
    assert documents(tmp_path / "ROWS.CSV.GZ", column="body") == DOCUMENTS


def test_a_record_with_an_empty_text_is_kept(tmp_path):
    for name, sign in {"a.tsv": "\t", "a.csv": ","}.items():
        (tmp_path / name).write_text(f"text{sign}label\n1{sign}a\n{sign}\n3{sign}b\n")
        assert list(read_file_texts(TableFile(tmp_path / name), "text")) == ["1", "", "3"]


def test_text_that_can_be_read_only_once_is_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match=f"{os.devnull}: not a regular file, so it cannot be read twice"):
        prepare(tmp_path, tokenizer, [os.devnull])


def test_blank_lines_of_a_table_are_skipped(tmp_path):
    for name, content in {
        "a.tsv": "text\none\n\t\n \n\nthree\n",
        "a.csv": "text,label\none,1\n   \n\nthree,2\n",
    }.items():
        (tmp_path / name).write_text(content)
        assert list(read_file_texts(TableFile(tmp_path / name), "text")) == ["one", "three"]


def test_lines_of_a_json_file_are_read_too(tmp_path):
    write_jsonl(tmp_path / "rows.json")
    assert documents(tmp_path / "rows.json", column="body") == DOCUMENTS


def test_values_of_a_table_are_not_interpreted(tmp_path):
    """No quotes in .tsv, as GLUE has it, and no guesses at types: NA, numbers and dates are texts."""
    texts = ['Hello "there', 'third" one', "NA", "null", "007", "2026-01-01", '"']
    (tmp_path / "a.tsv").write_text("\n".join(["text\tlabel", *(f"{text}\t1" for text in texts)]))
    assert documents(tmp_path / "a.tsv") == texts
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    assert documents(tmp_path / "a.csv") == texts
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert documents(tmp_path / "a.jsonl") == texts


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "cut \ud83d"}) + "\n" + json.dumps({"text": "whole \U0001f600"})
    )
    assert documents(tmp_path / "a.jsonl") == ["cut \ufffd", "whole \U0001f600"]


def test_a_name_with_brackets_is_a_name_first(tmp_path):
    for folder in ("d[1]", "d1"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "x.jsonl")
    assert find_source_files(Source(path=str(tmp_path / "d[1]" / "x.jsonl")), "") == [tmp_path / "d[1]" / "x.jsonl"]
    assert find_source_files(Source(path=str(tmp_path / "d[1]")), "") == [tmp_path / "d[1]" / "x.jsonl"]
    assert find_source_files(Source(path=str(tmp_path / "d[0-9]")), "") == [tmp_path / "d1" / "x.jsonl"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.txt"])
@pytest.mark.parametrize("suffix, compress", [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed_formats(tmp_path, name, suffix, compress):
    WRITERS[name](tmp_path / name)
    packed = tmp_path / (name + suffix)
    packed.write_bytes(compress((tmp_path / name).read_bytes()))
    assert documents(packed, **COLUMN[name]) == DOCUMENTS


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_by_its_folder(tmp_path, streaming, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    (tmp_path / "mine").mkdir()
    write_jsonl(tmp_path / "mine" / "train.jsonl")
    source = Source(dataset=str(tmp_path / "mine"), column="body", streaming=streaming)
    assert list(read_documents(source, "line", "data.train")) == DOCUMENTS


def test_a_dataset_saved_to_disk(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    source = Source(dataset=str(tmp_path / "saved"), column="body")
    assert list(read_documents(source, "line", "data.train")) == DOCUMENTS


def test_a_dataset_is_another_text_when_its_files_or_settings_are_others(tmp_path):
    (tmp_path / "mine").mkdir()
    write_jsonl(tmp_path / "mine" / "train.jsonl")
    source = Source(dataset=str(tmp_path / "mine"), column="body")

    def digest(**changes) -> list:
        return digest_source(source.model_copy(update=changes), "data.train", tmp_path / "cache")

    before = digest()
    assert digest() == before
    for name, value in {"column": "id", "name": "other", "split": "test", "revision": "main"}.items():
        assert digest(**{name: value}) != before, name
    (tmp_path / "mine" / "train.jsonl").write_text('{"body": "another"}\n')
    assert digest() != before


def test_a_text_that_changed_with_its_size_and_time_kept_is_another_text(tmp_path):
    path, source = tmp_path / "a.txt", Source(path=str(tmp_path / "a.txt"))
    path.write_text("one")
    os.utime(path, (1e9, 1e9))
    before = digest_source(source, "data.train", tmp_path / "cache")
    path.write_text("two")
    os.utime(path, (1e9, 1e9))
    assert digest_source(source, "data.train", tmp_path / "cache") != before


def test_records_without_text_are_counted(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n{"text": " "}\n{"text": null}\n')
    summary = prepare(tmp_path, tokenizer, [str(tmp_path / "a.jsonl")]).summary
    assert (summary.read, summary.documents, summary.empty) == (3, 1, 2)


def test_a_folder_means_its_files_in_order_without_hidden_ones(tmp_path):
    for name in ("b.txt", "a.txt", "inner/c.txt", ".hidden"):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(name)
    assert documents(tmp_path / "texts") == ["a.txt", "b.txt", "inner/c.txt"]


def test_sources_of_all_formats_in_one_list(tmp_path, tokenizer):
    for name, write in WRITERS.items():
        write(tmp_path / name)
    train = [{"path": str(tmp_path / name), **COLUMN[name]} for name in WRITERS]
    corpus = prepare(tmp_path, tokenizer, train)
    assert corpus.summary.source_documents == [50] * len(WRITERS)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in DOCUMENTS]
    assert [corpus.document(number).tolist() for number in range(len(corpus))] == ids * len(WRITERS)


def test_duplicates_and_lengths_are_dropped_and_counted(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one two three\n\nx\n\none two three\n\n" + "long " * 50)
    (tmp_path / "b.txt").write_text("one two three\n\nfour five six")
    train = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    kept = prepare(tmp_path, tokenizer, train, remove_duplicates=True, min_characters=5, max_characters=100)
    summary = kept.summary
    assert (summary.read, summary.documents, summary.duplicates, summary.too_short, summary.too_long) == (6, 2, 2, 1, 1)
    assert summary.source_documents == [1, 1]
    everything = prepare(tmp_path, tokenizer, train).summary
    assert (everything.documents, everything.source_documents) == (6, [4, 2])
    assert "2 duplicates" in summary.describe() and "dropped" not in everything.describe()


def test_the_summary_counts_words_bytes_and_unknown_tokens(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("ab c é中", encoding="utf-8")
    summary = prepare(tmp_path, tokenizer, [str(tmp_path / "a.txt")]).summary
    # a ##b c e [UNK]: é loses its accent, 中 is not in the vocabulary
    assert (summary.tokens, summary.words, summary.unknown_tokens, summary.bytes) == (5, 4, 1, 10)


@pytest.mark.parametrize(
    "text, doubt",
    [
        ("ab cd e fg hi " * 20, None),  # 1.8 tokens a word
        (
            "abc def ghi jkl " * 20,
            "data.train: warning: 3.0 tokens per word, where 1 to 2 are usual; the vocabulary is too small",
        ),
        (
            "a b c d e f g h i 中 " * 20,
            "data.train: warning: 10.0% of the tokens are unknown; the vocabulary is too small",
        ),
        ("a b c d e f g h i j " * 20 + "中", None),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_warned_of(tmp_path, tokenizer, capsys, text, doubt):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    prepare(tmp_path, tokenizer, [str(tmp_path / "a.txt")])
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert told == [] if doubt is None else len(told) == 1 and told[0].startswith(doubt)


def test_oddities_of_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\r\n\r\n\r\nth\0ree\r\n".encode())
    assert documents(tmp_path / "a.txt") == ["one\ntwo", "th\0ree"]
    assert documents(tmp_path / "a.txt", "line") == ["one", "two", "th\0ree"]


def test_a_long_line_is_split_for_the_tokenizer_and_gives_the_same_ids(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(corpus_module, "BATCH_CHARACTERS", 10_000)
    text = " ".join(random.Random(0).choices(["alpha", "beta", "c", "delta9"], k=5000))
    assert len(text) > 2 * corpus_module.BATCH_CHARACTERS
    (tmp_path / "a.txt").write_text(text)
    corpus = prepare(tmp_path, tokenizer, [str(tmp_path / "a.txt")])
    assert corpus.document(0).tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_what_changed_is_logged(tmp_path, tokenizer, capsys):
    path = tmp_path / "a.txt"
    path.write_text("some text\n\nmore text")
    prepare(tmp_path, tokenizer, [str(path)])
    capsys.readouterr()
    prepare(tmp_path, tokenizer, [str(path)], document="line")
    assert "because of changes in the settings\n" in capsys.readouterr().err
    path.write_text("other text")
    prepare(tmp_path, tokenizer, [str(path)], document="line")
    errors = capsys.readouterr().err
    assert f"{path} has changed since it was last prepared" in errors and "because of changes in the text\n" in errors


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.jsonl", '{"text": "x"}\n' * 16 + '{"text": oops}\n' + '{"text": "x"}\n' * 5, "a.jsonl:17: not valid JSON"),
        ("a.jsonl", '{"body": "x", "id": 1}\n', "no column 'text'; there are body, id"),
        ("a.csv", "title,content\na,b\n", "no column 'text'; there are title, content"),
        ("a.jsonl", '{"text": 1}\n', "holds int, not text"),
        ("a.jsonl", '{"text": "x"}\n["x"]\n', "a.jsonl:2: not a JSON object"),
        ("a.json", '[{"text": "x"},\n{"text": oops}]', r"a.json: not valid JSON: .*line 2"),
        ("a.csv", 'text,label\nx,1\n"y\nz",2,3\nx,1\n', "a.csv:3: 3 columns, but 2 are named"),
        ("a.parquet", "no parquet", "a.parquet: not a readable Parquet file"),
    ],
)
def test_a_bad_table_is_named(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=expected):
        documents(tmp_path / name)


def test_a_parquet_file_without_the_column(tmp_path):
    WRITERS["rows.parquet"](tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="no column 'text'; there are id, body"):
        documents(tmp_path / "rows.parquet")


@pytest.mark.parametrize("name", ["rows.txt", "rows.jsonl"])
@pytest.mark.parametrize("suffix, compress", [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_a_truncated_file_is_named(tmp_path, name, suffix, compress):
    WRITERS[name](tmp_path / name)
    whole = compress((tmp_path / name).read_bytes() * 50)
    (tmp_path / (name + suffix)).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"{name}{suffix}: damaged or truncated after line \d+: "):
        documents(tmp_path / (name + suffix), **COLUMN[name])


def test_a_split_that_is_not_there_is_named(tmp_path):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="there is no split 'test'; there are train"):
        list(read_documents(Source(dataset=str(tmp_path / "saved"), split="test"), "line", "data.train"))


def test_an_unreachable_dataset_is_named():
    with pytest.raises(UserError, match=r"data\.train: nobody/nothing: cannot be read as a dataset"):
        list(read_documents(Source(dataset="nobody/nothing"), "line", "data.train"))


def test_sources_that_match_nothing(tmp_path):
    with pytest.raises(UserError, match="no file matches"):
        find_source_files(Source(path=str(tmp_path / "*.txt")), "data.train")
    with pytest.raises(UserError, match="no such file"):
        find_source_files(Source(path=str(tmp_path / "a.txt")), "data.train")


def test_weights_change_how_often_a_source_is_seen(tmp_path, tokenizer):
    import numpy as np

    from bertlite.config.settings import MaskingSettings, TrainSettings
    from bertlite.data.batches import Batches

    for number, letter in enumerate("abc"):
        text = "\n\n".join(" ".join([letter] * 100) for _ in range(60 + 20 * number))
        (tmp_path / f"{letter}.txt").write_text(text)
    weights = [2.0, 1.0, 0.5]
    train = [{"path": str(tmp_path / f"{letter}.txt"), "weight": w} for letter, w in zip("abc", weights, strict=True)]
    corpus = prepare(tmp_path, tokenizer, train)
    packing = pack_corpus(corpus, 128, weights)
    assert packing.groups == [[0.5, 100], [1.0, 80], [2.0, 60]]
    batches = Batches(corpus, packing, tokenizer, 128, MaskingSettings(), TrainSettings())
    epoch = 50 + 80 + 120
    seen = np.bincount(batches.select_sequences(np.arange(2 * epoch)), minlength=240)
    assert (seen[:100] == 1).all() and (seen[100:180] == 2).all() and (seen[180:] == 4).all()
    turns = batches.select_sequences(np.arange(epoch)) >= 180
    assert 0.3 < turns[: epoch // 2].mean() < 0.65  # mixed, not one source after the other
    one_by_one = [int(batches.select_sequences(np.array([sample]))[0]) for sample in range(epoch)]
    assert one_by_one == batches.select_sequences(np.arange(epoch)).tolist()
