"""`bertlite compare`: two models on one task, by the results and predictions that their runs leave."""

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from bertlite.config.finetune_settings import FinetuneConfig, TaskSettings
from bertlite.config.loading import load_config
from bertlite.core.errors import UserError
from bertlite.core.trust import check_run_folder
from bertlite.finetuning.results import read_results

NUM_SHOWN = 5  # examples that only one of the models gets right
ADDED = ("where", "predicted", "correct", "scores", "loss")  # to the columns of a line of predictions.jsonl


class FinishedRun(NamedTuple):
    """What a fine-tuning run leaves: its settings, results.json, and the predictions of its best seed."""

    folder: Path
    task: TaskSettings
    results: dict[str, Any]
    predictions: list[dict[str, Any]]


def compare_runs(first: Path, second: Path) -> dict[str, Any]:
    """Compare two runs on the examples that both were measured on.

    Returns the `difference` of the metric, second minus first, of each seed that both have, and its mean and standard
    deviation. Where a prediction is right or wrong, `only_correct` has the number of examples that only one of the
    models gets right, some of them as `examples`, and `p_value` is that of McNemar's exact test. Raises UserError
    for a folder without a finished run, and for runs of different tasks or test data.
    """
    runs = [read_run(first), read_run(second)]
    check_same_task(*runs)
    metric, seeds = runs[0].results["metric"], [run.results["seeds"] for run in runs]
    common = [seed for seed in seeds[0] if seed in seeds[1]]
    if not common:
        raise UserError(
            f"{first} has the seeds {', '.join(seeds[0])}, {second} {', '.join(seeds[1])}; "
            "give both the same train.seeds"
        )
    differences = {seed: seeds[1][seed][metric] - seeds[0][seed][metric] for seed in common}
    deviation = statistics.stdev(differences.values()) if len(common) > 1 else 0.0
    return {
        "metric": metric,
        "measured_on": runs[0].results["measured_on"],
        "num_examples": len(runs[0].predictions),
        "runs": {str(run.folder): run.results["mean"] for run in runs},
        "difference": {"mean": statistics.fmean(differences.values()), "std": deviation, "seeds": differences},
        **compare_predictions(*runs),
    }


def read_run(folder: Path) -> FinishedRun:
    """Read a run folder. Raises UserError if it is not that of a finished fine-tuning of one task."""
    check_run_folder(folder)
    for name in ("results.json", "config.yaml", "predictions.jsonl"):
        if not (folder / name).exists():
            tasks = [path.parent.name for path in sorted(folder.glob("*/predictions.jsonl"))]
            advice = (
                f"; compare one of its tasks, such as {folder / tasks[0]}" if name == "config.yaml" and tasks else ""
            )
            raise UserError(f"{folder}: no finished fine-tuning run (it has no {name}){advice}")
    task = load_config(FinetuneConfig, folder / "config.yaml").task
    if task is None:
        raise UserError(f"{folder / 'config.yaml'}: has several tasks; compare the folder of one")
    try:
        with (folder / "predictions.jsonl").open(encoding="utf-8") as lines:
            return FinishedRun(folder, task, read_results(folder), [dict(json.loads(line)) for line in lines])
    except (ValueError, TypeError):
        raise UserError(f"{folder / 'predictions.jsonl'}: damaged") from None


def check_same_task(first: FinishedRun, second: FinishedRun) -> None:
    """Raise UserError, naming the first difference, for runs of different tasks or test data."""
    for name in ("type", "text", "label"):
        values = getattr(first.task, name), getattr(second.task, name)
        if values[0] != values[1]:
            raise UserError(
                f"{second.folder}: task.{name} is {values[1]!r}, but that of {first.folder} is {values[0]!r}"
            )
    metrics = first.results["metric"], second.results["metric"]
    if metrics[0] != metrics[1]:
        raise UserError(f"{second.folder}: the metric is {metrics[1]}, but that of {first.folder} is {metrics[0]}")
    sizes = len(first.predictions), len(second.predictions)
    if sizes[0] != sizes[1]:
        raise UserError(f"{second.folder} was measured on {sizes[1]:,} examples, {first.folder} on {sizes[0]:,}")
    for one, other in zip(first.predictions, second.predictions, strict=True):
        if select_columns(one) != select_columns(other):
            raise UserError(f"{second.folder} was measured on {other['where']}, {first.folder} on {one['where']}")


def select_columns(line: dict[str, Any]) -> dict[str, Any]:
    """Return the columns that a line of predictions.jsonl has from the data."""
    return {name: value for name, value in line.items() if name not in ADDED}


def compare_predictions(first: FinishedRun, second: FinishedRun) -> dict[str, Any]:
    """Return which examples only one of the models gets right; {} if predictions are neither right nor wrong."""
    if "correct" not in first.predictions[0]:
        return {}
    from scipy.stats import binomtest

    pairs = list(zip(first.predictions, second.predictions, strict=True))
    only = {
        str(first.folder): [pair for pair in pairs if pair[0]["correct"] and not pair[1]["correct"]],
        str(second.folder): [pair for pair in pairs if pair[1]["correct"] and not pair[0]["correct"]],
    }
    counts = {name: len(found) for name, found in only.items()}
    total = sum(counts.values())
    p_value = float(binomtest(counts[str(first.folder)], total).pvalue) if total else 1.0
    examples = {
        name: [{"where": one["where"], **select_columns(one), "predicted": [one["predicted"], other["predicted"]]}
               for one, other in found[:NUM_SHOWN]]
        for name, found in only.items()
    }  # fmt: skip
    return {"only_correct": counts, "p_value": p_value, "examples": examples}


def format_comparison(result: dict[str, Any]) -> str:
    """Format what `compare_runs` returns as lines of text."""
    difference, width = result["difference"], max(map(len, [*result["runs"], "difference"]))
    seeds = ", ".join(f"seed {seed} {value:+.4f}" for seed, value in difference["seeds"].items())
    lines = [f"{result['metric']} of {result['num_examples']:,} examples ({result['measured_on']})"]
    lines += [f"{name:{width}}   {mean:.4f}" for name, mean in result["runs"].items()]
    deviation = f" ± {difference['std']:.4f}" if len(difference["seeds"]) > 1 else ""
    lines.append(f"{'difference':{width}}  {difference['mean']:+.4f}{deviation} ({seeds})")
    if "only_correct" not in result:
        return "\n".join(lines)
    lines.append(f"best seeds: p = {result['p_value']:.2g} (McNemar's exact test)")
    for name, count in result["only_correct"].items():
        lines.append(f"only {name} is correct: {count:,}" + (", such as" if count else ""))
        for example in result["examples"][name]:
            first, second = (json.dumps(prediction, ensure_ascii=False)[:40] for prediction in example["predicted"])
            lines.append(f"  {example['where']}: {first}, {second}")
    return "\n".join(lines)
