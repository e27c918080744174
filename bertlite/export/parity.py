"""Number by number against Hugging Face: the same folder in both, the same inputs, everything compared."""

# Shapes: B rows, T positions, D hidden size, V vocabulary.
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.utils import logging

from bertlite.config.settings import Architecture
from bertlite.core.errors import UserError
from bertlite.core.runtime import is_out_of_memory
from bertlite.data.masking import IGNORED
from bertlite.data.packing import collate
from bertlite.model.attention import best_kernel
from bertlite.model.bert import Encoder
from bertlite.model.heads import MaskedLanguageModel, QuestionAnswerer, SequenceClassifier, TokenClassifier
from bertlite.model.huggingface import ARCHITECTURES, UNUSED, Model, hf_outputs, load_model, to_hf

# Of the largest reference value (at least 1), of the reference loss, and of the norm of a reference gradient.
TOLERANCES = {
    "fp32": {"outputs": 1e-5, "loss": 1e-6, "gradients": 1e-5},
    # bf16 keeps 8 bits, so that each product is off by up to 2**-8; some dozen roundings follow one another.
    "bf16": {"outputs": 5e-2, "loss": 5e-2, "gradients": 1e-1},
}


@dataclass(frozen=True)
class Check:
    """One comparison: the worst difference found, relative as TOLERANCES says, and what is allowed."""

    inputs: str
    quantity: str
    difference: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance  # False for NaN


class Inputs(NamedTuple):
    input_ids: Tensor  # (B,T)
    position_ids: Tensor  # (B,T)
    document_ids: Tensor  # (B,T)
    token_type_ids: Tensor  # (B,T)
    labels: Tensor  # (B,T), IGNORED where nothing is predicted


def check_parity(folder: Path, precision: str = "fp32") -> list[Check]:
    """Compare a model folder in bertlite and in transformers: weights, outputs, loss and gradients.

    Dropout is off on both sides. Raises UserError when the folder is no BERT that bertlite reads.
    """
    ours = load_model(folder, best_kernel(torch.device("cpu")))
    theirs, surprises = load_reference(folder, ours)
    tolerances = TOLERANCES[precision]
    checks = [Check("weights", "names only one side has", float(len(surprises)), 0.0), compare_weights(ours, theirs)]
    for name, inputs in make_inputs(ours.config).items():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            differences = compare(ours, theirs, inputs)
        unsure = [one for one in ("loss", "gradients") if precision == "fp32" and differences[one] > tolerances[one]]
        if unsure:
            # Where attention is saturated, gradients of q and k are small differences of large numbers, and fp32's
            # rounding alone exceeds what is allowed, on both sides. fp64 tells it from a real difference.
            exact = compare(ours.double(), theirs.double(), inputs)
            ours.float(), theirs.float()
        for quantity, difference in differences.items():
            found = (f"{quantity} in fp64", exact[quantity]) if quantity in unsure else (quantity, difference)
            checks.append(Check(name, *found, tolerances.get(quantity, tolerances["outputs"])))
    return checks


def load_reference(folder: Path, ours: Model) -> tuple[nn.Module, list[str]]:
    """transformers' model of the folder, and the weight names that it missed or did not know."""
    quieten_transformers()
    options = {"attn_implementation": "sdpa", "dtype": torch.float32, "output_loading_info": True}
    # Whatever the folder says:
    options |= {"local_files_only": True, "use_safetensors": True, "chunk_size_feed_forward": 0}
    if isinstance(ours, Encoder):
        options["add_pooling_layer"] = ours.pooler is not None
    kind = getattr(transformers, ARCHITECTURES[type(ours)][0])
    try:
        theirs, report = kind.from_pretrained(folder, **options)
    except Exception as error:  # transformers raises many, for settings that bertlite has no use for
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{folder}: transformers cannot load it: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        ) from None
    names = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    return theirs.eval(), [str(name) for name in names if not UNUSED.match(str(name))]


