"""Random numbers as a pure function of a key and a counter: the same on every machine, in any order.

Philox4x32-10 of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", over numpy arrays. It is
written out because numpy promises no stable streams between its versions, and its own Philox has no vector of counters.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# What a stream of numbers is for. Two purposes never share numbers.
VALIDATION_SPLIT, PACKING, EPOCH_ORDER, SOURCE_ORDER, TRAINING_MASKS, EVALUATION_MASKS, DROPOUT, TOKENIZER_SAMPLE = (
    range(8)
)

_AT_A_TIME = 1 << 16  # numbers at a time: philox takes some ten times the memory of its result

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(key: tuple[int, int], counter: tuple[NDArray[Any] | int, ...]) -> NDArray[np.uint64]:
    """Four 32-bit numbers, as uint64, for every counter.

    `counter` is four integers or arrays below 2**32 that broadcast to one shape; the result has that shape plus (4,).
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint64) for word in counter))
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _LOW, (k1 + np.uint64(0xBB67AE85)) & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1)


def split64(value: NDArray[Any] | int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The low and the high 32 bits of 64-bit counters."""
    value = np.asarray(value, dtype=np.uint64)
    return value & _LOW, value >> _SHIFT


def draw_uint32(count: int, key: tuple[int, int], epoch: int = 0, first: int = 0) -> NDArray[np.uint64]:
    """A 32-bit random number for each of the things `first` to `first + count`."""
    result = np.empty(count, np.uint64)
    for at in range(0, count, _AT_A_TIME):
        numbers = np.arange(first + at, first + min(at + _AT_A_TIME, count))
        result[at : at + _AT_A_TIME] = philox(key, (*split64(numbers), epoch, 0))[:, 0]
    return result


def choose_validation(count: int, share: float) -> NDArray[np.bool_]:
    """Which of `count` things are kept apart: each with the same chance, the same every time; of two or more not none
    and not all."""
    random = draw_uint32(count, (0, VALIDATION_SPLIT))
    apart = random < np.uint64(share * 2**32)
    apart[np.argmin(random)] = True
    apart[np.argmax(random)] = False
    return apart


def map_to_range(random: NDArray[np.uint64], limit: int) -> NDArray[np.int64]:
    """Map 32-bit random numbers to integers in [0, limit), for limits far below 2**32."""
    return ((random * np.uint64(limit)) >> _SHIFT).astype(np.int64)


def permute(index: NDArray[np.int64], size: int, key: tuple[int, int], epoch: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where a shuffle of `size` things, another one each epoch, puts `index`; no table is kept.

    A four-round Feistel network over Philox (Luby and Rackoff 1988) on the next power of four, walked until it
    falls below `size` (Black and Rogaway 2002).
    """
    half = max(1, (int(size - 1).bit_length() + 1) // 2)
    low_mask = np.uint64((1 << half) - 1)
    value = np.asarray(index, dtype=np.uint64).copy()
    epoch = np.broadcast_to(np.asarray(epoch, dtype=np.uint64), value.shape)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        left, right = value[outside] >> np.uint64(half), value[outside] & low_mask
        for turn in range(4):
            mixed = philox(key, (right, turn, *split64(epoch[outside])))[..., 0]
            left, right = right, left ^ (mixed & low_mask)
        value[outside] = (left << np.uint64(half)) | right
        outside = value >= np.uint64(size)
    return value.astype(np.int64)


def _multiply(factor: int, words: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    product = words * np.uint64(factor)
    return product >> _SHIFT, product & _LOW
