"""Packages that only some commands need, and that may be missing."""

from importlib.util import find_spec

from bertlite.core.errors import UserError

_PIP_NAMES = {"sklearn": "scikit-learn", "sentence_transformers": "sentence-transformers"}


def require(user: str, install: str, *packages: str) -> None:
    """Raise UserError, naming what to install by pip, if `user`, such as a command, lacks a package."""
    missing = [_PIP_NAMES.get(package, package) for package in packages if find_spec(package) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        names = ", ".join(missing)
        raise UserError(f"{user} needs {names}, which {verb} not installed: pip install '{install}'")
