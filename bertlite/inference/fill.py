"""`bertlite fill`: predict the tokens in place of [MASK]."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from bertlite.core.errors import UserError
from bertlite.core.runtime import check_finite
from bertlite.model.heads import MaskedLanguageModel


def fill(
    model: MaskedLanguageModel, tokenizer: PreTrainedTokenizerBase, text: str, top_k: int = 5
) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
    """Return the `top_k` most probable tokens for each mask in `text`, in the form of Hugging Face's fill-mask.

    One mask gives a list of `score, token, token_str, sequence`; several give a list of such lists.
    Raises UserError when the text has no mask or more tokens than the model has positions.
    """
    ids = torch.tensor([tokenizer(text, verbose=False)["input_ids"]])
    mask_positions = (ids[0] == tokenizer.mask_token_id).nonzero()[:, 0]
    max_length = model.config.max_position_embeddings
    if not len(mask_positions):
        raise UserError(f"the text has no {tokenizer.mask_token}: {text[:60]!r}")
    if ids.shape[1] > max_length:
        raise UserError(f"the text has {ids.shape[1]} tokens, more than the model's {max_length} positions")
    if not 0 < top_k <= model.config.vocab_size:
        raise UserError(f"--top-k is {top_k}; it should be 1 to {model.config.vocab_size}, the vocabulary size")
    with torch.inference_mode():
        inputs = (ids, torch.arange(ids.shape[1])[None], torch.ones_like(ids), mask_positions[None])
        logits = model(*(tensor.to(model.head.bias.device) for tensor in inputs))[0]
    check_finite(logits)
    scores, tokens = logits.float().cpu().softmax(-1).topk(top_k)
    results: list[list[dict[str, Any]]] = []
    for position, *best in zip(mask_positions, scores.tolist(), tokens.tolist(), strict=True):
        results.append([])
        for score, token in zip(*best, strict=True):
            filled = ids[0].index_fill(0, position, token)
            sequence = tokenizer.decode(filled, skip_special_tokens=len(mask_positions) == 1)
            results[-1].append(
                {"score": score, "token": token, "token_str": tokenizer.decode([token]), "sequence": sequence}
            )
    return results[0] if len(results) == 1 else results


def format_predictions(result: list[Any]) -> str:
    """Format what `fill` returns as lines of score, token and sequence."""
    masks = [result] if isinstance(result[0], dict) else result
    lines = []
    for number, predictions in enumerate(masks, 1):
        if len(masks) > 1:
            lines.append(f"mask {number}")
        lines += [f"{entry['score']:.4f}  {entry['token_str']:16}  {entry['sequence']}" for entry in predictions]
    return "\n".join(lines)
