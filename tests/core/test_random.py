"""Philox against its authors' vectors; permutations and draws against what chance allows."""

from itertools import combinations

import numpy as np
import pytest
from chance import assert_uniform
from hypothesis import given, settings
from hypothesis import strategies as st

from bertlite.core import random as philox_module
from bertlite.core.random import (
    EPOCH_ORDER,
    PACKING,
    SOURCE_ORDER,
    TRAINING_MASKS,
    choose_validation,
    draw_uint32,
    map_to_range,
    permute,
    philox,
    split64,
)

WORD = st.integers(0, 2**32 - 1)
PURPOSES = {name: value for name, value in vars(philox_module).items() if name.isupper() and not name.startswith("_")}


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ("00000000 00000000", "00000000 00000000 00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff", "ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("a4093822 299f31d0", "243f6a88 85a308d3 13198a2e 03707344", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(key, counter, expected):
    key, counter, expected = ([int(word, 16) for word in words.split()] for words in (key, counter, expected))
    assert philox(tuple(key), tuple(counter)).tolist() == expected


@given(key=st.tuples(WORD, WORD), counters=st.lists(st.tuples(WORD, WORD, WORD, WORD), min_size=1, max_size=20))
def test_many_counters_at_once_equal_one_at_a_time(key, counters):
    together = philox(key, tuple(np.array(counters).T))
    assert together.dtype == np.uint64 and together.shape == (len(counters), 4)
    assert together.tolist() == [philox(key, counter).tolist() for counter in counters]


def test_counters_broadcast():
    grid = philox((1, 2), (np.arange(5), np.arange(3)[:, None], 7, 8))
    assert grid.shape == (3, 5, 4)
    assert grid[2, 4].tolist() == philox((1, 2), (4, 2, 7, 8)).tolist()


def test_every_word_of_key_and_counter_matters():
    numbers = [philox((0, 0), (0, 0, 0, 0))]
    numbers += [philox((0, 0), tuple(np.eye(4, dtype=int)[word])) for word in range(4)]
    numbers += [philox((1, 0), (0, 0, 0, 0)), philox((0, 1), (0, 0, 0, 0))]
    assert len({tuple(number.tolist()) for number in numbers}) == 7


@given(value=st.integers(0, 2**63 - 1))
def test_64_bits_are_split_without_loss(value):
    low, high = split64(value)
    assert int(low) < 2**32 and int(high) < 2**32
    assert int(low) + (int(high) << 32) == value


@given(random=st.lists(WORD, max_size=20), limit=st.integers(1, 2**20))
def test_map_to_range_is_the_number_scaled_and_rounded_down(random, limit):
    assert map_to_range(np.array(random, dtype=np.uint64), limit).tolist() == [
        number * limit // 2**32 for number in random
    ]


@given(limit=st.integers(1, 2**20))
def test_map_to_range_reaches_both_ends(limit):
    assert map_to_range(np.array([0, 2**32 - 1], dtype=np.uint64), limit).tolist() == [0, limit - 1]


@pytest.mark.parametrize("limit", [2, 3, 10, 1000])
@pytest.mark.parametrize("word", range(4))
def test_map_to_range_is_uniform(limit, word):
    random = philox((3, TRAINING_MASKS), (np.arange(100_000), 0, 0, 0))[:, word]
    assert_uniform(np.bincount(map_to_range(random, limit), minlength=limit))


@settings(deadline=None)
@given(size=st.integers(1, 5000), seed=WORD, epoch=st.integers(0, 2**40))
def test_every_permutation_is_a_bijection(size, seed, epoch):
    index = np.arange(size)
    order = permute(index, size, (seed, EPOCH_ORDER), np.full(size, epoch))
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), index)
    assert np.array_equal(index, np.arange(size)), "the argument was changed"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 255, 256, 257, 4096, 4097, 100_000])
def test_sizes_near_powers_of_two_are_bijections(size):
    assert np.array_equal(np.sort(permute(np.arange(size), size, (5, EPOCH_ORDER), 9)), np.arange(size))


