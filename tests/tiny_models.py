"""Tiny models of random weights, of ours and of transformers, and their inputs."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# No size is that of another dimension, and the layer norms' epsilon is large enough to be seen.
SHAPE = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
    "layer_norm_eps": 0.01,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def make_sequences(sequences: list[list[int]], length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random input ids, positions and document ids (B,T) of packed sequences, from the lengths of their documents."""
    document_ids, position_ids = torch.zeros(2, len(sequences), length).long()
    for index, documents in enumerate(sequences):
        ends = itertools.accumulate(documents)
        for number, (size, end) in enumerate(zip(documents, ends, strict=True), 1):
            document_ids[index, end - size : end] = number
            position_ids[index, end - size : end] = torch.arange(size)
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, SHAPE["vocab_size"], document_ids.shape, generator=generator)
    return input_ids * (document_ids > 0), position_ids, document_ids


def make_segments(shape: torch.Size) -> Tensor:
    return torch.randint(2, shape, generator=torch.Generator().manual_seed(1))


# Relative to the largest reference value: about a hundred roundings of each precision, few of which add up.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 5e-2}


def assert_close_to_scale(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Compare relative to the largest reference value, since rounding errors grow with the values that are summed.

    By default the tolerance follows from the precision of `expected`. NaN, a wrong shape or a wrong dtype fails.
    """
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    difference, scale = (actual - expected).abs().max().item(), expected.abs().max().item()
    allowed = scale * (TOLERANCES[expected.dtype] if tolerance is None else tolerance)
    assert difference <= allowed, f"{difference:.3g} is more than {allowed:.3g}"


FOLDER_SHAPE = {
    "vocab_size": 600,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 50,
    "type_vocab_size": 2,
    "layer_norm_eps": 0.01,
}


def randomize(model: nn.Module, std: float = 0.1) -> Any:
    """Normal weights around 0, and around 1 where they scale."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(name.endswith(("LayerNorm.weight", "norm.weight")), std, generator=generator)
    return model


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def assert_same_weights(model: nn.Module, reference: nn.Module) -> None:
    weights, expected = dict(model.named_parameters()), dict(reference.named_parameters())
    assert list(weights) == list(expected)
    for name, weight in weights.items():
        assert weight.dtype == expected[name].dtype == torch.float32
        assert torch.equal(weight, expected[name]), name


HEADS = {
    "BertModel": {},
    "BertForMaskedLM": {},
    "BertForSequenceClassification": {"num_labels": 3, "problem_type": "single_label_classification"},
    "BertForTokenClassification": {"num_labels": 5},
    "BertForQuestionAnswering": {},
    "BertForMultipleChoice": {},
    "multi-label": {"num_labels": 4, "problem_type": "multi_label_classification"},
    "regression": {"num_labels": 1, "problem_type": "regression"},
}
