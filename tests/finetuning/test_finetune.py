"""Fine-tuning against transformers and against itself: training, evaluation, prediction, and every setting."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import ConfusionMatrixDisplay
from tiny_tasks import HEADS, SENTENCES, SUBJECTS, rows_of, with_head
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertForQuestionAnswering,
    pipeline,
)
from transformers.trainer_pt_utils import LabelSmoother

from bertlite.api import LoadedModel
from bertlite.config.finetune_settings import FinetuneConfig, FinetuneTrainSettings, TaskSettings
from bertlite.core.errors import Failure, UserError
from bertlite.core.random import EPOCH_ORDER, choose_validation, permute
from bertlite.core.runtime import initialize_runtime
from bertlite.core.signals import Stopped, stop_request
from bertlite.data.batches import Batch
from bertlite.data.formats import Record
from bertlite.data.masking import IGNORED
from bertlite.data.tokenizer import load_tokenizer
from bertlite.finetuning.batches import ExampleBatches, choose_sequence_length, count_sequences
from bertlite.finetuning.decoding import Outputs, group_entities
from bertlite.finetuning.evaluation import EvaluationResult, compute_outputs
from bertlite.finetuning.examples import context_offsets
from bertlite.finetuning.experiment import Experiment, initial_model, layerwise_decay, prepare, training_settings
from bertlite.finetuning.finetune import run
from bertlite.finetuning.labels import read_label, read_label_list
from bertlite.finetuning.losses import compute_scores, label_loss, sum_losses
from bertlite.finetuning.predict import predict, read_texts
from bertlite.finetuning.results import format_results, write_reports
from bertlite.finetuning.tasks import TASKS
from bertlite.model.heads import SequenceClassifier
from bertlite.model.huggingface import load_model
from bertlite.training.optim import Optimizer, learning_rate_factor


def prepared(config: FinetuneConfig) -> Experiment:
    return prepare(config, config.task, initialize_runtime("fp32"))


def log(folder: str | Path, key: str = "loss", seed: int = 0) -> list[float]:
    lines = map(json.loads, (Path(folder) / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model" / "model.safetensors")


def their_loss(model: Any, kind: str, examples: Any, member: int) -> tuple[torch.Tensor, int]:
    """transformers' own loss of one example by itself, and how many it is the mean of."""
    target = torch.as_tensor(np.asarray(examples.targets[member]))
    inputs = {
        "input_ids": torch.tensor([examples.encodings[member].ids]),
        "token_type_ids": torch.tensor([examples.encodings[member].type_ids]),
    }
    if kind == "question-answering":
        return model(**inputs, start_positions=target[:1], end_positions=target[1:]).loss, 1
    if kind == "classification":
        target = target.view(1)
    elif kind == "regression":
        target = target.view(1, 1)
    else:
        target = target[None]
    scored = int((target != IGNORED).sum()) if kind == "token-classification" else 1
    return model(**inputs, labels=target).loss, scored


