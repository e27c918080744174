"""Metrics against published scores and against the libraries that define them."""

import json
from typing import Any

import numpy as np
import pytest
from seqeval.metrics import classification_report as seqeval_report
from sklearn.metrics import classification_report, f1_score, precision_score, recall_score

from bertlite.config.finetune_settings import TaskSettings
from bertlite.core.errors import UserError
from bertlite.data.formats import Record
from bertlite.finetuning.labels import choose_positive_label
from bertlite.finetuning.metrics import (
    CLASSIFICATION,
    ENTITIES,
    MULTILABEL,
    REGRESSION,
    average_scores,
    classification_metrics,
    score_entities,
    score_labels,
)


def test_r_squared_of_one_number_is_zero():
    assert REGRESSION["r2"]([1.0], [2.0]) == 0 and REGRESSION["r2"]([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1


def test_numbers_and_several_labels():
    assert CLASSIFICATION["matthews_correlation"]([0, 1, 0, 1], [0, 1, 0, 1]) == 1
    assert MULTILABEL["accuracy"]([[0, 1], [1, 1]], [[0, 1], [1, 0]]) == 0.5
    assert REGRESSION["pearson"]([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1)
    assert REGRESSION["spearmanr"]([1.0, 2.0, 3.0], [1.0, 10.0, 5.0]) == pytest.approx(0.5)
    assert REGRESSION["pearson"]([1.0, 2.0], [3.0, 3.0]) == 0
    assert ENTITIES["f1"]([["B-A", "I-A", "O", "B-B"]], [["B-A", "I-A", "O", "O"]]) == pytest.approx(2 / 3)


def settings_of(**settings: Any) -> TaskSettings:
    return TaskSettings.model_validate({"train": "unread", **settings})


def settle(labels: list[str], references: list[int], chosen: str | None) -> TaskSettings:
    """The settings of a task whose training examples have these labels."""
    settings = settings_of(positive_label=chosen)
    records = [Record("", {"label": labels[reference]}) for reference in references]
    return settings.model_copy(update=choose_positive_label(records, labels, settings))


def compute(
    labels: list[str],
    references: list[int],
    predictions: list[int],
    positive_label: str | None = None,
    metric: str | None = None,
) -> dict[str, float]:
    metrics = classification_metrics(labels, settle(labels, references, positive_label), metric)
    return {name: function(references, predictions) for name, function in metrics.items()}


REFERENCES, PREDICTIONS = [0, 1, 1, 0, 1, 0, 0], [0, 1, 0, 1, 1, 0, 0]


@pytest.mark.parametrize(
    "labels, chosen, positive", [("01", None, 1), ("ab", None, 1), ("ba", None, 1), ("ab", "a", 0), ("01", "0", 0)]
)
def test_f1_of_two_labels_is_that_of_the_positive_one(labels, chosen, positive, capsys):
    scores = compute(list(labels), REFERENCES, PREDICTIONS, positive_label=chosen)
    for name, function in {"f1": f1_score, "precision": precision_score, "recall": recall_score}.items():
        assert scores[name] == pytest.approx(function(REFERENCES, PREDICTIONS, pos_label=positive))
    assert scores["macro_f1"] == pytest.approx(f1_score(REFERENCES, PREDICTIONS, average="macro"))
    rarer_is_named = f"f1, precision and recall are those of {labels[positive]!r}, the rarer label"
    assert (rarer_is_named in capsys.readouterr().err) == (chosen is None and labels != "01")


def test_the_positive_label_does_not_depend_on_the_predictions():
    assert compute(["0", "1"], [0, 0], [0, 0])["f1"] == 0  # no warning, no error
    assert settle(["no", "yes"], [1, 1, 0], None).positive_label == "no"  # the rarer one
    assert settle(["no", "yes"], [1, 0], None).positive_label == "yes"
    assert settle(["a", "b", "c"], [0, 1, 2], None).positive_label is None
    for labels, chosen in ((["a", "b", "c"], "a"), (["a", "b"], "x")):
        with pytest.raises(UserError, match=f"task.positive_label is '{chosen}', which is not one of two labels"):
            settle(labels, [0, 1], chosen)
    assert settings_of(positive_label=1).positive_label == "1"  # YAML reads it as a number


def test_a_metric_that_equals_another_one_is_left_out_unless_it_is_chosen():
    references, predictions = [0, 1, 2, 1, 1, 0, 2], [0, 1, 0, 2, 1, 1, 2]
    scores = compute(list("abc"), references, predictions)
    assert list(scores) == ["accuracy", "macro_f1", "matthews_correlation"]
    for metric, average in {"micro_f1": "micro", "f1": "macro"}.items():
        scores = compute(list("abc"), references, predictions, metric=metric)
        assert scores[metric] == pytest.approx(f1_score(references, predictions, average=average))


def macro_average(report: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"macro_{name}": report["macro avg"][name] for name in ("precision", "recall")}


def test_scores_of_each_label_are_those_of_the_report_of_scikit_learn():
    names = ["a", "b", "accuracy", "never"]  # a label may have the name of a row of the report
    for references, predictions in {
        (0, 1, 2, 1): (0, 1, 0, 2),
        ((1, 0, 1, 0), (0, 0, 1, 0), (1, 1, 0, 0)): ((1, 1, 1, 0), (0, 0, 0, 0), (1, 0, 0, 0)),
    }.items():
        references, predictions = np.array(references), np.array(predictions)
        report = classification_report(references, predictions, labels=range(3), output_dict=True, zero_division=0)
        scores = score_labels(list(references), list(predictions), names, settings_of())
        assert scores == {names[label]: report[str(label)] for label in range(3)}
        assert average_scores(scores) == pytest.approx(macro_average(report))
        assert json.loads(json.dumps(scores)) == scores


def test_scores_of_each_kind_of_entity_are_those_of_seqeval():
    references = [["B-A", "I-A", "O", "B-B"], ["B-A", "O"], ["B-c d", "O"]]
    predictions = [["B-A", "I-A", "O", "O"], ["O", "B-A"], ["B-c d", "O"]]
    scores = score_entities(references, predictions)
    report = seqeval_report(references, predictions, output_dict=True, zero_division=0)
    assert scores == {kind: report[kind] for kind in ("A", "B", "c d")}
    assert average_scores(scores) == pytest.approx(macro_average(report))
    assert ENTITIES["macro_f1"](references, predictions) == pytest.approx(report["macro avg"]["f1-score"])
    outside = [["O", "O"]]  # no warning, no error
    assert score_entities(outside, outside) == {} and average_scores({})["macro_recall"] == 0
    assert [metric(outside, outside) for metric in ENTITIES.values()] == [0, 0, 0, 0, 1]
    assert json.loads(json.dumps(scores)) == scores
