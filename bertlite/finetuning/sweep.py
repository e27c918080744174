"""`bertlite sweep`: search for the best settings of a fine-tuning with Optuna, on validation data alone."""

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from bertlite.config.finetune_settings import FinetuneConfig, Range, SweepConfig
from bertlite.config.loading import dump_config, with_changes
from bertlite.core.errors import DiskFull, Failure, UserError, first_line
from bertlite.core.files import write_json, write_text
from bertlite.core.logging import logger
from bertlite.core.packages import require
from bertlite.finetuning.finetune import check_settings, run
from bertlite.training.run_folder import RUN_FILES, open_run, write_config

Space = dict[str, list[Any] | Range]  # the values that a setting may have, by the setting's name


class Trial(BaseModel):
    """A finished trial: its settings, and its metric, or None if it failed."""

    settings: dict[str, Any]
    value: float | None


def sweep(config: SweepConfig, resume: bool = False, overwrite: bool = False) -> list[dict[str, Any]]:
    """Run the remaining trials, each a fine-tuning into `output_dir`/trial-… with all seeds of the configuration.

    Returns the number, value and settings of each trial, best first. Writes trials.json, trials.csv, trials.png, the
    best trial's model, and best.yaml, which `bertlite finetune` reads; trials do not read test data. A resumed sweep
    chooses the same settings as one that was not stopped, and continues in the middle of a trial. Raises UserError for
    a setting that does not exist or cannot have its values.
    """
    require("bertlite sweep", "bertlite[sweep]", "optuna")
    if config.task is None:
        raise UserError("bertlite sweep searches the settings of one task; the file has several")
    check_settings(config)
    space, folder = config.sweep.space, Path(config.output_dir)
    base = FinetuneConfig(**{name: getattr(config, name) for name in FinetuneConfig.model_fields})
    check_space(base, space)
    with open_run(folder, config, resume, overwrite=overwrite):
        trials = read_trials(folder) if resume else []
        write_config(folder, config, outdated=RUN_FILES if overwrite else [])
        write_best(folder, trials, base, space)
        while len(trials) < config.sweep.trials:
            number = len(trials)
            chosen = choose_settings(trials, space, config.sweep.seed + number)
            logger.info(f"trial {number}, {number + 1} of {config.sweep.trials}: {json.dumps(chosen)}")
            value = run_trial(with_changes(base, chosen, "sweep.space"), trial_folder(folder, number))
            trials.append(Trial(settings=chosen, value=value))
            write_json(folder / "trials.json", [trial.model_dump() for trial in trials])
            write_best(folder, trials, base, space)
        if ranking := rank_trials(trials):
            return ranking
        raise Failure(f"{folder}: all trials failed")


def run_trial(config: FinetuneConfig, folder: Path) -> float | None:
    """Run a trial, or the rest of it, without test data; return its metric, or None if it fails."""
    changes = {"output_dir": str(folder), "task.test": None}
    try:
        return float(run(with_changes(config, changes, "sweep.space"), resume=folder.exists())["mean"])
    except DiskFull:
        raise
    except Failure as error:  # these settings do not train
        logger.warning(f"{folder.name}: {error}")
        return None


def read_trials(folder: Path) -> list[Trial]:
    """Read the finished trials of a sweep. Raises UserError for a damaged file and for the run of version 0.1."""
    path = folder / "trials.json"
    if not path.exists():
        if (folder / "study.db").exists():
            raise UserError(f"{folder}: the sweep was started by version 0.1; start it again with --overwrite")
        return []
    try:
        return TypeAdapter(list[Trial]).validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{path}: damaged ({first_line(error)}); start the sweep again with --overwrite") from None


def choose_settings(trials: list[Trial], space: Space, seed: int) -> dict[str, Any]:
    """Let Optuna's tree-structured Parzen estimator choose the settings of the next trial."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    distributions: dict[str, Any] = {}
    for name, choice in space.items():
        if isinstance(choice, list):
            distributions[name] = optuna.distributions.CategoricalDistribution(choice)
        elif isinstance(choice.low, int) and isinstance(choice.high, int):
            distributions[name] = optuna.distributions.IntDistribution(choice.low, choice.high, log=choice.log)
        else:
            distributions[name] = optuna.distributions.FloatDistribution(choice.low, choice.high, log=choice.log)
    states = optuna.trial.TrialState
    for trial in trials:
        state = states.FAIL if trial.value is None else states.COMPLETE
        finished = optuna.trial.create_trial(
            state=state, value=trial.value, params=trial.settings, distributions=distributions
        )
        study.add_trial(finished)
    return dict(study.ask(distributions).params)


def check_space(base: FinetuneConfig, space: Space) -> None:
    """Check every value of a list, and both ends of a range, before anything runs."""
    for name, choice in space.items():
        for value in choice if isinstance(choice, list) else (choice.low, choice.high):
            check_settings(with_changes(base, {name: value}, "sweep.space"))


def trial_folder(folder: Path, number: int) -> Path:
    return folder / f"trial-{number:03d}"


def rank_trials(trials: list[Trial]) -> list[dict[str, Any]]:
    """Return the number, value and settings of each trial that succeeded, best first."""
    succeeded = [
        {"trial": number, "value": trial.value, **trial.settings}
        for number, trial in enumerate(trials)
        if trial.value is not None
    ]
    return sorted(succeeded, key=lambda trial: -trial["value"])


def write_best(folder: Path, finished: list[Trial], base: FinetuneConfig, space: Space) -> None:
    """Write the trials so far and the best model; called again, it completes what a stopped process left undone."""
    trials = rank_trials(finished)
    if not trials:
        return
    best = trials[0]
    model = trial_folder(folder, best["trial"]) / "model"
    if model.exists():
        shutil.rmtree(folder / "model", ignore_errors=True)
        model.rename(folder / "model")
    for other_model in folder.glob("trial-*/model"):
        shutil.rmtree(other_model)
    changes = {name: best[name] for name in space} | {"output_dir": f"{base.output_dir}-best"}
    write_text(folder / "best.yaml", dump_config(with_changes(base, changes, "sweep.space")))
    table = io.StringIO()
    writer = csv.DictWriter(table, list(best), lineterminator="\n")
    writer.writeheader()
    writer.writerows(trials)
    write_text(folder / "trials.csv", table.getvalue())
    draw_trials(folder / "trials.png", trials, list(space))


def format_trials(trials: list[dict[str, Any]]) -> str:
    """Format the trials as a table of right-aligned columns."""
    names = list(trials[0])
    cells = [
        [f"{value:.4g}" if isinstance(value, float) else str(value) for value in trial.values()] for trial in trials
    ]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in [names, *cells]
    )


def draw_trials(path: Path, trials: list[dict[str, Any]], names: list[str]) -> None:
    """Plot the metric against each setting that was varied."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(names), 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        values = [trial[name] for trial in trials]
        are_numbers = all(isinstance(value, int | float) for value in values)
        axes.scatter(values if are_numbers else list(map(str, values)), [trial["value"] for trial in trials])
        axes.set(xlabel=name, ylabel="validation metric")
        if are_numbers and min(values) > 0 and max(values) > 20 * min(values):
            axes.set_xscale("log")
    figure.savefig(path)
