"""Hugging Face model folders: the table of weight names, loading and saving."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedTokenizerBase

from bertlite.config.settings import Architecture
from bertlite.core.errors import UserError
from bertlite.core.logging import logger
from bertlite.core.trust import check_model_folder
from bertlite.data.tokenizer import load_tokenizer
from bertlite.model.bert import Encoder
from bertlite.model.heads import Classifier, MaskedLanguageModel, QuestionAnswerer, SequenceClassifier, TokenClassifier
from bertlite.model.layers import ACTIVATIONS

Model = MaskedLanguageModel | Encoder | Classifier

# Our modules on the left, Hugging Face's on the right; .weight and .bias follow in both. Several on the right lie one
# under the other in ours.
ENCODER = {
    "embeddings.word": ["embeddings.word_embeddings"],
    "embeddings.position": ["embeddings.position_embeddings"],
    "embeddings.segment": ["embeddings.token_type_embeddings"],
    "embeddings.norm": ["embeddings.LayerNorm"],
    "pooler.dense": ["pooler.dense"],
}
LAYER = {
    "attention.qkv": ["attention.self.query", "attention.self.key", "attention.self.value"],
    "attention.out": ["attention.output.dense"],
    "attention_norm": ["attention.output.LayerNorm"],
    "up": ["intermediate.dense"],
    "down": ["output.dense"],
    "norm": ["output.LayerNorm"],
}
MLM_HEAD = {
    "head": ["cls.predictions"],
    "head.dense": ["cls.predictions.transform.dense"],
    "head.norm": ["cls.predictions.transform.LayerNorm"],
}
# Hugging Face's name of each of our models, and what lies on top of the encoder.
ARCHITECTURES: dict[type[nn.Module], tuple[str, dict[str, list[str]]]] = {
    Encoder: ("BertModel", {}),
    MaskedLanguageModel: ("BertForMaskedLM", MLM_HEAD),
    SequenceClassifier: ("BertForSequenceClassification", {"classifier": ["classifier"]}),
    TokenClassifier: ("BertForTokenClassification", {"classifier": ["classifier"]}),
    QuestionAnswerer: ("BertForQuestionAnswering", {"classifier": ["qa_outputs"]}),
}
# What BERT folders hold and bertlite's model may have no use for. A decoder is another name of the word
# embedding, which is checked; position_ids count from 0; next-sentence prediction is not a part of bertlite.
UNUSED = re.compile(r"cls\.seq_relationship\.|.*position_ids$|cls\.predictions\.decoder\.|bert\.pooler\.")

# What Hugging Face assumes of a config.json that leaves it out.
ASSUMED = {name: getattr(BertConfig(), name) for name in Architecture.model_fields}
# Of settings that mean another computation, the values that mean bertlite's.
HAS = {
    "position_embedding_type": (None, "absolute"),
    "is_decoder": (None, False),
    "add_cross_attention": (None, False),
    "problem_type": (None, "single_label_classification", "multi_label_classification", "regression"),
}
MODEL_FILES = ["*.json", "*.txt", "*.safetensors"]


def weight_names(model: Model) -> dict[str, list[str]]:
    """Our name of every weight of `model`, with Hugging Face's name or names."""
    modules = dict(ENCODER)
    for number in range(model.config.num_hidden_layers):
        for name, names in LAYER.items():
            modules[f"layers.{number}.{name}"] = [f"encoder.layer.{number}.{their}" for their in names]
    if not isinstance(model, Encoder):
        modules = {f"encoder.{name}": [f"bert.{their}" for their in names] for name, names in modules.items()}
    modules |= ARCHITECTURES[type(model)][1]
    split = {name: name.rpartition(".") for name, _ in model.named_parameters()}
    return {name: [f"{their}.{kind}" for their in modules[module]] for name, (module, _, kind) in split.items()}


