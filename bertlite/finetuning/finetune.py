"""`bertlite finetune`: from a configuration and a BERT to a model for a task, and to honest numbers about it."""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from bertlite.config.finetune_settings import FinetuneConfig, TaskSettings
from bertlite.config.loading import choose
from bertlite.core.distributed import barrier, get_rank, leave_process_group
from bertlite.core.errors import UserError
from bertlite.core.files import write_json
from bertlite.core.logging import logger
from bertlite.core.runtime import initialize_runtime
from bertlite.data.tables import find_table_file
from bertlite.finetuning.experiment import _prepare, _run_seed
from bertlite.finetuning.losses import label_loss
from bertlite.finetuning.tasks import TASKS
from bertlite.training.optim import OPTIMIZERS, SCHEDULES
from bertlite.training.run_folder import model_folder, open_run, write_config


def run(config: FinetuneConfig, resume: bool = False) -> dict[str, Any]:
    """Fine-tune as configured into `output_dir`, with each seed; with `resume`, go on where it stopped.

    Returns what results.json holds: the metric's mean and standard deviation, and all metrics of each seed; for
    several tasks, that by their names. Raises UserError for what is wrong with the configuration or the data.
    """
    check_settings(config)
    if config.task is not None:
        results = _run_task(config, config.task, resume)
        leave_process_group()
        return results
    suite = Path(config.output_dir)
    results = {}
    for name, task in config.tasks.items():  # before the first is trained
        for part in ("train", "validation", "test"):
            place = getattr(task, part)
            if place is not None and place.path is not None:
                find_table_file(place, f"tasks.{name}.{part}")
    for name, task in config.tasks.items():
        logger.info(f"task {name}")
        one = config.model_copy(update={"task": task, "tasks": {}, "output_dir": str(suite / name)})
        results[name] = _run_task(one, task, resume)
    if get_rank() == 0:
        write_json(suite / "results.json", results)
    leave_process_group()
    return results


def check_settings(config: FinetuneConfig) -> None:
    """Raise UserError for a name of nothing, and for settings that do not go together."""
    choose(OPTIMIZERS, config.train.optim, "train.optim")
    choose(SCHEDULES, config.train.lr_scheduler_type, "train.lr_scheduler_type")
    several = {f"tasks.{name}": settings for name, settings in config.tasks.items()}
    for name, settings in ({"task": config.task} if config.task else several).items():
        if Path(name).name != name:
            raise UserError(f"{name}: the name of a task names its folder too, so it has no slashes")
        task = choose(TASKS, settings.type, f"{name}.type")
        if settings.metric is not None:
            choose(task.metrics, settings.metric, f"{name}.metric")
        texts = {"token-classification": (1,), "question-answering": (2,)}.get(settings.type, (1, 2))
        if len(settings.text) not in texts:
            raise UserError(f"{name}.text names {len(settings.text)} columns; {settings.type} reads {texts[0]}")
        for key, value in {
            f"{name}.class_weights": settings.class_weights,
            "train.label_smoothing_factor": config.train.label_smoothing_factor,
        }.items():
            if value and task.loss is not label_loss:
                raise UserError(f"{key} is {value!r}, but {settings.type} has no such thing; leave it out")
    if len(set(config.train.seeds)) < len(config.train.seeds):
        raise UserError(f"train.seeds is {config.train.seeds}; each seed should stand there once")
    if config.model.init_from is None:
        raise UserError("there is no model to begin from: name it by --model MODEL, or set model.init_from")


def table(results: dict[str, Any]) -> str:
    """Results as lines for people: the metric of each task, mean ± standard deviation over its seeds."""
    lines = []
    for name, one in {"": results}.items() if "metric" in results else results.items():
        spread = f" ± {one['std']:.4f}" if len(one["seeds"]) > 1 else ""
        where = f"{one['measured_on']}, {len(one['seeds'])} seed(s)"
        lines.append(f"{name:16}  {one['metric']:12}  {one['mean']:.4f}{spread}  ({where})".strip())
    return "\n".join(lines)


def _run_task(config: FinetuneConfig, settings: TaskSettings, resume: bool) -> dict[str, Any]:
    runtime = initialize_runtime(config.train.precision, config.train.compile)
    folder = Path(config.output_dir)
    with open_run(folder, config, resume, runtime.rank):
        if resume and (folder / "results.json").exists():
            logger.info(f"{folder}: the run has finished")
            return json.loads((folder / "results.json").read_text(encoding="utf-8"))
        work = _prepare(config, settings, model_folder(str(config.model.init_from)), runtime)
        if runtime.rank == 0:  # only now: until here a mistake leaves no run behind
            write_config(folder, config)
        barrier()
        seeds = {str(seed): _run_seed(work, seed, resume) for seed in config.train.seeds}
        results = _summary(seeds, work.metric, work.measured_on)
        if runtime.rank == 0:
            best = max(seeds, key=lambda seed: seeds[seed][f"validation_{work.metric}"])
            for name in ("worst.jsonl", "confusion.png"):
                if (folder / f"seed-{best}" / name).exists():
                    shutil.copy(folder / f"seed-{best}" / name, folder / name)
            if not (folder / "model").exists():
                (folder / f"seed-{best}" / "model").rename(folder / "model")
            write_json(folder / "results.json", results)
            for seed in seeds:
                shutil.rmtree(folder / f"seed-{seed}" / "model", ignore_errors=True)
        barrier()
        logger.info(f"the model of the best seed is in {folder / 'model'}")
    return results


def _summary(seeds: dict[str, dict[str, float]], metric: str, on: str) -> dict[str, Any]:
    values = [scores[metric] for scores in seeds.values()]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"metric": metric, "mean": statistics.fmean(values), "std": spread, "measured_on": on, "seeds": seeds}
