"""Predictions against transformers' pipelines."""

import math
import os

import numpy as np
import pytest
import torch
from seqeval.metrics.sequence_labeling import get_entities
from tiny_tasks import SENTENCES, prepared, with_head
from transformers import (
    BertForQuestionAnswering,
    pipeline,
)

from bertlite.api import LoadedModel
from bertlite.core.errors import UserError
from bertlite.core.runtime import initialize_runtime
from bertlite.data.tokenizer import load_tokenizer
from bertlite.finetuning.decoding import group_entities
from bertlite.finetuning.finetune import run
from bertlite.finetuning.predict import predict, read_texts

PIPELINES = {
    "classification": ("text-classification", {}),
    "multilabel": ("text-classification", {}),
    "regression": ("text-classification", {}),
    "token-classification": ("token-classification", {"aggregation_strategy": "first"}),
}


@pytest.mark.parametrize("kind", PIPELINES)
def test_predictions_equal_those_of_the_pipeline(kind, vocabulary, tmp_path):
    folder = with_head(vocabulary, kind, tmp_path, std=0.3)
    texts = [text for _, text in SENTENCES[200:270]]
    name, options = PIPELINES[kind]
    expected = pipeline(name, model=str(folder), device="cpu")(texts, **options)
    loaded = LoadedModel(folder, initialize_runtime("fp32"))
    model, tokenizer = loaded.model, loaded.tokenizer
    found = list(predict(model, tokenizer, texts, initialize_runtime("fp32")))
    assert len(found) == len(expected) == 70  # more than are computed at a time, in their order
    for ours, theirs, text in zip(found, expected, texts, strict=True):
        for one, other in zip(*([ours], [theirs]) if isinstance(ours, dict) else (ours, theirs), strict=True):
            keys = ("label",) if "label" in one else ("entity_group", "start", "end")
            assert [one[key] for key in keys] == [other[key] for key in keys]
            assert one["score"] == pytest.approx(float(other["score"]), abs=1e-5)
            assert "word" not in one or one["word"] == text[one["start"] : one["end"]]
    if name == "text-classification":
        every = pipeline(name, model=str(folder), device="cpu")(texts[:1], top_k=3)[0]
        (ours,) = predict(model, tokenizer, texts[:1], initialize_runtime("fp32"), top_k=3)
        for one, other in zip(*((ours, every) if isinstance(ours, list) else ([ours], every)), strict=True):
            assert one["label"] == other["label"] and one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_tags_are_grouped_into_entities_as_in_seqeval(vocabulary):
    tokenizer = load_tokenizer(str(vocabulary))
    labels = ["O", "B-a-work", "I-a-work", "B-B", "I-B"]  # WNUT17 has a kind with a hyphen
    text = SENTENCES[3][1]
    encoding = tokenizer(text).encodings[0]
    words = sorted({word for word in encoding.word_ids if word is not None})
    spans = [encoding.word_to_chars(word) for word in words]
    assert len(encoding.ids) - 2 > len(words) > 15
    generator = np.random.default_rng(0)
    for _ in range(50):
        chosen = generator.integers(0, 5, len(words))
        scores = generator.random((len(encoding.ids), 5), np.float32)  # of the pieces that do not count
        for word, label in zip(words, chosen, strict=True):
            scores[encoding.word_ids.index(word), label] = 2.0
        found = group_entities(scores, encoding, text, labels)
        expected = [
            (kind, spans[first][0], spans[last][1])
            for kind, first, last in get_entities([labels[one] for one in chosen])
        ]
        assert [(one["entity_group"], one["start"], one["end"]) for one in found] == expected
        assert all(one["word"] == text[one["start"] : one["end"]] and one["score"] == 2 for one in found)


