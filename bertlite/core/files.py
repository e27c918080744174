"""Files and folders that are either whole or not there."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from bertlite.core.errors import DiskFull, UserError


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `path` to fill; when the block ends well, it becomes `path`.

    Everything is on the disk before the name appears. After an error, nothing is left.
    Raises DiskFull.
    """
    with disk_full_as_error(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield aside
            mask = _umask()
            for inner in (aside, *aside.rglob("*")):  # mkdtemp and safetensors make what others may not read
                inner.chmod((0o777 if inner.is_dir() else 0o666) & ~mask)
                fsync(inner)
            aside.rename(path)
            fsync(path.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)  # it is gone when all went well


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove what `new_folder` and `write_whole` of `name` (a glob) left in `folder` when their process was killed.

    Only for names that no other process is writing.
    """
    for path in folder.glob(f".{name}.*"):
        if re.search(r"\.\w{8}$", path.name):  # tempfile's letters
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Only one process at a time makes `path`; the operating system frees the lock when that process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that makes {path}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        remove_leftovers(path.parent, path.name)
        yield


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a hidden file beside `path` to write; when the block ends well, it becomes `path` in one step.

    Readers see the old file or the new one. Raises DiskFull, and UserError when its folder is not there or it is one.
    """
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: there is no such folder; make it first")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is a {'folder' if path.is_dir() else 'device or a pipe'}; name a file")
    with disk_full_as_error(path.parent):  # a name of its own: containers that share a folder share process numbers
        number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        aside = Path(name)
        try:
            with open(number, "wb") as file:
                yield file
            aside.chmod(0o666 & ~_umask())
            fsync(aside)
            aside.replace(path)
            fsync(path.parent)
        finally:
            aside.unlink(missing_ok=True)  # it is gone when all went well


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step: readers see the old file or the new one."""
    with atomic_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file of the cache; None where there is none, or a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def disk_full_as_error(folder: Path) -> Iterator[None]:
    """Turn "no space left" into a DiskFull that says where."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = (errno.ENOSPC, errno.EDQUOT)
        if getattr(error, "errno", None) in full or any(f"os error {number}" in str(error) for number in full):
            raise DiskFull(f"{folder}: the disk is full; what was saved before is intact") from None
        raise


def fsync(path: Path) -> None:
    """Ask the operating system to bring a file or folder to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """A short name for anything that JSON can express."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
