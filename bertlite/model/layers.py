"""The linear layer and the activations that every architecture uses."""

# Shapes: D input size, E output size; … stands for any leading dimensions.
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

gelu_new = partial(F.gelu, approximate="tanh")  # Google's (Hendrycks and Gimpel 2016)
# Keys are Hugging Face's values of hidden_act.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": gelu_new,
    "gelu_pytorch_tanh": gelu_new,
    "relu": F.relu,
}


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute x Wᵀ + b of x (…,D), weight (E,D) and bias (E,): (…,E).

    The bias is added after the product: compiled, the addition fuses with what follows; inside the product it costs a
    copy on CPUs.
    """
    y = F.linear(x, weight)
    return y + bias.to(y.dtype)  # under autocast the product is in bf16, and the sum stays so


class Linear(nn.Linear):
    """A linear layer that computes by `self.linear`, which inference replaces by a faster function."""

    linear = staticmethod(linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, self.weight, self.bias)

    def forward_slice(self, x: Tensor, outputs: slice) -> Tensor:
        """Compute a slice of the outputs alone: (…,E) of x (…,D)."""
        return self.linear(x, self.weight[outputs], self.bias[outputs])
