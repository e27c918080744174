"""`bertlite export --format onnx`: a graph for onnxruntime, in fp32 and in int8, checked against PyTorch."""

# Shapes: B batch, T tokens, D hidden size.
import copy
import logging
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from bertlite.config.settings import Source
from bertlite.core.errors import Failure
from bertlite.core.logging import logger
from bertlite.data.sources import read_documents
from bertlite.data.tokenizer import save_tokenizer
from bertlite.export.parity import at_real_tokens
from bertlite.model.heads import HEADS, Model
from bertlite.model.huggingface import save_config

INPUTS = ["input_ids", "attention_mask", "token_type_ids"]
SHAPES = [(1, 2), (1, 9), (3, 16), (2, 128)]  # (B,T) of the batches on which graph and model are compared
TOLERANCE = 1e-5  # relative to the largest reference value, at least 1
AGREEMENT = 0.95  # the least that int8 must share with fp32
TEXTS = 100  # on which int8 and fp32 are compared


class Graph(nn.Module):
    """A model with Hugging Face's inputs, three of (B,T), and Hugging Face's outputs."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.outputs = list(model.hf_outputs(torch.zeros(1, 1, model.config.hidden_size)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        hidden = self.model.encoder(input_ids, position_ids, attention_mask, token_type_ids)
        return tuple(self.model.hf_outputs(hidden).values())


def write_onnx(model: Model, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str | None = None) -> list[str]:
    """Write model.onnx (`dtype` "fp32"), model_int8.onnx ("int8"), or both (None); return the results of the checks.

    In int8, weights are stored and multiplied in 8 bits, with a scale for each output, and activations are rounded to
    8 bits as they are computed. With None, int8 is left out if it agrees too little with fp32. Raises Failure
    when another check fails.
    """
    from onnxruntime import InferenceSession

    graph, fp32_path, int8_path = Graph(model.eval()), folder / "model.onnx", folder / "model_int8.onnx"
    _write_graphs(graph, fp32_path, int8_path)
    save_config(model, folder)
    save_tokenizer(tokenizer, folder)
    fp32 = InferenceSession(str(fp32_path))
    difference = _difference(graph, fp32)
    if not difference <= TOLERANCE:
        raise Failure(f"the graph in onnxruntime differs from PyTorch by {difference:.1g}, more than {TOLERANCE:.0e}")
    results = [
        f"`model.onnx` in onnxruntime against PyTorch, largest difference over {len(SHAPES)} shapes: {difference:.1e}"
    ]
    if dtype == "fp32":
        int8_path.unlink()
        return results
    agreement = _agreement(graph, fp32, InferenceSession(str(int8_path)), tokenizer)
    decides = HEADS[model.head_name].decide is not None
    result = f"{agreement:.1%} " + ("of its decisions are those of fp32" if decides else "cosine similarity with fp32")
    if agreement < AGREEMENT:
        reason = f"int8: only {result}, less than {AGREEMENT:.0%}"
        if dtype == "int8":
            raise Failure(f"{reason}; export fp32")
        logger.warning(f"{reason}; model_int8.onnx is left out")
        int8_path.unlink()
        return [*results, f"{reason}; `model_int8.onnx` is left out"]
    logger.info(f"int8: {result}")
    if dtype == "int8":
        fp32_path.unlink()
    return [*results, f"`model_int8.onnx`: {result}"]


def _write_graphs(graph: Graph, fp32_path: Path, int8_path: Path) -> None:
    """Write the graph in fp32, and with its weights in int8."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # A tensor for each input, as the exporter would merge inputs that are the same tensor.
    example = tuple(torch.ones(2, 8, dtype=torch.long) for _ in INPUTS)
    positions = graph.model.config.max_position_embeddings
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=positions)}
    logging.disable(logging.WARNING)  # torch and onnxruntime warn about their own internals
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                graph,
                example,
                str(fp32_path),
                input_names=INPUTS,
                output_names=graph.outputs,
                dynamic_shapes=dict.fromkeys(INPUTS, axes),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        proto = onnx.load(fp32_path)
        del proto.graph.value_info[:]  # the quantizer transposes weights, and fails on their recorded shapes
        quantize_dynamic(proto, str(int8_path), per_channel=True, weight_type=QuantType.QInt8)
    finally:
        logging.disable(logging.NOTSET)


def sample_texts(count: int) -> list[str]:
    """Return the first texts of the sample that ships with bertlite."""
    return list(islice(read_documents(Source(path="sample"), "line", "sample"), count))


def _difference(graph: Graph, session: Any) -> float:
    """Return the largest relative difference, at real tokens, between onnxruntime and PyTorch in fp64."""
    generator, reference = torch.Generator().manual_seed(0), copy.deepcopy(graph).double()
    config = graph.model.config
    largest = 0.0
    for B, longest in SHAPES:
        T = min(longest, config.max_position_embeddings)
        input_ids = torch.randint(config.vocab_size, (B, T), generator=generator)
        real = torch.arange(T)[None] < torch.linspace(T, 1, B).long()[:, None]  # the first sequence has no padding
        segments = torch.randint(config.type_vocab_size, (B, T), generator=generator)
        with torch.inference_mode():
            expected = reference(input_ids, real.long(), segments)
        arrays = _run(session, input_ids, real.long(), segments)
        for name, output, array in zip(graph.outputs, expected, arrays, strict=True):
            relative = (output - torch.from_numpy(array)).abs() / max(1.0, output.abs().max().item())
            largest = max(largest, at_real_tokens(graph.model, name, relative, real).max().item())
    return largest


def _agreement(graph: Graph, fp32: Any, int8: Any, tokenizer: PreTrainedTokenizerBase) -> float:
    """Compare int8 with fp32 on the sample that ships with bertlite, with every 7th token masked for a masked LM.

    Returns the share of equal decisions or, for outputs that decide nothing, their cosine similarity.
    """
    head = HEADS[graph.model.head_name]
    length = min(64, graph.model.config.max_position_embeddings)
    answers: dict[str, list[NDArray[Any]]] = {"fp32": [], "int8": []}
    for ids in tokenizer(sample_texts(TEXTS), truncation=True, max_length=length)["input_ids"]:
        input_ids = torch.tensor([ids])
        if head.pipeline == "fill-mask":
            input_ids[:, 3:-1:7] = tokenizer.mask_token_id
        inputs = (input_ids, torch.ones_like(input_ids), torch.zeros_like(input_ids))
        for name, session in {"fp32": fp32, "int8": int8}.items():
            outputs = _run(session, *inputs)
            answer = outputs[0].astype(np.float64) if head.decide is None else head.decide(outputs)
            answers[name].append(answer.ravel())
    x, y = (np.concatenate(arrays) for arrays in answers.values())
    if head.decide is None:
        return float(x @ y / np.sqrt((x @ x) * (y @ y)))
    return float((x == y).mean())


def _run(session: Any, *inputs: Tensor) -> list[NDArray[Any]]:
    feed = {name: tensor.numpy() for name, tensor in zip(INPUTS, inputs, strict=True)}
    arrays: list[NDArray[Any]] = session.run(None, feed)
    return arrays
