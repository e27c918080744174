"""`bertlite export --format onnx`: a graph for onnxruntime, in fp32 and in int8, checked against PyTorch."""

# Shapes: B rows, T positions, D hidden size, V vocabulary, L labels.
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
from bertlite.export.parity import problem_type
from bertlite.model.bert import Encoder
from bertlite.model.heads import MaskedLanguageModel, SequenceClassifier
from bertlite.model.huggingface import Model, hf_outputs, save_config

INPUTS = ["input_ids", "attention_mask", "token_type_ids"]
SHAPES = [(1, 2), (1, 9), (3, 16), (2, 128)]  # rows and tokens of what is compared
TOLERANCE = 1e-5  # of the largest reference value, at least 1
AGREEMENT = 0.95
TEXTS = 100  # on which int8 is compared


class Graph(nn.Module):
    """A model as programs call it that know Hugging Face's: three inputs (B,T), and outputs at every token."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.outputs = list(hf_outputs(model, torch.zeros(1, 1, model.config.hidden_size)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        hidden = self.model.encoder(input_ids, position_ids, attention_mask, token_type_ids)
        return tuple(hf_outputs(self.model, hidden).values())


def write_onnx(model: Model, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str | None) -> list[str]:
    """Write model.onnx (`dtype` "fp32"), model_int8.onnx ("int8"), or both (None), and say what the checks found.

    In int8, weights are kept and multiplied in 8 bits, each row by its own scale, and activations are rounded to 8
    bits as they come. Where too few of the top predictions are those of fp32, int8 is refused when it was asked for
    by name, and otherwise left out. Raises Failure when a check does not hold.
    """
    from onnxruntime import InferenceSession

    graph, path, small = Graph(model.eval()), folder / "model.onnx", folder / "model_int8.onnx"
    _write_graphs(graph, path, small)
    save_config(model, folder)
    tokenizer.save_pretrained(folder)
    exact = InferenceSession(str(path))
    difference = _difference(graph, exact)
    if not difference <= TOLERANCE:
        raise Failure(f"the graph in onnxruntime differs from PyTorch by {difference:.1g}, more than {TOLERANCE:.0e}")
    found = [f"`model.onnx` in onnxruntime against PyTorch, worst of {len(SHAPES)} shapes: {difference:.1e}"]
    if dtype == "fp32":
        small.unlink()
        return found
    agreement = _agreement(graph, exact, InferenceSession(str(small)), tokenizer)
    measure = "similar to" if _numeric(model) else "of the top predictions those of"
    if agreement < AGREEMENT:
        reason = f"int8 is only {agreement:.1%} {measure} fp32, less than {AGREEMENT:.0%}"
        if dtype == "int8":
            raise Failure(f"{reason}; export fp32")
        logger.info(f"{reason}: left out")
        small.unlink()
        return [*found, f"{reason}: it was left out"]
    logger.info(f"int8: {agreement:.1%} {measure} fp32")
    if dtype == "int8":
        path.unlink()
    return [*found, f"`model_int8.onnx`: {agreement:.1%} {measure} fp32"]


def _write_graphs(graph: Graph, path: Path, small: Path) -> None:
    """The graph in fp32, and its weights in int8."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    example = tuple(torch.ones(2, 8, dtype=torch.long) for _ in INPUTS)  # one for all would be taken for one input
    positions = graph.model.config.max_position_embeddings
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=positions)}
    logging.disable(logging.WARNING)  # of torch and onnxruntime about themselves
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                graph,
                example,
                str(path),
                input_names=INPUTS,
                output_names=graph.outputs,
                dynamic_shapes=dict.fromkeys(INPUTS, axes),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        proto = onnx.load(path)
        del proto.graph.value_info[:]  # shapes of weights that the quantiser turns round and then trips over
        quantize_dynamic(proto, str(small), per_channel=True, weight_type=QuantType.QInt8)
    finally:
        logging.disable(logging.NOTSET)


def sample_texts(count: int) -> list[str]:
    """The first texts of what ships with bertlite."""
    return list(islice(read_documents(Source(path="sample"), "line", "sample"), count))


def _difference(graph: Graph, session: Any) -> float:
    """The largest relative difference between onnxruntime and PyTorch, which computes in fp64, at real tokens."""
    generator, reference = torch.Generator().manual_seed(0), copy.deepcopy(graph).double()
    config = graph.model.config
    worst = 0.0
    for B, T in SHAPES:
        T = min(T, config.max_position_embeddings)
        input_ids = torch.randint(config.vocab_size, (B, T), generator=generator)
        mask = torch.arange(T)[None] < torch.linspace(T, 1, B).long()[:, None]  # the first row is full
        segments = torch.randint(config.type_vocab_size, (B, T), generator=generator)
        with torch.inference_mode():
            expected = reference(input_ids, mask.long(), segments)
        found = _run(session, input_ids, mask.long(), segments)
        for name, output, array in zip(graph.outputs, expected, found, strict=True):
            apart = (output - torch.from_numpy(array)).abs() / max(1.0, output.abs().max().item())
            of_rows = name == "pooler_output" or isinstance(graph.model, SequenceClassifier)
            worst = max(worst, (apart if of_rows else apart[mask]).max().item())
    return worst


def _agreement(graph: Graph, exact: Any, small: Any, tokenizer: PreTrainedTokenizerBase) -> float:
    """How alike int8 and fp32 answer on the text that ships with bertlite: the share of top predictions that are the
    same or, where there is none, the cosine of all numbers. For a masked language model, each 7th token is masked."""
    length = min(64, graph.model.config.max_position_embeddings)
    answers: list[list[NDArray[Any]]] = [[], []]
    for ids in tokenizer(sample_texts(TEXTS), truncation=True, max_length=length)["input_ids"]:
        input_ids = torch.tensor([ids])
        if isinstance(graph.model, MaskedLanguageModel):
            input_ids[:, 3:-1:7] = tokenizer.mask_token_id
        inputs = (input_ids, torch.ones_like(input_ids), torch.zeros_like(input_ids))
        for side, session in zip(answers, (exact, small), strict=True):
            side.append(_answers(graph.model, _run(session, *inputs)).ravel())
    one, other = (np.concatenate(side) for side in answers)
    if _numeric(graph.model):
        return float(one @ other / np.sqrt((one @ one) * (other @ other)))
    return float((one == other).mean())


def _answers(model: Model, outputs: list[NDArray[Any]]) -> NDArray[Any]:
    if _numeric(model):
        return outputs[0].astype(np.float64)
    if isinstance(model, SequenceClassifier) and problem_type(model) == "multi_label_classification":
        return outputs[0] > 0
    return np.stack([output.argmax(-1) for output in outputs])


def _numeric(model: Model) -> bool:
    """Whether a model gives numbers and chooses nothing."""
    return isinstance(model, Encoder) or (isinstance(model, SequenceClassifier) and problem_type(model) == "regression")


def _run(session: Any, *inputs: Tensor) -> list[NDArray[Any]]:
    arrays: list[NDArray[Any]] = session.run(
        None, {name: one.numpy() for name, one in zip(INPUTS, inputs, strict=True)}
    )
    return arrays
