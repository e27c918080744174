"""`bertlite export`: a model in the format of another program, checked before the folder gets its name."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from bertlite.config.loading import choose
from bertlite.core.errors import Failure, UserError
from bertlite.core.files import atomic_folder
from bertlite.core.logging import logger
from bertlite.core.packages import require
from bertlite.data.tokenizer import save_tokenizer
from bertlite.export.model_card import model_card
from bertlite.export.onnx import sample_texts, write_onnx
from bertlite.export.parity import TOLERANCES, check_parity, silence_transformers
from bertlite.inference.embed import POOLINGS, Embedder
from bertlite.model.heads import Classifier, Model, MultipleChoice
from bertlite.model.huggingface import load_model, load_tokenizer_of, save_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def hugging_face(model: Model, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str = "fp32") -> list[str]:
    """Write a Hugging Face folder: config.json, model.safetensors and the tokenizer."""
    save_model(model, folder, DTYPES[dtype])
    save_tokenizer(tokenizer, folder)
    return [f"The weights are stored in {dtype}."]


def sentence_transformers(
    model: Model, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str = "fp32", pooling: str = "mean"
) -> list[str]:
    """Write a folder that SentenceTransformer(path) loads and that gives the vectors of `bertlite embed`."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    silence_transformers()
    if isinstance(model, Classifier):
        raise UserError(
            f"--format sentence-transformers has no labels, so it cannot express a {type(model).__name__}; "
            "export the pretrained model"
        )
    encoder = model.encoder
    model_kwargs = {} if encoder.pooler else {"add_pooling_layer": False}
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        save_model(encoder, Path(temporary), DTYPES[dtype])
        save_tokenizer(tokenizer, Path(temporary))
        transformer = Transformer(temporary, model_kwargs=model_kwargs)
        modules = [transformer, Pooling(encoder.config.hidden_size, pooling_mode=pooling)]
        SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)
    save_tokenizer(tokenizer, folder)  # the library writes what only its version of transformers can load
    path = folder / "sentence_bert_config.json"
    config = json.loads(path.read_text())
    if model_kwargs:  # older versions of the library call it model_args, which newer ones read, too
        config["model_args"] = model_kwargs
    path.write_text(json.dumps(config, indent=2) + "\n")
    texts = ["a", *sample_texts(15)]
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts, show_progress_bar=False)
    ours = Embedder(encoder.eval(), tokenizer, pooling)(texts)
    difference = np.abs(ours - theirs).max() / max(1, np.abs(theirs).max())
    if not difference <= TOLERANCES["fp32"]["outputs"]:
        raise Failure(f"the vectors of sentence-transformers differ from those of bertlite by {difference:.1g}")
    return [f"`SentenceTransformer` against `bertlite embed`, {pooling} pooling, {len(texts)} texts: {difference:.1e}"]


class Format(NamedTuple):
    """A format: the function that writes it, the values of `--dtype` and `--pooling` it has, the packages it needs.

    `write(model, tokenizer, folder, **options)` writes into an empty folder and returns the results of its checks, as
    lines of the model card. It raises Failure when a check fails.
    """

    write: Callable[..., list[str]]
    options: dict[str, tuple[str, ...]]
    packages: tuple[str, ...] = ()


FORMATS = {
    "hf": Format(hugging_face, {"dtype": tuple(DTYPES)}),
    "onnx": Format(write_onnx, {"dtype": ("fp32", "int8")}, packages=("onnx", "onnxscript", "onnxruntime")),
    "sentence-transformers": Format(
        sentence_transformers, {"dtype": ("fp32",), "pooling": tuple(POOLINGS)}, packages=("sentence_transformers",)
    ),
}


def export(
    source: Path,
    out: Path,
    format: str,
    dtype: str | None = None,
    pooling: str | None = None,
    licence: str = "unknown",
    run: Path | None = None,
) -> None:
    """Write the model in folder `source` to `out`, a new or empty folder, with a model card that describes its `run`.

    A dtype or pooling of None is the format's default. Raises UserError for an unknown format, an option that the
    format lacks, or a folder that is not empty, and Failure when a check fails; in both cases nothing is written.
    """
    target: Format = choose(FORMATS, format, "--format")
    options = {name: value for name, value in {"dtype": dtype, "pooling": pooling}.items() if value is not None}
    for name, value in options.items():
        allowed = target.options.get(name, ())
        if value not in allowed:
            raise UserError(f"--{name} is {value!r}; --format {format} has {', '.join(allowed) or f'no {name}'}")
    require(f"--format {format}", f"bertlite[{format}]", *target.packages)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; name a new folder, or empty this one")
    logger.info(f"exporting {source} as {format}")
    model = load_model(source)
    if format == "onnx" and isinstance(model, MultipleChoice):
        raise UserError("--format onnx has no inputs for several choices of one example; export with --format hf")
    tokenizer = load_tokenizer_of(source, model.config)
    tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    with atomic_folder(out) as temporary:
        results = target.write(model, tokenizer, temporary, **options)
        checks = check_parity(temporary if format == "hf" else source)
        for check in checks:
            if not check.ok:
                raise Failure(
                    f"the model differs from transformers in {check.quantity} ({check.inputs}); see bertlite verify"
                )
        graph = "model_int8.onnx" if dtype == "int8" else "model.onnx"
        card = model_card(source, run, out.name, model, format, licence, checks, results, graph)
        (temporary / "README.md").write_text(card, encoding="utf-8")
