"""Checkpoints are valid or ignored, and resumed runs equal uninterrupted runs bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import run_ranks
from tiny_runs import crash_after, metrics, optimizer_state, pretrain, start, traces, wait_for

import bertlite.pretraining.pretrain
from bertlite.config.loading import load_config
from bertlite.config.settings import PretrainConfig
from bertlite.core.errors import UserError
from bertlite.core.files import sha256
from bertlite.data.batches import Batches
from bertlite.data.tokenizer import load_tokenizer
from bertlite.model.huggingface import load_model
from bertlite.pretraining.losses import masked_lm_loss
from bertlite.training.checkpoint import TrainingState, newest_checkpoint, problem, save_checkpoint
from bertlite.training.optim import OPTIMIZERS
from bertlite.training.progress import OLD_NAMES, Progress
from bertlite.training.run_folder import model_folder, open_run

CASES = {
    "plain": {},
    "dropout": {"model__hidden_dropout_prob": 0.1, "model__attention_probs_dropout_prob": 0.1},
    "bf16": {"train__precision": "bf16"},
    "accumulation": {"train__per_device_train_batch_size": 3},
    "compiled": {"train__compile": True, "model__hidden_dropout_prob": 0.1},
}


@pytest.mark.parametrize(
    ("case", "optim"),
    [(case, optim) for case in CASES for optim in OPTIMIZERS if case != "compiled"]
    + [pytest.param("compiled", "adamw", marks=pytest.mark.slow)],  # without dropout in test_trainer.py
)
def test_resuming_is_bit_for_bit(write_config, tmp_path, optim, case):
    path = write_config("whole", train__optim=optim, train__save_steps=5, train__logging_steps=3, **CASES[case])
    whole = pretrain(path)
    cut = crash_after(whole, 5, tmp_path / "cut")
    pretrain(path, f"output_dir={cut}", resume=True)
    assert traces(cut) == traces(whole)
    before, after = optimizer_state(whole, 12), optimizer_state(cut, 12)
    assert before.keys() == after.keys() and all((before[name] == after[name]).all() for name in before)


def test_two_ranks_train_and_resume_like_one(write_config, tmp_path):
    one = pretrain(write_config("one", train__logging_steps=1))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = write_config("two", train__logging_steps=1)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["-m", "bertlite", "pretrain", path]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    two = path.parent / "two"
    for line, other in zip(metrics(two), metrics(one), strict=True):
        assert line == pytest.approx(other, abs=1e-4)
    cut = crash_after(two, 8, tmp_path / "cut")
    run_ranks("pretrain", path, "--out", cut, "--resume")
    assert traces(cut) == traces(two)


def test_a_resumed_run_keeps_its_micro_batch_size(write_config, tmp_path, monkeypatch, capsys):
    """Else what memory happens to be free would decide the last digits."""
    path = write_config("whole", train__save_steps=5)
    with monkeypatch.context() as patch:
        patch.setattr("bertlite.training.memory.available_memory", lambda runtime: 4_500_000)
        whole = pretrain(path)
    assert "8 sequences a step in micro-batches of 2" in capsys.readouterr().err
    cut, other = (crash_after(whole, 5, tmp_path / name) for name in ("cut", "other"))
    pretrain(path, f"output_dir={cut}", resume=True)
    assert traces(cut) == traces(whole) and "but was" not in capsys.readouterr().err
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    pretrain(path, f"output_dir={other}", resume=True)
    assert "threads is 77, but was" in capsys.readouterr().err


def test_saves_by_minutes_and_elapsed_seconds_continue_after_a_resume(write_config, tmp_path, monkeypatch):
    """Steps of 20 seconds and evaluations of 1,000: a clock of our own makes all times those of metrics.jsonl."""
    now, evaluate = [0.0], bertlite.pretraining.pretrain.evaluate

    def loss(model, batch):
        now[0] += 20
        return masked_lm_loss(model, batch)

    def slow(*arguments):
        now[0] += 1000
        return evaluate(*arguments)

    monkeypatch.setattr(bertlite.pretraining.pretrain, "masked_lm_loss", loss)
    monkeypatch.setattr(bertlite.pretraining.pretrain, "evaluate", slow)
    monkeypatch.setattr("bertlite.training.trainer.time", SimpleNamespace(perf_counter=lambda: now[0]))
    changes = {"save_steps": 99, "eval_steps": 5, "save_minutes": 1, "save_total_limit": 99, "logging_steps": 1}
    path = write_config("whole", **{f"train__{name}": value for name, value in changes.items()})
    whole = pretrain(path)
    assert sorted(int(one.name[-8:]) for one in (whole / "checkpoints").iterdir()) == [3, 5, 8, 10, 12]
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert [line["elapsed_seconds"] for line in trained] == [20 * n + 1000 * ((n > 5) + (n > 10)) for n in range(1, 13)]
    tokens = [0, *(line["tokens"] for line in trained)]
    rates = [(after - before) / 20 for before, after in pairwise(tokens)]
    assert [line["tokens_per_second"] for line in trained] == pytest.approx(rates)
    cut = crash_after(whole, 8, tmp_path / "cut")
    pretrain(path, f"output_dir={cut}", resume=True)
    assert (cut / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_a_resume_at_another_position_in_the_data_changes_the_results(write_config, tmp_path, monkeypatch):
    path = write_config("whole", train__save_steps=5)
    whole = pretrain(path)
    cut = crash_after(whole, 5, tmp_path / "cut")
    training = Batches.training
    monkeypatch.setattr(Batches, "training", lambda self, first, count: training(self, first - 5 * 8, count))
    pretrain(path, f"output_dir={cut}", resume=True)
    assert traces(cut) != traces(whole)


def test_other_intervals_and_micro_batches_give_the_same_batches(write_config, tmp_path):
    path = write_config("whole", train__save_steps=5)
    whole = pretrain(path)
    cut = crash_after(whole, 5, tmp_path / "cut")
    changes = ("train.save_steps=7", "train.eval_steps=3", "train.logging_steps=1", "train.save_total_limit=9")
    pretrain(path, f"output_dir={cut}", *changes, "train.per_device_train_batch_size=4", resume=True)
    last, other = (next(line for line in reversed(metrics(run)) if "eval_loss" in line) for run in (whole, cut))
    assert other["tokens"] == last["tokens"] and other["eval_loss"] == pytest.approx(last["eval_loss"], abs=1e-5)


def test_a_setting_that_may_not_change_is_named(write_config):
    path = write_config()
    pretrain(path)
    with pytest.raises(UserError, match=r"train\.learning_rate is 0\.002, but the run there has 0\.001"):
        pretrain(path, "train.learning_rate=0.002", resume=True)


def test_other_text_is_refused(write_config, tmp_path, text_files):
    text = tmp_path / "text.txt"
    shutil.copy(text_files["train"], text)
    path = write_config(data__train=[str(text)])
    folder = pretrain(path)
    shutil.rmtree(folder / "model")
    text.write_text(text.read_text() + "\n\nOne more document.\n")
    with pytest.raises(UserError, match="the text or the tokenizer has changed"):
        pretrain(path, resume=True)


def test_a_finished_run_has_nothing_to_resume(write_config):
    path = write_config()
    folder = pretrain(path)
    before = traces(folder)
    pretrain(path, resume=True)
    assert traces(folder) == before


def test_without_resume_a_run_is_never_overwritten(write_config):
    path = write_config()
    pretrain(path)
    with pytest.raises(UserError, match="already holds a run"):
        pretrain(path)


def test_resume_of_nothing_starts_at_the_beginning(write_config):
    assert traces(pretrain(write_config("a"), resume=True)) == traces(pretrain(write_config("b")))


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
        return
    if how == "truncated":
        content = content[: len(content) // 2]
    if how == "last byte lost":
        content = content[:-1]
    if how == "flipped":
        content[random.Random(path.name).randrange(len(content))] ^= 1 << random.Random(0).randrange(8)
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_ignored_and_the_previous_one_used(write_config, tmp_path, capsys):
    folder = pretrain(write_config(train__save_steps=4))
    newest, before = (folder / f"checkpoints/step-{step:08d}" for step in (12, 8))
    files = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file()]
    assert len(files) >= 7
    capsys.readouterr()
    for file in files:
        for how in ("truncated", "last byte lost", "flipped", "removed"):
            shutil.copytree(newest, tmp_path / "kept")
            damage(newest / file, how)
            assert newest_checkpoint(folder) == before, (file, how)
            said = capsys.readouterr().err.splitlines()
            assert len(said) == 1 and f"{newest} is ignored: " in said[0]
            assert file.name in said[0] or file.name == "manifest.json"  # which then blames a file
            assert newest.exists()
            shutil.rmtree(newest)
            (tmp_path / "kept").rename(newest)
    assert newest_checkpoint(folder) == newest


@pytest.mark.parametrize("name", ["extra.json", "training/extra", "folder/extra.txt", "link.json", "to-a-folder"])
def test_a_checkpoint_with_an_extra_file_is_ignored(write_config, tmp_path, capsys, name):
    folder = pretrain(write_config())
    newest, before = (folder / f"checkpoints/step-{step:08d}" for step in (12, 8))
    (newest / name).parent.mkdir(exist_ok=True)
    if name == "link.json":
        (newest / name).symlink_to(before / "config.json")
    elif name == "to-a-folder":
        (newest / name).symlink_to(before / "nowhere")
    else:
        (newest / name).write_text("{}")
    capsys.readouterr()
    assert newest_checkpoint(folder) == before
    assert f"{newest} is ignored: {name} is not part of the checkpoint" in capsys.readouterr().err
    (newest / name).unlink()
    (newest / ".DS_Store").write_text("what a file browser leaves")
    assert newest_checkpoint(folder) == newest


def test_every_bit_of_a_manifest_counts(write_config):
    newest = pretrain(write_config()) / "checkpoints/step-00000012"
    manifest = newest / "training/manifest.json"
    content = manifest.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(content)), 250):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(flipped)
        assert problem(newest) is not None, (bit, flipped[max(0, bit // 8 - 20) : bit // 8 + 20])


@pytest.mark.parametrize("state", ["{}", "[]", '{"progress": {"steps": 1}, "facts": {}}', '{"progress": {"step": 8}}'])
def test_an_unknown_training_state_is_refused(write_config, state):
    path = write_config()
    folder = pretrain(path)
    shutil.rmtree(folder / "model")
    rewrite_state(folder / "checkpoints/step-00000012", state)
    with pytest.raises(UserError, match=r"step-00000012: .*cannot resume"):
        pretrain(path, resume=True)


def rewrite_state(checkpoint: Path, state: str) -> None:
    """Replace a checkpoint's training state, as another version of bertlite could have written it."""
    path = checkpoint / "training" / "state.json"
    path.write_text(state)
    manifest = checkpoint / "training" / "manifest.json"
    contents = json.loads(manifest.read_text())
    contents["training/state.json"] = {"bytes": len(state), "sha256": sha256(path)}
    manifest.write_text(json.dumps(contents) + "\n")


