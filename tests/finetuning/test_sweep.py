"""Sweeps, and the commands of fine-tuning from the shell."""

import csv
import io
import json
import sys

import optuna
import pytest
import yaml
from tiny_tasks import make_records, save_model

from bertlite.config.finetune_settings import FinetuneConfig, SweepConfig
from bertlite.config.loading import load_config
from bertlite.core.errors import DiskFull, Failure, UserError
from bertlite.finetuning.finetune import run
from bertlite.finetuning.sweep import format_trials, sweep

SPACE = {
    "train.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
    "train.global_batch_size": [8, 16],
    "task.max_length": {"low": 16, "high": 48},
}


@pytest.fixture
def write_sweep(write, tmp_path):
    def make(name: str = "sweep", space: dict = SPACE, trials: int = 3) -> SweepConfig:
        write("regression", train__max_steps=2, task__test=str(tmp_path / "validation.jsonl"))
        values = yaml.safe_load((tmp_path / "run.yaml").read_text())
        values |= {"sweep": {"trials": trials, "space": space}, "output_dir": str(tmp_path / name)}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
        return load_config(SweepConfig, tmp_path / f"{name}.yaml")

    return make


@pytest.fixture
def no_plot(monkeypatch) -> None:
    """Plots take most of a sweep's time; they are drawn in the tests of what a sweep writes."""
    monkeypatch.setattr("bertlite.finetuning.sweep.draw_trials", lambda *_: None)


def test_a_sweep_writes_a_table_a_plot_and_the_best_configuration(write_sweep, tmp_path):
    trials = sweep(write_sweep())
    assert len(trials) == 3 and trials == sorted(trials, key=lambda trial: -trial["value"])
    for trial in trials:
        assert 1e-5 <= trial["train.learning_rate"] <= 1e-2 and trial["train.global_batch_size"] in (8, 16)
        assert isinstance(trial["task.max_length"], int) and 16 <= trial["task.max_length"] <= 48
        results = json.loads((tmp_path / f"sweep/trial-{trial['trial']:03d}/results.json").read_text())
        assert results["mean"] == trial["value"] and results["measured_on"] == "validation"
    folder = tmp_path / "sweep"
    written = list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))
    assert [int(line["trial"]) for line in written] == [trial["trial"] for trial in trials]
    assert (folder / "trials.png").read_bytes().startswith(b"\x89PNG")
    best = load_config(FinetuneConfig, folder / "best.yaml")
    assert best.train.learning_rate == trials[0]["train.learning_rate"] and best.task.test is not None
    assert [path.parent.name for path in folder.rglob("model")] == ["sweep"]
    again = run(best)
    results = json.loads((folder / f"trial-{trials[0]['trial']:03d}/results.json").read_text())
    name = f"validation_{again['metric']}"
    assert again["seeds"]["0"][name] == results["seeds"]["0"][name]
    lines = format_trials(trials).splitlines()
    assert len(lines) == 4 and lines[0].split() == ["trial", "value", *sorted(SPACE)]


def test_a_resumed_sweep_equals_one_that_was_not_stopped(write_sweep, no_plot, tmp_path):
    whole = sweep(write_sweep("whole"))
    sweep(write_sweep("cut", trials=1))
    assert len(json.loads((tmp_path / "cut" / "trials.json").read_text())) == 1
    with pytest.raises(UserError, match="already holds a run"):
        sweep(write_sweep("cut"))
    assert sweep(write_sweep("cut"), resume=True) == whole


