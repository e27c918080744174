"""Optimizers, clipping and schedules against torch.optim and transformers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, get_scheduler

from bertlite.config.settings import Architecture, TrainSettings
from bertlite.core.errors import UserError
from bertlite.model.heads import MaskedLanguageModel
from bertlite.model.huggingface import to_hf, weight_names
from bertlite.model.initialization import initialize
from bertlite.training.optim import OPTIMIZERS, SCHEDULES, Optimizer, clip_gradients, learning_rate_factor

SHAPE = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
RATES = {"learning_rate": 0.01, "muon_learning_rate": 0.03, "weight_decay": 0.1}


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**{**RATES, **changes})


def make_model() -> MaskedLanguageModel:
    model = MaskedLanguageModel(Architecture(**SHAPE), "matmul")
    initialize(model, 0.1, seed=0)
    return model


def give_gradients(model: nn.Module, step: int) -> None:
    """The same random gradients for the same step."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def train(model: nn.Module, optimizer: Optimizer, steps: range, factor: float = 0.5) -> None:
    for step in steps:
        give_gradients(model, step)
        optimizer.step(factor)


def hidden_matrices(names: list[str]) -> list[str]:
    """Those weights of the layers, by Hugging Face's names, that are matrices."""
    return [name for name in names if "encoder.layer." in name and name.endswith("weight") and "LayerNorm" not in name]


def without_decay(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith("bias") or "LayerNorm" in name]


def reference_optimizers(kind: str, weights: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    """torch's own optimizers for weights under Hugging Face's names, with the rates of `settings()`."""
    by_muon = hidden_matrices(list(weights)) if kind == "muon" else []
    others = [name for name in weights if name not in by_muon]
    vectors = without_decay(others)
    groups = [
        {"params": [weights[name] for name in others if name not in vectors], "weight_decay": RATES["weight_decay"]},
        {"params": [weights[name] for name in vectors], "weight_decay": 0.0},
    ]
    parts: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=RATES["learning_rate"], betas=(0.9, 0.98), eps=1e-6)
    ]
    if by_muon:
        matrices = [weights[name] for name in by_muon]
        parts.append(torch.optim.Muon(matrices, lr=RATES["muon_learning_rate"], weight_decay=RATES["weight_decay"]))
    return parts


