"""Checkpoints: Hugging Face model folders with what training needs to go on, whole or not there at all.

step-00001000/           config.json, model.safetensors, tokenizer files
    training/            optimizer.safetensors, state.json, manifest.json (checksums of all the other files)
"""

import json
import re
import shutil
import tempfile
from itertools import count
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bertlite.core.files import atomic_folder, sha256, write_json
from bertlite.core.logging import logger
from bertlite.model.heads import Model
from bertlite.model.huggingface import save_model

NAME = re.compile(r"step-\d{8,}")


def save_checkpoint(
    run: Path,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `RUN/checkpoints/step-…` in one step, then remove the oldest valid ones beyond `keep`, but not the best.

    Raises Failure when the disk is full; the checkpoints before are intact then.
    """
    folder, best = (checkpoint_folder(run, state["progress"][name]) for name in ("step", "best_step"))
    if folder.exists():
        if problem(folder) is None:
            return folder
        names = (folder.with_name(f"{folder.name}.invalid-{number}") for number in count(1))
        folder.rename(next(name for name in names if not name.exists()))  # set aside, never deleted
    with atomic_folder(folder) as aside:
        save_model(model, aside)
        tokenizer.save_pretrained(aside)
        training = aside / "training"
        training.mkdir()
        save_file({name: tensor.contiguous().cpu() for name, tensor in optimizer.items()},
                  training / "optimizer.safetensors")  # fmt: skip
        write_json(training / "state.json", state)
        contents = {
            str(path.relative_to(aside)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(aside.rglob("*"))
            if path.is_file()
        }
        write_json(training / "manifest.json", contents)
    others = [one for one in _checkpoints(run) if one not in (folder, best)]
    if len(others) >= keep:
        valid = [one for one in others if problem(one) is None]
        for old in valid[: max(0, len(valid) - keep + 1)]:
            hidden = tempfile.mkdtemp(prefix=f".{old.name}.", dir=old.parent)
            shutil.rmtree(old.rename(hidden))  # a kill leaves nothing half-removed under its name
    return folder


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def save_final_model(run: Path, model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write `RUN/model`, the sign that a run has finished."""
    with atomic_folder(run / "model") as aside:
        save_model(model, aside)
        tokenizer.save_pretrained(aside)


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that is whole; each newer one that is not is named and passed over."""
    for folder in reversed(_checkpoints(run)):
        reason = problem(folder)
        if reason is None:
            return folder
        logger.info(f"checkpoint: {folder} is passed over: {reason}")
    return None


def problem(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted; None when every file is there with its checksum."""
    manifest = folder / "training" / "manifest.json"
    try:
        text = manifest.read_text(encoding="utf-8")
        contents = json.loads(text)
        for name, expected in contents.items():
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                return f"{name} is outside of the folder"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
                return f"{name} is not what was saved"
        if "model.safetensors" not in contents or "training/state.json" not in contents or text[-2:] != "}\n":
            return "training/manifest.json is incomplete"
        for path in folder.rglob("[!.]*"):
            name = str(path.relative_to(folder))
            if not path.is_dir() and name not in contents and path != manifest:
                return f"{name} was not saved with it"
    except (FileNotFoundError, NotADirectoryError):
        return "training/manifest.json is missing"
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        return "training/manifest.json is damaged"
    return None


def load_training_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's tensors and the state of a valid checkpoint."""
    training = folder / "training"
    return load_file(training / "optimizer.safetensors"), json.loads((training / "state.json").read_text())


def _checkpoints(run: Path) -> list[Path]:
    """All checkpoint folders, oldest first."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))
