"""Metrics of question answering: those of SQuAD 1.1 and 2.0, and for text without spaces those of MLQA."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np

from bertlite.finetuning.metrics import Metric

# Chinese characters, kana, and the marks that repeat one.
CHARACTERS = re.compile(
    "[\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)


def split_answer(text: str, by_characters: bool = False) -> list[str]:
    """Split an answer into the words that count, in lower case.

    As in SQuAD, ASCII punctuation and English articles do not count (Rajpurkar et al. 2016, section 6.1). With
    `by_characters`, as for Chinese in MLQA (Lewis et al. 2020), no punctuation counts, and each Chinese or Japanese
    character is a word. Example: 《红楼梦》 of 1791 → 红, 楼, 梦, of, 1791.
    """
    characters = [character for character in text.lower() if character not in string.punctuation]
    if by_characters:
        text = "".join(character for character in characters if not unicodedata.category(character).startswith("P"))
        return CHARACTERS.sub(r" \g<0> ", text).split()
    return re.sub(r"\b(a|an|the)\b", " ", "".join(characters)).split()


def split_both(answer: str, prediction: str) -> tuple[list[str], list[str]]:
    """Split a reference answer and a prediction, by characters if either has one of Chinese or Japanese."""
    by_characters = CHARACTERS.search(answer + prediction) is not None
    return split_answer(answer, by_characters), split_answer(prediction, by_characters)


def answer_match(answer: str, prediction: str) -> float:
    """1 if the predicted answer has the words of the reference answer, else 0."""
    expected, predicted = split_both(answer, prediction)
    return float(expected == predicted)


def answer_overlap(answer: str, prediction: str) -> float:
    """F1 of the words that a predicted and a reference answer share; 1 if both have none, 0 if one of them has none."""
    expected, predicted = split_both(answer, prediction)
    if not expected or not predicted:
        return float(expected == predicted)
    return 2 * (Counter(predicted) & Counter(expected)).total() / (len(predicted) + len(expected))


def best_of_answers(metric: Metric, answers: Sequence[str], prediction: str) -> float:
    """Return a metric against the reference answer that fits best; one without words counts only if all are so."""
    return max(metric(answer, prediction) for answer in [text for text in answers if split_answer(text)] or answers)


def is_correct(answers: Sequence[str], prediction: str) -> bool:
    """Return whether a prediction has the words of one of the reference answers."""
    return best_of_answers(answer_match, answers, prediction) == 1


def mean_over_questions(metric: Metric, references: Sequence[Sequence[str]], predictions: Sequence[str]) -> float:
    """Mean over the questions, in percent, of a metric against the reference answer that fits best."""
    pairs = zip(references, predictions, strict=True)
    return 100 * float(np.mean([best_of_answers(metric, answers, prediction) for answers, prediction in pairs]))


def scores_by_answerability(references: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """Return the metrics of the questions with and without an answer, by SQuAD 2.0's names; {} if all have one."""
    answerable = [any(answers) for answers in references]
    if all(answerable):
        return {}
    scores = {}
    for name, value in {"HasAns": True, "NoAns": False}.items():
        chosen = [index for index, is_answerable in enumerate(answerable) if is_answerable == value]
        subset = [references[index] for index in chosen], [predictions[index] for index in chosen]
        if chosen:
            scores[f"{name}_f1"] = mean_over_questions(answer_overlap, *subset)
            scores[f"{name}_exact"] = mean_over_questions(answer_match, *subset)
    return scores


def choose_null_threshold(
    references: Sequence[Sequence[str]], answers: Sequence[str], differences: Sequence[float]
) -> float:
    """Return the threshold with the highest F1: questions whose difference exceeds it are left without an answer.

    `differences` are the score of no answer minus that of the predicted one. This is the search for the best F1 in
    SQuAD 2.0's evaluation script (Rajpurkar et al. 2018), but the threshold lies midway between two differences, so
    that rounding changes no decision.
    """
    gains = [
        best_of_answers(answer_overlap, texts, answer) - best_of_answers(answer_overlap, texts, "")
        for texts, answer in zip(references, answers, strict=True)
    ]
    order = np.argsort(differences, kind="stable")
    edges = np.concatenate([[-np.inf], np.asarray(differences)[order], [np.inf]])
    totals = np.cumsum([0, *np.array(gains)[order]])  # of answering the first 0, 1, … questions
    best = int(np.where(edges[:-1] < edges[1:], totals, -np.inf).argmax())
    return float(np.clip(edges[best : best + 2].mean(), edges[1] - 1, edges[-2] + 1))


# The first is the default.
ANSWERS: dict[str, Metric] = {
    "f1": partial(mean_over_questions, answer_overlap),
    "exact_match": partial(mean_over_questions, answer_match),
}
