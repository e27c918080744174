"""`verify` for every head: outputs, loss and gradients against transformers' own model and loss."""

import shutil

import pytest
import torch
from tiny_models import HEADS as CLASSES
from tiny_models import change_config

from bertlite.export import parity
from bertlite.export.parity import check_parity, compare, load_reference, make_inputs
from bertlite.model.heads import HEADS
from bertlite.model.huggingface import load_model

FINE_TUNED = [name for name in CLASSES if name not in ("BertModel", "BertForMaskedLM")]


def test_every_record_of_a_head_is_that_of_a_tested_model(every_head):
    assert {load_model(folder).head_name for folder in every_head.values()} == set(HEADS)


@pytest.mark.parametrize("precision", parity.TOLERANCES)
@pytest.mark.parametrize("head", CLASSES)
def test_every_head_equals_that_of_transformers(every_head, head, precision):
    checks = check_parity(every_head[head], precision)
    assert [check for check in checks if not check.ok] == []
    quantities = {(check.inputs, check.quantity.removesuffix(" in fp64")) for check in checks}
    output = "pooler" if head == "BertModel" else "logits"
    for inputs in ("padded", "pair") if head == "BertForMultipleChoice" else ("padded", "packed", "pair"):
        assert {(inputs, quantity) for quantity in ("hidden states", output, "loss", "gradients")} <= quantities


@pytest.mark.parametrize("parameter", ["weight", "bias"])
@pytest.mark.parametrize("head", FINE_TUNED)
def test_one_element_of_a_head_is_noticed(every_head, head, parameter):
    ours = load_model(every_head[head])
    theirs, _ = load_reference(every_head[head], ours)
    name = "qa_outputs" if head == "BertForQuestionAnswering" else "classifier"
    with torch.no_grad():
        theirs.get_parameter(f"{name}.{parameter}").view(-1)[0] += 1e-2
    inputs = make_inputs(ours.config)["pair" if head == "BertForMultipleChoice" else "packed"]
    differences = compare(ours, theirs, inputs)
    assert differences["logits"] > parity.TOLERANCES["fp32"]["outputs"]
    if (
        head not in ("BertForQuestionAnswering", "BertForMultipleChoice") or parameter != "bias"
    ):  # which softmax ignores
        assert differences["loss"] > parity.TOLERANCES["fp32"]["loss"]


@pytest.mark.parametrize("head", FINE_TUNED)
def test_the_gradient_of_a_head_is_compared(every_head, head):
    ours = load_model(every_head[head])
    theirs, _ = load_reference(every_head[head], ours)
    ours.classifier.weight.register_hook(lambda gradient: gradient * 1.001)
    assert compare(ours, theirs, make_inputs(ours.config)["pair"])["gradients"] > 1e-4


@pytest.mark.parametrize("other", ["regression", "multi_label_classification"])
def test_another_meaning_of_the_scores_is_noticed(every_head, tmp_path, other):
    """transformers chooses the reference loss by the problem_type in config.json."""
    shutil.copytree(every_head["BertForSequenceClassification"], tmp_path / "other")
    change_config(tmp_path / "other", problem_type=other)
    ours = load_model(tmp_path / "other")
    theirs, _ = load_reference(tmp_path / "other", ours)
    inputs = make_inputs(ours.config)["padded"]
    assert compare(ours, theirs, inputs)["loss"] < 1e-6
    theirs.config.problem_type = "regression" if other != "regression" else "multi_label_classification"
    assert compare(ours, theirs, inputs)["loss"] > 1e-3
