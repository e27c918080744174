"""Attention kernels: softmax(q kᵀ / √K) v for many heads at once (Vaswani et al. 2017, section 3.2.1)."""

# Shapes: B batch, H heads, Q query tokens, T key tokens, K head size.
import math
from collections.abc import Callable

# Shapes: B batch, T tokens, Q queries, P positions of a row, D hidden size, E outputs, H heads, K = D // H,
# V vocabulary, L labels.
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertlite.model.layers import Linear

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


class MultiHeadAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2), as a layer by itself and in the encoder.

    `attention(query, key, value, mask)` takes query (B,Q,D), key and value (B,T,D), and a bool mask that broadcasts
    to (B,H,Q,T), True = may attend (padding, causal, documents, or any other); without a mask all attend to all.
    It returns (B,Q,D). `attention.weights(query, key, mask)` returns what each head attends to, (B,H,Q,T).
    Self-attention is `attention(x, x, x, mask)`, which computes q, k and v by one matrix product.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float = 0.0, kernel: str = "sdpa") -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide hidden_size {hidden_size}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.kernel = KERNELS[kernel]
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.out = Linear(hidden_size, hidden_size)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self._project(query, key, value)
        y = self.kernel(q, k, v, mask, self.dropout if self.training else 0.0)  # (B,H,Q,K)
        return self.out(y.transpose(1, 2).flatten(2))

    def weights(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """What each head attends to, before dropout: (B,H,Q,T), rows sum to 1."""
        q, k, _ = self._project(query, key, key)
        return attention_weights(q, k, mask)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k and v, (B,H,·,K) each: by one matrix product where all are of one tensor, by two where k and v are."""
        D = query.shape[-1]
        if query is key is value:
            projected = self.qkv(query).chunk(3, dim=-1)
        elif key is value:
            projected = self.qkv.part(query, slice(D)), *self.qkv.part(key, slice(D, None)).chunk(2, dim=-1)
        else:
            thirds = [slice(number * D, (number + 1) * D) for number in range(3)]
            projected = tuple(map(self.qkv.part, (query, key, value), thirds))
        return tuple(x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected)
