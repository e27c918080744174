"""Metrics of predictions against references, by the libraries that define them; higher is better for all of them."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

Metric = Callable[[Any, Any], float]  # of references and predictions, one per record


def library_metric(module: str, function: str, **options: Any) -> Metric:
    """Return a metric that a library defines. The library is imported when the metric is computed."""

    def metric(references: Any, predictions: Any) -> float:
        return float(getattr(import_module(module), function)(references, predictions, **options))

    return metric


def sklearn_f1(average: str, labels: list[int] | None = None) -> Metric:
    return library_metric("sklearn.metrics", "f1_score", labels=labels, average=average, zero_division=0)


def f1_of_classes(references: Sequence[int], predictions: Sequence[int]) -> float:
    """F1 of the second of two labels, as in GLUE; of more labels, the mean of their F1."""
    positive = [1] if max(references) < 2 else None  # predictions do not change which F1 is computed
    return sklearn_f1("macro", positive)(references, predictions)


def correlation(coefficient: str, references: Sequence[float], predictions: Sequence[float]) -> float:
    """Correlation coefficient of scipy.stats; 0 if all predictions or all references are equal."""
    if np.ptp(references) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(getattr(import_module("scipy.stats"), coefficient)(references, predictions).statistic)


def r_squared(references: Sequence[float], predictions: Sequence[float]) -> float:
    """R²; 0 for a single reference, which has no variance."""
    return library_metric("sklearn.metrics", "r2_score")(references, predictions) if len(references) > 1 else 0.0


# The metrics of each type of task; the first is the default.
CLASSIFICATION: dict[str, Metric] = {
    "accuracy": library_metric("sklearn.metrics", "accuracy_score"),
    "f1": f1_of_classes,
    "macro_f1": sklearn_f1("macro"),
    "micro_f1": sklearn_f1("micro"),
    "matthews_correlation": library_metric("sklearn.metrics", "matthews_corrcoef"),
}
MULTILABEL: dict[str, Metric] = {
    "micro_f1": sklearn_f1("micro"),
    "macro_f1": sklearn_f1("macro"),
    "accuracy": library_metric("sklearn.metrics", "accuracy_score"),
}
REGRESSION: dict[str, Metric] = {
    "pearson": partial(correlation, "pearsonr"),
    "spearmanr": partial(correlation, "spearmanr"),
    "r2": r_squared,
}
ENTITIES: dict[str, Metric] = {
    "f1": library_metric("seqeval.metrics", "f1_score", zero_division=0),
    "precision": library_metric("seqeval.metrics", "precision_score", zero_division=0),
    "recall": library_metric("seqeval.metrics", "recall_score", zero_division=0),
    "accuracy": library_metric("seqeval.metrics", "accuracy_score"),
}
