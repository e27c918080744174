"""Masked language modelling: which tokens are hidden, by what, and what is to be predicted.

Devlin et al. 2018, section 3.1: of the chosen tokens 80 % become [MASK], 10 % a random token, 10 % stay.
Everything is a pure function of its arguments, so that a batch can be made again at any time.
"""

# Shapes: R rows, T positions of a row, P prediction slots of a row.
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bertlite.philox import below, philox, split64

IGNORED = -100  # the label of a prediction slot that is not used, as in torch and transformers


class Vocabulary(NamedTuple):
    """What masking has to know of a tokenizer."""

    size: int
    mask_id: int
    special_ids: NDArray[np.int64]
    ordinary_ids: NDArray[np.int64]  # all the others


def choose_tokens(maskable: NDArray[np.bool_], count: NDArray[np.int64], random: NDArray[np.uint64]) -> NDArray:
    """Every maskable token has the same chance (Devlin et al. 2018, section 3.1)."""
    order = np.argsort(np.where(maskable, random, np.uint64(1) << np.uint64(32)), axis=1, kind="stable")
    chosen = np.zeros_like(maskable)
    np.put_along_axis(chosen, order, np.arange(maskable.shape[1]) < count[:, None], axis=1)
    return chosen


# A strategy takes maskable (R,T), the number of tokens to choose in each row (R,) and one random number for every
# token (R,T), and returns the chosen tokens (R,T); it may choose fewer, never more.
STRATEGIES = {"token": choose_tokens}


def prediction_slots(length: int, rate: float) -> int:
    """How many predictions a row of `length` positions may need: one document, so [CLS] and [SEP] stay."""
    return max(1, round(rate * (length - 2)))


def mask_rows(
    ids: NDArray[np.int64],
    samples: NDArray[np.int64],
    vocabulary: Vocabulary,
    strategy: str,
    rate: float,
    key: tuple[int, int],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Mask rows of token ids (R,T); row i is sample number `samples[i]` of the stream that `key` names.

    Returns the input ids (R,T), and the positions (R,P) and labels (R,P) of what is to be predicted. Of each row
    `round(rate × maskable tokens)` are chosen; slots that are left over point at position 0 with label IGNORED.
    """
    length = ids.shape[1]
    low, high = split64(samples)
    random = philox(key, (np.arange(length), low[:, None], high[:, None], 0))  # (R,T,4)
    maskable = ~np.isin(ids, vocabulary.special_ids)
    count = np.rint(rate * maskable.sum(1)).astype(np.int64)
    chosen = STRATEGIES[strategy](maskable, count, random[..., 0])

    replacement = np.where(
        below(random[..., 1], 10) == 8,
        vocabulary.ordinary_ids[below(random[..., 2], len(vocabulary.ordinary_ids))],
        ids,
    )
    replacement = np.where(below(random[..., 1], 10) < 8, vocabulary.mask_id, replacement)
    inputs = np.where(chosen, replacement, ids)

    slots = prediction_slots(length, rate)
    positions = np.argsort(~chosen, axis=1, kind="stable")[:, :slots]  # the chosen ones first, in their order
    used = np.take_along_axis(chosen, positions, axis=1)
    labels = np.where(used, np.take_along_axis(ids, positions, axis=1), IGNORED)
    return inputs, np.where(used, positions, 0), labels
