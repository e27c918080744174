"""Optimizers, which parameters they treat how, and learning-rate schedules."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bertlite.config.loading import choose
from bertlite.config.settings import TrainSettings


def linear(progress: float) -> float:
    """Down to 0 in a straight line, as BERT did (Devlin et al. 2018, appendix A.2)."""
    return 1 - progress


def cosine(progress: float) -> float:
    """Down to 0 along half a cosine wave (Loshchilov and Hutter 2016, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def constant(progress: float) -> float:
    """The peak rate to the end."""
    return 1.0


# The share of the peak rate, by the share of the steps after warm-up that are done.
SCHEDULES: dict[str, Callable[[float], float]] = {"linear": linear, "cosine": cosine, "constant": constant}


def learning_rate_factor(step: int, settings: TrainSettings) -> float:
    """The learning rate of step `step` (counted from 0) as a share of the peak: warm-up, then the schedule."""
    warmup = math.ceil(settings.warmup_ratio * settings.max_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[settings.lr_scheduler_type]((step - warmup) / (settings.max_steps - warmup))


def adamw(tensors: dict[str, nn.Parameter], settings: TrainSettings) -> list[torch.optim.Optimizer]:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2017)."""
    matrices = [tensor for tensor in tensors.values() if tensor.ndim > 1]
    vectors = [tensor for tensor in tensors.values() if tensor.ndim <= 1]  # biases and layer norms: no decay
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = settings.adam_beta1, settings.adam_beta2
    return [torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.adam_epsilon, fused=True)]


def muon(tensors: dict[str, nn.Parameter], settings: TrainSettings) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of the layers, AdamW for all the rest."""
    hidden = {name: tensor for name, tensor in tensors.items() if "layers." in name and tensor.ndim == 2}
    others = {name: tensor for name, tensor in tensors.items() if name not in hidden}
    rate, decay = settings.muon_learning_rate, settings.weight_decay
    parts = [torch.optim.Muon(hidden.values(), lr=rate, weight_decay=decay)] if hidden else []  # all may be frozen
    return [*parts, *adamw(others, settings)]


OPTIMIZERS = {"adamw": adamw, "muon": muon}


class Optimizer:
    """The torch optimizers of a model, with a schedule, and with named state that safetensors can hold.

    The fused q/k/v matrix is three matrices to them, each a view of it: Muon treats each by itself. `scale` says by
    which factor the rate of a parameter differs from the configured one; frozen parameters are left out.
    """

    def __init__(
        self, model: nn.Module, settings: TrainSettings, scale: Callable[[str], float] = lambda name: 1.0
    ) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.tensors: dict[str, nn.Parameter] = {}
        self.views: list[tuple[nn.Parameter, nn.Parameter, slice]] = []  # a view, what it is a view of, and where
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if name.endswith("qkv.weight"):
                D = parameter.shape[1]
                for number, letter in enumerate("qkv"):
                    rows = slice(number * D, (number + 1) * D)
                    view = self.tensors[f"{name}.{letter}"] = nn.Parameter(parameter.detach()[rows])
                    self.views.append((view, parameter, rows))
            else:
                self.tensors[name] = parameter
        self.parts = choose(OPTIMIZERS, settings.optim, "train.optim")(self.tensors, settings)
        scales = {id(tensor): scale(name) for name, tensor in self.tensors.items()}
        for part in self.parts:
            _split(part, scales)
        self.peaks = [group["lr"] for part in self.parts for group in part.param_groups]

    def step(self, factor: float, skip: bool = False) -> None:
        """Update the parameters from their gradients at `factor` times the peak rates, and drop the gradients.

        With `skip` the parameters stay as they are.
        """
        for view, whole, rows in self.views:
            view.grad = None if whole.grad is None else whole.grad[rows]
        groups = [group for part in self.parts for group in part.param_groups]
        for group, peak in zip(groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        for part in self.parts if not skip else ():
            part.step()
        for parameter in self.parameters + [view for view, _, _ in self.views]:
            parameter.grad = None

    def learning_rate(self) -> float:
        """The rate of the last step (AdamW's, where there are several)."""
        return float(max(group["lr"] for group in self.parts[-1].param_groups))

    def state(self) -> dict[str, Tensor]:
        """What the next steps depend on besides weights and gradients, by name."""
        return {
            f"{name}.{key}": value
            for name, tensor in self.tensors.items()
            for part in self.parts
            for key, value in part.state.get(tensor, {}).items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The reverse of `state`, before the first step. Raises KeyError unless it is the state of all this model's
        tensors and no others."""
        names = {name.rpartition(".")[0] for name in state}
        unknown, missing = names - self.tensors.keys(), self.tensors.keys() - names
        if unknown or (state and missing):
            raise KeyError(f"the optimizer's state is not that of this model: {min(unknown or missing)}")
        owners = {id(tensor): part for part in self.parts for group in part.param_groups for tensor in group["params"]}
        for name, value in state.items():
            tensor_name, _, key = name.rpartition(".")
            tensor = self.tensors[tensor_name]
            owners[id(tensor)].state[tensor][key] = value.to(tensor.device)


def _split(part: torch.optim.Optimizer, scales: dict[int, float]) -> None:
    """Share each group out among groups of one learning rate each."""
    groups, part.param_groups = part.param_groups, []
    for group in groups:
        by_scale: dict[float, list[Tensor]] = {}
        for tensor in group["params"]:
            by_scale.setdefault(scales[id(tensor)], []).append(tensor)
        for scale, tensors in by_scale.items():
            part.add_param_group({**group, "params": tensors, "lr": group["lr"] * scale})


def clip_gradients(parameters: list[nn.Parameter], count: float, max_norm: float) -> Tensor:
    """Divide the gradients by `count`, then scale them so that their norm is at most `max_norm`; all in one pass.

    Returns the norm before the clipping (Pascanu et al. 2013, section 3.2).
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) / count
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0) / count
    torch._foreach_mul_(gradients, scale)
    return norm
