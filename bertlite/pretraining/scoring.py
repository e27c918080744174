"""Sentences as a masked language model scores them: pseudo-perplexity and minimal pairs (Salazar et al. 2020)."""

# Shapes: N sentences, B masked copies that are computed together, T positions, V vocabulary.
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
from bertlite.data.formats import TableFile, read_json_lines
from bertlite.data.sources import find_source_files, read_documents
from bertlite.inference.batching import batches_by_length, chunks, pad
from bertlite.model.heads import MaskedLanguageModel

SENTENCES_AT_A_TIME = 512


class Pair(NamedTuple):
    """Two sentences that differ in one thing (Warstadt et al. 2020); the first is the acceptable one."""

    good: str
    bad: str
    phenomenon: str
    paradigm: str


def pseudo_log_likelihoods(
    model: MaskedLanguageModel, tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]
) -> Tensor:
    """How likely the model finds each row of token ids: (N,), in nats, in fp64 (Salazar et al. 2020, section 2).

    Each token but the first and last, [CLS] and [SEP], is masked in turn, and what the model gives it is summed.
    """
    device = model.head.bias.device
    tokens, positions, documents = pad(rows, tokenizer.pad_token_id, device)
    masked = [(row, place) for row, ids in enumerate(rows) for place in range(1, len(ids) - 1)]
    sums = torch.zeros(len(rows), dtype=torch.float64)
    with torch.inference_mode():
        for numbers in batches_by_length([len(rows[row]) for row, _ in masked], device):
            row, place = torch.tensor([masked[number] for number in numbers]).unbind(1)
            width = len(rows[row[0]])  # of the longest
            inputs = tokens[row, :width]  # (B,T), a copy
            wanted = inputs[torch.arange(len(row)), place]
            inputs[torch.arange(len(row)), place] = tokenizer.mask_token_id
            place = place[:, None].to(device)
            scores = model(inputs, positions[row, :width], documents[row, :width], place)[:, 0]  # (B,V)
            sums.index_add_(0, row, -F.cross_entropy(scores.float(), wanted, reduction="none").double().cpu())
    return sums


def pseudo_perplexity(
    model: MaskedLanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: list[Source],
    document: str,
    sequence_length: int,
) -> float:
    """exp of the mean negative pseudo-log-likelihood of a token; documents are cut into pieces that fit a row."""
    texts = (text for source in sources for text in read_documents(source, document, "--data"))
    room = sequence_length - 2
    total, count = 0.0, 0
    for part in chunks(tqdm(texts, disable=None, unit=" documents"), SENTENCES_AT_A_TIME):
        found = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        rows = [_framed(ids[start : start + room], tokenizer) for ids in found for start in range(0, len(ids), room)]
        if rows:
            total += pseudo_log_likelihoods(model, tokenizer, rows).sum().item()
            count += sum(len(row) - 2 for row in rows)
    return math.exp(-total / count) if total > -700 * count else math.inf  # exp(710) is beyond fp64


def minimal_pairs(
    model: MaskedLanguageModel, tokenizer: PreTrainedTokenizerBase, pairs: Iterable[Pair]
) -> dict[str, Any]:
    """How often the model finds the acceptable sentence the likelier one: `pairs_accuracy`, and under `phenomena` the
    accuracy of each and of its paradigms.

    Raises UserError for a sentence that is empty or longer than the model's positions.
    """
    right: dict[str, dict[str, list[bool]]] = {}
    limit = model.config.max_position_embeddings
    for part in chunks(tqdm(pairs, disable=None, unit=" pairs"), SENTENCES_AT_A_TIME):
        sentences = [sentence for pair in part for sentence in (pair.good, pair.bad)]
        ids = tokenizer(sentences, add_special_tokens=False, verbose=False)["input_ids"]
        for sentence, row in zip(sentences, ids, strict=True):
            if not 0 < len(row) <= limit - 2:
                raise UserError(
                    f"--pairs: {len(row)} tokens, not 1 to {limit - 2} as the model takes: {sentence[:60]!r}"
                )
        scores = pseudo_log_likelihoods(model, tokenizer, [_framed(row, tokenizer) for row in ids])
        for pair, (good, bad) in zip(part, scores.view(-1, 2).tolist(), strict=True):
            right.setdefault(pair.phenomenon, {}).setdefault(pair.paradigm, []).append(good > bad)
    if not right:
        raise UserError("--pairs: there is no pair in it")
    phenomena = {
        phenomenon: {
            **_share(*paradigms.values()),
            "paradigms": {name: _share(choices) for name, choices in sorted(paradigms.items())},
        }
        for phenomenon, paradigms in sorted(right.items())
    }
    everything = (choices for paradigms in right.values() for choices in paradigms.values())
    return {"pairs_accuracy": _share(*everything)["accuracy"], "phenomena": phenomena}


def read_pairs(files: list[str]) -> Iterator[Pair]:
    """The pairs of JSON lines as BLiMP has them. Raises UserError, naming file and line, for any other."""
    for path in (path for file in files for path in find_source_files(Source(path=file), "--pairs")):
        for where, line in read_json_lines(TableFile(path)):
            try:
                good, bad = line["sentence_good"], line["sentence_bad"]
                if not isinstance(good, str) or not isinstance(bad, str):
                    raise TypeError
            except (KeyError, TypeError):
                raise UserError(f"{where}: not a JSON object with the texts sentence_good and sentence_bad") from None
            paradigm = str(line.get("UID") or path.stem)
            yield Pair(good, bad, str(line.get("linguistics_term") or paradigm), paradigm)


def _framed(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]


def _share(*choices: list[bool]) -> dict[str, Any]:
    pairs = sum(map(len, choices))
    return {"accuracy": sum(map(sum, choices)) / pairs, "pairs": pairs}
