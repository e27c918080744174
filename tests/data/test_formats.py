"""What a file holds is told by its name, or else by its content, or else by the settings; archives are refused."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import tarfile
import threading
import tracemalloc
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from bertlite.config.settings import DataLocation, Source
from bertlite.core.errors import UserError
from bertlite.core.trust import MAX_LINE_BYTES
from bertlite.data.formats import READERS, TableFile, find_format, read_json, read_lines
from bertlite.data.sources import read_documents

ROWS = [{"id": 1, "text": "first text", "label": "a"}, {"id": 2, "text": "second", "label": "b"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TEXTS = [row["text"] for row in ROWS]
COMPRESS = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "zst": zstandard.compress}


def documents(path, **source) -> list[str]:
    return list(read_documents(Source(path=str(path), **source), "line", "data.train"))


def records(path, columns=None, field=None) -> list[dict]:
    return [record.columns for record in read_json(TableFile(path, columns=columns, field=field))]


@pytest.mark.parametrize("name", ["wiki_00", "a.txt", "a.json", "a.jsonl", "a.dat"])
@pytest.mark.parametrize("content", [LINES, "\ufeff\n" + LINES, json.dumps(ROWS), json.dumps(ROWS, indent=1)])
def test_json_is_read_whatever_its_name_is(name, content, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert documents(tmp_path / name, column="text") == TEXTS
    assert documents(tmp_path / name, format="jsonl") == TEXTS
    if not name.startswith("a.json"):
        with pytest.raises(UserError, match=rf"{name}: holds JSON, not lines of text; name its column"):
            documents(tmp_path / name)
        lines = documents(tmp_path / name, format="text")
        assert lines == [line for line in content.removeprefix("\ufeff").split("\n") if line.strip()]


def test_text_that_is_no_json_stays_text(tmp_path):
    lines = ["{", "[note] a", '{"quoted"} words', "{'text': 1}", "[MASK]"]
    for line in lines:
        (tmp_path / "a.txt").write_text(f"{line}\nmore")
        assert documents(tmp_path / "a.txt") == [line, "more"]


@pytest.mark.parametrize("kind", COMPRESS)
def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(kind, tmp_path):
    path = tmp_path / f"a.txt.{kind}"
    path.write_bytes(COMPRESS[kind](b"one\n" + b"a" * (MAX_LINE_BYTES + 1)))
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"{path.name}:2: longer than 67,108,864 bytes, so not a line of text"):
        documents(path)
    assert tracemalloc.get_traced_memory()[1] < 4 * MAX_LINE_BYTES
    tracemalloc.stop()
    path.write_bytes(COMPRESS[kind](b"one\n" + b"a" * 1000))
    assert documents(path) == ["one", "a" * 1000]


def test_zstandard_is_decompressed_little_by_little(tmp_path):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress((b"a" * 1023 + b"\n") * (1 << 17)))
    assert path.stat().st_size < 1 << 14
    tracemalloc.start()
    assert sum(1 for _ in read_lines(path)) == 1 << 17
    assert tracemalloc.get_traced_memory()[1] < 1 << 26
    tracemalloc.stop()


def test_a_quote_that_never_closes_is_named(tmp_path):
    limit = csv.field_size_limit(1000)
    try:
        (tmp_path / "a.csv").write_text('text\n"' + "a\n" * 1000)
        with pytest.raises(UserError, match=r"a\.csv:2: the record that starts here is not valid: field larger than"):
            documents(tmp_path / "a.csv")
    finally:
        csv.field_size_limit(limit)
    assert limit == 1 << 24


def test_a_quote_that_does_not_close_within_a_million_lines_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("bertlite.data.formats.MAX_RECORD_LINES", 100)
    (tmp_path / "a.csv").write_text('text\n"' + "a\n" * 99 + '"\n"' + "a\n" * 101 + '"\n')
    with pytest.raises(UserError, match=r"a\.csv:102: the record that starts here is not valid: more than 100 lines"):
        documents(tmp_path / "a.csv")


def test_json_over_many_lines_is_read_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("bertlite.data.formats.MAX_JSON_BYTES", 200)
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    assert documents(tmp_path / "a.json") == TEXTS
    (tmp_path / "a.json").write_text(json.dumps(ROWS * 9, indent=1))
    with pytest.raises(UserError, match=r"JSON over several lines is read at once, up to 200 characters"):
        documents(tmp_path / "a.json")


def test_texts_of_few_bytes_in_parquet_are_not_all_in_memory(tmp_path):
    table = pyarrow.table({"text": pyarrow.array(["a" * (1 << 20)] * 500).dictionary_encode()})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    tracemalloc.start()
    assert sum(map(len, read_documents(Source(path=str(tmp_path / "a.parquet")), "line", "data.train"))) == 500 << 20
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("kind", COMPRESS)
def test_compression_is_seen_from_the_content(kind, tmp_path):
    (tmp_path / "plain").write_bytes(COMPRESS[kind](b"one\ntwo\n"))
    (tmp_path / "lines").write_bytes(COMPRESS[kind](LINES.encode()))
    assert documents(tmp_path / "plain") == ["one", "two"]
    assert documents(tmp_path / "lines", column="text") == TEXTS


def test_parquet_without_its_ending(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "part-0")
    assert documents(tmp_path / "part-0") == TEXTS


def test_a_column_of_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    with pytest.raises(
        UserError, match=r"a\.txt: read as lines of text, which have no column 'text'; leave column out"
    ):
        documents(tmp_path / "a.txt", column="text")


def test_archives_and_documents_are_refused(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as zipped:
        zipped.writestr("a.txt", "text")
    for name, content, message in [
        ("a.tar", file.getvalue(), "a tar archive"),
        ("a.tgz", gzip.compress(file.getvalue()), "a tar archive"),
        ("a.csv", packed.getvalue(), "a zip archive or an office file"),
        ("a", b"%PDF-1.7\n", "a PDF"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: {message}, not a file of text or a table; "):
            documents(tmp_path / name)


@pytest.mark.parametrize("column, expected", [(None, LINES.splitlines()), ("text", TEXTS)])
def test_nothing_of_a_pipe_is_lost(column, expected, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for content in (LINES.encode(), gzip.compress(LINES.encode())):
        threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[content]).start()
        assert documents(tmp_path / "pipe", column=column) == expected


def test_records_within_objects(tmp_path):
    """As CLINC150 is published: lists of a text and its label, by split."""
    pairs = [["a text", "greeting"], ["more", "no"]]
    expected = [{"text": text, "label": label} for text, label in pairs]
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"val": [], "train": pairs, "deep": {"train": expected}}))
    assert records(path, ["text", "label"], "train") == expected == records(path, field="deep.train")
    for columns, field, message in [
        (None, None, r"data.json: should be a list .*its keys are val, train, deep.*\{path: …, field: KEY\}"),
        (None, "oos", "data.json: field is 'oos', but there is no 'oos'; there are val, train, deep"),
        (None, "deep.test", "data.json: field is 'deep.test', but there is no 'test'; there are train"),
        (None, "train", "data.json: object 1: not a JSON object.*task.columns names the values of a list"),
        (["text"], "train", "data.json: object 1: 2 values, but task.columns names 1"),
    ]:
        with pytest.raises(UserError, match=message):
            records(path, columns, field)


def test_json_over_several_lines(tmp_path):
    pretty = [json.dumps(row, indent=2) for row in ROWS]
    for name in ("a.json", "a.jsonl"):
        for content in ("\n".join(pretty), "".join(pretty), f'{{"data": [{",".join(pretty)}]}}'):
            (tmp_path / name).write_text(content)
            assert records(tmp_path / name) == ROWS or ("data" in content and name == "a.jsonl")
        (tmp_path / name).write_text(pretty[0])
        assert records(tmp_path / name) == ROWS[:1]
    (tmp_path / "a.jsonl").write_text('{\n "text": oops\n}')
    with pytest.raises(UserError, match=r"a.jsonl: not valid JSON: .* line 2"):
        records(tmp_path / "a.jsonl")


def test_the_settings_name_formats_that_have_a_reader(tmp_path):
    choices = Source.model_fields["format"].annotation.__args__[0].__args__
    assert {f".{choice}" for choice in choices} == {*READERS, ".text"} - {".ndjson"}
    assert all(find_format(tmp_path, choice) == f".{choice}" for choice in choices)
    for name in ("format", "field"):
        with pytest.raises(ValueError, match=f"{name} is 'json', but belongs to a path, not to a dataset"):
            DataLocation.model_validate({"dataset": "d", name: "json"})
