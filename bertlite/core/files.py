"""Atomic files and folders, locks, checksums.

Atomic: other processes see either the old state or the complete new file or folder, even if this process is killed.
"""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from bertlite.core.errors import DiskFull, UserError
from bertlite.core.logging import logger


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill, and rename it to `path` when the block ends without an error.

    The files are on the disk before the name appears. An error removes the temporary folder. Raises DiskFull.
    """
    with disk_full_as_error(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, glob.escape(path.name))
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        claim = _claim(temporary)
        try:
            yield temporary
            umask = _get_umask()
            for path_inside in (temporary, *temporary.rglob("*")):
                # mkdtemp and safetensors create files and folders that other users may not read
                path_inside.chmod((0o777 if path_inside.is_dir() else 0o666) & ~umask)
                fsync(path_inside)
            temporary.rename(path)
            fsync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # exists only after an error
            os.close(claim)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file to write, and rename it to `path` when the block ends without an error.

    Raises DiskFull, and UserError when the folder of `path` does not exist or `path` is not a file.
    """
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: there is no such folder; create it first")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is a {'folder' if path.is_dir() else 'device or a pipe'}; name a file")
    with disk_full_as_error(path.parent):
        remove_leftovers(path.parent, glob.escape(path.name))
        # The process number would not make the name unique: containers may share a folder.
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        claim = _claim(temporary)
        try:
            with open(descriptor, "wb") as file:
                yield file
            temporary.chmod(0o666 & ~_get_umask())
            fsync(temporary)
            temporary.replace(path)
            fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)  # exists only after an error
            os.close(claim)


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove temporary files and folders that killed processes left in `folder` while they wrote `name` (a glob).

    Those that a process is writing stay: it holds a claim to them.
    """
    for path in folder.glob(f".{name}.*"):
        if not re.search(r"\.\w{8}$", path.name):  # the suffix that tempfile gives
            continue
        try:
            claim = _claim(path)
        except OSError:  # another process holds it, or has just finished
            continue
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        os.close(claim)


def _claim(path: Path) -> int:
    """Lock a temporary file or folder until the descriptor is closed or this process ends.

    Raises OSError if it is not there or another process holds it.
    """
    if os.name != "posix":
        return os.open(os.devnull, os.O_RDONLY)  # open files cannot be removed there anyway
    import fcntl

    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Let one thread of one process at a time create `path`. The system releases the lock when its process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file_lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        acquired = file_lock.acquire(blocking=False)
    except Timeout:
        logger.info(f"waiting for another process that prepares {path}")
        acquired = file_lock.acquire()
    with acquired:
        remove_leftovers(path.parent, path.name)
        yield


def write_text(path: Path, text: str) -> None:
    """Write an atomic file in UTF-8."""
    with atomic_file(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # for names of files that are not UTF-8


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, to an atomic file."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the value of a JSON file of the cache, or None when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def disk_full_as_error(folder: Path) -> Iterator[None]:
    """Raise DiskFull, naming `folder`, if the block fails because no more can be written."""
    try:
        yield
    except Exception as error:
        if reason := find_full_disk(error):
            raise DiskFull(f"{folder}: {reason}; what was saved before is intact") from None
        raise


def find_full_disk(error: BaseException | None) -> str:
    """Return why nothing more can be written, if that is what an error or one of its causes is about; else ""."""
    reasons = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "a file would be larger than this process may write (ulimit -f)",
    }
    while error is not None:
        for code, reason in reasons.items():  # libraries in Rust have no error number
            texts = (f"os error {code})", os.strerror(code))
            if getattr(error, "errno", None) == code or any(text in str(error) for text in texts):
                return reason
        error = error.__cause__ or error.__context__
    return ""


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Return a short hash of a value that JSON can express."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _get_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
