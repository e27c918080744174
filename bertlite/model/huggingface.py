"""Hugging Face model folders: names of weights, loading and saving."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bertlite.config.loading import read_saved_task
from bertlite.config.settings import Architecture
from bertlite.core.errors import UserError, first_line
from bertlite.core.logging import logger
from bertlite.core.trust import check_model_folder
from bertlite.data.tokenizer import load_tokenizer
from bertlite.model.architectures import ARCHITECTURES, EncoderArchitecture, build_encoder
from bertlite.model.encoder import Encoder
from bertlite.model.heads import (
    Classifier,
    MaskedLanguageModel,
    Model,
    MultipleChoice,
    QuestionAnswerer,
    SequenceClassifier,
    TokenClassifier,
)
from bertlite.model.layers import ACTIVATIONS
from bertlite.model.weight_files import read_weights, recognize_weights

MODEL_FILES = ["*.json", "*.txt", "*.safetensors"]


class SavedModel(NamedTuple):
    """The contents of a model folder; `config` is the encoder's part of config.json, `hf_config`."""

    folder: Path
    hf_config: dict[str, Any]
    config: Architecture
    architecture: EncoderArchitecture
    weights: dict[str, Tensor]  # keys are Hugging Face's names


def hf_class(model: Model) -> str:
    """Return the name of transformers' class for a model, such as BertForMaskedLM."""
    return ARCHITECTURES[model.config.model_type].class_prefix + model.class_suffix


def weight_names(model: Model) -> dict[str, list[str]]:
    """Map our name of every weight to Hugging Face's name, or names of tensors that ours concatenates."""
    architecture = ARCHITECTURES[model.config.model_type]
    modules = dict(architecture.encoder)
    for number in range(model.config.num_hidden_layers):
        hf_layer = architecture.layer_prefix.format(number=number)
        for name, hf_names in architecture.layer.items():
            modules[f"layers.{number}.{name}"] = [hf_layer + hf_name for hf_name in hf_names]
    if not isinstance(model, Encoder):
        prefix = architecture.weight_prefix
        modules = {f"encoder.{name}": [prefix + hf_name for hf_name in names] for name, names in modules.items()}
    modules |= architecture.heads[model.class_suffix]
    weights = {}
    for name, _ in model.named_parameters():
        module, _, weight_or_bias = name.rpartition(".")
        weights[name] = [f"{hf_module}.{weight_or_bias}" for hf_module in modules[module]]
    return weights


