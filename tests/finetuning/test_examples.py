"""Labels and examples of records, and what is wrong with them."""

import math
from typing import Any

import pytest
from tiny_tasks import make_experiment, make_records

from bertlite.config.finetune_settings import TaskSettings
from bertlite.core.errors import UserError
from bertlite.core.random import choose_validation
from bertlite.data.formats import Record
from bertlite.data.tokenizer import load_tokenizer
from bertlite.finetuning.finetune import run
from bertlite.finetuning.label_lists import read_label_list
from bertlite.finetuning.labels import read_label


def bad_records(kind: str, number: int, **changes: Any) -> list[dict[str, Any]]:
    records = make_records(kind)
    records[number] |= changes
    return records


C, R, T, Q = "classification", "regression", "token-classification", "question-answering"


BAD: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "unknown label": (C, bad_records(C, 3, label="new"), {}, r"validation\.jsonl:4: the label 'new' is none of those"),
    "one class": (C, [{"text": "x", "label": "a"}] * 120, {}, r"all 96 examples have the label 'a'"),
    "column": (C, None, {"task__text": "sentence"}, r"no column 'sentence'; there are 'text', 'label'"),
    "label column": (C, None, {"task__label": "y"}, r"task\.label: there is no column 'y'"),
    "empty": (C, bad_records(C, 30, text=" "), {}, r"train\.jsonl:7: the column 'text' is empty"),
    "infinity": (R, bad_records(R, 30, label=math.inf), {}, r"train\.jsonl:7: the target in column 'label' is inf"),
    "label columns": (C, None, {"task__label": ["a", "b"]}, r"task\.label names 2 columns; classification reads 1"),
    "label names": (R, None, {"task__label_names": ["a", "b"]}, r"task\.label_names is .* needs no names; remove it"),
    "no number": (R, bad_records(R, 30, label="much"), {}, r"is 'much', not a finite number"),
    "number beyond fp32": (R, bad_records(R, 30, label=1e39), {}, r"is 1e\+39, not a finite number"),
    "number beyond fp64": (R, bad_records(R, 30, label=10**400), {}, r"not a finite number"),
    "a list": (
        C,
        bad_records(C, 30, label=["a", "b"]),
        {},
        r"train\.jsonl:7: the label .* is \['a', 'b'\], not a single",
    ),
    "tags": (T, bad_records(T, 30, label=["O"]), {}, r"train\.jsonl:7: 15 words, but 1 tags"),
    "words": (T, bad_records(T, 30, text="Ada spoke"), {}, r"train\.jsonl:7: .* should be lists of words and of tags"),
    "no words": (T, bad_records(T, 30, text=[], label=[]), {}, r"train\.jsonl:7: the sentence is empty"),
    "no labels": ("multilabel", [{"text": "x", "label": ""}] * 120, {}, "no example has a label"),
    "tag": (T, bad_records(T, 30, text=["x"], label=["B"]), {}, r"train\.jsonl:7: the tag 'B' marks no entity"),
    "unknown tag": (
        T,
        bad_records(T, 3, text=["x"], label=["B-X"]),
        {},
        r"validation\.jsonl:4: the label 'B-X' is none of those",
    ),
    "positive label": (
        C,
        None,
        {"task__positive_label": "spam"},
        r"task\.positive_label is 'spam', which is not one of tw",
    ),
    "positive number": (
        R,
        None,
        {"task__positive_label": "1"},
        r"task\.positive_label is '1', but regression does not",
    ),
    "no entity": (T, [{"text": ["x", "y"], "label": ["O", "O"]}] * 120, {}, "all tags are O"),
    "answers": (Q, bad_records(Q, 30, answers="x"), {}, r"answers should hold the lists text and answer_start"),
    "stride": (Q, None, {"task__doc_stride": 62}, r"task\.doc_stride is 62, which leaves no room"),
    "length": (C, None, {"task__max_length": 200}, r"task\.max_length is 200, more than the 128 positions"),
    "type": (C, None, {"task__type": "klassification"}, r"task\.type is 'klass.*Did you mean classification"),
    "metric": (C, None, {"task__metric": "pearson"}, r"task\.metric is 'pearson', which is not one of accuracy"),
    "weights": (R, None, {"task__class_weights": "balanced"}, r"task\.class_weights .* regression does not use it"),
    "weight": (C, None, {"task__class_weights": {"x": 2}}, r"task\.class_weights: 'x' is not a label"),
    "smoothing": (R, None, {"train__label_smoothing_factor": 0.1}, r"regression does not use it"),
    "layers": (C, None, {"train__frozen_layers": 5}, r"train\.frozen_layers is 5; the model has 2"),
    "texts": (T, None, {"task__text": ["a", "b"]}, r"task\.text names 2 columns; token-classification reads 1"),
    "model": (C, None, {"model__init_from": None}, r"no model to start from: give it by --model"),
    "no model": (C, None, {"model__init_from": "/nowhere"}, r"/nowhere: no such model folder"),
    "one record": (R, make_records(R)[:25], {"task__validation": None}, r"task\.train holds one example, too few"),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_input_is_named_and_no_run_is_written(name, write, tmp_path):
    kind, records, changes, message = BAD[name]
    with pytest.raises(UserError, match=message):
        run(write(kind, records, **changes))
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*"))


def test_labels_are_stripped():
    settings = TaskSettings.model_validate({"train": "x", "type": "multilabel"})
    assert read_label(Record("", {"label": " a "}), settings) == "a"
    for value, wanted in {0: ["0"], 1: ["1"], "": [], "a, b": ["a", "b"]}.items():
        assert read_label_list(Record("", {"label": value}), settings) == wanted


def test_labels_without_examples_and_untrained_positions_are_logged(write, vocabulary, capsys):
    records = make_records("classification")
    validation, train = records[:24], records[24:]
    label = min(record["label"] for record in records)
    other = next(record for record in records if record["label"] != label)
    config = write("classification", [other if record["label"] == label else record for record in validation] + train)
    make_experiment(config)
    messages = capsys.readouterr().err
    assert messages.index("reading the tables") < messages.index("tokenizing the examples") < messages.index("train: ")
    assert f"validation: no example has the label {label}, so it is not measured" in messages
    assert messages.count("has the label") == 1 and "later positions" not in messages

    for record, is_validation in zip(train, choose_validation(len(train), 0.1), strict=True):
        if is_validation:
            record["label"] = "rare"
    make_experiment(write("classification", records, task__validation=None))
    assert "train: no example has the label rare, so it is not learned" in capsys.readouterr().err

    tokenizer = load_tokenizer(str(config.model.init_from))
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(str(config.model.init_from))
    longest = int(max(split.batches.lengths.max() for split in make_experiment(config).splits.values()))
    assert longest > 16
    assert f"examples have up to {longest} tokens, but {config.model.init_from} was trained on 16" in (
        capsys.readouterr().err
    )
