"""bertlite turns a pile of text into a BERT that Hugging Face loads, and proves that it is one."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bertlite.api import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`from bertlite import load`, without loading torch for those who do not."""
    if name == "load":
        return import_module("bertlite.api").load
    raise AttributeError(f"module 'bertlite' has no attribute {name!r}")
