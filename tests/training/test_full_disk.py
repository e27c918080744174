"""A full disk: a clear message, and no half-written files."""

import re
import subprocess

import pytest
from processes import Command
from tiny_runs import pretrain, traces

from bertlite.config.settings import DataSettings
from bertlite.core.errors import Failure
from bertlite.data.corpus import prepare_corpus
from bertlite.data.tokenizer import load_tokenizer, wrap_tokenizer
from bertlite.data.vocabulary import train_word_piece
from bertlite.training.checkpoint import newest_checkpoint


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_corpus_that_does_not_fit_is_finished_when_there_is_room(small_disk, tmp_path):
    wrap_tokenizer(train_word_piece(["some words of text"] * 9, 100, True)).save_pretrained(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    (tmp_path / "text.txt").write_text("\n\n".join(f"some words of text {number}" for number in range(20_000)))

    def prepare(cache):
        data = DataSettings.model_validate({"train": str(tmp_path / "text.txt"), "cache_dir": str(cache)})
        return prepare_corpus(data.train, tokenizer, data, "data.train")

    subprocess.run(["mount", "-o", "remount,size=200k", small_disk], check=True)
    with pytest.raises(Failure, match="the disk is full") as failure:
        prepare(small_disk)
    assert str(small_disk) in str(failure.value)
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    finished, whole = prepare(small_disk), prepare(tmp_path / "cache")
    for name in ("tokens.bin", "document_starts.bin", "corpus.json"):
        assert (finished.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_a_tokenizer_that_does_not_fit_is_trained_when_there_is_room(small_disk, write_config):
    path = write_config(data__cache_dir=str(small_disk))
    subprocess.run(["mount", "-o", "remount,size=16k", small_disk], check=True)
    with pytest.raises(Failure, match="the disk is full"):
        pretrain(path)
    assert not list((small_disk / "tokenizers").glob("*/*"))
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    assert traces(pretrain(path)) == traces(pretrain(write_config("other")))


@pytest.mark.slow
def test_a_compiler_without_room_ends_the_run_in_one_line(small_disk, write_config):
    with pytest.raises(OSError), (small_disk / "full").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    folders = {"TMPDIR": str(small_disk), "TORCHINDUCTOR_CACHE_DIR": str(small_disk / "cache")}
    command = Command("pretrain", write_config(), "--set", "train.compile=true", **folders)
    errors = command.communicate(timeout=120)[1]
    assert command.returncode == 1 and "Traceback" not in errors, errors
    assert re.search(r"^bertlite: .*: the disk is full", errors.splitlines()[-1])


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(small_disk, write_config):
    path = write_config()
    with pytest.raises(Failure, match="the disk is full"):
        pretrain(path, f"output_dir={small_disk}/run", "train.save_steps=2", "train.save_total_limit=99")
    run = small_disk / "run"
    assert newest_checkpoint(run) is not None
    assert not list((run / "checkpoints").glob(".*"))
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    changes = ("train.save_steps=2", "train.save_total_limit=99")
    resumed = pretrain(path, f"output_dir={run}", *changes, resume=True)
    whole = pretrain(path, *changes)
    assert traces(resumed) == traces(whole)
