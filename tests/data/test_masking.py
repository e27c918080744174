"""Masking: what is chosen, what replaces it, what is predicted, and that it can be recomputed."""

import numpy as np
import pytest
from chance import assert_uniform
from hypothesis import given, settings
from hypothesis import strategies as st

from bertlite.config.settings import MaskingSettings
from bertlite.data.masking import IGNORED, STRATEGIES, Vocabulary, choose_whole_words, mask_tokens, max_predictions

# Special ids lie at both ends and in between, so that nothing can rely on where they are.
PAD, CLS, UNK, SEP, MASK = SPECIAL = [0, 3, 17, 40, 63]
VOCABULARY = Vocabulary(64, MASK, np.array(SPECIAL), np.setdiff1d(np.arange(64), SPECIAL))
WORD = st.integers(0, 2**32 - 1)
RATE = st.floats(0.01, 0.99)


@st.composite
def packed_sequences(draw, length=None):
    """Sequences (B,T) of documents `[CLS] … [SEP]` and padding; some words are [UNK] or [MASK]."""
    length = length or draw(st.integers(8, 80))
    randomness = np.random.default_rng(draw(WORD))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        row: list[int] = []
        for _ in range(draw(st.integers(0, 6))):
            room = length - len(row) - 2
            if room < 1:
                break
            words = draw(st.integers(1, room))
            text = randomness.choice(VOCABULARY.ordinary_ids, words)
            odd = randomness.random(words) < 0.1
            row += [CLS, *np.where(odd, randomness.choice([UNK, MASK], words), text), SEP]
        rows.append(row + [PAD] * (length - len(row)))
    return np.array(rows, dtype=np.int64)


def random_word_starts(ids, seed, share=0.5):
    """Random word starts (B,T), also at special tokens and missing behind them, as in a split document."""
    return np.random.default_rng(seed).random(ids.shape) < share


def masked(ids, samples, strategy, rate, key, word_starts=None):
    """Mask at one rate, with as many predictions as it may need; every token is a word by default."""
    word_starts = np.ones(ids.shape, dtype=bool) if word_starts is None else word_starts
    num_predictions = max_predictions(ids.shape[1], MaskingSettings(rate=rate))
    return mask_tokens(ids, word_starts, samples, VOCABULARY, strategy, np.full(len(ids), rate), num_predictions, key)


def chosen_tokens(positions, labels, length):
    """Which tokens (B,T) are to be predicted."""
    chosen = np.zeros((len(positions), length), dtype=int)
    for row, position in zip(*np.nonzero(labels != IGNORED), strict=True):
        chosen[row, positions[row, position]] += 1
    assert chosen.max(initial=0) <= 1, "a token is to be predicted twice"
    return chosen.astype(bool)


def many_sequences(count, words, strategy="token", rate=0.15, seed=0, word_starts=None):
    """Mask `count` sequences of the same words; return the ids and what `mask_tokens` returns."""
    ids = np.tile(np.array(words, dtype=np.int64), (count, 1))
    word_starts = None if word_starts is None else np.tile(word_starts, (count, 1))
    return ids, *masked(ids, np.arange(count), strategy, rate, (seed, 3), word_starts)


def assert_share(count, total, share):
    """A binomial count within five standard deviations."""
    assert abs(count - total * share) < 5 * np.sqrt(total * share * (1 - share)), (count / total, share)