def test_checkpoints_of_version_1_are_resumed(write_config, tmp_path):
    """Version 1 had no number and other names; what they say must arrive, such as the loss since the last line."""
    path = write_config("whole", train__save_steps=5, train__logging_steps=3, train__per_device_train_batch_size=3)
    whole = pretrain(path)
    cut = crash_after(whole, 5, tmp_path / "cut")
    checkpoint = cut / "checkpoints/step-00000005"
    state = json.loads((checkpoint / "training/state.json").read_text())
    old_names = {new: old for old, new in OLD_NAMES.items()}
    before = {part: {old_names.get(name, name): value for name, value in state[part].items()} for part in
              ("progress", "facts")}  # fmt: skip
    assert before["progress"]["scored"] > 0 and before["facts"]["rows at a time"] == 3
    rewrite_state(checkpoint, json.dumps(before))
    pretrain(path, f"output_dir={cut}", resume=True)
    assert traces(cut) == traces(whole)


def test_a_checkpoint_of_a_newer_version_is_refused(write_config):
    path = write_config()
    folder = pretrain(path)
    shutil.rmtree(folder / "model")
    rewrite_state(folder / "checkpoints/step-00000012", json.dumps({"version": 99, "progress": {}, "facts": {}}))
    with pytest.raises(UserError, match=r"step-00000012: cannot resume: .*version 99 is newer than this bertlite"):
        pretrain(path, resume=True)


