"""What predict reads: the files that a model was fine-tuned on, lines of text, and standard input."""

import csv
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tasks import SENTENCES, save_model
from transformers import pipeline

from bertlite.config.finetune_settings import SavedTask
from bertlite.core.errors import UserError
from bertlite.finetuning.inputs import read_inputs
from bertlite.finetuning.labels import read_unlabelled

TEXTS = [text for _, text in SENTENCES[:6]]
PAIRS = [*zip(TEXTS[::2], TEXTS[1::2], strict=True)]


@pytest.fixture
def make_model(vocabulary, tmp_path):
    """Make a tiny model of a type of task, with a task.json of some settings; returns its folder."""

    def make(kind: str = "classification", **settings: Any) -> Path:
        folder = save_model(vocabulary, kind, tmp_path / f"model-{kind}", std=0.3)
        (folder / "task.json").write_text(SavedTask(type=kind, **settings).model_dump_json())
        return folder

    return make


def predict(bertlite, *arguments: Any) -> list[Any]:
    code, out, err = bertlite("predict", *arguments, "--json")
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def write_table(path: Path, columns: dict[str, list[str]]) -> Path:
    """Write columns as .jsonl, .csv or .tsv."""
    lines = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns), delimiter="," if path.suffix == ".csv" else "\t")
        writer.writeheader(), writer.writerows(lines)
    return path


