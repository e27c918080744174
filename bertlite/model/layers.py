"""Parts that several modules of the model share."""

# Shapes: B batch, T tokens, Q queries, P positions of a row, D hidden size, E outputs, H heads, K = D // H,
# V vocabulary, L labels.
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

gelu_new = partial(F.gelu, approximate="tanh")  # Google's (Hendrycks and Gimpel 2016)
# Keys as in Hugging Face's hidden_act.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": gelu_new,
    "gelu_pytorch_tanh": gelu_new,
    "relu": F.relu,
}


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x Wᵀ + b of x (…,D), weight (E,D) and bias (E,): (…,E).

    The bias is added apart: compiled, it joins what follows; inside the product it costs a copy on CPUs.
    """
    y = F.linear(x, weight)
    return y + bias.to(y.dtype)  # under autocast the product is in bf16, and so remains the sum


class Linear(nn.Linear):
    """x Wᵀ + b by `product`, for which `inference` has a faster one."""

    product = staticmethod(linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)

    def part(self, x: Tensor, coordinates: slice) -> Tensor:
        """Some of the output's coordinates."""
        return self.product(x, self.weight[coordinates], self.bias[coordinates])


def at_positions(x: Tensor, positions: Tensor) -> Tensor:
    """The vectors of x (B,T,D) at some positions (B,P) of each row: (B,P,D)."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def same_document(query_ids: Tensor, key_ids: Tensor) -> Tensor:
    """The mask (B,1,P,T) under which tokens see their own document, from document numbers (B,P) and (B,T)."""
    return (query_ids[:, :, None] == key_ids[:, None, :])[:, None]
