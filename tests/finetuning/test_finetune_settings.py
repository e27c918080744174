"""Every setting of fine-tuning changes something."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_tasks import make_experiment, read_metric, read_weights
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from bertlite.config.finetune_settings import FinetuneTrainSettings, TaskSettings
from bertlite.finetuning.experiment import build_initial_model, layerwise_decay, make_train_settings
from bertlite.finetuning.finetune import run
from bertlite.training.optim import Optimizer

CHANGES: dict[str, Any] = {
    "num_train_epochs": 1,
    "max_steps": 7,
    "global_batch_size": 16,
    "gradient_checkpointing": None,
    "optim": "muon",
    "learning_rate": 2e-3,
    "weight_decay": 0.5,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 1e-2,
    "warmup_ratio": 0.5,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.01,
    "precision": "bf16",
    "seeds": [3],
    "label_smoothing_factor": 0.3,
    "layerwise_lr_decay": 0.5,
    "frozen_layers": 1,
    "class_weights": "balanced",
    "hidden_dropout_prob": 0.5,
    "attention_probs_dropout_prob": 0.5,
    "max_length": 16,
    "validation_split": 0.5,
}
HALF_AN_EPOCH = {"train__max_steps": None, "train__num_train_epochs": 0.5, "task__validation": None}


@pytest.fixture
def usual(write) -> list[float]:
    """Return the losses of a run without changes."""
    config = write("token-classification", name="usual", **HALF_AN_EPOCH)
    run(config)
    return read_metric(config.output_dir)


def test_every_setting_changes_the_training(write, usual):
    for name, value in CHANGES.items():
        if value is None:  # tested below
            continue
        section = "task" if name in ("class_weights", "max_length", "validation_split") else "train"
        section = "model" if "dropout" in name else section
        config = write("token-classification", name=name, **(HALF_AN_EPOCH | {f"{section}__{name}": value}))
        run(config)
        assert read_metric(config.output_dir, seed=3 if name == "seeds" else 0) != usual, name
    untested = FinetuneTrainSettings.model_fields.keys() - CHANGES.keys()
    assert untested == {"per_device_train_batch_size", "muon_learning_rate", "compile", "logging_steps", "eval_steps",
                        "early_stopping_patience"}  # fmt: skip


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_settings_that_may_leave_the_loss_unchanged(write, monkeypatch, backend):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))  # inductor compiles for minutes
    no_dropout = {"model__hidden_dropout_prob": 0.0, "model__attention_probs_dropout_prob": 0.0}
    config = write(name="usual", **HALF_AN_EPOCH, **no_dropout)
    run(config)
    calls = []
    monkeypatch.setattr("bertlite.model.encoder.checkpoint", lambda *a, **b: calls.append(1) or checkpoint(*a, **b))
    counters.clear()
    for name, value in {"per_device_train_batch_size": 1, "gradient_checkpointing": True, "compile": True}.items():
        other = write(name=name, **HALF_AN_EPOCH, **no_dropout, **{f"train__{name}": value})
        run(other)
        assert read_metric(other.output_dir) == pytest.approx(read_metric(config.output_dir), rel=1e-4), name
        assert bool(calls) == (name == "gradient_checkpointing")
        assert bool(counters["stats"]["unique_graphs"]) == (name == "compile")
        calls.clear()
    config = write(name="muon", **HALF_AN_EPOCH, train__optim="muon")
    faster = write(name="faster", **HALF_AN_EPOCH, train__optim="muon", train__muon_learning_rate=0.1)
    run(config), run(faster)
    assert read_metric(config.output_dir) != read_metric(faster.output_dir)
    config = write(name="intervals", train__logging_steps=2, train__eval_steps=2, train__max_steps=4)
    run(config)
    assert len(read_metric(config.output_dir)) == len(read_metric(config.output_dir, "eval_accuracy")) == 2


def test_class_weights_of_numeric_labels():
    settings = TaskSettings.model_validate({"train": "x", "class_weights": {0: 1.0, "1": 2.0}})
    assert settings.class_weights == {"0": 1.0, "1": 2.0}


def test_layerwise_rates_and_frozen_layers(write):
    config = write(train__frozen_layers=1, train__max_steps=2)
    run(config)
    before, after = load_file(Path(str(config.model.init_from)) / "model.safetensors"), read_weights(config.output_dir)
    for name, weight in before.items():
        frozen = name.startswith(("embeddings.", "encoder.layer.0."))
        assert torch.equal(weight, after[f"bert.{name}"]) == frozen, name
    experiment = make_experiment(config)
    model = build_initial_model(experiment, "sdpa", 0)
    settings = make_train_settings(config.train, experiment.splits["train"].batches, 0)
    optimizer = Optimizer(model, settings, layerwise_decay(0.5, 2))
    rates = {
        name: group["lr"] / 1e-3
        for group in optimizer.groups
        for name, tensor in optimizer.tensors.items()
        if any(tensor is weight for weight in group["params"])
    }
    for start_of_name, rate in {"encoder.embeddings.word": 0.125, "encoder.layers.0.attention.qkv.weight.q": 0.25,
                                "encoder.layers.1.norm.bias": 0.5, "encoder.pooler": 1, "classifier": 1,
                                }.items():  # fmt: skip
        matching = {round(value, 9) for name, value in rates.items() if name.startswith(start_of_name)}
        assert matching == {rate}, start_of_name
    assert rates.keys() == optimizer.tensors.keys()
    optimizer.step(1.0)
    assert optimizer.learning_rate() == pytest.approx(1e-3)