def give(monkeypatch, content: str) -> None:
    """Make `content` the standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))


def test_pairs_come_from_tables_lines_and_standard_input(bertlite, make_model, tmp_path, monkeypatch):
    model = make_model(text=["first", "second"])
    table = {"first": [pair[0] for pair in PAIRS], "label": ["x", "y", "z"], "second": [pair[1] for pair in PAIRS]}
    expected = predict(bertlite, model, *map("\t".join, PAIRS))
    assert len(expected) == 3 and expected != predict(bertlite, model, *("\t".join(pair[::-1]) for pair in PAIRS))
    lines = "".join(f"{first}\t{second}\n" for first, second in PAIRS)
    (tmp_path / "a.txt").write_text(lines)
    for name in ("a.jsonl", "a.csv", "a.tsv", "a.txt"):
        path = write_table(tmp_path / name, table) if name != "a.txt" else tmp_path / name
        assert predict(bertlite, model, "--file", path) == expected
        give(monkeypatch, path.read_text())
        assert predict(bertlite, model) == expected
        assert predict(bertlite, model, "--file", path, "--pairs") == expected
    renamed = write_table(tmp_path / "b.csv", {"p": table["first"], "q": table["second"]})
    assert predict(bertlite, model, "--file", renamed, "--column", "p", "--column", "q") == expected
    (model / "task.json").unlink()
    assert predict(bertlite, model, "--file", tmp_path / "a.txt", "--pairs") == expected
    assert predict(bertlite, model, "--file", renamed, "--column", "p", "--column", "q") == expected
    assert predict(bertlite, model, "--file", tmp_path / "a.txt") != expected


@pytest.mark.parametrize(
    "text, arguments, message",
    [
        (["first", "second"], ["one text"], "text 1: should be two texts, first and second, separated by a tab"),
        (["first", "second"], ["--file", "{lines}"], r"a\.txt:2: should be two texts, .*: 'no tab'"),
        (
            ["first", "second"],
            ["--file", "{table}", "--column", "first"],
            "--column first: the model reads pairs .*twice",
        ),
        (["text"], ["--file", "{table}", "--column", "a", "--column", "b"], "the model reads single texts .*once"),
        (["text"], ["--file", "{lines}", "--pairs"], "--pairs: the model reads single texts; leave --pairs out"),
        (None, ["--file", "{table}", "--column", "a", "--column", "b"], "the model reads single texts .*once"),
        (["text"], ["--file", "{table}"], r"there is no column 'text'; there are 'first', 'second'"),
        (["text"], ["--file", "gone.txt"], r"--file: gone\.txt: no such file"),
        (["text"], ["--file", "{lines}", "--column", "c"], r"a\.txt: read as lines of text, which have no column 'c'"),
        (["text"], ["a", "--column", "b"], "either TEXT or a --column"),
        (["text"], ["a", "--out", "b.xlsx"], r"--out b\.xlsx: the name should end in \.jsonl, \.csv or \.tsv"),
    ],
)
def test_what_contradicts_the_model_is_an_error(text, arguments, message, bertlite, make_model, tmp_path):
    (tmp_path / "a.txt").write_text("a\tb\nno tab\n")
    table = write_table(tmp_path / "a.jsonl", {"first": ["a"], "second": ["b"]})
    arguments = [argument.format(lines=tmp_path / "a.txt", table=table) for argument in arguments]
    if text is None:  # a model of tags from elsewhere, without task.json
        model = make_model("token-classification")
        (model / "task.json").unlink()
    else:
        model = make_model(text=text)
    code, out, err = bertlite("predict", model, *arguments)
    assert code == 2 and out == "" and re.search(message, err), err
    assert len(err.splitlines()) == 1


def test_columns_that_the_model_does_not_read_may_be_large(bertlite, make_model, tmp_path, monkeypatch):
    monkeypatch.setattr("bertlite.finetuning.predict.MAX_TEXT_CHARACTERS", 100)
    table = write_table(tmp_path / "a.jsonl", {"text": ["short"], "page": ["long " * 30]})
    assert predict(bertlite, make_model(), "--file", table) == predict(bertlite, make_model(), "short")
    model = make_model("multiple-choice", text=["text"])
    code, _, err = bertlite("predict", model, "context\t" + "long " * 30 + "\tchoice")
    assert code == 2 and "text 1: 163 characters, more than 100" in err, err


def test_a_tab_is_part_of_a_single_text(bertlite, make_model):
    model = make_model()
    assert predict(bertlite, model, "one\ttext") == predict(bertlite, model, "one text")


def test_files_of_the_other_tasks(bertlite, make_model, tmp_path):
    """The same predictions as for the texts themselves."""
    model = make_model("question-answering", text=["question", "context"], max_length=64, doc_stride=16)
    paragraphs = [
        {"context": context, "qas": [{"id": str(n), "question": f"What is {n}?", "answers": []} for n in range(2)]}
        for context in TEXTS[:2]
    ]
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    texts = [f"{question['question']}\t{one['context']}" for one in paragraphs for question in one["qas"]]
    assert predict(bertlite, model, "--file", tmp_path / "squad.json") == predict(bertlite, model, *texts)
    model = make_model("token-classification", text=["words"])
    sentences = [text.split() for _, text in SENTENCES[:60]]
    conll = "\n".join("".join(f"{word} O\n" for word in words) for words in sentences)
    expected = predict(bertlite, model, *map(" ".join, sentences))
    assert any(expected)
    for name in ("a.conll", "a.txt"):
        (tmp_path / name).write_text(conll)
        assert predict(bertlite, model, "--file", tmp_path / name) == expected
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"words": words}) + "\n" for words in sentences))
    assert predict(bertlite, model, "--file", tmp_path / "a.jsonl") == expected


@pytest.mark.parametrize("settings", [{"columns": ["label", "text"]}, {"delimiter": ";"}, {"encoding": "latin-1"}])
def test_files_are_laid_out_as_in_fine_tuning(settings, tmp_path):
    task = SavedTask(**settings)
    content = {
        "columns": "x\tNaïve\ny\tb, c\n",
        "delimiter": "label;text\nx;Naïve\ny;b, c\n",
        "encoding": "Naïve\nb, c\n",
    }
    path = tmp_path / "a.txt"
    path.write_text(content[next(iter(settings))], encoding=task.encoding)
    assert [read_unlabelled(record, task) for record in read_inputs(None, str(path), task)] == [("Naïve",), ("b, c",)]


@pytest.mark.parametrize("encoding", ["undefined", "punycode", "hex", "no\0name", ""])
def test_an_encoding_of_a_stranger_is_named(encoding, tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,b\n")
    with pytest.raises(UserError, match="the encoding is "):
        list(read_inputs(None, str(tmp_path / "a.csv"), SavedTask(encoding=encoding)))


def test_lines_of_text_are_not_taken_for_tables(tmp_path):
    task, path = SavedTask(), tmp_path / "a.txt"
    for content in ("one\n\ntwo\n", "text\nlabel\n", "{one}\n", "[1]\n", "Well, the text\n", "a\tb\n", "", "\n{}\n"):
        path.write_text(content)
        records = read_inputs(None, str(path), task)
        assert [read_unlabelled(record, task) for record in records] == [(line,) for line in content.splitlines()]
    reader, writer = os.pipe()
    os.write(writer, b"line\n" * 150), os.close(writer)
    assert [record.columns for record in read_inputs(None, f"/dev/fd/{reader}", task)] == [{"text": "line"}] * 150
    os.close(reader)


def test_a_terminal_is_told_that_texts_are_awaited(monkeypatch, capsys):
    give(monkeypatch, "a\n")
    list(read_inputs(None, None, SavedTask()))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    list(read_inputs(None, None, SavedTask()))
    assert "reading standard input, a text per line" in capsys.readouterr().err


def test_truncated_texts_are_counted(bertlite, make_model):
    model = make_model(max_length=16)
    _, out, err = bertlite("predict", model, "short", "long " * 40, "word " * 20)
    assert len(out.splitlines()) == 3
    assert "2 of 3 texts have more than 16 tokens and were truncated" in err
    assert bertlite("predict", model, "short")[2] == ""
    err = bertlite("predict", make_model(max_length=5000), "long " * 200)[2]
    assert "1 of 1 texts have more than 128 tokens" in err  # the positions of the model


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.tsv"])
def test_out_keeps_the_columns_and_adds_the_predictions(name, bertlite, make_model, tmp_path):
    model, out = make_model(), tmp_path / name
    table = write_table(tmp_path / "a.jsonl", {"id": ["1", "2"], "text": ['say "a", b', "ü"], "label": ["x", "y"]})
    code, printed, _ = bertlite("predict", model, "--file", table, "--out", out)
    assert code == 0 and printed == f"{out}: 2 predictions\n"
    text = out.read_text(encoding="utf-8")
    if name == "out.jsonl":
        lines = list(map(json.loads, text.splitlines()))
    elif name == "out.csv":
        lines = list(csv.DictReader(text.splitlines()))
    else:
        lines = list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    expected = predict(bertlite, model, "--file", table)
    assert [line["text"] for line in lines] == ['say "a", b', "ü"] and [line["label"] for line in lines] == ["x", "y"]
    for line, prediction in zip(lines, expected, strict=True):
        assert line["predicted_label"] == prediction["label"] and float(line["predicted_score"]) == prediction["score"]
    _, printed, _ = bertlite("predict", model, "--file", table, "--out", out, "--json")
    assert json.loads(printed) == {"file": str(out), "predictions": 2}
    before = out.read_bytes()
    taken = write_table(tmp_path / "b.jsonl", {"text": ["a"], "predicted_label": ["x"]})
    code, _, err = bertlite("predict", model, "--file", taken, "--out", out)
    assert code == 2 and "already is a column 'predicted_label'" in err and out.read_bytes() == before


def test_what_a_table_cannot_hold_is_an_error(bertlite, make_model, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\tb"}\n{"text": "a", "id": 1}\n')
    for name, message in {"out.tsv": r":1: does not fit .*out\.tsv: ", "out.csv": r":2: does not fit .*'id'"}.items():
        code, _, err = bertlite("predict", make_model(), "--file", tmp_path / "a.jsonl", "--out", tmp_path / name)
        assert code == 2 and re.search(message, err) and not (tmp_path / name).exists(), err


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
def test_out_has_all_labels_of_a_multilabel_model_and_the_scores(name, bertlite, make_model, tmp_path):
    model = make_model("multilabel")
    table = write_table(tmp_path / "a.jsonl", {"text": TEXTS})
    assert bertlite("predict", model, "--file", table, "--out", tmp_path / name)[0] == 0
    text = (tmp_path / name).read_text(encoding="utf-8")
    lines = list(csv.DictReader(text.splitlines())) if name == "out.csv" else read_json_lines(tmp_path / name)
    theirs = pipeline("text-classification", str(model), top_k=None, function_to_apply="sigmoid")(TEXTS)
    assert any(0 < sum(entry["score"] > 0.5 for entry in entries) < len(entries) for entries in theirs)
    for line, entries in zip(lines, theirs, strict=True):
        labels, scores = line["predicted_labels"], line["predicted_scores"]
        labels, scores = (json.loads(labels), json.loads(scores)) if name == "out.csv" else (labels, scores)
        assert set(labels) == {entry["label"] for entry in entries if entry["score"] > 0.5}
        assert scores == pytest.approx({entry["label"]: entry["score"] for entry in entries}, abs=1e-5)


def test_out_has_the_number_of_a_regression_and_no_label(bertlite, make_model, tmp_path):
    model, table = make_model("regression"), write_table(tmp_path / "a.jsonl", {"text": TEXTS})
    for options in ([], ["--top-k", 3]):
        bertlite("predict", model, "--file", table, "--out", tmp_path / "out.jsonl", *options)
        lines = read_json_lines(tmp_path / "out.jsonl")
        expected = [prediction["score"] for prediction in predict(bertlite, model, "--file", table)]
        assert [list(line) for line in lines] == [["text", "predicted_score"]] * len(TEXTS)
        assert [line["predicted_score"] for line in lines] == expected


def read_json_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_a_list_of_a_json_file_is_named_by_field(bertlite, make_model, tmp_path):
    model, path = make_model(columns=["text", "label"]), tmp_path / "a.json"
    path.write_text(json.dumps({"test": [[text, "history"] for text in TEXTS], "oos": [["a", "b"]]}))
    assert predict(bertlite, model, "--file", path, "--field", "test") == predict(bertlite, model, *TEXTS)
    code, _, err = bertlite("predict", model, "--file", path)
    assert code == 2 and "(its keys are test, oos): --field KEY on the command line" in err
    code, out, err = bertlite("evaluate", model, "--data", path, "--field", "test", "--json")
    named = predict(bertlite, model, *TEXTS)
    assert code == 0 and json.loads(out)["accuracy"] == np.mean(["history" in str(one) for one in named]), err
    code, out, err = bertlite("embed", model, path, "--field", "test", "--out", tmp_path / "a.npy")
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    bertlite("embed", model, tmp_path / "a.txt", "--out", tmp_path / "b.npy")
    assert code == 0 and np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")), err
    code, _, err = bertlite("predict", model, "--file", path, "--field", "train")
    assert code == 2 and "there is no 'train'; there are test, oos" in err


def test_embed_reads_the_words_of_a_model_of_tags(bertlite, make_model, tmp_path):
    (tmp_path / "a.conll").write_text("The O\ncell B-X\n\nA O\nlaw O\n")
    (tmp_path / "a.txt").write_text("The cell\nA law\n")
    for name in ("a.conll", "a.txt"):
        model = make_model("token-classification")
        code, out, err = bertlite("embed", model, tmp_path / name, "--out", tmp_path / f"{name}.npy")
        assert code == 0 and "2 vectors" in out, err
    assert np.array_equal(np.load(tmp_path / "a.conll.npy"), np.load(tmp_path / "a.txt.npy"))


@pytest.mark.parametrize(
    "command", [["predict", "{model}", "--file", "{file}"], ["evaluate", "{model}", "--data", "{file}"]]
)
def test_a_vocabulary_of_other_text_is_a_warning(command, bertlite, make_model, tmp_path):
    for text, warns in {"他是中国的学生": True, "The cell divides": False}.items():
        file = write_table(tmp_path / "a.jsonl", {"text": [text] * 4, "label": ["history"] * 4})
        model = make_model()
        err = bertlite(*[word.format(model=model, file=file) for word in command])[2]
        assert (
            bool(re.search(r": \d+\.\d% of the tokens are unknown; the model's vocabulary is of other text", err))
            == warns
        )


@pytest.mark.parametrize("name", ["test.tsv", "test.txt"])
def test_a_header_that_only_the_test_set_has_is_used(name, bertlite, make_model, tmp_path):
    model = make_model(columns=["source", "label", "star", "sentence"], text=["sentence"])
    rows = [f"{number}\t{text}" for number, text in enumerate(TEXTS)]
    (tmp_path / name).write_text("\n".join(["index\tsentence", *rows]) + "\n")
    expected = predict(bertlite, model, *TEXTS)
    assert predict(bertlite, model, "--file", tmp_path / name) == expected
    assert predict(bertlite, model, "--file", tmp_path / name, "--column", "sentence") == expected
    (tmp_path / "train.tsv").write_text("\n".join(f"a\thistory\t\t{text}" for text in TEXTS))
    assert predict(bertlite, model, "--file", tmp_path / "train.tsv") == expected


def test_evaluation_without_a_label_column_names_the_option(bertlite, make_model, tmp_path):
    table = write_table(tmp_path / "a.jsonl", {"text": TEXTS, "intent": ["history"] * len(TEXTS)})
    code, _, err = bertlite("evaluate", make_model(), "--data", table)
    assert code == 2 and ":1: --label: there is no column 'label'; there are 'text', 'intent'" in err
    code, _, err = bertlite("evaluate", make_model(), "--data", table, "--label", "intent", "--column", "txt")
    assert code == 2 and ":1: --column: there is no column 'txt'; there are 'text', 'intent'" in err
    code, out, err = bertlite("evaluate", make_model(), "--data", table, "--label", "intent", "--json")
    assert code == 0 and "accuracy" in json.loads(out), err


def test_a_text_that_is_the_name_of_a_file_is_a_warning(bertlite, make_model, tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    model = make_model()
    code, _, err = bertlite("predict", model, tmp_path / "a.txt", TEXTS[0])
    assert code == 0 and err.count("read as a text") == 1 and f"--file {tmp_path / 'a.txt'} reads the file" in err