def test_old_checkpoints_are_removed_but_invalid_ones_stay(write_config):
    path = write_config(train__save_steps=2, train__save_total_limit=2)
    folder = pretrain(path)
    steps = [checkpoint.name for checkpoint in sorted((folder / "checkpoints").iterdir())]
    assert steps == ["step-00000010", "step-00000012"]
    for checkpoint in (folder / "checkpoints").iterdir():
        damage(checkpoint / "model.safetensors", "flipped")
    shutil.rmtree(folder / "model")
    pretrain(path, resume=True)  # from the beginning: nothing valid was left
    names = sorted(checkpoint.name for checkpoint in (folder / "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000010.invalid-1", "step-00000012", "step-00000012.invalid-1"]
    assert problem(folder / "checkpoints/step-00000012") is None


def test_damaged_checkpoints_cost_no_valid_one(every_head, tmp_path):
    model, tokenizer = load_model(every_head["BertModel"]), load_tokenizer(str(every_head["BertModel"]))

    def save(step: int) -> Path:
        return save_checkpoint(tmp_path, model, tokenizer, TrainingState(progress=Progress(step=step)), limit=4)

    folders = [save(step) for step in (1, 2, 3, 4)]
    for folder in folders[2:]:
        damage(folder / "model.safetensors", "flipped")
    folders += [save(5), save(6), save(7)]
    valid = [folder for folder in folders if folder.exists() and problem(folder) is None]
    assert [folder.name[-1] for folder in valid] == ["2", "5", "6", "7"]


def test_a_folder_in_use_is_refused_and_a_crash_leaves_no_lock(write_config, tmp_path):
    config = load_config(PretrainConfig, write_config())
    folder = tmp_path / "run"
    with open_run(folder, config, resume=False):
        other = open_run(folder, config, resume=False)
        with pytest.raises(UserError, match="another process is using"):
            other.__enter__()
    with open_run(folder, config, resume=False):
        pass
    assert not folder.exists()


def test_a_name_means_the_final_model_or_the_newest_checkpoint(write_config, tmp_path):
    folder = pretrain(write_config())
    assert model_folder(str(folder)) == folder / "model"
    cut = crash_after(folder, 8, tmp_path / "cut")
    assert model_folder(str(cut)) == cut / "checkpoints/step-00000008"
    with pytest.raises(UserError, match="no such"):
        model_folder(str(tmp_path / "none"))


@pytest.mark.parametrize("damage", [b"\xff\n", b"5\n", b'{"loss": 1}\n', b"\0\0\0", b'{"step": nu'])
def test_metrics_are_cut_back_to_the_first_damaged_line(write_config, tmp_path, damage, capsys):
    whole = pretrain(write_config())
    cut = crash_after(whole, 8, tmp_path / "cut")
    lines = (whole / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_bytes(b"".join(lines) + damage + b"\n" + lines[-1])
    pretrain(write_config("cut"), resume=True)
    assert traces(cut)[0] == traces(whole)[0] and traces(cut)[2] == traces(whole)[2]
    assert f"metrics.jsonl:{len(lines) + 1}: damaged" in capsys.readouterr().err


def test_a_moved_or_copied_run_is_resumed_where_it_is(bertlite, write_config, tmp_path):
    whole = pretrain(write_config())
    copy = crash_after(whole, 8, tmp_path / "copy")
    shutil.rmtree(whole / "model")
    code, _, errors = bertlite("pretrain", copy / "config.yaml", "--resume")
    assert code == 0 and (copy / "model").is_dir() and not (whole / "model").exists(), errors


@pytest.mark.parametrize(("moment", "number"), [("training", signal.SIGINT), ("evaluation", signal.SIGTERM)])
def test_a_signal_saves_and_ends_the_run_within_seconds(write_config, number, moment):
    changes = {"train__max_steps": 150, "train__save_steps": 150, "train__logging_steps": 1}
    changes["train__eval_steps"] = 20 if moment == "evaluation" else 150
    if moment == "evaluation":
        changes |= {"data__validation": ["sample"], "data__sequence_length": 64}
    whole = pretrain(write_config("whole", **changes)) if moment == "training" else None
    path = write_config("cut", **changes)
    folder = path.parent / "cut"
    process = start(path)
    log = folder / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 20, process)
    if moment == "evaluation":
        time.sleep(0.3)
    process.send_signal(number)
    began = time.monotonic()
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number, errors
    assert time.monotonic() - began < 30  # on a busy machine, too
    assert "Traceback" not in errors and "stopped by" in errors
    checkpoint = newest_checkpoint(folder)
    step = json.loads((checkpoint / "training/state.json").read_text())["progress"]["step"]
    assert 20 <= step < 150
    if moment == "evaluation":
        assert step == 20 and "eval_loss" not in log.read_text()
    else:
        pretrain(path, resume=True)
        assert traces(folder)[0] == traces(whole)[0] and traces(folder)[2] == traces(whole)[2]


def test_runs_killed_at_random_moments_end_like_an_undisturbed_one(write_config):
    changes = {"train__max_steps": 120, "train__save_steps": 3, "train__eval_steps": 40}
    whole = pretrain(write_config("whole", **changes))
    path = write_config("cut", **changes)
    folder = path.parent / "cut"
    moments = random.Random(0)
    for _ in range(4):
        process = start(path, "--resume")
        wait_for((folder / "checkpoints").exists, process)
        time.sleep(moments.uniform(0.0, 1.0))
        process.kill()
        process.communicate()
    pretrain(path, resume=True)
    assert traces(folder) == traces(whole)
    assert [path.name for path in folder.glob("**/.*")] == [".lock"]


def test_a_new_checkpoint_is_never_removed(write_config):
    """Not even when it is older by its number than a damaged one."""
    path = write_config(train__save_steps=4, train__save_total_limit=1)
    folder = pretrain(path)
    damage(folder / "checkpoints/step-00000012/model.safetensors", "flipped")
    shutil.rmtree(folder / "model")
    pretrain(path, "train.save_steps=5", resume=True)
    names = sorted(checkpoint.name for checkpoint in (folder / "checkpoints").iterdir())
    assert names == ["step-00000012", "step-00000012.invalid-1"]
    assert newest_checkpoint(folder) == folder / "checkpoints/step-00000012"


def test_a_constant_rate_that_became_a_schedule_is_refused(write_config):
    path = write_config()
    pretrain(path)
    with pytest.raises(UserError, match=r"masking\.rate.* is .*but the run there has"):
        pretrain(path, "masking.rate={start: 0.3, end: 0.15}", resume=True)
