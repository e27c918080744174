"""Question answering: the metrics, the examples, and the answers of scores."""

import json
import math

import numpy as np
import pytest
import torch
from paths import SHARED
from tiny_tasks import SENTENCES, make_experiment, make_records, save_model
from transformers import BertForQuestionAnswering

from bertlite.api import LoadedModel
from bertlite.core.errors import UserError
from bertlite.core.runtime import initialize_runtime
from bertlite.data.masking import IGNORED
from bertlite.finetuning.answer_metrics import ANSWERS
from bertlite.finetuning.answers import context_offsets
from bertlite.finetuning.decoding import Outputs

Q = "question-answering"
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


def test_doc_stride_and_max_answer_length(write):
    counts = []
    for stride in (1, 12):
        experiment = make_experiment(write(Q, task__max_length=32, task__doc_stride=stride))
        counts.append(len(experiment.splits["train"].examples.encodings))
    assert 96 < counts[0] < counts[1]
    examples = experiment.splits["train"].examples
    scores = [np.outer(np.arange(len(encoding)), [-1.0, 1.0]) for encoding in examples.encodings]
    for most in (1, 3):
        settings = experiment.settings.model_copy(update={"max_answer_length": most})
        answers = experiment.task.decode(Outputs(scores, examples, experiment.labels, settings))
        assert max(len(experiment.tokenizer.tokenize(answer)) for answer in answers) == most


def test_answers_missing_from_their_context_are_logged_and_ignored(write, capsys):
    records = make_records(Q)
    for number in (30, 31):
        records[number]["answers"] = {"text": ["not there"], "answer_start": [2]}
    experiment = make_experiment(write(Q, records))
    assert "2 of 96 questions have no answer at their answer_start, such as" in capsys.readouterr().err
    examples = experiment.splits["train"].examples
    pairs = list(zip(examples.record_indices, examples.targets, strict=True))
    ignored = {record for record, target in pairs if target[0] == IGNORED}
    assert ignored == {6, 7}
    with_answer = set()
    for encoding, (record, target) in zip(examples.encodings, pairs, strict=True):
        if target[0] > 0:
            offsets = context_offsets(encoding)
            covered = records[24 + record]["context"][offsets[target[0], 0] : offsets[target[1], 1]]
            assert records[24 + record]["answers"]["text"][0] in covered and len(encoding) >= target[1]
            with_answer.add(record)
    assert len(with_answer) > 80


def test_answers_are_the_best_spans_of_the_context(vocabulary, tmp_path):
    folder = save_model(vocabulary, "question-answering", tmp_path, std=0.3)
    model = LoadedModel(folder, initialize_runtime("fp32"))
    tokenizer = model.tokenizer
    tokenizer.model_max_length = 64  # shorter than the context
    theirs = BertForQuestionAnswering.from_pretrained(folder).eval()
    context = " ".join(text for _, text in SENTENCES[:4])
    answer = model.predict(f"What is it?\t{context}")
    assert context[answer["start"] : answer["end"]] == answer["answer"]
    encoded = tokenizer("What is it?", context, truncation="only_second", max_length=64, stride=16,
                       return_overflowing_tokens=True)  # fmt: skip
    assert len(encoded.encodings) > 2
    best = (-math.inf, 0, 0)
    for encoding in encoded.encodings:
        result = theirs(torch.tensor([encoding.ids]), token_type_ids=torch.tensor([encoding.type_ids]))
        positions = [position for position, text in enumerate(encoding.sequence_ids) if text == 1]
        for first in positions:
            for last in range(first, min(first + 30, positions[-1] + 1)):
                score = (result.start_logits[0, first] + result.end_logits[0, last]).item()
                best = max(best, (score, encoding.offsets[first][0], encoding.offsets[last][1]))
    assert (answer["start"], answer["end"]) == best[1:]
    assert model.predict("What?\t\u200b") == {  # a context without tokens
        "score": 0.0,
        "start": 0,
        "end": 0,
        "answer": "",
    }
    with pytest.raises(UserError, match=r"text 2: should be two texts, .*, separated by a tab"):
        model.predict(["a\tb", "no tab"])
