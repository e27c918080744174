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
from transformers import PreTrainedTokenizerBase

from bertlite.config import Architecture
from bertlite.errors import UserError
from bertlite.files import check_model_folder
from bertlite.model import (
    ACTIVATIONS,
    Classifier,
    Encoder,
    MaskedLanguageModel,
    QuestionAnswerer,
    SequenceClassifier,
    TokenClassifier,
)
from bertlite.runtime import say
from bertlite.tokenizer import load_tokenizer

Model = MaskedLanguageModel | Encoder | Classifier

# Our names on the left, Hugging Face's on the right. Several on the right lie one under the other in ours.
EMBEDDINGS = {
    "embeddings.word.weight": ["embeddings.word_embeddings.weight"],
    "embeddings.position.weight": ["embeddings.position_embeddings.weight"],
    "embeddings.segment.weight": ["embeddings.token_type_embeddings.weight"],
    "embeddings.norm.weight": ["embeddings.LayerNorm.weight"],
    "embeddings.norm.bias": ["embeddings.LayerNorm.bias"],
}
LAYER = {
    "attention.qkv.weight": [
        "attention.self.query.weight",
        "attention.self.key.weight",
        "attention.self.value.weight",
    ],
    "attention.qkv.bias": ["attention.self.query.bias", "attention.self.key.bias", "attention.self.value.bias"],
    "attention.out.weight": ["attention.output.dense.weight"],
    "attention.out.bias": ["attention.output.dense.bias"],
    "attention_norm.weight": ["attention.output.LayerNorm.weight"],
    "attention_norm.bias": ["attention.output.LayerNorm.bias"],
    "up.weight": ["intermediate.dense.weight"],
    "up.bias": ["intermediate.dense.bias"],
    "down.weight": ["output.dense.weight"],
    "down.bias": ["output.dense.bias"],
    "norm.weight": ["output.LayerNorm.weight"],
    "norm.bias": ["output.LayerNorm.bias"],
}
POOLER = {
    "pooler.dense.weight": ["pooler.dense.weight"],
    "pooler.dense.bias": ["pooler.dense.bias"],
}
MLM_HEAD = {
    "head.dense.weight": ["cls.predictions.transform.dense.weight"],
    "head.dense.bias": ["cls.predictions.transform.dense.bias"],
    "head.norm.weight": ["cls.predictions.transform.LayerNorm.weight"],
    "head.norm.bias": ["cls.predictions.transform.LayerNorm.bias"],
    "head.bias": ["cls.predictions.bias"],
}
CLASSIFIER = {"classifier.weight": ["classifier.weight"], "classifier.bias": ["classifier.bias"]}
QA_OUTPUTS = {"classifier.weight": ["qa_outputs.weight"], "classifier.bias": ["qa_outputs.bias"]}
# Hugging Face's name of each of our models, and what lies on top of the encoder.
ARCHITECTURES: dict[type[nn.Module], tuple[str, dict[str, list[str]]]] = {
    Encoder: ("BertModel", {}),
    MaskedLanguageModel: ("BertForMaskedLM", MLM_HEAD),
    SequenceClassifier: ("BertForSequenceClassification", CLASSIFIER),
    TokenClassifier: ("BertForTokenClassification", CLASSIFIER),
    QuestionAnswerer: ("BertForQuestionAnswering", QA_OUTPUTS),
}
# What other BERT folders hold and a masked language model has no use for. A decoder is another name of the word
# embedding, which is checked; position_ids count from 0; next-sentence prediction is not a part of bertlite.
UNUSED = re.compile(r"cls\.seq_relationship\.|.*position_ids$|cls\.predictions\.decoder\.|bert\.pooler\.")

# What Hugging Face's BertConfig assumes of a config.json that leaves it out.
ASSUMED = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
MODEL_FILES = ["*.json", "*.txt", "*.safetensors"]


def weight_names(model: nn.Module) -> dict[str, list[str]]:
    """Our name of every weight of `model`, with Hugging Face's name or names."""
    encoder = model if isinstance(model, Encoder) else model.encoder
    ours, theirs = ("", "") if encoder is model else ("encoder.", "bert.")
    table = dict(EMBEDDINGS)
    for number in range(encoder.config.num_hidden_layers):
        for name, names in LAYER.items():
            table[f"layers.{number}.{name}"] = [f"encoder.layer.{number}.{their}" for their in names]
    if encoder.pooler is not None:
        table |= POOLER
    table = {ours + name: [theirs + their for their in names] for name, names in table.items()}
    return table | ARCHITECTURES[type(model)][1]


