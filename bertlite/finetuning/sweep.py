"""`bertlite sweep`: search for the best settings of a fine-tuning with Optuna, on validation data alone."""

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

from bertlite.config.finetune_settings import FinetuneConfig, Range, SweepConfig
from bertlite.config.loading import dump_config, with_changes
from bertlite.core.errors import DiskFull, Failure, UserError
from bertlite.core.files import write_text
from bertlite.core.logging import logger
from bertlite.core.packages import require
from bertlite.finetuning.finetune import check_settings, run
from bertlite.training.run_folder import RUN_FILES, open_run, write_config

Space = dict[str, list[Any] | Range]  # the values that a setting may have, by the setting's name


def sweep(config: SweepConfig, resume: bool = False, overwrite: bool = False) -> list[dict[str, Any]]:
    """Run the remaining trials, each a fine-tuning into `output_dir`/trial-… with all seeds of the configuration.

    Returns the number, value and settings of each trial, best first. Writes study.db (Optuna's), trials.csv,
    trials.png, the best trial's model, and best.yaml, which `bertlite finetune` reads; trials do not read test data.
    Raises UserError for a setting that does not exist or cannot have its values.
    """
    require("bertlite sweep", "bertlite[sweep]", "optuna")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if config.task is None:
        raise UserError("bertlite sweep searches the settings of one task; the file has several")
    check_settings(config)
    space, folder = config.sweep.space, Path(config.output_dir)
    base = FinetuneConfig(**{name: getattr(config, name) for name in FinetuneConfig.model_fields})
    check_space(base, space)
    with open_run(folder, config, resume, overwrite=overwrite):
        write_config(folder, config, outdated=RUN_FILES if overwrite else [])
        storage = f"sqlite:///{folder / 'study.db'}"
        study = optuna.create_study(storage=storage, study_name="sweep", direction="maximize", load_if_exists=True)
        write_best(folder, study, base, space)
        while (num_done := sum(trial.state.is_finished() for trial in study.trials)) < config.sweep.trials:
            # A new sampler for each trial: a resumed sweep chooses the same settings as one that was not stopped.
            study.sampler = optuna.samplers.TPESampler(seed=config.sweep.seed + num_done)
            trial = study.ask()
            chosen = {name: suggest_value(trial, name, choice) for name, choice in space.items()}
            logger.info(f"trial {trial.number}, {num_done + 1} of {config.sweep.trials}: {json.dumps(chosen)}")
            changes = {**chosen, "output_dir": str(trial_folder(folder, trial.number)), "task.test": None}
            try:
                study.tell(trial, run(with_changes(base, changes, "sweep.space"))["mean"])
            except DiskFull:
                raise
            except Failure as error:  # these settings do not train
                logger.warning(f"trial {trial.number}: {error}")
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            write_best(folder, study, base, space)
        if trials := rank_trials(study):
            return trials
        raise Failure(f"{folder}: all trials failed")


def check_space(base: FinetuneConfig, space: Space) -> None:
    """Check every value of a list, and both ends of a range, before anything runs."""
    for name, choice in space.items():
        for value in choice if isinstance(choice, list) else (choice.low, choice.high):
            check_settings(with_changes(base, {name: value}, "sweep.space"))


def suggest_value(trial: Any, name: str, choice: list[Any] | Range) -> Any:
    """Let Optuna choose a value for a setting."""
    if isinstance(choice, list):
        return trial.suggest_categorical(name, choice)
    if isinstance(choice.low, int) and isinstance(choice.high, int):
        return trial.suggest_int(name, choice.low, choice.high, log=choice.log)
    return trial.suggest_float(name, choice.low, choice.high, log=choice.log)


def trial_folder(folder: Path, number: int) -> Path:
    return folder / f"trial-{number:03d}"


def rank_trials(study: Any) -> list[dict[str, Any]]:
    """Return the number, value and settings of each trial that succeeded, best first."""
    trials = sorted((trial for trial in study.trials if trial.value is not None), key=lambda trial: -trial.value)
    return [{"trial": trial.number, "value": trial.value, **trial.params} for trial in trials]


def write_best(folder: Path, study: Any, base: FinetuneConfig, space: Space) -> None:
    """Write the trials so far and the best model; called again, it completes what a stopped process left undone."""
    trials = rank_trials(study)
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
