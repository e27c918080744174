"""Heads for fine-tuning against transformers' own classes, and their folders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE, assert_close_to_scale, make_segments, make_sequences, randomize
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from bertlite.config.settings import Architecture
from bertlite.core.errors import UserError
from bertlite.model.attention import KERNELS
from bertlite.model.heads import Classifier, MultipleChoice, QuestionAnswerer, SequenceClassifier, TokenClassifier
from bertlite.model.huggingface import load_model, load_weights_for, save_model
from bertlite.model.initialization import initialize

HEADS: dict[type[Classifier], tuple[Any, Any]] = {
    SequenceClassifier: (BertForSequenceClassification, AutoModelForSequenceClassification),
    TokenClassifier: (BertForTokenClassification, AutoModelForTokenClassification),
    QuestionAnswerer: (BertForQuestionAnswering, AutoModelForQuestionAnswering),
    MultipleChoice: (BertForMultipleChoice, AutoModelForMultipleChoice),
}


def make_theirs(ours: type[Classifier], labels: int = 2, **changes: Any) -> Any:
    return randomize(HEADS[ours][0](BertConfig(**{**SHAPE, "num_labels": labels, **changes})), 0.3)


def make_ours(model_class: type[Classifier], labels: list[str], **changes: Any) -> Classifier:
    model = model_class(Architecture(**{**SHAPE, **changes}), labels)
    initialize(model, 0.02, seed=1)
    return model


def theirs_of(model: Any, tokens: tuple[torch.Tensor, ...], segments: torch.Tensor) -> torch.Tensor:
    if isinstance(model, BertForMultipleChoice):  # the sequences are the choices of one example
        return model(tokens[0][None], tokens[2][None], None if segments is None else segments[None]).logits.T
    output = model(tokens[0], tokens[2], segments)
    return output.logits if hasattr(output, "logits") else torch.stack([output.start_logits, output.end_logits], -1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("model_class", HEADS)
def test_scores_are_those_of_transformers(model_class, kernel, training, tmp_path):
    theirs = make_theirs(model_class, 2 if model_class is QuestionAnswerer else 5)
    theirs.save_pretrained(tmp_path)
    ours, theirs = load_model(tmp_path, kernel).double(), theirs.double()
    assert type(ours) is model_class
    tokens = make_sequences([[16], [9], [2]], 16)
    segments = make_segments(tokens[0].shape)
    for pair in (torch.zeros_like(segments), segments):
        scores = ours.train(training)(*tokens, pair)
        expected = theirs_of(theirs.train(training), tokens, pair)
        real = slice(None) if not model_class.per_token else tokens[2] > 0
        assert scores.shape == expected.shape
        assert_close_to_scale(scores[real], expected[real])


@pytest.mark.parametrize("model_class", HEADS)
def test_dropout_falls_where_that_of_transformers_does(model_class, tmp_path):
    """Both draw random numbers in the order of the layers, so that one seed gives both the same."""
    theirs = make_theirs(model_class, hidden_dropout_prob=0.3)
    theirs.save_pretrained(tmp_path)
    ours, theirs = load_model(tmp_path, "sdpa").double(), theirs.double()
    tokens = make_sequences([[16], [9]], 16)
    torch.manual_seed(0)
    scores = ours.train()(*tokens)
    torch.manual_seed(0)
    expected = theirs_of(theirs.train(), tokens, None)
    real = slice(None) if not model_class.per_token else tokens[2] > 0
    assert_close_to_scale(scores[real], expected[real])


@pytest.mark.parametrize("problem_type", [None, "regression", "multi_label_classification"])
@pytest.mark.parametrize("model_class", HEADS)
def test_a_folder_is_the_same_after_transformers_loads_and_saves_it(model_class, problem_type, tmp_path):
    labels = ["start", "end"] if model_class is QuestionAnswerer else ["Größe", "b", "好"]
    ours = randomize(make_ours(model_class, labels))
    ours.problem_type = problem_type
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    save_model(ours, tmp_path / "ours")
    theirs, report = HEADS[model_class][1].from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert type(theirs) is HEADS[model_class][0]
    assert theirs.config.id2label == dict(enumerate(labels)) and theirs.config.problem_type == problem_type
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_model(tmp_path / "theirs")
    assert type(back) is model_class and back.labels == labels and back.problem_type == problem_type
    for (name, weight), (other, expected) in zip(back.named_parameters(), ours.named_parameters(), strict=True):
        assert name == other and torch.equal(weight, expected), name


PRETRAINED = {
    "masked language model": (BertForMaskedLM, "pooler head"),
    "encoder": (BertModel, "head"),
    "pretraining": (BertForPreTraining, "head"),
    "token classifier": (BertForTokenClassification, "pooler head"),
    "sequence classifier": (BertForSequenceClassification, "head"),
}


def weights_of(model, folder):
    """Weights of a folder that a model like this one can use."""
    return load_weights_for(type(model), model.labels, folder)


@pytest.mark.parametrize("name", PRETRAINED)
def test_fine_tuning_starts_from_any_bert(name, tmp_path, capsys):
    model_class, missing = PRETRAINED[name]
    theirs = randomize(model_class(BertConfig(**SHAPE)), 0.3)
    theirs.save_pretrained(tmp_path)
    ours = make_ours(SequenceClassifier, ["a", "b"])
    before = ours.classifier.weight.clone(), ours.encoder.pooler.dense.weight.clone()
    capsys.readouterr()
    ours.load_state_dict(ours.state_dict() | weights_of(ours, tmp_path))
    encoder = theirs if model_class is BertModel else theirs.bert
    tokens = make_sequences([[16], [9]], 16)
    expected = encoder(tokens[0], tokens[2])
    assert_close_to_scale(ours.encoder(*tokens)[tokens[2] > 0], expected.last_hidden_state[tokens[2] > 0])
    if "pooler" in missing:
        assert torch.equal(ours.encoder.pooler.dense.weight, before[1])
    else:
        assert_close_to_scale(ours.encoder.pooler(ours.encoder(*tokens)), expected.pooler_output)
    assert torch.equal(ours.classifier.weight, before[0])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"has no {missing.replace(' ', ' and no ')} for this task; new weights are initialized" in line


def test_a_head_for_the_same_labels_is_kept_and_no_other(tmp_path, capsys):
    theirs = make_theirs(SequenceClassifier, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1})
    theirs.save_pretrained(tmp_path)
    same, other = make_ours(SequenceClassifier, ["a", "b"]), make_ours(SequenceClassifier, ["b", "a"])
    capsys.readouterr()
    same.load_state_dict(same.state_dict() | weights_of(same, tmp_path))
    assert torch.equal(same.classifier.weight, theirs.classifier.weight)
    assert not capsys.readouterr().err
    other.load_state_dict(other.state_dict() | weights_of(other, tmp_path))
    assert not torch.equal(other.classifier.weight, theirs.classifier.weight)
    tokens = make_ours(TokenClassifier, ["a", "b"])
    tokens.load_state_dict(tokens.state_dict() | weights_of(tokens, tmp_path))
    assert not torch.equal(tokens.classifier.weight, theirs.classifier.weight)


def test_a_folder_of_another_shape_or_without_an_encoder_is_refused(tmp_path):
    make_theirs(SequenceClassifier).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"vocab_size": 50', '"vocab_size": 60'))
    with pytest.raises(UserError, match=r"word_embeddings.weight has shape \(50, 24\)"):
        weights_of(make_ours(SequenceClassifier, ["a"]), tmp_path)
    (tmp_path / "config.json").write_text(config)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["bert.embeddings.LayerNorm.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing, such as bert.embeddings.LayerNorm.bias"):
        weights_of(make_ours(SequenceClassifier, ["a"]), tmp_path)


def test_the_labels_of_multiple_choice_name_choices(tmp_path):
    theirs = make_theirs(MultipleChoice, 5)
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert isinstance(model, MultipleChoice) and model.labels == [f"LABEL_{number}" for number in range(5)]
    other = make_ours(MultipleChoice, ["A", "B"])  # whose head is for any number of choices
    assert torch.equal(weights_of(other, tmp_path)["classifier.weight"], theirs.classifier.weight)
    path: Path = tmp_path / "config.json"
    for labels in (5, "ab"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": labels}))
        with pytest.raises(UserError, match="id2label should name"):
            load_model(tmp_path)


def test_labels_that_do_not_fit_the_head_are_refused(tmp_path):
    make_theirs(SequenceClassifier, 3).save_pretrained(tmp_path)
    path: Path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": {"0": "a", "7": "b", "2": "c"}}))
    with pytest.raises(UserError, match="id2label should name the head's outputs, 0 to 2"):
        load_model(tmp_path)
