"""What a head's scores mean: predictions for the metrics, and results in the format of Hugging Face's pipelines."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertlite.config.finetune_settings import InputSettings
from bertlite.core.packages import require
from bertlite.finetuning.examples import Examples, context_offsets

Scores = NDArray[np.float32]  # of an example: (L,), or (n,L) for its n tokens


@dataclass(frozen=True)
class Outputs:
    """A model's scores for examples, and what is needed to decode them."""

    scores: list[Scores]  # one per example
    examples: Examples
    labels: list[str]
    settings: InputSettings


def find_best_answers(outputs: Outputs) -> list[dict[str, Any]]:
    """Return the best answer of at most `max_answer_length` tokens to each question: `score, start, end, answer`.

    Of all examples that a context is split into, the span with the largest sum of start and end score is taken (Devlin
    et al. 2018, section 4.2); `score` is the span's probability within its example, `start` and `end` are characters.
    """
    examples = outputs.examples
    no_answer = {"score": 0.0, "start": 0, "end": 0, "answer": ""}
    best: list[tuple[float, dict[str, Any]]] = [(-math.inf, no_answer)] * len(examples.texts)
    for scores, record, encoding in zip(outputs.scores, examples.record_indices, examples.encodings, strict=True):
        starts, ends = context_offsets(encoding).T
        first, last, total = find_best_span(scores, starts < ends, outputs.settings.max_answer_length)
        if total > best[record][0]:
            log_normalizer = np.logaddexp.reduce(scores[:, 0]) + np.logaddexp.reduce(scores[:, 1])
            probability, start, end = float(np.exp(total - log_normalizer)), int(starts[first]), int(ends[last])
            answer = {"score": probability, "start": start, "end": end, "answer": examples.texts[record][1][start:end]}
            best[record] = float(total), answer
    return [answer for _, answer in best]


def find_best_span(scores: Scores, allowed: NDArray[np.bool_], max_length: int) -> tuple[int, int, np.floating[Any]]:
    """Return the span of allowed tokens with the largest sum of start and end score: first, last, and that sum.

    Entry [i, j] of the matrix of sums is the score of the span i … j. With `max_length` 2, only the diagonal (spans of
    one token) and the one above it (spans of two) are valid; all other entries are -inf.
    """
    starts, ends = (np.where(allowed, scores[:, column], -np.inf) for column in (0, 1))
    sums = starts[:, None] + ends[None]
    valid = np.tril(np.triu(np.ones_like(sums)), max_length - 1) > 0
    sums = np.where(valid, sums, -np.inf)
    first, last = np.unravel_index(int(sums.argmax()), sums.shape)
    return int(first), int(last), sums[first, last]


# Below: results in the format of Hugging Face's pipelines.
def rank_classes(outputs: Outputs, top_k: int) -> list[Any]:
    """Rank labels that exclude each other, by softmax; a single label by sigmoid, as Hugging Face does."""
    return rank_labels(outputs, top_k, sigmoid if len(outputs.labels) == 1 else softmax)


def rank_labels(outputs: Outputs, top_k: int, activation: Callable[[Scores], Scores]) -> list[Any]:
    """Return `label, score` of each example's best label or, with `top_k` above 1, a list of so many."""
    rankings = []
    for values in map(activation, outputs.scores):
        best = np.argsort(-values, kind="stable")[:top_k].tolist()
        rankings.append([{"label": outputs.labels[index], "score": float(values[index])} for index in best])
    return [ranking[0] for ranking in rankings] if top_k == 1 else rankings


def softmax(scores: Scores) -> Scores:
    """Softmax over the last dimension."""
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def sigmoid(scores: Scores) -> Scores:
    """Sigmoid of each score."""
    require("predicting labels that do not exclude each other", "bertlite[finetune]", "scipy")
    from scipy.special import expit

    return np.asarray(expit(scores))
