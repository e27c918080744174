"""Metrics of predictions against references, by the libraries that define them; higher is better for all of them."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from bertlite.config.finetune_settings import InputSettings

Metric = Callable[[Any, Any], float]  # of references and predictions, one per record
ScoresByLabel = dict[str, dict[str, float]]  # precision, recall, f1-score and support, as in scikit-learn's report


def library_metric(module: str, function: str, **options: Any) -> Metric:
    """Return a metric that a library defines. The library is imported when the metric is computed."""

    def metric(references: Any, predictions: Any) -> float:
        return float(getattr(import_module(module), function)(references, predictions, **options))

    return metric


def sklearn_metric(name: str, average: str, labels: Sequence[Any] | None = None) -> Metric:
    """Return scikit-learn's f1, precision or recall, averaged over `labels`, by default those that occur."""
    return library_metric("sklearn.metrics", f"{name}_score", labels=labels, average=average, zero_division=0)


def classification_metrics(labels: list[str], settings: InputSettings, metric: str | None) -> dict[str, Metric]:
    """Return the metrics of one label each: F1, precision and recall of `positive_label`, or of more labels the means.

    Except for `metric`, those that results.json has under another name are left out: micro_f1 is the accuracy, and the
    means are macro_f1, macro_precision and macro_recall.
    """
    if settings.positive_label is None:
        return without_repeated(CLASSIFICATION, {"f1", "precision", "recall", "micro_f1"}, metric)
    positive = [labels.index(settings.positive_label)]
    of_positive = {name: sklearn_metric(name, "macro", positive) for name in ("f1", "precision", "recall")}
    return without_repeated(CLASSIFICATION | of_positive, {"micro_f1"}, metric)


def without_repeated(metrics: dict[str, Metric], repeated: set[str], metric: str | None) -> dict[str, Metric]:
    """Return the metrics without those that equal another one, except for `metric`."""
    return {name: function for name, function in metrics.items() if name not in repeated or name == metric}


def score_labels(
    references: Sequence[Any], predictions: Sequence[Any], names: list[str], settings: InputSettings
) -> ScoresByLabel:
    """Return the scores of each label that occurs; labels are indices of `names`, or have a column each."""
    from sklearn.metrics import precision_recall_fscore_support

    pairs = np.array([references, predictions])
    occurring = np.flatnonzero(pairs.any((0, 1))) if pairs.ndim == 3 else np.unique(pairs)
    columns = precision_recall_fscore_support(references, predictions, labels=occurring, zero_division=0)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return {
        names[label]: dict(zip(("precision", "recall", "f1-score", "support"), row, strict=True))
        for label, row in zip(occurring.tolist(), rows, strict=True)
    }


def average_scores(scores: ScoresByLabel) -> dict[str, float]:
    """Return the means over the labels that go with macro_f1: macro_precision and macro_recall."""
    return {f"macro_{name}": mean_over_labels(scores, name) for name in ("precision", "recall")}


def mean_over_labels(scores: ScoresByLabel, name: str) -> float:
    """Return the mean of a score over the labels, 0 without any."""
    return sum(row[name] for row in scores.values()) / max(1, len(scores))


def score_entities(references: list[list[str]], predictions: list[list[str]]) -> ScoresByLabel:
    """Return the scores of each kind of entity, as seqeval computes them; none if there is no entity."""
    from seqeval.metrics import classification_report

    if {tag for tags in [*references, *predictions] for tag in tags} <= {"O"}:
        return {}
    report = classification_report(references, predictions, output_dict=True, zero_division=0)
    kinds = list(report)[: -len(("micro avg", "macro avg", "weighted avg"))]
    return {kind: {name: value.item() for name, value in report[kind].items()} for kind in kinds}


def correlation(coefficient: str, references: Sequence[float], predictions: Sequence[float]) -> float:
    """Correlation coefficient of scipy.stats; 0 if all predictions or all references are equal."""
    if np.ptp(references) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(getattr(import_module("scipy.stats"), coefficient)(references, predictions).statistic)


def matthews_correlation(references: Sequence[int], predictions: Sequence[int]) -> float:
    """Matthews' correlation coefficient; 0 if all predictions and references are equal, without a warning."""
    if np.ptp([*references, *predictions]) == 0:
        return 0.0
    return library_metric("sklearn.metrics", "matthews_corrcoef")(references, predictions)


def r_squared(references: Sequence[float], predictions: Sequence[float]) -> float:
    """R²; 0 for a single reference, which has no variance."""
    return library_metric("sklearn.metrics", "r2_score")(references, predictions) if len(references) > 1 else 0.0


# The metrics of each type of task; the first is the default.
CLASSIFICATION: dict[str, Metric] = {
    "accuracy": library_metric("sklearn.metrics", "accuracy_score"),
    "f1": sklearn_metric("f1", "macro"),
    "precision": sklearn_metric("precision", "macro"),
    "recall": sklearn_metric("recall", "macro"),
    "macro_f1": sklearn_metric("f1", "macro"),
    "micro_f1": sklearn_metric("f1", "micro"),
    "matthews_correlation": matthews_correlation,
}
CHOICES: dict[str, Metric] = {"accuracy": library_metric("sklearn.metrics", "accuracy_score")}
MULTILABEL: dict[str, Metric] = {
    "micro_f1": sklearn_metric("f1", "micro"),
    "macro_f1": sklearn_metric("f1", "macro"),
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
    "macro_f1": lambda references, predictions: mean_over_labels(score_entities(references, predictions), "f1-score"),
    "accuracy": library_metric("seqeval.metrics", "accuracy_score"),
}
