"""Tokenizers with a given vocabulary."""

from transformers import PreTrainedTokenizerBase

from bertlite.data.tokenizer import wrap_tokenizer
from bertlite.data.vocabulary import build_word_piece


def make_tokenizer(tokens: list[str], lowercase: bool = True) -> PreTrainedTokenizerBase:
    """A WordPiece tokenizer whose ids follow the order of `tokens`."""
    return wrap_tokenizer(build_word_piece({token: number for number, token in enumerate(tokens)}, lowercase))
