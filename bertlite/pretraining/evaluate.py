"""`bertlite evaluate`: the loss and accuracy of a masked language model on a test set."""

import math
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from bertlite.config.settings import DataSettings
from bertlite.core.errors import UserError
from bertlite.core.logging import logger
from bertlite.core.runtime import Runtime, check_finite
from bertlite.data.batches import EVALUATION_MASKING, Batches
from bertlite.data.corpus import prepare_corpus
from bertlite.data.packing import pack_corpus
from bertlite.model.heads import MaskedLanguageModel
from bertlite.pretraining.losses import masked_lm_scores
from bertlite.pretraining.scoring import minimal_pairs, pseudo_perplexity, read_pairs
from bertlite.training.trainer import evaluate

MICRO_BATCH_SIZE = 32


def evaluate_masked_lm(
    model: MaskedLanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    runtime: Runtime,
    data: list[str] | None,
    pairs: list[str] | None,
    sequence_length: int | None = None,
    document: str | None = None,
    columns: list[str] | None = None,
    pseudo: bool = False,
) -> dict[str, Any]:
    """Return what `evaluate_text` measures on the files `data`, and `minimal_pairs` on the files `pairs`."""
    result: dict[str, Any] = {}
    if data:
        column = columns[0] if columns else None
        result |= evaluate_text(
            model, tokenizer, data, runtime, sequence_length, document or "blank-line", column, pseudo
        )
    if pairs:
        with runtime.autocast():
            result |= minimal_pairs(model, tokenizer, read_pairs(pairs))
    return result


def evaluate_text(
    model: MaskedLanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    files: list[str],
    runtime: Runtime,
    sequence_length: int | None = None,
    document: str = "blank-line",
    column: str | None = None,
    pseudo: bool = False,
) -> dict[str, float]:
    """Return `eval_loss` (nats per prediction) and `eval_accuracy` on text files, masked as evaluations in training.

    By default sequences are as long as the tokenizer's `model_max_length`, which bertlite sets to the length trained
    with, but at most as long as the model's positions. With `pseudo`, also return `pseudo_perplexity`.
    Raises UserError for text that cannot be used.
    """
    limit = model.config.max_position_embeddings
    length = min(sequence_length or tokenizer.model_max_length, limit)
    if sequence_length and sequence_length > limit:
        raise UserError(f"--sequence-length is {sequence_length}, more than the model's {limit} positions")
    sources = [{"path": file, "column": column} for file in files]
    data = DataSettings.model_validate({"train": sources, "sequence_length": length, "document": document})
    corpus = prepare_corpus(data.train, tokenizer, data, "--data")
    packing = pack_corpus(corpus, length)
    batches = Batches(corpus, packing, tokenizer, length)
    logger.info(
        f"--data: {packing.tokens():,} tokens in {len(packing):,} sequences of {length}; "
        f"{EVALUATION_MASKING.rate:.0%} of the tokens are masked, the same tokens every time"
    )
    scores = evaluate(model, masked_lm_scores, batches.evaluation, len(packing), MICRO_BATCH_SIZE, runtime)
    if math.isnan(scores["accuracy"]):
        raise UserError("--data: the text is too short to mask one of its tokens; add more text")
    check_finite(torch.tensor(scores["loss"]))
    result = {f"eval_{name}": value for name, value in scores.items()}
    if pseudo:
        with runtime.autocast():
            result["pseudo_perplexity"] = pseudo_perplexity(model, tokenizer, data.train, document, length)
    return result


def format_evaluation(result: dict[str, Any]) -> str:
    """Format the metrics of `evaluate_text` and `minimal_pairs` as a table."""
    lines = [f"{name:20}  {value:.4f}" for name, value in result.items() if isinstance(value, float)]
    for phenomenon, total in result.get("phenomena", {}).items():
        lines += ["", f"{phenomenon:50}  {total['accuracy']:6.1%} of {total['pairs']:,}"]
        for paradigm, counts in total["paradigms"].items():
            lines.append(f"  {paradigm:48}  {counts['accuracy']:6.1%} of {counts['pairs']:,}")
    return "\n".join(lines)
