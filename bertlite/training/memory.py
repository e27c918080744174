"""How many sequences fit into memory at once."""

import math

from bertlite.config.settings import Architecture, TrainSettings
from bertlite.core.distributed import all_reduce_max
from bertlite.core.errors import UserError
from bertlite.core.runtime import Runtime, available_memory
from bertlite.model.heads import Model


def choose_micro_batch_size(
    settings: TrainSettings,
    model: Model,
    sequence_length: int,
    num_predictions: int,
    runtime: Runtime,
    resumed: int | None = None,
) -> int:
    """Return the number of sequences in a forward pass, the same on all ranks.

    It is `train.per_device_train_batch_size`; else what a `resumed` run used before, so that free memory does not
    decide the last digits; else the rank's share of the batch in as few equal micro-batches as should fit into memory.
    Raises UserError when there are more ranks than sequences.
    """
    if settings.global_batch_size < runtime.world_size:
        raise UserError(
            f"train.global_batch_size is {settings.global_batch_size}, fewer than the {runtime.world_size} ranks"
        )
    share = math.ceil(settings.global_batch_size / runtime.world_size)
    if known := settings.per_device_train_batch_size or resumed:
        return min(share, known)
    gradients_and_moments = 12 * sum(weight.numel() for weight in model.parameters())  # three fp32 values a parameter
    free = available_memory(runtime) - gradients_and_moments
    half = free // 2  # the estimate is rough
    fitting = min(share, max(1, half // bytes_per_sequence(settings, model.config, sequence_length, num_predictions)))
    num_micro_batches = all_reduce_max(math.ceil(share / fitting), runtime.device)
    return math.ceil(share / num_micro_batches)


def bytes_per_sequence(
    settings: TrainSettings, config: Architecture, sequence_length: int, num_predictions: int
) -> int:
    """Estimate the activations of one sequence in the forward and backward pass."""
    attention = 4 * config.num_attention_heads * sequence_length
    values_per_token = 16 * config.hidden_size + 4 * config.intermediate_size + attention
    layers = 2 if settings.gradient_checkpointing else config.num_hidden_layers
    logits = 4 * num_predictions * config.vocab_size
    return 4 * (sequence_length * layers * values_per_token + logits)
