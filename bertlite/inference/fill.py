"""`bertlite fill`: what a masked language model expects in place of [MASK]."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from bertlite.core.errors import UserError
from bertlite.model.heads import MaskedLanguageModel


def fill(
    model: MaskedLanguageModel, tokenizer: PreTrainedTokenizerBase, text: str, top_k: int = 5
) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
    """The `top_k` tokens for each mask in `text`, with their probabilities, as Hugging Face's fill-mask gives them.

    One mask gives a list of `score, token, token_str, sequence`; several give a list of such lists.
    Raises UserError when the text holds no mask or is longer than the model's positions.
    """
    ids = torch.tensor([tokenizer(text, verbose=False)["input_ids"]])
    masks = (ids[0] == tokenizer.mask_token_id).nonzero()[:, 0]
    limit = model.config.max_position_embeddings
    if not len(masks):
        raise UserError(f"the text holds no {tokenizer.mask_token}: {text[:60]!r}")
    if ids.shape[1] > limit:
        raise UserError(f"the text is {ids.shape[1]} tokens long, more than the model's {limit} positions")
    if not 0 < top_k <= model.config.vocab_size:
        raise UserError(f"--top-k is {top_k}; it goes from 1 to the vocabulary's {model.config.vocab_size}")
    with torch.inference_mode():
        inputs = (ids, torch.arange(ids.shape[1])[None], torch.ones_like(ids), masks[None])
        logits = model(*(tensor.to(model.head.bias.device) for tensor in inputs))[0]
    scores, tokens = logits.float().cpu().softmax(-1).topk(top_k)
    results: list[list[dict[str, Any]]] = []
    for mask, *best in zip(masks, scores.tolist(), tokens.tolist(), strict=True):
        results.append([])
        for score, token in zip(*best, strict=True):
            filled = ids[0].index_fill(0, mask, token)
            sequence = tokenizer.decode(filled, skip_special_tokens=len(masks) == 1)
            answer = {"score": score, "token": token, "token_str": tokenizer.decode([token]), "sequence": sequence}
            results[-1].append(answer)
    return results[0] if len(results) == 1 else results
