"""Counted initialization: BERT's weights hold, before the first step, which tokens stand beside each other.

The word vectors have all coordinates but the last P, which are those of the positions. Each head of the first layer
attends to one offset, and adds what the token there says about its neighbour; the decoder reads it off. See
`configs/README.md` for the method and its sources.
"""

# Shapes: V vocabulary, D hidden size, H heads, K = D // H head size, W size of the word vectors, P = D - W.
import math

import numpy as np
import torch
from torch import Tensor

from bertlite.config.settings import EncoderSettings
from bertlite.data.cooccurrence import Cooccurrence
from bertlite.model.bert import Layer
from bertlite.model.heads import MaskedLanguageModel

MAX_POSITION_SIZE, MIN_POSITION_SIZE = 64, 32
PEAK = 16.0  # attention score of a masked token to its neighbour, before the softmax
ATTENTION_RMS = 0.5  # of what the heads add, beside hidden states of 1
DEPTH_SCALE = 0.4  # of the matrices that the other layers add by, which begin near the identity
DENSE_NOISE, DENSE_BIAS = 0.1, 3.0  # of the head's dense layer; with this bias its activation is almost linear


def position_size(settings: EncoderSettings) -> int:
    """Return P, the number of coordinates for positions."""
    head_size = settings.hidden_size // settings.num_attention_heads
    return min(MAX_POSITION_SIZE, head_size, settings.hidden_size // 4) // 2 * 2


def head_offsets(settings: EncoderSettings) -> tuple[int, ...]:
    """Return the offsets that the heads of the first layer attend to."""
    return (-1, 1, -2, 2) if settings.num_attention_heads >= 4 else (-1, 1)


def why_not(settings: EncoderSettings) -> str:
    """Say what prevents counted initialization of a model of this shape; "" if nothing does."""
    if settings.num_attention_heads < 2:
        return f"model.num_attention_heads is {settings.num_attention_heads}, and at least 2 are needed"
    if position_size(settings) < MIN_POSITION_SIZE:
        return (
            f"model.hidden_size {settings.hidden_size} with {settings.num_attention_heads} heads is too small; "
            f"at least {4 * MIN_POSITION_SIZE} with {MIN_POSITION_SIZE} a head are needed"
        )
    return ""


def position_frequencies(count: int) -> Tensor:
    """Return frequencies between 0 and pi, one in each of `count` equal intervals, at irregular points.

    Regular ones would make positions 2 * `count` apart equal.
    """
    index = torch.arange(count)
    shift = ((index + 1).double().square() * math.sqrt(2) % 1).float()  # squares of an irrational step do not repeat
    return math.pi * (index + shift) / count


def rotation(angles: Tensor) -> Tensor:
    """Return the matrix that turns [sin x, cos x] into [sin(x + angle), cos(x + angle)]."""
    cosine, sine = torch.diag(angles.cos()), torch.diag(angles.sin())
    return torch.cat([torch.cat([cosine, sine], 1), torch.cat([-sine, cosine], 1)])


@torch.no_grad()
def write_counted(model: MaskedLanguageModel, counted: Cooccurrence, mask_token_id: int) -> None:
    """Write the factorized counts into a model that is initialized, in place."""
    config, embeddings, std = model.config, model.encoder.embeddings, model.config.initializer_range
    D, W = config.hidden_size, counted.words.shape[1]
    words, frequencies = torch.from_numpy(counted.words), torch.from_numpy(counted.frequencies)
    scale = std / math.sqrt(float((words.square().sum(1) * frequencies).sum()) / W)
    embeddings.word.weight.zero_()
    embeddings.word.weight[:, :W] = words * scale
    embeddings.word.weight[[mask_token_id, config.pad_token_id]] = 0
    embeddings.segment.weight.zero_()
    omega = position_frequencies((D - W) // 2)
    angles = torch.arange(config.max_position_embeddings)[:, None] * omega
    embeddings.position.weight.zero_()
    embeddings.position.weight[:, W:] = std * math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], 1)
    for layer in model.encoder.layers:
        assert isinstance(layer, Layer)
        layer.down.weight.mul_(DEPTH_SCALE)
        layer.attention.out.weight.mul_(DEPTH_SCALE)
    _write_heads(model, torch.from_numpy(counted.matrices) / scale**2, frequencies, omega)
    model.head.dense.weight.mul_(DENSE_NOISE).add_(torch.eye(D))
    model.head.dense.bias.fill_(DENSE_BIAS)


