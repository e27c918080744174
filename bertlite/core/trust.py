"""What a stranger's model folder may hold."""

import os
from pathlib import Path

from bertlite.core.errors import UserError

MAX_JSON_BYTES = 1 << 28  # bytes; the largest tokenizer.json there is takes a tenth of it


def check_model_folder(folder: Path) -> None:
    """Raise UserError for what a stranger's model folder might hold to reach beyond itself, or to be read for ever.

    Links may lead elsewhere in the folder or, in the Hugging Face cache, from snapshots/REVISION to blobs.
    """
    real = Path(os.path.realpath(folder))
    homes = [real, real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [real]
    for path in [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]:
        if not any(Path(os.path.realpath(path)).is_relative_to(home) for home in homes):
            raise UserError(f"{path}: a link that leaves its folder; copy the file there if it is right")
        if not (path.is_file() or path.is_dir()):
            raise UserError(f"{path}: neither a file nor a folder; remove it")
        if path.suffix == ".json" and path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes are too many for such a file")
