"""`bertlite report`: one page with the curves, results and settings of runs."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from bertlite.config.fields import Section
from bertlite.config.loading import load_run_config
from bertlite.config.settings import LinearSchedule, PretrainConfig
from bertlite.core.errors import UserError
from bertlite.core.files import read_json, write_text
from bertlite.core.trust import check_run_folder
from bertlite.finetuning.results import read_results
from bertlite.training.run_folder import find_run, read_metrics

MAX_POINTS = 1000  # of a curve; more cannot be told apart on a screen
MAX_TEXT = 2000  # characters of a text that is shown
MAX_EXAMPLES = 100
MAX_LABELS = 40  # of a confusion matrix


def write_report(names: Sequence[str], out: Path | None) -> Path:
    """Write the page of one or several runs, and return its path: `out`, or report.html in the first run's folder.

    Raises UserError for a folder that holds no run, and for files of a run that are damaged.
    """
    runs = [find_run(name) or Path(name) for name in names]
    data = [describe_run(run, name) for run, name in zip(runs, names, strict=True)]
    template = (files("bertlite") / "pages" / "report.html").read_text(encoding="utf-8")
    title = data[0]["name"] if len(data) == 1 else f"{len(data)} runs"
    out = out or runs[0] / "report.html"
    write_text(out, fill_template(template, title, {"runs": data}))
    return out


def fill_template(template: str, title: str, data: dict[str, Any]) -> str:
    """Put data into a page as JSON that cannot end its script element. NaN becomes null."""
    text = json.dumps(_finite(data), ensure_ascii=False, allow_nan=False)
    safe = text.replace("<", r"\u003c").replace("\u2028", r"\u2028").replace("\u2029", r"\u2029")
    title = title.replace("&", "&amp;").replace("<", "&lt;")
    return template.replace("<!--TITLE-->", title, 1).replace("/*DATA*/null", safe, 1)


def describe_run(run: Path, name: str) -> dict[str, Any]:
    """Collect what the page shows of a run. Raises UserError if the folder holds none."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"{name}: holds no run (there is no config.yaml)")
    check_run_folder(run)
    config = load_run_config(run / "config.yaml")
    if config is None:
        raise UserError(f"{run}/config.yaml: is neither that of a pretraining nor that of a fine-tuning")
    seeds = sorted(run.glob("seed-*"), key=lambda path: int(path.name[5:]) if path.name[5:].isdecimal() else 0)
    curves = {folder.name: _read_curves(folder) for folder in seeds} or {"": _read_curves(run)}
    return {
        "name": shorten(run.name or name, 60),
        "kind": "pretraining" if isinstance(config, PretrainConfig) else "fine-tuning",
        "curves": [{"name": key, **curve} for key, curve in curves.items()],
        "facts": _read_facts(run),
        "settings": list(list_settings(config)),
        "results": read_results(run) if (run / "results.json").is_file() else None,
        "confusion": count_confusion(_read_lines(run / "predictions.jsonl")),
        "worst": [_describe_example(line) for line in _read_lines(run / "worst.jsonl")][:MAX_EXAMPLES],
    }


def downsample(lines: list[dict[str, float]], count: int = MAX_POINTS) -> list[dict[str, float]]:
    """Return at most `count` lines: each is the last of as many neighbours, with the mean of their losses."""
    if len(lines) <= count:
        return lines
    result = []
    for number in range(count):
        group = lines[number * len(lines) // count : (number + 1) * len(lines) // count]
        losses = [line["loss"] for line in group if isinstance(line.get("loss"), int | float)]
        result.append(group[-1] | ({"loss": sum(losses) / len(losses)} if losses else {}))
    return result


def list_settings(section: Section, prefix: str = "") -> Iterator[tuple[str, str, str | None]]:
    """Yield the dotted name and value of each setting, and its default if that is another one."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section) and not isinstance(value, LinearSchedule):
            yield from list_settings(value, f"{prefix}{name}.")
            continue
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        shown, usual = (shorten(_show(one), 200) for one in (value, default))
        yield prefix + name, shown, usual if shown != usual else None


def count_confusion(predictions: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Count the pairs of label and prediction; None where an example can have several labels, or none is known."""
    pairs: Counter[tuple[str, str]] = Counter()
    for line in predictions:
        label, predicted = line.get("label"), line.get("predicted")
        if not isinstance(label, str | int) or not isinstance(predicted, str):
            return None
        pairs[str(label), predicted] += 1
    labels = sorted({name for pair in pairs for name in pair})
    if not 2 <= len(labels) <= MAX_LABELS:
        return None
    return {"labels": labels, "counts": [[pairs[row, column] for column in labels] for row in labels]}


def shorten(text: str, length: int = MAX_TEXT) -> str:
    """Cut a text that is longer, and say so."""
    return text if len(text) <= length else f"{text[:length]} … ({len(text) - length:,} more characters)"


def _show(value: Any) -> str:
    if isinstance(value, Section):
        value = value.model_dump()
    elif isinstance(value, list):
        value = [one.model_dump() if isinstance(one, Section) else one for one in value]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _describe_example(line: dict[str, Any]) -> dict[str, Any]:
    known = {"where", "predicted", "correct", "scores", "loss"}
    texts = {name: shorten(_show(value)) for name, value in line.items() if name not in known}
    return {"texts": texts, "predicted": shorten(_show(line.get("predicted"))), "loss": line.get("loss")}


def _read_curves(folder: Path) -> dict[str, Any]:
    lines = read_metrics(folder)
    training = [line for line in lines if "loss" in line and "eval_loss" not in line]
    evaluation = [line for line in lines if any(name.startswith("eval_") for name in line)]
    return {"training": downsample(training), "evaluation": downsample(evaluation), "lines": len(training)}


def _read_facts(run: Path) -> dict[str, Any]:
    """Return what the newest checkpoint says about the machine and the progress."""
    states = sorted(run.glob("checkpoints/step-*/training/state.json"))
    state = read_json(states[-1]) if states else None
    return {**state.get("facts", {}), **state.get("progress", {})} if isinstance(state, dict) else {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
    except (ValueError, RecursionError):
        raise UserError(f"{path}: is damaged; remove it, or run the command that wrote it again") from None
    return [line for line in lines if isinstance(line, dict)]


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not -float("inf") < value < float("inf") else value