def to_hf(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names (weights, gradients) as Hugging Face names and cuts them."""
    return {
        their: part
        for name, names in weight_names(model).items()
        for their, part in zip(names, tensors[name].chunk(len(names)), strict=True)
    }


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
    with torch.device("meta"):
        model: Model
        if any(name.startswith("cls.predictions.") for name in weights):
            model = MaskedLanguageModel(config, kernel)
        elif head := next((name for name in ("classifier.weight", "qa_outputs.weight") if name in weights), None):
            labels = _labels(about, len(weights[head]), folder)
            model = _classifier(about, weights)(config, labels, kernel, about.get("problem_type"))
        else:
            weights = {name.removeprefix("bert."): tensor for name, tensor in weights.items()}
            model = Encoder(config, kernel, pooler="pooler.dense.weight" in weights)
    _check_decoder(weights, folder)
    expected = to_hf(model, dict(model.named_parameters()))
    _check_names_and_shapes(weights, {name: tensor.shape for name, tensor in expected.items()}, folder)
    state = {
        name: torch.cat([weights[their].float() for their in names]) for name, names in weight_names(model).items()
    }
    model.load_state_dict(state, assign=True)
    return model.requires_grad_()


def begin_from(model: Classifier, folder: Path) -> None:
    """Give a newly initialised model what a Hugging Face BERT folder has for it, and say what it lacks.

    The head is taken when it is of the same kind for the same labels. Raises UserError, naming the file, when the
    folder holds no such encoder.
    """
    about, _, weights = _read_folder(folder)
    if not any(name.startswith("bert.") for name in weights):
        weights = {f"bert.{name}": tensor for name, tensor in weights.items()}
    head = ARCHITECTURES[type(model)][1]
    theirs = weights.get(head["classifier.weight"][0])
    fits = theirs is not None and _labels(about, len(theirs), folder) == model.labels
    if not (fits and _classifier(about, weights) is type(model)):
        weights = {name: tensor for name, tensor in weights.items() if [name] not in head.values()}
    table = weight_names(model)
    missing = [name for name, names in table.items() if not all(their in weights for their in names)]
    needed = [name for name in missing if not name.startswith(("encoder.pooler.", "classifier."))]
    if needed:
        raise UserError(f"{folder}: {len(needed)} weights are missing, such as {table[needed[0]][0]}")
    if missing:
        parts = dict.fromkeys("pooler" if "pooler" in name else "head" for name in missing)
        say(f"{folder} has no {' and no '.join(parts)} for this; new weights take their place")
    present = {name: names for name, names in table.items() if name not in missing}
    expected = to_hf(model, dict(model.named_parameters()))
    for their in (their for names in present.values() for their in names):
        _check_shape(weights, their, expected[their].shape, folder)
    state = {name: torch.cat([weights[their].float() for their in names]) for name, names in present.items()}
    model.load_state_dict(state, strict=False)


def load_tokenizer_of(folder: Path, model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder. Raises UserError when it has ids that the model has no embedding for."""
    tokenizer = load_tokenizer(str(folder))
    size, known = max(tokenizer.get_vocab().values()) + 1, model.config.vocab_size
    if size > known:
        raise UserError(f"{folder}: the tokenizer has {size:,} pieces, but the model embeds {known:,}")
    return tokenizer


def load_masked_lm(folder: Path, kernel: str = "sdpa") -> tuple[MaskedLanguageModel, PreTrainedTokenizerBase]:
    """A masked language model and its tokenizer. Raises UserError when the folder holds another kind of model."""
    model = load_model(folder, kernel)
    if not isinstance(model, MaskedLanguageModel):
        raise UserError(f"{folder}: the model has no masked language modelling head")
    return model, load_tokenizer_of(folder, model)


def load_encoder(folder: Path, kernel: str = "sdpa") -> tuple[Encoder, PreTrainedTokenizerBase]:
    """The encoder of any model, with the pooler if it has one, and its tokenizer."""
    model = load_model(folder, kernel)
    return model if isinstance(model, Encoder) else model.encoder, load_tokenizer_of(folder, model)


def read_architecture(folder: Path) -> Architecture:
    """The encoder that config.json describes. Raises UserError for what bertlite's encoder cannot express."""
    return _architecture(_read_config(folder), folder / "config.json")


def _architecture(about: Any, path: Path) -> Architecture:
    if not isinstance(about, dict) or about.get("model_type") != "bert":
        kind = about.get("model_type") if isinstance(about, dict) else None
        raise UserError(f"{path}: model_type is {kind!r}; bertlite reads bert alone")
    for key, allowed in {"position_embedding_type": (None, "absolute"), "is_decoder": (None, False)}.items():
        if about.get(key) not in allowed:
            raise UserError(f"{path}: {key} is {about[key]!r}, which bertlite's encoder does not have")
    values = {name: about.get(name, assumed) for name, assumed in ASSUMED.items()}
    if str(values["hidden_act"]) not in ACTIVATIONS:
        raise UserError(f"{path}: hidden_act is {values['hidden_act']!r}; bertlite has {', '.join(ACTIVATIONS)}")
    if values["pad_token_id"] is None:
        values["pad_token_id"] = 0
    try:
        return Architecture.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {name} {first['msg'].removeprefix('Value error, ')}".replace(":  ", ": ")) from None


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
        raise UserError(f"{name}: no such folder here, and the hub gave no such model: {reason}") from None


def _read_folder(folder: Path) -> tuple[dict[str, Any], Architecture, dict[str, Tensor]]:
    """config.json, the encoder that it describes, and all weights, which are as many and in as many layers."""
    about = _read_config(folder)
    config, weights = _architecture(about, folder / "config.json"), _read_weights(folder)
    _check_size(config, weights, folder)
    _check_layers(weights, config, folder)
    return about, config, weights


def _read_config(folder: Path) -> Any:
    path = folder / "config.json"
    if folder.is_dir():
        check_model_folder(folder)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{folder}: not a model folder (it has no readable config.json)") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON") from None


