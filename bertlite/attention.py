"""Attention kernels: softmax(q kᵀ / √K) v for many heads at once (Vaswani et al. 2017, section 3.2.1)."""

# Shapes: B batch, H heads, Q query tokens, T key tokens, K head size.
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """How much each query attends to each key: (B,H,Q,T), rows sum to 1.

    √K divides q, not the scores, as q is smaller; the softmax is in fp32 at least. A query that may attend nowhere
    attends everywhere alike: padding gets numbers that nobody reads, never NaN.
    """
    scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)


def matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Plain matrix products: the fastest on CPUs, where the backward pass of torch's SDPA is slow."""
    return F.dropout(attention_weights(q, k, mask), dropout) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """torch's scaled dot product attention, which keeps no (Q,T) scores for the backward pass on GPUs."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


# Each kernel takes q (B,H,Q,K), k and v (B,H,T,K), a bool mask that broadcasts to (B,H,Q,T), True = may attend, and
# the probability with which a weight is dropped; it returns (B,H,Q,K).
KERNELS: dict[str, Kernel] = {"matmul": matmul, "sdpa": sdpa}


def best_kernel(device: torch.device) -> str:
    """The kernel that measured fastest on this kind of device."""
    return "sdpa" if device.type == "cuda" else "matmul"
