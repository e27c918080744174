"""Each type of task against transformers: training, scores, losses, and the results of a run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_tasks import HEADS, SUBJECTS, make_experiment, read_metric, save_model, transformers_loss
from transformers.trainer_pt_utils import LabelSmoother

from bertlite.core.random import EPOCH_ORDER, permute
from bertlite.data.masking import IGNORED
from bertlite.finetuning.batches import ExampleBatches
from bertlite.finetuning.experiment import build_initial_model, make_train_settings
from bertlite.finetuning.finetune import run
from bertlite.finetuning.losses import compute_outputs, compute_scores, label_loss, sum_losses
from bertlite.finetuning.tasks import TASKS
from bertlite.model.heads import SequenceClassifier
from bertlite.model.huggingface import load_model
from bertlite.training.optim import learning_rate_factor


@pytest.mark.parametrize("kind", TASKS)
def test_twenty_steps_equal_those_of_transformers(kind, write, vocabulary, tmp_path):
    model = save_model(vocabulary, kind, tmp_path / "start", std=0.2)
    steps = {"train__max_steps": 20, "train__learning_rate": 5e-5, "train__eval_steps": 20}
    no_dropout = {"model__hidden_dropout_prob": 0.0, "model__attention_probs_dropout_prob": 0.0}
    config = write(kind, model__init_from=str(model), **steps, **no_dropout)
    run(config)

    experiment = make_experiment(config)
    train = experiment.splits["train"]
    batches = ExampleBatches(train.examples, 0, seed=0, sequence_length=train.batches.sequence_length)
    settings = make_train_settings(config.train, batches, 0)
    theirs = HEADS[kind][0].from_pretrained(model, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    groups = [
        {"params": [weight for weight in theirs.parameters() if weight.ndim > 1], "weight_decay": 0.01},
        {"params": [weight for weight in theirs.parameters() if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=5e-5, betas=(0.9, 0.999), eps=1e-8)
    expected = []
    for step in range(20):
        samples = np.arange(step * settings.global_batch_size, (step + 1) * settings.global_batch_size)
        epochs = samples // batches.num_sequences
        order = permute(samples % batches.num_sequences, batches.num_sequences, (batches.seed, EPOCH_ORDER), epochs)
        losses = [
            transformers_loss(theirs, kind, train.examples, batches.group_starts[member])
            for epoch, sequence in zip(epochs.tolist(), order.tolist(), strict=True)
            for member in batches.members(epoch, sequence)
        ]
        loss = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 5e-5 * learning_rate_factor(step, settings)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert expected[0] != pytest.approx(expected[-1], abs=1e-3)
    assert read_metric(config.output_dir) == pytest.approx(expected, abs=1e-5, rel=0)


@pytest.mark.parametrize("kind", TASKS)
def test_packed_examples_have_the_scores_of_each_alone_in_transformers(kind, write, vocabulary, tmp_path):
    model = save_model(vocabulary, kind, tmp_path / "start", std=0.2)
    experiment = make_experiment(write(kind, model__init_from=str(model)))
    ours, theirs = load_model(model), HEADS[kind][0].from_pretrained(model).eval()
    split = experiment.splits["validation"]
    loss_of_task = experiment.task.loss
    outputs, losses, loss = compute_outputs(ours, split.batches, experiment.runtime, compute_scores, loss_of_task)
    total = num_counted = 0.0
    for member, output in enumerate(outputs):
        encoding = split.examples.encodings[member]
        ids, types = torch.tensor([encoding.ids]), torch.tensor([encoding.type_ids])
        if kind == "multiple-choice":
            ids, types = ids[None], types[None]
        result = theirs(input_ids=ids, token_type_ids=types)
        logits = result.logits if "logits" in result else torch.stack([result.start_logits, result.end_logits], -1)
        np.testing.assert_allclose(output, logits[0].detach(), atol=1e-5)
        expected, count = transformers_loss(theirs, kind, split.examples, member)
        assert losses[member] == pytest.approx(expected.item() if count else 0, abs=1e-5)
        total, num_counted = total + expected.item() * count, num_counted + count
    assert loss == pytest.approx(total / num_counted, abs=1e-5)


@pytest.mark.parametrize("kind", TASKS)
def test_a_run_writes_results_and_the_model_that_has_them(kind, write):
    config = write(kind, train__seeds=[0, 1], train__max_steps=12)
    results = run(config)
    folder = Path(config.output_dir)
    assert json.loads((folder / "results.json").read_text()) == results
    assert set(results["seeds"]) == {"0", "1"} and results["metric"] == next(iter(TASKS[kind].metrics))
    values = [seed[results["metric"]] for seed in results["seeds"].values()]
    assert results["mean"] == pytest.approx(sum(values) / 2)
    assert results["std"] == pytest.approx(np.std(values, ddof=1))
    best = max(results["seeds"], key=lambda seed: results["seeds"][seed]["validation_" + results["metric"]])
    assert max(read_metric(folder, f"eval_{results['metric']}", int(best))) == results["seeds"][best][results["metric"]]
    experiment = make_experiment(config)
    scores = experiment.evaluate(load_model(folder / "model"), "validation").scores
    assert scores == pytest.approx({name: results["seeds"][best][name] for name in scores}, abs=1e-4)
    worst = [json.loads(line) for line in (folder / "worst.jsonl").read_text().splitlines()]
    assert len(worst) == 24 and worst == sorted(worst, key=lambda line: -line["loss"]) and "predicted" in worst[0]
    mean = sum(line["loss"] for line in worst) / 24
    if kind not in ("token-classification", "question-answering"):  # whose loss is not a mean over records
        assert mean == pytest.approx(scores["loss"], rel=1e-4)
    assert (folder / "confusion.png").exists() == (kind == "classification")
    assert not list(folder.rglob("checkpoints"))


def test_label_smoothing_equals_that_of_transformers(write):
    batch = make_experiment(write()).splits["train"].batches.training(0, 3)
    scores = torch.randn(*batch.labels.shape, 7)
    loss, count = sum_losses(*label_loss(scores, batch, smoothing=0.2))
    expected = LabelSmoother(epsilon=0.2)({"logits": scores}, batch.labels)
    assert (loss / count).item() == pytest.approx(expected.item(), rel=1e-5)


def test_class_weights(write):
    config = write(task__class_weights={SUBJECTS[0]: 3.0})
    experiment = make_experiment(config)
    weights = experiment.class_weights
    assert weights.tolist() == [3.0] + [1.0] * 6
    balanced = make_experiment(write(task__class_weights="balanced")).class_weights
    counts = np.bincount(experiment.splits["train"].examples.targets)
    assert (balanced.numpy() * counts).tolist() == pytest.approx([96 / 7] * 7)
    batch = experiment.splits["train"].batches.training(0, 3)
    scores = torch.randn(*batch.labels.shape, 7)
    real = batch.labels != IGNORED
    each = torch.nn.functional.cross_entropy(scores[real], batch.labels[real], reduction="none")
    expected = (each * torch.where(batch.labels[real] == 0, 3.0, 1.0)).sum()
    assert sum_losses(*label_loss(scores, batch, weights))[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_evaluation_loss_has_no_class_weights(write):
    plain, weighted = make_experiment(write()), make_experiment(write(task__class_weights="balanced"))
    model = build_initial_model(plain, "sdpa", 0)
    assert plain.evaluate(model, "validation").scores == weighted.evaluate(model, "validation").scores


def test_sequence_heads_read_the_first_token_of_each_packed_example(write):
    """At a wrong position, two examples would have the same scores."""
    experiment = make_experiment(write())
    model = build_initial_model(experiment, "sdpa", 0)
    assert isinstance(model, SequenceClassifier)
    batch = experiment.splits["train"].batches.training(0, 2)
    scores = compute_scores(model.eval(), batch)
    assert scores.shape == (*batch.labels.shape, 7)
    real = batch.labels != IGNORED
    assert len(scores[real].unique(dim=0)) == int(real.sum())
