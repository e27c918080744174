"""What files, model folders and run folders from a stranger may contain."""

import os
from collections.abc import Iterable
from pathlib import Path

from bertlite.core.errors import UserError

MAX_JSON_BYTES = 1 << 28  # ten times the largest tokenizer.json in use
MAX_TEXT_CHARACTERS = 1 << 20  # of a text that a model reads; no model has positions for more
MAX_LINE_BYTES = 1 << 26  # of a file of text; a novel has a million
MAX_CELL_CHARACTERS = 1 << 24  # of a table with quotes, which may hold lines


def check_model_folder(folder: Path) -> None:
    """Raise UserError if reading a model folder could leave the folder, hang, or run out of memory.

    Links may point inside the folder or, in the cache of huggingface_hub, from below `snapshots/REVISION` to `blobs`.
    """
    real = Path(os.path.realpath(folder))
    snapshots = [parent.parent for parent in (real, *real.parents) if parent.parent.name == "snapshots"]
    allowed = [real, *(path.parent / "blobs" for path in snapshots)]
    paths = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    _check_paths(paths, allowed)
    for path in paths:
        if path.suffix == ".json" and path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes are too many for a JSON file")


def check_run_folder(run: Path) -> None:
    """Raise UserError if reading a run folder could leave the folder or hang."""
    patterns = ("*", "checkpoints/*", "checkpoints/*/training", "checkpoints/*/training/*", "seed-*/*")
    _check_paths([path for pattern in patterns for path in run.glob(pattern)], [Path(os.path.realpath(run))])


def _check_paths(paths: Iterable[Path], allowed: list[Path]) -> None:
    """Raise UserError for a path that leads out of the `allowed` folders, and for pipes and devices."""
    for path in paths:
        target = Path(os.path.realpath(path))
        if not any(target.is_relative_to(parent) for parent in allowed):
            raise UserError(f"{path}: a link that leaves its folder; if you trust it, replace it by a copy of the file")
        if not (path.is_file() or path.is_dir()):
            raise UserError(f"{path}: neither a file nor a folder; remove it")
