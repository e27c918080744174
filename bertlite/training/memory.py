"""How many sequences fit into memory."""

import math

from bertlite.config.settings import Architecture, TrainSettings
from bertlite.core.distributed import all_reduce_max
from bertlite.core.errors import UserError
from bertlite.core.runtime import Runtime, available_memory
from bertlite.model.heads import Model


def rows_at_a_time(settings: TrainSettings, model: Model, row: int, slots: int, runtime: Runtime) -> int:
    """How many rows a rank computes at a time: as set, or its share in as few equal parts as should fit in memory.

    The same on all ranks. Raises UserError when there are more ranks than rows.
    """
    if settings.global_batch_size < runtime.world_size:
        raise UserError(
            f"train.global_batch_size is {settings.global_batch_size}, fewer than the {runtime.world_size} ranks"
        )
    share = math.ceil(settings.global_batch_size / runtime.world_size)
    if settings.per_device_train_batch_size:
        return min(share, settings.per_device_train_batch_size)
    free = available_memory(runtime)
    free -= 12 * sum(weight.numel() for weight in model.parameters())  # gradients and two numbers of the optimizer
    fitting = min(share, max(1, free // 2 // bytes_of_a_row(settings, model.config, row, slots)))
    return math.ceil(share / all_reduce_max(math.ceil(share / fitting), runtime.device))


def bytes_of_a_row(settings: TrainSettings, config: Architecture, row: int, slots: int) -> int:
    """About what a row of `row` positions and `slots` predictions takes while its gradients are computed."""
    numbers_of_a_token = 16 * config.hidden_size + 4 * config.intermediate_size + 4 * config.num_attention_heads * row
    layers = 2 if settings.gradient_checkpointing else config.num_hidden_layers
    return 4 * (row * layers * numbers_of_a_token + 4 * slots * config.vocab_size)
