"""Packing is complete and fills the sequences; batches are a pure function of the configuration and the step."""

import os
import re
from itertools import chain, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from paths import SAMPLE
from tiny_tokenizers import make_tokenizer

from bertlite.config.settings import DataSettings, MaskingSettings, Source, TrainSettings
from bertlite.core.errors import DataLost, UserError
from bertlite.core.random import choose_validation
from bertlite.data.batches import Batch, Batches
from bertlite.data.corpus import prepare_corpus
from bertlite.data.masking import IGNORED, max_predictions
from bertlite.data.packing import Packing, pack_corpus, pack_documents, pack_lengths
from bertlite.data.tokenizer import wrap_tokenizer
from bertlite.data.vocabulary import SPECIAL_TOKENS, build_word_piece
from bertlite.data.words import segment_with_jieba

WORDS = 6000
PAD, UNK, CLS, SEP, MASK = range(5)


@pytest.fixture(scope="module")
def tokenizer():
    """Every word is one token of its own, so that a corpus can name each of its tokens."""
    return wrap_tokenizer(
        build_word_piece(
            {piece: number for number, piece in enumerate([*SPECIAL_TOKENS, *map(word, range(WORDS))])}, True
        )
    )


def word(number: int) -> str:
    return f"w{number}"


@pytest.fixture(scope="module")
def make_corpus(tokenizer, tmp_path_factory):
    """A corpus with documents of these lengths, in which each token occurs once."""

    def make(lengths):
        assert sum(lengths) <= WORDS
        folder = tmp_path_factory.mktemp("corpus")
        words = iter(range(WORDS))
        documents = [" ".join(word(next(words)) for _ in range(length)) for length in lengths]
        (folder / "text.txt").write_text("\n".join(documents))
        data = DataSettings(train=["unused"], document="line", cache_dir=str(folder / "cache"))
        corpus = prepare_corpus([Source(path=str(folder / "text.txt"))], tokenizer, data, "data.train")
        assert np.diff(corpus.starts).tolist() == list(lengths)
        assert len(np.unique(corpus.tokens)) == len(corpus.tokens)
        return corpus

    return make


@pytest.fixture(scope="module")
def corpus(make_corpus):
    """120 documents of 1 to 60 tokens: some are longer than a sequence of 32 positions."""
    return make_corpus(np.random.default_rng(0).integers(1, 61, 120).tolist())


def original_ids(batch: Batch) -> torch.Tensor:
    """The token ids before masking."""
    ids = batch.input_ids.clone()
    row, slot = torch.nonzero(batch.labels != IGNORED, as_tuple=True)
    ids[row, batch.prediction_positions[row, slot]] = batch.labels[row, slot]
    return ids


def equal(first: Batch, second: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))


def joined(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat(tensors) for tensors in zip(*(vars(batch).values() for batch in batches), strict=True)))


def spans_of(batch: Batch) -> list[list[int]]:
    """Check how each sequence is built, and return the tokens of its spans, without [CLS] and [SEP]."""
    spans = []
    for ids, positions, documents in zip(
        original_ids(batch).tolist(), batch.position_ids.tolist(), batch.document_ids.tolist(), strict=True
    ):
        at = 0
        for number in range(1, max(documents) + 1):
            end = at + documents.count(number)
            assert documents[at:end] == [number] * (end - at), "a document's tokens stand together"
            assert positions[at:end] == list(range(end - at)), "positions restart at 0"
            assert end - at >= 3 and ids[at] == CLS and ids[end - 1] == SEP
            assert not {PAD, CLS, SEP} & set(ids[at + 1 : end - 1])
            spans.append(ids[at + 1 : end - 1])
            at = end
        assert set(ids[at:]) <= {PAD} and set(positions[at:]) <= {0} and set(documents[at:]) <= {0}
    return spans


# Packing


