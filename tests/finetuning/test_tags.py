"""Token classification: words, windows, entities and spans, against Hugging Face's pipeline and seqeval."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import accuracy_score, f1_score, precision_score
from tiny_tasks import SENTENCES, make_experiment, make_records, save_model
from transformers import BertForTokenClassification, pipeline

from bertlite.api import LoadedModel
from bertlite.config.finetune_settings import TaskSettings
from bertlite.core.errors import UserError
from bertlite.core.runtime import initialize_runtime
from bertlite.data.masking import IGNORED
from bertlite.data.tokenizer import load_tokenizer
from bertlite.finetuning.decoding import Outputs
from bertlite.finetuning.finetune import run
from bertlite.finetuning.spans import Span, tag_words
from bertlite.finetuning.tags import encode_sentences, find_words, group_entities, tag_metrics

T = "token-classification"


def settings_of(**settings: Any) -> TaskSettings:
    return TaskSettings.model_validate({"train": "unread", "type": T, **settings})


def test_words_are_grouped_into_entities_as_in_seqeval():
    labels = ["O", "B-a-work", "I-a-work", "B-B", "I-B"]  # WNUT17 has a kind with a hyphen
    text = SENTENCES[3][1]
    starts = [0] + [index + 1 for index, character in enumerate(text) if character == " "]
    words = [(start, start + len(text[start:].split()[0])) for start in starts]
    generator = np.random.default_rng(0)
    for _ in range(50):
        chosen = generator.integers(0, 5, len(words))
        probabilities = [np.eye(5, dtype=np.float32)[label] / 2 for label in chosen]
        entities = group_entities(probabilities, words, text, labels)
        expected = [
            (kind, words[first][0], words[last][1])
            for kind, first, last in get_entities([labels[label] for label in chosen])
        ]
        assert [(entity["entity_group"], entity["start"], entity["end"]) for entity in entities] == expected
        assert all(entity["word"] == text[entity["start"] : entity["end"]] for entity in entities)
        assert all(entity["score"] == 0.5 for entity in entities)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("stride", [1, 5, 8, 64])
def test_each_word_of_a_long_text_is_read_once_where_it_has_the_most_context(split, stride, vocabulary):
    tokenizer = load_tokenizer(str(vocabulary))
    text = " ".join(text for _, text in SENTENCES[:4]) + " " + "incomprehensibilities" * 4
    inputs = text.split() if split else text
    settings = settings_of(max_length=18, doc_stride=stride)
    examples = encode_sentences([(inputs,)], tokenizer, settings)
    (words,) = find_words(examples)
    whole = tokenizer(inputs, is_split_into_words=split, verbose=False).encodings[0]
    assert len(examples.encodings) == np.ceil((len(whole) - 2 - min(stride, 8)) / (16 - min(stride, 8)))
    assert sorted(words) == sorted({word for word in whole.word_ids if word is not None})
    shared = min(stride, 8)
    for index, word in words.items():
        first = whole.word_ids.index(index)  # counted with [CLS]
        positions = {number: first - number * (16 - shared) for number in range(len(examples.encodings))}
        context = {
            number: min(position if number else 99, 17 - position if number < len(examples.encodings) - 1 else 99)
            for number, position in positions.items()
            if 1 <= position <= 16
        }
        assert word.example in context and word.position == positions[word.example]
        assert context[word.example] == max(context.values())
        assert examples.encodings[word.example].ids[word.position] == whole.ids[first]
        expected = whole.word_to_chars(index) if not split else (0, len(inputs[index]))
        start = 0 if not split else len(" ".join([*inputs[:index], ""]))
        assert (word.start, word.end) == (start + expected[0], start + expected[1])


def save_model_without_context(folder: Path, vocabulary: Path, labels: list[str]) -> None:
    """Save a model whose scores of a token depend on that token alone, so that all windows of a text agree."""
    save_model(vocabulary, T, folder, std=0.5)
    model = BertForTokenClassification.from_pretrained(folder, num_labels=len(labels), ignore_mismatched_sizes=True)
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: number for number, label in enumerate(labels)}
    with torch.no_grad():
        model.classifier.weight.normal_(std=2, generator=torch.Generator().manual_seed(0))
        model.bert.embeddings.position_embeddings.weight.zero_()
        for layer in model.bert.encoder.layer:
            layer.attention.output.dense.weight.zero_()
    model.save_pretrained(folder)


@pytest.mark.skipif(tokenizers.__version__ == "0.23.2", reason="the pipeline loses windows with this version")
@pytest.mark.filterwarnings("ignore:.*LOAD REPORT.*")
@pytest.mark.parametrize("tags", ["O B-A I-A B-B I-B", "DET NOUN VERB X"])
def test_long_texts_are_predicted_as_by_the_pipeline_with_stride(tags, vocabulary, tmp_path):
    labels = tags.split()
    save_model_without_context(tmp_path, vocabulary, labels)
    tokenizer = load_tokenizer(str(vocabulary))
    words = [word for word in " ".join(text for _, text in SENTENCES).split() if len(tokenizer.tokenize(word)) == 1]
    texts = [" ".join(words[:400]), " ".join(words[400:430]), " ".join(words[500:640])]
    theirs = pipeline(T, model=str(tmp_path), device="cpu", aggregation_strategy="first", stride=32)
    theirs.tokenizer.model_max_length = 128
    ours = LoadedModel(tmp_path, initialize_runtime("fp32")).predict(texts)
    assert max(entity["start"] for entity in ours[0]) > 1000  # beyond the first window
    for entities, expected in zip(ours, theirs(texts), strict=True):
        assert len(entities) > 5
        assert [(e["entity_group"], e["start"], e["end"]) for e in entities] == [
            (e["entity_group"], e["start"], e["end"]) for e in expected
        ]
        assert [e["score"] for e in entities] == pytest.approx([float(e["score"]) for e in expected], abs=1e-5)


def test_no_tag_of_a_long_sentence_is_lost(write):
    short, long = (make_experiment(write(T, task__max_length=length, task__doc_stride=6)) for length in (24, 128))
    for name in ("train", "validation"):
        cut, whole = short.splits[name].examples, long.splits[name].examples
        assert len(cut.encodings) > len(cut.texts) == len(whole.encodings) and cut.num_truncated == 0
        targets = [np.concatenate(examples.targets) for examples in (cut, whole)]
        counts = [np.bincount(target[target != IGNORED], minlength=3).tolist() for target in targets]
        assert counts[0] == counts[1] and min(counts[0]) > 0
        scores = [np.eye(3, dtype=np.float32)[np.maximum(target, 0)] for target in cut.targets]
        predictions = short.task.decode(Outputs(scores, cut, short.labels, short.settings))
        assert predictions == cut.references == whole.references


def to_bilou(tags: list[str]) -> list[str]:
    ends = [not following.startswith("I") for following in [*tags[1:], "O"]]
    letters = {("B", True): "U", ("I", True): "L"}
    return [letters.get((tag[0], end), tag[0]) + tag[1:] for tag, end in zip(tags, ends, strict=True)]


def test_tags_of_another_scheme_give_the_same_examples(write, bertlite, tmp_path):
    bilou = [record | {"label": to_bilou(record["label"])} for record in make_records(T)]
    assert {tag[0] for record in bilou for tag in record["label"]} == set("BILOU")
    config = write(T, bilou)
    run(config)
    experiment, expected = make_experiment(config), make_experiment(write(T))
    assert experiment.labels == expected.labels and experiment.data_fingerprint == expected.data_fingerprint
    write(T, bilou)
    results = json.loads((tmp_path / "run" / "results.json").read_text())["seeds"]["0"]
    _, out, err = bertlite("evaluate", tmp_path / "run", "--data", tmp_path / "validation.jsonl", "--json")
    assert json.loads(out) == pytest.approx({name: results[name] for name in json.loads(out)}, abs=1e-4), err


def make_tags(name: str) -> list[dict[str, Any]]:
    """Make the sample's table with tags that stand for themselves."""
    return [
        {"text": record["text"], "label": [name if tag == "O" else "NAME" for tag in record["label"]]}
        for record in make_records(T)
    ]


