"""Labels as people write them, rows without a label, and rows that cannot be used."""

import math
import re
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
from sklearn.preprocessing import MultiLabelBinarizer
from tiny_tasks import make_experiment, make_records

from bertlite.config.finetune_settings import InputSettings, TaskSettings
from bertlite.core.errors import UserError
from bertlite.data.formats import Record
from bertlite.finetuning.finetune import run
from bertlite.finetuning.label_lists import check_one_form, collect_labels, read_label_list
from bertlite.finetuning.labels import (
    collect_classes,
    have_label,
    have_number,
    list_some,
    read_label,
    read_number,
    sort_labels,
)
from bertlite.finetuning.splits import read_tables
from bertlite.finetuning.tasks import TASKS

NAMES = ["anger", 'don\'t, "really"', "fear of 9 9", "joy"]
SETS = [["joy", "anger"], [], ["joy"], [NAMES[1], NAMES[2]], NAMES]
VECTORS = MultiLabelBinarizer(classes=NAMES).fit_transform(SETS)


def task_of(kind: str = "multilabel", **settings) -> TaskSettings:
    return TaskSettings.model_validate({"train": "unread", "type": kind, **settings})


def read(path: Path, **settings) -> tuple[list[str], dict[str, list[Record]]]:
    settings = {"type": "multilabel", "train": str(path), "validation": str(path), **settings}
    task = TaskSettings.model_validate(settings)
    return read_tables(TASKS[task.type], task)[:2]


def to_csv(path: Path, cells: list) -> Path:
    pandas.DataFrame({"text": [f"t{n}" for n in range(len(cells))], "label": cells}).to_csv(path, index=False)
    return path


def to_dataset(path: Path, cells: list, feature) -> dict:
    features = datasets.Features({"text": datasets.Value("string"), "label": feature})
    table = datasets.Dataset.from_list([{"text": "t", "label": cell} for cell in cells], features=features)
    table.save_to_disk(path / "saved")
    return {"dataset": str(path / "saved")}


