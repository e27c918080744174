"""Question answering: the metrics, the examples, and the answers of scores."""

import json
import string
import unicodedata
from typing import Any

import numpy as np
import pytest
import torch
from paths import SHARED
from tiny_tasks import SENTENCES, make_experiment, make_records, save_model
from transformers import BertForQuestionAnswering

from bertlite.api import LoadedModel
from bertlite.config.finetune_settings import SavedTask
from bertlite.core.errors import UserError
from bertlite.core.runtime import initialize_runtime
from bertlite.data.masking import IGNORED
from bertlite.finetuning.answer_metrics import ANSWERS, choose_null_threshold, scores_by_answerability, split_answer
from bertlite.finetuning.answers import context_offsets, find_best_answers
from bertlite.finetuning.decoding import Outputs
from bertlite.finetuning.finetune import run

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
    ([""], "", 1, 1),  # unanswerable
    ([""], "physics", 0, 0),
    ([""], "the", 1, 1),  # which has no words
    (["the", "a lake"], "", 0, 0),  # an answer without words does not count beside others …
    (["the"], "", 1, 1),  # … alone it does
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


# In text without spaces each character counts, as in MLQA; punctuation of any width does not.
SPACELESS_ANSWERS = [
    ("紅樓夢", "《紅樓夢》", 1, 1),
    ("北京大学", "北京", 0, 2 / 3),
    ("1998年8月", "1998年", 0, 2 * 2 / (2 + 4)),  # 1998 年 8 月
    ("iPhone手机", "the iPhone 手机", 0, 2 * 3 / (3 + 4)),  # English articles count
    ("the iPhone", "iPhone手机", 0, 2 / (2 + 3)),
    ("“长城”，", "长城", 1, 1),
    ("东京、大阪", "东京", 0, 2 / 3),
    ("長野県松本市", "松本市", 0, 2 * 3 / 9),
    ("カタカナ・テスト", "カタカナテスト", 1, 1),
    ("寿司ラーメン", "ラーメン", 0, 2 * 4 / 10),
    ("ｶﾀｶﾅ", "ｶﾀ", 0, 2 / 3),
    ("人々", "人", 0, 2 / 3),
    ("上海", "", 0, 0),
    ("", "上海", 0, 0),
]


def split_as_mlqa(text: str) -> list[str]:
    """Split an answer by MLQA's rules for Chinese, with kana and iteration marks beside Chinese characters."""
    words, latin = [], ""
    for character in text.lower():
        if character in string.punctuation or unicodedata.category(character)[0] == "P":
            continue
        name = unicodedata.name(character, "")
        if "IDEOGRAPH" in name or "HIRAGANA" in name or "KATAKANA" in name:
            words += [*latin.split(), character]
            latin = ""
        else:
            latin += character
    return words + latin.split()


@pytest.mark.parametrize("answer, prediction, exact, f1", SPACELESS_ANSWERS)
def test_text_without_spaces_scores_by_characters(answer, prediction, exact, f1):
    assert ANSWERS["exact_match"]([[answer]], [prediction]) == 100 * exact
    assert ANSWERS["f1"]([[answer]], [prediction]) == pytest.approx(100 * f1)
    for text in (answer, prediction):
        assert split_answer(text, by_characters=True) == split_as_mlqa(text)
    if answer and prediction:  # CMRC 2018 has the same characters, but for F1 it asks for them in a row
        assert (split_as_mlqa(answer) == split_as_mlqa(prediction)) == exact


def evaluate_squad_v2(references, answers, differences, threshold) -> tuple[dict[str, float], float]:
    """Return the metrics of SQuAD 2.0's evaluation script at a threshold, and the best F1 that its search finds."""

    def normalize(text: str) -> str:
        text = "".join(" " if character.isspace() else character for character in text.lower())
        text = "".join(character for character in text if character not in string.punctuation)
        return " ".join(word for word in text.split() if word not in ("a", "an", "the"))

    def f1_of(gold: str, predicted: str) -> float:
        gold_words, words = normalize(gold).split(), normalize(predicted).split()
        if not gold_words or not words:
            return float(gold_words == words)
        same = sum(min(gold_words.count(word), words.count(word)) for word in set(words))
        precision, recall = same / len(words), same / len(gold_words)
        return 2 * precision * recall / (precision + recall) if same else 0.0

    questions = []
    for texts, answer, difference in zip(references, answers, differences, strict=True):
        golds = [text for text in texts if normalize(text)] or [""]
        exact, f1 = max(float(normalize(gold) == normalize(answer)) for gold in golds), 0.0
        f1, answerable = max(f1_of(gold, answer) for gold in golds), bool(texts != [""])
        questions.append((answerable, exact, f1, difference, bool(answer)))
    results = {}
    for prefix, kinds in {"": (True, False), "HasAns_": (True,), "NoAns_": (False,)}.items():
        chosen = [question for question in questions if question[0] in kinds]
        for name, column in {"exact": 1, "f1": 2}.items():
            values = [question[column] if question[3] <= threshold else float(not question[0]) for question in chosen]
            results[prefix + name] = 100 * sum(values) / len(values)
    score = best = sum(not question[0] for question in questions)
    for answerable, _, f1, _, has_text in sorted(questions, key=lambda question: question[3]):
        score += f1 if answerable else -has_text
        best = max(best, score)
    return results, 100 * best / len(questions)


