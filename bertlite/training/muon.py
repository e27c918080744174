"""Muon in batches, in the precision that the hardware multiplies faster."""

from typing import Any

import torch
from torch import Tensor, nn

MAX_BATCH_BYTES = 1 << 26  # of the matrices that are orthogonalized together; limits the memory
A, B, C = 3.4445, -4.7750, 2.0315  # the coefficients of Jordan et al. 2024


class Muon(torch.optim.Muon):
    """Muon (Jordan et al. 2024) as `torch.optim.Muon` defines it, several times as fast on CPUs.

    That class orthogonalizes one matrix at a time, in bf16 on any hardware. Here matrices of the same shape are
    orthogonalized together, in `dtype`. A run that was started with torch's class continues with it, bit for bit.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        super().__init__(matrices, lr=lr, weight_decay=weight_decay)
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update the matrices that have a gradient."""
        if any("momentum_buffer" in state for state in self.state.values()):  # named so by torch's class
            super().step()  # type: ignore[no-untyped-call]
            return
        for group in self.param_groups:
            for matrices in batch_by_shape([matrix for matrix in group["params"] if matrix.grad is not None]):
                self._update(matrices, group)

    def _update(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        momenta = [self.state[matrix].setdefault("momentum", torch.zeros_like(matrix)) for matrix in matrices]
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        nesterov = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"]))
        updates = orthogonalize(nesterov.to(self.dtype)).to(nesterov.dtype)
        rows, columns = matrices[0].shape
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, updates.unbind(), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def batch_by_shape(matrices: list[Tensor]) -> list[list[Tensor]]:
    """Divide matrices into batches of one shape and at most MAX_BATCH_BYTES."""
    batches: list[list[Tensor]] = []
    open_batch: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        batch = open_batch.get(matrix.shape)
        if batch is None or (len(batch) + 1) * matrix.nbytes > MAX_BATCH_BYTES:
            batch = open_batch[matrix.shape] = []
            batches.append(batch)
        batch.append(matrix)
    return batches


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of each matrix near 1, by five steps of a Newton–Schulz iteration.

    (n,R,C) → (n,R,C). A step replaces X by PX, where P = aI + bG + cG² and G = XXᵀ. Where C ≥ 2R it takes fewer
    operations to multiply the five P, since G becomes PGP ("Gram Newton–Schulz", Dao AI Lab 2026); bf16 is too coarse
    for that.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalize(matrices.mT).mT
    X = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=1e-7)
    if matrices.shape[2] < 2 * matrices.shape[1] or matrices.dtype != torch.float32:
        for _ in range(5):
            G = X @ X.mT
            X = torch.baddbmm(X, torch.baddbmm(G, G, G, beta=B, alpha=C), X, beta=A)
        return X
    G = X @ X.mT
    product = P = _polynomial(G)
    for _ in range(4):
        G = P @ G @ P
        P = _polynomial(G)
        product = P @ product
    return product @ X


def _polynomial(G: Tensor) -> Tensor:
    """Return aI + bG + cG²."""
    P = torch.baddbmm(G, G, G, beta=B, alpha=C)
    P.diagonal(dim1=1, dim2=2).add_(A)
    return P
