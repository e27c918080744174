"""Counted initialization: what is counted, the factorization, and what the first layer's heads attend to."""

import math
from collections import Counter

import numpy as np
import pytest
import safetensors.numpy
import torch
from scipy import sparse
from tiny_runs import crash_after, metrics, pretrain, traces

from bertlite.config.loading import load_config
from bertlite.config.settings import Architecture, PretrainConfig
from bertlite.core.errors import UserError
from bertlite.data.cooccurrence import Cooccurrence, _count, count_cooccurrence, factorize, positive_pmi
from bertlite.model.counted import head_offsets, position_frequencies, position_size, write_counted
from bertlite.model.heads import MaskedLanguageModel
from bertlite.model.initialization import initialize
from bertlite.pretraining.prepare import prepare, training_batches
from bertlite.pretraining.pretrain import run

SHAPE = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def model(**changes) -> dict:
    """Settings of a model that counts can be written into."""
    return {f"model__{name}": value for name, value in (SHAPE | changes).items()}


def make_batches(path):
    config = load_config(PretrainConfig, path)
    return training_batches(config, prepare(config))


def test_counts_are_those_of_a_plain_loop_within_documents(write_config):
    batches = make_batches(write_config(data__sequence_length=32))
    counts, pairs = _count(batches, 2)
    ids, document_ids = batches.read_sequences(np.arange(len(batches.packing)))
    tokens: Counter = Counter()
    expected: list[Counter] = [Counter(), Counter()]
    for sequence, documents in zip(ids.tolist(), document_ids.tolist(), strict=True):
        for number in range(1, max(documents) + 1):
            document = [token for token, owner in zip(sequence, documents, strict=True) if owner == number]
            tokens.update(document)
            for distance, counter in enumerate(expected, 1):
                counter.update(zip(document, document[distance:], strict=False))
    assert counts.tolist() == [tokens[token] for token in range(batches.vocabulary.size)]
    for matrix, counter in zip(pairs, expected, strict=True):
        matrix = matrix.tocoo()
        found = dict(zip(zip(matrix.row.tolist(), matrix.col.tolist(), strict=True), matrix.data.tolist(), strict=True))
        assert found == {pair: count for pair, count in counter.items() if count >= 2}


def test_pmi_is_that_of_the_formula():
    counts = np.array([30, 50, 20])
    pairs = sparse.csr_matrix(np.array([[0, 9, 2], [20, 0, 0], [0, 8, 0]], dtype=float))
    pmi = positive_pmi(pairs, counts).toarray()
    assert pmi[0, 1] == pytest.approx(max(0, math.log((9 - 0.5) * 100 / (40 * 60))))
    assert pmi[2, 1] == pytest.approx(max(0, math.log((8 - 0.5) * 100 / (30 * 60))))
    assert pmi[1, 0] == pytest.approx(max(0, math.log((20 - 0.5) * 100 / (60 * 40))))
    assert pmi[0, 0] == 0


def test_the_vectors_span_the_largest_eigenvectors_and_the_matrices_fit_best():
    random = np.random.default_rng(3)
    counts, size, offsets = random.integers(5, 200, 60), 8, (-1, 1)
    pairs = [sparse.csr_matrix(random.poisson(2.0, (60, 60)).astype(float) * (random.random((60, 60)) < 0.4))]
    words, matrices, frequencies = factorize(counts, pairs, size, offsets)
    weights = (counts + 1.0) ** 0.25
    weights /= weights.mean()
    pmi = positive_pmi(pairs[0], counts).toarray() * weights[:, None] * weights
    _, vectors = np.linalg.eigh(pmi @ pmi.T + pmi.T @ pmi)
    leading = vectors[:, -size:]
    basis = np.linalg.qr(words * weights[:, None])[0]
    assert np.linalg.norm(basis @ basis.T - leading @ leading.T) < 0.2  # six iterations, 16 vectors beyond
    scaled = words * weights[:, None]
    for target, matrix in zip((pmi.T, pmi), matrices, strict=True):
        assert scaled @ matrix @ scaled.T == pytest.approx(basis @ basis.T @ target @ basis @ basis.T, abs=2e-4)
    assert frequencies.sum() == pytest.approx(1)


@pytest.mark.parametrize("count", [16, 32])
def test_no_two_positions_look_alike(count):
    distances = torch.arange(1, 2048)[:, None]
    assert (distances * position_frequencies(count)).cos().mean(1).max() < 0.8