@settings(deadline=None)
@given(data=st.data(), size=st.integers(1, 1000), key=st.tuples(WORD, WORD))
def test_a_permutation_does_not_depend_on_how_indexes_are_grouped(data, size, key):
    """One call over several epochs equals calls for any of its indices, in any order."""
    samples = np.arange(3 * size)
    whole = permute(samples % size, size, key, samples // size)
    chosen = np.array(data.draw(st.lists(st.integers(0, 3 * size - 1), min_size=1, max_size=30)))
    assert np.array_equal(permute(chosen % size, size, key, chosen // size), whole[chosen])


@pytest.mark.parametrize("size", [64, 100, 1000])
def test_epochs_seeds_and_purposes_give_other_orders(size):
    index = np.arange(size)
    epochs = (0, 1, 2, 2**31, 2**32, 2**32 + 1, 2**40)
    keys = [(0, EPOCH_ORDER), (1, EPOCH_ORDER), (2**32 - 1, EPOCH_ORDER), (0, SOURCE_ORDER)]
    orders = [permute(index, size, key, epoch) for key in keys for epoch in epochs]
    for number, order in enumerate(orders):
        for other in [*orders[:number], index]:
            assert (order == other).mean() < 0.2


@pytest.mark.parametrize("size", [3, 7, 10, 64, 100])
def test_every_position_is_equally_likely_over_the_epochs(size):
    epochs = 200 * size
    for element in (0, size // 2, size - 1):
        positions = permute(np.full(epochs, element), size, (11, EPOCH_ORDER), np.arange(epochs))
        assert_uniform(np.bincount(positions, minlength=size))


@pytest.mark.parametrize("size", [10, 64, 100, 1000])
def test_neighbours_end_up_any_distance_apart(size):
    """Four rounds leave a trace in small tables; half to twice the expected count is enough to shuffle sequences."""
    epochs = 200 * size
    first, second = (permute(np.full(epochs, element), size, (0, EPOCH_ORDER), np.arange(epochs)) for element in (4, 5))
    counts = np.bincount((second - first) % size, minlength=size)[1:]
    expected = epochs / (size - 1)
    assert expected / 2 < counts.min() and counts.max() < expected * 2


def test_no_two_purposes_share_numbers():
    assert len(PURPOSES) == 8
    counter = (np.arange(1000), 0, 0, 0)
    streams = [philox((0, purpose), counter) for purpose in PURPOSES.values()]
    for first, second in combinations(streams, 2):
        assert not (first == second).any()


def test_draws_do_not_depend_on_how_they_are_grouped():
    parts = [
        draw_uint32(count, (3, PACKING), 1, first) for first, count in ((5, 65_000), (65_005, 70_000), (135_005, 1))
    ]
    assert np.array_equal(draw_uint32(135_001, (3, PACKING), 1, 5), np.concatenate(parts))


def test_a_seed_means_the_same_in_every_version():
    """Otherwise a run that a newer version resumes would see other text and another validation split."""
    assert permute(np.arange(10), 10, (7, EPOCH_ORDER), 3).tolist() == [2, 5, 9, 8, 0, 3, 6, 7, 1, 4]
    few = [permute(np.arange(size), size, (0, EPOCH_ORDER), 1).tolist() for size in (2, 3, 4)]
    assert few == [[1, 0], [2, 0, 1], [3, 0, 1, 2]]
    epochs = np.repeat([0, 1, 2, 3], 5)
    order = [16, 8, 19, 2, 7, 8, 9, 18, 1, 6, 6, 7, 16, 17, 5, 5, 12, 16, 3, 0]
    assert permute(np.arange(20), 20, (0, SOURCE_ORDER), epochs).tolist() == order
    assert np.flatnonzero(choose_validation(40, 0.1)).tolist() == [2, 14, 29, 37]
    assert draw_uint32(3, (1, PACKING), 5, 2).tolist() == [375845274, 1999634829, 481803444]
