"""Metrics of question answering, as SQuAD's evaluation script defines them."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np

from bertlite.finetuning.metrics import Metric


def normalize_answer(text: str) -> str:
    """Lower the case, drop punctuation and articles, as SQuAD does (Rajpurkar et al. 2016, section 6.1)."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_match(answer: str, prediction: str) -> float:
    """1 if the predicted answer equals the reference answer, else 0."""
    return float(normalize_answer(answer) == normalize_answer(prediction))


def answer_overlap(answer: str, prediction: str) -> float:
    """F1 of the words that a predicted and a reference answer share."""
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(answer).split()
    num_shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * num_shared / (len(predicted) + len(expected)) if num_shared else 0.0


def best_of_answers(metric: Metric, references: Sequence[Sequence[str]], predictions: Sequence[str]) -> float:
    """Mean over the questions, in percent, of a metric against the reference answer that fits best."""
    pairs = zip(references, predictions, strict=True)
    return 100 * float(
        np.mean([max(metric(answer, prediction) for answer in answers) for answers, prediction in pairs])
    )


ANSWERS: dict[str, Metric] = {
    "f1": partial(best_of_answers, answer_overlap),
    "exact_match": partial(best_of_answers, answer_match),
}
