"""Predictions against transformers' pipelines."""

from typing import Any

import pytest
from tiny_tasks import SENTENCES, make_experiment, save_model
from transformers import pipeline

from bertlite.api import LoadedModel
from bertlite.core.errors import UserError
from bertlite.core.runtime import initialize_runtime
from bertlite.finetuning.finetune import run

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