def test_losses_under_adamw_are_those_of_transformers_under_torch():
    ours = make_model()
    theirs = BertForMaskedLM(BertConfig(**SHAPE))
    theirs.load_state_dict(to_hf(ours, dict(ours.named_parameters())), strict=False)
    theirs.train()
    chosen = settings(max_steps=8, warmup_ratio=0.0, learning_rate=RATES["learning_rate"])
    optimizer = Optimizer(ours, chosen)
    (reference,) = reference_optimizers("adamw", dict(theirs.named_parameters()))
    schedule = get_scheduler("linear", reference, num_warmup_steps=0, num_training_steps=8)
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(12).expand(4, 12)
    losses, expected = [], []
    for step in range(8):
        input_ids, labels = torch.randint(1, 30, (2, 4, 12), generator=generator)
        scores = ours(input_ids, positions, torch.ones(4, 12), positions)
        losses.append(F.cross_entropy(scores.flatten(0, 1), labels.flatten()))
        expected.append(theirs(input_ids, labels=labels).loss)
        losses[-1].backward()
        expected[-1].backward()
        optimizer.step(learning_rate_factor(step, chosen))
        reference.step()
        reference.zero_grad()
        schedule.step()
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_updates_equal_those_of_torch_on_separate_query_key_and_value(kind):
    ours = make_model()
    optimizer = Optimizer(ours, settings(optim=kind))
    weights = {
        name: nn.Parameter(weight.detach().clone())
        for name, weight in to_hf(ours, dict(ours.named_parameters())).items()
    }
    references = reference_optimizers(kind, weights)
    groups = [group for reference in references for group in reference.param_groups]
    peaks = [group["lr"] for group in groups]
    for step, factor in enumerate((0.5, 1.0, 1.0, 0.25)):
        give_gradients(ours, step)
        for name, gradient in to_hf(ours, {name: weight.grad for name, weight in ours.named_parameters()}).items():
            weights[name].grad = gradient.clone()
        optimizer.step(factor)
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * factor
        for reference in references:
            reference.step()
    for name, weight in to_hf(ours, dict(ours.named_parameters())).items():
        by_muon = kind == "muon" and name in hidden_matrices([name])
        tolerance = RATES["muon_learning_rate"] / 20 if by_muon else 1e-6  # torch's Muon rounds to bf16
        torch.testing.assert_close(weight, weights[name], atol=tolerance, rtol=1e-5, msg=name)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_only_matrices_decay(optim):
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    Optimizer(model, settings(optim=optim)).step(1.0)
    weights = to_hf(model, dict(model.named_parameters()))
    vectors = without_decay(list(weights))
    for name, weight in weights.items():
        assert (weight == 1).all() if name in vectors else (weight < 1).all(), name


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_weight_is_updated_and_its_gradient_dropped(optim):
    model, before = make_model(), make_model()
    train(model, Optimizer(model, settings(optim=optim, weight_decay=0.0)), range(1))
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert (parameter != before.get_parameter(name)).float().mean() > 0.99, name


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_the_rate_is_the_peak_times_the_factor_at_every_step(optim):
    model = make_model()
    optimizer = Optimizer(model, settings(optim=optim))
    for factor in (0.5, 0.5, 1.0, 0.25):
        train(model, optimizer, range(1), factor)
        assert optimizer.learning_rate() == RATES["learning_rate"] * factor
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train(model, optimizer, range(1), 0.0)
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_state_from_a_file_continues_bit_for_bit(tmp_path: Path, optim):
    whole = make_model()
    optimizer = Optimizer(whole, settings(optim=optim))
    train(whole, optimizer, range(3))
    state = optimizer.state()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "optimizer.safetensors")
    resumed = make_model()
    resumed.load_state_dict(whole.state_dict())
    train(whole, optimizer, range(3, 6))

    again = Optimizer(resumed, settings(optim=optim))
    again.load_state(load_file(tmp_path / "optimizer.safetensors"))
    train(resumed, again, range(3, 6))

    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
    first, second = optimizer.state(), again.state()
    assert set(first) == set(second)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_tensor_of_the_state_matters(optim):
    """Whatever kind of state is lost, the next steps are others."""
    whole = make_model()
    optimizer = Optimizer(whole, settings(optim=optim))
    train(whole, optimizer, range(3))
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    weights = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    train(whole, optimizer, range(3, 4))
    for kind in {name.rpartition(".")[2] for name in state}:
        resumed = make_model()
        resumed.load_state_dict(weights)
        again = Optimizer(resumed, settings(optim=optim))
        again.load_state(
            {
                name: torch.zeros_like(tensor) if name.endswith(kind) else tensor.clone()
                for name, tensor in state.items()
            }
        )
        train(resumed, again, range(3, 4))
        pairs = zip(resumed.parameters(), whole.parameters(), strict=True)
        assert not all(torch.equal(one, another) for one, another in pairs), kind


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_there_is_no_state_before_the_first_step(optim):
    assert Optimizer(make_model(), settings(optim=optim)).state() == {}


def test_state_of_another_model_is_refused():
    with pytest.raises(KeyError, match=r"encoder\.layers\.7\.up\.weight"):
        Optimizer(make_model(), settings()).load_state({"encoder.layers.7.up.weight.exp_avg": torch.zeros(1)})


def test_state_of_more_or_fewer_weights_is_refused():
    state = {f"{name}.exp_avg": torch.zeros(1) for name in Optimizer(make_model(), settings()).tensors}
    for other in ({**state, "encoder.layers.7.up.weight.exp_avg": torch.zeros(1)}, dict([*state.items()][1:])):
        with pytest.raises(KeyError, match="the optimizer state belongs to another model"):
            Optimizer(make_model(), settings()).load_state(other)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(UserError, match=r"train\.optim is 'adam'.*Did you mean adamw"):
        Optimizer(make_model(), settings(optim="adam"))


