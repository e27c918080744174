"""Multi-head attention: its kernels, its masks, and the layer (Vaswani et al. 2017, section 3.2)."""

# Shapes: B batch, Q query tokens, T key tokens, D hidden size, H heads, K = D // H head size.
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertlite.model.layers import Linear

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Compute softmax(q kᵀ / √K), how much each query attends to each key: (B,H,Q,T), which sums to 1 over the keys.

    √K divides q rather than the scores, which are larger; the softmax is in fp32 at least. A query whose mask allows
    no key attends to all keys equally, so that padding yields finite numbers, never NaN.
    """
    scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)


def matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Attend by plain matrix products: the fastest kernel on CPUs, where the backward pass of torch's SDPA is slow."""
    return F.dropout(attention_weights(q, k, mask), dropout) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Attend by torch's scaled dot product attention, which on GPUs keeps no (Q,T) scores for the backward pass."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


# A kernel takes q (B,H,Q,K), k and v (B,H,T,K), a bool mask that broadcasts to (B,H,Q,T), True = may attend, and the
# dropout probability of a weight; it returns softmax(q kᵀ / √K) v, (B,H,Q,K).
KERNELS: dict[str, Kernel] = {"matmul": matmul, "sdpa": sdpa}


def best_kernel(device: torch.device) -> str:
    """Name the kernel that measured fastest on this type of device."""
    return "sdpa" if device.type == "cuda" else "matmul"


def document_mask(query_ids: Tensor, key_ids: Tensor) -> Tensor:
    """Make the mask (B,1,Q,T) that lets tokens attend to their own document, from document ids (B,Q) and (B,T)."""
    return (query_ids[:, :, None] == key_ids[:, None, :])[:, None]


class MultiHeadAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2), usable by itself; the encoder stacks it.

    `attention(query, key, value, mask)` maps query (B,Q,D), key and value (B,T,D) to (B,Q,D). The bool mask broadcasts
    to (B,H,Q,T), True = may attend: padding, causal, documents, or any other; without a mask every token attends to
    every token. `attention.weights(query, key, mask)` returns what each head attends to, (B,H,Q,T).
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
        """Return the weights before dropout, (B,H,Q,T), which sum to 1 over the keys."""
        q, k, _ = self._project(query, key, key)
        return attention_weights(q, k, mask)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Compute q (B,H,Q,K), k and v (B,H,T,K) by as few matrix products as the inputs allow."""
        D = query.shape[-1]
        if query is key is value:
            projected = self.qkv(query).chunk(3, dim=-1)
        elif key is value:
            q, kv = self.qkv.forward_slice(query, slice(D)), self.qkv.forward_slice(key, slice(D, None))
            projected = q, *kv.chunk(2, dim=-1)
        else:
            thirds = slice(D), slice(D, 2 * D), slice(2 * D, None)
            projected = tuple(map(self.qkv.forward_slice, (query, key, value), thirds))
        return tuple(x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected)
