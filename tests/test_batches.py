"""Which documents share a row, and batches as a pure function: complete, full, the same however they are asked for."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bertlite.batches import Batch, Batches, cut, make_plan, pack, split_documents
from bertlite.config import DataSettings, MaskingSettings
from bertlite.corpus import prepare_corpus
from bertlite.errors import UserError
from bertlite.masking import IGNORED, prediction_slots
from bertlite.tokenizer import SPECIAL_TOKENS, load_tokenizer, word_piece, wrap

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
WORDS = 6000
PAD, UNK, CLS, SEP, MASK = range(5)


@pytest.fixture(scope="module")
def tokenizer():
    """Every word is one token of its own, so that a corpus can name each of its tokens."""
    return wrap(
        word_piece({piece: number for number, piece in enumerate([*SPECIAL_TOKENS, *map(word, range(WORDS))])}, True)
    )


def word(number: int) -> str:
    return f"w{number}"


@pytest.fixture(scope="module")
def make_corpus(tokenizer, tmp_path_factory):
    """A corpus with documents of these lengths, in which no token comes twice."""

    def make(lengths):
        assert sum(lengths) <= WORDS
        folder = tmp_path_factory.mktemp("corpus")
        words = iter(range(WORDS))
        documents = [" ".join(word(next(words)) for _ in range(length)) for length in lengths]
        (folder / "text.txt").write_text("\n".join(documents))
        data = DataSettings(train=["unused"], document="line", cache_dir=str(folder / "cache"))
        corpus = prepare_corpus([folder / "text.txt"], tokenizer, data, "data.train")
        assert np.diff(corpus.starts).tolist() == list(lengths)
        assert len(np.unique(corpus.tokens)) == len(corpus.tokens)
        return corpus

    return make


@pytest.fixture(scope="module")
def corpus(make_corpus):
    """120 documents of 1 to 60 tokens: some are longer than a row of 32 positions."""
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


def pieces_of(batch: Batch) -> list[list[int]]:
    """Check how every row is built, and return the tokens of its pieces, [CLS] and [SEP] taken off."""
    pieces = []
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
            pieces.append(ids[at + 1 : end - 1])
            at = end
        assert set(ids[at:]) <= {PAD} and set(positions[at:]) <= {0} and set(documents[at:]) <= {0}
    return pieces


# Packing


def best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """The plain algorithm: the longest piece first, each into the fullest row that still has room. Counts the rows."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    return len(rooms)


@settings(deadline=None)
@given(data=st.data(), capacity=st.integers(3, 60), seed=st.integers(0, 2**32 - 1))
def test_packing_is_complete_and_as_good_as_plain_best_fit(data, capacity, seed):
    kinds = data.draw(st.lists(st.integers(3, capacity), min_size=1, max_size=20))
    count = data.draw(st.integers(1, 400))
    lengths = np.random.default_rng(seed).choice(kinds, count)
    pieces, starts = pack(lengths, capacity)
    assert np.array_equal(np.sort(pieces), np.arange(count)), "every piece exactly once"
    assert starts[0] == 0 and starts[-1] == count and (np.diff(starts) > 0).all()
    assert np.add.reduceat(lengths[pieces], starts[:-1]).max() <= capacity
    assert len(starts) - 1 <= best_fit_decreasing(lengths.tolist(), capacity)
    again = pack(lengths, capacity)
    assert np.array_equal(again[0], pieces) and np.array_equal(again[1], starts)


@pytest.mark.parametrize(
    ("lengths", "capacity", "rows"),
    [([7, 5, 3], 10, 2), ([10] * 4, 10, 4), ([3] * 10, 9, 4), ([3], 512, 1), ([8, 8, 4, 4, 4, 4], 16, 2)],
)
def test_packing_of_a_few_pieces(lengths, capacity, rows):
    _, starts = pack(np.array(lengths), capacity)
    assert len(starts) - 1 == rows


def test_pieces_of_one_length_meet_mates_from_anywhere():
    """Neighbours in the text do not share rows more often than others do."""
    pieces, starts = pack(np.full(10_000, 50), 100)
    assert np.array_equal(starts, np.arange(0, 10_001, 2))
    distance = np.abs(pieces[0::2] - pieces[1::2])
    assert (distance == 1).sum() < 10
    assert abs(distance.mean() / 10_000 - 1 / 3) < 0.02


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize("length", [128, 512])
def test_wikipedia_fills_the_rows(length, tmp_path):
    tokenizer = load_tokenizer(str(SHARED / "vocab" / "bert-base-uncased" / "vocab.txt"))
    path = SHARED / "pretrain" / "enwiki_valid.txt"
    corpus = prepare_corpus([path], tokenizer, DataSettings(train=["unused"], cache_dir=str(tmp_path)), "data.train")
    plan = make_plan(corpus, length)
    assert plan.piece_lengths.sum() == len(corpus.tokens)
    assert plan.tokens() / (len(plan) * length) >= 0.99


