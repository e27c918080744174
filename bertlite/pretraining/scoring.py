"""Scores of sentences by a masked language model: pseudo-perplexity and minimal pairs (Salazar et al. 2020)."""

# Shapes: N sentences, B masked copies in a batch, T positions, V vocabulary.
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from bertlite.config.settings import Source
from bertlite.core.errors import UserError
from bertlite.core.runtime import check_finite
from bertlite.data.formats import TableFile, read_json
from bertlite.data.sources import find_source_files, read_documents
from bertlite.inference.batching import batches_by_length, chunks, pad
from bertlite.model.heads import MaskedLanguageModel

CHUNK_SIZE = 512  # sentences or documents that are tokenized and sorted by length together


class Pair(NamedTuple):
    """A minimal pair: an acceptable and an unacceptable sentence that differ in one respect (Warstadt et al. 2020)."""

    good: str
    bad: str
    phenomenon: str
    paradigm: str


def pseudo_log_likelihoods(
    model: MaskedLanguageModel, tokenizer: PreTrainedTokenizerBase, sentences: list[list[int]]
) -> Tensor:
    """Score sentences of token ids: (N,), in nats, in fp64 (Salazar et al. 2020, section 2).

    Each token between [CLS] and [SEP] is masked in turn, and its log-probabilities are summed. For example,
    [CLS] a b [SEP] is computed as [CLS] [MASK] b [SEP] and as [CLS] a [MASK] [SEP].
    """
    device = model.head.bias.device
    ids, positions, documents = pad(sentences, tokenizer.pad_token_id, device)
    masked = [(number, place) for number, tokens in enumerate(sentences) for place in range(1, len(tokens) - 1)]
    sums = torch.zeros(len(sentences), dtype=torch.float64)
    with torch.inference_mode():
        for batch in batches_by_length([len(sentences[number]) for number, _ in masked], device):
            number, place = torch.tensor([masked[index] for index in batch]).unbind(1)  # (B,) each
            T = len(sentences[number[0]])  # the longest comes first
            inputs = ids[number, :T]  # (B,T), a copy
            copies = torch.arange(len(number))
            labels = inputs[copies, place]
            inputs[copies, place] = tokenizer.mask_token_id
            place = place[:, None].to(device)
            logits = model(inputs, positions[number, :T], documents[number, :T], place)[:, 0]  # (B,V)
            losses = F.cross_entropy(logits.float(), labels, reduction="none")
            sums.index_add_(0, number, -losses.double().cpu())
    check_finite(sums)
    return sums


def pseudo_perplexity(
    model: MaskedLanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: list[Source],
    document: str,
    sequence_length: int,
) -> float:
    """Return exp of the mean negative pseudo-log-likelihood of a token. Longer documents are split."""
    texts = (text for source in sources for text in read_documents(source, document, "--data"))
    length = sequence_length - 2  # without [CLS] and [SEP]
    total, num_tokens = 0.0, 0
    for chunk in chunks(tqdm(texts, disable=None, unit=" documents"), CHUNK_SIZE):
        documents = tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
        parts = [ids[start : start + length] for ids in documents for start in range(0, len(ids), length)]
        if parts:
            sequences = [_add_special_tokens(ids, tokenizer) for ids in parts]
            total += pseudo_log_likelihoods(model, tokenizer, sequences).sum().item()
            num_tokens += sum(map(len, parts))
    return math.exp(-total / num_tokens) if total > -700 * num_tokens else math.inf  # exp(710) is beyond fp64


def minimal_pairs(
    model: MaskedLanguageModel, tokenizer: PreTrainedTokenizerBase, pairs: Iterable[Pair]
) -> dict[str, Any]:
    """Return `pairs_accuracy`, how often the acceptable sentence has the higher score, and `phenomena`, the accuracy of
    each phenomenon and of its paradigms.

    Raises UserError for a sentence that is empty or longer than the model's positions.
    """
    correct: dict[str, dict[str, list[bool]]] = {}
    limit = model.config.max_position_embeddings
    for chunk in chunks(tqdm(pairs, disable=None, unit=" pairs"), CHUNK_SIZE):
        sentences = [sentence for pair in chunk for sentence in (pair.good, pair.bad)]
        ids = tokenizer(sentences, add_special_tokens=False, verbose=False)["input_ids"]
        for sentence, tokens in zip(sentences, ids, strict=True):
            if not 0 < len(tokens) <= limit - 2:
                raise UserError(
                    f"--pairs: a sentence has {len(tokens)} tokens, not 1 to {limit - 2} as the model takes: "
                    f"{sentence[:60]!r}"
                )
        scores = pseudo_log_likelihoods(model, tokenizer, [_add_special_tokens(tokens, tokenizer) for tokens in ids])
        for pair, (good, bad) in zip(chunk, scores.view(-1, 2).tolist(), strict=True):
            correct.setdefault(pair.phenomenon, {}).setdefault(pair.paradigm, []).append(good > bad)
    if not correct:
        raise UserError("--pairs: the files contain no pair")
    phenomena = {
        phenomenon: {
            **_accuracy(*paradigms.values()),
            "paradigms": {name: _accuracy(answers) for name, answers in sorted(paradigms.items())},
        }
        for phenomenon, paradigms in sorted(correct.items())
    }
    all_answers = (answers for paradigms in correct.values() for answers in paradigms.values())
    return {"pairs_accuracy": _accuracy(*all_answers)["accuracy"], "phenomena": phenomena}


def read_pairs(files: list[str]) -> Iterator[Pair]:
    """Read the pairs of JSON lines in BLiMP's format. Raises UserError, naming file and line, for any other line."""
    for path in (path for file in files for path in find_source_files(Source(path=file), "--pairs")):
        for where, line in read_json(TableFile(path)):
            try:
                good, bad = line["sentence_good"], line["sentence_bad"]
                if not isinstance(good, str) or not isinstance(bad, str):
                    raise TypeError
            except (KeyError, TypeError):
                raise UserError(f"{where}: not a JSON object with the texts sentence_good and sentence_bad") from None
            paradigm = str(line.get("UID") or path.stem)
            yield Pair(good, bad, str(line.get("linguistics_term") or paradigm), paradigm)


def _add_special_tokens(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]


def _accuracy(*answers: list[bool]) -> dict[str, Any]:
    pairs = sum(map(len, answers))
    return {"accuracy": sum(map(sum, answers)) / pairs, "pairs": pairs}
