"""Masked language modelling: which tokens are hidden, by what, and what is to be predicted.

Devlin et al. 2018, section 3.1: of the chosen tokens 80 % become [MASK], 10 % a random token, 10 % stay.
Everything is a pure function of its arguments, so that a batch can be made again at any time.
"""

# Shapes: R rows, T positions of a row, P prediction slots of a row.
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bertlite.config.settings import MaskingSettings
from bertlite.core.random import map_to_range, philox, split64

IGNORED = -100  # the label of a prediction slot that is not used, as in torch and transformers


class Vocabulary(NamedTuple):
    """What masking has to know of a tokenizer."""

    size: int
    mask_id: int
    special_ids: NDArray[np.int64]
    ordinary_ids: NDArray[np.int64]  # all the others


def choose_tokens(
    maskable: NDArray[np.bool_], count: NDArray[np.int64], random: NDArray[np.uint64], begins_word: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Every maskable token has the same chance (Devlin et al. 2018, section 3.1)."""
    order = np.argsort(np.where(maskable, random, LAST), axis=1, kind="stable")
    chosen = np.zeros_like(maskable)
    np.put_along_axis(chosen, order, np.arange(maskable.shape[1]) < count[:, None], axis=1)
    return chosen


def choose_whole_words(
    maskable: NDArray[np.bool_], count: NDArray[np.int64], random: NDArray[np.uint64], begins_word: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Whole words in random order while they fit the count; a row may get fewer, by less than one word.

    Google's whole word masking (github.com/google-research/bert, May 2019); for Chinese, Cui et al. 2019.
    """
    word = np.cumsum(begins_word | ~maskable, axis=1, dtype=np.int64)  # (R,T), the number of the word in its row
    score = np.take_along_axis(random, np.maximum.accumulate(  # that of the word's first token
        np.where(np.diff(word, axis=1, prepend=-1) > 0, np.arange(word.shape[1]), 0), axis=1), axis=1)  # fmt: skip
    order = np.lexsort((word, np.where(maskable, score, LAST)), axis=1)  # words by score, their tokens together
    ordered = np.take_along_axis(np.where(maskable, word, 0), order, axis=1)
    ends = np.diff(ordered, axis=1, append=-1) != 0  # the last token of each word, in this order
    at = np.arange(word.shape[1])
    size_up_to_end = np.minimum.accumulate(np.where(ends, at + 1, len(at) + 1)[:, ::-1], axis=1)[:, ::-1]
    chosen = np.zeros_like(maskable)
    np.put_along_axis(chosen, order, size_up_to_end <= count[:, None], axis=1)
    return chosen & maskable


LAST = np.uint64(1) << np.uint64(32)  # sorts behind all random numbers

# A strategy takes maskable (R,T), the number of tokens to choose in each row (R,), one random number for every token
# (R,T) and where words begin (R,T), and returns the chosen tokens (R,T); it may choose fewer, never more.
STRATEGIES = {"token": choose_tokens, "whole-word": choose_whole_words}


def max_predictions(length: int, masking: MaskingSettings) -> int:
    """The predictions that a row of `length` positions may need, at the highest rate, if it is one document."""
    return max(1, round(max(masking.schedule().start, masking.schedule().end) * (length - 2)))


def mask_tokens(
    ids: NDArray[np.int64],
    begins_word: NDArray[np.bool_],
    samples: NDArray[np.int64],
    vocabulary: Vocabulary,
    strategy: str,
    rates: NDArray[np.float64],
    slots: int,
    key: tuple[int, int],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Mask rows of token ids (R,T); row i is sample number `samples[i]` of the stream that `key` names.

    Returns the input ids (R,T), and the positions (R,P) and labels (R,P) of what is to be predicted, P = `slots`. Of
    each row `round(rate × maskable tokens)` are chosen; slots left over point at position 0 with label IGNORED.
    """
    low, high = split64(samples)
    random = philox(key, (np.arange(ids.shape[1]), low[:, None], high[:, None], 0))  # (R,T,4)
    maskable = ~np.isin(ids, vocabulary.special_ids)
    count = np.minimum(np.rint(rates * maskable.sum(1)), slots).astype(np.int64)
    chosen = STRATEGIES[strategy](maskable, count, random[..., 0], begins_word)

    tenth = map_to_range(random[..., 1], 10)
    random_ids = vocabulary.ordinary_ids[map_to_range(random[..., 2], len(vocabulary.ordinary_ids))]
    inputs = np.select([chosen & (tenth < 8), chosen & (tenth == 8)], [vocabulary.mask_id, random_ids], ids)

    positions = np.argsort(~chosen, axis=1, kind="stable")[:, :slots]  # the chosen ones first, in their order
    used = np.take_along_axis(chosen, positions, axis=1)
    labels = np.where(used, np.take_along_axis(ids, positions, axis=1), IGNORED)
    return inputs, np.where(used, positions, 0), labels