class_lists = [datasets.ClassLabel(names=NAMES)]
FORMS = {
    "pandas lists": (lambda path: to_csv(path / "a.csv", SETS), {}),
    "pandas arrays": (lambda path: to_csv(path / "a.csv", [np.array(names, dtype=str) for names in SETS]), {}),
    "JSON lists": (lambda path: to_csv(path / "a.csv", [str(pandas.Series(names).to_json(orient="values"))
                                                        for names in SETS]), {}),
    "vectors": (lambda path: to_csv(path / "a.csv", VECTORS.tolist()), {"label_names": NAMES}),
    "array vectors": (lambda path: to_csv(path / "a.csv", list(VECTORS)), {"label_names": NAMES}),
    "float vectors": (lambda path: to_csv(path / "a.csv", list(VECTORS.astype(float))), {"label_names": NAMES}),
    "digits": (lambda path: to_csv(path / "a.csv", [" ".join(map(str, row)) for row in VECTORS]),
               {"label_names": NAMES}),
    "numbers": (lambda path: to_csv(path / "a.csv", [np.flatnonzero(row).tolist() for row in VECTORS]),
                {"label_names": NAMES}),
    "separator": (lambda path: to_csv(path / "a.csv", ["|".join(names) for names in SETS]), {"label_separator": "|"}),
    "columns": (lambda path: pandas.DataFrame({"text": "t", **dict(zip(NAMES, VECTORS.T, strict=True))})
                .to_csv(path / "a.csv") or path / "a.csv", {"label": NAMES}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_label_lists_gives_the_vectors_of_scikit_learn(form, tmp_path):
    write, settings = FORMS[form]
    labels, records = read(write(tmp_path), **settings)
    assert labels == NAMES
    names = [read_label_list(record, task_of(**settings)) for record in records["train"]]
    assert np.array_equal(MultiLabelBinarizer(classes=NAMES).fit_transform(names), VECTORS)


def test_lists_of_a_dataset_have_the_names_of_its_classes(tmp_path):
    place = to_dataset(tmp_path, [[3, 0], [], [3], [1, 2]], class_lists)
    labels, records = read(tmp_path, train=place, validation=place)
    assert labels == NAMES and [set(record.columns["label"]) for record in records["train"]] == list(map(set, SETS[:4]))


def test_a_text_in_brackets_is_a_label_where_labels_are_single(tmp_path):
    assert read_label(Record("", {"label": "[joy]"}), task_of("classification")) == "[joy]"
    assert read_label_list(Record("", {"label": "[joy]; [x]"}), task_of(label_separator=";")) == ["[joy]", "[x]"]
    assert read_label_list(Record("", {"label": "['joy', 'x']"}), task_of(label_separator=";")) == ["joy", "x"]
    assert read_label_list(Record("", {"label": math.nan}), task_of()) == []


@pytest.mark.parametrize(
    "cells, settings, message",
    [
        (["['joy']", "joy"], {}, "r2: the labels in column 'label' are text with .*, but a list in a text at r1"),
        (["[1 1 0]", "[0 1 0]"], {}, r"'label' holds vectors of 3 zeros and ones; .* in order, in task\.label_names"),
        (
            ["[joy, fear]"],
            {},
            r"r1: the labels '\[joy, fear\]' look like a list, but are none.* sign, in task\.label_sep",
        ),
        ([[{"name": "joy"}]], {}, "r1: the labels in column 'label' are not texts"),
        (["2"], {"label_names": ["a", "b"]}, r"r1: the label '2' is neither one of task\.label_names nor the number"),
        (["0"], {"label_names": ["1", "2"]}, r"r1: the label '0' is neither"),
    ],
)
def test_labels_of_an_unknown_form_are_named(cells, settings, message):
    records = [Record(f"r{number}", {"label": cell}) for number, cell in enumerate(cells, 1)]
    with pytest.raises(UserError, match=message):
        collect_labels(records, task_of(**settings))
        check_one_form(records, task_of(**settings))


@pytest.mark.parametrize(
    "labels, missing, settings",
    [
        (["e", "n", "c", "-", "", None, math.nan, "e"], [3, 4, 5, 6], {}),
        (["e", "n", "c", -1, "-1"], [3, 4], {}),
        ([-1, 1, -1], [], {}),
        ([-1, 0, 1], [], {}),
        ([-1, 0, 1], [0], {"label_names": ["bad", "good"]}),
        ([-1, 0, 1], [1], {"no_label": ["0"]}),
        (["+", "-"], [], {}),
        (["++", "+", "-", "--"], [], {}),
        (["yes", "-"], [], {}),
        (["yes", "no", "-"], [], {}),
        (["yes", "no", "-1"], [2], {}),
        (["1", "2", "3", "-"], [3], {}),
        (["NA", "nan", "None"], [], {}),
    ],
)
def test_rows_without_a_label(labels, missing, settings):
    records = [Record("", {"label": label}) for label in labels]
    labelled = have_label(records, task_of("classification", **settings), [])
    assert [index for index, has in enumerate(labelled) if not has] == missing
    alone = [records[index] for index in missing] or records
    known = sorted({str(label) for index, label in enumerate(labels) if index not in missing and label})
    assert have_label(alone, task_of("classification", **settings), known) == [not missing] * len(alone)


def test_rows_without_a_label_are_left_out_and_counted(write, capsys):
    records = make_records("classification")
    for number in range(5, 120, 10):
        records[number] = records[number] | {"label": None}
    experiment = make_experiment(write(records=records))
    expected = [record for record in records[24:] if record["label"]]
    assert [record.columns for record in experiment.splits["train"].records] == expected
    told = capsys.readouterr().err
    assert "task.train: 10 of 96 rows have no label and are left out" in told
    assert "task.validation: 2 of 24 rows have no label and are left out" in told
    (counts,) = [line for line in told.splitlines() if line.startswith("train: 86 examples (")]
    most_common = Counter(record["label"] for record in expected).most_common(5)
    assert ", ".join(f"{label} {count}" for label, count in most_common) in counts and " and 2 more), " in counts
    for number in range(24):
        records[number] = records[number] | {"label": ""}
    with pytest.raises(UserError, match=r"task\.validation: none of the 24 rows has a label in 'label'"):
        make_experiment(write(records=records))
    numbers = [Record("", {"label": cell}) for cell in (1.0, None, "", math.nan, "-1", "0")]
    assert have_number(numbers, task_of("regression"), []) == [True, False, False, False, True, True]


def test_minus_one_beside_other_numbers_is_a_label_and_told(capsys):
    hint = "task.train: -1 is a label like 0 and 1; if it means that there is none, set task.no_label"
    for labels, settings, told in [([0, -1, 1], {}, True), ([0, -1, 1], {"no_label": []}, False), ([1, -1], {}, False)]:
        records = [Record("", {"label": label}) for label in labels]
        assert collect_classes(records, task_of("classification", **settings)) == sorted(map(str, labels))
        assert (hint in capsys.readouterr().err) == told


def test_minus_one_of_a_dataset_is_no_label(tmp_path):
    """By the library's convention, also where classes are numbers; GLUE's test splits have nothing else."""
    place = to_dataset(tmp_path, [-1, 0, 1, -1, 1], datasets.ClassLabel(names=["0", "1"]))
    labels, records = read(tmp_path, type="classification", train=place, validation=place)
    assert labels == ["0", "1"] and [record.columns["label"] for record in records["train"]] == ["0", "1", "1"]
    none = to_dataset(tmp_path / "none", [-1, -1], datasets.ClassLabel(names=["0", "1"]))
    with pytest.raises(UserError, match=r"task\.test: none of the 2 rows has a label.* and bertlite predict labels it"):
        read(tmp_path, type="classification", train=place, validation=place, test=none)


def test_columns_of_minus_one_were_not_labelled(tmp_path):
    (tmp_path / "a.csv").write_text("text,a,b\nx,1,0\ny,-1,-1\nz,0,0\n")
    labels, records = read(tmp_path / "a.csv", label=["a", "b"])
    assert labels == ["a", "b"] and [record.columns["text"] for record in records["train"]] == ["x", "z"]
    (tmp_path / "a.csv").write_text("text,a,b\nx,1,0\ny,2,0\n")
    with pytest.raises(UserError, match=r"a\.csv:3: the column 'a' is '2', which is neither 0 nor 1"):
        read(tmp_path / "a.csv", label=["a", "b"])


def test_rows_that_cannot_be_used_end_the_run_or_are_skipped(write, capsys):
    records = make_records("classification")
    for number, change in {
        30: {"text": " "},
        40: {"label": ["x", "y"]},
        50: {"text": None},
        3: {"label": "new"},
    }.items():
        records[number] = records[number] | change
    with pytest.raises(UserError, match=r"jsonl:7: the column 'text' is empty.*\ntask\.train: 3 of 96 rows cannot be"):
        run(write(records=records))
    experiment = make_experiment(write(records=records, task__on_bad_example="skip"))
    assert [len(split.records) for split in experiment.splits.values()] == [93, 23]
    told = capsys.readouterr().err
    (line,) = [line for line in told.splitlines() if line.startswith("task.train: 3 of 96 rows cannot be used")]
    assert re.search(r"left out: .*train\.jsonl:7: the column 'text' is empty: ' '; train\.jsonl:17; .*:27$", line)
    assert "task.validation: 1 of 24 rows cannot be used" in told and "'new' is none of those" in told
    with pytest.raises(UserError, match="there is no column 'body'"):
        make_experiment(write(records=records, task__on_bad_example="skip", task__text="body"))


def test_numbers_are_sorted_alike_in_every_process():
    """Sets of texts have an order of their own in each process."""
    numbers = ["0" * zeros + "1" for zeros in range(8)]
    for labels in (numbers, numbers[::-1]):
        assert sort_labels(dict.fromkeys([*labels, "10", "9"])) == [*sorted(numbers), "9", "10"]


def test_labels_in_messages_take_one_line():
    assert list_some(["two\n\x1b[2Jlines", "x" * 50]) == f"two [2Jlines, {'x' * 29}…"


def test_a_list_of_one_label_is_that_label():
    settings = TaskSettings.model_validate({"train": "unread"})
    assert read_label(Record("a.jsonl:1", {"label": ["spam"]}), settings) == "spam"
    records = [Record("a.jsonl:1", {"label": cell}) for cell in (["spam"], [], [-1], ["ham"])]
    assert have_label(records, settings, []) == [True, False, False, True]
    with pytest.raises(UserError, match=r"task\.type: multilabel"):
        read_label(Record("a.jsonl:1", {"label": ["spam", "ham"]}), settings)


def test_decimal_commas_are_named():
    settings = TaskSettings.model_validate({"train": "unread", "type": "regression"})
    with pytest.raises(UserError, match="'3,5', not a finite number; write decimals with a point"):
        read_number(Record("a.csv:2", {"label": "3,5"}), settings)


@pytest.mark.parametrize(("num_labels", "warns"), [(30, True), (25, False), (3, False)])
def test_labels_that_hardly_repeat_are_a_warning(num_labels, warns, caplog):
    records = [Record(f"a:{n}", {"label": f"{n % num_labels}.5"}) for n in range(50)]
    collect_classes(records, InputSettings())
    assert ("is 'label' their column?" in caplog.text) == warns