def to_hf(model: Model, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split tensors by our names (weights, gradients) into tensors by Hugging Face's names."""
    return {
        hf_name: tensor
        for name, hf_names in weight_names(model).items()
        for hf_name, tensor in zip(hf_names, tensors[name].chunk(len(hf_names)), strict=True)
    }


def save_model(model: Model, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json and model.safetensors into an existing folder.

    Raises UserError for a weight that exceeds the range of `dtype`.
    """
    save_config(model, folder, dtype)
    weights = to_hf(model, {name: tensor.detach() for name, tensor in model.state_dict().items()})
    largest = torch.finfo(dtype).max
    for name, tensor in weights.items():
        if tensor.abs().max() > largest:
            raise UserError(
                f"{name} holds {tensor.abs().max():.3g}, more than {dtype}'s {largest:.3g}; use bf16 or fp32"
            )
    weights = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def save_config(model: Model, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json: the architecture and the labels, under Hugging Face's keys. A task is written to task.json."""
    hf_config = {
        "architectures": [hf_class(model)],
        "model_type": model.config.model_type,
        **model.config.model_dump(),
        "position_embedding_type": "absolute",
        "dtype": str(dtype).removeprefix("torch."),
    }
    if isinstance(model, Classifier):
        hf_config["id2label"] = {str(number): label for number, label in enumerate(model.labels)}
        hf_config["label2id"] = {label: number for number, label in enumerate(model.labels)}
        hf_config["problem_type"] = model.problem_type
        if model.task is not None:
            (folder / "task.json").write_text(model.task.model_dump_json(indent=2) + "\n", encoding="utf-8")
    text = json.dumps(hf_config, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def load_model(folder: Path, kernel: str = "sdpa") -> Model:
    """Load a Hugging Face model folder in fp32 on the CPU, with its head if it has one.

    Raises UserError, naming the file, for a folder that holds no model of a known architecture.
    """
    saved = _read_folder(folder)
    weights, model_class = saved.weights, _find_model_class(saved)
    model: Model
    with torch.device("meta"):
        if issubclass(model_class, Classifier):
            labels = _read_labels(saved, model_class)
            model = model_class(saved.config, labels, kernel, saved.hf_config.get("problem_type"))
            model.task = read_saved_task(folder)
        elif issubclass(model_class, MaskedLanguageModel):
            _check_ties(saved)
            model = MaskedLanguageModel(saved.config, kernel)
        else:
            prefix = saved.architecture.weight_prefix
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
            model = build_encoder(saved.config, kernel, pooler="pooler.dense.weight" in weights)
    model.load_state_dict(_from_hf(model, weights, folder)[0], assign=True)
    return model


def load_weights_for(model_class: type[Classifier], labels: list[str], folder: Path) -> dict[str, Tensor]:
    """Load the weights of a Hugging Face folder that a model to be fine-tuned can use, by our names, and log the rest.

    The head's weights are used only if the folder has the same head for the same labels. Raises UserError, naming the
    file, when the folder holds no encoder of this architecture.
    """
    saved = _read_folder(folder)
    saved_class, prefix, weights = _find_model_class(saved), saved.architecture.weight_prefix, saved.weights
    if not any(name.startswith(prefix) for name in weights):
        weights = {prefix + name: tensor for name, tensor in weights.items()}
    with torch.device("meta"):
        model = model_class(saved.config, labels)
    same_head = saved_class is model_class and (
        model_class is MultipleChoice or _read_labels(saved, model_class) == labels  # its head is for any choices
    )
    heads = tuple(f"{_hf_classifier(saved, head)}." for head in (SequenceClassifier, QuestionAnswerer))
    usable = (prefix, *heads) if same_head else (prefix,)
    weights = {name: tensor for name, tensor in weights.items() if name.startswith(usable)}
    pooler = f"{prefix}pooler."
    converted, missing = _from_hf(model, weights, folder, may_lack=(pooler, *heads))
    if missing:
        parts = dict.fromkeys("pooler" if name.startswith(pooler) else "head" for name in missing)
        logger.info(f"{folder} has no {' and no '.join(parts)} for this task; new weights are initialized")
    return converted


def load_tokenizer_of(folder: Path, config: Architecture) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a model's folder. Raises UserError for ids or lengths that the model does not embed."""
    tokenizer = load_tokenizer(str(folder))
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer):,} tokens, but the model's vocabulary has "
            f"{config.vocab_size:,}"
        )
    single = tokenizer.backend_tokenizer.encode("")  # what the post-processor adds
    pair = tokenizer.backend_tokenizer.encode("", "")
    if max(len(single), len(pair)) >= config.max_position_embeddings:
        raise UserError(
            f"{folder}: post_processor: adds {max(len(single), len(pair)):,} special tokens to a text; the model has "
            f"{config.max_position_embeddings:,} positions"
        )
    for encoding, types in ((single, config.type_vocab_size), (pair, max(2, config.type_vocab_size))):
        if max(encoding.type_ids, default=0) >= types:
            raise UserError(
                f"{folder}: post_processor: gives the type id {max(encoding.type_ids)}; the model has "
                f"{config.type_vocab_size} (type_vocab_size)"
            )
    return tokenizer


def read_architecture(folder: Path) -> Architecture:
    """Read the encoder's configuration from config.json. Raises UserError for settings that bertlite lacks."""
    return _read_config(folder)[1]


def local_folder(name: str) -> Path:
    """Return the folder `name`, or download the model of that name from the hub and return its folder."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such model folder")
    try:
        return Path(snapshot_download(name, allow_patterns=MODEL_FILES))
    except (HFValidationError, OSError) as error:
        raise UserError(f"{name}: no such folder, and the download from the hub failed: {first_line(error)}") from None


def _read_folder(folder: Path) -> SavedModel:
    """Read config.json and all weights, and check that they belong together."""
    hf_config, config = _read_config(folder)
    architecture, weights = ARCHITECTURES[config.model_type], read_weights(folder)
    layer_number = re.compile(re.escape(architecture.layer_prefix).replace(r"\{number\}", r"(\d+)"))
    numbers = {int(match[1]) for name in weights if (match := layer_number.search(name))}
    layers = config.num_hidden_layers
    if len(numbers) != layers or max(numbers) != layers - 1:
        raise UserError(
            f"{folder}: config.json describes layers 0 to {layers - 1}, the weights are those of layers "
            f"{sorted(numbers)}"
        )
    for name, tied in architecture.tied.items():
        if name in weights:  # of two equal tensors, a file may hold either
            weights.setdefault(tied, weights[name])
    return SavedModel(folder, hf_config, config, architecture, weights)


def _read_config(folder: Path) -> tuple[dict[str, Any], Architecture]:
    """Read config.json, and the encoder's configuration in it."""
    path = folder / "config.json"
    if folder.is_dir():
        check_model_folder(folder)
    try:
        hf_config = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{folder}: not a model folder (it has no readable config.json)") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON") from None
    model_type = hf_config.get("model_type") if isinstance(hf_config, dict) else None
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        advice = f"bertlite has {', '.join(ARCHITECTURES)}"
        if model_type is None and isinstance(hf_config, dict) and (found := recognize_weights(folder)):
            advice = f'the weights are those of {found}: add "model_type": "{found}"'
        raise UserError(f"{path}: model_type is {model_type!r}; {advice}")
    return hf_config, _validate_config(path, hf_config, ARCHITECTURES[model_type])


