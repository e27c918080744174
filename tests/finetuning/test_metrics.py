"""Metrics against published scores and against the libraries that define them."""

import json

import pytest
from paths import SHARED
from sklearn.metrics import f1_score

from bertlite.finetuning.metrics import ANSWERS, CLASSIFICATION, ENTITIES, MULTILABEL, REGRESSION

CHECK = SHARED / "qa" / "evaluator_check"
# Exact match and F1. BERT's ensemble as published; the others as this scorer measured them, so that it does not drift.
EXPECTED = {
    "BERT_ensemble": (86.2, 92.2),
    "Logistic": (40.1, 51.0),
    "Match_LSTM": (67.6, 76.8),
    "r_net": (82.5, 88.5),
}


# Reference answers, a prediction, and its exact match and F1 by hand, after the rules of SQuAD's evaluation script.
SCORED_ANSWERS = [
    (["Marie Curie"], "Marie Curie", 1, 1),
    (["Marie Curie"], "marie curie.", 1, 1),  # neither case nor punctuation counts
    (["the Seine", "The Seine River"], "Seine", 1, 1),  # articles do not count; the answer that fits best does
    (["in 1911", "1911"], "in the year 1911", 0, 4 / 5),  # 2 of 3 words shared with 2 of 2
    (["Warsaw, Poland"], "Warsaw", 0, 2 / 3),
    (["a radioactive element"], "radium", 0, 0),
    (["two", "two times"], "two two times", 0, 4 / 5),  # a repeated word is shared as often as both have it
    (["the U.S."], "US", 1, 1),
    (["well-known"], "well known", 0, 0),  # punctuation is deleted, not replaced by a space
    (["theory"], "the ory", 0, 0),  # articles are whole words
    (["9.5%"], "95", 1, 1),
    (["  The U.S.-based   an Apple! "], "usbased apple", 1, 1),
    (["the big cat"], "a cat sat", 0, 1 / 2),
    (["physics"], "", 0, 0),
]


@pytest.mark.parametrize("answers, prediction, exact, f1", SCORED_ANSWERS)
def test_an_answer_scores_as_by_hand(answers, prediction, exact, f1):
    assert ANSWERS["exact_match"]([answers], [prediction]) == 100 * exact
    assert ANSWERS["f1"]([answers], [prediction]) == pytest.approx(100 * f1)


@pytest.mark.parametrize("metric, column", [("exact_match", 2), ("f1", 3)])
def test_the_score_of_several_questions_is_the_mean_in_percent(metric, column):
    answers, predictions, *_ = zip(*SCORED_ANSWERS, strict=True)
    expected = 100 * sum(case[column] for case in SCORED_ANSWERS) / len(SCORED_ANSWERS)
    assert ANSWERS[metric](answers, predictions) == pytest.approx(expected)


@pytest.mark.skipif(not CHECK.exists(), reason="needs ../shared/data; the rules are tested above")
@pytest.mark.parametrize("name", EXPECTED)
def test_predictions_of_published_systems_score_as_published(name):
    articles = json.loads((CHECK / "dev-v1.1.rebuilt.json").read_text())["data"]
    questions = {
        question["id"]: [answer["text"] for answer in question["answers"]]
        for article in articles
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    }
    (path,) = CHECK.glob(f"pred_{name}*.json")
    predictions = json.loads(path.read_text())
    answers = [predictions.get(identity, "") for identity in questions]
    scores = {name: metric(list(questions.values()), answers) for name, metric in ANSWERS.items()}
    assert (round(scores["exact_match"], 1), round(scores["f1"], 1)) == EXPECTED[name]


def test_r_squared_of_one_number_is_zero():
    assert REGRESSION["r2"]([1.0], [2.0]) == 0 and REGRESSION["r2"]([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1


def test_labels_and_numbers():
    assert CLASSIFICATION["f1"]([0, 1, 1], [0, 1, 0]) == f1_score([0, 1, 1], [0, 1, 0])
    assert CLASSIFICATION["f1"]([0, 1, 2], [0, 1, 0]) == CLASSIFICATION["macro_f1"]([0, 1, 2], [0, 1, 0])
    assert CLASSIFICATION["f1"]([0, 1, 1], [0, 1, 2]) == CLASSIFICATION["f1"]([0, 1, 1], [0, 1, 0])  # the same metric
    assert CLASSIFICATION["f1"]([0, 0], [0, 0]) == 0  # no warning, no error
    assert CLASSIFICATION["matthews_correlation"]([0, 1, 0, 1], [0, 1, 0, 1]) == 1
    assert MULTILABEL["accuracy"]([[0, 1], [1, 1]], [[0, 1], [1, 0]]) == 0.5
    assert REGRESSION["pearson"]([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1)
    assert REGRESSION["spearmanr"]([1.0, 2.0, 3.0], [1.0, 10.0, 5.0]) == pytest.approx(0.5)
    assert REGRESSION["pearson"]([1.0, 2.0], [3.0, 3.0]) == 0
    assert ENTITIES["f1"]([["B-A", "I-A", "O", "B-B"]], [["B-A", "I-A", "O", "O"]]) == pytest.approx(2 / 3)
