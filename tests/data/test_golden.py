"""Fingerprints of batches: a seed means the same text and the same masks in every version."""

import hashlib
import json

import numpy as np
import pytest
from paths import SAMPLE
from tiny_tokenizers import make_tokenizer

from bertlite.config.settings import DataSettings, MaskingSettings, TrainSettings
from bertlite.data.batches import Batches
from bertlite.data.corpus import prepare_corpus
from bertlite.data.packing import pack_corpus
from bertlite.data.vocabulary import SPECIAL_TOKENS

WEIGHTS = [1.0, 2.5, 0.5]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Three sources cut from the sample, as a corpus of letters: some documents are longer than a sequence."""
    folder = tmp_path_factory.mktemp("golden")
    documents = (SAMPLE / "pretrain.txt").read_text(encoding="utf-8").split("\n\n")
    for number in range(3):
        texts = [text[: 60 + 37 * (at % 9)] for at, text in enumerate(documents[number * 60 : number * 60 + 60])]
        (folder / f"{number}.txt").write_text("\n\n".join(texts), encoding="utf-8")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,"
    tokens = [*SPECIAL_TOKENS, "the", "of", "and", "##ing", "##ed", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = make_tokenizer(tokens)
    train = [{"path": str(folder / f"{number}.txt"), "weight": weight} for number, weight in enumerate(WEIGHTS)]
    data = DataSettings.model_validate({"train": train, "cache_dir": str(folder / "cache")})
    return prepare_corpus(data.train, tokenizer, data, "data.train"), tokenizer


def digest(*arrays) -> str:
    """Of the shapes and numbers of arrays or tensors, as int64."""
    sha = hashlib.sha256()
    for array in arrays:
        values = array.numpy() if hasattr(array, "numpy") else array
        sha.update(f"{values.shape}".encode() + values.astype("<i8").tobytes())
    return sha.hexdigest()[:16]


def test_the_sample_is_packed_as_before(sample):
    corpus, _ = sample
    packing = pack_corpus(corpus, 64, WEIGHTS, 0.1, "train")
    assert digest(corpus.tokens, corpus.starts) == "5d58237983b694e2"
    assert packing.folder.name == "plan-ee53af631ebeff77"
    arrays = [np.load(packing.folder / f"{name}.npy") for name in ("piece_starts", "piece_lengths", "row_starts")]
    assert digest(*arrays) == "b0dca5c8dcc1ca45"
    assert [array.dtype for array in arrays] == ["int64", "int32", "int64"]
    assert json.loads((packing.folder / "groups.json").read_text()) == [[0.5, 78], [1.0, 137], [2.5, 149]]


@pytest.mark.parametrize(
    "strategy, rate, expected",
    [
        ("token", 0.15, ["0e3572f1ecfea8be", "13afbf2503a83544"]),
        ("whole-word", 0.15, ["c7a1e46c000e324e", "cc40ec0229dc5891"]),
        ("token", {"start": 0.4, "end": 0.1}, ["d6938b4b1cdf6826", "c03794fb3c758fd6"]),
        ("whole-word", {"start": 0.1, "end": 0.3}, ["a820aff1d0abeb3b", "c86d88bce1335f73"]),
    ],
)
def test_batches_hold_the_same_text_and_masks_as_before(sample, strategy, rate, expected):
    """At the beginning, and where an epoch ends."""
    corpus, tokenizer = sample
    packing = pack_corpus(corpus, 64, WEIGHTS, 0.1, "train")
    masking, train = MaskingSettings(strategy=strategy, rate=rate), TrainSettings(seed=3, max_steps=50)
    batches = Batches(corpus, packing, tokenizer, 64, masking, train)
    actual = [digest(*vars(batches.training(first, 40)).values()) for first in (0, len(packing) - 20)]
    assert actual == expected


def test_evaluation_masks_are_the_same_as_before(sample):
    corpus, tokenizer = sample
    packing = pack_corpus(corpus, 64, None, 0.1, "validation")
    batch = Batches(corpus, packing, tokenizer, 64).evaluation(0, len(packing) + 2)
    assert digest(*vars(batch).values()) == "b534f630ff9e9c6e"
