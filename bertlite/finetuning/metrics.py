"""Measures of predictions against references, by the libraries that define them; higher is better in all."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy import stats
from seqeval import metrics as entities
from sklearn import metrics as labels

Measure = Callable[[Any, Any], float]


def f1_of_labels(references: Sequence[int], predictions: Sequence[int]) -> float:
    """F1 of the second of two labels, as GLUE has it; of more labels, their mean."""
    only = [1] if max(references) < 2 else None  # whatever is predicted, the same measure
    return float(labels.f1_score(references, predictions, labels=only, average="macro", zero_division=0))


def correlation(kind: Callable[..., Any], references: Sequence[float], predictions: Sequence[float]) -> float:
    """A correlation, 0 where predictions or references are all the same."""
    if np.ptp(references) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(kind(references, predictions).statistic)


def determination(references: Sequence[float], predictions: Sequence[float]) -> float:
    """R², 0 where a single reference leaves nothing to explain."""
    return float(labels.r2_score(references, predictions)) if len(references) > 1 else 0.0


def normalized_answer(text: str) -> str:
    """An answer as SQuAD compares it: lower case, no punctuation, no articles (Rajpurkar et al. 2016, section 6.1)."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_match(answer: str, prediction: str) -> float:
    """Whether a predicted answer is the same as a given one."""
    return float(normalized_answer(answer) == normalized_answer(prediction))


def answer_overlap(answer: str, prediction: str) -> float:
    """F1 of a predicted answer's words."""
    ours, theirs = normalized_answer(prediction).split(), normalized_answer(answer).split()
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


def best_of_answers(measure: Measure, references: Sequence[Sequence[str]], predictions: Sequence[str]) -> float:
    """The mean in percent of a measure against whichever of a question's answers fits best."""
    pairs = zip(references, predictions, strict=True)
    return 100 * float(np.mean([max(measure(answer, given) for answer in answers) for answers, given in pairs]))


# For each type of task, the measures of references and predictions; the first is the default.
CLASSIFICATION: dict[str, Measure] = {
    "accuracy": labels.accuracy_score,
    "f1": f1_of_labels,
    "macro_f1": partial(labels.f1_score, average="macro", zero_division=0),
    "micro_f1": partial(labels.f1_score, average="micro", zero_division=0),
    "matthews_correlation": labels.matthews_corrcoef,
}
MULTILABEL: dict[str, Measure] = {
    "micro_f1": partial(labels.f1_score, average="micro", zero_division=0),
    "macro_f1": partial(labels.f1_score, average="macro", zero_division=0),
    "accuracy": labels.accuracy_score,
}
REGRESSION: dict[str, Measure] = {
    "pearson": partial(correlation, stats.pearsonr),
    "spearmanr": partial(correlation, stats.spearmanr),
    "r2": determination,
}
ENTITIES: dict[str, Measure] = {
    "f1": partial(entities.f1_score, zero_division=0),
    "precision": partial(entities.precision_score, zero_division=0),
    "recall": partial(entities.recall_score, zero_division=0),
    "accuracy": entities.accuracy_score,
}
ANSWERS: dict[str, Measure] = {
    "f1": partial(best_of_answers, answer_overlap),
    "exact_match": partial(best_of_answers, answer_match),
}
