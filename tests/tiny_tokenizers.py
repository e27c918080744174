"""Tokenizers with a given vocabulary."""

from transformers import PreTrainedTokenizerBase

from bertlite.data.tokenizer import build_word_piece, wrap_tokenizer


def make_tokenizer(tokens: list[str], lowercase: bool = True) -> PreTrainedTokenizerBase:
    """A WordPiece tokenizer whose ids follow the order of `tokens`."""
    return wrap_tokenizer(build_word_piece({token: number for number, token in enumerate(tokens)}, lowercase))
