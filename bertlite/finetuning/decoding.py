"""What a head's scores mean: predictions for the metrics, and results in the format of Hugging Face's pipelines."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertlite.config.finetune_settings import InputSettings
from bertlite.finetuning.examples import Examples

Scores = NDArray[np.float32]  # of an example: (L,), or (n,L) for its n tokens


@dataclass(frozen=True)
class Outputs:
    """A model's scores for examples, and what is needed to decode them."""

    scores: list[Scores]  # one per example
    examples: Examples
    labels: list[str]
    settings: InputSettings


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


def tabulate(result: Any) -> dict[str, Any]:
    """Return the entries of a result, or the list that it is."""
    if isinstance(result, list):
        return {"predicted": result}
    return {f"predicted_{name}": value for name, value in result.items()}


def tabulate_labels(result: Any) -> dict[str, Any]:
    """Return which labels are more likely than not, and all scores."""
    scores = {entry["label"]: entry["score"] for entry in (result if isinstance(result, list) else [result])}
    return {"predicted_labels": [label for label in scores if scores[label] > 0.5], "predicted_scores": scores}


def tabulate_number(result: Any) -> dict[str, Any]:
    """Return the number alone: the label of a regression is always the same."""
    return {"predicted_score": (result[0] if isinstance(result, list) else result)["score"]}


def softmax(scores: Scores) -> Scores:
    """Softmax over the last dimension."""
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def sigmoid(scores: Scores) -> Scores:
    """Sigmoid of each score."""
    from scipy.special import expit

    return np.asarray(expit(scores))