# Cutting


@settings(deadline=None)
@given(data=st.data(), lengths=st.lists(st.integers(1, 200), min_size=1, max_size=30), limit=st.integers(1, 60))
def test_pieces_tile_the_wanted_documents(data, lengths, limit):
    starts = np.cumsum([0, *lengths])
    wanted = np.array(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
    expected = []
    for (start, end), keep in zip(pairwise(starts), wanted, strict=True):
        if keep:
            expected += [(at, min(limit, end - at)) for at in range(start, end, limit)]
    piece_starts, piece_lengths = cut(starts, wanted, limit)
    assert list(zip(piece_starts, piece_lengths, strict=True)) == expected


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=40),
    length=st.sampled_from([8, 16, 33, 128]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_token_stands_in_one_row_of_an_epoch(lengths, length, seed, make_corpus, tokenizer):
    corpus = make_corpus(lengths)
    plan = make_plan(corpus, length)
    starts, sizes = cut(corpus.starts, np.ones(len(corpus), bool), length - 2)
    expected = sorted(corpus.tokens[start : start + size].tolist() for start, size in zip(starts, sizes, strict=True))
    batches = Batches(corpus, plan, tokenizer, length, MaskingSettings(), seed)
    for epoch in (0, 3):
        batch = batches.training(epoch * len(plan), len(plan))
        assert batch.input_ids.shape == (len(plan), length)
        assert sorted(pieces_of(batch)) == expected
        assert batch.tokens() == plan.tokens() == len(corpus.tokens) + 2 * len(expected)
    assert sorted(pieces_of(batches.evaluation(0, len(plan)))) == expected


PLANS = [(16, ()), (32, ()), (32, (0.1, "train")), (32, (0.5, "train")), (32, (0.1, "held-out"))]


def test_a_plan_is_made_once(corpus):
    make_plan(corpus, 32)
    before = {path: path.stat().st_mtime_ns for path in corpus.folder.glob("plan-*/*")}
    make_plan(corpus, 32)
    assert before and {path: path.stat().st_mtime_ns for path in corpus.folder.glob("plan-*/*")} == before
    sizes = [len(make_plan(corpus, length, *part)) for length, part in PLANS]
    assert sizes == sorted(set(sizes), reverse=True), "each has a place of its own"


# Holding out


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=60),
    share=st.floats(0, 1, exclude_min=True, exclude_max=True),
)
@example(lengths=[5, 5], share=1e-9)
@example(lengths=[5, 5, 5], share=1 - 1e-9)
def test_held_out_documents_are_whole_and_no_others_are_left_out(lengths, share, make_corpus, tokenizer):
    corpus = make_corpus(lengths)
    tokens = {}
    for part in ("train", "held-out"):
        plan = make_plan(corpus, 16, share, part)
        batch = Batches(corpus, plan, tokenizer, 16).evaluation(0, len(plan))
        tokens[part] = [token for piece in pieces_of(batch) for token in piece]
    assert tokens["train"] and tokens["held-out"]
    assert sorted(tokens["train"] + tokens["held-out"]) == sorted(corpus.tokens.tolist())
    held_out = split_documents(corpus, share)
    assert sorted(tokens["held-out"]) == sorted(np.concatenate([corpus.document(n) for n in np.flatnonzero(held_out)]))
    assert np.array_equal(held_out, split_documents(corpus, share))


def test_the_held_out_share_is_as_asked_and_spread_over_the_text(make_corpus):
    corpus = make_corpus([1] * 5000)
    for share in (0.02, 0.2, 0.5):
        held_out = split_documents(corpus, share)
        spread = np.sqrt(5000 * share * (1 - share))
        assert abs(held_out.sum() - 5000 * share) < 5 * spread
        assert abs(held_out[:2500].sum() - 2500 * share) < 5 * spread


def test_one_document_cannot_be_held_out(make_corpus):
    corpus = make_corpus([50])
    for part in ("train", "held-out"):
        with pytest.raises(UserError, match=r"data\.train.*one document.*data\.validation"):
            make_plan(corpus, 16, 0.1, part)
    assert len(make_plan(corpus, 16)) == 4


# Batches


@pytest.fixture(scope="module")
def batches(corpus, tokenizer):
    return Batches(corpus, make_plan(corpus, 32), tokenizer, 32, MaskingSettings(rate=0.3), seed=7)


@settings(deadline=None, max_examples=30)
@given(first=st.integers(0, 10_000), count=st.integers(1, 24), data=st.data())
def test_a_batch_does_not_depend_on_how_it_is_asked_for(batches, first, count, data):
    """Whole, in the shares of ranks, row by row, or in any other parts: also where an epoch ends within."""
    whole = batches.training(first, count)
    assert len(whole) == count
    assert equal(joined([batches.training(first + row, 1) for row in range(count)]), whole)
    parts = sorted({0, count, *data.draw(st.lists(st.integers(0, count), max_size=4))})
    for start, end in pairwise(parts):
        assert equal(batches.training(first + start, end - start), whole.slice(start, end))


