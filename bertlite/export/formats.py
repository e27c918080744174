"""`bertlite export`: a model folder for the world, checked before it gets its name."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from bertlite.config.loading import choose
from bertlite.core.errors import Failure, UserError
from bertlite.core.files import atomic_folder
from bertlite.core.packages import require
from bertlite.export.model_card import model_card
from bertlite.export.onnx import sample_texts, write_onnx
from bertlite.export.parity import TOLERANCES, check_parity, quieten_transformers
from bertlite.inference.embed import POOLINGS, Embedder
from bertlite.model.heads import Classifier
from bertlite.model.huggingface import Model, load_model, load_tokenizer_of, save_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Options:
    """What may be chosen of an export: numbers (None: the format's own), pooling, and the licence in its card."""

    dtype: str | None = None
    pooling: str | None = None
    licence: str = "unknown"


def hugging_face(model: Model, tokenizer: PreTrainedTokenizerBase, folder: Path, options: Options) -> list[str]:
    """A Hugging Face folder: config.json, model.safetensors and the tokenizer."""
    save_model(model, folder, DTYPES[options.dtype or "fp32"])
    tokenizer.save_pretrained(folder)
    return [f"The weights are stored in {options.dtype or 'fp32'}."]


def sentence_transformers(
    model: Model, tokenizer: PreTrainedTokenizerBase, folder: Path, options: Options
) -> list[str]:
    """A folder that SentenceTransformer(path) loads, whose vectors are those of `bertlite embed`."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    quieten_transformers()
    if isinstance(model, Classifier):
        raise UserError(
            f"--format sentence-transformers cannot express a {type(model).__name__}: it knows no labels; "
            "export the pretrained model"
        )
    encoder, pooling = model.encoder, options.pooling or "mean"
    loading = {} if encoder.pooler else {"add_pooling_layer": False}
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        save_model(encoder, Path(aside))
        tokenizer.save_pretrained(aside)
        transformer = Transformer(aside, model_kwargs=loading)
        modules = [transformer, Pooling(encoder.config.hidden_size, pooling_mode=pooling)]
        SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)
    about = folder / "sentence_bert_config.json"
    # Older versions of the library know model_kwargs by this name, and newer ones read it.
    changes = {"model_args": loading} if loading else {}
    about.write_text(json.dumps(json.loads(about.read_text()) | changes, indent=2) + "\n")
    texts = ["a", *sample_texts(15)]
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts, show_progress_bar=False)
    apart = np.abs(Embedder(encoder.eval(), tokenizer, pooling)(texts) - theirs)
    difference = apart.max() / max(1, np.abs(theirs).max())
    if not difference <= TOLERANCES["fp32"]["outputs"]:
        raise Failure(f"the vectors of sentence-transformers differ from those of bertlite by {difference:.1g}")
    return [f"`SentenceTransformer` against `bertlite embed`, {pooling} pooling, {len(texts)} texts: {difference:.1e}"]


def onnx(model: Model, tokenizer: PreTrainedTokenizerBase, folder: Path, options: Options) -> list[str]:
    """Graphs for onnxruntime in fp32 and int8."""
    return write_onnx(model, tokenizer, folder, options.dtype)


class Format(NamedTuple):
    """How a format is written, what it can express, and what it needs.

    `write` takes a model, its tokenizer, an empty folder and options, raises Failure when its own check does not
    hold, and returns what it found, for the model card.
    """

    write: Callable[[Model, PreTrainedTokenizerBase, Path, Options], list[str]]
    dtypes: tuple[str, ...]
    poolings: tuple[str, ...]
    packages: tuple[str, ...]


FORMATS: dict[str, Format] = {
    "hf": Format(hugging_face, tuple(DTYPES), (), ()),
    "onnx": Format(onnx, ("fp32", "int8"), (), ("onnx", "onnxscript", "onnxruntime")),
    "sentence-transformers": Format(sentence_transformers, ("fp32",), tuple(POOLINGS), ("sentence_transformers",)),
}


def export(source: Path, out: Path, format: str, options: Options = Options()) -> None:
    """Write the model in folder `source` to `out`, which must not exist or be empty, with a model card.

    Raises UserError for an unknown format, for what it cannot express, or for a folder in use, and Failure when a
    check does not hold; nothing is written then.
    """
    target: Format = choose(FORMATS, format, "--format")
    for setting, known in {"dtype": target.dtypes, "pooling": target.poolings}.items():
        value = getattr(options, setting)
        if value is not None and value not in known:
            raise UserError(f"--{setting} is {value!r}; --format {format} has {', '.join(known) or f'no {setting}'}")
    require(f"--format {format}", format, *target.packages)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; name a new folder, or empty this one")
    model = load_model(source)
    tokenizer = load_tokenizer_of(source, model.config)
    with atomic_folder(out) as aside:
        found = target.write(model, tokenizer, aside, options)
        checks = check_parity(aside if format == "hf" else source)
        for check in checks:
            if not check.ok:
                raise Failure(f"the model differs from transformers: {check.inputs}: {check.quantity}; see verify")
        graph = "model.onnx" if (aside / "model.onnx").exists() else "model_int8.onnx"
        card = model_card(source, out.name, model, format, options.licence, checks, found, graph)
        (aside / "README.md").write_text(card, encoding="utf-8")