def _validate_config(path: Path, hf_config: dict[str, Any], architecture: EncoderArchitecture) -> Architecture:
    """Check the encoder's settings, with transformers' defaults for those that are missing."""
    for key, allowed in architecture.required.items():
        if hf_config.get(key) not in allowed:
            raise UserError(f"{path}: {key} is {hf_config[key]!r}, which bertlite does not have")
    defaults = architecture.hf_config()
    settings = {name: hf_config.get(name, getattr(defaults, name)) for name in architecture.config.model_fields}
    if str(settings["hidden_act"]) not in ACTIVATIONS:
        raise UserError(f"{path}: hidden_act is {settings['hidden_act']!r}; bertlite has {', '.join(ACTIVATIONS)}")
    if settings["pad_token_id"] is None:
        settings["pad_token_id"] = 0
    try:
        return architecture.config.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{name} is {_shorten(first['input'])}: " for name in first["loc"])
        raise UserError(f"{path}: {place}{first['msg'].removeprefix('Value error, ')}") from None


def _shorten(value: Any) -> str:
    text = repr(value)  # of JSON, whose numbers have any number of digits
    return text if len(text) <= 60 else text[:57] + "..."


def _find_model_class(saved: SavedModel) -> type[Model]:
    """Find which model the weights are of, by their names, and by config.json where two models share the names."""
    architecture, weights = saved.architecture, saved.weights
    masked_lm = f"{architecture.heads[MaskedLanguageModel.class_suffix]['head'][0]}."
    if any(name.startswith(masked_lm) for name in weights):
        return MaskedLanguageModel
    if f"{_hf_classifier(saved, QuestionAnswerer)}.weight" in weights:
        return QuestionAnswerer
    if f"{_hf_classifier(saved, SequenceClassifier)}.weight" not in weights:
        return Encoder
    for model_class in (TokenClassifier, MultipleChoice):
        if saved.hf_config.get("architectures") == [architecture.class_prefix + model_class.class_suffix]:
            return model_class
    return SequenceClassifier if f"{architecture.weight_prefix}pooler.dense.weight" in weights else TokenClassifier


def _check_ties(saved: SavedModel) -> None:
    for name, tied in saved.architecture.tied.items():
        if name in saved.weights and not torch.equal(saved.weights[name], saved.weights[tied]):
            raise UserError(f"{saved.folder}: {name} differs from {tied}, to which bertlite ties it")


def _hf_classifier(saved: SavedModel, model_class: type[Classifier]) -> str:
    """Return Hugging Face's name of the linear layer on top of the encoder."""
    return saved.architecture.heads[model_class.class_suffix]["classifier"][0]


def _read_labels(saved: SavedModel, model_class: type[Classifier]) -> list[str]:
    """Read the labels from id2label; without it they are Hugging Face's LABEL_0, LABEL_1, …"""
    name = f"{_hf_classifier(saved, model_class)}.weight"
    weight = saved.weights[name]
    if weight.ndim != 2 or not weight.numel():
        raise UserError(f"{saved.folder}: {name} has shape {tuple(weight.shape)}, which no head has")
    labels = saved.hf_config.get("id2label")
    num_labels = len(weight)
    if model_class is MultipleChoice:  # whose labels name the choices, two by Hugging Face's default
        num_labels = len(labels) if labels and isinstance(labels, dict) else 2
    numbers = [str(number) for number in range(num_labels)]
    labels = labels or {number: f"LABEL_{number}" for number in numbers}
    if not isinstance(labels, dict) or labels.keys() != set(numbers):
        raise UserError(
            f"{saved.folder / 'config.json'}: id2label should name the head's outputs, 0 to {len(numbers) - 1}"
        )
    return [str(labels[number]) for number in numbers]


def _from_hf(
    model: Model, weights: dict[str, Tensor], folder: Path, may_lack: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """Convert a folder's weights to fp32 and our names; also return Hugging Face's names of those that are missing.

    Raises UserError for a weight of another shape, an unknown one, or a missing one whose name starts with none of
    `may_lack`.
    """
    expected = to_hf(model, dict(model.named_parameters()))
    unused = ARCHITECTURES[model.config.model_type].unused
    missing = [name for name in expected if name not in weights]
    problems = {
        "weights are missing": [name for name in missing if not name.startswith(may_lack)],
        "are unknown": [name for name in weights if name not in expected and not unused.match(name)],
    }
    messages = [f"{len(names)} {problem}, such as {names[0]}" for problem, names in problems.items() if names]
    if messages:
        raise UserError(f"{folder}: the weights are not those of config.json's model: {'; '.join(messages)}")
    for name, tensor in expected.items():
        if name in weights and weights[name].shape != tensor.shape:
            raise UserError(
                f"{folder}: {name} has shape {tuple(weights[name].shape)}, config.json means {tuple(tensor.shape)}"
            )
    converted = {
        name: torch.cat([weights[hf_name].float() for hf_name in hf_names])
        for name, hf_names in weight_names(model).items()
        if not set(hf_names) & set(missing)
    }
    return converted, missing
