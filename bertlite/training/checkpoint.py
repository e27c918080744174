"""Checkpoints: Hugging Face model folders with what a resume needs, either whole or not there at all.

step-00001000/           config.json, model.safetensors, tokenizer files
    training/            optimizer.safetensors, state.json, manifest.json (checksums of all the other files)
"""

import json
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bertlite.core.errors import UserError
from bertlite.core.files import atomic_folder, sha256, write_json
from bertlite.core.logging import logger
from bertlite.data.tokenizer import save_tokenizer
from bertlite.model.heads import Model
from bertlite.model.huggingface import save_model
from bertlite.training.optim import Optimizer
from bertlite.training.progress import VERSION, Progress, with_current_names

NAME = re.compile(r"step-\d{8,}")


@dataclass
class TrainingState:
    """What a resume needs besides the weights. `facts` must be equal for equal results: the text, the machine, …"""

    optimizer: dict[str, Tensor] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def micro_batch_size(self) -> int | None:
        """That of the run so far; None at its start."""
        return self.facts.get("micro_batch_size")


def save_checkpoint(
    run: Path, model: Model, tokenizer: PreTrainedTokenizerBase, state: TrainingState, limit: int
) -> Path:
    """Write `RUN/checkpoints/step-…` in one step, then remove old valid checkpoints beyond `limit`, but not the best.

    A valid checkpoint of the same step stays; an invalid one is renamed. Raises Failure when the disk is full; earlier
    checkpoints are intact then.
    """
    folder = checkpoint_folder(run, state.progress.step)
    if folder.exists():
        if problem(folder) is None:
            return folder
        names = (folder.with_name(f"{folder.name}.invalid-{number}") for number in count(1))
        folder.rename(next(name for name in names if not name.exists()))
    with atomic_folder(folder) as aside:
        _write_checkpoint(aside, model, tokenizer, state)
    _remove_old_checkpoints(run, limit, keep=(folder, checkpoint_folder(run, state.progress.best_step)))
    return folder


def _write_checkpoint(folder: Path, model: Model, tokenizer: PreTrainedTokenizerBase, state: TrainingState) -> None:
    save_model(model, folder)
    save_tokenizer(tokenizer, folder)
    training = folder / "training"
    training.mkdir()
    tensors = {name: tensor.contiguous().cpu() for name, tensor in state.optimizer.items()}
    save_file(tensors, training / "optimizer.safetensors")
    progress = {"version": VERSION, "progress": asdict(state.progress), "facts": state.facts}
    write_json(training / "state.json", progress)
    contents = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_json(training / "manifest.json", contents)


def _remove_old_checkpoints(run: Path, limit: int, keep: tuple[Path, Path]) -> None:
    """Remove the oldest valid checkpoints, so that `limit` of them stay; invalid ones do not count and stay."""
    others = [folder for folder in _checkpoints(run) if folder not in keep]
    if len(others) < limit:
        return  # without reading them all
    valid = [folder for folder in others if problem(folder) is None]
    for old in valid[: max(0, len(valid) - limit + 1)]:
        hidden = tempfile.mkdtemp(prefix=f".{old.name}.", dir=old.parent)
        shutil.rmtree(old.rename(hidden))  # a kill leaves nothing half-removed under its name


def load_training_state(checkpoint: Path) -> TrainingState:
    """Read the training state of a valid checkpoint. Raises UserError for one that this version cannot resume."""
    try:
        state = json.loads((checkpoint / "training" / "state.json").read_text(encoding="utf-8"))
        version = state.get("version", 1)
        if version > VERSION:
            raise ValueError(f"version {version} is newer than this bertlite, which knows {VERSION}")
        progress, facts = Progress(**with_current_names(state["progress"])), with_current_names(state["facts"])
        _ = facts["text"], facts["micro_batch_size"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{checkpoint}: cannot resume: the training state is unknown: {error}") from None
    return TrainingState(load_file(checkpoint / "training" / "optimizer.safetensors"), progress, facts)


def restore_optimizer(checkpoint: Path, state: TrainingState, optimizer: Optimizer, facts: dict[str, Any]) -> None:
    """Load the optimizer's state, and compare the `facts` of this run with those of the checkpoint.

    Raises UserError for another text or another model. A change of the machine or of the micro-batch size is logged.
    """
    if facts["text"] != state.facts["text"]:
        raise UserError(
            f"{checkpoint}: the text or the tokenizer has changed since this run started; start another run with --out"
        )
    try:
        optimizer.load_state(state.optimizer)
    except KeyError as error:
        raise UserError(f"{checkpoint}: cannot resume: {error.args[0]}") from None
    for name, value in facts.items():
        if value != state.facts.get(name):
            logger.warning(
                f"{name} is {value}, but was {state.facts.get(name)}: the batches are the same, but the last digits of "
                "the results may differ"
            )
    logger.info(f"resuming from {checkpoint}")


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint, whether it exists or not."""
    return run / "checkpoints" / f"step-{step:08d}"


def save_final_model(run: Path, model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write `RUN/model`, which marks the run as finished."""
    with atomic_folder(run / "model") as aside:
        save_model(model, aside)
        save_tokenizer(tokenizer, aside)


def newest_checkpoint(run: Path) -> Path | None:
    """Return the newest valid checkpoint, and log why newer ones are ignored."""
    for folder in reversed(_checkpoints(run)):
        reason = problem(folder)
        if reason is None:
            return folder
        logger.warning(f"checkpoint {folder} is ignored: {reason}")
    return None


def problem(folder: Path) -> str | None:
    """Return why a checkpoint is invalid; None when it holds exactly the files that were saved, byte for byte."""
    manifest = folder / "training" / "manifest.json"
    try:
        text = manifest.read_text(encoding="utf-8")
        contents = json.loads(text)
        for name, expected in contents.items():
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                return f"{name} is outside the folder"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
                return f"{name} differs from what was saved"
        if "model.safetensors" not in contents or "training/state.json" not in contents or text[-2:] != "}\n":
            return "training/manifest.json is incomplete"
        for path in folder.rglob("[!.]*"):
            name = str(path.relative_to(folder))
            if not path.is_dir() and name not in contents and path != manifest:
                return f"{name} is not part of the checkpoint"
    except (FileNotFoundError, NotADirectoryError):
        return "training/manifest.json is missing"
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        return "training/manifest.json is damaged"
    return None


def _checkpoints(run: Path) -> list[Path]:
    """Return all checkpoint folders, oldest first."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))
