"""Read the weights of a Hugging Face folder: safetensors and nothing else, since a pickle can run code."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bertlite.core.errors import UserError
from bertlite.model.architectures import ARCHITECTURES


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all tensors by their current names.

    Raises UserError, naming the file, for weights that are missing, damaged, or not in safetensors.
    """
    weights: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118, the file is no dict
                    # Checkpoints from TensorFlow call a layer norm's weight gamma and its bias beta.
                    name = key.replace("LayerNorm.gamma", "LayerNorm.weight")
                    weights[name.replace("LayerNorm.beta", "LayerNorm.bias")] = tensor = file.get_tensor(key)
                    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        raise UserError(f"{path}: {key} holds values that are not finite, as after a training diverged")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged, or not a safetensors file: {error}") from None
    return weights


def recognize_weights(folder: Path) -> str | None:
    """Return the model_type whose first layer the weights have; None if there is none."""
    names = read_weights(folder)
    for model_type, architecture in ARCHITECTURES.items():
        layer = architecture.layer_prefix.format(number=0)
        if any(name.removeprefix(architecture.weight_prefix).startswith(layer) for name in names):
            return model_type
    return None


def _weight_files(folder: Path) -> list[Path]:
    """List model.safetensors, or the files that its index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if index.exists():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
        except (OSError, RecursionError, ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{index}: not a valid index of weights") from None
        if any(Path(name).name != name for name in names):
            raise UserError(f"{index}: it names a file outside its folder")
        return [folder / name for name in names]
    from_hub = folder.parent.name == "snapshots"  # from where pickles are not downloaded
    if not from_hub and not any(folder.glob("pytorch_model*.bin")):
        raise UserError(f"{folder}: not a model folder (it has no model.safetensors)")
    name = folder.parent.parent.name.removeprefix("models--").replace("--", "/") if from_hub else folder
    raise UserError(
        f"{name}: has no model.safetensors; pytorch_model.bin is a pickle, which can run code, and is not read\n"
        f'if you trust it, convert it with transformers: AutoModelForMaskedLM.from_pretrained("{name}")'
        '.save_pretrained("NEW"), or the class of its head, and then AutoTokenizer in the same way'
    )
