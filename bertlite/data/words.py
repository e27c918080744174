"""Where words begin, for masking whole ones: by the vocabulary, or by a segmenter for text without spaces."""

import json
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bertlite.core.packages import require


def mark_word_starts(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """For every id of the vocabulary (V,), whether its piece begins a word.

    WordPiece marks the pieces that go on (Schuster and Nakajima 2012; BERT writes ##); SentencePiece and byte-level
    BPE mark those that begin (▁ and Ġ). Where no piece is marked, each is a word.
    """
    model = json.loads(tokenizer.to_str())["model"]
    starts = np.ones(tokenizer.get_vocab_size(), dtype=bool)
    for piece, number in tokenizer.get_vocab().items():
        if model["type"] == "WordPiece":
            starts[number] = not piece.startswith(model["continuing_subword_prefix"])
        else:
            starts[number] = piece.startswith(("▁", "Ġ"))
    return starts if starts.any() else ~starts


def segment_with_jieba(text: str) -> list[str]:
    """Chinese words by jieba (github.com/fxsjy/jieba), as in Chinese BERT with whole word masking (Cui et al. 2019)."""
    require("data.segmenter: jieba", "chinese", "jieba")
    import jieba

    jieba.setLogLevel("ERROR")
    return list(jieba.cut(text))


# A segmenter cuts text into words that, one after the other, are the text.
SEGMENTERS: dict[str, Callable[[str], list[str]]] = {"jieba": segment_with_jieba}


def mark_segmented_words(
    text: str, offsets: list[tuple[int, int]], segment: Callable[[str], list[str]]
) -> NDArray[np.uint8]:
    """For each token, given by its place in the text, whether a word of the segmenter begins there."""
    first = np.zeros(len(text) + 1, dtype=np.uint8)
    at = 0
    for word in segment(text):
        first[at] = 1
        at += len(word)
    return first[[start for start, _ in offsets]] if offsets else np.zeros(0, np.uint8)