@pytest.mark.parametrize("count", [1.0, 37.0])
@pytest.mark.parametrize("share", [0.1, 0.999, 1.001, 10.0])
def test_clipping_is_that_of_torch_on_the_mean_gradients(count, share):
    ours, theirs = make_model(), make_model()
    give_gradients(ours, 0)
    give_gradients(theirs, 0)
    for parameter in theirs.parameters():
        parameter.grad /= count
    norm = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in theirs.parameters()))
    ours.head.bias.grad = theirs.head.bias.grad = None  # as of a weight that a loss does not reach
    returned = clip_gradients(list(ours.parameters()), count, norm * share)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), norm * share)
    torch.testing.assert_close(returned, expected)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad, msg=name)
    assert ours.head.bias.grad is None


# Where transformers calls a schedule otherwise.
THEIR_NAMES = {"constant": "constant_with_warmup"}


def factors(**changes: Any) -> Tensor:
    chosen = settings(**changes)
    return torch.tensor([learning_rate_factor(step, chosen) for step in range(chosen.max_steps)])


@pytest.mark.parametrize("steps, ratio", [(50, 0.0), (50, 0.1), (50, 0.25), (1000, 0.06), (7, 0.5)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_after_warm_up_are_those_of_transformers(name, steps, ratio):
    warmup = math.ceil(steps * ratio)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(THEIR_NAMES.get(name, name), optimizer, warmup, steps)
    expected = []
    for _ in range(steps):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    actual = factors(max_steps=steps, warmup_ratio=ratio, lr_scheduler_type=name)
    torch.testing.assert_close(actual[warmup:], torch.tensor(expected)[warmup:])


@pytest.mark.parametrize("steps, ratio", [(1, 0.0), (1, 0.06), (2, 0.5), (50, 0.1), (50, 1.0), (1000, 0.06)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_rises_evenly_to_the_peak_and_no_step_is_lost(name, steps, ratio):
    actual = factors(max_steps=steps, warmup_ratio=ratio, lr_scheduler_type=name)
    warmup = math.ceil(steps * ratio)
    assert (actual > 0).all()
    assert (actual <= 1).all()
    rising = actual[: warmup + 1]
    assert (rising.diff() > 0).all()
    torch.testing.assert_close(rising, (1 + torch.arange(len(rising))) / (warmup + 1))
    assert (actual[warmup:].diff() <= 0).all()


# What each setting is changed to, and under which optimizer it has to matter.
SETTINGS: dict[str, tuple[Any, list[str]]] = {
    "learning_rate": (0.02, ["adamw", "muon"]),
    "muon_learning_rate": (0.05, ["muon"]),
    "weight_decay": (0.2, ["adamw", "muon"]),
    "adam_beta1": (0.8, ["adamw", "muon"]),
    "adam_beta2": (0.9, ["adamw", "muon"]),
    "adam_epsilon": (1e-2, ["adamw", "muon"]),
    "warmup_ratio": (0.5, ["adamw", "muon"]),
    "lr_scheduler_type": ("constant", ["adamw", "muon"]),
    "max_steps": (20, ["adamw", "muon"]),
}


def trained(chosen: TrainSettings) -> dict[str, Tensor]:
    model = make_model()
    optimizer = Optimizer(model, chosen)
    for step in range(3):
        train(model, optimizer, range(step, step + 1), learning_rate_factor(step, chosen))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("setting, optim", [(name, optim) for name, (_, kinds) in SETTINGS.items() for optim in kinds])
def test_every_setting_changes_the_weights(setting, optim):
    base = {"optim": optim, "max_steps": 10, "warmup_ratio": 0.1}
    before = trained(settings(**base))
    after = trained(settings(**{**base, setting: SETTINGS[setting][0]}))
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    by_muon = {ours for ours, names in weight_names(make_model()).items() if hidden_matrices(names)}
    if setting in ("warmup_ratio", "lr_scheduler_type", "max_steps"):
        expected = set(before)
    elif setting == "weight_decay":
        expected = {name for name, weight in before.items() if weight.ndim > 1}
    elif setting == "muon_learning_rate":
        expected = by_muon
    else:
        expected = set(before) - (by_muon if optim == "muon" else set())
    assert changed == expected


def test_muon_without_matrices_is_adamw():
    """All layers may be frozen."""
    tensors = {
        "embeddings.word.weight": nn.Parameter(torch.zeros(3, 2)),
        "layers.0.norm.weight": nn.Parameter(torch.ones(2)),
    }
    (only,) = OPTIMIZERS["muon"](tensors, TrainSettings())
    assert isinstance(only, torch.optim.AdamW)