def make_predictions(seed: int) -> tuple[list[list[str]], list[str], list[float]]:
    """Make up references, answers and differences of 40 questions, half of them unanswerable."""
    generator = np.random.default_rng(seed)
    texts = [" the ".join(words) for words in generator.choice(["sea", "of", "Sand,", "1911"], (80, 2))]
    references = [[text, "sea"] if number % 2 else [""] for number, text in enumerate(texts[:40])]
    return references, texts[40:], (generator.normal(size=40) - np.arange(40) % 2).tolist()


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_has_the_best_f1_of_squad_v2(seed):
    references, answers, differences = make_predictions(seed)
    threshold = choose_null_threshold(references, answers, differences)
    expected, best = evaluate_squad_v2(references, answers, differences, threshold)
    assert expected["f1"] == pytest.approx(best)
    assert abs(np.array(differences) - threshold).min() > 1e-9
    kept = ["" if difference > threshold else answer for answer, difference in zip(answers, differences, strict=True)]
    ours = {name: metric(references, kept) for name, metric in ANSWERS.items()}
    ours = {"exact": ours["exact_match"], "f1": ours["f1"]} | scores_by_answerability(references, kept)
    assert ours == pytest.approx(expected)
    every, none = ["sea"] * 40, [""] * 40
    assert choose_null_threshold([["sea"]] * 40, every, differences) > max(differences)  # the extremes
    assert choose_null_threshold([[""]] * 40, every, differences) < min(differences)
    assert choose_null_threshold([["sea"]] * 40, none, differences) < min(differences)
    assert scores_by_answerability([["sea"]] * 40, none) == {}


def test_the_threshold_by_hand():
    """Answering the first two of four questions is best: 1 + 2/3 + 0 + 1."""
    references, answers = [["Rome"], ["the old town"], ["Oslo"], [""]], ["Rome", "town", "Bergen", "Bern"]
    assert choose_null_threshold(references, answers, [-3.0, 1.0, 2.5, 2.0]) == 1.5
    assert choose_null_threshold(references, answers, [-3.0, 2.0, 2.5, 2.0]) == -0.5  # equal: both or none
    kept = ["Rome", "town", "", ""]
    assert ANSWERS["f1"](references, kept) == pytest.approx(100 * (1 + 2 / 3 + 0 + 1) / 4)
    assert scores_by_answerability(references, kept) == pytest.approx(
        {"HasAns_f1": 100 * 5 / 9, "HasAns_exact": 100 / 3, "NoAns_f1": 100, "NoAns_exact": 100}
    )


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


def answer_as_the_pipeline(scores: np.ndarray, encoding: Any, context: str, longest: int) -> dict[str, Any]:
    """Answer from one part of a context as transformers' question-answering pipeline does: try every span."""
    allowed = [sequence == 1 for sequence in encoding.sequence_ids]
    allowed[0] = True  # [CLS]
    sums = np.exp(scores.astype(np.float64))[allowed].sum(0)
    best: tuple[float, int, int] = (0.0, 0, 0)
    for first in range(1, len(allowed)):
        for last in range(first, min(first + longest, len(allowed))):
            if allowed[first] and allowed[last]:
                score = float(np.exp(scores[first, 0]) / sums[0] * np.exp(scores[last, 1]) / sums[1])
                best = max(best, (score, -first, -last))
    score, first, last = best[0], -best[1], -best[2]
    start, end = encoding.offsets[first][0], encoding.offsets[last][1]
    while encoding.word_ids[first - 1] == encoding.word_ids[first] and encoding.sequence_ids[first - 1] == 1:
        first -= 1
        start = encoding.offsets[first][0]
    while encoding.word_ids[last + 1] == encoding.word_ids[last] and encoding.sequence_ids[last + 1] == 1:
        last += 1
        end = encoding.offsets[last][1]
    null_score = float(np.prod(np.exp(scores[0]) / sums))
    return {"score": score, "start": start, "end": end, "answer": context[start:end], "null_score": null_score}


