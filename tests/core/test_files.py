"""Atomic files and folders, leftovers, checksums."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from bertlite.core.errors import UserError
from bertlite.core.files import atomic_file, atomic_folder, find_full_disk, remove_leftovers, sha256, write_text


def test_an_atomic_folder_appears_only_when_complete(tmp_path):
    with atomic_folder(tmp_path / "model") as temporary:
        (temporary / "a").write_text("1")
        (temporary / "inner").mkdir()
        (temporary / "inner" / "b").write_text("2")
        assert not (tmp_path / "model").exists()
    assert (tmp_path / "model" / "inner" / "b").read_text() == "2"
    assert os.listdir(tmp_path) == ["model"]


def test_an_atomic_folder_leaves_nothing_after_an_error(tmp_path):
    with pytest.raises(KeyError), atomic_folder(tmp_path / "model") as temporary:
        (temporary / "a").write_text("1")
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_an_atomic_file_keeps_the_old_content_after_an_error(tmp_path):
    path = tmp_path / "config.yaml"
    write_text(path, "old")
    with pytest.raises(KeyError), atomic_file(path) as file:
        file.write(b"new")
        raise KeyError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_an_atomic_file_has_the_permissions_of_any_new_file(tmp_path):
    write_text(tmp_path / "ours", "x")
    (tmp_path / "theirs").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode


def test_a_pipe_or_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(UserError, match="is a device or a pipe; name a file"):
            write_text(path, "x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_only_leftovers_of_killed_processes_are_removed(tmp_path):
    for name in (".step-00000020.abc_1xyz", ".step-00000020.12345678"):
        (tmp_path / name).mkdir()
    (tmp_path / ".step-00000040.q2w3e4r5").write_text("")
    kept = {".git", ".step-00000020.lock", "step-00000020", ".model.abc_1xyz", ".step-00000020"}
    for name in kept:
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path, "step-*")
    assert set(os.listdir(tmp_path)) == kept


def test_files_left_by_a_killed_process_are_recognized_as_leftovers(tmp_path):
    code = (
        "import os, pathlib, sys\nfrom bertlite.core import files\npath = pathlib.Path(sys.argv[1])\n"
        "files.fsync = lambda path: os.kill(os.getpid(), 9)\n"
    )
    ends = {
        "model": "with files.atomic_folder(path / 'model') as temporary: (temporary / 'a').write_text('1')",
        "config.yaml": "files.write_text(path / 'config.yaml', 'text')",
    }
    for name, end in ends.items():
        subprocess.run([sys.executable, "-c", code + end, tmp_path], check=False)
        assert len(os.listdir(tmp_path)) == 1 and not (tmp_path / name).exists()
        remove_leftovers(tmp_path, name)
        assert os.listdir(tmp_path) == []


def test_the_next_process_that_writes_a_name_removes_what_a_killed_one_left(tmp_path):
    (tmp_path / ".vectors.npy.abc_1xyz").write_text("half of it")
    (tmp_path / ".out.12345678").mkdir()
    write_text(tmp_path / "vectors.npy", "whole")
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("1")
    assert sorted(os.listdir(tmp_path)) == ["out", "vectors.npy"]


def test_two_processes_that_write_one_name_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "vectors.npy"
    with atomic_file(path) as slow:
        slow.write(b"slow")
        write_text(path, "quick")
        assert path.read_text() == "quick"
    assert path.read_text() == "slow" and os.listdir(tmp_path) == ["vectors.npy"]


def test_text_with_a_file_name_that_is_not_utf_8_is_written(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    write_text(tmp_path / "a.json", json.dumps(name, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text()) == name


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "no space"), "the disk is full"),
        (OSError(errno.EFBIG, "too large"), "a file would be larger than this process may write (ulimit -f)"),
        (Exception("No space left on device (os error 28)"), "the disk is full"),  # tokenizers, safetensors
        (FileNotFoundError(errno.ENOENT, "no such file"), ""),
        (ValueError("288 (os error 280)"), ""),
    ],
)
def test_a_full_disk_is_recognized_in_the_errors_of_libraries(error, reason):
    wrapped = RuntimeError("compilation failed")
    wrapped.__cause__ = error
    assert find_full_disk(error) == find_full_disk(wrapped) == reason


def test_sha256_is_that_of_coreutils(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
