"""Multiple choice: the forms of published data, examples, predictions, and a set that must be learned."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_tasks import SENTENCES, make_experiment, make_records, save_model
from transformers import BertForMultipleChoice

from bertlite.api import LoadedModel
from bertlite.config.finetune_settings import SavedTask, TaskSettings
from bertlite.core.errors import UserError
from bertlite.core.runtime import initialize_runtime
from bertlite.data.formats import Record
from bertlite.finetuning.choices import (
    collect_choice_names,
    find_right_choice,
    have_right_choice,
    read_choices,
    read_unlabelled,
)
from bertlite.finetuning.finetune import run

M = "multiple-choice"
ENDINGS = ["ending0", "ending1", "ending2", "ending3"]


def swag(label: Any) -> dict[str, Any]:
    return {"sent1": "He sits.", "sent2": "He", **dict(zip(ENDINGS, ["runs.", "eats.", "hums.", "naps."], strict=True)),
            "label": label}  # fmt: skip


def named(names: str, answer: str) -> dict[str, Any]:
    return {"choices": {"label": list(names), "text": [f"choice {name}" for name in names]}, "label": answer}


# Records as data sets are published, settings, what the choices are called, and the index of each right choice.
FORMS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[str], list[int]]] = {
    "SWAG": ([swag(0), swag(3)], {"choices": ENDINGS}, ["0", "1", "2", "3"], [0, 3]),
    "HellaSwag": ([{"endings": ["a", "b"], "label": "1"}] * 2, {"choices": "endings"}, ["0", "1"], [1, 1]),
    "RACE": (
        [{"options": list("wxyz"), "answer": "D"}, {"options": list("wxyz"), "answer": "B"}],
        {"choices": "options", "label": "answer"}, ["A", "B", "C", "D"], [3, 1],
    ),
    "WinoGrande": (
        [{"option1": "x", "option2": "y", "answer": "2"}, {"option1": "x", "option2": "y", "answer": "1"}],
        {"choices": ["option1", "option2"], "label": "answer"}, ["1", "2"], [1, 0],
    ),
    "ARC": ([named("1234", "4"), named("ABCDE", "E"), named("ABC", "B")], {}, list("ABCDE"), [3, 4, 1]),
    "texts": ([{"choices": ["Rome", "Oslo"], "label": "Oslo"}] * 2, {}, ["text"], [1, 1]),
    "numbers as texts": ([{"choices": ["12", "3"], "label": "12"}] * 2, {}, ["text"], [0, 0]),
    "no numbers": (
        [{"choices": ["4", "3", "2"], "label": "3"}, {"choices": ["3", "1"], "label": "3"}], {}, ["text"], [1, 0],
    ),
    "lists in texts": ([{"choices": "['a', 'b']", "label": 1}, {"choices": '["c", "d", "e"]', "label": "2"}],
                       {}, ["0", "1", "2"], [1, 2]),
    "some choices": (
        [swag("a"), {**swag("b"), "ending2": None, "ending3": ""}], {"choices": ENDINGS}, list("abcd"), [0, 1],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_the_right_choice_is_found_in_published_forms(name):
    columns, changes, names, rights = FORMS[name]
    settings = TaskSettings.model_validate({"train": "x", "type": M} | changes)
    records = [Record(f"row {number}", record) for number, record in enumerate(columns)]
    assert collect_choice_names(records, settings) == names
    assert [find_right_choice(record, names, settings) for record in records] == rights


def test_rows_without_a_label_are_known():
    settings = TaskSettings.model_validate({"train": "x", "type": M})
    records = [Record("", {"label": label}) for label in (0, "", None, -1, "-1", "B")] + [Record("", {"text": "a"})]
    assert have_right_choice(records, settings, []) == [True, False, False, False, False, True, False]


@pytest.mark.parametrize(
    "record, message",
    [
        ({"choices": "a"}, r"row: task\.choices \['choices'\] should be a column with a list of two texts or more"),
        ({"choices": ["a"]}, r"it holds \['a'\]"),
        ({"choices": ["a", None, "b"]}, r"row: a choice is empty: None"),
        ({"choices": ["a", 7]}, r"row: a choice holds no text: 7"),
        ({"text": "a"}, r"row: task\.choices: there is no column 'choices'; there are 'text'"),
    ],
)
def test_choices_that_cannot_be_read_are_named(record, message):
    with pytest.raises(UserError, match=message):
        read_choices(Record("row", record), TaskSettings.model_validate({"train": "x", "type": M}))


def test_an_empty_choice_to_predict_for_is_an_empty_text():
    settings = TaskSettings.model_validate({"train": "x", "type": M, "choices": ["a", "b", "c"]})
    record = Record("row", {"text": "t", "a": "x", "b": None, "c": "z"})
    assert read_unlabelled(record, settings) == ("t", "x", "", "z")
    assert read_unlabelled(Record("row", {"text": "t", "a": "x", "b": "y", "c": ""}), settings) == ("t", "x", "y")
    with pytest.raises(UserError, match="row: a choice holds no text: 7"):
        read_unlabelled(Record("row", {"text": "t", "a": "x", "b": 7, "c": "z"}), settings)


def test_labels_of_no_form_are_named(write):
    records = make_records(M)
    records[30]["label"] = 7
    with pytest.raises(UserError, match=r"train\.jsonl:\d+: the label '\d' is no choice; labels should all be indices"):
        run(write(M, records))
    records = make_records(M)
    records[3]["label"] = 3
    with pytest.raises(UserError, match=r"validation\.jsonl:4: the label '3' is no choice"):
        run(write(M, [{**record, "choices": record["choices"][:3]} for record in records]))


def test_choices_are_pairs_in_one_sequence(write):
    records = [{"article": text, "question": "What?", "options": ["yes", "no", text[:9]][: 2 + number % 2],
                "answer": "AB"[number % 2]} for number, (_, text) in enumerate(SENTENCES[:120])]  # fmt: skip
    columns = {"task__text": ["article", "question"], "task__choices": "options", "task__label": "answer"}
    experiment = make_experiment(write(M, records, **columns))
    assert experiment.labels == ["A", "B", "C"]
    split = experiment.splits["train"]
    examples, batches = split.examples, split.batches
    pairs = [(record["article"], f"What? {option}") for record in records[24:] for option in record["options"]]
    expected = experiment.tokenizer(*map(list, zip(*pairs, strict=True)), truncation=True, max_length=48)["input_ids"]
    assert [encoding.ids for encoding in examples.encodings] == expected
    lengths = map(len, experiment.tokenizer(*map(list, zip(*pairs, strict=True)), verbose=False)["input_ids"])
    too_long = {record for record, length in zip(examples.record_indices, lengths, strict=True) if length > 48}
    assert examples.num_truncated == len(too_long) > 0
    seen = []
    batch = batches.training(0, batches.num_sequences)
    for indices, labels in zip(batch.example_indices.tolist(), batch.labels.tolist(), strict=True):
        for place, label in enumerate(labels):
            members = [index for index in indices[3 * place : 3 * place + 3] if index >= 0]
            if members:
                (record,) = {examples.record_indices[index] for index in members}
                assert members == [index for index, of in enumerate(examples.record_indices) if of == record]
                assert label == examples.references[record] == record % 2
                seen.append(record)
    assert sorted(seen) == list(range(96))


def test_predictions_are_the_softmax_of_transformers_scores(vocabulary, tmp_path):
    folder = save_model(vocabulary, M, tmp_path, std=0.3)
    theirs = BertForMultipleChoice.from_pretrained(folder).eval()
    model = LoadedModel(folder, initialize_runtime("fp32"))
    names = ["context", "start"]
    model.model.task = SavedTask(type=M, text=names, max_length=48)
    rows = [["Who?", "It was", *text.split()[: 2 + number % 4]] for number, (_, text) in enumerate(SENTENCES[:70])]
    predictions = model.predict(["\t".join(row) for row in rows])
    for prediction, (context, start, *choices) in zip(predictions, rows, strict=True):
        inputs = model.tokenizer([context] * len(choices), [f"{start} {choice}" for choice in choices],
                                 padding=True, return_tensors="pt")  # fmt: skip
        probabilities = theirs(**{name: tensor[None] for name, tensor in inputs.items()}).logits[0].softmax(-1)
        best = int(probabilities.argmax())
        assert prediction["score"] == pytest.approx(probabilities[best].item(), abs=1e-5)
        label = str(best)  # the model's names are "0", …, "3"
        assert (prediction["label"], prediction["choice"]) == (label, choices[best])
    (ranking,) = model.predict(["\t".join(rows[3])], top_k=9)
    assert [entry["choice"] for entry in ranking] != rows[3][2:] or len(ranking) == 5
    assert sum(entry["score"] for entry in ranking) == pytest.approx(1) and len(ranking) == 5
    with pytest.raises(UserError, match=r"text 1: should be context and start and at least two choices, separated by"):
        model.predict(["Who?\tIt was\tAda"])


def make_riddles(count: int) -> list[dict[str, Any]]:
    """Make riddles: the right choice is the word of the context."""
    generator = np.random.default_rng(0)
    words = ["state", "people", "cells"]
    riddles = []
    for _ in range(count):
        choices = generator.permutation(words).tolist()[: generator.integers(2, 4)]
        right = int(generator.integers(len(choices)))
        riddles.append({"text": f"the {choices[right]}", "choices": choices, "label": choices[right]})
    return riddles


def test_a_rule_between_context_and_choice_is_learned(write, tmp_path, bertlite):
    no_dropout = {"model__hidden_dropout_prob": 0.0, "model__attention_probs_dropout_prob": 0.0}
    config = write(M, make_riddles(216), task__metric="accuracy", train__max_steps=300, train__learning_rate=4e-3,
                   train__eval_steps=100, train__global_batch_size=16, **no_dropout)  # fmt: skip
    assert run(config)["mean"] == 1.0
    records = make_riddles(400)[-50:]
    path = tmp_path / "new.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    code, out, _ = bertlite("predict", tmp_path / "run", "--file", path, "--json")
    assert code == 0
    predictions = [json.loads(line) for line in out.splitlines()]
    assert [prediction["label"] for prediction in predictions] == [record["label"] for record in records]
    saved = json.loads((Path(config.output_dir) / "model" / "task.json").read_text())
    assert saved["type"] == M and saved["choices"] == ["choices"]
    assert isinstance(BertForMultipleChoice.from_pretrained(tmp_path / "run" / "model"), torch.nn.Module)
