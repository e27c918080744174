"""Runs that replace another run, and runs that are made longer."""

import json
from pathlib import Path

import pytest
from filelock import FileLock
from tiny_runs import metrics, pretrain, traces, weights

from bertlite.config.loading import load_config
from bertlite.config.settings import PretrainConfig
from bertlite.core.errors import UserError
from bertlite.pretraining.pretrain import run


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_overwrite_leaves_what_a_run_in_a_new_folder_leaves(write_config, bertlite):
    expected = pretrain(write_config("new", train__max_steps=4))
    folder = pretrain(write_config("run"))
    (folder / "notes").mkdir()
    (folder / "notes/file").write_text("mine")
    (folder / "results.json").write_text("{}")
    (folder / "worst.jsonl").symlink_to(folder / "notes/file")
    (folder / "seed-7").symlink_to(folder / "notes")
    code, out, err = bertlite("pretrain", write_config("run", train__max_steps=4), "--overwrite")
    assert code == 0 and out == f"{folder / 'model'}\n", err
    assert traces(folder) == traces(expected)
    assert tree(folder) == tree(expected) | {"notes", "notes/file"}  # what is not part of a run stays
    assert (folder / "notes/file").read_text() == "mine"


@pytest.mark.parametrize(
    "change, options, message",
    [
        (lambda folder: (folder / "seed-7").symlink_to(folder.parent), [], "a link that leaves its folder"),
        (None, ["--resume"], "--overwrite replaces a run, --resume and --extend-to continue one"),
        (None, ["--set", "model.init_from={folder}"], "is part of the run that --overwrite would replace"),
        (None, ["--set", "tokenizer.path={folder}/model"], "is part of the run that --overwrite would replace"),
        (
            lambda folder: (folder / "config.yaml").unlink(),
            [],
            "has no config.yaml, so --overwrite does not replace it",
        ),
        (
            lambda folder: (folder / "config.yaml").write_text("task: {train: a}\n"),
            [],
            "does not read the section task; bertlite finetune",
        ),
    ],
)
def test_overwrite_removes_nothing_else_than_a_run_of_the_command(change, options, message, write_config, bertlite):
    path = write_config(train__max_steps=1)
    folder = pretrain(path)
    if change:
        change(folder)
    before = tree(folder)
    options = [option.format(folder=folder) for option in options]
    code, _, err = bertlite("pretrain", path, "--overwrite", *options)
    assert code == 2 and message in err and len(err.splitlines()) == 1, err
    assert tree(folder) == before


def test_overwrite_of_a_run_in_use_or_with_a_mistake_removes_nothing(write_config, bertlite, tmp_path):
    path = write_config(train__max_steps=1)
    folder = pretrain(path)
    before = tree(folder)
    with FileLock(folder / ".lock"):
        code, _, err = bertlite("pretrain", path, "--overwrite")
        assert code == 2 and "another process is using this run folder" in err
    code, _, err = bertlite("pretrain", path, "--overwrite", "--set", "data.train=[gone.txt]")
    assert code == 2 and "gone.txt" in err and tree(folder) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    code, _, err = bertlite("pretrain", path, "--overwrite", "--out", tmp_path / "other")
    assert code == 2 and "is not empty and holds no run" in err and tree(tmp_path / "other") <= {"file", ".lock"}


def test_an_extended_run_equals_one_of_that_length(write_config, bertlite):
    """With a schedule that does not depend on the length, bit for bit."""
    constant = {"train__lr_scheduler_type": "constant", "train__warmup_ratio": 0.0}
    whole = pretrain(write_config("whole", **constant))
    folder = pretrain(write_config("run", train__max_steps=8, **constant))
    code, out, err = bertlite("pretrain", folder / "config.yaml", "--extend-to", 12)
    assert code == 0 and out == f"{folder / 'model'}\n", err
    assert traces(folder) == traces(whole)
    assert load_config(PretrainConfig, folder / "config.yaml").train.max_steps == 12
    assert "has finished" in bertlite("pretrain", folder / "config.yaml", "--resume")[2]


def test_the_schedule_of_an_extended_run_is_that_of_the_new_length(write_config, bertlite):
    whole = metrics(pretrain(write_config("whole", train__logging_steps=1)))
    folder = pretrain(write_config("run", train__logging_steps=1, train__max_steps=8))
    first = metrics(folder)
    bertlite("pretrain", folder / "config.yaml", "--extend-to", 12)
    rates = [line["lr"] for line in metrics(folder) if "lr" in line]
    assert rates[:8] == [line["lr"] for line in first if "lr" in line]
    assert rates[8:] == [line["lr"] for line in whole if "lr" in line][8:]


def test_a_run_is_extended_from_a_checkpoint_to_more_steps(write_config, bertlite):
    path = write_config()
    folder = pretrain(path)
    before = weights(folder)
    with pytest.raises(UserError, match=r"train\.max_steps is 20, but the run there has 12; .*--extend-to 20"):
        run(load_config(PretrainConfig, path, ["train.max_steps=20"]), resume=True)
    code, _, err = bertlite("pretrain", path, "--extend-to", 8)
    assert code == 2 and "train.max_steps is 8, but the run there has 12" in err and "--extend-to" not in err
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "config.json").unlink()
    code, _, err = bertlite("pretrain", path, "--extend-to", 20)
    assert code == 2 and "has no valid checkpoint to continue from" in err
    assert all((weights(folder)[name] == before[name]).all() for name in before)


def test_messages_of_fine_tuning_do_not_advise_what_only_pretraining_has(bertlite, write_config, tmp_path):
    folder = pretrain(write_config(train__max_steps=1))
    table = tmp_path / "a.jsonl"
    table.write_text("".join(json.dumps({"text": f"text {n}", "label": n % 2}) + "\n" for n in range(20)))
    task = f"task: {{train: {table}}}\ntrain: {{max_steps: 1}}\noutput_dir: {tmp_path}/ft\n"
    (tmp_path / "task.yaml").write_text(task)
    assert bertlite("finetune", tmp_path / "task.yaml", "--model", folder)[0] == 0
    arguments = ("finetune", tmp_path / "task.yaml", "--model", folder)
    code, _, err = bertlite(*arguments, "--resume", "--set", "train.max_steps=2")
    assert code == 2 and err.endswith("resume with the old value, or start another run with --out DIR\n")
    code, _, err = bertlite(*arguments)
    assert code == 2 and "replace it with --overwrite" in err
    assert bertlite(*arguments, "--overwrite", "--set", "train.max_steps=2")[0] == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "ft/seed-0/metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 2
    code, _, err = bertlite("finetune", tmp_path / "task.yaml", "--model", tmp_path / "ft", "--overwrite")
    assert code == 2 and "is part of the run that --overwrite would replace" in err
