"""Predictions against transformers' pipelines."""

import math
import os
from typing import Any

import pytest
import torch
from tiny_tasks import SENTENCES, make_experiment, save_model
from transformers import BertForQuestionAnswering, pipeline

from bertlite.api import LoadedModel
from bertlite.core.errors import UserError
from bertlite.core.runtime import initialize_runtime
from bertlite.finetuning.finetune import run
from bertlite.finetuning.predict import read_texts

PIPELINES = {
    "classification": ("text-classification", {}),
    "multilabel": ("text-classification", {}),
    "regression": ("text-classification", {}),
    "token-classification": ("token-classification", {"aggregation_strategy": "first"}),
}


def as_list(prediction: Any) -> list[Any]:
    return prediction if isinstance(prediction, list) else [prediction]


@pytest.mark.parametrize("kind", PIPELINES)
def test_predictions_equal_those_of_the_pipeline(kind, vocabulary, tmp_path):
    folder = save_model(vocabulary, kind, tmp_path, std=0.3)
    texts = [text for _, text in SENTENCES[200:270]]
    name, options = PIPELINES[kind]
    expected = pipeline(name, model=str(folder), device="cpu")(texts, **options)
    model = LoadedModel(folder, initialize_runtime("fp32"))
    predictions = model.predict(texts)
    assert len(predictions) == len(expected) == 70  # more than a chunk of texts, in their order
    for prediction, result, text in zip(predictions, expected, texts, strict=True):
        for ours, theirs in zip(as_list(prediction), as_list(result), strict=True):
            keys = ("label",) if "label" in ours else ("entity_group", "start", "end")
            assert [ours[key] for key in keys] == [theirs[key] for key in keys]
            assert ours["score"] == pytest.approx(float(theirs["score"]), abs=1e-5)
            assert "word" not in ours or ours["word"] == text[ours["start"] : ours["end"]]
    if name == "text-classification":
        expected = pipeline(name, model=str(folder), device="cpu")(texts[0], top_k=3)
        for ours, theirs in zip(as_list(model.predict(texts[0], top_k=3)), expected, strict=True):
            assert ours["label"] == theirs["label"] and ours["score"] == pytest.approx(theirs["score"], abs=1e-5)


def test_answers_are_the_best_spans_of_the_context(vocabulary, tmp_path):
    folder = save_model(vocabulary, "question-answering", tmp_path, std=0.3)
    model = LoadedModel(folder, initialize_runtime("fp32"))
    tokenizer = model.tokenizer
    tokenizer.model_max_length = 64  # shorter than the context
    theirs = BertForQuestionAnswering.from_pretrained(folder).eval()
    context = " ".join(text for _, text in SENTENCES[:4])
    answer = model.predict(f"What is it?\t{context}")
    assert context[answer["start"] : answer["end"]] == answer["answer"]
    encoded = tokenizer("What is it?", context, truncation="only_second", max_length=64, stride=16,
                       return_overflowing_tokens=True)  # fmt: skip
    assert len(encoded.encodings) > 2
    best = (-math.inf, 0, 0)
    for encoding in encoded.encodings:
        result = theirs(torch.tensor([encoding.ids]), token_type_ids=torch.tensor([encoding.type_ids]))
        positions = [position for position, text in enumerate(encoding.sequence_ids) if text == 1]
        for first in positions:
            for last in range(first, min(first + 30, positions[-1] + 1)):
                score = (result.start_logits[0, first] + result.end_logits[0, last]).item()
                best = max(best, (score, encoding.offsets[first][0], encoding.offsets[last][1]))
    assert (answer["start"], answer["end"]) == best[1:]
    assert model.predict("What?\t\u200b") == {  # a context without tokens
        "score": 0.0,
        "start": 0,
        "end": 0,
        "answer": "",
    }
    with pytest.raises(UserError, match=r"text 2: should be two texts, .*, separated by a tab"):
        model.predict(["a\tb", "no tab"])


def test_pairs(write, tmp_path):
    texts = [text for _, text in SENTENCES[:120]]
    pairs = enumerate(zip(texts[:60], texts[60:], strict=True))
    records = [{"a": first, "b": second, "label": str(number % 2)} for number, (first, second) in pairs]
    config = write(records=records, task__text=["a", "b"])
    run(config)
    batch = make_experiment(config).splits["train"].batches.training(0, 2)
    assert batch.token_type_ids.max() == 1
    model = LoadedModel(tmp_path / "run" / "model", initialize_runtime("fp32"))
    ours = model.predict("one text\tanother one", pairs=True)
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
