"""Run folders: lock, configuration, metrics, and the model that a name means."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bertlite.config.fields import Section
from bertlite.config.loading import diff_configs, dump_config, load_config, with_changes
from bertlite.config.settings import PretrainConfig
from bertlite.core.errors import UserError
from bertlite.core.files import remove_leftovers, write_text
from bertlite.core.logging import logger
from bertlite.core.trust import check_run_folder
from bertlite.model.huggingface import local_folder
from bertlite.model.sentence_transformers import find_encoder
from bertlite.training.checkpoint import newest_checkpoint

MAY_DIFFER_ON_RESUME = {
    "output_dir",  # is the run folder itself
    "train.logging_steps",
    "train.eval_steps",
    "train.save_steps",
    "train.save_minutes",
    "train.save_total_limit",
    "train.per_device_train_batch_size",
    "train.on_nonfinite_loss",  # stop and skip do the same until the run stops
    "sweep.trials",  # more trials continue the sweep
}
# What runs write beside config.yaml, as globs.
RUN_FILES = (
    "metrics.jsonl", "checkpoints", "model", "results.json", "predictions.jsonl", "worst.jsonl", "confusion.png",
    "seed-*", "trial-*", "study.db", "trials.json", "trials.csv", "trials.png", "best.yaml", "report.html",
)  # fmt: skip


@contextmanager
def open_run(
    folder: Path, config: Section, resume: bool, rank: int = 0, overwrite: bool = False, extend: bool = False
) -> Iterator[None]:
    """Lock a run folder for this process, after checking that `config` may start or resume the run in it.

    With `overwrite` it may replace a run of the same command, with `extend` resume one with more steps; `write_config`
    then removes what is outdated.

    The operating system frees the lock, on the file .lock, when the process ends. Rank 0 locks for all ranks.
    Raises UserError when another process holds the lock, when the folder holds a run and `resume` is false, or when
    `config` differs from the run's in a setting that may not change.
    """
    if rank:
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name another folder with --out")
    is_new = not folder.exists()
    lock = FileLock((folder / ".lock").resolve(), timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"{folder}: another process is using this run folder") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be created or written: {error.strerror}") from None
    try:
        check_run_folder(folder)
        if not _holds_run(folder):
            if any(not name.startswith(".") for name in os.listdir(folder)):
                raise UserError(f"{folder}: is not empty and holds no run; name a new folder with --out")
        elif overwrite:
            _check_overwrite(folder, config)
        else:
            _check_resume(folder, config, resume, extend)
        for place in (folder, *folder.glob("seed-*")):
            for name in ("config.yaml", *RUN_FILES):
                remove_leftovers(place, name)
            remove_leftovers(place / "checkpoints", "step-*")
        yield
    finally:
        lock.release()
        if is_new and set(os.listdir(folder)) <= {".lock"}:  # no run was started
            shutil.rmtree(folder)


def write_config(folder: Path, config: Section, outdated: Iterable[str] = ()) -> None:
    """Write the resolved configuration into a run folder, which then counts as a run.

    Entries of RUN_FILES that are `outdated` are removed before: config.yaml marks the folder as a run all the time.
    """
    for path in [path for name in outdated for path in folder.glob(name)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    write_text(folder / "config.yaml", dump_config(config))


def keep_former_defaults(folder: Path, config: PretrainConfig) -> PretrainConfig:
    """Return the configuration with the run's values of the settings whose default depends on the version."""
    path = folder / "config.yaml"
    names = []
    if config.tokenizer.strip_accents is None:
        names.append("tokenizer.strip_accents")
    if config.model.initialization == "auto":
        names.append("model.initialization")
    if not names or not path.exists():
        return config
    former = load_config(PretrainConfig, path)
    changes = {name: attrgetter(name)(former) for name in names}
    return with_changes(config, changes, str(path))


def model_folder(name: str) -> Path:
    """Return the model folder that `name` means: a run's final model or newest valid checkpoint, a Hugging Face folder,
    or the local copy of a hub name.

    Raises UserError when it means none.
    """
    path = Path(name)
    if _holds_run(path):
        check_run_folder(path)
    if (path / "model" / "config.json").exists():
        return path / "model"
    if (path / "config.yaml").exists() or (path / "checkpoints").is_dir():
        checkpoint = newest_checkpoint(path)
        if checkpoint is None:
            raise UserError(f"{name}: this run has no valid checkpoint yet")
        return checkpoint
    return find_encoder(local_folder(name))


def find_run(name: str) -> Path | None:
    """Return the run folder that `name` means, which may be one of its checkpoints; None for other model folders."""
    path = Path(name)
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    return run if (run / "config.yaml").exists() else None


def metrics_file(folder: Path) -> Path:
    """Return the path of a run's metrics, one JSON object a line."""
    return folder / "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics, up to the first one that is damaged."""
    path = metrics_file(folder)
    texts = path.read_bytes().splitlines() if path.exists() else []
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            _ = line["step"] + 0
        except (ValueError, LookupError, TypeError, RecursionError):
            if number < len(texts):  # a crash may have cut the last one
                logger.warning(f"{path}:{number}: damaged; this line and the later ones are ignored")
            break
        lines.append(line)
    return lines


def _holds_run(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in ("config.yaml", "metrics.jsonl", "checkpoints", "model"))


def _check_overwrite(folder: Path, config: Section) -> None:
    """Raise UserError if the folder holds something else than a run of this command, or what the new run needs."""
    if not (folder / "config.yaml").exists():
        raise UserError(
            f"{folder}: has no config.yaml, so --overwrite does not replace it; name another folder with --out"
        )
    load_config(type(config), folder / "config.yaml")
    for text in _find_texts(config.model_dump(exclude={"output_dir"})):
        if os.path.exists(text) and Path(os.path.realpath(text)).is_relative_to(os.path.realpath(folder)):
            raise UserError(f"{text} is part of the run that --overwrite would replace; name another folder with --out")


def _find_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _find_texts(item)


def _check_resume(folder: Path, config: Section, resume: bool, extend: bool) -> None:
    """Raise UserError if the run may not be resumed with this configuration."""
    if not resume:
        raise UserError(
            f"{folder}: already holds a run; continue it with --resume, replace it with --overwrite, or name another "
            "folder with --out"
        )
    if not (folder / "config.yaml").exists():
        if newest_checkpoint(folder) is None:
            return
        raise UserError(f"{folder}: has no config.yaml, so it cannot be resumed; name another folder with --out")
    old = load_config(type(config), folder / "config.yaml")
    for name, (before, now) in diff_configs(old, config).items():
        is_longer = name == "train.max_steps" and isinstance(config, PretrainConfig) and now > before
        if name not in MAY_DIFFER_ON_RESUME and not (is_longer and extend):
            advice = f"make the run longer by --extend-to {now}, " if is_longer else ""
            raise UserError(
                f"{folder}: {name} is {now!r}, but the run there has {before!r}; resume with the old value, {advice}"
                "or start another run with --out DIR"
            )