def test_answers_are_the_best_spans_of_the_context(vocabulary, tmp_path):
    folder = with_head(vocabulary, "question-answering", tmp_path, std=0.3)
    loaded = LoadedModel(folder, initialize_runtime("fp32"))
    model, tokenizer = loaded.model, loaded.tokenizer
    tokenizer.model_max_length = 64  # so that contexts are read in pieces
    theirs = BertForQuestionAnswering.from_pretrained(folder).eval()
    context = " ".join(text for _, text in SENTENCES[:4])
    (answer,) = predict(model, tokenizer, [f"What is it?\t{context}"], initialize_runtime("fp32"))
    assert context[answer["start"] : answer["end"]] == answer["answer"]
    pieces = tokenizer("What is it?", context, truncation="only_second", max_length=64, stride=16,
                       return_overflowing_tokens=True)  # fmt: skip
    assert len(pieces.encodings) > 2
    best = (-math.inf, 0, 0)
    for one in pieces.encodings:
        result = theirs(torch.tensor([one.ids]), token_type_ids=torch.tensor([one.type_ids]))
        places = [place for place, part in enumerate(one.sequence_ids) if part == 1]
        for first in places:
            for last in range(first, min(first + 30, places[-1] + 1)):
                score = (result.start_logits[0, first] + result.end_logits[0, last]).item()
                best = max(best, (score, one.offsets[first][0], one.offsets[last][1]))
    assert (answer["start"], answer["end"]) == best[1:]
    (nothing,) = predict(model, tokenizer, ["What?\t\u200b"], initialize_runtime("fp32"))  # no token
    assert nothing == {"score": 0.0, "start": 0, "end": 0, "answer": ""}
    with pytest.raises(UserError, match=r"text 2: should be two texts, .*, separated by a tab"):
        list(predict(model, tokenizer, ["a\tb", "no tab"], initialize_runtime("fp32")))


def test_pairs(write, tmp_path):
    rows = [{"a": text, "b": other, "label": str(number % 2)} for number, ((_, text), (_, other)) in
            enumerate(zip(SENTENCES[:60], SENTENCES[60:120], strict=True))]  # fmt: skip
    config = write(rows=rows, task__text=["a", "b"])
    run(config)
    batch = prepared(config).splits["train"].batches.training(0, 2)
    assert batch.token_type_ids.max() == 1
    loaded = LoadedModel(tmp_path / "run" / "model", initialize_runtime("fp32"))
    model, tokenizer = loaded.model, loaded.tokenizer
    (ours,) = predict(model, tokenizer, ["one text\tanother one"], initialize_runtime("fp32"), pairs=True)
    theirs = pipeline("text-classification", model=str(tmp_path / "run" / "model"), device="cpu")
    expected = theirs({"text": "one text", "text_pair": "another one"})
    assert ours["label"] == expected["label"] and ours["score"] == pytest.approx(expected["score"], abs=1e-5)


def test_a_model_that_is_not_fine_tuned_predicts_nothing(write):
    config = write()
    with pytest.raises(UserError, match="the model is not fine-tuned"):
        LoadedModel(str(config.model.init_from), initialize_runtime("fp32")).predict("a")


def test_texts_to_predict_come_from_lines_or_a_column(tmp_path):
    (tmp_path / "a.csv").write_text('id,body\n1,"one, two"\n2,"three\nfour"\n', encoding="utf-8")
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    (tmp_path / "b[1].txt").write_text("")
    assert list(read_texts(str(tmp_path / "a.csv"), "body")) == ["one, two", "three\nfour"]
    assert list(read_texts(str(tmp_path / "a.txt"), "body")) == ["one", "", "two"]
    assert list(read_texts(str(tmp_path / "b[1].txt"), "body")) == []
    reader, writer = os.pipe()
    os.write(writer, b"line\n" * 150), os.close(writer)
    assert list(read_texts(f"/dev/fd/{reader}", "body")) == ["line"] * 150
    os.close(reader)
    with pytest.raises(UserError, match="there is no column 'text'; there are id, body"):
        list(read_texts(str(tmp_path / "a.csv"), "text"))
    with pytest.raises(UserError, match=r"--file: .*b\.csv: no such file"):
        list(read_texts(str(tmp_path / "b.csv"), "text"))