def test_equal_arguments_make_equal_batches(batches, tokenizer):
    twin = Batches(batches.corpus, make_plan(batches.corpus, 32), tokenizer, 32, MaskingSettings(rate=0.3), seed=7)
    twin.training(100, 8)
    assert equal(twin.training(5, 8), batches.training(5, 8))


def test_every_epoch_is_all_rows_in_a_new_order(batches):
    rows = len(batches.plan)
    epochs = [original_ids(batches.training(epoch * rows, rows)).tolist() for epoch in (0, 1, 2, 1000)]
    for epoch in epochs:
        assert len(set(map(tuple, epoch))) == rows
        assert sorted(epoch) == sorted(epochs[0])
    assert len({str(epoch) for epoch in epochs}) == 4
    in_order = original_ids(batches.evaluation(0, rows)).tolist()
    assert in_order not in epochs and sorted(in_order) == sorted(epochs[0])


def test_a_row_has_other_masks_in_every_epoch(batches):
    rows = len(batches.plan)
    masks = []
    for epoch in range(4):
        batch = batches.training(epoch * rows, rows)
        originals = map(tuple, original_ids(batch).tolist())
        masks.append(dict(zip(originals, map(tuple, batch.input_ids.tolist()), strict=True)))
    differing = [row for row in masks[0] if len({mask[row] for mask in masks}) == 4]
    assert len(differing) > 0.9 * rows


def test_seeds_give_other_orders(batches, tokenizer):
    rows = len(batches.plan)
    other = Batches(batches.corpus, batches.plan, tokenizer, 32, MaskingSettings(rate=0.3), seed=8)
    same = original_ids(batches.training(0, rows)) == original_ids(other.training(0, rows))
    assert same.all(1).float().mean() < 0.2


def test_seeds_and_purposes_give_other_masks(make_corpus, tokenizer):
    """All rows are full, so that which positions are predicted depends on nothing but the random numbers."""
    corpus = make_corpus([30] * 100)
    plan = make_plan(corpus, 32)
    first, second = (Batches(corpus, plan, tokenizer, 32, MaskingSettings(), seed) for seed in (0, 1))
    masks = [
        batch.prediction_positions.tolist()
        for batch in (first.training(0, 100), second.training(0, 100), first.evaluation(0, 100))
    ]
    for number, mask in enumerate(masks):
        for other in masks[:number]:
            assert sum(positions == others for positions, others in zip(mask, other, strict=True)) < 10


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.5, 0.9])
def test_training_masks_at_the_configured_rate(batches, tokenizer, rate):
    masking = MaskingSettings(rate=rate)
    batch = Batches(batches.corpus, batches.plan, tokenizer, 32, masking, seed=1).training(0, len(batches.plan))
    ordinary = (original_ids(batch) > MASK).sum(1).tolist()
    assert (batch.labels != IGNORED).sum(1).tolist() == [round(rate * count) for count in ordinary]
    assert batch.labels.shape == batch.prediction_positions.shape == (len(batch), prediction_slots(32, rate))


def test_evaluation_is_the_same_whatever_training_is_like(batches, tokenizer):
    """Held-out losses compare between runs: no seed, no masking setting, no grouping reaches the masks."""
    rows = len(batches.plan)
    whole = batches.evaluation(0, rows)
    assert equal(whole, batches.evaluation(0, rows))
    for seed, rate in [(0, 0.15), (8, 0.3), (7, 0.9)]:
        other = Batches(batches.corpus, batches.plan, tokenizer, 32, MaskingSettings(rate=rate), seed)
        other.training(3, 4)
        assert equal(other.evaluation(0, rows), whole)
    assert equal(joined([batches.evaluation(row, 1) for row in range(rows)]), whole)
    assert equal(batches.evaluation(5, 7), whole.slice(5, 12))
    ordinary = (original_ids(whole) > MASK).sum(1).tolist()
    assert (whole.labels != IGNORED).sum(1).tolist() == [round(0.15 * count) for count in ordinary]


def test_past_the_last_row_evaluation_is_empty(batches):
    rows = len(batches.plan)
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
    assert batch.tokens() == sum(len(piece) + 2 for piece in pieces_of(batch))
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
    other = wrap(word_piece({piece: number for number, piece in enumerate(pieces)}, True))
    (tmp_path / "text.txt").write_text("one two one\ntwo")
    data = DataSettings(train=["unused"], document="line", cache_dir=str(tmp_path / "cache"))
    corpus = prepare_corpus([tmp_path / "text.txt"], other, data, "data.train")
    batch = Batches(corpus, make_plan(corpus, 10), other, 10).evaluation(0, 1)
    assert original_ids(batch).tolist() == [[6, 0, 1, 0, 3, 6, 1, 3, 5, 5]]
    assert batch.document_ids.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 0]]
