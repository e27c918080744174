"""bertlite turns a pile of text into a BERT that Hugging Face loads, and proves that it is one."""

__version__ = "0.1.0"
