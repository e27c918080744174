"""The evaluation of fine-tuned models on labelled files, and the predictions that a run leaves."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score
from tiny_tasks import make_records, save_model

from bertlite.api import LoadedModel
from bertlite.core.runtime import initialize_runtime
from bertlite.finetuning.finetune import run
from bertlite.finetuning.tasks import TASKS


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", TASKS)
def test_evaluate_repeats_the_results_of_the_run(kind, write, bertlite, tmp_path):
    run(write(kind))
    results = json.loads((tmp_path / "run/results.json").read_text())["seeds"]["0"]
    code, out, err = bertlite("evaluate", tmp_path / "run", "--data", tmp_path / "validation.jsonl", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["loss"] > 0
    assert found == pytest.approx({name: results[name] for name in found}, abs=1e-4)
    assert next(iter(TASKS[kind].metrics)) in found and len(found) >= 2
    assert "loss" in bertlite("evaluate", tmp_path / "run", "--data", tmp_path / "validation.jsonl")[1]


def test_evaluate_of_other_columns_and_a_folder_of_hugging_faces(bertlite, vocabulary, tmp_path):
    model = save_model(vocabulary, "classification", tmp_path / "model", std=0.3)
    records = [{"body": record["text"], "topic": record["label"]} for record in make_records("classification")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:30]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[30:70]))
    files = ["--data", tmp_path / "a.jsonl", "--data", tmp_path / "b.jsonl"]
    _, out, err = bertlite("evaluate", model, *files, "--column", "body", "--label", "topic", "--json")
    predictions = LoadedModel(model, initialize_runtime("fp32")).predict([record["body"] for record in records[:70]])
    expected = accuracy_score([record["topic"] for record in records[:70]], [one["label"] for one in predictions])
    assert json.loads(out)["accuracy"] == expected and "70 examples" in err
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "a", "label": "poetry"}) + "\n")
    code, _, err = bertlite("evaluate", model, "--data", tmp_path / "c.jsonl")
    assert code == 2 and re.search(r"c\.jsonl:1: the label 'poetry' is none of .*: ", err)


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("classification", ["--pseudo-perplexity"], "--pseudo-perplexity does not apply: .* is fine-tuned"),
        ("classification", ["--document", "line"], "--document does not apply: "),
        ("", ["--label", "label"], "--label does not apply: .* is not fine-tuned"),
        ("", ["--column", "a", "--column", "b"], "a second --column does not apply"),
        ("", ["--on-bad-example", "skip"], "--on-bad-example does not apply: .* is not fine-tuned"),
    ],
)
def test_options_for_the_other_kind_of_model_are_refused(kind, options, message, bertlite, vocabulary, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "b"}\n')
    model = save_model(vocabulary, kind, tmp_path / "model")
    code, _, err = bertlite("evaluate", model, "--data", tmp_path / "a.jsonl", *options)
    assert code == 2 and re.search(message, err) and len(err.splitlines()) == 1, err


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluate_says_in_which_precision_it_measures(precision, bertlite, vocabulary, tmp_path):
    model = save_model(vocabulary, "classification", tmp_path / "model")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in make_records("classification")[:3]))
    _, _, err = bertlite("evaluate", model, "--data", tmp_path / "a.jsonl", "--precision", precision)
    assert f"--data: measured in {precision}; " in err


@pytest.mark.parametrize("kind", TASKS)
def test_a_run_leaves_all_its_predictions(kind, write, tmp_path):
    results = run(write(kind, train__seeds=[0, 1]))
    records = read_lines(tmp_path / "validation.jsonl")
    for seed in "01":
        lines = read_lines(tmp_path / f"run/seed-{seed}/predictions.jsonl")
        assert len(lines) == len(records) == 24
        for number, (line, record) in enumerate(zip(lines, records, strict=True), 1):
            assert line["where"].endswith(f"validation.jsonl:{number}") and record.items() <= line.items()
        worst = read_lines(tmp_path / f"run/seed-{seed}/worst.jsonl")
        assert worst == sorted(lines, key=lambda line: -line["loss"])
        scores = results["seeds"][seed]
        if kind == "regression":
            expected = np.corrcoef([line["label"] for line in lines], [line["predicted"] for line in lines])[0, 1]
            assert "correct" not in lines[0] and scores["pearson"] == pytest.approx(expected, abs=1e-4)
            continue
        name = {"question-answering": "exact_match", "token-classification": None}.get(kind, "accuracy")
        share = np.mean([line["correct"] for line in lines])
        if name:
            assert share == pytest.approx(scores[name] / (100 if name == "exact_match" else 1))
        if kind == "classification":
            assert all(line["correct"] == (line["predicted"] == line["label"]) for line in lines)
            assert all(next(iter(line["scores"])) == line["predicted"] for line in lines)
            assert all(sum(line["scores"].values()) == pytest.approx(1, abs=1e-4) for line in lines)
        if kind == "token-classification":
            assert all(line["correct"] == (line["predicted"] == line["label"]) for line in lines)
    best = max("01", key=lambda seed: results["seeds"][seed]["validation_" + results["metric"]])
    assert read_lines(tmp_path / "run/predictions.jsonl") == read_lines(tmp_path / f"run/seed-{best}/predictions.jsonl")


def test_rows_that_cannot_be_used_are_skipped_on_request(bertlite, vocabulary, tmp_path):
    model = save_model(vocabulary, "classification", tmp_path / "model", std=0.3)
    records = [*make_records("classification")[:20], {"text": " ", "label": "astronomy"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    command = ["evaluate", model, "--data", tmp_path / "a.jsonl"]
    code, _, err = bertlite(*command)
    assert code == 2 and "--on-bad-example skip leaves them out" in err
    code, _, err = bertlite(*command, "--on-bad-example", "skip")
    assert code == 0 and "1 of 21 rows cannot be used" in err and "20 examples" in err


def test_a_header_takes_the_place_of_the_columns_that_a_task_names(write, bertlite, tmp_path):
    """As in CoLA, whose test set alone has a header: training, evaluation and prediction read it the same way."""
    records = make_records("classification")
    rows = [f"{record['label']}\t{number}\t{record['text']}\n" for number, record in enumerate(records)]
    (tmp_path / "train.tsv").write_text("".join(rows[:80]))
    (tmp_path / "test.tsv").write_text(
        "text\tlabel\n" + "".join(f"{one['text']}\t{one['label']}\n" for one in records[80:])
    )
    columns = {"task__columns": ["label", "number", "text"], "task__validation": None}
    files = {"task__train": str(tmp_path / "train.tsv"), "task__test": str(tmp_path / "test.tsv")}
    run(write("classification", **files, **columns))
    trained = json.loads((tmp_path / "run/results.json").read_text())["seeds"]["0"]
    code, out, err = bertlite("evaluate", tmp_path / "run", "--data", tmp_path / "test.tsv", "--json")
    assert code == 0 and "40 examples" in err and "its first line names the columns" in err
    found = json.loads(out)
    assert found == pytest.approx({name: trained[name] for name in found}, abs=1e-4)
    _, _, err = bertlite("predict", tmp_path / "run", "--file", tmp_path / "test.tsv")
    assert "its first line names the columns" in err
