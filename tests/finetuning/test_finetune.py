"""Runs of fine-tuning: resuming, the best checkpoint, several tasks, ranks, reports."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from processes import run_ranks
from tiny_tasks import SENTENCES, make_experiment, make_records, read_metric, read_weights

from bertlite.config.finetune_settings import FinetuneConfig
from bertlite.core.errors import Failure, UserError
from bertlite.core.signals import Stopped, stop_request
from bertlite.data.batches import Batch
from bertlite.finetuning.batches import ExampleBatches
from bertlite.finetuning.decoding import Outputs
from bertlite.finetuning.experiment import Experiment
from bertlite.finetuning.finetune import run
from bertlite.finetuning.results import EvaluationResult, format_results, write_reports


def test_resuming_is_bit_for_bit(write, tmp_path):
    whole, cut = write(name="whole", train__seeds=[0, 1]), write(name="cut", train__seeds=[0, 1])
    run(whole)
    training = ExampleBatches.training

    def interrupted(self: ExampleBatches, first: int, count: int) -> Batch:
        if self.seed == 1 and first >= 4 * count:
            stop_request.number = 15
        return training(self, first, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExampleBatches, "training", interrupted)
        with pytest.raises(Stopped):
            run(cut)
    stop_request.number = 0
    assert (tmp_path / "cut/seed-0/results.json").exists() and list((tmp_path / "cut/seed-1/checkpoints").iterdir())
    assert not (tmp_path / "cut" / "results.json").exists()
    results = run(cut, resume=True)
    assert results == json.loads((tmp_path / "whole/results.json").read_text())
    assert read_metric(tmp_path / "cut", seed=1) == read_metric(tmp_path / "whole", seed=1)
    resumed, expected = read_weights(tmp_path / "cut"), read_weights(tmp_path / "whole")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
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
    assert read_metric(config.output_dir, "eval_accuracy") == [0.2, 0.5, 0.4, 0.3, 0.5]
    assert measured[5] == measured[1] != measured[4]  # what is measured at the end is the model of step 2


def test_two_ranks_equal_one(write, tmp_path):
    no_dropout = {"model__hidden_dropout_prob": 0.0, "model__attention_probs_dropout_prob": 0.0}
    single = run(write(name="one", **no_dropout))
    write(name="two", **no_dropout)
    run_ranks("finetune", tmp_path / "two.yaml")
    two = json.loads((tmp_path / "two/results.json").read_text())
    assert two["seeds"]["0"] == pytest.approx(single["seeds"]["0"], abs=1e-4)
    assert read_metric(tmp_path / "two") == pytest.approx(read_metric(tmp_path / "one"), abs=1e-5)


def test_texts_that_are_also_in_train_are_counted(write, capsys):
    records = make_records("classification")
    make_experiment(write(records=records))
    assert "also in train" not in capsys.readouterr().err
    make_experiment(write(records=[*records[24:34], *records[10:24], *records[24:]]))
    assert "validation: 10 of 24 texts are also in train" in capsys.readouterr().err


def test_reports_hold_the_worst_hundred_examples(write, tmp_path):
    experiment = make_experiment(write(records=[{"text": text, "label": label} for label, text in SENTENCES[:300]]))
    predictions = [(target + 1) % 7 for target in experiment.splits["train"].examples.targets]
    examples = experiment.splits["train"].examples
    outputs = Outputs(list(np.eye(7, dtype=np.float32)[predictions]), examples, experiment.labels, experiment.settings)
    evaluation = EvaluationResult({}, predictions, list(range(276)), outputs)
    write_reports(tmp_path, experiment.task, experiment.labels, experiment.splits["train"], evaluation)
    worst = [json.loads(line) for line in (tmp_path / "worst.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in worst] == list(range(275, 175, -1))
    assert all(
        line["predicted"] == experiment.labels[(experiment.labels.index(line["label"]) + 1) % 7] for line in worst
    )


def test_a_picture_that_fails_loses_no_training(write, monkeypatch):
    config = write(train__max_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, path: (_ for _ in ()).throw(ValueError("no picture")))
        with pytest.raises(ValueError, match="no picture"):
            run(config)
    results = run(config, resume=True)
    assert results["seeds"]["0"]["best_step"] and read_weights(config.output_dir)


def test_a_damaged_result_is_named_and_made_again_without_it(write):
    config = write(train__seeds=[0, 1])
    results, folder = run(config), Path(config.output_dir)
    (folder / "results.json").unlink()
    (folder / "seed-0" / "results.json").write_text('{"accuracy": 0.')
    with pytest.raises(UserError, match=r"seed-0/results\.json: damaged; remove it, and --resume makes it again"):
        run(config, resume=True)
    (folder / "seed-0" / "results.json").unlink()
    assert run(config, resume=True) == results


def test_models_left_by_a_process_that_was_killed_after_the_results_are_removed(write):
    config = write(train__seeds=[0, 1])
    results, folder = run(config), Path(config.output_dir)
    shutil.copytree(folder / "model", folder / "seed-1" / "model")
    assert run(config, resume=True) == results
    assert not (folder / "seed-1" / "model").exists()


@pytest.mark.parametrize("name", ["..", ".", "a/b"])
def test_the_name_of_a_task_is_a_folder_inside_the_run(write, name):
    config = write()
    with pytest.raises(UserError, match="the name of a task is also the name of its folder"):
        run(config.model_copy(update={"task": None, "tasks": {name: config.task}}))


def test_a_loss_that_is_not_finite_ends_with_advice(write):
    with pytest.raises(Failure, match="not finite at step") as failure:
        run(write(train__learning_rate=1e30, train__num_train_epochs=3))
    advice = "start a new run with a lower train.learning_rate or a higher train.warmup_ratio"
    assert str(failure.value).splitlines()[1:] == [advice] and "batch" not in str(failure.value)


def test_several_tasks_and_their_results(write, tmp_path):
    config = write()
    other = config.task.model_copy(update={"metric": "macro_f1"})
    suite = FinetuneConfig(model=config.model, tasks={"one": config.task, "two": other}, train=config.train,
                           output_dir=str(tmp_path / "suite"))  # fmt: skip
    results = run(suite)
    assert json.loads((tmp_path / "suite" / "results.json").read_text()) == results
    lines = format_results(results).splitlines()
    assert lines[0].split()[:2] == ["one", "accuracy"] and lines[1].split()[:2] == ["two", "macro_f1"]
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
