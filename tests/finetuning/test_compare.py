"""Two runs compared, by their predictions."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest
from tiny_tasks import make_records

from bertlite.finetuning.finetune import run


def read_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").split("\n") if line]


def test_the_differences_of_two_runs(write, bertlite, tmp_path):
    records = make_records("classification")
    records[0]["text"] += "\u2028\x85"  # ends a line for str.splitlines, but not in JSON lines
    first = run(write(records=records, name="a", train__seeds=[2, 3]))
    second = run(
        write(records=records, name="b", train__seeds=[1, 2, 3], train__learning_rate=1e-2, train__max_steps=15)
    )
    code, out, err = bertlite("compare", tmp_path / "a", tmp_path / "b", "--json")
    assert code == 0, err
    result = json.loads(out)
    expected = [second["seeds"][seed]["accuracy"] - first["seeds"][seed]["accuracy"] for seed in "23"]
    assert list(result["difference"]["seeds"].values()) == pytest.approx(expected)
    assert result["difference"]["mean"] == pytest.approx(np.mean(expected))
    assert result["difference"]["std"] == pytest.approx(np.std(expected, ddof=1))
    lines = read_lines(tmp_path / "a"), read_lines(tmp_path / "b")
    correct = [np.array([line["predicted"] == line["label"] for line in run]) for run in lines]
    only = [int((correct[0] & ~correct[1]).sum()), int((correct[1] & ~correct[0]).sum())]
    assert list(result["only_correct"].values()) == only and sum(only) > 0
    assert result["p_value"] == pytest.approx(binomtest(only[0], sum(only)).pvalue)
    found = [example for examples in result["examples"].values() for example in examples]
    assert len(found) == sum(min(5, number) for number in only)
    by_location = [{line["where"]: line for line in run} for run in lines]
    for example in found:
        assert example["predicted"] == [run[example["where"]]["predicted"] for run in by_location]
    text = bertlite("compare", tmp_path / "a", tmp_path / "b")[1]
    assert re.search(r"^accuracy of 24 examples \(validation\)$", text, re.M)
    assert f"seed 2 {expected[0]:+.4f}, seed 3 {expected[1]:+.4f}" in text and found[0]["where"] in text
    itself = json.loads(bertlite("compare", tmp_path / "a", tmp_path / "a", "--json")[1])
    assert itself["difference"]["mean"] == 0 and itself["p_value"] == 1


def test_predictions_of_numbers_are_neither_right_nor_wrong(write, bertlite, tmp_path):
    run(write("regression", name="a")), run(write("regression", name="b", train__learning_rate=3e-3))
    result = json.loads(bertlite("compare", tmp_path / "a", tmp_path / "b", "--json")[1])
    assert result["difference"]["mean"] != 0 and "only_correct" not in result
    assert bertlite("compare", tmp_path / "a", tmp_path / "b")[1].startswith("pearson of 24 examples")


def test_runs_that_cannot_be_compared(write, bertlite, tmp_path):
    run(write(name="a", train__max_steps=1))
    other = {"seeds": {"train__seeds": [1]}, "metric": {"task__metric": "macro_f1"}}
    for name, changes in other.items():
        run(write(name=name, train__max_steps=1, **changes))
    folders = [
        shutil.copytree(tmp_path / "a", tmp_path / name) for name in ("data", "size", "unfinished", "type", "link")
    ]
    lines = (tmp_path / "a/predictions.jsonl").read_text().splitlines(keepends=True)
    (folders[0] / "predictions.jsonl").write_text("".join([*lines[:3], lines[4], lines[3], *lines[5:]]))
    (folders[1] / "predictions.jsonl").write_text("".join(lines[:20]))
    (folders[2] / "results.json").unlink()
    config = (folders[3] / "config.yaml").read_text()
    (folders[3] / "config.yaml").write_text(config.replace("type: classification", "type: multilabel"))
    (folders[4] / "predictions.jsonl").unlink()
    (folders[4] / "predictions.jsonl").symlink_to(tmp_path / "a/predictions.jsonl")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/results.json").write_text("{}")
    shutil.copytree(tmp_path / "a", tmp_path / "tasks/cola")
    for name, message in {
        "seeds": r"a has the seeds 0, .*seeds 1; give both the same train.seeds",
        "metric": r"metric: the metric is macro_f1, but that of .*a is accuracy",
        "data": r"data was measured on .*validation\.jsonl:5, .*a on .*validation\.jsonl:4",
        "size": r"size was measured on 20 examples, .*a on 24",
        "type": r"type: task\.type is 'multilabel', but that of .*a is 'classification'",
        "link": r"link/predictions\.jsonl: a link that leaves its folder",
        "unfinished": r"unfinished: no finished fine-tuning run \(it has no results\.json\)",
        "tasks": r"tasks: no finished .*; compare one of its tasks, such as .*tasks/cola",
        "gone": r"gone: no finished fine-tuning run",
    }.items():
        code, _, err = bertlite("compare", tmp_path / "a", tmp_path / name)
        assert code == 2 and re.search(message, err) and len(err.splitlines()) == 1, err