def quieten_transformers() -> None:
    """Let transformers report errors alone, and show no progress."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def compare_weights(ours: Model, theirs: nn.Module) -> Check:
    """How many weights differ in any bit, by their Hugging Face names."""
    reference = dict(theirs.named_parameters())
    weights = to_hf(ours, dict(ours.named_parameters()))
    differing = sum(
        name not in reference or not torch.equal(weight, reference[name]) for name, weight in weights.items()
    )
    return Check("weights", "tensors not equal bit for bit", float(differing), 0.0)


def make_inputs(config: Architecture) -> dict[str, Inputs]:
    """Random tokens, padded, packed (several documents a row) and in pairs; with both segments, if there are two."""
    generator = torch.Generator().manual_seed(0)
    T = min(48, config.max_position_embeddings)
    lengths = {
        "padded": [[T], [T * 2 // 3], [T // 3]],
        "packed": [[T // 2, T // 4, T // 8], [T // 3, T // 3, T // 3]],
        "pair": [[T], [T // 2]],
    }
    result = {}
    for name, rows in lengths.items():
        documents = [[[0] * length for length in row] for row in rows]
        _, position_ids, document_ids = map(torch.from_numpy, collate(documents, T, 0))
        real = document_ids > 0
        input_ids, labels = torch.randint(config.vocab_size, (2, *real.shape), generator=generator)
        input_ids = torch.where(real, input_ids, config.pad_token_id)
        labels = torch.where(real & (torch.rand(real.shape, generator=generator) < 0.15), labels, IGNORED)
        labels[:, 0] = input_ids[:, 0]  # at least one prediction a row
        # Segments give tokens something in common, without which the gradients of q and k in a model that has
        # learnt little are nearly 0, and the comparison one of roundings.
        second = real & (position_ids >= T // 6) & (config.type_vocab_size > 1)
        result[name] = Inputs(input_ids, position_ids, document_ids, second.long(), labels)
    return result


def compare(ours: Model, theirs: nn.Module, inputs: Inputs) -> dict[str, float]:
    """The largest relative differences of hidden states, outputs, loss and gradients, at real positions."""
    real = inputs.document_ids > 0
    ours.eval()
    states = ours.encoder.hidden_states(*inputs[:4])
    targets = _targets(ours, inputs)
    # The reference is SDPA with a 4-D bool mask: transformers' eager path takes such a mask for numbers to add.
    mask = (inputs.document_ids[:, :, None] == inputs.document_ids[:, None, :])[:, None]
    reference = theirs(
        input_ids=inputs.input_ids,
        attention_mask=mask,
        position_ids=inputs.position_ids,
        token_type_ids=inputs.token_type_ids,
        output_hidden_states=True,
        return_dict=True,
        **targets,
    )
    differences = {
        "hidden states": _relative(torch.stack(states)[:, real], torch.stack(reference.hidden_states)[:, real])
    }
    outputs = hf_outputs(ours, states[-1])
    if isinstance(ours, Encoder):
        our_loss, their_loss = _encoder_loss(outputs, real), _encoder_loss(reference, real)
        if ours.pooler is not None:
            differences["pooler"] = _relative(outputs["pooler_output"], reference.pooler_output)
    else:
        our_loss, their_loss = _loss(ours, outputs, targets), reference.loss
        logits, their_logits = (torch.stack([side[name] for name in outputs]) for side in (outputs, reference))
        which = ... if isinstance(ours, SequenceClassifier) else real
        differences["logits"] = _relative(logits[:, which], their_logits[:, which])
    differences["loss"] = ((our_loss - their_loss).abs() / (their_loss.abs().item() or 1.0)).item()
    differences["gradients"] = _gradient_difference(ours, _gradients(our_loss, ours), _gradients(their_loss, theirs))
    return differences


def _targets(model: Model, inputs: Inputs) -> dict[str, Tensor]:
    """What the model should answer, as transformers' model of its kind takes it."""
    dtype = next(model.parameters()).dtype
    if isinstance(model, MaskedLanguageModel):
        return {"labels": inputs.labels}
    if isinstance(model, TokenClassifier):
        return {"labels": torch.where(inputs.labels == IGNORED, IGNORED, inputs.labels % len(model.labels))}
    if isinstance(model, QuestionAnswerer):
        places = inputs.input_ids % inputs.input_ids.shape[1]
        return {"start_positions": places[:, 0], "end_positions": places[:, 1]}
    if isinstance(model, SequenceClassifier):
        numbers = inputs.input_ids[:, :1] + torch.arange(len(model.labels))  # (B,L)
        return {
            "single_label_classification": {"labels": numbers[:, 0] % len(model.labels)},
            "multi_label_classification": {"labels": (numbers % 2).to(dtype)},
            "regression": {"labels": (numbers % 5).to(dtype)},
        }[problem_type(model)]
    return {}


def problem_type(model: SequenceClassifier) -> str:
    """What the scores of a sequence mean; transformers' guess, where the folder does not say."""
    return model.problem_type or ("regression" if len(model.labels) == 1 else "single_label_classification")


def _encoder_loss(outputs: Mapping[str, Tensor], real: Tensor) -> Tensor:
    """A number that every output weighs in, each in its own way; an encoder by itself has no loss."""
    hidden = outputs["last_hidden_state"]
    weights = torch.linspace(-1, 1, hidden.shape[-1], dtype=hidden.dtype)
    loss = (hidden[real] @ weights).square().mean()
    return loss + (outputs["pooler_output"] @ weights).square().mean() if "pooler_output" in outputs else loss


def _loss(model: Model, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """transformers' loss, of our outputs."""
    outputs = {name: output.to(torch.promote_types(output.dtype, torch.float32)) for name, output in outputs.items()}
    if isinstance(model, QuestionAnswerer):
        first = F.cross_entropy(outputs["start_logits"], targets["start_positions"])
        return (first + F.cross_entropy(outputs["end_logits"], targets["end_positions"])) / 2
    logits, labels = outputs["logits"], targets["labels"]
    if not labels.is_floating_point():
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)
    if isinstance(model, SequenceClassifier) and problem_type(model) == "regression":
        return F.mse_loss(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels)


def _relative(mine: Tensor, reference: Tensor) -> float:
    return ((mine - reference).abs().max() / max(1.0, reference.abs().max().item())).item()


def _gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, weights = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, weights, materialize_grads=True), strict=True))


def _gradient_difference(ours: Model, mine: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    differences = []
    for name, gradient in to_hf(ours, mine).items():
        norm = reference[_scale_of(name, ours)].norm().item()
        differences.append((gradient - reference[name]).norm() / (norm or 1.0))
    return torch.stack(differences).max().item()  # NaN, if any is


def _scale_of(name: str, model: Model) -> str:
    """Whose gradient a gradient's difference is held against: its own, or another where the true one is 0.

    Softmax does not see what is added to all its inputs: key.bias and, of answers among all tokens, the last biases.
    """
    if isinstance(model, QuestionAnswerer):
        last = f"layer.{model.config.num_hidden_layers - 1}.output.LayerNorm.bias"
        if name.endswith((last, "qa_outputs.bias")):
            return name.replace("bias", "weight")
    return name.replace("key.bias", "query.bias")
