"""Where words start, for whole-word masking: by the vocabulary, or by a segmenter for text without spaces."""

import json
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bertlite.core.packages import require


def mark_word_starts(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """Mark the tokens of a vocabulary that start a word: (V,).

    In WordPiece, tokens that continue a word have a prefix (Schuster and Nakajima 2012; BERT: ##); in SentencePiece and
    byte-level BPE, those that start one (▁ and Ġ). In a vocabulary without prefixes, each token is a word.
    """
    model = json.loads(tokenizer.to_str())["model"]
    starts = np.ones(tokenizer.get_vocab_size(), dtype=bool)
    for token, number in tokenizer.get_vocab().items():
        if model["type"] == "WordPiece":
            starts[number] = not token.startswith(model["continuing_subword_prefix"])
        else:
            starts[number] = token.startswith(("▁", "Ġ"))
    return starts if starts.any() else ~starts


def segment_with_jieba(text: str) -> list[str]:
    """Segment Chinese text with jieba (github.com/fxsjy/jieba), as Cui et al. 2019 do for whole-word masking."""
    require("data.segmenter: jieba", "bertlite[chinese]", "jieba")
    import jieba

    jieba.setLogLevel("ERROR")
    return list(jieba.cut(text))


# A segmenter splits text into words; joined, they are the text again.
SEGMENTERS: dict[str, Callable[[str], list[str]]] = {"jieba": segment_with_jieba}


def mark_segmented_words(
    text: str, offsets: list[tuple[int, int]], segment: Callable[[str], list[str]]
) -> NDArray[np.uint8]:
    """Mark the tokens, given by their offsets in the text, that start a word of the segmenter."""
    starts_word = np.zeros(len(text) + 1, dtype=np.uint8)  # of each character
    position = 0
    for word in segment(text):
        starts_word[position] = 1
        position += len(word)
    return starts_word[[start for start, _ in offsets]] if offsets else np.zeros(0, np.uint8)
