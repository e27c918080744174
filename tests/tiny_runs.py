"""Pretraining runs of seconds, and what they leave."""

import json
import shutil
import time
from pathlib import Path

import torch
from processes import Command
from safetensors.torch import load_file

from bertlite.config.loading import load_config
from bertlite.config.settings import PretrainConfig
from bertlite.pretraining.pretrain import run

TIMES = ("tokens_per_second", "elapsed_seconds")


def pretrain(path: Path, *overrides: str, resume: bool = False) -> Path:
    """Pretrain in this process and return the run folder."""
    config = load_config(PretrainConfig, path, list(overrides))
    run(config, resume=resume)
    return Path(config.output_dir)


def metrics(folder: Path) -> list[dict]:
    """metrics.jsonl without what a clock decides."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def traces(folder: Path) -> tuple:
    """All that a run leaves, but for times."""
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    model = (folder / "model" / "model.safetensors").read_bytes()
    config = (folder / "model" / "config.json").read_text()
    return metrics(folder), checkpoints, model, config


def crash_after(folder: Path, step: int, copy: Path) -> Path:
    """A copy of a finished run as a crash soon after `step`'s checkpoint would have left it."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "model")
    for checkpoint in (copy / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # torn
    return copy


def optimizer_state(folder: Path, step: int):
    return load_file(folder / f"checkpoints/step-{step:08d}/training/optimizer.safetensors")


def start(path: Path, *arguments: str) -> Command:
    return Command("pretrain", path, *arguments)


def wait_for(condition, process: Command) -> None:
    while not condition() and process.poll() is None:
        time.sleep(0.01)
