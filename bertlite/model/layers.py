"""The linear layer and the activations that every architecture uses."""

# Shapes: D input size, E output size; … stands for any leading dimensions.
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
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


LinearFunction = Callable[[Tensor, Tensor, Tensor], Tensor]  # of x, weight and bias


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute x Wᵀ + b of x (…,D), weight (E,D) and bias (E,): (…,E).

    The bias is added after the product: compiled, the addition fuses with what follows; inside the product it costs a
    copy on CPUs.
    """
    y = F.linear(x, weight)
    return y + bias.to(y.dtype)  # under autocast the product is in bf16, and the sum stays so


@torch.library.custom_op("bertlite::onednn_product", mutates_args=())
def onednn_product(x: Tensor, weight: Tensor) -> Tensor:
    """Compute x Wᵀ of x (…,D) and weight (E,D) by oneDNN: (…,E)."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, None, "none", [], "")
    return y


@onednn_product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_product(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    x_needed, weight_needed = ctx.needs_input_grad
    return (
        onednn_product(gradient, weight.t()) if x_needed else None,
        gradient.flatten(0, -2).t() @ x.flatten(0, -2) if weight_needed else None,
    )


onednn_product.register_autograd(_differentiate_product, setup_context=_save_inputs)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute what `linear` does by oneDNN, in fp32 on CPUs."""
    y: Tensor = onednn_product(x, weight)
    return y + bias


class Linear(nn.Linear):
    """A linear layer that computes by `self.linear`, which `heads.set_linear` replaces by a faster function."""

    linear: LinearFunction = staticmethod(linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, self.weight, self.bias)

    def forward_slice(self, x: Tensor, outputs: slice) -> Tensor:
        """Compute a slice of the outputs alone: (…,E) of x (…,D)."""
        return self.linear(x, self.weight[outputs], self.bias[outputs])
