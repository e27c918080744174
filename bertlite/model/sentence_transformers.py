"""Folders of the sentence-transformers library: where their encoder is, and how they make vectors of its outputs."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from bertlite.core.errors import UserError
from bertlite.core.trust import check_model_folder


class Module(NamedTuple):
    """An entry of modules.json: the class, such as Pooling, and the folder of its configuration."""

    kind: str
    folder: Path


def find_encoder(folder: Path) -> Path:
    """Return the folder of the encoder, which may lie within that of a sentence-transformers model."""
    if (folder / "config.json").exists() or not (folder / "modules.json").exists():
        return folder
    return next((module.folder for module in _read_modules(folder) if module.kind == "Transformer"), folder)


def read_vector_options(encoder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Return how the sentence-transformers model around an encoder makes vectors: `pooling, normalize, lowercase`, and
    `sequence_length` if it has one; but not what is `given`. Returns {} for other folders.

    Raises UserError, naming it, for what bertlite does not have.
    """
    root = encoder if (encoder / "modules.json").exists() else encoder.parent
    modules = _read_modules(root) if (root / "modules.json").exists() else []
    if encoder not in [module.folder for module in modules if module.kind == "Transformer"]:
        return {}
    kinds = [module.kind for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or set(kinds[2:]) - {"Normalize"}:
        raise UserError(
            f"{root / 'modules.json'}: bertlite has no model of {', '.join(kinds)}, but of Transformer, Pooling and "
            "Normalize; compute its vectors with sentence-transformers"
        )
    prompts = _read_object(root / "config_sentence_transformers.json")
    if prompts.get("default_prompt_name") is not None:
        raise UserError(
            f"{root / 'config_sentence_transformers.json'}: default_prompt_name is {prompts['default_prompt_name']!r}, "
            "but bertlite adds no prompts; compute the vectors with sentence-transformers"
        )
    settings = _read_object(encoder / "sentence_bert_config.json")
    pooling = given.get("pooling") or _read_pooling(modules[1].folder / "config.json")
    options = {"pooling": pooling, "normalize": "Normalize" in kinds}
    options["lowercase"] = settings.get("do_lower_case") is True
    if isinstance(length := settings.get("max_seq_length"), int):
        options["sequence_length"] = length
    return {name: value for name, value in options.items() if name not in given}


def _read_pooling(path: Path) -> str:
    """Read the pooling from its configuration, as `pooling_mode` or as older versions write it."""
    config = _read_object(path)
    modes = config.get("pooling_mode")
    if modes is None:
        names = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
        modes = [name.removeprefix("pooling_mode_").removesuffix("s").removesuffix("_token") for name in names]
    modes = [modes] if isinstance(modes, str) else modes or ["mean"]
    if modes not in (["mean"], ["cls"], ["max"]):
        raise UserError(f"{path}: pooling_mode is {modes}; bertlite has mean, cls and max: choose one by --pooling")
    return str(modes[0])


def _read_modules(folder: Path) -> list[Module]:
    check_model_folder(folder)
    path = folder / "modules.json"
    modules = []
    for entry in _read_json(path, list):
        kind, name = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(name, str) or name == ".." or Path(name).name != name:
            raise UserError(f"{path}: {str(entry)[:60]} does not name the type of a module and its folder, beside it")
        modules.append(Module(kind.rpartition(".")[2], folder / name))
    for module in modules:
        if module.folder.is_dir():
            check_model_folder(module.folder)
    return modules


def _read_object(path: Path) -> dict[str, Any]:
    return dict(_read_json(path, dict)) if path.exists() else {}


def _read_json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON") from None
    if not isinstance(value, kind):
        raise UserError(f"{path}: should hold a {kind.__name__}, but holds a {type(value).__name__}")
    return value
