"""Run folders: lock, configuration, metrics, and the model that a name means."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bertlite.config.loading import diff_configs, dump_config, load_config
from bertlite.config.settings import MAY_DIFFER_ON_RESUME, Section
from bertlite.core.errors import UserError
from bertlite.core.files import remove_leftovers, write_text
from bertlite.core.logging import logger
from bertlite.model.huggingface import local_folder
from bertlite.model.sentence_transformers import find_encoder
from bertlite.training.checkpoint import newest_checkpoint


@contextmanager
def open_run(folder: Path, config: Section, resume: bool, rank: int = 0) -> Iterator[None]:
    """Lock a run folder for this process, after checking that `config` may start or resume the run in it.

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
        _check_config(folder, config, resume)
        for place in (folder, *folder.glob("seed-*")):
            for name in ("config.yaml", "metrics.jsonl", "model", "results.json", "predictions.jsonl", "worst.jsonl"):
                remove_leftovers(place, name)
            remove_leftovers(place / "checkpoints", "step-*")
        yield
    finally:
        lock.release()
        if is_new and set(os.listdir(folder)) <= {".lock"}:  # no run was started
            shutil.rmtree(folder)


def write_config(folder: Path, config: Section) -> None:
    """Write the resolved configuration into a run folder, which then counts as a run."""
    write_text(folder / "config.yaml", dump_config(config))


def model_folder(name: str) -> Path:
    """Return the model folder that `name` means: a run's final model or newest valid checkpoint, a Hugging Face folder,
    or the local copy of a hub name.

    Raises UserError when it means none.
    """
    path = Path(name)
    if (path / "model" / "config.json").exists():
        return path / "model"
    if (path / "config.yaml").exists() or (path / "checkpoints").is_dir():
        checkpoint = newest_checkpoint(path)
        if checkpoint is None:
            raise UserError(f"{name}: this run has no valid checkpoint yet")
        return checkpoint
    return find_encoder(local_folder(name))


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


def _check_config(folder: Path, config: Section, resume: bool) -> None:
    holds_run = any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl", "checkpoints", "model"))
    if not holds_run:
        if any(not name.startswith(".") for name in os.listdir(folder)):
            raise UserError(f"{folder}: is not empty and holds no run; name a new folder with --out")
        return
    if not resume:
        raise UserError(f"{folder}: already holds a run; continue it with --resume, or name another folder with --out")
    if not (folder / "config.yaml").exists():
        if newest_checkpoint(folder) is None:
            return
        raise UserError(f"{folder}: has no config.yaml, so it cannot be resumed; name another folder with --out")
    old = load_config(type(config), folder / "config.yaml")
    for name, (before, now) in diff_configs(old, config).items():
        if name not in MAY_DIFFER_ON_RESUME:
            is_length = name in ("train.max_steps", "train.num_train_epochs")
            init_from = f" --set model.init_from={folder}" if is_length else ""
            raise UserError(
                f"{folder}: {name} is {now!r}, but the run there has {before!r}; resume with the old value, "
                f"or start another run with --out DIR{init_from}"
            )