def find_words(maskable, word_starts):
    """Positions of the tokens of each word: it ends before a token that is not maskable or begins another word."""
    words: list[list[int]] = []
    inside = False
    for position in range(len(maskable)):
        if maskable[position] and inside and not word_starts[position]:
            words[-1].append(position)
        elif maskable[position]:
            words.append([position])
        inside = maskable[position]
    return words


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(deadline=None)
@given(ids=packed_sequences(), rate=st.tuples(RATE, RATE), seed=WORD, first=st.integers(0, 2**40))
def test_every_sequence_is_masked_correctly(strategy, ids, rate, seed, first):
    """Also where each sequence has its own rate."""
    word_starts, samples = random_word_starts(ids, seed), np.arange(first, first + len(ids))
    rates = np.linspace(*rate, len(ids))
    length = ids.shape[1]
    num_predictions = max_predictions(length, MaskingSettings(rate={"start": rate[0], "end": rate[1]}))
    arguments = ids, word_starts, samples, rates
    before = [argument.copy() for argument in arguments]
    inputs, positions, labels = mask_tokens(*arguments[:3], VOCABULARY, strategy, rates, num_predictions, (seed, 3))
    assert all(map(np.array_equal, arguments, before)), "an argument was changed"
    assert inputs.shape == ids.shape and inputs.dtype == positions.dtype == labels.dtype == np.int64
    assert positions.shape == labels.shape == (len(ids), num_predictions)
    assert positions.min() >= 0 and positions.max() < length

    used = labels != IGNORED
    chosen = chosen_tokens(positions, labels, length)
    special = np.isin(ids, SPECIAL)
    assert not (chosen & special).any(), "a special token is to be predicted"
    assert np.array_equal(labels[used], np.take_along_axis(ids, positions, axis=1)[used]), "labels are the originals"
    assert not positions[~used].any(), "unused predictions have position 0"
    assert np.array_equal(inputs[~chosen], ids[~chosen]), "what is not chosen stays"
    assert np.isin(inputs[chosen], [MASK, *VOCABULARY.ordinary_ids]).all(), "a special token came in"

    budget = [round(rate * count) for rate, count in zip(rates.tolist(), (~special).sum(1).tolist(), strict=True)]
    if strategy == "token":
        assert np.array_equal(chosen.sum(1), budget)
    else:
        assert (chosen.sum(1) <= budget).all()
        for row in range(len(ids)):
            for word in find_words(~special[row], word_starts[row]):
                assert len(set(chosen[row, word])) == 1, "a word is masked in part"


@pytest.mark.parametrize("length", [32, 512])  # 15 % of both, without [CLS] and [SEP], is a half above a whole number
def test_rounding_never_masks_more_tokens_than_there_are_predictions(length):
    ids = np.full((1, length), VOCABULARY.ordinary_ids[0])
    ids[0, [0, -1]] = SPECIAL[0]
    num_predictions = max_predictions(length, MaskingSettings())
    rates = np.nextafter([0.15], 1)
    inputs, positions, labels = mask_tokens(
        ids, np.ones_like(ids, bool), np.arange(1), VOCABULARY, "token", rates, num_predictions, (0, 3)
    )
    assert set(np.flatnonzero(inputs != ids)) <= set(positions[labels != IGNORED].tolist())
    assert (labels != IGNORED).sum() == num_predictions


