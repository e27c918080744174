"""Optimizers, their parameter groups, and learning-rate schedules."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bertlite.config.loading import choose
from bertlite.config.settings import TrainSettings
from bertlite.core.runtime import fast_dtype
from bertlite.training.muon import Muon


def linear(progress: float) -> float:
    """Decay linearly to 0, as BERT did (Devlin et al. 2018, appendix A.2)."""
    return 1 - progress


def cosine(progress: float) -> float:
    """Decay to 0 along half a cosine wave (Loshchilov and Hutter 2016, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def constant(progress: float) -> float:
    """Keep the peak rate."""
    return 1.0


# Each returns the share of the peak rate, given the share of the steps after warm-up that are done.
SCHEDULES: dict[str, Callable[[float], float]] = {"linear": linear, "cosine": cosine, "constant": constant}


def learning_rate_factor(step: int, settings: TrainSettings) -> float:
    """Return the learning rate of a step, counted from 0, as a share of the peak: warm-up, then the schedule.

    For example, with 10 steps of which 3 warm up: 1/4, 2/4, 3/4, and then, linearly, 7/7, 6/7, …, 1/7.
    """
    warmup = math.ceil(settings.warmup_ratio * settings.max_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[settings.lr_scheduler_type]((step - warmup) / (settings.max_steps - warmup))


def adamw(tensors: dict[str, nn.Parameter], settings: TrainSettings) -> list[torch.optim.Optimizer]:
    """Create AdamW with decoupled weight decay (Loshchilov and Hutter 2017)."""
    matrices = [tensor for tensor in tensors.values() if tensor.ndim > 1]
    vectors = [tensor for tensor in tensors.values() if tensor.ndim <= 1]  # biases and layer norms: no decay
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = settings.adam_beta1, settings.adam_beta2
    return [torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.adam_epsilon, fused=True)]


def muon(tensors: dict[str, nn.Parameter], settings: TrainSettings) -> list[torch.optim.Optimizer]:
    """Create Muon (Jordan et al. 2024) for the matrices of the layers, and AdamW for the other parameters."""
    hidden = {name: tensor for name, tensor in tensors.items() if "layers." in name and tensor.ndim == 2}
    others = {name: tensor for name, tensor in tensors.items() if name not in hidden}
    if not hidden:  # all layers are frozen
        return adamw(others, settings)
    rate, decay = settings.muon_learning_rate, settings.weight_decay
    dtype = fast_dtype(next(iter(hidden.values())).device)
    return [Muon(list(hidden.values()), lr=rate, weight_decay=decay, dtype=dtype), *adamw(others, settings)]


OPTIMIZERS = {"adamw": adamw, "muon": muon}


class Optimizer:
    """The torch optimizers of a model, with a schedule, and with named state that safetensors can hold.

    The fused q/k/v matrix is optimized as three matrices, each a view of it, so that Muon treats each by itself.
    `scale` returns the factor of a parameter's learning rate, by its name. Frozen parameters are left out.
    """

    def __init__(
        self, model: nn.Module, settings: TrainSettings, scale: Callable[[str], float] = lambda name: 1.0
    ) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.tensors: dict[str, nn.Parameter] = {}
        self.views: list[tuple[nn.Parameter, nn.Parameter, slice]] = []  # a view, its parameter, and the rows in it
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
        create = choose(OPTIMIZERS, settings.optim, "train.optim")
        self.optimizers: list[torch.optim.Optimizer] = create(self.tensors, settings)
        scales = {id(tensor): scale(name) for name, tensor in self.tensors.items()}
        for optimizer in self.optimizers:
            _scale_learning_rates(optimizer, scales)
        self.groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.peak_rates = [group["lr"] for group in self.groups]

    def step(self, factor: float, skip: bool = False) -> None:
        """Update the parameters at `factor` times the peak learning rates, and drop the gradients.

        With `skip`, only drop the gradients.
        """
        for view, whole, rows in self.views:
            view.grad = None if whole.grad is None else whole.grad[rows]
        for group, peak_rate in zip(self.groups, self.peak_rates, strict=True):
            group["lr"] = peak_rate * factor
        if not skip:
            for optimizer in self.optimizers:
                optimizer.step()
        for parameter in self.parameters + [view for view, _, _ in self.views]:
            parameter.grad = None

    def learning_rate(self) -> float:
        """Return the learning rate of the last step: the highest of AdamW's groups."""
        return float(max(group["lr"] for group in self.optimizers[-1].param_groups))

    def state(self) -> dict[str, Tensor]:
        """Return the moments and step counts, by parameter and name."""
        return {
            f"{name}.{key}": value
            for name, tensor in self.tensors.items()
            for optimizer in self.optimizers
            for key, value in optimizer.state.get(tensor, {}).items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned; call it before the first step.

        Raises KeyError unless the state belongs to exactly this model's parameters.
        """
        names = {name.rpartition(".")[0] for name in state}
        unknown, missing = names - self.tensors.keys(), self.tensors.keys() - names
        if unknown or (state and missing):
            raise KeyError(f"the optimizer state belongs to another model: {min(unknown or missing)}")
        owners = {
            id(tensor): optimizer
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for tensor in group["params"]
        }
        for name, value in state.items():
            tensor_name, _, key = name.rpartition(".")
            tensor = self.tensors[tensor_name]
            owners[id(tensor)].state[tensor][key] = value.to(tensor.device)


def _scale_learning_rates(optimizer: torch.optim.Optimizer, scales: dict[int, float]) -> None:
    """Split each parameter group into groups of one scale, and scale their learning rates."""
    groups, optimizer.param_groups = optimizer.param_groups, []
    for group in groups:
        by_scale: dict[float, list[Tensor]] = {}
        for tensor in group["params"]:
            by_scale.setdefault(scales[id(tensor)], []).append(tensor)
        for scale, tensors in by_scale.items():
            optimizer.add_param_group({**group, "params": tensors, "lr": group["lr"] * scale})


def clip_gradients(parameters: list[nn.Parameter], count: float, max_norm: float) -> Tensor:
    """Divide the gradients by `count` and clip their norm to `max_norm`, in one pass (Pascanu et al. 2013, 3.2).

    Returns the norm after the division and before the clipping.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) / count
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0) / count
    torch._foreach_mul_(gradients, scale)
    return norm