@pytest.fixture(scope="module")
def answerer(vocabulary, tmp_path_factory) -> LoadedModel:
    """A model of random weights that answers questions."""
    folder = save_model(vocabulary, Q, tmp_path_factory.mktemp("answerer"), std=0.3)
    return LoadedModel(folder, initialize_runtime("fp32"))


CONTEXT = " ".join(text for _, text in SENTENCES[:4])


@pytest.mark.parametrize("length, longest", [(64, 30), (100, 3), (128, 30)])
def test_predictions_are_those_of_the_question_answering_pipeline(answerer, monkeypatch, length, longest):
    """Over several parts of a context, which overlap by half; 4.46 is the last version that has the pipeline."""
    tokenizer = answerer.tokenizer
    monkeypatch.setattr(tokenizer, "model_max_length", length)
    monkeypatch.setattr(answerer.model, "task", SavedTask(type=Q, max_length=length, max_answer_length=longest))
    theirs = BertForQuestionAnswering.from_pretrained(answerer.folder).eval()
    for number in range(12):
        question = f"What follows {SENTENCES[number][1].split()[3]}?"
        encoded = tokenizer(question, CONTEXT, truncation="only_second", max_length=length, stride=length // 2,
                            return_overflowing_tokens=True)  # fmt: skip
        assert len(encoded.encodings) > 1
        expected: dict[str, Any] = {"score": 0.0}
        for encoding in encoded.encodings:
            with torch.inference_mode():
                result = theirs(torch.tensor([encoding.ids]), token_type_ids=torch.tensor([encoding.type_ids]))
            scores = torch.stack([result.start_logits[0], result.end_logits[0]], -1).numpy()
            answer = answer_as_the_pipeline(scores, encoding, CONTEXT, longest)
            expected = max(expected, answer, key=lambda answer: answer["score"])
        answer = answerer.predict(f"{question}\t{CONTEXT}")
        assert answer["score"] == pytest.approx(expected["score"], rel=1e-4)
        assert [answer[key] for key in ("start", "end", "answer")] == [
            expected[key] for key in ("start", "end", "answer")
        ]


def test_a_context_without_tokens_has_no_answer(answerer):
    assert answerer.predict("What?\t\u200b") == {"score": 0.0, "start": 0, "end": 0, "answer": ""}
    with pytest.raises(UserError, match=r"text 2: should be two texts, .*, separated by a tab"):
        answerer.predict(["a\tb", "no tab"])


def best_spans(scores: list[np.ndarray], examples: Any, longest: int) -> list[tuple[str, float]]:
    """Return the answers and differences of run_qa, trying every span."""
    best: dict[int, tuple[float, str]] = {}
    null: dict[int, float] = {}
    for values, record, encoding in zip(scores, examples.record_indices, examples.encodings, strict=True):
        null[record] = min(null.get(record, np.inf), float(values[0, 0] + values[0, 1]))
        positions = [position for position, sequence in enumerate(encoding.sequence_ids) if sequence == 1]
        for first in positions:
            for last in positions[positions.index(first) :][:longest]:
                span = examples.texts[record][1][encoding.offsets[first][0] : encoding.offsets[last][1]]
                best[record] = max(best.get(record, (-np.inf, "")), (float(values[first, 0] + values[last, 1]), span))
    return [(best[record][1], null[record] - best[record][0]) for record in sorted(best)]


def test_answers_that_are_measured_are_those_of_run_qa(write):
    experiment = make_experiment(write(Q, task__max_length=40, task__doc_stride=8))
    examples = experiment.splits["validation"].examples
    assert len(examples.encodings) > len(examples.texts)
    generator = np.random.default_rng(0)
    scores = [generator.normal(size=(len(encoding), 2)).astype(np.float32) for encoding in examples.encodings]
    answers, differences = zip(*best_spans(scores, examples, 4), strict=True)
    settings = experiment.settings.model_copy(update={"max_answer_length": 4})
    for threshold in (None, 0.0, float(np.median(differences))):
        settings = settings.model_copy(update={"null_score_diff_threshold": threshold})
        outputs = Outputs(scores, examples, experiment.labels, settings)
        assert find_best_answers(outputs)[1] == pytest.approx(differences, abs=1e-5)
        expected = [
            "" if threshold is not None and difference > threshold else answer
            for answer, difference in zip(answers, differences, strict=True)
        ]
        assert experiment.task.decode(outputs) == expected
        found = experiment.task.results(outputs, 1)
        assert [answer["answer"] == "" for answer in found] == [answer == "" for answer in expected]
    assert "" in expected and any(expected)
    null_scores: dict[int, float] = {}
    for values, record, encoding in zip(scores, examples.record_indices, examples.encodings, strict=True):
        score = answer_as_the_pipeline(values, encoding, examples.texts[record][1], 4)["null_score"]
        null_scores[record] = min(score, null_scores.get(record, 1.0))
    for record, answer in enumerate(found):
        if not answer["answer"]:
            assert answer == {"score": pytest.approx(null_scores[record]), "start": 0, "end": 0, "answer": ""}


