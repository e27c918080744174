"""An audit of masking: what is chosen, what replaces it, what is to be predicted, and that it can be made again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertlite.masking import IGNORED, STRATEGIES, Vocabulary, mask_rows, prediction_slots

# Special ids lie at both ends and in between, so that nothing can rely on where they are.
PAD, CLS, UNK, SEP, MASK = SPECIAL = [0, 3, 17, 40, 63]
VOCABULARY = Vocabulary(64, MASK, np.array(SPECIAL), np.setdiff1d(np.arange(64), SPECIAL))
WORD = st.integers(0, 2**32 - 1)


@st.composite
def packed_rows(draw, length=None):
    """Rows (R,T) of documents `[CLS] … [SEP]` one after the other, then padding; some words are [UNK] or [MASK]."""
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


def chosen_tokens(positions, labels, length):
    """Which tokens (R,T) are to be predicted, as the prediction slots say."""
    chosen = np.zeros((len(positions), length), dtype=int)
    for row, position in zip(*np.nonzero(labels != IGNORED), strict=True):
        chosen[row, positions[row, position]] += 1
    assert chosen.max(initial=0) <= 1, "a token is to be predicted twice"
    return chosen.astype(bool)


def many_rows(count, words, strategy="token", rate=0.15, seed=0):
    """Mask `count` rows that all hold the same words, and return what `mask_rows` does."""
    ids = np.tile(np.array(words, dtype=np.int64), (count, 1))
    return ids, *mask_rows(ids, np.arange(count), VOCABULARY, strategy, rate, (seed, 3))


def assert_uniform(counts):
    """Pearson's chi-square of equally likely cells, within five standard deviations of what it is by chance."""
    counts = np.asarray(counts)
    expected = counts.sum() / counts.size
    assert expected >= 5
    freedom = counts.size - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < freedom + 5 * np.sqrt(2 * freedom), (statistic, freedom)


def assert_share(count, total, share):
    """A binomial count within five standard deviations."""
    assert abs(count - total * share) < 5 * np.sqrt(total * share * (1 - share)), (count / total, share)


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(deadline=None)
@given(ids=packed_rows(), rate=st.floats(0.01, 0.99), seed=WORD, first=st.integers(0, 2**40))
def test_every_row_passes_the_audit(strategy, ids, rate, seed, first):
    before = ids.copy()
    samples = np.arange(first, first + len(ids))
    inputs, positions, labels = mask_rows(ids, samples, VOCABULARY, strategy, rate, (seed, 3))
    length = ids.shape[1]
    assert np.array_equal(ids, before), "the argument was changed"
    assert inputs.shape == ids.shape and inputs.dtype == positions.dtype == labels.dtype == np.int64
    assert positions.shape == labels.shape == (len(ids), prediction_slots(length, rate))
    assert positions.min() >= 0 and positions.max() < length

    used = labels != IGNORED
    chosen = chosen_tokens(positions, labels, length)
    special = np.isin(ids, SPECIAL)
    assert not (chosen & special).any(), "a special token is to be predicted"
    assert np.array_equal(labels[used], np.take_along_axis(ids, positions, axis=1)[used]), "labels are the originals"
    assert not positions[~used].any(), "unused slots point at position 0"
    assert np.array_equal(inputs[~chosen], ids[~chosen]), "what is not chosen stays"
    assert np.isin(inputs[chosen], [MASK, *VOCABULARY.ordinary_ids]).all(), "a special token came in"

    budget = np.array([round(rate * maskable) for maskable in (~special).sum(1).tolist()])
    if strategy == "token":
        assert np.array_equal(chosen.sum(1), budget)
    else:
        assert (chosen.sum(1) <= budget).all()