@pytest.mark.parametrize("heads", [2, 4])
def test_heads_attend_to_their_offset(heads):
    config = Architecture(**SHAPE | {"num_attention_heads": heads}, vocab_size=50, initializer_range=0.05)
    masked_lm = MaskedLanguageModel(config)
    initialize(masked_lm, 0.05, seed=0)
    offsets, W = head_offsets(config), 128 - position_size(config)
    random = np.random.default_rng(0)
    words, matrices = random.standard_normal((50, W)), random.standard_normal((len(offsets), W, W))
    counted = Cooccurrence(words.astype("f4"), matrices.astype("f4"), np.full(50, 1 / 50, "f4"))
    write_counted(masked_lm, counted, mask_token_id=4)
    ids = torch.randint(5, 50, (1, 512), generator=torch.Generator().manual_seed(0))
    masked = torch.arange(10, 500, 7)
    ids[0, masked] = 4
    x = masked_lm.encoder.embeddings(ids, torch.arange(512)[None])
    weights = masked_lm.encoder.layers[0].attention.weights(x, x)[0, :, masked]  # (H,N,T)
    for head, offset in enumerate(offsets):
        assert (weights[head].argmax(-1) == masked + offset).float().mean() > 0.98
    # what the head adds for a neighbour is its matrix, up to the rank of a head and one factor
    _, _, v = masked_lm.encoder.layers[0].attention.qkv.weight.view(3, heads, 128 // heads, 128)
    out = masked_lm.encoder.layers[0].attention.out.weight.view(128, heads, 128 // heads)
    for head, matrix in enumerate(torch.from_numpy(counted.matrices)):
        left, singular, right = torch.linalg.svd(matrix)
        rank = 128 // heads
        expected = left[:, :rank] * singular[:rank] @ right[:rank]
        found = (out[:, head] @ v[head])[:W, :W].detach()
        assert torch.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.9999


def test_the_first_loss_is_below_that_of_frequencies_and_the_result_is_kept(write_config):
    losses, folders = {}, {}
    for method in ("auto", "normal"):
        path = write_config(method, **model(initializer_range=0.05, initialization=method), train__max_steps=0)
        folders[method] = pretrain(path)
        losses[method] = metrics(folders[method])[-1]["eval_loss"]
    assert losses["auto"] < losses["normal"] - 0.3
    batches = make_batches(path)
    first = count_cooccurrence(batches, 16, (-1, 1))
    (stored,) = [file for file in batches.corpus.folder.glob("cooccurrence-*") if file.stat().st_size == _bytes(first)]
    stored.write_bytes(stored.read_bytes()[:100])  # a damaged file is counted again, to the same bits
    again = count_cooccurrence(batches, 16, (-1, 1))
    assert all(map(np.array_equal, first, again))


def _bytes(counted: Cooccurrence) -> int:
    return len(safetensors.numpy.save(counted._asdict()))


def test_a_counted_run_resumes_bit_for_bit(write_config, tmp_path):
    path = write_config(**model(initialization="counted"), train__max_steps=8)
    whole = pretrain(path)
    copy = crash_after(whole, 4, tmp_path / "copy")
    config = load_config(PretrainConfig, path, [f"output_dir={copy}"])
    run(config, resume=True)
    assert traces(copy) == traces(whole)


def test_a_run_of_version_0_1_resumes_with_its_initialization(write_config, tmp_path):
    whole = pretrain(write_config("whole", **model(initialization="sinusoidal"), train__max_steps=8))
    copy = crash_after(whole, 4, tmp_path / "copy")
    stored = copy / "config.yaml"
    stored.write_text(stored.read_text().replace("initialization: sinusoidal", "position_init: sinusoidal"))
    path = write_config("mine", **model(), train__max_steps=8)
    run(load_config(PretrainConfig, path, [f"output_dir={copy}"]), resume=True)
    assert traces(copy) == traces(whole)


def test_what_cannot_be_counted_is_an_error_or_a_line(write_config, bertlite):
    with pytest.raises(UserError, match=r"initialization is counted, but model\.hidden_size 32"):
        pretrain(write_config("a", model__initialization="counted"))
    with pytest.raises(UserError, match="too few to count pairs"):
        pretrain(write_config("b", **model(initialization="counted"), tokenizer__vocab_size=9000))
    code, _, err = bertlite("pretrain", write_config("c", train__max_steps=0))
    assert code == 0 and "model.initialization: sinusoidal, not counted: model.hidden_size 32" in err
    with pytest.raises(UserError, match="initialization is counted, but init_from"):
        load_config(PretrainConfig, write_config("d", model__init_from="x", model__initialization="counted"))


def test_the_former_name_of_the_setting_is_read(write_config, capfd):
    config = load_config(PretrainConfig, write_config(model__position_init="sinusoidal"))
    assert config.model.initialization == "sinusoidal"
    assert "position_init is read as model.initialization" in capfd.readouterr().err