def test_a_sweep_that_is_killed_between_its_steps_keeps_its_best(write_sweep, no_plot, tmp_path, monkeypatch):
    def killed(folder, trials, *_):
        if trials:
            raise KeyboardInterrupt

    whole = sweep(write_sweep("whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("bertlite.finetuning.sweep.write_best", killed)  # has its value; its model is not moved
        sweep(write_sweep("cut"))
    assert sweep(write_sweep("cut"), resume=True) == whole
    assert [path.parent.name for path in (tmp_path / "cut").rglob("model")] == ["cut"]
    best = load_config(FinetuneConfig, tmp_path / "cut" / "best.yaml")
    assert best.train.learning_rate == whole[0]["train.learning_rate"]


def test_a_sweep_that_is_killed_within_a_trial_continues_it(write_sweep, no_plot, tmp_path, monkeypatch):
    """Its folder is the same as that of a sweep that was not killed, and Optuna would choose the same settings."""

    def kill(*_):
        raise KeyboardInterrupt

    whole = sweep(write_sweep("whole"))
    sweep(write_sweep("cut", trials=1))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("bertlite.finetuning.finetune.keep_best_seed", kill)
        sweep(write_sweep("cut"), resume=True)
    assert (tmp_path / "cut" / "trial-001" / "seed-0" / "results.json").exists()
    assert sweep(write_sweep("cut"), resume=True) == whole
    files = [
        sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*")) for name in ("whole", "cut")
    ]
    assert files[0] == files[1]
    study = optuna.create_study(direction="maximize")
    for number, trial in enumerate(json.loads((tmp_path / "whole" / "trials.json").read_text())):
        study.sampler = optuna.samplers.TPESampler(seed=number)
        asked = study.ask()
        asked.suggest_int("task.max_length", 16, 48)
        asked.suggest_categorical("train.global_batch_size", [8, 16])
        asked.suggest_float("train.learning_rate", 1e-5, 1e-2, log=True)
        assert asked.params == trial["settings"]
        study.tell(asked, trial["value"])


def test_damaged_trials_and_those_of_an_old_version_are_named(write_sweep, no_plot, tmp_path):
    sweep(write_sweep(trials=1))
    (tmp_path / "sweep" / "trials.json").write_text('[{"value": 1')
    with pytest.raises(UserError, match=r"trials\.json: damaged .* start the sweep again with --overwrite"):
        sweep(write_sweep(), resume=True)
    (tmp_path / "sweep" / "trials.json").rename(tmp_path / "sweep" / "study.db")
    with pytest.raises(UserError, match=r"the sweep was started by version 0\.1"):
        sweep(write_sweep(), resume=True)
    assert len(sweep(write_sweep(trials=1), overwrite=True)) == 1
    assert not (tmp_path / "sweep" / "study.db").exists()


def test_a_full_disk_ends_a_sweep_without_a_failed_trial(write_sweep, tmp_path, monkeypatch):
    def full(*_, **__):
        raise DiskFull("full")

    with monkeypatch.context() as patch, pytest.raises(DiskFull):
        patch.setattr("bertlite.finetuning.sweep.run", full)
        sweep(write_sweep())
    assert not (tmp_path / "sweep" / "trials.json").exists()


def test_a_trial_that_fails_does_not_end_the_sweep(write_sweep, no_plot, capsys):
    with pytest.raises(Failure, match="all trials failed"):
        sweep(write_sweep("none", {"train.learning_rate": [1e38]}, trials=1))
    assert "trial-000: the loss or its gradient is not finite" in capsys.readouterr().err
    trials = sweep(write_sweep("some", {"train.learning_rate": [1e-4, 1e38]}, trials=4))
    assert {trial["train.learning_rate"] for trial in trials} == {1e-4}


def test_a_sweep_over_several_tasks_is_refused(write_sweep):
    config = write_sweep()
    with pytest.raises(UserError, match="searches the settings of one task; the file has several"):
        sweep(config.model_copy(update={"task": None, "tasks": {"one": config.task}}))


@pytest.mark.parametrize(
    "space, message",
    [
        ({"train.learning_rat": [1e-3]}, r"sweep\.space: train\.learning_rat is not a setting. Did you mean"),
        ({"train.learning_rate": [-1.0]}, r"sweep\.space: train\.learning_rate is -1\.0"),
        ({"task.metric": ["accurcy"]}, r"task\.metric is 'accurcy'"),
        ({"train.learning_rate": {"low": 2, "high": 1}}, r"train\.learning_rate\.low is 2, not below high 1"),
        ({"train.warmup_ratio": {"low": 0, "high": 1, "log": True}}, r"low is 0, not above 0, as log needs"),
    ],
)
def test_an_invalid_space_is_refused_before_anything_runs(space, message, write_sweep, tmp_path):
    with pytest.raises(UserError, match=message):
        sweep(write_sweep(space=space))
    assert not (tmp_path / "sweep").exists()


def test_the_commands(bertlite, write, vocabulary, tmp_path, monkeypatch):
    model = str(write().model.init_from)
    path = tmp_path / "run.yaml"
    values = yaml.safe_load(path.read_text())
    del values["model"]
    path.write_text(yaml.safe_dump(values))
    code, out, _ = bertlite("finetune", path, "--model", model, "--set", "train.seeds=[0, 1]")
    assert code == 0 and out.startswith("accuracy") and "±" in out
    code, out, _ = bertlite("finetune", path, "--model", model, "--out", tmp_path / "other", "--json")
    assert code == 0 and json.loads(out)["metric"] == "accuracy"
    code, _, err = bertlite("finetune", path)
    assert code == 2 and "no model to start from" in err

    texts = [record["text"] for record in make_records("classification")[:3]]
    _, from_arguments, _ = bertlite("predict", tmp_path / "run", *texts, "--json")
    lines = "\n".join(texts).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert bertlite("predict", tmp_path / "run", "--json")[1] == from_arguments
    (tmp_path / "texts.txt").write_bytes(lines + b"\r\n")
    _, from_file, _ = bertlite("predict", tmp_path / "run", "--file", tmp_path / "texts.txt", "--json", "--top-k", "2")
    best, two = json.loads(from_arguments.splitlines()[0]), json.loads(from_file.splitlines()[0])
    assert len(from_file.splitlines()) == 3 and set(best) == {"label", "score"} and two[0] == best and len(two) == 2
    assert bertlite("predict", tmp_path / "run", texts[0])[1] == f"{best['score']:.4f}  {best['label']}\n"
    (tmp_path / "texts.txt").write_bytes(b"fine\ncaf\xe9\n")
    for arguments, message in {
        (tmp_path / "run", "--file", "nowhere"): "no such file",
        (tmp_path / "run", "--file", tmp_path / "texts.txt"): "texts.txt:2: not UTF-8",
        (model, "x"): "not fine-tuned",
        (tmp_path / "nothing", "x"): "no such",
    }.items():
        code, _, err = bertlite("predict", *arguments)
        assert code == 2 and message in err and err.count("\n") == 1

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"fine\ncaf\xe9\n")))
    code, _, err = bertlite("predict", tmp_path / "run")
    assert code == 2 and "standard input:2: not UTF-8" in err

    save_model(vocabulary, "token-classification", tmp_path / "tokens")
    code, _, err = bertlite("predict", tmp_path / "tokens", "--pairs", "Ada\tspoke")
    assert code == 2 and "--pairs: the model reads single texts" in err
    assert isinstance(json.loads(bertlite("predict", tmp_path / "tokens", "Ada spoke", "--json")[1]), list)
    values |= {"sweep": {"trials": 1, "space": {"train.max_steps": [2]}}, "output_dir": str(tmp_path / "sweep")}
    path.write_text(yaml.safe_dump(values))
    assert bertlite("sweep", path, "--model", model)[1].split()[:3] == ["trial", "value", "train.max_steps"]
