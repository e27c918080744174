"""The weights that training starts from."""

import math

import torch
from torch import Tensor, nn

from bertlite.model.bert import Embeddings
from bertlite.model.heads import MaskedLanguageModel


def initialize(model: nn.Module, std: float, seed: int, sinusoidal_positions: bool = False) -> None:
    """Initialize a model as BERT was: weights normal, truncated at two standard deviations; biases 0; layer norms 1, 0.

    With `sinusoidal_positions`, the position embeddings are sinusoids at first; they are trained in both cases.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    for module in model.modules():
        if isinstance(module, Embeddings) and sinusoidal_positions:
            module.position.weight.data.copy_(sinusoids(*module.position.weight.shape) * std * math.sqrt(2))


def sinusoids(positions: int, size: int) -> Tensor:
    """Return sines and cosines of many wavelengths, (positions, size) (Vaswani et al. 2017, section 3.5)."""
    frequencies = 10000 ** -(torch.arange(0, size, 2) / size)
    angles = torch.arange(positions)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :size]


def exchange_vocabulary(model: MaskedLanguageModel, old_ids: list[list[int]], pad_token_id: int) -> None:
    """Exchange a model's vocabulary in place.

    Token i gets the mean of the old tokens `old_ids[i]`, or of all old tokens if `old_ids[i]` is empty: of their word
    embeddings and of their entries in the decoder's bias.
    """
    for parameter in (model.encoder.embeddings.word.weight, model.head.bias):
        old = parameter.detach()
        new = old.mean(0, keepdim=True).repeat(len(old_ids), *[1] * (old.ndim - 1))
        for token_id, ids in enumerate(old_ids):
            if ids:
                new[token_id] = old[ids].mean(0)
        parameter.data = new
    word = model.encoder.embeddings.word
    word.num_embeddings, word.padding_idx = len(old_ids), pad_token_id
    changes = {"vocab_size": len(old_ids), "pad_token_id": pad_token_id}
    model.config = model.encoder.config = model.config.model_copy(update=changes)


def parameter_count(model: nn.Module) -> int:
    """Count the parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())