@pytest.mark.parametrize("other", ["OTHER", "O"])
def test_tags_that_stand_for_themselves_are_measured_by_word(other, write, capsys):
    config = write(T, make_tags(other))
    results = run(config)
    default = "f1" if other == "O" else "accuracy"
    assert results["metric"] == default
    assert f"tags: one per word, 2 of them: {', '.join(sorted(['NAME', other]))}; measured by {default}" in (
        capsys.readouterr().err
    )
    seed = results["seeds"]["0"]
    experiment = make_experiment(config)
    folder = Path(config.output_dir) / "model"
    model: Any = LoadedModel(folder, initialize_runtime("fp32"))
    references = [tag for tags in experiment.splits["validation"].examples.references for tag in tags]
    predictions = [tag for tags in experiment.evaluate(model.model, "validation").predictions for tag in tags]
    assert seed["accuracy"] == pytest.approx(accuracy_score(references, predictions))
    assert seed["macro_f1"] == pytest.approx(f1_score(references, predictions, average="macro", zero_division=0))
    assert ("f1" in seed) == (other == "O")  # else it equals the accuracy
    if other == "O":
        assert seed["f1"] == pytest.approx(f1_score(references, predictions, pos_label="NAME", zero_division=0))
        assert seed["precision"] == pytest.approx(
            precision_score(references, predictions, pos_label="NAME", zero_division=0)
        )
    assert results["per_class"]["0"]["NAME"]["support"] == references.count("NAME")
    assert model.model.labels == sorted(["NAME", other])
    theirs = pipeline(T, model=str(folder), device="cpu", aggregation_strategy="first")
    texts = [" ".join(text.split()[:12]) for _, text in SENTENCES[200:210]]
    for ours, expected in zip(model.predict(texts), theirs(texts), strict=True):
        assert [(e["entity_group"], e["start"], e["end"]) for e in ours] == [
            (e["entity_group"], e["start"], e["end"]) for e in expected
        ]


