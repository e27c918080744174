"""Random numbers as a pure function of a key and a counter: the same on every machine, in any order.

Philox4x32-10 of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", over numpy arrays. It is implemented
here because numpy does not promise the same numbers in all its versions, and its Philox takes no arrays of counters.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Purposes of random numbers: the second word of the key. Two purposes never share numbers.
VALIDATION_SPLIT = 0
PACKING = 1
EPOCH_ORDER = 2
SOURCE_ORDER = 3
TRAINING_MASKS = 4
EVALUATION_MASKS = 5
DROPOUT = 6
TOKENIZER_SAMPLE = 7

_CHUNK_SIZE = 1 << 16  # numbers computed at once: philox takes about ten times the memory of its result

_LOW_32_BITS = np.uint64(0xFFFFFFFF)
_32_BITS = np.uint64(32)


def philox(key: tuple[int, int], counter: tuple[NDArray[Any] | int, ...]) -> NDArray[np.uint64]:
    """Return four 32-bit numbers, as uint64, for every counter.

    `counter` is four integers or arrays below 2**32 that broadcast to one shape; the result has that shape plus (4,).
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint64) for word in counter))
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _LOW_32_BITS, (k1 + np.uint64(0xBB67AE85)) & _LOW_32_BITS
    return np.stack([c0, c1, c2, c3], axis=-1)


def split64(value: NDArray[Any] | int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Split 64-bit numbers into their low and high 32 bits."""
    value = np.asarray(value, dtype=np.uint64)
    return value & _LOW_32_BITS, value >> _32_BITS


def draw_uint32(count: int, key: tuple[int, int], epoch: int = 0, first: int = 0) -> NDArray[np.uint64]:
    """Return the 32-bit random numbers, as uint64, of the indices `first` to `first + count`."""
    numbers = np.empty(count, np.uint64)
    for start in range(0, count, _CHUNK_SIZE):
        end = min(start + _CHUNK_SIZE, count)
        numbers[start:end] = philox(key, (*split64(np.arange(first + start, first + end)), epoch, 0))[:, 0]
    return numbers


def map_to_range(numbers: NDArray[np.uint64], limit: int) -> NDArray[np.int64]:
    """Map 32-bit random numbers to integers in [0, limit), for limits far below 2**32."""
    return ((numbers * np.uint64(limit)) >> _32_BITS).astype(np.int64)


def choose_validation(count: int, fraction: float) -> NDArray[np.bool_]:
    """Choose which of `count` documents or examples are for validation, each with probability `fraction`.

    The choice is the same every time. Of two or more, at least one is chosen and at least one is not.
    """
    numbers = draw_uint32(count, (0, VALIDATION_SPLIT))
    is_validation = numbers < np.uint64(fraction * 2**32)
    is_validation[np.argmin(numbers)] = True
    is_validation[np.argmax(numbers)] = False
    return is_validation


def permute(index: NDArray[np.int64], size: int, key: tuple[int, int], epoch: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the positions of `index` in a random permutation of `size` elements, a different one in each epoch.

    Each position is computed by a four-round Feistel network over Philox (Luby and Rackoff 1988), which permutes a
    power of four, at least `size`. Larger results are permuted again (cycle walking, Black and Rogaway 2002).
    """
    half_bits = max(1, (int(size - 1).bit_length() + 1) // 2)
    half_mask = np.uint64((1 << half_bits) - 1)
    value = np.asarray(index, dtype=np.uint64).copy()
    epoch = np.broadcast_to(np.asarray(epoch, dtype=np.uint64), value.shape)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        left, right = value[outside] >> np.uint64(half_bits), value[outside] & half_mask
        for feistel_round in range(4):
            mixed = philox(key, (right, feistel_round, *split64(epoch[outside])))[..., 0]
            left, right = right, left ^ (mixed & half_mask)
        value[outside] = (left << np.uint64(half_bits)) | right
        outside = value >= np.uint64(size)
    return value.astype(np.int64)


def _multiply(factor: int, words: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the high and the low 32 bits of `factor * words`."""
    product = words * np.uint64(factor)
    return product >> _32_BITS, product & _LOW_32_BITS