def test_unanswerable_questions_train_cls_in_all_examples(write, capsys):
    records = make_records(Q)
    nothing = {"text": [], "answer_start": []}
    records[30]["answers"] = nothing
    records[31] |= {"is_impossible": True}  # whatever the answers are
    records[32] |= {"answers": nothing, "is_impossible": True}
    records[33] |= {"answers": nothing, "is_impossible": False}  # missing
    examples = make_experiment(write(Q, records, task__max_length=32, task__doc_stride=16)).splits["train"].examples
    messages = capsys.readouterr().err
    assert "3 of 96 questions are unanswerable" in messages and "1 of 96 questions have no answer" in messages
    pairs = list(zip(examples.record_indices, examples.targets, strict=True))
    for record, expected in {6: 0, 7: 0, 8: 0, 9: IGNORED}.items():
        targets = [target.tolist() for index, target in pairs if index == record]
        assert targets and targets == [[expected, expected]] * len(targets)
    assert sum(6 <= record <= 9 for record, _ in pairs) > 8  # contexts of several examples
    assert examples.references[6:9] == [[""]] * 3


def test_a_run_on_unanswerable_questions_keeps_its_threshold(write, tmp_path):
    records = make_records(Q)
    articles = []
    for number, record in enumerate(records):
        answers = [{"text": record["answers"]["text"][0], "answer_start": record["answers"]["answer_start"][0]}]
        question = {"id": record["id"], "question": record["question"], "is_impossible": number % 3 == 0}
        question["answers"] = [] if question["is_impossible"] else answers
        articles.append({"paragraphs": [{"context": record["context"], "qas": [question]}]})
    for name, part in {"train": articles[24:], "validation": articles[:24]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"version": "v2.0", "data": part}))
    tables = {f"task__{name}": str(tmp_path / f"{name}.json") for name in ("train", "validation")}
    config = write(Q, task__test=str(tmp_path / "validation.json"), **tables)
    scores = run(config)["seeds"]["0"]
    names = ("f1", "exact_match", "HasAns_f1", "HasAns_exact", "NoAns_f1", "NoAns_exact")
    assert scores["f1"] == pytest.approx((16 * scores["HasAns_f1"] + 8 * scores["NoAns_f1"]) / 24)
    assert {name: scores[name] for name in names} == {name: scores[f"validation_{name}"] for name in names}
    assert scores["f1"] > 33.3  # of answering nothing
    threshold = json.loads((tmp_path / "run" / "model" / "task.json").read_text())["null_score_diff_threshold"]
    assert isinstance(threshold, float)
    fixed = run(write(Q, name="fixed", **tables, task__null_score_diff_threshold=-1e4))["seeds"]["0"]
    assert fixed["f1"] == pytest.approx(100 / 3) and fixed["NoAns_f1"] == 100 and fixed["HasAns_f1"] == 0
    model = LoadedModel(tmp_path / "fixed" / "model", initialize_runtime("fp32"))
    assert model.predict(f"Who?\t{CONTEXT}")["answer"] == ""


def make_word_questions(count: int) -> list[dict[str, Any]]:
    """Make questions for a word of a context, a third of which is not there."""
    generator = np.random.default_rng(0)
    records = []
    for _ in range(count):
        word, *others = generator.permutation(["state", "people", "cells", "order"]).tolist()
        words = generator.permutation([*others[:2], *([word] if generator.random() < 2 / 3 else [])]).tolist()
        context = " ".join(words)
        answers = [(word, context.index(word))] if word in words else []
        columns = dict(zip(("text", "answer_start"), zip(*answers, strict=True), strict=False))
        records.append({"question": word, "context": context, "answers": {"text": [], "answer_start": []} | columns})
    return records


def test_answers_and_their_absence_are_learned(write, tmp_path):
    no_dropout = {"model__hidden_dropout_prob": 0.0, "model__attention_probs_dropout_prob": 0.0}
    config = write(Q, make_word_questions(224), train__max_steps=120, train__eval_steps=60, train__learning_rate=4e-3,
                   train__global_batch_size=16, **no_dropout)  # fmt: skip
    scores = run(config)["seeds"]["0"]
    assert scores["HasAns_exact"] > 95 and scores["NoAns_exact"] > 95
    model = LoadedModel(tmp_path / "run" / "model", initialize_runtime("fp32"))
    assert model.predict("cells\tstate cells people")["answer"] == "cells"
    assert model.predict("order\tstate cells people")["answer"] == ""