@pytest.mark.parametrize("kind", TASKS)
def test_twenty_steps_are_those_of_transformers(kind, write, vocabulary, tmp_path):
    model = with_head(vocabulary, kind, tmp_path / "start", std=0.2)
    changes = {
        "train__max_steps": 20,
        "train__learning_rate": 5e-5,
        "train__eval_steps": 20,
        "model__init_from": str(model),
    }
    no_dropout = {"model__hidden_dropout_prob": 0.0, "model__attention_probs_dropout_prob": 0.0}
    config = write(kind, **changes, **no_dropout)
    run(config)

    work = prepared(config)
    train = work.splits["train"]
    batches = ExampleBatches(train.examples, 0, seed=0, sequence_length=train.batches.sequence_length)
    settings = training_settings(config.train, batches, 0)
    theirs = HEADS[kind][0].from_pretrained(model, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    groups = [
        {"params": [one for one in theirs.parameters() if one.ndim > 1], "weight_decay": 0.01},
        {"params": [one for one in theirs.parameters() if one.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=5e-5, betas=(0.9, 0.999), eps=1e-8)
    expected = []
    for step in range(20):
        samples = np.arange(step * settings.global_batch_size, (step + 1) * settings.global_batch_size)
        epochs = samples // batches.num_sequences
        places = permute(samples % batches.num_sequences, batches.num_sequences, (batches.seed, EPOCH_ORDER), epochs)
        members = [int(one) for pair in zip(epochs, places, strict=True) for one in batches.members(*map(int, pair))]
        losses = [their_loss(theirs, kind, train.examples, member) for member in members]
        loss = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 5e-5 * learning_rate_factor(step, settings)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert expected[0] != pytest.approx(expected[-1], abs=1e-3)
    assert log(config.output_dir) == pytest.approx(expected, abs=1e-5, rel=0)


@pytest.mark.parametrize("kind", TASKS)
def test_packed_examples_score_as_each_does_alone_in_transformers(kind, write, vocabulary, tmp_path):
    model = with_head(vocabulary, kind, tmp_path / "start", std=0.2)
    work = prepared(write(kind, model__init_from=str(model)))
    ours, theirs = load_model(model), HEADS[kind][0].from_pretrained(model).eval()
    part = work.splits["validation"]
    outputs, losses, loss = compute_outputs(ours, part.batches, work.runtime, compute_scores, work.task.loss)
    total = scored = 0.0
    for member, output in enumerate(outputs):
        encoding = part.examples.encodings[member]
        ids, types = torch.tensor([encoding.ids]), torch.tensor([encoding.type_ids])
        result = theirs(input_ids=ids, token_type_ids=types)
        logits = result.logits if "logits" in result else torch.stack([result.start_logits, result.end_logits], -1)
        np.testing.assert_allclose(output, logits[0].detach(), atol=1e-5)
        one, count = their_loss(theirs, kind, part.examples, member)
        assert losses[member] == pytest.approx(one.item() if count else 0, abs=1e-5)
        total, scored = total + one.item() * count, scored + count
    assert loss == pytest.approx(total / scored, abs=1e-5)


def test_batches_are_a_pure_function_of_seed_and_row_and_waste_little(write):
    work = prepared(write(task__train="sample", task__validation="sample", task__max_length=64))
    batches = work.splits["train"].batches
    again = ExampleBatches(batches.examples, 0, batches.seed, batches.sequence_length)
    assert batches.padding <= 0.05
    assert batches.lengths.sum() / (batches.num_sequences * batches.sequence_length) == pytest.approx(
        1 - batches.padding
    )
    for first in (
        3 * batches.num_sequences + 5,
        0,
        batches.num_sequences - 1,
    ):  # in any order, across the ends of epochs
        one, other = batches.training(first, 3), again.training(first, 3)
        assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))
        assert one.input_ids.shape == (3, batches.sequence_length)
    seen = []
    for epoch in range(2):
        batch = batches.training(epoch * batches.num_sequences, batches.num_sequences)
        assert batch.tokens() == batches.lengths.sum()
        counts = torch.bincount(batch.labels[batch.labels != IGNORED], minlength=7)
        assert counts.tolist() == np.bincount(batches.examples.targets, minlength=7).tolist()
        members = [sorted(batches.members(epoch, row).tolist()) for row in range(batches.num_sequences)]
        assert sorted(one for row in members for one in row) == list(range(1330))
        seen.append(sorted(map(tuple, members)))
    assert len(set(seen[0]) & set(seen[1])) < batches.num_sequences / 2  # other mates in each epoch
    other = ExampleBatches(batches.examples, 0, 1, batches.sequence_length).training(0, 3)
    assert not torch.equal(other.input_ids, batches.training(0, 3).input_ids)


@pytest.mark.parametrize("kind", TASKS)
def test_a_run_leaves_results_and_a_model_that_gives_them(kind, write):
    config = write(kind, train__seeds=[0, 1], train__max_steps=12)
    results = run(config)
    folder = Path(config.output_dir)
    assert json.loads((folder / "results.json").read_text()) == results
    assert set(results["seeds"]) == {"0", "1"} and results["metric"] == next(iter(TASKS[kind].metrics))
    values = [seed[results["metric"]] for seed in results["seeds"].values()]
    assert results["mean"] == pytest.approx(sum(values) / 2)
    assert results["std"] == pytest.approx(np.std(values, ddof=1))
    best = max(results["seeds"], key=lambda seed: results["seeds"][seed]["validation_" + results["metric"]])
    assert max(log(folder, f"eval_{results['metric']}", int(best))) == results["seeds"][best][results["metric"]]
    work = prepared(config)
    scores = work.evaluate(load_model(folder / "model"), "validation").scores
    assert scores == pytest.approx({name: results["seeds"][best][name] for name in scores}, abs=1e-4)
    worst = [json.loads(line) for line in (folder / "worst.jsonl").read_text().splitlines()]
    assert len(worst) == 24 and worst == sorted(worst, key=lambda line: -line["loss"]) and "predicted" in worst[0]
    mean = sum(line["loss"] for line in worst) / 24
    if kind not in ("token-classification", "question-answering"):  # those have means over tokens and pieces
        assert mean == pytest.approx(scores["loss"], rel=1e-4)
    assert (folder / "confusion.png").exists() == (kind == "classification")
    assert not list(folder.rglob("checkpoints"))


PIPELINES = {
    "classification": ("text-classification", {}),
    "multilabel": ("text-classification", {}),
    "regression": ("text-classification", {}),
    "token-classification": ("token-classification", {"aggregation_strategy": "first"}),
}


@pytest.mark.parametrize("kind", PIPELINES)
def test_predictions_are_those_of_the_pipeline(kind, vocabulary, tmp_path):
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


def test_tags_of_words_become_entities_as_seqeval_has_them(vocabulary):
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


def test_answers_are_the_likeliest_spans_of_the_context(vocabulary, tmp_path):
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


def test_resuming_is_bit_for_bit(write, tmp_path):
    whole, cut = write(name="whole", train__seeds=[0, 1]), write(name="cut", train__seeds=[0, 1])
    run(whole)
    measured = ExampleBatches.training

    def interrupted(self: ExampleBatches, first: int, count: int) -> Batch:
        if self.seed == 1 and first >= 4 * count:
            stop_request.number = 15
        return measured(self, first, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExampleBatches, "training", interrupted)
        with pytest.raises(Stopped):
            run(cut)
    stop_request.number = 0
    assert (tmp_path / "cut/seed-0/results.json").exists() and list((tmp_path / "cut/seed-1/checkpoints").iterdir())
    assert not (tmp_path / "cut" / "results.json").exists()
    results = run(cut, resume=True)
    assert results == json.loads((tmp_path / "whole/results.json").read_text())
    assert log(tmp_path / "cut", seed=1) == log(tmp_path / "whole", seed=1)
    one, other = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert run(cut, resume=True) == results  # it has finished
    gone = cut.model_copy(update={"model": cut.model.model_copy(update={"init_from": str(tmp_path / "gone")})})
    source = Path(cut.model.init_from)
    source.rename(tmp_path / "gone")
    assert run(cut, resume=True) == results
    (tmp_path / "gone").rename(source)
    with pytest.raises(UserError, match=r"model\.init_from is .*gone"):
        run(gone, resume=True)
    with pytest.raises(UserError, match="already holds a run"):
        run(cut)
    with pytest.raises(UserError, match=r"train\.max_steps is 7, but the run there has 6"):
        run(write(name="cut", train__seeds=[0, 1], train__max_steps=7), resume=True)


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_best_checkpoint_is_kept_and_patience_ends_training(interrupted, write, monkeypatch):
    config = write(train__max_steps=12, train__eval_steps=1, train__early_stopping_patience=3)
    values = [0.2, 0.5, 0.4, 0.3, 0.5, 0.9, 0.9]
    measured = []
    evaluate = Experiment.evaluate

    def scripted(experiment: Experiment, model: Any, split: str) -> EvaluationResult:
        evaluation = evaluate(experiment, model, split)
        measured.append(evaluation.scores["loss"])
        if interrupted and len(measured) == 4:
            stop_request.number = 15
        return replace(evaluation, scores={**evaluation.scores, "accuracy": values[len(measured) - 1]})

    monkeypatch.setattr(Experiment, "evaluate", scripted)
    if interrupted:
        with pytest.raises(Stopped):
            run(config)
        stop_request.number = 0
    results = run(config, resume=interrupted)
    assert results["seeds"]["0"]["best_step"] == 2  # 0.5 again is not better
    assert results["seeds"]["0"]["validation_accuracy"] == 0.5
    assert log(config.output_dir, "eval_accuracy") == [0.2, 0.5, 0.4, 0.3, 0.5]
    assert measured[5] == measured[1] != measured[4]  # what is measured at the end is the model of step 2


CHANGES: dict[str, Any] = {
    "num_train_epochs": 1,
    "max_steps": 7,
    "global_batch_size": 16,
    "gradient_checkpointing": None,
    "optim": "muon",
    "learning_rate": 2e-3,
    "weight_decay": 0.5,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 1e-2,
    "warmup_ratio": 0.5,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.01,
    "precision": "bf16",
    "seeds": [3],
    "label_smoothing_factor": 0.3,
    "layerwise_lr_decay": 0.5,
    "frozen_layers": 1,
    "class_weights": "balanced",
    "hidden_dropout_prob": 0.5,
    "attention_probs_dropout_prob": 0.5,
    "max_length": 16,
    "validation_split": 0.5,
}


@pytest.fixture
def usual(write) -> list[float]:
    config = write(name="usual", train__max_steps=None, train__num_train_epochs=0.5, task__validation=None)
    run(config)
    return log(config.output_dir)


def test_every_setting_changes_the_training(write, usual):
    for name, value in CHANGES.items():
        if value is None:  # which may change no number
            continue
        section = "task" if name in ("class_weights", "max_length", "validation_split") else "train"
        section = "model" if "dropout" in name else section
        changes = {"train__max_steps": None, "train__num_train_epochs": 0.5, "task__validation": None}
        config = write(name=name, **(changes | {f"{section}__{name}": value}))
        run(config)
        assert log(config.output_dir, seed=3 if name == "seeds" else 0) != usual, name
    untested = FinetuneTrainSettings.model_fields.keys() - CHANGES.keys()
    assert untested == {"per_device_train_batch_size", "muon_learning_rate", "compile", "logging_steps", "eval_steps",
                        "early_stopping_patience"}  # fmt: skip


def test_settings_that_may_change_no_loss(write, usual, monkeypatch):
    changes = {"train__max_steps": None, "train__num_train_epochs": 0.5, "task__validation": None}
    still = {"model__hidden_dropout_prob": 0.0, "model__attention_probs_dropout_prob": 0.0}
    config = write(name="still", **changes, **still)
    run(config)
    calls = []
    monkeypatch.setattr("bertlite.model.bert.checkpoint", lambda *a, **b: calls.append(1) or checkpoint(*a, **b))
    counters.clear()
    for name, value in {"per_device_train_batch_size": 1, "gradient_checkpointing": True, "compile": True}.items():
        other = write(name=name, **changes, **still, **{f"train__{name}": value})
        run(other)
        assert log(other.output_dir) == pytest.approx(log(config.output_dir), rel=1e-4), name
        assert bool(calls) == (name == "gradient_checkpointing")
        assert bool(counters["stats"]["unique_graphs"]) == (name == "compile")
        calls.clear()
    config = write(name="muon", **changes, train__optim="muon")
    faster = write(name="faster", **changes, train__optim="muon", train__muon_learning_rate=0.1)
    run(config), run(faster)
    assert log(config.output_dir) != log(faster.output_dir)
    config = write(name="intervals", train__logging_steps=2, train__eval_steps=2, train__max_steps=4)
    run(config)
    assert len(log(config.output_dir)) == len(log(config.output_dir, "eval_accuracy")) == 2


def test_an_epoch_is_all_examples_and_a_step_as_many_as_asked_for(write):
    sample = {"task__train": "sample", "task__validation": "sample"}
    config = write(**sample, train__max_steps=None, train__num_train_epochs=3, train__global_batch_size=32)
    batches = prepared(config).splits["train"].batches
    settings = training_settings(config.train, batches, 0)
    rows = range(settings.max_steps * settings.global_batch_size)
    seen = sum(len(batches.members(*divmod(row, batches.num_sequences))) for row in rows)
    assert seen == pytest.approx(3 * 1330, rel=0.05)
    assert seen / settings.max_steps == pytest.approx(32, rel=0.1)


def test_two_ranks_fine_tune_like_one(write, tmp_path):
    still = {"model__hidden_dropout_prob": 0.0, "model__attention_probs_dropout_prob": 0.0}
    one = run(write(name="one", **still))
    write(name="two", **still)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "bertlite", "finetune", tmp_path / "two.yaml", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert json.loads(done.stdout.splitlines()[-1])["seeds"]["0"] == pytest.approx(one["seeds"]["0"], abs=1e-4)
    assert log(tmp_path / "two") == pytest.approx(log(tmp_path / "one"), abs=1e-5)


def test_findings_are_the_worst_hundred_and_which_label_is_taken_for_which(write, tmp_path, monkeypatch):
    work = prepared(write(rows=[{"text": text, "label": label} for label, text in SENTENCES[:300]]))
    predictions = [(target + 1) % 7 for target in work.splits["train"].examples.targets]
    drawn, plot = [], ConfusionMatrixDisplay.plot
    monkeypatch.setattr(
        ConfusionMatrixDisplay, "plot", lambda self, **o: drawn.append(self.confusion_matrix) or plot(self, **o)
    )
    evaluation = EvaluationResult({}, predictions, list(range(276)))
    write_reports(tmp_path, work.task, work.labels, work.splits["train"], evaluation)
    worst = [json.loads(line) for line in (tmp_path / "worst.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in worst] == list(range(275, 175, -1))
    assert all(line["predicted"] == work.labels[(work.labels.index(line["label"]) + 1) % 7] for line in worst)
    assert np.array_equal(drawn[0], np.roll(np.eye(7), 1, axis=1))


def test_the_loss_that_is_measured_has_no_weights(write):
    plain, weighted = prepared(write()), prepared(write(task__class_weights="balanced"))
    model = initial_model(plain, "sdpa", 0)
    assert plain.evaluate(model, "validation").scores == weighted.evaluate(model, "validation").scores


def test_questions_follow_their_settings(write):
    counts = []
    for stride in (1, 12):
        work = prepared(write(Q, task__max_length=32, task__doc_stride=stride))
        counts.append(len(work.splits["train"].examples.encodings))
    assert 96 < counts[0] < counts[1]
    examples = work.splits["train"].examples
    scores = [np.outer(np.arange(len(encoding)), [-1.0, 1.0]) for encoding in examples.encodings]
    for most in (1, 3):
        settings = work.settings.model_copy(update={"max_answer_length": most})
        answers = work.task.decode(Outputs(scores, examples, work.labels, settings))
        assert max(len(work.tokenizer.tokenize(answer)) for answer in answers) == most


def test_a_loss_that_is_not_finite_ends_with_advice_that_can_be_followed(write):
    with pytest.raises(Failure, match="not finite at step") as failure:
        run(write(train__learning_rate=1e30, train__num_train_epochs=3))
    advice = "start a new run with a lower train.learning_rate or more warm-up"
    assert str(failure.value).splitlines()[1:] == [advice] and "batch" not in str(failure.value)


def test_weights_of_labels_that_look_like_numbers():
    settings = TaskSettings.model_validate({"train": "x", "class_weights": {0: 1.0, "1": 2.0}})
    assert settings.class_weights == {"0": 1.0, "1": 2.0}


def test_layerwise_rates_and_frozen_layers(write):
    config = write(train__frozen_layers=1, train__max_steps=2)
    run(config)
    before, after = load_file(Path(str(config.model.init_from)) / "model.safetensors"), weights(config.output_dir)
    for name, weight in before.items():
        frozen = name.startswith(("embeddings.", "encoder.layer.0."))
        assert torch.equal(weight, after[f"bert.{name}"]) == frozen, name
    work = prepared(config)
    model = initial_model(work, "sdpa", 0)
    optimizer = Optimizer(
        model, training_settings(config.train, work.splits["train"].batches, 0), layerwise_decay(0.5, 2)
    )
    rates = {
        name: group["lr"] / 1e-3
        for part in optimizer.parts
        for group in part.param_groups
        for name, tensor in optimizer.tensors.items()
        if any(tensor is one for one in group["params"])
    }
    for start_of_name, rate in {"encoder.embeddings.word": 0.125, "encoder.layers.0.attention.qkv.weight.q": 0.25,
                                "encoder.layers.1.norm.bias": 0.5, "encoder.pooler": 1, "classifier": 1,
                                }.items():  # fmt: skip
        found = {value for name, value in rates.items() if name.startswith(start_of_name)}
        assert {round(one, 9) for one in found} == {rate}, start_of_name
    assert rates.keys() == optimizer.tensors.keys()
    optimizer.step(1.0)
    assert optimizer.learning_rate() == pytest.approx(1e-3)


def test_label_smoothing_is_that_of_transformers(write):
    batch = prepared(write()).splits["train"].batches.training(0, 3)
    scores = torch.randn(*batch.labels.shape, 7)
    loss, count = sum_losses(*label_loss(scores, batch, smoothing=0.2))
    expected = LabelSmoother(epsilon=0.2)({"logits": scores}, batch.labels)
    assert (loss / count).item() == pytest.approx(expected.item(), rel=1e-5)


def test_class_weights(write):
    config = write(task__class_weights={SUBJECTS[0]: 3.0})
    work = prepared(config)
    weights = work.class_weights
    assert weights.tolist() == [3.0] + [1.0] * 6
    balanced = prepared(write(task__class_weights="balanced")).class_weights
    counts = np.bincount(work.splits["train"].examples.targets)
    assert (balanced.numpy() * counts).tolist() == pytest.approx([96 / 7] * 7)
    batch = work.splits["train"].batches.training(0, 3)
    scores = torch.randn(*batch.labels.shape, 7)
    real = batch.labels != IGNORED
    each = torch.nn.functional.cross_entropy(scores[real], batch.labels[real], reduction="none")
    expected = (each * torch.where(batch.labels[real] == 0, 3.0, 1.0)).sum()
    assert sum_losses(*label_loss(scores, batch, weights))[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_several_tasks_and_their_table(write, tmp_path):
    config = write()
    other = config.task.model_copy(update={"metric": "macro_f1"})
    suite = FinetuneConfig(model=config.model, tasks={"one": config.task, "two": other}, train=config.train,
                           output_dir=str(tmp_path / "suite"))  # fmt: skip
    results = run(suite)
    assert json.loads((tmp_path / "suite" / "results.json").read_text()) == results
    lines = format_results(results).splitlines()
    assert (
        lines[0].startswith("one") and "accuracy" in lines[0] and lines[1].startswith("two") and "macro_f1" in lines[1]
    )
    shutil.rmtree(tmp_path / "suite" / "two")
    assert run(suite, resume=True) == results
    gone = other.model_copy(update={"validation": other.train.model_copy(update={"path": "gone.tsv"})})
    for name, task, message in [
        ("two", gone, r"tasks\.two\.validation: gone\.tsv: there is no such file"),
        ("../two", other, r"tasks\.\.\./two: the name of a task is also the name of its folder"),
        ("two", other.model_copy(update={"metric": "f2"}), r"tasks\.two\.metric is 'f2'"),
    ]:
        changes = {"tasks": {"one": config.task, name: task}, "output_dir": str(tmp_path / "other")}
        with pytest.raises(UserError, match=message):
            run(suite.model_copy(update=changes))
        assert not (tmp_path / "other").exists()


def bad_rows(kind: str, number: int, **changes: Any) -> list[dict[str, Any]]:
    rows = rows_of(kind)
    rows[number] |= changes
    return rows


C, R, T, Q = "classification", "regression", "token-classification", "question-answering"
BAD: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "label in dev alone": (C, bad_rows(C, 3, label="new"), {}, r"validation\.jsonl:4: the label 'new' does not occur"),
    "one class": (C, [row | {"label": "a"} for row in rows_of(C)], {}, r"all 96 examples have the label 'a'"),
    "column": (C, None, {"task__text": "sentence"}, r"no column 'sentence'; there are 'text', 'label'"),
    "label column": (C, None, {"task__label": "y"}, r"task\.label: there is no column 'y'"),
    "empty": (C, bad_rows(C, 30, text=" "), {}, r"train\.jsonl:7: the column 'text' is empty"),
    "no label": (C, bad_rows(C, 30, label=None), {}, r"train\.jsonl:7: the label in column 'label' is empty"),
    "NaN": (R, bad_rows(R, 30, label=math.nan), {}, r"train\.jsonl:7: the target in column 'label' is nan"),
    "no number": (R, bad_rows(R, 30, label="much"), {}, r"is 'much', not a finite number"),
    "no number that fp32 has": (R, bad_rows(R, 30, label=1e39), {}, r"is 1e\+39, not a finite number"),
    "a number of many digits": (R, bad_rows(R, 30, label=10**400), {}, r"not a finite number"),
    "a list": (C, bad_rows(C, 30, label=["a"]), {}, r"train\.jsonl:7: the label .* is \['a'\], not a single text"),
    "tags": (T, bad_rows(T, 30, label=["O"]), {}, r"train\.jsonl:7: 15 words, but 1 tags"),
    "words": (T, bad_rows(T, 30, text="Ada spoke"), {}, r"train\.jsonl:7: .* should be lists of words and of tags"),
    "no words": (T, bad_rows(T, 30, text=[], label=[]), {}, r"train\.jsonl:7: the sentence is empty"),
    "no labels": ("multilabel", [row | {"label": ""} for row in rows_of("multilabel")], {}, "no example has a label"),
    "tag": (T, bad_rows(T, 30, text=["x"], label=["B"]), {}, r"'B' is not a tag"),
    "no entity": (T, [row | {"label": ["O"] * len(row["text"])} for row in rows_of(T)], {}, "all tags .* are O"),
    "answers": (Q, bad_rows(Q, 30, answers="x"), {}, r"answers should hold the lists text and answer_start"),
    "stride": (Q, None, {"task__doc_stride": 62}, r"task\.doc_stride is 62, which leaves no room"),
    "length": (C, None, {"task__max_length": 200}, r"task\.max_length is 200, more than the 128 positions"),
    "type": (
        C,
        None,
        {"task__type": "klassification"},
        r"task\.type is 'klassification'.* Did you mean classification",
    ),
    "metric": (C, None, {"task__metric": "pearson"}, r"task\.metric is 'pearson', which is not one of accuracy"),
    "weights": (R, None, {"task__class_weights": "balanced"}, r"task\.class_weights .* regression does not use it"),
    "weight": (C, None, {"task__class_weights": {"x": 2}}, r"task\.class_weights: 'x' is not a label"),
    "smoothing": (R, None, {"train__label_smoothing_factor": 0.1}, r"regression does not use it"),
    "layers": (C, None, {"train__frozen_layers": 5}, r"train\.frozen_layers is 5; the model has 2"),
    "texts": (T, None, {"task__text": ["a", "b"]}, r"task\.text names 2 columns; token-classification reads 1"),
    "model": (C, None, {"model__init_from": None}, r"no model to start from: give it by --model"),
    "no model": (C, None, {"model__init_from": "/nowhere"}, r"/nowhere: no such model folder"),
    "one row": (
        R,
        rows_of(R)[:25],
        {"task__validation": None},
        r"task\.train holds one example, too few to split",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_leaves_nothing_behind(name, write, tmp_path):
    kind, rows, changes, message = BAD[name]
    with pytest.raises(UserError, match=message):
        run(write(kind, rows, **changes))
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*"))


def test_a_label_is_the_same_with_and_without_blanks_around_it():
    settings = TaskSettings.model_validate({"train": "x", "type": "multilabel"})
    assert read_label(Record("", {"label": " a "}), settings) == "a"
    for value, wanted in {0: ["0"], 1: ["1"], "": [], "a, b": ["a", "b"]}.items():
        assert read_label_list(Record("", {"label": value}), settings) == wanted


@pytest.mark.parametrize("lengths", [[12], [140, 9], [90, 60, 61, 130, 20, 77, 50, 52, 30, 100]])
def test_few_examples_take_few_positions(lengths):
    """Less than as many again as there are tokens, where no length of rows packs them well."""
    sequence_length = choose_sequence_length(np.array(lengths))
    assert count_sequences(np.array(lengths), sequence_length) * sequence_length < 2 * sum(lengths) + 8
    assert sequence_length % 8 == 0 and sequence_length >= max(lengths)


def test_answers_that_are_not_in_their_context_are_counted_and_left_out(write, capsys):
    rows = rows_of(Q)
    for number in (30, 31):
        rows[number]["answers"] = {"text": ["not there"], "answer_start": [2]}
    config = write(Q, rows)
    work = prepared(config)
    assert "2 of 96 questions have no answer at their answer_start, such as" in capsys.readouterr().err
    examples = work.splits["train"].examples
    pairs = list(zip(examples.record_indices, examples.targets, strict=True))
    ignored = {record for record, target in pairs if target[0] == IGNORED}
    assert ignored == {6, 7}
    texts = {number: row["answers"]["text"][0] for number, row in enumerate(rows[24:])}
    found = set()
    for encoding, (record, target) in zip(examples.encodings, pairs, strict=True):
        if target[0] > 0:
            offsets = context_offsets(encoding)
            covered = rows[24 + record]["context"][offsets[target[0], 0] : offsets[target[1], 1]]
            assert texts[record] in covered and len(encoding) >= target[1]
            found.add(record)
    assert len(found) > 80


def test_what_is_neither_measured_nor_trained_is_told(write, vocabulary, capsys):
    rows = rows_of("classification")
    labels = sorted({row["label"] for row in rows})
    other = next(row for row in rows if row["label"] != labels[0])
    config = write("classification", [row if row["label"] != labels[0] else other for row in rows[:24]] + rows[24:])
    prepared(config)
    told = capsys.readouterr().err
    assert f"validation: no example has the label {labels[0]}, so it is not measured" in told
    assert (
        "has the label" not in told.replace("validation: no example has the label", "")
        and "later positions" not in told
    )

    train = [
        {**row, "label": "rare" if out else row["label"]}
        for row, out in zip(rows[24:], choose_validation(len(rows[24:]), 0.1), strict=True)
    ]
    prepared(write("classification", rows[:24] + train, task__validation=None))
    assert "train: no example has the label rare, so it is not learned" in capsys.readouterr().err

    tokenizer = load_tokenizer(str(config.model.init_from))
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(str(config.model.init_from))
    longest = int(max(part.batches.lengths.max() for part in prepared(config).splits.values()))
    assert longest > 16
    assert f"examples have up to {longest} tokens, but {config.model.init_from} was trained on 16" in (
        capsys.readouterr().err
    )


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


def test_sequence_heads_read_each_example_of_a_row(write):
    """A wrong place for an example's first token would be seen."""
    work = prepared(write())
    model = initial_model(work, "sdpa", 0)
    assert isinstance(model, SequenceClassifier)
    batch = work.splits["train"].batches.training(0, 2)
    scores = compute_scores(model.eval(), batch)
    assert scores.shape == (*batch.labels.shape, 7)
    real = batch.labels != IGNORED
    assert len(scores[real].unique(dim=0)) == int(real.sum())