def test_a_metric_of_words_that_equals_the_accuracy_can_be_chosen():
    settings = settings_of()
    assert list(tag_metrics(["A", "B"], settings, None)) == ["accuracy", "macro_f1"]
    metrics = tag_metrics(["A", "B"], settings, "f1")
    references, predictions = [["A", "B"], ["B"]], [["A", "A"], ["B"]]
    assert metrics["f1"](references, predictions) == metrics["accuracy"](references, predictions)
    assert "accuracy" in tag_metrics(["B-A", "I-A"], settings_of(tag_scheme="none"), None)


def test_numbers_get_their_names(write):
    records = make_records(T)
    names = ["O", "B-CAP", "I-CAP"]
    numbered = [record | {"label": [names.index(tag) for tag in record["label"]]} for record in records]
    named, by_number = make_experiment(write(T)), make_experiment(write(T, numbered, task__label_names=names))
    assert named.labels == by_number.labels
    assert named.data_fingerprint == by_number.data_fingerprint
    numbered[30]["label"][0] = 3
    with pytest.raises(UserError, match=r"train\.jsonl:7: the label '3' is neither one of task\.label_names nor"):
        make_experiment(write(T, numbered, task__label_names=names))
    assert make_experiment(write(T, records, task__tag_scheme="none")).metric == "f1"


def spans_of(words: list[str], tags: list[str]) -> tuple[str, list[tuple[int, int, str]]]:
    """Join words, and return the spans of their entities as characters."""
    starts = np.cumsum([0, *(len(word) + 1 for word in words)]).tolist()
    spans = [(starts[first], starts[last] + len(words[last]), kind) for kind, first, last in get_entities(tags)]
    return " ".join(words), spans


FORMS: dict[str, Any] = {
    "doccano": lambda start, end, kind: [start, end, kind],
    "prodigy": lambda start, end, kind: {"start": start, "end": end, "label": kind, "token_start": 0},
    "doccano's objects": lambda start, end, kind: {"id": 1, "label": kind, "start_offset": start, "end_offset": end},
    "label studio": lambda start, end, kind: {"start": start, "end": end, "text": "…", "labels": [kind]},
}


