"""`bertlite sweep`: the best settings of a fine-tuning, searched by Optuna, on validation data alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas

from bertlite.config.finetune_settings import FinetuneConfig, Range, SweepConfig
from bertlite.config.loading import dump_config, with_changes
from bertlite.core.errors import DiskFull, Failure, UserError
from bertlite.core.files import write_text
from bertlite.core.logging import logger
from bertlite.core.packages import require
from bertlite.finetuning.finetune import check_settings, run
from bertlite.training.run_folder import open_run, write_config


def sweep(config: SweepConfig, resume: bool = False) -> list[dict[str, Any]]:
    """Run the trials that are not done yet, each a fine-tuning into `output_dir`/trial-…, all seeds of the config.

    Returns a row for each trial, best first, and leaves study.db (Optuna's), trials.csv, trials.png, best.yaml, which
    `bertlite finetune` reads, and the best trial's model. Test data are left for that. Raises UserError for a setting
    that does not exist or cannot have its values.
    """
    optuna = _optuna()
    if config.task is None:
        raise UserError("bertlite sweep searches the settings of one task; the file has several")
    check_settings(config)
    space, folder = config.sweep.space, Path(config.output_dir)
    base = FinetuneConfig(**{name: getattr(config, name) for name in FinetuneConfig.model_fields})
    for name, choice in space.items():  # before anything runs
        for value in choice if isinstance(choice, list) else (choice.low, choice.high):
            check_settings(with_changes(base, {name: value}, "sweep.space"))
    with open_run(folder, config, resume):
        write_config(folder, config)
        storage = f"sqlite:///{folder / 'study.db'}"
        study = optuna.create_study(storage=storage, study_name="sweep", direction="maximize", load_if_exists=True)
        _keep_best(folder, study, base, space)
        while (done := sum(trial.state.is_finished() for trial in study.trials)) < config.sweep.trials:
            study.sampler = optuna.samplers.TPESampler(seed=config.sweep.seed + done)  # resumed or not, the same
            trial = study.ask()
            chosen = {name: _suggest(trial, name, choice) for name, choice in space.items()}
            logger.info(f"trial {trial.number}, {done + 1} of {config.sweep.trials}: {json.dumps(chosen)}")
            place = folder / f"trial-{trial.number:03d}"
            one = with_changes(base, {**chosen, "output_dir": str(place), "task.test": None}, "sweep.space")
            try:
                study.tell(trial, run(one)["mean"])
            except DiskFull:
                raise
            except Failure as error:  # these settings do not train
                logger.info(f"trial {trial.number}: {error}")
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            _keep_best(folder, study, base, space)
        if rows := _rows(study):
            return rows
        raise Failure(f"{folder}: no trial ended well")


def _keep_best(folder: Path, study: Any, base: FinetuneConfig, space: dict[str, Any]) -> None:
    """Leave what the trials so far have found, wherever the last process was stopped."""
    rows = _rows(study)
    if not rows:
        return
    model = folder / f"trial-{rows[0]['trial']:03d}" / "model"
    if model.exists():
        shutil.rmtree(folder / "model", ignore_errors=True)
        model.rename(folder / "model")
    for other in folder.glob("trial-*/model"):
        shutil.rmtree(other)
    chosen = {name: rows[0][name] for name in space}
    best = with_changes(base, {**chosen, "output_dir": f"{base.output_dir}-best"}, "sweep.space")
    write_text(folder / "best.yaml", dump_config(best))
    write_text(folder / "trials.csv", pandas.DataFrame(rows).to_csv(index=False))
    _draw(folder / "trials.png", rows, list(space))


def table(rows: list[dict[str, Any]]) -> str:
    """The trials as lines for people, best first."""
    return str(pandas.DataFrame(rows).to_string(index=False, float_format="{:.4g}".format))


def _rows(study: Any) -> list[dict[str, Any]]:
    trials = sorted((trial for trial in study.trials if trial.value is not None), key=lambda trial: -trial.value)
    return [{"trial": trial.number, "value": trial.value, **trial.params} for trial in trials]


def _suggest(trial: Any, name: str, choice: list[Any] | Range) -> Any:
    if isinstance(choice, list):
        return trial.suggest_categorical(name, choice)
    if isinstance(choice.low, int) and isinstance(choice.high, int):
        return trial.suggest_int(name, choice.low, choice.high, log=choice.log)
    return trial.suggest_float(name, choice.low, choice.high, log=choice.log)


def _draw(path: Path, rows: list[dict[str, Any]], names: list[str]) -> None:
    """The metric against each setting that was varied."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(names), 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        values = [row[name] for row in rows]
        numbers = all(isinstance(value, int | float) for value in values)
        axes.scatter(values if numbers else list(map(str, values)), [row["value"] for row in rows])
        axes.set(xlabel=name, ylabel="validation metric")
        if numbers and min(values) > 0 and max(values) > 20 * min(values):
            axes.set_xscale("log")
    figure.savefig(path)


def _optuna() -> Any:
    require("bertlite sweep", "sweep", "optuna")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
