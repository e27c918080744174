"""A run's folder: its lock, its configuration, its metrics, and which model a name means."""

import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bertlite.config.loading import diff_configs, dump_config, load_config
from bertlite.config.settings import MAY_DIFFER_ON_RESUME, Section
from bertlite.core.errors import UserError
from bertlite.core.files import disk_full_as_error, remove_leftovers, write_text
from bertlite.model.huggingface import local_folder
from bertlite.training.checkpoint import newest_checkpoint


@contextmanager
def open_run(folder: Path, config: Section, resume: bool, rank: int = 0) -> Iterator[None]:
    """Hold a run folder for this process alone, after checking that `config` may run or go on in it.

    The lock is the operating system's, on the file .lock: a process that dies leaves it open for the next.
    Raises UserError when another process holds it, when it holds a run and `resume` is false, or when `config`
    differs from the run's in a setting that may not change.
    """
    if rank:  # rank 0 does it for all
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name another folder with --out")
    created = not folder.exists()
    lock_file = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_file.open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be made or written: {error.strerror}") from None
    try:
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                created = False
                raise UserError(f"{folder}: another process is using this run folder") from None
            _check_config(folder, config, resume)
            for place in (folder, *folder.glob("seed-*")):
                for name in ("config.yaml", "metrics.jsonl", "model", "results.json", "worst.jsonl"):
                    remove_leftovers(place, name)
                remove_leftovers(place / "checkpoints", "step-*")
            yield
    finally:
        if created and os.listdir(folder) == [".lock"]:  # nothing was begun
            lock_file.unlink()
            folder.rmdir()


def write_config(folder: Path, config: Section) -> None:
    """Write the resolved configuration into a run folder: from now on it holds a run."""
    write_text(folder / "config.yaml", dump_config(config))


def model_folder(name: str) -> Path:
    """The folder of the model that `name` means: a run's final model or its newest valid checkpoint, a Hugging Face
    folder, or a hub name. Raises UserError when it means none."""
    path = Path(name)
    if (path / "model" / "config.json").exists():
        return path / "model"
    if (path / "config.yaml").exists() or (path / "checkpoints").is_dir():
        checkpoint = newest_checkpoint(path)
        if checkpoint is None:
            raise UserError(f"{name}: a run folder without a valid checkpoint yet")
        return checkpoint
    return local_folder(name)


class Metrics:
    """metrics.jsonl, one JSON object a line, written through at once; null is what JSON has no number for."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"

    def write(self, line: dict[str, Any]) -> None:
        odd = [key for key, value in line.items() if isinstance(value, float) and not math.isfinite(value)]
        line = line | dict.fromkeys(odd)
        with disk_full_as_error(self.path.parent), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """All whole lines."""
        lines = []
        for text in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                lines.append(json.loads(text))
            except ValueError:
                break  # torn by a crash
        return lines

    def cut_back(self, step: int) -> None:
        """Drop the lines after `step`."""
        kept = [json.dumps(line) + "\n" for line in self.lines() if line["step"] <= step]
        write_text(self.path, "".join(kept))


def _check_config(folder: Path, config: Section, resume: bool) -> None:
    holds_run = any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl", "checkpoints", "model"))
    if not holds_run:
        if any(not name.startswith(".") for name in os.listdir(folder)):
            raise UserError(f"{folder}: holds other things and no run; name a new folder by --out")
        return
    if not resume:
        raise UserError(f"{folder}: already holds a run; go on with it by --resume, or name another folder by --out")
    if not (folder / "config.yaml").exists():
        if newest_checkpoint(folder) is None:
            return
        raise UserError(f"{folder}: holds no config.yaml, so it cannot be resumed; name another folder by --out")
    old = load_config(type(config), folder / "config.yaml")
    for name, (before, now) in diff_configs(old, config).items():
        if name not in MAY_DIFFER_ON_RESUME:
            longer = f" --set model.init_from={folder}" if name in ("train.max_steps", "train.num_train_epochs") else ""
            raise UserError(
                f"{folder}: {name} is {now!r}, but the run there has {before!r}; resume with the old value, "
                f"or start another run with --out DIR{longer}"
            )