def to_hf(model: Model, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names (weights, gradients) as Hugging Face names and cuts them."""
    return {
        their: part
        for name, names in weight_names(model).items()
        for their, part in zip(names, tensors[name].chunk(len(names)), strict=True)
    }


def hf_outputs(model: Model, hidden: Tensor) -> dict[str, Tensor]:
    """What Hugging Face's model of this kind returns, under its names, made from the encoder's output (B,T,D)."""
    if isinstance(model, Encoder):
        return {"last_hidden_state": hidden} | ({"pooler_output": model.pooler(hidden)} if model.pooler else {})
    if isinstance(model, MaskedLanguageModel):
        return {"logits": model.head(hidden, model.encoder.embeddings.word.weight)}
    scores = model.classify(hidden)
    if isinstance(model, QuestionAnswerer):
        return {"start_logits": scores[..., 0], "end_logits": scores[..., 1]}
    return {"logits": scores}


def save_model(model: Model, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json and model.safetensors into an existing folder.

    Raises UserError for a weight that `dtype` cannot express.
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
    """Write config.json, the architecture and the labels as Hugging Face has them."""
    about = {
        "architectures": [ARCHITECTURES[type(model)][0]],
        "model_type": "bert",
        **model.config.model_dump(),
        "position_embedding_type": "absolute",
        "dtype": str(dtype).removeprefix("torch."),
    }
    if isinstance(model, Classifier):
        about["id2label"] = {str(number): label for number, label in enumerate(model.labels)}
        about["label2id"] = {label: number for number, label in enumerate(model.labels)}
        about["problem_type"] = model.problem_type
    text = json.dumps(about, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def load_model(folder: Path, kernel: str = "sdpa") -> Model:
    """The model of a Hugging Face BERT folder, in fp32 on the CPU: with its head, or the encoder alone.

    Raises UserError, naming the file, when this is no BERT, or not one that the encoder can express.
    """
    about, config, weights = _read_folder(folder)
    kind = _kind(about, weights)
    model: Model
    with torch.device("meta"):
        if kind is Encoder:
            weights = {name.removeprefix("bert."): tensor for name, tensor in weights.items()}
            model = Encoder(config, kernel, pooler="pooler.dense.weight" in weights)
        elif issubclass(kind, Classifier):
            model = kind(config, _labels(about, kind, weights, folder), kernel, about.get("problem_type"))
        else:
            model = MaskedLanguageModel(config, kernel)
    model.load_state_dict(_our_weights(model, weights, folder)[0], assign=True)
    return model


def weights_for(head: type[Classifier], labels: list[str], folder: Path) -> dict[str, Tensor]:
    """What a Hugging Face BERT folder has for a model of this kind, under our names; says what it lacks.

    The head is taken when it is of the same kind for the same labels. Raises UserError, naming the file, when the
    folder holds no such encoder.
    """
    about, config, weights = _read_folder(folder)
    kind = _kind(about, weights)
    if kind is Encoder:
        weights = {f"bert.{name.removeprefix('bert.')}": tensor for name, tensor in weights.items()}
    with torch.device("meta"):
        model = head(config, labels)
    fits = kind is head and _labels(about, kind, weights, folder) == labels
    wanted = ("bert.", "classifier.", "qa_outputs.") if fits else ("bert.",)
    weights = {name: tensor for name, tensor in weights.items() if name.startswith(wanted)}
    given, missing = _our_weights(model, weights, folder, may_lack=("bert.pooler.", "classifier.", "qa_outputs."))
    if missing:
        parts = dict.fromkeys("pooler" if "pooler" in name else "head" for name in missing)
        logger.info(f"{folder} has no {' and no '.join(parts)} for this; new weights take their place")
    return given


def load_tokenizer_of(folder: Path, config: Architecture) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder. Raises UserError when it has ids that the model has no embedding for."""
    tokenizer = load_tokenizer(str(folder))
    size, known = len(tokenizer), config.vocab_size
    if size > known:
        raise UserError(f"{folder}: the tokenizer has {size:,} pieces, but the model embeds {known:,}")
    return tokenizer


def read_architecture(folder: Path) -> Architecture:
    """The encoder that config.json describes. Raises UserError for what bertlite's encoder cannot express."""
    return _read_config(folder)[1]


def local_folder(name: str) -> Path:
    """The folder that `name` means: itself, or the local copy of what the hub has under that name."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such model folder")
    try:
        return Path(snapshot_download(name, allow_patterns=MODEL_FILES))
    except (HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name}: no such folder here, and none came from the hub: {reason}") from None


def _read_folder(folder: Path) -> tuple[dict[str, Any], Architecture, dict[str, Tensor]]:
    """config.json, the encoder that it describes, and all weights, which are in as many layers."""
    about, config = _read_config(folder)
    weights = _read_weights(folder)
    layers = config.num_hidden_layers
    found = {int(layer[1]) for name in weights if (layer := re.search(r"encoder\.layer\.(\d+)\.", name))}
    if len(found) != layers or max(found) != layers - 1:
        raise UserError(f"{folder}: config.json means the layers 0 to {layers - 1}, the weights are of {sorted(found)}")
    for decoder, tied in {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }.items():
        if decoder in weights and tied in weights and not torch.equal(weights[decoder], weights[tied]):
            raise UserError(f"{folder}: {decoder} is not {tied}; bertlite's decoder is tied to the word embedding")
    return about, config, weights


def _read_config(folder: Path) -> tuple[dict[str, Any], Architecture]:
    """config.json, and the encoder that it describes."""
    path = folder / "config.json"
    if folder.is_dir():
        check_model_folder(folder)
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{folder}: not a model folder (it has no readable config.json)") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON") from None
    kind = about.get("model_type") if isinstance(about, dict) else None
    if kind != "bert":
        raise UserError(f"{path}: model_type is {kind!r}; bertlite reads bert alone")
    for key, allowed in HAS.items():
        if about.get(key) not in allowed:
            raise UserError(f"{path}: {key} is {about[key]!r}, which bertlite does not have")
    values = {name: about.get(name, assumed) for name, assumed in ASSUMED.items()}
    if str(values["hidden_act"]) not in ACTIVATIONS:
        raise UserError(f"{path}: hidden_act is {values['hidden_act']!r}; bertlite has {', '.join(ACTIVATIONS)}")
    if values["pad_token_id"] is None:
        values["pad_token_id"] = 0
    try:
        return about, Architecture.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{name} is {first['input']!r}: " for name in first["loc"])
        raise UserError(f"{path}: {place}{first['msg'].removeprefix('Value error, ')}") from None


def _kind(about: dict[str, Any], weights: dict[str, Tensor]) -> type[Model]:
    """Which model the weights are of; config.json tells a sequence's head from a token's, or the pooler does."""
    if any(name.startswith("cls.predictions.") for name in weights):
        return MaskedLanguageModel
    if "qa_outputs.weight" in weights:
        return QuestionAnswerer
    if "classifier.weight" not in weights:
        return Encoder
    of_tokens = about.get("architectures") == [ARCHITECTURES[TokenClassifier][0]]
    return TokenClassifier if of_tokens or "bert.pooler.dense.weight" not in weights else SequenceClassifier


def _labels(about: dict[str, Any], kind: type[Model], weights: dict[str, Tensor], folder: Path) -> list[str]:
    """The names of a head's outputs: id2label's, or Hugging Face's LABEL_0, LABEL_1, …"""
    head = f"{ARCHITECTURES[kind][1]['classifier'][0]}.weight"
    if weights[head].ndim != 2 or not weights[head].numel():
        raise UserError(f"{folder}: {head} has shape {tuple(weights[head].shape)}, which is no head's")
    numbers = [str(number) for number in range(len(weights[head]))]
    names = about.get("id2label") or {number: f"LABEL_{number}" for number in numbers}
    if not isinstance(names, dict) or names.keys() != set(numbers):
        raise UserError(f"{folder / 'config.json'}: id2label should name the head's outputs, 0 to {len(numbers) - 1}")
    return [str(names[number]) for number in numbers]


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the files that its index names, under today's names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        names = ["model.safetensors"]
    elif index.exists():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
        except (OSError, RecursionError, ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{index}: not a valid index of weights") from None
        if any(Path(name).name != name for name in names):
            raise UserError(f"{index}: it names a file outside its folder")
    elif (folder / "pytorch_model.bin").exists():
        raise UserError(
            f"{folder}: its weights are in pytorch_model.bin, a pickle, which can run code and is not read; "
            "load it with transformers and save_pretrained it to get model.safetensors"
        )
    else:
        raise UserError(f"{folder}: not a model folder (it has no model.safetensors)")
    weights: dict[str, Tensor] = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118, the file is no dict
                    # Checkpoints that came from TensorFlow call a layer norm's weight gamma and its bias beta.
                    name_today = key.replace("LayerNorm.gamma", "LayerNorm.weight")
                    weights[name_today.replace("LayerNorm.beta", "LayerNorm.bias")] = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / name}: damaged, or not a safetensors file: {error}") from None
    return weights


def _our_weights(
    model: Model, weights: dict[str, Tensor], folder: Path, may_lack: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """A folder's weights in fp32 under our names, and Hugging Face's names of those that it lacks.

    Raises UserError when one does not fit, the model has none of that name, or one is lacking whose name does not
    begin as `may_lack` says.
    """
    expected = to_hf(model, dict(model.named_parameters()))
    lacking = [name for name in expected if name not in weights]
    problems = {
        "weights are missing": [name for name in lacking if not name.startswith(may_lack)],
        "are unknown": [name for name in weights if name not in expected and not UNUSED.match(name)],
    }
    parts = [f"{len(names)} {what}, such as {names[0]}" for what, names in problems.items() if names]
    if parts:
        raise UserError(
            f"{folder}: the weights are not those of the BERT that config.json describes: {'; '.join(parts)}"
        )
    for name, meant in expected.items():
        if name in weights and weights[name].shape != meant.shape:
            shape = tuple(weights[name].shape)
            raise UserError(f"{folder}: {name} has shape {shape}, but config.json means {tuple(meant.shape)}")
    ours = {
        name: torch.cat([weights[their].float() for their in names])
        for name, names in weight_names(model).items()
        if not set(names) & set(lacking)
    }
    return ours, lacking
