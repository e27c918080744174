"""Vectors of texts, against transformers."""

import copy
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import assert_close_to_scale
from transformers import AutoModel, AutoTokenizer

import bertlite.inference.embed
from bertlite import load
from bertlite.core.errors import Failure, UserError
from bertlite.core.runtime import Runtime
from bertlite.inference.batching import batches_by_length, inference_linear, pad, prepare_for_inference
from bertlite.inference.embed import POOLINGS, Embedder
from bertlite.model.attention import KERNELS
from bertlite.model.huggingface import load_model, load_tokenizer_of


def load_encoder(folder, kernel="sdpa"):
    model = load_model(folder, kernel)
    return model.encoder, load_tokenizer_of(folder, model.config)


TEXTS = ["The state.", "", "A much longer sentence, of the people and for the people of the union.", "b", "b " * 90]
CPU = torch.device("cpu")
FP32, BF16 = (Runtime(CPU, dtype, compile=False) for dtype in (torch.float32, torch.bfloat16))


def reference(folder: Path, pooling: str = "mean", layer: int = -1, length: int = 32) -> np.ndarray:
    """By transformers, one text at a time, so that nothing is padded."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    vectors = []
    for text in TEXTS:
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=length)
        with torch.inference_mode():
            hidden = model(**inputs, output_hidden_states=True).hidden_states[layer][0]
        vectors.append({"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.amax(0)}[pooling])
    return torch.stack(vectors).numpy()


def assert_close(mine: np.ndarray, other: np.ndarray) -> None:
    assert mine.dtype == np.float32 and mine.shape == other.shape
    assert np.abs(mine - other).max() <= 1e-5 * max(1, np.abs(other).max())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_are_those_of_transformers(every_head, pooling, kernel):
    encoder, tokenizer = load_encoder(every_head["BertModel"], kernel)
    vectors = Embedder(prepare_for_inference(encoder, FP32), tokenizer, pooling)(TEXTS)
    assert_close(vectors, reference(every_head["BertModel"], pooling))


@pytest.mark.parametrize("layer", [0, 1, 2, -1, -2, -3])
def test_every_layer_can_be_chosen(every_head, layer):
    encoder, tokenizer = load_encoder(every_head["BertForMaskedLM"])
    expected = reference(every_head["BertForMaskedLM"], layer=layer)
    assert_close(Embedder(prepare_for_inference(encoder, FP32), tokenizer, layer=layer)(TEXTS), expected)


@pytest.mark.parametrize(
    "kind", ["BertForTokenClassification", "BertForSequenceClassification", "BertForQuestionAnswering"]
)
def test_fine_tuned_models_embed_by_their_encoder(every_head, kind):
    assert_close(load(every_head[kind]).encode(TEXTS), reference(every_head[kind]))


def test_vectors_can_be_normalized_and_texts_truncated_earlier(every_head):
    model = load(every_head["BertModel"])
    vectors, truncated = model.encode(TEXTS), reference(every_head["BertModel"], length=7)
    unit = model.encode(TEXTS, normalize=True)
    assert np.allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    assert np.allclose(unit * np.linalg.norm(vectors, axis=1, keepdims=True), vectors, atol=1e-5)
    assert_close(model.encode(TEXTS, sequence_length=7), truncated)
    assert np.abs(vectors - truncated).max() > 0.01


def test_vectors_do_not_depend_on_the_batch(every_head, monkeypatch):
    model = load(every_head["BertModel"])
    together = model.encode(TEXTS)
    for text, vector in zip(TEXTS, together, strict=True):
        assert_close(model.encode(text), vector)
    monkeypatch.setitem(bertlite.inference.batching.TOKENS_PER_BATCH, "cpu", 20)
    assert_close(model.encode(TEXTS), together)
    assert model.encode([]).shape == (0, 24)


def test_batches_hold_every_sequence_once_and_little_padding():
    lengths = torch.randint(1, 500, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = list(batches_by_length(lengths, CPU))
    assert sorted(number for batch in batches for number in batch) == list(range(1000))
    sizes = [len(batch) * max(lengths[number] for number in batch) for batch in batches]
    assert all(size <= max(1024, lengths[batch[0]]) for size, batch in zip(sizes, batches, strict=True))
    assert sum(sizes) < 1.05 * sum(lengths)


def test_linear_layers_compute_the_same_by_onednn(every_head):
    encoder, _ = load_encoder(every_head["BertModel"])
    fast = prepare_for_inference(copy.deepcopy(encoder), FP32)
    assert sum(getattr(module, "linear", None) is inference_linear for module in fast.modules()) == 9
    assert fast.state_dict().keys() == encoder.state_dict().keys()
    inputs = pad([[5] * 20, [7] * 3], 0, CPU)
    with torch.inference_mode():
        assert_close_to_scale(fast(*inputs), encoder.eval()(*inputs))


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_no_linear_layer_is_computed_by_another_library(name, every_head):
    """Also where the last layer computes some positions alone."""
    model = prepare_for_inference(load_model(every_head[name]), FP32)
    inputs = pad([[5] * 20, [7] * 3], 0, CPU)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        model.encoder(*inputs, output_positions=torch.zeros(2, 1).long())
        model(*inputs, *[torch.zeros(2, 1).long()] * (name == "BertForMaskedLM"))
    names = [event.key for event in profile.key_averages()]
    assert any("_linear_pointwise" in name for name in names)
    assert not {"aten::linear", "aten::mm", "aten::addmm"} & set(names)


def test_bf16_is_close_and_not_the_same(every_head):
    exact, rounded = load(every_head["BertModel"]).encode(TEXTS), load(every_head["BertModel"], "bf16").encode(TEXTS)
    cosine = (exact * rounded).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rounded, axis=1)
    assert cosine.min() > 0.999 and not np.array_equal(exact, rounded)


def test_a_file_of_many_chunks_is_what_its_texts_are(every_head, tmp_path, monkeypatch):
    monkeypatch.setattr(bertlite.inference.embed, "TEXTS_PER_CHUNK", 2)
    encoder, tokenizer = load_encoder(every_head["BertModel"])
    embedder = Embedder(prepare_for_inference(encoder, FP32), tokenizer)
    for texts in (TEXTS, TEXTS * 200, TEXTS[:1]):
        assert embedder.write(iter(texts), tmp_path / "v.npy") == (len(texts), 24)
        mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
        assert_close(mapped[: len(TEXTS)], embedder(texts)[: len(TEXTS)])
        assert_close(mapped[-1:], embedder(texts[-1:]))
    assert os.listdir(tmp_path) == ["v.npy"]


def test_memory_does_not_grow_with_the_file(every_head, tmp_path, monkeypatch):
    monkeypatch.setattr(bertlite.inference.embed, "TEXTS_PER_CHUNK", 50)
    encoder, tokenizer = load_encoder(every_head["BertModel"])
    embedder = Embedder(prepare_for_inference(encoder, FP32), tokenizer)
    peaks = []
    for count in (200, 200, 4000):  # the first run also loads libraries
        tracemalloc.start()
        embedder.write((f"text {number}" for number in range(count)), tmp_path / "v.npy")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 3 * peaks[1]  # of a file that is twenty times as long


def test_after_an_error_the_old_file_is_whole(every_head, tmp_path, monkeypatch):
    monkeypatch.setattr(bertlite.inference.embed, "TEXTS_PER_CHUNK", 2)
    encoder, tokenizer = load_encoder(every_head["BertModel"])
    embedder = Embedder(prepare_for_inference(encoder, FP32), tokenizer)
    embedder.write(TEXTS, tmp_path / "v.npy")
    before = (tmp_path / "v.npy").read_bytes()

    def texts():
        yield from TEXTS
        raise Failure("broken")

    with pytest.raises(Failure):
        embedder.write(texts(), tmp_path / "v.npy")
    assert os.listdir(tmp_path) == ["v.npy"] and (tmp_path / "v.npy").read_bytes() == before


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pooling": "sum"}, "--pooling is 'sum', which is not one of mean, cls, max"),
        ({"layer": 3}, "--layer is 3; the model has 0, the embeddings, to 2"),
        ({"layer": -4}, "--layer is -4"),
        ({"sequence_length": 51}, "--sequence-length is 51; the model takes 3 to 50 tokens"),
        ({"sequence_length": 2}, "--sequence-length is 2"),
    ],
)
def test_options_that_the_model_does_not_have_are_refused(every_head, options, message):
    with pytest.raises(UserError, match=message):
        load(every_head["BertModel"]).encode(TEXTS, **options)


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, bertlite; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules); bertlite.load"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        bertlite.laod  # noqa: B018