def _write_heads(model: MaskedLanguageModel, matrices: Tensor, frequencies: Tensor, omega: Tensor) -> None:
    """Let each head of the first layer attend to an offset, and add what the token there says about its neighbour.

    Heads of the same offset share the singular directions of its matrix, the largest ones first.
    """
    config, layer = model.config, model.encoder.layers[0]
    assert isinstance(layer, Layer)
    D, H, P = config.hidden_size, config.num_attention_heads, 2 * len(omega)
    K, W = D // H, D - P
    lengths = model.encoder.embeddings.word.weight.square().sum(1)
    position_length = P * config.initializer_range**2
    mean_length = float((lengths * frequencies).sum()) + position_length
    # The layer norm multiplies by √D / length; a masked token has the length of its position alone.
    product = D / math.sqrt(mean_length * position_length) * position_length
    gain = math.sqrt(PEAK * math.sqrt(K) / product)
    q, k, v = layer.attention.qkv.weight.view(3, H, K, D)
    out = layer.attention.out.weight.view(D, H, K)
    offsets = head_offsets(config)
    for index, offset in enumerate(offsets):
        left, singular, right = torch.linalg.svd(matrices[index])
        for part, head in enumerate(range(index, H // len(offsets) * len(offsets), len(offsets))):
            directions = slice(part * K, min((part + 1) * K, W))
            root, count = singular[directions].sqrt(), len(singular[directions])
            for weight in (q, k, v):
                weight[head] = 0
            out[:, head] = 0
            q[head, :P, W:] = gain * rotation(omega * offset)
            k[head, :P, W:] = gain * torch.eye(P)
            v[head, :count, :W] = root[:, None] * right[directions]
            out[:W, head, :count] = left[:, directions] * root
    _scale_values(model, v, out, math.sqrt(D / mean_length), frequencies, len(offsets))


def _scale_values(
    model: MaskedLanguageModel, v: Tensor, out: Tensor, norm: float, frequencies: Tensor, num_offsets: int
) -> None:
    """Scale values and output so that what the heads add has ATTENTION_RMS, if contexts were independent."""
    H = model.config.num_attention_heads
    words = model.encoder.embeddings.word.weight * norm  # (V,D)
    square = torch.zeros(())
    for index in range(num_offsets):
        heads = range(index, H // num_offsets * num_offsets, num_offsets)
        added = sum(words @ v[head].T @ out[:, head].T for head in heads)
        square += (added.square().mean(1) * frequencies).sum()
    factor = math.sqrt(ATTENTION_RMS / float(square.sqrt()))
    used = H // num_offsets * num_offsets
    v[:used] *= factor
    out[:, :used] *= factor


@torch.no_grad()
def calibrate(model: MaskedLanguageModel, inputs: tuple[Tensor, ...], labels: Tensor) -> float:
    """Set the gain of the head's layer norm to that with the lowest loss on masked text; return that loss.

    `inputs` are those of the model; `labels` (B,P) are negative where nothing is predicted.
    """
    head = model.head
    hidden = model.encoder(*inputs[:3], None, inputs[3])[labels >= 0]  # (N,D)
    scores = head.norm(head.activation(head.dense(hidden))) @ model.encoder.embeddings.word.weight.T
    losses = {
        gain: float(torch.nn.functional.cross_entropy(gain * scores + head.bias, labels[labels >= 0]))
        for gain in np.geomspace(0.25, 8, 21).tolist()
    }
    best = min(losses, key=lambda gain: losses[gain])
    head.norm.weight.fill_(best)
    return losses[best]
