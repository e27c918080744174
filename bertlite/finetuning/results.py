"""What a fine-tuning run reports: its results over the seeds, and the worst examples."""

import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from bertlite.core.errors import UserError
from bertlite.core.files import read_json, write_text
from bertlite.core.logging import count
from bertlite.finetuning.decoding import Outputs
from bertlite.finetuning.metrics import ScoresByLabel
from bertlite.finetuning.splits import Split
from bertlite.finetuning.tasks import Task

PER_CLASS = "per_class"  # the key of the scores of each label
NUM_WORST = 100  # examples with the largest loss that worst.jsonl holds


@dataclass(frozen=True)
class EvaluationResult:
    """What a model achieves on a split: its metrics and mean loss, a prediction per record, a loss per example, the
    outputs that these follow from, and the scores of each label or kind of entity."""

    scores: dict[str, float]
    predictions: list[Any]
    losses: list[float]
    outputs: Outputs
    scores_by_label: ScoresByLabel = field(default_factory=dict)


def summarize_seeds(results: dict[str, dict[str, Any]], metric: str, measured_on: str) -> dict[str, Any]:
    """Return what results.json holds: the metric's mean and standard deviation, all metrics of each seed and, by seed,
    the scores of each label."""
    seeds = {
        seed: {name: value for name, value in scores.items() if name != PER_CLASS} for seed, scores in results.items()
    }
    per_class = {seed: scores[PER_CLASS] for seed, scores in results.items() if PER_CLASS in scores}
    values = [scores[metric] for scores in seeds.values()]
    mean, deviation = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    summary = {"metric": metric, "mean": mean, "std": deviation, "measured_on": measured_on, "seeds": seeds}
    return {**summary, PER_CLASS: per_class} if per_class else summary


def read_results(folder: Path) -> dict[str, Any]:
    """Read results.json of a run or of a seed. Raises UserError if it is damaged."""
    path = folder / "results.json"
    results = read_json(path)
    if not isinstance(results, dict) or not results:
        raise UserError(f"{path}: damaged; remove it, and --resume makes it again")
    return results


def format_results(results: dict[str, Any]) -> str:
    """Format results as lines of text: the metric of each task, mean ± standard deviation over its seeds."""
    lines = []
    for name, result in {"": results}.items() if "metric" in results else results.items():
        deviation = f" ± {result['std']:.4f}" if len(result["seeds"]) > 1 else ""
        source = f"{result['measured_on']}, {count(len(result['seeds']), 'seed')}"
        lines.append(f"{name:16}  {result['metric']:20}  {result['mean']:.4f}{deviation}  ({source})".strip())
    return "\n".join(lines)


def write_reports(folder: Path, task: Task, labels: list[str], split: Split, evaluation: EvaluationResult) -> None:
    """Write predictions.jsonl and worst.jsonl."""
    losses = np.bincount(split.examples.record_indices, evaluation.losses, len(split.records))
    lines = [
        json.dumps(line | {"loss": loss}, ensure_ascii=False, default=str) + "\n"
        for line, loss in zip(describe_predictions(task, labels, split, evaluation), losses.tolist(), strict=True)
    ]
    write_text(folder / "predictions.jsonl", "".join(lines))
    worst = np.argsort(-losses, kind="stable")[:NUM_WORST].tolist()
    write_text(folder / "worst.jsonl", "".join(lines[index] for index in worst))


def describe_predictions(
    task: Task, labels: list[str], split: Split, evaluation: EvaluationResult
) -> Iterator[dict[str, Any]]:
    """Yield a line of predictions.jsonl for each record: where it is from, its columns, the prediction, whether that is
    correct, and the score of each label."""
    rankings: Iterable[Any] = repeat({})
    if task.problem_type in ("single_label_classification", "multi_label_classification") and len(labels) > 1:
        rankings = task.results(evaluation.outputs, len(labels))
    rows = zip(split.records, split.examples.references, evaluation.predictions, rankings, strict=False)
    for record, reference, prediction, ranking in rows:
        line = {"where": record.location, **record.columns, "predicted": task.describe(prediction, labels)}
        if task.is_correct is not None:
            line["correct"] = bool(task.is_correct(reference, prediction))
        if ranking:
            line["scores"] = {entry["label"]: round(entry["score"], 6) for entry in ranking}
        yield line
