"""Masked language modelling: choose tokens, replace them, and keep the originals as labels.

Of the chosen tokens, 80 % become [MASK], 10 % a random token, and 10 % stay (Devlin et al. 2018, section 3.1).
All functions are pure, so that a batch can be recomputed at any time.
"""

# Shapes: B sequences, T positions, P predictions per sequence.
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bertlite.config.settings import MaskingSettings
from bertlite.core.random import map_to_range, philox, split64

IGNORED = -100  # the label where nothing is predicted, as in torch and transformers
LAST = np.uint64(1) << np.uint64(32)  # sorts after all 32-bit random numbers


class Vocabulary(NamedTuple):
    """What masking needs to know about a tokenizer."""

    size: int
    mask_id: int
    special_ids: NDArray[np.int64]
    ordinary_ids: NDArray[np.int64]  # all the others


def choose_tokens(
    maskable: NDArray[np.bool_], counts: NDArray[np.int64], random: NDArray[np.uint64], word_starts: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Choose tokens, each maskable one with the same probability (Devlin et al. 2018, section 3.1)."""
    order = np.argsort(np.where(maskable, random, LAST), axis=1, kind="stable")
    chosen = np.zeros_like(maskable)
    np.put_along_axis(chosen, order, np.arange(maskable.shape[1]) < counts[:, None], axis=1)
    return chosen


def choose_whole_words(
    maskable: NDArray[np.bool_], counts: NDArray[np.int64], random: NDArray[np.uint64], word_starts: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Choose whole words, in random order, until the next one would exceed the count.

    A sequence may get fewer tokens than its count, by less than one word. Google's whole word masking
    (github.com/google-research/bert, May 2019); for Chinese, Cui et al. 2019.

    Example, with a count of 3. A word takes the random number of its first token:

        tokens                             [CLS]   un   ##common   words   ,
        word_ids                             1      2      2         3     4
        word_random                          -      9      9         5     7
        in order                           words    ,     un   ##common   [CLS]
        tokens up to the end of the word     1      2      4       4        5

    "words" and "," are chosen; "uncommon" would make 4 tokens.
    """
    T = maskable.shape[1]
    positions = np.arange(T)
    word_ids = np.cumsum(word_starts | ~maskable, axis=1, dtype=np.int64)
    is_first_token = np.diff(word_ids, axis=1, prepend=-1) > 0
    first_positions = np.maximum.accumulate(np.where(is_first_token, positions, 0), axis=1)
    word_random = np.take_along_axis(random, first_positions, axis=1)
    order = np.lexsort((word_ids, np.where(maskable, word_random, LAST)), axis=1)

    ordered_word_ids = np.take_along_axis(np.where(maskable, word_ids, 0), order, axis=1)
    is_last_token = np.diff(ordered_word_ids, axis=1, append=-1) != 0
    word_ends = np.where(is_last_token, positions + 1, T + 1)
    tokens_up_to_end = np.minimum.accumulate(word_ends[:, ::-1], axis=1)[:, ::-1]
    chosen = np.zeros_like(maskable)
    np.put_along_axis(chosen, order, tokens_up_to_end <= counts[:, None], axis=1)
    return chosen & maskable


# A strategy takes which tokens may be masked (B,T), the number to choose per sequence (B,), a random number for each
# token (B,T) and where words start (B,T). It returns the chosen tokens (B,T), at most that number.
STRATEGIES = {"token": choose_tokens, "whole-word": choose_whole_words}


def max_predictions(sequence_length: int, masking: MaskingSettings) -> int:
    """Return how many predictions a sequence may need: of one document, at the highest rate of the run."""
    highest_rate = max(masking.schedule().start, masking.schedule().end)
    return max(1, round(highest_rate * (sequence_length - 2)))


def mask_tokens(
    ids: NDArray[np.int64],
    word_starts: NDArray[np.bool_],
    samples: NDArray[np.int64],
    vocabulary: Vocabulary,
    strategy: str,
    rates: NDArray[np.float64],
    num_predictions: int,
    key: tuple[int, int],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Mask `round(rate × maskable tokens)` tokens of each sequence of `ids` (B,T).

    Random numbers depend on `key` and the sequence's sample number (B,). Returns the input ids (B,T), and the positions
    and labels (B,P) of the predictions, P = `num_predictions`; unused ones have position 0 and the label IGNORED.
    """
    low, high = split64(samples)
    random = philox(key, (np.arange(ids.shape[1]), low[:, None], high[:, None], 0))  # (B,T,4)
    maskable = ~np.isin(ids, vocabulary.special_ids)
    counts = np.minimum(np.rint(rates * maskable.sum(1)), num_predictions).astype(np.int64)
    chosen = STRATEGIES[strategy](maskable, counts, random[..., 0], word_starts)

    tenth = map_to_range(random[..., 1], 10)
    random_ids = vocabulary.ordinary_ids[map_to_range(random[..., 2], len(vocabulary.ordinary_ids))]
    inputs = np.select([chosen & (tenth < 8), chosen & (tenth == 8)], [vocabulary.mask_id, random_ids], ids)

    positions = np.argsort(~chosen, axis=1, kind="stable")[:, :num_predictions]  # chosen tokens first, in their order
    used = np.take_along_axis(chosen, positions, axis=1)
    labels = np.where(used, np.take_along_axis(ids, positions, axis=1), IGNORED)
    return inputs, np.where(used, positions, 0), labels
