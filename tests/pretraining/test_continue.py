"""Continued pretraining: the starting model's weights, its vocabulary, and settings that contradict it."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_runs import metrics, pretrain, weights
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

from bertlite.core.errors import UserError
from bertlite.data.tokenizer import load_tokenizer
from bertlite.data.vocabulary import extend_vocabulary, pad_vocabulary, sample_documents, spell_token

EMBEDDING = "bert.embeddings.word_embeddings.weight"


@pytest.fixture
def begin(write_config) -> Path:
    """The run to continue from."""
    return pretrain(write_config("begin", train__max_steps=4, train__save_steps=4))


@pytest.fixture
def go_on(write_config, begin):
    """Go on from `begin` without a step, with changes, and return the run folder."""

    def run(model=None, tokenizer=None, **changes) -> Path:
        path = write_config("on", **{"train__max_steps": 0, **changes})
        config = yaml.safe_load(path.read_text())
        config |= {"model": {"init_from": str(begin), **(model or {})}, "tokenizer": tokenizer or {}}
        path.write_text(yaml.safe_dump(config))
        return pretrain(path)

    return run


def test_continued_pretraining_starts_with_the_same_weights_and_loss(begin, go_on):
    on = go_on()
    assert metrics(on)[0]["eval_loss"] == pytest.approx(metrics(begin)[-1]["eval_loss"], abs=1e-9)
    before, after = weights(begin), weights(on)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_continued_pretraining_lowers_the_loss(begin, go_on, write_config):
    again = go_on(train__max_steps=60, train__learning_rate=5e-3)
    assert metrics(again)[-1]["eval_loss"] < metrics(begin)[-1]["eval_loss"]


def test_a_hugging_face_folder_with_or_without_a_head(tmp_path, begin, go_on, capsys):
    text = AutoTokenizer.from_pretrained(begin / "model")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    for kind in (BertForMaskedLM, BertModel):
        folder = tmp_path / kind.__name__
        kind(BertConfig(**size, vocab_size=len(text))).save_pretrained(folder)
        text.save_pretrained(folder)
        on = go_on(model={"init_from": str(folder)})
        reference = load_file(folder / "model.safetensors")
        ours = weights(on)
        same = [name for name in reference if "pooler" not in name]
        prefix = "" if kind is BertForMaskedLM else "bert."
        assert all(torch.equal(ours[prefix + name], reference[name]) for name in same)
        assert ("a new one is initialized" in capsys.readouterr().err) == (kind is BertModel)
        shutil.rmtree(on)


def test_an_extended_vocabulary(begin, go_on):
    on = go_on(tokenizer={"extend": 50, "pad_to_multiple_of": 64}, data__train=["sample"])
    old, new = (AutoTokenizer.from_pretrained(run / "model").get_vocab() for run in (begin, on))
    assert len(new) % 64 == 0 and len(new) == len(weights(on)[EMBEDDING]) == len(weights(on)["cls.predictions.bias"])
    fresh = [piece for piece in new if piece not in old and not piece.startswith("[unused")]
    assert len(fresh) == 50 and all(new[piece] == old[piece] for piece in old)
    before, after = weights(begin)[EMBEDDING], weights(on)[EMBEDDING]
    torch.testing.assert_close(after[: len(old)], before, atol=0, rtol=0)
    for piece in fresh:
        ids = spell_token(piece, old)
        expected = before[ids].mean(0) if ids else before.mean(0)
        torch.testing.assert_close(after[new[piece]], expected)
    model = BertForMaskedLM.from_pretrained(on / "model")
    assert model.config.vocab_size == len(new)
    word = max((piece for piece in fresh if not piece.startswith("##")), key=len)
    assert AutoTokenizer.from_pretrained(on / "model").tokenize(f"a {word}") == ["a", word]


def test_contradictions_are_named(begin, go_on):
    with pytest.raises(UserError, match=r"model\.hidden_size is 48, but .* has 32; leave it out"):
        go_on(model={"hidden_size": 48})
    with pytest.raises(UserError, match=r"data\.sequence_length is 600, more than max_position_embeddings 512"):
        go_on(data__sequence_length=600)
    with pytest.raises(UserError, match="no such"):
        go_on(model={"init_from": "./nowhere"})


def test_new_tokens_take_unused_places_first():
    vocabulary = {"[PAD]": 0, "[unused0]": 1, "a": 2, "[unused1]": 3, "b": 4}
    assert extend_vocabulary(vocabulary, ["x"]) == {"[PAD]": 0, "x": 1, "a": 2, "[unused1]": 3, "b": 4}
    assert extend_vocabulary(vocabulary, ["x", "y", "z"]) == {"[PAD]": 0, "x": 1, "a": 2, "y": 3, "b": 4, "z": 5}


def test_padding_a_vocabulary_adds_unused_entries():
    vocabulary = {"[PAD]": 0, "[unused0]": 1, "a": 2}
    assert pad_vocabulary(vocabulary, 4) == {"[PAD]": 0, "[unused0]": 1, "a": 2, "[unused1]": 3}
    assert pad_vocabulary(vocabulary, 3) == vocabulary


def test_spelling_with_the_old_vocabulary_is_that_of_the_tokenizer(begin):
    tokenizer = load_tokenizer(str(begin / "model"))
    vocabulary = tokenizer.get_vocab()
    for word in ("bacteriology", "unconstitutional", "sociologists", "telescopes"):
        assert spell_token(word, vocabulary) == tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word))
    continued = tokenizer.convert_tokens_to_ids(tokenizer.tokenize("xology"))[1:]
    assert spell_token("##ology", vocabulary) == continued
    assert spell_token("☃", vocabulary) == []


def test_a_long_text_is_sampled_evenly_and_the_same_every_time():
    documents = [f"{number:05d}" * 20 for number in range(5000)]
    sample = sample_documents(iter(documents), 100_000)
    assert sample == sample_documents(iter(documents), 100_000)
    assert sum(map(len, sample)) * 2 >= 50_000 and sum(map(len, sample)) <= 100_000
    places = [documents.index(text) for text in sample]
    assert places == sorted(places) and 2000 < sum(places) / len(places) < 3000
    assert sample_documents(iter(documents), 10**9) == documents
