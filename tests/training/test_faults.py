"""What may go wrong in a training: losses that are not finite, plateaus, a lost corpus, out of memory, signals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import ROOT, SAMPLE
from processes import Command, run_ranks, start_ranks
from tiny_runs import crash_after, metrics, optimizer_state, pretrain, start, traces, wait_for

import bertlite.pretraining.pretrain
from bertlite.config.loading import load_config
from bertlite.config.settings import PretrainConfig, TrainSettings
from bertlite.core.errors import DataLost, Failure
from bertlite.data.batches import Batches
from bertlite.pretraining.losses import masked_lm_loss
from bertlite.pretraining.prepare import batch_of_step, prepare, training_batches
from bertlite.training.checkpoint import newest_checkpoint
from bertlite.training.plateau import MIN_WINDOW, PlateauWatch
from bertlite.training.trainer import MAX_CONSECUTIVE_SKIPS


@pytest.fixture
def bad_steps(monkeypatch):
    """Losses that are infinite at these steps, recognised by the rows of their batches."""

    def choose(path: Path, *steps: int) -> None:
        config = load_config(PretrainConfig, path)
        prepared, G = prepare(config), config.train.global_batch_size
        batches = training_batches(config, prepared)
        bad = [batches.training((step - 1) * G, G).labels for step in steps]

        def loss(model, batch):
            total, count = masked_lm_loss(model, batch)
            return total * (torch.inf if any(torch.equal(batch.labels, labels) for labels in bad) else 1), count

        monkeypatch.setattr(bertlite.pretraining.pretrain, "masked_lm_loss", loss)

    return choose


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_batch(write_config, bad_steps, bertlite):
    path = write_config()
    bad_steps(path, 6)
    with pytest.raises(Failure) as failure:
        pretrain(path)
    folder = path.parent / "run"
    command = re.search(r"bertlite (batch \S+ --step 6)\n", str(failure.value))[1].split()
    assert "--set train.on_nonfinite_loss=skip" in str(failure.value)
    code, printed, _ = bertlite(*command, "--json")
    assert code == 0 and json.loads(printed) == batch_of_step(load_config(PretrainConfig, path), 6)
    assert newest_checkpoint(folder).name == "step-00000004"
    pretrain(path, "train.on_nonfinite_loss=skip", resume=True)  # as the message says
    assert metrics(folder)[-1]["step"] == 12


def test_a_printed_batch_is_what_the_step_trains_on(write_config):
    config = load_config(PretrainConfig, write_config())
    prepared = prepare(config)
    batch = Batches(prepared.corpus, prepared.packing, prepared.tokenizer, 64, config.masking, config.train).training(
        16, 8
    )
    rows = batch_of_step(config, 3)
    pieces = prepared.tokenizer.convert_ids_to_tokens
    for row, documents in enumerate(rows):
        shown = " ".join(documents).split(" ")
        real = batch.document_ids[row] > 0
        text = re.sub(r"\{(\S+) → \S+\}", r"\1", " ".join(documents)).split(" ")
        assert text == pieces(batch.input_ids[row, real].tolist())
        assert len(documents) == batch.document_ids[row].max()
        labels = batch.labels[row][batch.labels[row] != -100].tolist()
        assert [word.rstrip("}") for before, word in pairwise(shown) if before == "→"] == pieces(labels)


def test_skipped_steps_change_no_weight_and_are_counted(write_config, bad_steps):
    changes = {"train__logging_steps": 1, "train__save_steps": 1, "train__save_total_limit": 99}
    whole = pretrain(write_config("whole", **changes))
    path = write_config("skips", **changes, train__on_nonfinite_loss="skip")
    bad_steps(path, 5, 6)
    folder = pretrain(path)
    models = [
        (folder / f"checkpoints/step-{step:08d}/model.safetensors").read_bytes() for step in range(1, 13)
    ]  # fmt: skip
    assert [after == before for before, after in pairwise(models)] == [step in (5, 6) for step in range(2, 13)]
    lines = [line for line in metrics(folder) if "loss" in line]
    assert [line.get("skipped_steps") for line in lines] == [None] * 4 + [1] + [2] * 7
    assert [line["loss"] is None for line in lines] == [line["step"] in (5, 6) for line in lines]
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in metrics(whole) if "loss" in line]
    assert [line["lr"] for line in lines] == [line["lr"] for line in metrics(whole) if "loss" in line]


@pytest.mark.parametrize("bad", [(4, 7), (5, 6), (6, 8)])
def test_resuming_is_exact_with_skipped_steps(write_config, tmp_path, bad_steps, bad):
    changes = {"train__save_steps": 5, "train__logging_steps": 3, "train__on_nonfinite_loss": "skip"}
    path = write_config("whole", **changes)
    bad_steps(path, *bad)
    whole = pretrain(path)
    cut = crash_after(whole, 5, tmp_path / "cut")
    pretrain(path, f"output_dir={cut}", resume=True)
    assert traces(cut) == traces(whole) and metrics(whole)[-2]["skipped_steps"] == 2
    before, after = optimizer_state(whole, 12), optimizer_state(cut, 12)
    assert all((before[name] == after[name]).all() for name in before)


def test_too_many_skipped_steps_in_a_row_end_the_run(write_config):
    changes = {"train__learning_rate": 1e30, "train__warmup_ratio": 0.0, "train__max_steps": 99}
    with pytest.raises(Failure, match="not finite at step"):
        pretrain(write_config(**changes, train__on_nonfinite_loss="skip"))
    folder = Path(load_config(PretrainConfig, write_config()).output_dir)
    lines = [line for line in metrics(folder) if "loss" in line]
    assert MAX_CONSECUTIVE_SKIPS - 2 <= lines[-1]["skipped_steps"] <= MAX_CONSECUTIVE_SKIPS


def test_saving_by_minutes_changes_no_result(write_config):
    seldom = pretrain(write_config("seldom", train__save_steps=99))
    often = pretrain(write_config("often", train__save_steps=99, train__save_minutes=1e-9))
    names = sorted(path.name for path in (often / "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000011", "step-00000012"]
    assert [path.name for path in (seldom / "checkpoints").iterdir()] == ["step-00000012"]
    assert (traces(often)[0], *traces(often)[2:]) == (traces(seldom)[0], *traces(seldom)[2:])


def test_two_ranks_save_by_minutes_together(write_config):
    path = write_config(train__save_steps=99, train__save_minutes=1e-9, train__save_total_limit=99)
    run_ranks("pretrain", path)
    assert len(list((path.parent / "run" / "checkpoints").iterdir())) == 12


def test_unigram_entropy_is_that_of_the_token_frequencies(write_config):
    config = load_config(PretrainConfig, write_config())
    prepared = prepare(config)
    batches = training_batches(config, prepared)
    tokens = np.asarray(prepared.corpus.tokens)
    counts = np.bincount(tokens[~np.isin(tokens, batches.vocabulary.special_ids)])
    frequencies = counts[counts > 0] / counts.sum()
    entropy = -(frequencies * np.log(frequencies)).sum()
    assert batches.unigram_entropy() == pytest.approx(entropy, abs=1e-3)


@pytest.mark.parametrize(
    "losses, named",
    [
        ([8.0] * 100 + [6.5] * 300, True),
        ([8.0] * 100 + [6.7] * 300, True),  # a high rate keeps it above
        (np.linspace(9, 4, 1000), False),  # passes the level
        ([8.0] * 100 + [5.0] * 900, False),
        ([8.0] * 1000, False),  # something else is wrong
        ([6.5] * 90, False),
    ],
)
def test_a_plateau_at_the_unigram_entropy_is_warned_of_once(losses, named, capsys):
    watch = PlateauWatch(TrainSettings(max_steps=1000, warmup_ratio=0.06), lambda: 6.5)
    noise = np.random.default_rng(0).normal(0, 0.1, len(losses))
    for step, loss in enumerate(losses + noise, 1):
        watch.watch(step, loss * 200, 200)
    said = [line for line in capsys.readouterr().err.splitlines() if "frequencies" in line]
    assert len(said) == named
    assert not named or ("counted" in said[0] and "muon" in said[0] and "warmup_ratio" in said[0])


def test_a_stalled_training_is_warned_of(write_config, capsys):
    changes = {"train__max_steps": 4 * MIN_WINDOW, "train__learning_rate": 0.1, "train__warmup_ratio": 0.0}
    every = {f"train__{name}_steps": 999 for name in ("logging", "eval", "save")} | {"model__num_hidden_layers": 1}
    pretrain(write_config(**changes, **every, train__lr_scheduler_type="constant", train__global_batch_size=16))
    assert capsys.readouterr().err.count("which token frequencies alone give") == 1


@pytest.mark.parametrize("how", ["gone", "cut"])
@pytest.mark.parametrize("file", ["tokens.bin", "plan-*/piece_starts.npy"])
def test_a_run_whose_corpus_vanishes_saves_and_ends(write_config, tmp_path, how, file):
    every = {f"train__{name}": 200 for name in ("max_steps", "save_steps", "eval_steps")} | {"train__logging_steps": 1}
    path = write_config("cut", **every, data__cache_dir=str(tmp_path / "cache"))
    process = start(path)
    log = tmp_path / "cut" / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 5, process)
    for found in (tmp_path / "cache" / "corpora").glob(f"*/{file}"):
        found.unlink() if how == "gone" else os.truncate(found, 10)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "Traceback" not in errors, errors
    assert re.search(r"bertlite: \S+: missing or truncated; remove ", errors)
    assert int(newest_checkpoint(tmp_path / "cut").name[-8:]) >= 5
    shutil.rmtree(tmp_path / "cache")
    pretrain(path, resume=True)
    whole = pretrain(path, f"output_dir={tmp_path / 'whole'}")
    assert traces(tmp_path / "cut")[0] == traces(whole)[0]


def test_a_corpus_that_vanishes_before_an_evaluation_is_named(write_config, tmp_path):
    prepared = prepare(load_config(PretrainConfig, write_config(data__cache_dir=str(tmp_path / "cache"))))
    batches = Batches(prepared.validation_corpus, prepared.validation_packing, prepared.tokenizer, 64)
    batches.evaluation(0, 1)
    (prepared.validation_corpus.folder / "tokens.bin").unlink()
    with pytest.raises(DataLost, match=r"tokens\.bin: missing or truncated"):
        batches.evaluation(0, 1)


# Half a gigabyte of memory for all that the command does.
LIMITED = """
import resource
from pathlib import Path
from bertlite import cli
from bertlite.pretraining import pretrain
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 29),) * 2)
cli.main()
"""


def test_out_of_memory_ends_the_run_with_the_setting_to_change(write_config, tmp_path):
    changes = {"train__max_steps": 2, "train__save_steps": 1, "train__global_batch_size": 64}
    shape = {"model__num_attention_heads": 8, "data__sequence_length": 256}
    path = write_config("whole", **changes, **shape, train__per_device_train_batch_size=2)
    whole = pretrain(path)
    cut = crash_after(whole, 1, tmp_path / "cut")
    more = ["--set", "train.per_device_train_batch_size=64"]
    command = [sys.executable, "-c", LIMITED, "pretrain", str(path), "--out", str(cut), "--resume"]
    result = subprocess.run([*command, *more], capture_output=True, text=True, timeout=200)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "out of memory with a micro-batch of 64 sequences: lower train.per_device_train_batch_size" in result.stderr
    assert [path.name for path in (cut / "checkpoints").iterdir()] == ["step-00000001"]
    pretrain(path, f"output_dir={cut}", resume=True)
    assert traces(cut) == traces(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_save_finishes_it(write_config, number):
    path = write_config("cut", train__max_steps=2000, train__save_steps=1)
    checkpoints = path.parent / "cut" / "checkpoints"
    process = start(path)
    wait_for(lambda: checkpoints.exists() and len(list(checkpoints.glob("step-*"))) >= 2, process)
    wait_for(lambda: list(checkpoints.glob(".step-*")), process)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert not list(checkpoints.glob(".*")) and newest_checkpoint(path.parent / "cut") is not None


def test_a_signal_during_the_preparation(write_config, tmp_path):
    """While the tokenizer is trained, and while the text is tokenized; run again, it writes the same bytes."""
    sample = SAMPLE / "pretrain.txt"
    (tmp_path / "text.txt").write_text(sample.read_text() * 2)
    changes = {"data__train": [str(tmp_path / "text.txt")], "data__cache_dir": str(tmp_path / "cache")}
    path = write_config(**changes, tokenizer__vocab_size=8000)
    for moment in ("tokenizers", "corpora/*/tokens.bin"):
        process = Command("prepare", path)
        wait_for(lambda place=moment: list((tmp_path / "cache").glob(place)), process)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 143 and "stopped by SIGTERM" in errors and "Traceback" not in errors, errors
    cut = prepare(load_config(PretrainConfig, path)).corpus.folder
    whole = prepare(load_config(PretrainConfig, path, [f"data.cache_dir={tmp_path / 'whole'}"])).corpus.folder
    assert cut.name == whole.name
    for name in ("tokens.bin", "document_starts.bin", "corpus.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_a_signal_ends_a_long_computation_of_a_library():
    """One from which Python gets no word for minutes, as training a tokenizer on much text is."""
    code = (
        "import hashlib, threading\nfrom bertlite.core.signals import listen\nlisten()\n"
        "threading.Timer(1, print, ['it computes'], {'flush': True}).start()\n"
        "hashlib.pbkdf2_hmac('sha256', b'password', b'salt', 1 << 30)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    process.stdout.readline()
    process.terminate()
    try:
        assert "stopped by SIGTERM" in process.communicate(timeout=60)[1] and process.returncode == 143
    finally:
        process.kill()
        process.communicate()


def test_a_signal_in_a_long_step_saves_the_step_before(write_config, tmp_path):
    """The loss takes a minute in one call, as a large micro-batch may; the process ends within ten seconds."""
    path = write_config(train__max_steps=4, train__save_steps=100, train__eval_steps=100)
    code = (
        "import sys, time\nfrom bertlite import cli\nfrom bertlite.training import trainer\n"
        "compute, calls = trainer.Trainer._forward_backward, []\n"
        "def slowly(self, batch):\n"
        "    sums = compute(self, batch)\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3:\n"
        "        print('computing', flush=True)\n"
        "        import hashlib; hashlib.pbkdf2_hmac('sha256', b'password', b'salt', 1 << 27)\n"
        "    return sums\n"
        "trainer.Trainer._forward_backward = slowly\n"
        "sys.argv = ['bertlite', 'pretrain', sys.argv[1]]\ncli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    assert process.stdout.readline() == "computing\n"
    start = time.monotonic()
    process.terminate()
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "Traceback" not in errors, errors
    assert time.monotonic() - start < 10
    run = tmp_path / "run"
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-00000002"]
    resumed, whole = pretrain(path, resume=True), pretrain(path, f"output_dir={tmp_path / 'whole'}")
    assert traces(resumed)[0] == traces(whole)[0] and traces(resumed)[2] == traces(whole)[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_repeated_signal_does_not_disturb_the_save(write_config, tmp_path, number):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("the tests run under nohup")
    path = write_config(train__max_steps=5000, train__save_steps=5000, train__eval_steps=5000, train__logging_steps=1)
    process = Command("pretrain", path)
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and process_has_logged(tmp_path / "run"), process)
    for _ in range(20):
        if process.poll() is None:
            process.send_signal(number)
        time.sleep(0.01)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and "Traceback" not in errors, errors
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1


def test_a_signal_after_the_end_of_a_deferring_block_is_not_raised_again():
    code = (
        "import os, signal\nfrom bertlite.core.signals import Stopped, listen, stop_request\nlisten()\n"
        "try:\n    with stop_request.deferred():\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        raise Stopped(15)\n"
        "except Stopped:\n    os.kill(os.getpid(), signal.SIGTERM)\n    print('cleaned up')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("cleaned up\n", "")


def process_has_logged(run) -> bool:
    return (run / "metrics.jsonl").read_text().count("\n") > 3


def test_a_signal_that_the_parent_ignores_stays_ignored():
    code = (
        "import os, signal\nfrom bertlite.core.signals import listen\nlisten()\n"
        "os.kill(os.getpid(), signal.SIGHUP)\nprint('continues')"
    )
    command = ["nohup", sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout == "continues\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_ends_in_one_line_when_another_was_killed(write_config, rank):
    path = write_config(train__max_steps=20_000, train__save_steps=5, train__eval_steps=20_000)
    run = path.parent / "run"
    commands = start_ranks("pretrain", path)
    wait_for(lambda: newest_checkpoint(run) is not None, commands[0])
    commands[rank].kill()
    errors = commands[1 - rank].communicate(timeout=60)[1]
    assert commands[1 - rank].returncode == 1 and "Traceback" not in errors, errors
    assert "rank" in errors.splitlines()[-1] and errors.splitlines()[-1].startswith("bertlite: ")
    commands[rank].communicate()
    assert newest_checkpoint(run) is not None


@pytest.mark.parametrize(
    "kind, steps",
    [("pretrain", 40)] + [pytest.param(*run, marks=pytest.mark.slow) for run in (("finetune", 60), ("sweep", 60))],
)
def test_killed_runs_end_as_the_script_measures(kind, steps):
    """The fast part of what `scripts/measure_kills` shows."""
    script = ROOT / "scripts" / "measure_kills"
    command = [sys.executable, str(script), "--command", kind, "--kills", "3", "--steps", str(steps)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "killed 3 times" in result.stdout and "files, equal bit for bit" in result.stdout
    assert re.search(r"with the position in the data lost, [1-9]\d* files differ", result.stdout)
