"""Muon against torch.optim.Muon and its definition in fp64."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bertlite.config.settings import TrainSettings
from bertlite.training import muon
from bertlite.training.muon import Muon, batch_by_shape, orthogonalize
from bertlite.training.optim import Optimizer

SHAPES = [(16, 16), (16, 40), (40, 16), (16, 16), (16, 20), (40, 16)]
RATES = {"lr": 0.05, "weight_decay": 0.1}


def newton_schulz(matrix: Tensor) -> Tensor:
    """Five steps of the iteration on one matrix in fp64, as Jordan et al. define it."""
    X = matrix.double()
    if X.shape[0] > X.shape[1]:
        return newton_schulz(matrix.T).T
    X = X / max(float(X.norm()), 1e-7)
    for _ in range(5):
        G = X @ X.T
        X = 3.4445 * X - 4.7750 * G @ X + 2.0315 * G @ G @ X
    return X


@pytest.mark.parametrize("shape", sorted(set(SHAPES)))
@pytest.mark.parametrize("smallest", [1.0, 1e-3, 0.0])  # singular value, where the largest is 1
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.25)])
def test_orthogonalization_is_that_of_the_definition(shape, smallest, dtype, tolerance):
    random = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U, S, V = torch.linalg.svd(random, full_matrices=False)
    matrices = (U * torch.linspace(1, smallest, S.shape[1]) @ V).to(dtype)
    matrices[2] = 0
    updates = orthogonalize(matrices)
    assert updates.dtype == dtype and updates.shape == matrices.shape
    for update, matrix in zip(updates, matrices, strict=True):
        expected = newton_schulz(matrix)
        assert (update.double() - expected).norm() <= tolerance * expected.norm()


def make_matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def train(matrices: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.02), (torch.bfloat16, 0.02)])  # torch's is in bf16
def test_updates_are_those_of_torch(dtype, tolerance, monkeypatch):
    monkeypatch.setattr(muon, "MAX_BATCH_BYTES", 2 * 4 * 16 * 40)  # some batches are of two matrices
    ours, theirs, begun = make_matrices(), make_matrices(), make_matrices()
    train(ours, Muon(ours, **RATES, dtype=dtype), range(5))
    train(theirs, torch.optim.Muon(theirs, **RATES), range(5))
    for matrix, expected, first in zip(ours, theirs, begun, strict=True):
        change = (expected - first).norm()
        assert change > 0.5 and (matrix - expected).norm() < tolerance * change


def test_a_run_that_began_with_torchs_own_class_goes_on_with_it_bit_for_bit(tmp_path):
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ParameterList(make_matrices())

    def make(**settings: Any) -> tuple[list[nn.Parameter], Optimizer]:
        model = Layers()
        rates = {"muon_learning_rate": RATES["lr"], "weight_decay": RATES["weight_decay"]}
        return list(model.layers), Optimizer(model, TrainSettings(optim="muon", **rates))

    theirs = make_matrices()
    reference = torch.optim.Muon(theirs, **RATES)
    train(theirs, reference, range(2))
    save_file(
        {f"layers.{i}.momentum_buffer": reference.state[matrix]["momentum_buffer"] for i, matrix in enumerate(theirs)},
        tmp_path / "optimizer.safetensors",
    )
    ours, optimizer = make()
    with torch.no_grad():
        for matrix, saved in zip(ours, theirs, strict=True):
            matrix.copy_(saved)
    optimizer.load_state(load_file(tmp_path / "optimizer.safetensors"))
    train(theirs, reference, range(2, 4))
    train(ours, optimizer.optimizers[0], range(2, 4))
    for matrix, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(matrix, expected, atol=0, rtol=0)
    assert {name.rpartition(".")[2] for name in optimizer.state()} == {"momentum_buffer"}


def test_batches_hold_one_shape_and_bounded_memory(monkeypatch):
    monkeypatch.setattr(muon, "MAX_BATCH_BYTES", 2 * 4 * 16 * 16)
    matrices = [torch.zeros(shape) for shape in [(16, 16), (16, 40), (16, 16), (16, 16), (16, 40)]]
    batches = [[next(i for i, other in enumerate(matrices) if other is matrix) for matrix in batch]
               for batch in batch_by_shape(matrices)]  # fmt: skip
    assert batches == [[0, 2], [1], [3], [4]]
