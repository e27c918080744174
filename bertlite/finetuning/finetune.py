"""`bertlite finetune`: from a configuration and a BERT to a model for a task, and its results over several seeds."""

import shutil
from pathlib import Path
from typing import Any

from bertlite.config.finetune_settings import FinetuneConfig, TaskSettings
from bertlite.config.loading import choose
from bertlite.core.distributed import barrier, get_rank, leave_process_group
from bertlite.core.errors import UserError
from bertlite.core.files import write_json
from bertlite.core.logging import logger
from bertlite.core.packages import require
from bertlite.core.runtime import initialize_runtime
from bertlite.data.tables import find_table_files
from bertlite.finetuning.experiment import prepare, run_seed
from bertlite.finetuning.results import read_results, summarize_seeds
from bertlite.finetuning.tasks import TASKS
from bertlite.training.optim import OPTIMIZERS, SCHEDULES
from bertlite.training.run_folder import RUN_FILES, open_run, write_config


def run(config: FinetuneConfig, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Fine-tune as configured into `output_dir`, with each seed; with `resume`, continue a stopped run, with
    `overwrite`, replace one.

    Returns what results.json holds: the metric's mean and standard deviation, and all metrics of each seed; for
    several tasks, that by their names. Raises UserError for what is wrong with the configuration or the data.
    """
    check_settings(config)
    if config.task is None:
        results = run_tasks(config, resume, overwrite)
    else:
        results = run_task(config, config.task, resume, overwrite)
    leave_process_group()
    return results


def run_tasks(config: FinetuneConfig, resume: bool, overwrite: bool) -> dict[str, Any]:
    """Fine-tune on each of several tasks, into a folder of its own."""
    output_dir = Path(config.output_dir)
    for name, settings in config.tasks.items():  # a missing table ends the run before the first task is trained
        for split in ("train", "validation", "test"):
            table = getattr(settings, split)
            if table is not None and table.path is not None:
                find_table_files(table, f"tasks.{name}.{split}")
    results = {}
    for name, settings in config.tasks.items():
        logger.info(f"task {name}")
        changes = {"task": settings, "tasks": {}, "output_dir": str(output_dir / name)}
        results[name] = run_task(config.model_copy(update=changes), settings, resume, overwrite)
    if get_rank() == 0:
        write_json(output_dir / "results.json", results)
    return results


def run_task(config: FinetuneConfig, settings: TaskSettings, resume: bool, overwrite: bool) -> dict[str, Any]:
    """Fine-tune on one task with each seed, and keep the model of the best."""
    runtime = initialize_runtime(config.train.precision, config.train.compile)
    folder = Path(config.output_dir)
    with open_run(folder, config, resume, runtime.rank, overwrite):
        if resume and (folder / "results.json").exists():
            results = read_results(folder)
            if runtime.rank == 0:
                remove_other_models(folder)  # a killed process may have left them after it wrote the results
            logger.info(f"{folder}: the run has finished")
            return results
        experiment = prepare(config, settings, runtime)
        if runtime.rank == 0:  # after all checks, so that a mistake leaves no run behind
            write_config(folder, config, outdated=RUN_FILES if overwrite else [])
        barrier()
        seeds = {str(seed): run_seed(experiment, seed, resume) for seed in config.train.seeds}
        results = summarize_seeds(seeds, experiment.metric, experiment.measured_on)
        if runtime.rank == 0:
            keep_best_seed(folder, results)
        barrier()
        logger.info(f"the model of the best seed is in {folder / 'model'}")
    return results


def keep_best_seed(folder: Path, results: dict[str, Any]) -> None:
    """Move the model of the seed with the best validation metric to the run folder, copy its reports, write
    results.json, and delete the models of the other seeds."""
    seeds, metric = results["seeds"], results["metric"]
    best_seed = max(seeds, key=lambda seed: seeds[seed][f"validation_{metric}"])
    best = folder / f"seed-{best_seed}"
    for name in ("predictions.jsonl", "worst.jsonl", "confusion.png"):
        if (best / name).exists():
            shutil.copy(best / name, folder / name)
    if not (folder / "model").exists():
        (best / "model").rename(folder / "model")
    write_json(folder / "results.json", results)
    remove_other_models(folder)


def remove_other_models(folder: Path) -> None:
    """Remove the models of the seeds; that of the best one has moved."""
    for model in folder.glob("seed-*/model"):
        shutil.rmtree(model)


def check_settings(config: FinetuneConfig) -> None:
    """Raise UserError for missing packages, unknown names, and settings that do not go together."""
    require("bertlite finetune", "bertlite[finetune]", "sklearn", "seqeval", "matplotlib")
    choose(OPTIMIZERS, config.train.optim, "train.optim")
    choose(SCHEDULES, config.train.lr_scheduler_type, "train.lr_scheduler_type")
    tasks = {"task": config.task} if config.task else {f"tasks.{name}": task for name, task in config.tasks.items()}
    for name, settings in tasks.items():
        check_task(name, settings, config.train.label_smoothing_factor)
    if len(set(config.train.seeds)) < len(config.train.seeds):
        raise UserError(f"train.seeds is {config.train.seeds}, which holds a seed twice; remove the duplicate")
    if config.model.init_from is None:
        raise UserError("no model to start from: give it by --model MODEL, or set model.init_from")


def check_task(name: str, settings: TaskSettings, label_smoothing: float) -> None:
    """Check the settings of one task; `name` is their key, such as task or tasks.cola."""
    if Path(name).name != name or name.endswith(".."):
        raise UserError(f"{name}: the name of a task is also the name of its folder, so it cannot contain / or be ..")
    task = choose(TASKS, settings.type, f"{name}.type")
    if settings.metric is not None:
        choose(task.metrics, settings.metric, f"{name}.metric")
    if len(settings.text) not in task.num_texts:
        raise UserError(f"{name}.text names {len(settings.text)} columns; {settings.type} reads {task.num_texts[0]}")
    if len(settings.label) > 1 and settings.type != "multilabel":
        raise UserError(f"{name}.label names {len(settings.label)} columns; {settings.type} reads 1")
    if settings.label_names and (
        len(settings.label) > 1 or settings.type in ("regression", "question-answering", "multiple-choice")
    ):
        raise UserError(f"{name}.label_names is {settings.label_names}, but {name}.label needs no names; remove it")
    label_settings = {f"{name}.class_weights": settings.class_weights, "train.label_smoothing_factor": label_smoothing}
    if settings.positive_label is not None and not task.single_label:
        raise UserError(f"{name}.positive_label is {settings.positive_label!r}, but {settings.type} does not use it")
    for key, value in label_settings.items():
        if value and not task.label_weights:
            raise UserError(f"{key} is {value!r}, but {settings.type} does not use it; remove it")
