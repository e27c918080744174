"""What a fine-tuning run reports: its results over the seeds, the worst examples, and the confusion matrix."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bertlite.core.files import write_text
from bertlite.finetuning.splits import Split
from bertlite.finetuning.tasks import Task

NUM_WORST = 100  # examples with the largest loss that worst.jsonl holds


@dataclass(frozen=True)
class EvaluationResult:
    """What a model achieves on a split: its metrics and mean loss, a prediction per record, a loss per example."""

    scores: dict[str, float]
    predictions: list[Any]
    losses: list[float]


def summarize_seeds(seeds: dict[str, dict[str, float]], metric: str, measured_on: str) -> dict[str, Any]:
    """Return what results.json holds: the metric's mean and standard deviation, and all metrics of each seed."""
    values = [scores[metric] for scores in seeds.values()]
    mean, deviation = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return {"metric": metric, "mean": mean, "std": deviation, "measured_on": measured_on, "seeds": seeds}


def format_results(results: dict[str, Any]) -> str:
    """Format results as lines of text: the metric of each task, mean ± standard deviation over its seeds."""
    lines = []
    for name, result in {"": results}.items() if "metric" in results else results.items():
        deviation = f" ± {result['std']:.4f}" if len(result["seeds"]) > 1 else ""
        source = f"{result['measured_on']}, {len(result['seeds'])} seed(s)"
        lines.append(f"{name:16}  {result['metric']:12}  {result['mean']:.4f}{deviation}  ({source})".strip())
    return "\n".join(lines)


def write_reports(folder: Path, task: Task, labels: list[str], split: Split, evaluation: EvaluationResult) -> None:
    """Write worst.jsonl and, if each example has one label, confusion.png."""
    losses = np.bincount(split.examples.record_indices, evaluation.losses, len(split.records))
    lines = []
    for index in np.argsort(-losses, kind="stable")[:NUM_WORST].tolist():
        record = split.records[index]
        prediction = task.describe(evaluation.predictions[index], labels)
        line = {"where": record.location, **record.columns, "predicted": prediction, "loss": losses[index]}
        lines.append(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    write_text(folder / "worst.jsonl", "".join(lines))
    if task.single_label:
        draw_confusion_matrix(folder / "confusion.png", split.examples.references, evaluation.predictions, labels)


def draw_confusion_matrix(path: Path, references: list[int], predictions: list[int], labels: list[str]) -> None:
    """Draw how often each label is predicted for each reference label, as a share of the reference label's examples."""
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    size = min(4 + 0.35 * len(labels), 40)  # inches
    figure = Figure(figsize=(size, size), layout="constrained")
    display = ConfusionMatrixDisplay.from_predictions(
        references, predictions, labels=range(len(labels)), display_labels=labels, normalize="true",
        include_values=len(labels) <= 20, values_format=".2f", xticks_rotation="vertical", cmap="Blues", colorbar=False,
        ax=figure.subplots(),
    )  # fmt: skip
    if len(labels) > 100:  # too many to read
        display.ax_.set(xticks=[], yticks=[])
    figure.savefig(path)