def _labels(about: dict[str, Any], count: int, folder: Path) -> list[str]:
    """The names of a head's `count` outputs: id2label's, or Hugging Face's LABEL_0, LABEL_1, …"""
    names = about.get("id2label") or {str(number): f"LABEL_{number}" for number in range(count)}
    if not isinstance(names, dict) or names.keys() != {str(number) for number in range(count)}:
        raise UserError(f"{folder / 'config.json'}: id2label should name the head's outputs, 0 to {count - 1}")
    return [str(names[str(number)]) for number in range(count)]


def _classifier(about: dict[str, Any], weights: dict[str, Tensor]) -> type[Classifier]:
    """Which head the weights hold; config.json tells a sequence's from a token's, or the pooler does."""
    if "qa_outputs.weight" in weights:
        return QuestionAnswerer
    if about.get("architectures") == [ARCHITECTURES[TokenClassifier][0]]:
        return TokenClassifier
    return SequenceClassifier if "bert.pooler.dense.weight" in weights else TokenClassifier


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
                    modern = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", key)
                    weights[re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", modern)] = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / name}: damaged, or not a safetensors file: {error}") from None
    return weights


def _check_size(config: Architecture, weights: dict[str, Tensor], folder: Path) -> None:
    """Raise UserError when config.json means far more numbers than there are, before any of them takes memory."""
    D, L = config.hidden_size, config.num_hidden_layers
    entries = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    meant = entries * D + L * D * (4 * D + 2 * config.intermediate_size)
    held = sum(tensor.numel() for tensor in weights.values())
    if meant > 10 * held:  # less of a difference is named weight by weight
        raise UserError(f"{folder}: config.json means {meant:,} numbers, but the weights are {held:,}")


def _check_decoder(weights: dict[str, Tensor], folder: Path) -> None:
    for decoder, tied in {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }.items():
        if decoder in weights and tied in weights and not torch.equal(weights[decoder], weights[tied]):
            raise UserError(f"{folder}: {decoder} is not {tied}; bertlite's decoder is tied to the word embedding")


def _check_names_and_shapes(weights: dict[str, Tensor], expected: dict[str, Any], folder: Path) -> None:
    missing = [name for name in expected if name not in weights]
    unknown = [name for name in weights if name not in expected and not UNUSED.match(name)]
    if missing or unknown:
        parts = [f"{len(names)} {what}, such as {names[0]}" for what, names in
                 (("weights are missing", missing), ("are unknown", unknown)) if names]  # fmt: skip
        raise UserError(f"{folder}: the weights are not those of the BERT that config.json describes: "
                        f"{'; '.join(parts)}")  # fmt: skip
    for name, shape in expected.items():
        _check_shape(weights, name, shape, folder)


def _check_shape(weights: dict[str, Tensor], name: str, shape: torch.Size, folder: Path) -> None:
    if weights[name].shape != shape:
        raise UserError(
            f"{folder}: {name} has shape {tuple(weights[name].shape)}, but config.json means {tuple(shape)}"
        )


def _check_layers(weights: dict[str, Tensor], config: Architecture, folder: Path) -> None:
    layers = {int(found[1]) for name in weights if (found := re.search(r"encoder\.layer\.(\d+)\.", name))}
    if layers != set(range(config.num_hidden_layers)):
        raise UserError(
            f"{folder}: config.json speaks of {config.num_hidden_layers} layers, the weights of {len(layers)}"
        )