@pytest.mark.parametrize("form", FORMS)
def test_spans_of_characters_become_the_tags_of_the_words(form, write, capsys):
    records = []
    for record in make_records(T):
        text, spans = spans_of(record["text"], record["label"])
        records.append({"text": text, "spans": [FORMS[form](*span) for span in spans]})
    experiment = make_experiment(write(T, records, task__label="spans"))
    expected = make_experiment(write(T))
    assert experiment.labels == expected.labels and "spans of characters, with 1 kind: CAP" in capsys.readouterr().err
    for name in ("train", "validation"):
        examples, of_words = experiment.splits[name].examples, expected.splits[name].examples
        assert [encoding.ids for encoding in examples.encodings] == [encoding.ids for encoding in of_words.encodings]
        spans = [
            [(kind, words[first].start, words[last].end) for kind, first, last in get_entities(tags)]
            for tags, words in zip(examples.references, find_words(examples), strict=True)
        ]
        wanted = [
            [(kind, words[first].start, words[last].end) for kind, first, last in get_entities(tags)]
            for tags, words in zip(of_words.references, find_words(of_words), strict=True)
        ]
        assert spans == wanted


def test_spans_that_do_not_fit_words_are_counted(write, capsys):
    words = [(0, 4), (5, 9), (9, 10), (11, 16)]
    assert tag_words([Span(0, 4, "A"), Span(11, 16, "B")], words) == (["B-A", "O", "O", "B-B"], 0, 0, 0)
    assert tag_words([Span(0, 10, "A")], words) == (["B-A", "I-A", "I-A", "O"], 0, 0, 0)
    for start, end in ((2, 7), (2, 9), (0, 7)):
        assert tag_words([Span(start, end, "A")], words) == (["B-A", "I-A", "O", "O"], 1, 0, 0)
    assert tag_words([Span(5, 9, "A"), Span(0, 9, "B")], words) == (["B-B", "I-B", "O", "O"], 0, 1, 0)
    assert tag_words([Span(4, 5, "A"), Span(0, 5, "B")], words) == (["B-B", "O", "O", "O"], 0, 0, 1)
    records = [{"text": f"Anna saw Paris. {number}", "label": [[0, 4, "PER"], [9, 14, "LOC"]]} for number in range(40)]
    records[30]["label"] = [[1, 3, "PER"], [9, 14, "LOC"], [9, 10, "LOC"]]
    experiment = make_experiment(write(T, records))
    messages = capsys.readouterr().err
    assert "1 spans begin or end inside a word and were widened to whole words, such as in" in messages
    assert "1 spans overlap a longer span and were left out, such as in" in messages and "train.jsonl:7" in messages
    assert experiment.splits["train"].examples.references[6] == ["B-PER", "O", "B-LOC", "O", "O", *["O"] * 0]


@pytest.mark.parametrize(
    "span, message",
    [
        ([0, 99, "PER"], r"train\.jsonl:7: the span \[0, 99\] is outside of its text of 3 characters"),
        ([3, 3, "PER"], "is outside"),
        ([0, 1], r"\[0, 1\] is not a span; spans are \[start, end, label\]"),
        ({"start": 0, "end": 1}, "is not a span"),
        ([0, 1, ""], "is not a span"),
        ([0.0, 1, "PER"], "is not a span"),
    ],
)
def test_invalid_spans_are_named(span, message, write):
    records = [{"text": "Ada", "label": [[0, 3, "PER"]]} for _ in range(40)]
    records[30] = {"text": "Ada", "label": [span]}
    with pytest.raises(UserError, match=message):
        make_experiment(write(T, records))
    records[30] = {"text": ["Ada"], "label": ["B-PER"]}
    with pytest.raises(
        UserError, match=r"train\.jsonl:7: should be a text and a list of spans, as in the records before"
    ):
        make_experiment(write(T, records))
