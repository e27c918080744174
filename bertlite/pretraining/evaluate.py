"""`bertlite evaluate`: the loss and accuracy of a masked language model on held-out text."""

import math

from transformers import PreTrainedTokenizerBase

from bertlite.config.settings import DataSettings
from bertlite.core.errors import UserError
from bertlite.core.logging import logger
from bertlite.core.runtime import Runtime
from bertlite.data.batches import EVALUATION_MASKING, Batches
from bertlite.data.corpus import prepare_corpus
from bertlite.data.packing import pack_corpus
from bertlite.model.heads import MaskedLanguageModel
from bertlite.pretraining.losses import masked_lm_scores
from bertlite.pretraining.scoring import pseudo_perplexity
from bertlite.training.trainer import evaluate

ROWS_AT_A_TIME = 32


def evaluate_text(
    model: MaskedLanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    files: list[str],
    runtime: Runtime,
    sequence_length: int | None = None,
    document: str = "blank-line",
    column: str = "text",
    pseudo: bool = False,
) -> dict[str, float]:
    """`eval_loss` (nats per prediction) and `eval_accuracy` on text files, by the masks that training evaluates with.

    Rows are as long as the tokenizer's `model_max_length`, which bertlite sets to the length trained with, and never
    longer than the model's positions. With `pseudo`, also `pseudo_perplexity`, for which every token is masked in turn.
    Raises UserError for text that cannot be used.
    """
    limit = model.config.max_position_embeddings
    length = min(sequence_length or tokenizer.model_max_length, limit)
    if sequence_length and sequence_length > limit:
        raise UserError(f"--sequence-length is {sequence_length}, more than the model's {limit} positions")
    sources = [{"path": file, "column": column} for file in files]
    data = DataSettings.model_validate({"train": sources, "sequence_length": length, "document": document})
    corpus = prepare_corpus(data.train, tokenizer, data, "--data")
    plan = pack_corpus(corpus, length)
    batches = Batches(corpus, plan, tokenizer, length)
    logger.info(
        f"--data: {plan.tokens():,} tokens in {len(plan):,} rows of {length}; {EVALUATION_MASKING.rate:.0%} of the "
        "tokens are masked, the same ones every time"
    )
    scores = evaluate(model, masked_lm_scores, batches.evaluation, len(plan), ROWS_AT_A_TIME, runtime)
    if math.isnan(scores["accuracy"]):
        raise UserError("--data: the text is too short to hide one of its tokens; give more of it")
    result = {f"eval_{name}": value for name, value in scores.items()}
    if pseudo:
        with runtime.autocast():
            result["pseudo_perplexity"] = pseudo_perplexity(model, tokenizer, data.train, document, length)
    return result