@settings(deadline=None)
@given(rate=st.floats(0.01, 0.99), length=st.integers(8, 300), data=st.data())
def test_prediction_slots_are_enough_for_any_number_of_documents_in_a_full_row(rate, length, data):
    documents = data.draw(st.integers(1, length // 3))
    ends = np.linspace(0, length, documents + 1).astype(int)
    ids = np.full((1, length), 5)
    ids[0, ends[:-1]], ids[0, ends[1:] - 1] = CLS, SEP
    _, positions, labels = mask_rows(ids, np.array([data.draw(WORD)]), VOCABULARY, "token", rate, (0, 3))
    assert (labels != IGNORED).sum() == round(rate * (length - 2 * documents))
    if documents == 1:  # the head runs on no slot in vain
        assert positions.shape[1] == max(1, (labels != IGNORED).sum())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_of_the_chosen_80_percent_are_hidden_10_random_10_stay(strategy):
    words = [CLS, *VOCABULARY.ordinary_ids[:50], SEP]
    ids, inputs, positions, labels = many_rows(10_000, words, strategy)
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


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_random_tokens_are_any_ordinary_token_with_equal_chance(strategy):
    word = int(VOCABULARY.ordinary_ids[7])
    _, inputs, _, _ = many_rows(20_000, [CLS, *[word] * 30, SEP], strategy)
    counts = np.bincount(inputs[:, 1:-1].ravel(), minlength=VOCABULARY.size)
    assert not counts[[PAD, CLS, UNK, SEP]].any()
    others = np.setdiff1d(VOCABULARY.ordinary_ids, [word])
    assert counts[others].all()
    assert_uniform(counts[others])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_ordinary_token_is_equally_likely_to_be_chosen(strategy):
    """Also beside special tokens, at the ends of the row, and in the second document of a row."""
    words = [5, CLS, 6, UNK, 7, 8, SEP, CLS, 9, 10, SEP, 11, PAD, 12]
    ids, _, positions, labels = many_rows(20_000, words, strategy, rate=0.34)
    chosen = chosen_tokens(positions, labels, ids.shape[1])
    assert_uniform(chosen.sum(0)[~np.isin(words, SPECIAL)])


def test_token_strategy_chooses_every_pair_equally_often():
    """A choice without neighbourhoods: pairs of positions come together as often as drawing without replacement."""
    ids, _, positions, labels = many_rows(20_000, [CLS, *range(4, 14), SEP], rate=0.2)
    chosen = chosen_tokens(positions, labels, ids.shape[1])[:, 1:-1].astype(int)
    assert (chosen.sum(1) == 2).all()
    together = chosen.T @ chosen
    assert_uniform(together[np.triu_indices(10, k=1)])


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(deadline=None)
@given(ids=packed_rows(length=24), seed=WORD, first=st.integers(0, 2**40), data=st.data())
def test_a_row_is_masked_alike_in_whatever_company_and_order(strategy, ids, seed, first, data):
    samples = np.arange(first, first + len(ids))
    whole = mask_rows(ids, samples, VOCABULARY, strategy, 0.3, (seed, 3))
    order = data.draw(st.permutations(range(len(ids))))
    order = np.array(order[: data.draw(st.integers(1, len(ids)))])
    part = mask_rows(ids[order], samples[order], VOCABULARY, strategy, 0.3, (seed, 3))
    for all_of_it, of_part in zip(whole, part, strict=True):
        assert np.array_equal(all_of_it[order], of_part)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_samples_seeds_and_purposes_give_other_masks(strategy):
    ids = np.array([[CLS, *VOCABULARY.ordinary_ids[:40], SEP]])
    streams = [(0, (0, 3)), (1, (0, 3)), (2**32, (0, 3)), (0, (1, 3)), (0, (2**32 - 1, 3)), (0, (0, 4))]
    masked = [mask_rows(ids, np.array([sample]), VOCABULARY, strategy, 0.3, key)[1] for sample, key in streams]
    assert len({positions.tobytes() for positions in masked}) == len(streams)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_samples_choose_independently(strategy):
    """Of 9 tokens chosen among 30, two samples share 2.7 in the mean."""
    words = [CLS, *VOCABULARY.ordinary_ids[:30], SEP]
    ids, _, positions, labels = many_rows(10_000, words, strategy, rate=0.3)
    chosen = chosen_tokens(positions, labels, ids.shape[1])
    expected = chosen.sum(1).mean() ** 2 / 30
    shared = (chosen[:-1] & chosen[1:]).sum(1).mean()
    assert abs(shared - expected) < 0.1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_without_ordinary_tokens_stay_as_they_are(strategy):
    ids = np.array([[PAD] * 8, [CLS, UNK, UNK, SEP, CLS, UNK, SEP, PAD], [CLS, MASK, MASK, SEP, PAD, PAD, PAD, PAD]])
    inputs, positions, labels = mask_rows(ids, np.arange(3), VOCABULARY, strategy, 0.99, (0, 3))
    assert np.array_equal(inputs, ids)
    assert (labels == IGNORED).all() and not positions.any()