def best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """Count the sequences of the simple algorithm: longest item first, each into the fullest sequence with room."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    return len(rooms)


@settings(deadline=None)
@given(data=st.data(), capacity=st.integers(1, 60), seed=st.integers(0, 2**32 - 1))
def test_packing_is_complete_and_as_good_as_plain_best_fit(data, capacity, seed):
    kinds = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=20))
    count = data.draw(st.integers(1, 400))
    lengths = np.random.default_rng(seed).choice(kinds, count)
    spans, starts = pack_lengths(lengths, capacity)
    assert np.array_equal(np.sort(spans), np.arange(count)), "every item exactly once"
    assert starts[0] == 0 and starts[-1] == count and (np.diff(starts) > 0).all()
    assert np.add.reduceat(lengths[spans], starts[:-1]).max() <= capacity
    assert len(starts) - 1 <= best_fit_decreasing(lengths.tolist(), capacity)
    again = pack_lengths(lengths, capacity)
    assert np.array_equal(again[0], spans) and np.array_equal(again[1], starts)


@pytest.mark.parametrize(
    ("lengths", "capacity", "rows"),
    [([7, 5, 3], 10, 2), ([10] * 4, 10, 4), ([3] * 10, 9, 4), ([3], 512, 1), ([8, 8, 4, 4, 4, 4], 16, 2)],
)
def test_packing_of_a_few_items(lengths, capacity, rows):
    _, starts = pack_lengths(np.array(lengths), capacity)
    assert len(starts) - 1 == rows


def test_documents_of_one_length_are_paired_at_random():
    """Neighbours in the text share a sequence no more often than other documents."""
    spans, starts = pack_lengths(np.full(10_000, 50), 100)
    assert np.array_equal(starts, np.arange(0, 10_001, 2))
    distance = np.abs(spans[0::2] - spans[1::2])
    assert (distance == 1).sum() < 10
    assert abs(distance.mean() / 10_000 - 1 / 3) < 0.02


@pytest.mark.parametrize("length", [128, 512])
def test_real_text_fills_the_sequences(length):
    """The sample's documents, counted in words and punctuation."""
    texts = (SAMPLE / "pretrain.txt").read_text(encoding="utf-8").split("\n\n")
    lengths = np.array([len(re.findall(r"\w+|[^\w\s]", text)) for text in texts])
    _, span_lengths, sequence_starts = pack_documents(np.cumsum([0, *lengths])[:-1], lengths, length)
    assert span_lengths.sum() == lengths.sum()
    used = (span_lengths + 2).sum() / ((len(sequence_starts) - 1) * length)
    assert used >= 0.995


# Splitting long documents


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=40), T=st.integers(12, 70))
def test_documents_that_fit_stay_whole_and_longer_ones_are_split(lengths, T):
    starts = np.cumsum([0, *lengths])
    span_starts, span_lengths, sequence_starts = pack_documents(starts[:-1], np.array(lengths), T)
    spans = sorted(zip(span_starts.tolist(), span_lengths.tolist(), strict=True))
    ends = [start + length for start, length in spans]
    assert [start for start, _ in spans] == [0, *ends[:-1]] and ends[-1] == starts[-1], "each token once"
    assert set(starts.tolist()) <= {0, *ends}, "no piece goes from one document into the next"
    whole = [(start, length) for start, length in zip(starts.tolist(), lengths, strict=False) if length <= T - 2]
    assert set(whole) <= set(spans)
    sums = np.add.reduceat(span_lengths + 2, sequence_starts[:-1])
    assert (np.diff(sequence_starts) > 0).all() and sequence_starts[-1] == len(spans) and sums.max() <= T