@settings(deadline=None)
@given(rate=RATE, length=st.integers(8, 300), data=st.data())
def test_predictions_are_enough_for_any_number_of_documents_in_a_full_sequence(rate, length, data):
    documents = data.draw(st.integers(1, length // 3))
    ends = np.linspace(0, length, documents + 1).astype(int)
    ids = np.full((1, length), 5)
    ids[0, ends[:-1]], ids[0, ends[1:] - 1] = CLS, SEP
    _, positions, labels = masked(ids, np.array([data.draw(WORD)]), "token", rate, (0, 3))
    assert (labels != IGNORED).sum() == round(rate * (length - 2 * documents))
    if documents == 1:  # no prediction is unused
        assert positions.shape[1] == max(1, (labels != IGNORED).sum())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_of_the_chosen_80_percent_become_mask_10_random_10_stay(strategy):
    """Each token for itself: also among the tokens of one word."""
    words = [CLS, *VOCABULARY.ordinary_ids[:50], SEP]
    ids, inputs, positions, labels = many_sequences(10_000, words, strategy, word_starts=np.arange(52) % 2 == 1)
    chosen = chosen_tokens(positions, labels, ids.shape[1])
    total = chosen.sum()
    assert total > 50_000
    same_by_chance = 0.1 / len(VOCABULARY.ordinary_ids)
    assert_share((inputs[chosen] == MASK).sum(), total, 0.8)
    assert_share((inputs[chosen] == ids[chosen]).sum(), total, 0.1 + same_by_chance)
    assert_share(((inputs != ids) & (inputs != MASK))[chosen].sum(), total, 0.1 - same_by_chance)
    # … at every position and whichever of the row's predictions it is
    for position in range(1, 51):
        here = chosen[:, position]
        assert_share((inputs[here, position] == MASK).sum(), here.sum(), 0.8)
    # … and independently of the token before
    both = chosen[:, 1:-2] & chosen[:, 2:-1]
    hidden = (inputs == MASK)[:, 1:-1]
    assert_share((hidden[:, :-1] & hidden[:, 1:])[both].sum(), both.sum(), 0.64)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_random_tokens_are_any_ordinary_token_with_equal_chance(strategy):
    word = int(VOCABULARY.ordinary_ids[7])
    _, inputs, _, _ = many_sequences(20_000, [CLS, *[word] * 30, SEP], strategy)
    counts = np.bincount(inputs[:, 1:-1].ravel(), minlength=VOCABULARY.size)
    assert not counts[[PAD, CLS, UNK, SEP]].any()
    others = np.setdiff1d(VOCABULARY.ordinary_ids, [word])
    assert counts[others].all()
    assert_uniform(counts[others])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_ordinary_token_is_equally_likely_to_be_chosen(strategy):
    """Also beside special tokens, at the ends of a sequence, and in its second document."""
    words = [5, CLS, 6, UNK, 7, 8, SEP, CLS, 9, 10, SEP, 11, PAD, 12]
    ids, _, positions, labels = many_sequences(20_000, words, strategy, rate=0.34)
    chosen = chosen_tokens(positions, labels, ids.shape[1])
    assert_uniform(chosen.sum(0)[~np.isin(words, SPECIAL)])


def test_token_strategy_chooses_every_pair_equally_often():
    """A choice without neighbourhoods: pairs of positions come together as often as drawing without replacement."""
    ids, _, positions, labels = many_sequences(20_000, [CLS, *range(4, 14), SEP], rate=0.2)
    chosen = chosen_tokens(positions, labels, ids.shape[1])[:, 1:-1].astype(int)
    assert (chosen.sum(1) == 2).all()
    together = chosen.T @ chosen
    assert_uniform(together[np.triu_indices(10, k=1)])


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(deadline=None)
@given(ids=packed_sequences(length=24), seed=WORD, first=st.integers(0, 2**40), data=st.data())
def test_the_masks_of_a_sample_do_not_depend_on_the_batch(strategy, ids, seed, first, data):
    samples = np.arange(first, first + len(ids))
    word_starts = random_word_starts(ids, seed)
    whole = masked(ids, samples, strategy, 0.3, (seed, 3), word_starts)
    order = data.draw(st.permutations(range(len(ids))))
    order = np.array(order[: data.draw(st.integers(1, len(ids)))])
    part = masked(ids[order], samples[order], strategy, 0.3, (seed, 3), word_starts[order])
    for all_of_it, of_part in zip(whole, part, strict=True):
        assert np.array_equal(all_of_it[order], of_part)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_samples_seeds_and_purposes_give_other_masks(strategy):
    ids = np.array([[CLS, *VOCABULARY.ordinary_ids[:40], SEP]])
    streams = [(0, (0, 3)), (1, (0, 3)), (2**32, (0, 3)), (0, (1, 3)), (0, (2**32 - 1, 3)), (0, (0, 4))]
    masks = [masked(ids, np.array([sample]), strategy, 0.3, key)[1] for sample, key in streams]
    assert len({positions.tobytes() for positions in masks}) == len(streams)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_samples_choose_independently(strategy):
    """Of 9 tokens chosen among 30, two samples share 2.7 in the mean."""
    words = [CLS, *VOCABULARY.ordinary_ids[:30], SEP]
    ids, _, positions, labels = many_sequences(10_000, words, strategy, rate=0.3)
    chosen = chosen_tokens(positions, labels, ids.shape[1])
    expected = chosen.sum(1).mean() ** 2 / 30
    shared = (chosen[:-1] & chosen[1:]).sum(1).mean()
    assert abs(shared - expected) < 0.1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sequences_without_ordinary_tokens_are_unchanged(strategy):
    ids = np.array([[PAD] * 8, [CLS, UNK, UNK, SEP, CLS, UNK, SEP, PAD], [CLS, MASK, MASK, SEP, PAD, PAD, PAD, PAD]])
    inputs, positions, labels = masked(ids, np.arange(3), strategy, 0.99, (0, 3))
    assert np.array_equal(inputs, ids)
    assert (labels == IGNORED).all() and not positions.any()


# Rates


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_sequence_has_its_own_rate(strategy):
    ids = np.tile([CLS, *[5] * 40, SEP], (5, 1))
    rates = np.array([0.05, 0.1, 0.25, 0.5, 0.9])
    arguments = ids, np.ones(ids.shape, dtype=bool), np.arange(5), VOCABULARY, strategy, rates
    _, positions, labels = mask_tokens(*arguments, 36, (0, 3))
    assert (labels != IGNORED).sum(1).tolist() == [2, 4, 10, 20, 36]
    for row, rate in enumerate(rates):
        alone = masked(ids[row : row + 1], np.array([row]), strategy, rate, (0, 3))
        used = labels[row] != IGNORED
        assert np.array_equal(alone[1][0], positions[row][used]) and np.array_equal(alone[2][0], labels[row][used])


@settings(deadline=None)
@given(start=RATE, end=RATE, length=st.integers(8, 512))
def test_predictions_are_those_of_the_highest_rate(start, end, length):
    num_predictions = max_predictions(length, MaskingSettings(rate={"start": start, "end": end}))
    assert num_predictions == max(max_predictions(length, MaskingSettings(rate=rate)) for rate in (start, end))
    assert num_predictions == max(1, round(max(start, end) * (length - 2)))


# Whole words


def whole_words(maskable, word_starts, random, count):
    """Words in the order of their random number, until the next would not fit; and the size of that one.

    Behind a special token a word goes by that token's number if it does not begin there itself.
    """

    def number(word):
        return random[word[0]] if word_starts[word[0]] or word[0] == 0 else random[word[0] - 1]

    chosen: list[int] = []
    for word in sorted(find_words(maskable, word_starts), key=number):
        if len(chosen) + len(word) > count:
            return chosen, len(word)
        chosen += word
    return chosen, None


@settings(deadline=None, max_examples=300)
@given(ids=packed_sequences(), seed=WORD, share=st.floats(0, 1), rate=st.floats(0, 1))
def test_whole_words_are_those_of_a_simple_algorithm(ids, seed, share, rate):
    maskable = ~np.isin(ids, SPECIAL)
    word_starts = random_word_starts(ids, seed, share)
    random = np.random.default_rng(seed).integers(0, 2**32, ids.shape, dtype=np.uint64)
    count = np.rint(rate * maskable.sum(1)).astype(np.int64)
    chosen = choose_whole_words(maskable, count, random, word_starts)
    for row in range(len(ids)):
        expected, next_word = whole_words(maskable[row], word_starts[row], random[row], count[row])
        assert np.flatnonzero(chosen[row]).tolist() == sorted(expected)
        missed = count[row] - chosen[row].sum()
        assert missed == 0 if next_word is None else 0 <= missed < next_word


@settings(deadline=None)
@given(ids=packed_sequences(), rate=RATE, seed=WORD)
def test_where_every_token_is_a_word_the_strategies_are_the_same(ids, rate, seed):
    first, second = (masked(ids, np.arange(len(ids)), strategy, rate, (seed, 3)) for strategy in STRATEGIES)
    assert all(map(np.array_equal, first, second))


def test_words_of_one_length_are_equally_likely():
    """Also at the ends of documents, and where a special token cuts words apart."""
    words = [CLS, 5, 5, 5, 5, SEP, CLS, 6, 6, UNK, 7, 7, SEP, 8, 8, PAD, 9, 9]
    word_starts = np.array([1, 1, 0, 1, 0, 1, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 1, 0], dtype=bool)
    ids, _, positions, labels = many_sequences(20_000, words, "whole-word", 0.34, word_starts=word_starts)
    chosen = chosen_tokens(positions, labels, ids.shape[1])
    assert (chosen.sum(1) == 4).all()
    first = [1, 3, 7, 10, 13, 16]
    assert np.array_equal(chosen[:, first], chosen[:, [position + 1 for position in first]])
    assert_uniform(chosen[:, first].sum(0))


def test_a_word_longer_than_the_count_is_not_masked():
    ids = np.array([[CLS, *[5] * 30, SEP]])
    word_starts = np.arange(32)[None] == 1
    inputs, positions, labels = masked(ids, np.arange(1), "whole-word", 0.5, (0, 3), word_starts)
    assert np.array_equal(inputs, ids) and (labels == IGNORED).all() and not positions.any()