def test_long_documents_fill_the_sequences():
    """They are split where a sequence ends, so at most one sequence has room for another span."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 300, 500)
    _, span_lengths, sequence_starts = pack_documents(np.cumsum([0, *lengths])[:-1], lengths, 64)
    room = 64 - np.add.reduceat(span_lengths + 2, sequence_starts[:-1])
    assert (room >= 10).sum() <= 1


@pytest.mark.parametrize(("room", "rows"), [(7, 3), (8, 2), (9, 2)])
def test_a_span_of_a_long_document_has_at_least_eight_tokens(room, rows):
    lengths = np.array([28 - room, 30 + room])  # the first leaves that room in its sequence of 32
    assert len(pack_documents(np.cumsum([0, *lengths])[:-1], lengths, 32)[2]) - 1 == rows


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=40),
    length=st.sampled_from([8, 16, 33, 128]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_token_is_in_one_sequence_of_an_epoch(lengths, length, seed, make_corpus, tokenizer):
    corpus = make_corpus(lengths)
    packing = pack_corpus(corpus, length)
    starts, sizes, _ = pack_documents(corpus.starts[:-1], np.diff(corpus.starts), length)
    expected = sorted(corpus.tokens[start : start + size].tolist() for start, size in zip(starts, sizes, strict=True))
    batches = Batches(corpus, packing, tokenizer, length, MaskingSettings(), TrainSettings(seed=seed))
    for epoch in (0, 3):
        batch = batches.training(epoch * len(packing), len(packing))
        assert batch.input_ids.shape == (len(packing), length)
        assert sorted(spans_of(batch)) == expected
        assert batch.tokens() == packing.tokens() == len(corpus.tokens) + 2 * len(expected)
    assert sorted(spans_of(batches.evaluation(0, len(packing)))) == expected


def test_a_corpus_is_packed_once(corpus):
    pack_corpus(corpus, 32)
    before = {path: path.stat().st_mtime_ns for path in corpus.folder.glob("plan-*/*")}
    pack_corpus(corpus, 32)
    assert before and {path: path.stat().st_mtime_ns for path in corpus.folder.glob("plan-*/*")} == before
    assert (
        len(pack_corpus(corpus, 16)) > len(pack_corpus(corpus, 32)) > len(pack_corpus(corpus, 32, None, 0.5, "train"))
    )


@pytest.mark.parametrize("name", ["piece_starts.npy", "row_starts.npy", "groups.json"])
def test_a_truncated_packing_is_named(name, make_corpus):
    folder = pack_corpus(make_corpus([5, 9, 30]), 16).folder
    os.truncate(folder / name, 1)
    with pytest.raises(DataLost, match=f"{folder}: damaged .*; remove it, and it will be rebuilt"):
        Packing(folder)


# Validation split


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=60),
    share=st.floats(0, 1, exclude_min=True, exclude_max=True),
)
@example(lengths=[5, 5], share=1e-9)
@example(lengths=[5, 5, 5], share=1 - 1e-9)
def test_the_splits_hold_whole_documents_and_nothing_is_lost(lengths, share, make_corpus, tokenizer):
    corpus = make_corpus(lengths)
    tokens = {}
    for part in ("train", "validation"):
        packing = pack_corpus(corpus, 16, None, share, part)
        batch = Batches(corpus, packing, tokenizer, 16).evaluation(0, len(packing))
        tokens[part] = [token for piece in spans_of(batch) for token in piece]
    assert tokens["train"] and tokens["validation"]
    assert sorted(tokens["train"] + tokens["validation"]) == sorted(corpus.tokens.tolist())
    is_validation = choose_validation(len(corpus), share)
    assert sorted(tokens["validation"]) == sorted(
        np.concatenate([corpus.document(n) for n in np.flatnonzero(is_validation)])
    )
    assert np.array_equal(is_validation, choose_validation(len(corpus), share))


def test_the_validation_share_is_as_configured_and_spread_over_the_text(make_corpus):
    corpus = make_corpus([1] * 5000)
    for share in (0.02, 0.2, 0.5):
        is_validation = choose_validation(len(corpus), share)
        spread = np.sqrt(5000 * share * (1 - share))
        assert abs(is_validation.sum() - 5000 * share) < 5 * spread
        assert abs(is_validation[:2500].sum() - 2500 * share) < 5 * spread


def test_one_document_cannot_be_split(make_corpus):
    corpus = make_corpus([50])
    for part in ("train", "validation"):
        with pytest.raises(UserError, match=r"data\.train.*one document.*data\.validation"):
            pack_corpus(corpus, 16, None, 0.1, part)
    assert len(pack_corpus(corpus, 16)) == 4


# Batches


@pytest.fixture(scope="module")
def batches(corpus, tokenizer):
    return Batches(corpus, pack_corpus(corpus, 32), tokenizer, 32, MaskingSettings(rate=0.3), TrainSettings(seed=7))


@settings(deadline=None, max_examples=30)
@given(first=st.integers(0, 10_000), count=st.integers(1, 24), data=st.data())
def test_a_sample_is_the_same_in_any_batch(batches, first, count, data):
    """All at once, in the shares of ranks, sequence by sequence or otherwise; also across the end of an epoch."""
    whole = batches.training(first, count)
    assert len(whole) == count
    assert equal(joined([batches.training(first + row, 1) for row in range(count)]), whole)
    parts = sorted({0, count, *data.draw(st.lists(st.integers(0, count), max_size=4))})
    for start, end in pairwise(parts):
        assert equal(batches.training(first + start, end - start), whole.slice(start, end))


def test_equal_arguments_make_equal_batches(batches, tokenizer):
    packing = pack_corpus(batches.corpus, 32)
    twin = Batches(batches.corpus, packing, tokenizer, 32, MaskingSettings(rate=0.3), TrainSettings(seed=7))
    twin.training(100, 8)
    assert equal(twin.training(5, 8), batches.training(5, 8))


def test_a_seed_means_the_same_batches_in_every_version(make_corpus, tokenizer):
    """Otherwise a run that a newer version resumes would see other text or other masks."""
    corpus = make_corpus([9, 1, 14, 3, 22, 5, 2, 8])
    packing, masking = pack_corpus(corpus, 16), MaskingSettings(rate=0.3, strategy="whole-word")
    stream = Batches(corpus, packing, tokenizer, 16, masking, TrainSettings(seed=7))
    assert stream.select_sequences(np.arange(10)).tolist() == [4, 1, 5, 3, 0, 2, 5, 3, 1, 0]
    batch, is_validation = stream.training(3, 4), stream.evaluation(3, 1)
    assert batch.input_ids.tolist() == [
        [2, 61, 62, 63, 64, 4, 66, 67, 4, 3, 2, 59, 4, 3, 0, 0],
        [2, 15, 16, 17, 18, 19, 20, 21, 4, 4, 4, 25, 26, 27, 28, 3],
        [2, 54, 55, 4, 57, 58, 3, 2, 14, 3, 0, 0, 0, 0, 0, 0],
        [2, 4, 4, 48, 49, 50, 51, 52, 53, 3, 0, 0, 0, 0, 0, 0],
    ]
    assert batch.labels.tolist() == [[65, 68, 60, -100], [18, 22, 23, 24], [56, 57, -100, -100], [46, 47, -100, -100]]
    assert is_validation.input_ids.tolist() == [[2, 4, 62, 63, 64, 65, 66, 67, 68, 3, 2, 59, 4, 3, 0, 0]]
    row = "[CLS] w10 w11 w12 {w13 → w13} w14 w15 w16 {[MASK] → w17} {[MASK] → w18} {[MASK] → w19} w20 w21 w22 w23 [SEP]"
    other = ["[CLS] w49 w50 {[MASK] → w51} {w52 → w52} w53 [SEP]", "[CLS] w9 [SEP]"]
    assert stream.describe(batch.slice(1, 3)) == [[row], other]
    packing.groups = [(0.5, 2), (3.0, 4)]
    assert stream.select_sequences(np.arange(14)).tolist() == [3, 2, 5, 4, 4, 0, 5, 3, 3, 5, 2, 4, 2, 2]


def test_every_epoch_is_all_sequences_in_a_new_order(batches):
    rows = len(batches.packing)
    epochs = [original_ids(batches.training(epoch * rows, rows)).tolist() for epoch in (0, 1, 2, 1000)]
    for epoch in epochs:
        assert len(set(map(tuple, epoch))) == rows
        assert sorted(epoch) == sorted(epochs[0])
    assert len({str(epoch) for epoch in epochs}) == 4
    in_order = original_ids(batches.evaluation(0, rows)).tolist()
    assert in_order not in epochs and sorted(in_order) == sorted(epochs[0])


def test_a_sequence_has_other_masks_in_every_epoch(batches):
    rows = len(batches.packing)
    masks = []
    for epoch in range(4):
        batch = batches.training(epoch * rows, rows)
        originals = map(tuple, original_ids(batch).tolist())
        masks.append(dict(zip(originals, map(tuple, batch.input_ids.tolist()), strict=True)))
    differing = [row for row in masks[0] if len({mask[row] for mask in masks}) == 4]
    assert len(differing) > 0.9 * rows


def test_seeds_give_other_orders(batches, tokenizer):
    rows = len(batches.packing)
    one = batches.training(0, rows)
    settings = MaskingSettings(rate=0.3), TrainSettings(seed=8)
    other = Batches(batches.corpus, batches.packing, tokenizer, 32, *settings).training(0, rows)
    assert (original_ids(one) == original_ids(other)).all(1).float().mean() < 0.2
    masked = [dict(zip(map(str, original_ids(b).tolist()), b.input_ids.tolist(), strict=True)) for b in (one, other)]
    assert sum(masked[0][row] != masked[1][row] for row in masked[0]) > 0.8 * rows


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.5, 0.9])
def test_training_masks_at_the_configured_rate(batches, tokenizer, rate):
    masking = MaskingSettings(rate=rate)
    settings = masking, TrainSettings(seed=1)
    batch = Batches(batches.corpus, batches.packing, tokenizer, 32, *settings).training(0, len(batches.packing))
    ordinary = (original_ids(batch) > MASK).sum(1).tolist()
    assert (batch.labels != IGNORED).sum(1).tolist() == [round(rate * count) for count in ordinary]
    assert batch.labels.shape == batch.prediction_positions.shape == (len(batch), max_predictions(32, masking))


def test_evaluation_masks_do_not_depend_on_the_training_settings(batches, tokenizer):
    """So validation losses are comparable between runs. The grouping does not matter either."""
    rows = len(batches.packing)
    whole = batches.evaluation(0, rows)
    assert equal(whole, batches.evaluation(0, rows))
    for seed, rate, strategy in [(0, 0.15, "token"), (8, 0.3, "whole-word"), (7, {"start": 0.9, "end": 0.2}, "token")]:
        masking = MaskingSettings(strategy=strategy, rate=rate)
        train = TrainSettings(seed=seed, max_steps=2, global_batch_size=1)
        other = Batches(batches.corpus, batches.packing, tokenizer, 32, masking, train)
        other.training(3, 4)
        assert equal(other.evaluation(0, rows), whole)
    assert equal(joined([batches.evaluation(row, 1) for row in range(rows)]), whole)
    assert equal(batches.evaluation(5, 7), whole.slice(5, 12))
    ordinary = (original_ids(whole) > MASK).sum(1).tolist()
    assert (whole.labels != IGNORED).sum(1).tolist() == [round(0.15 * count) for count in ordinary]


def test_evaluation_masks_share_nothing_with_training_masks(corpus, tokenizer):
    packing = pack_corpus(corpus, 32)
    batches = Batches(corpus, packing, tokenizer, 32, MaskingSettings(), TrainSettings(seed=0))
    masks = []
    for batch in (batches.training(0, len(packing)), batches.evaluation(0, len(packing))):
        masks.append(batch.prediction_positions[(batch.labels != IGNORED).all(1)].tolist())
    same = sum(first == second for first, second in zip(*masks, strict=False))
    assert same < 0.3 * min(map(len, masks))


def test_evaluation_is_empty_past_the_last_sequence(batches):
    rows = len(batches.packing)
    batch = batches.evaluation(rows - 2, 5)
    assert equal(batch.slice(0, 2), batches.evaluation(rows - 2, 2))
    empty = batch.slice(2, 5)
    assert len(empty) == 3 and empty.tokens() == 0
    assert (empty.input_ids == PAD).all() and (empty.labels == IGNORED).all()
    assert not empty.document_ids.any() and not empty.position_ids.any() and not empty.prediction_positions.any()
    assert empty.labels.shape[1] == batch.labels.shape[1]


def test_tokens_are_all_positions_but_padding(batches):
    batch = batches.training(0, 20)
    assert batch.tokens() == int((original_ids(batch) != PAD).sum())
    assert batch.tokens() == sum(len(piece) + 2 for piece in spans_of(batch))
    assert batch.tokens() == sum(batch.slice(row, row + 1).tokens() for row in range(20))


def test_a_batch_moves_and_is_sliced_as_a_whole(batches):
    batch = batches.training(0, 6)
    assert equal(batch.to(torch.device("cpu")), batch)
    assert batch.to(torch.device("meta")).labels.device.type == "meta"
    assert len(batch.slice(2, 5)) == 3
    for name, tensor in vars(batch).items():
        assert tensor.dtype == torch.int64
        assert torch.equal(getattr(batch.slice(2, 5), name), tensor[2:5])


def test_other_special_ids_are_used_as_the_tokenizer_says(tmp_path):
    """[CLS], [SEP] and [PAD] need not be 2, 3 and 0."""
    pieces = ["one", "two", "[MASK]", "[SEP]", "[UNK]", "[PAD]", "[CLS]"]
    other = make_tokenizer(pieces)
    (tmp_path / "text.txt").write_text("one two one\ntwo")
    data = DataSettings(train=["unused"], document="line", cache_dir=str(tmp_path / "cache"))
    corpus = prepare_corpus([Source(path=str(tmp_path / "text.txt"))], other, data, "data.train")
    batch = Batches(corpus, pack_corpus(corpus, 10), other, 10).evaluation(0, 1)
    assert original_ids(batch).tolist() == [[6, 0, 1, 0, 3, 6, 1, 3, 5, 5]]
    assert batch.document_ids.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 0]]


# Rates that change over the run


def scheduled(corpus, tokenizer, start, end, steps, length=32, size=8) -> Batches:
    train = TrainSettings(seed=7, max_steps=steps, global_batch_size=size)
    return Batches(
        corpus,
        pack_corpus(corpus, length),
        tokenizer,
        length,
        MaskingSettings(rate={"start": start, "end": end}),
        train,
    )


@pytest.mark.parametrize(("start", "end"), [(0.9, 0.1), (0.1, 0.5)])
def test_the_rate_goes_in_a_straight_line_from_the_first_step_to_the_last(corpus, tokenizer, start, end):
    steps = 9
    batches = scheduled(corpus, tokenizer, start, end, steps)
    counts = []
    for step in range(steps + 3):  # past the end the rate stays
        batch = batches.training(8 * step, 8)
        rate = start + (end - start) * min(step, steps - 1) / (steps - 1)
        ordinary = (original_ids(batch) > MASK).sum(1).tolist()
        counts.append((batch.labels != IGNORED).sum(1).tolist())
        assert counts[-1] == [round(rate * count) for count in ordinary]
        assert batch.labels.shape == (8, max_predictions(32, batches.masking)), "as many predictions at every step"
        assert (original_ids(batch)[batch.input_ids == MASK] > MASK).all(), "what is hidden is to be predicted"
    sums = [sum(count) for count in counts[:steps]]
    assert sums == sorted(sums, reverse=start > end) and len(set(sums)) > 5


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_without_a_second_step_masks_at_the_first_rate(corpus, tokenizer, steps):
    batch = scheduled(corpus, tokenizer, 0.5, 0.1, steps).training(0, 8)
    ordinary = (original_ids(batch) > MASK).sum(1).tolist()
    assert (batch.labels != IGNORED).sum(1).tolist() == [round(0.5 * count) for count in ordinary]


@settings(deadline=None, max_examples=20)
@given(step=st.integers(0, 30), first=st.integers(0, 8), count=st.integers(1, 16))
def test_a_sample_is_masked_at_the_rate_of_its_step_in_any_batch(step, first, count, corpus, tokenizer):
    """The share of a rank or a micro-batch may start within a step, and continue in the next."""
    batches = scheduled(corpus, tokenizer, 0.9, 0.1, 20)
    first += 8 * step
    whole = joined(
        [batches.training(8 * step, 8), batches.training(8 * step + 8, 8), batches.training(8 * step + 16, 8)]
    )
    assert equal(batches.training(first, count), whole.slice(first - 8 * step, first - 8 * step + count))


@pytest.mark.parametrize(("start", "end", "length"), [(0.1, 0.5, 15), (0.03, 0.3, 17), (0.03, 0.29, 252)])
def test_no_masked_token_lacks_a_prediction_at_the_last_rate(start, end, length, make_corpus, tokenizer):
    """Rate times tokens lies halfway between two counts: a rate that is rounded up would need one prediction more."""
    assert end * (length - 2) % 1 == 0.5
    batch = scheduled(make_corpus([length - 2] * 20), tokenizer, start, end, 2, length, 20).training(20, 20)
    assert not (original_ids(batch) == MASK).any(), "a token is hidden that is not to be predicted"


# Whole words

CHINESE = "北京是中华人民共和国的首都，人口众多。我们喜欢自然语言处理，今天天气很好！他在清华大学学习计算机科学。"
ENGLISH = ["hopelessness", "is", "unbelievable", "and", "so", "are", "we", "thunderstorms", "a"]


@pytest.fixture(scope="module")
def character_tokenizer():
    """Every letter and every Chinese character is a token of its own."""
    letters = sorted({letter for text in ENGLISH for letter in text})
    pieces = [*SPECIAL_TOKENS, *sorted(set(CHINESE)), *letters, *(f"##{letter}" for letter in letters)]
    return make_tokenizer(pieces)


def sentences(language: str) -> list[list[str]]:
    """Documents as lists of words, the Chinese ones as jieba cuts them."""
    random = np.random.default_rng(0)
    if language == "English":
        return [random.choice(ENGLISH, random.integers(1, 12)).tolist() for _ in range(300)]
    clauses = re.findall(r"\w+\W", CHINESE)
    return [segment_with_jieba("".join(random.choice(clauses, random.integers(1, 3)))) for _ in range(300)]


def masked_words(batch: Batch, words_of: dict[tuple[int, ...], list[int]]) -> tuple[int, int]:
    """How many words are masked, and how many of them only in part."""
    masked = partly = 0
    ids, documents = original_ids(batch), batch.document_ids
    predicted = torch.zeros_like(ids, dtype=torch.bool)
    row, slot = torch.nonzero(batch.labels != IGNORED, as_tuple=True)
    predicted[row, batch.prediction_positions[row, slot]] = True
    for row in range(len(ids)):
        for number in range(1, int(documents[row].max()) + 1):
            inside = documents[row] == number
            lengths = words_of[tuple(ids[row][inside][1:-1].tolist())]
            for word in predicted[row][inside][1:-1].split(lengths):
                masked += bool(word.any())
                partly += bool(word.any() and not word.all())
    return masked, partly


@pytest.mark.parametrize(
    ("language", "segmenter", "strategy", "whole"),
    [
        ("English", None, "whole-word", True),
        ("Chinese", "jieba", "whole-word", True),
        ("Chinese", None, "whole-word", False),  # each character is a word
        ("English", None, "token", False),
        ("Chinese", "jieba", "token", False),
    ],
)
def test_words_are_masked_whole(language, segmenter, strategy, whole, tmp_path, character_tokenizer):
    documents = sentences(language)
    (tmp_path / "text.txt").write_text("\n".join((" " if language == "English" else "").join(d) for d in documents))
    settings = {"train": str(tmp_path / "text.txt"), "document": "line", "segmenter": segmenter}
    data = DataSettings.model_validate({**settings, "cache_dir": str(tmp_path / "cache")})
    corpus = prepare_corpus(data.train, character_tokenizer, data, "data.train")
    assert len(corpus) == 300 and corpus.summary.unknown_tokens == 0
    if segmenter or language == "English":
        assert corpus.summary.words == sum(map(len, documents))
    words_of = {tuple(corpus.document(number).tolist()): [*map(len, words)] for number, words in enumerate(documents)}

    packing = pack_corpus(corpus, 128)
    assert len(packing.span_lengths) == 300, "no document is cut"
    masking = MaskingSettings(strategy=strategy, rate=0.3)
    batch = Batches(corpus, packing, character_tokenizer, 128, masking, TrainSettings()).training(0, 3 * len(packing))
    masked, partly = masked_words(batch, words_of)
    assert masked > 200
    assert partly == 0 if whole else partly > masked / 10
    ordinary = (original_ids(batch) > MASK).sum(1)
    missed = (0.3 * ordinary).round() - (batch.labels != IGNORED).sum(1)
    assert missed.min() >= 0 and missed.max() < max(map(len, chain(*documents)))


def test_words_of_a_split_document_are_masked_whole(tmp_path, character_tokenizer):
    """Also where the cut goes through a word: each part of it is masked as a word."""
    (tmp_path / "text.txt").write_text("hopelessness " * 50)
    data = DataSettings(train=[{"path": str(tmp_path / "text.txt")}], cache_dir=str(tmp_path / "cache"))
    corpus = prepare_corpus(data.train, character_tokenizer, data, "data.train")
    masking = MaskingSettings(strategy="whole-word", rate=0.5)
    batches = Batches(corpus, pack_corpus(corpus, 32), character_tokenizer, 32, masking, TrainSettings())
    words_of = {}
    for start in range(0, 600, 30):
        at = [0, *range(-start % 12 or 12, 30, 12), 30]
        words_of[tuple(corpus.tokens[start : start + 30].tolist())] = np.diff(at).tolist()
    masked, partly = masked_words(batches.training(0, 200), words_of)
    assert masked > 100 and partly == 0


# Weights


def weighted_corpus(tmp_path, tokenizer, documents: list[int]):
    """Sources of so many documents of 30 tokens, no token twice."""
    words = iter(range(WORDS))
    for number, count in enumerate(documents):
        text = "\n".join(" ".join(word(next(words)) for _ in range(30)) for _ in range(count))
        (tmp_path / f"{number}.txt").write_text(text)
    data = DataSettings(
        train=[str(tmp_path / f"{number}.txt") for number in range(len(documents))],
        document="line",
        cache_dir=str(tmp_path / "cache"),
    )
    return prepare_corpus(data.train, tokenizer, data, "data.train")


def test_sources_of_equal_weight_are_packed_as_without_weights(tmp_path, tokenizer):
    corpus = weighted_corpus(tmp_path, tokenizer, [20, 30])
    plain, equal_weights = pack_corpus(corpus, 66), pack_corpus(corpus, 66, [3.0, 3.0])
    assert plain.groups == [[1.0, 25]] and equal_weights.groups == [[3.0, 25]]
    assert np.array_equal(plain.span_starts, equal_weights.span_starts)
    one, three = (Batches(corpus, packing, tokenizer, 66) for packing in (plain, equal_weights))
    assert (np.bincount(one.select_sequences(np.arange(75))) == 3).all() and (
        np.bincount(three.select_sequences(np.arange(75))) == 3
    ).all()


def test_weights_change_neither_the_validation_split_nor_mix_sources_in_a_sequence(tmp_path, tokenizer):
    corpus = weighted_corpus(tmp_path, tokenizer, [20, 30, 40])
    is_validation = choose_validation(len(corpus), 0.3)
    packing = pack_corpus(corpus, 66, [0.2, 1.0, 5.0], 0.3, "train")
    assert packing.span_lengths.sum() == 30 * (~is_validation).sum()
    owner = np.repeat([0.2, 1.0, 5.0], [20, 30, 40])[np.searchsorted(corpus.starts, packing.span_starts, "right") - 1]
    rows = np.repeat(np.arange(len(packing)), np.diff(packing.sequence_starts))
    first_row = 0
    for weight, count in packing.groups:
        inside = (rows >= first_row) & (rows < first_row + count)
        assert (owner[inside] == weight).all(), "rows hold documents of their own weight"
        first_row += count
    assert first_row == len(packing)


@settings(deadline=None, max_examples=50)
@given(
    groups=st.lists(st.tuples(st.floats(0.01, 20), st.integers(1, 200)), min_size=1, max_size=4),
    epochs=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_sequences_are_sampled_in_proportion_to_their_weight(groups, epochs, seed, data, batches, tokenizer):
    """Each group has a fixed number of samples per epoch, and shows all of its sequences before one is repeated."""
    twin = Batches(
        batches.corpus,
        SimpleNamespace(groups=groups, folder=batches.packing.folder),
        tokenizer,
        32,
        train=TrainSettings(seed=seed),
    )
    turns = [max(1, round(weight * rows)) for weight, rows in groups]
    samples = np.arange(epochs * sum(turns))
    seen = twin.select_sequences(samples)
    first_row = 0
    for count, (_, rows) in zip(turns, groups, strict=True):
        mine = (seen >= first_row) & (seen < first_row + rows)
        assert (mine.reshape(epochs, -1).sum(1) == count).all()
        times = np.bincount(seen[mine] - first_row, minlength=rows)
        assert times.max() - times.min() <= 1
        first_row += rows
    chosen = np.array(data.draw(st.lists(st.sampled_from(range(len(samples))), min_size=1, max_size=20)))
    assert np.array_equal(twin.select_sequences(samples[chosen]), seen[chosen])
