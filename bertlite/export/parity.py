"""`bertlite verify`: compare a model folder in bertlite and in transformers, number by number, on the same inputs."""

# Shapes: B batch, T tokens, D hidden size.
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging

from bertlite.config.settings import Architecture
from bertlite.core.errors import UserError, first_line
from bertlite.core.logging import logger
from bertlite.core.runtime import is_out_of_memory
from bertlite.data.masking import IGNORED
from bertlite.data.packing import collate
from bertlite.model.architectures import ARCHITECTURES
from bertlite.model.attention import best_kernel, document_mask
from bertlite.model.encoder import Encoder
from bertlite.model.heads import HEADS, Model, MultipleChoice
from bertlite.model.huggingface import hf_class, load_model, to_hf, weight_names

# Relative to the largest reference value (at least 1), the reference loss, and the norm of a reference gradient.
TOLERANCES = {
    "fp32": {"outputs": 1e-5, "loss": 1e-6, "gradients": 1e-5},
    # bf16 keeps 8 bits, so that each product is off by up to 2**-8, and a result is that of some dozen roundings.
    "bf16": {"outputs": 5e-2, "loss": 5e-2, "gradients": 1e-1},
}


@dataclass(frozen=True)
class Check:
    """One comparison: the largest difference, relative as TOLERANCES says, and the tolerance."""

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
    token_labels: Tensor  # (B,T), token ids, or IGNORED where nothing is predicted


def check_parity(folder: Path, precision: str = "fp32") -> list[Check]:
    """Compare a model folder in bertlite and in transformers: weights, outputs, loss and gradients.

    Dropout is off in both. Raises UserError, naming the file, for a folder that one of them cannot read.
    """
    logger.info("comparing the model with transformers")
    ours = load_model(folder, best_kernel(torch.device("cpu")))
    theirs, odd_names = load_reference(folder, ours)
    tolerances = TOLERANCES[precision]
    checks = [Check("weights", "names only one side has", float(len(odd_names)), 0.0), compare_weights(ours, theirs)]
    for inputs_name, inputs in make_inputs(ours.config).items():
        if inputs_name == "packed" and isinstance(ours, MultipleChoice):
            continue  # transformers' model takes no mask between documents
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            differences = compare(ours, theirs, inputs)
        doubtful = [name for name in ("loss", "gradients") if differences[name] > tolerances[name]]
        exact = {}
        if doubtful and precision == "fp32":
            # With saturated attention, gradients of q and k are small differences of large numbers, and the rounding
            # of fp32 alone exceeds the tolerance in both implementations. fp64 distinguishes it from a real difference.
            in_fp64 = compare(ours.double(), theirs.double(), inputs)
            ours.float(), theirs.float()
            exact = {name: in_fp64[name] for name in doubtful}
        for name, difference in differences.items():
            quantity = f"{name} in fp64" if name in exact else name
            tolerance = tolerances.get(name, tolerances["outputs"])
            checks.append(Check(inputs_name, quantity, exact.get(name, difference), tolerance))
    return checks


def format_checks(folder: Path, checks: list[Check]) -> str:
    """Format checks as a table that ends with the verdict on the model in `folder`."""
    lines = [f"{'inputs':8}  {'quantity':30}  {'difference':>10}  {'allowed':>8}"]
    for check in checks:
        verdict = "ok" if check.ok else "DIFFERS"
        values = f"{check.difference:10.2g}  {check.tolerance:8.0g}"
        lines.append(f"{check.inputs:8}  {check.quantity:30}  {values}  {verdict}")
    relation = "equals" if all(check.ok for check in checks) else "DIFFERS FROM"
    return "\n".join([*lines, f"{folder}: {relation} Hugging Face's model"])


def checks_to_dict(folder: Path, checks: list[Check]) -> dict[str, Any]:
    """Return checks in the form of `verify --json`. JSON has no NaN, so that a difference may be None."""
    entries = [
        {**vars(check), "difference": check.difference if isfinite(check.difference) else None, "ok": check.ok}
        for check in checks
    ]
    return {"ok": all(check.ok for check in checks), "model": str(folder), "checks": entries}


def load_reference(folder: Path, ours: Model) -> tuple[nn.Module, list[str]]:
    """Load transformers' model of the folder; also return the weight names that it missed or did not know."""
    silence_transformers()
    options = {"attn_implementation": "sdpa", "dtype": torch.float32, "output_loading_info": True}
    # These hold whatever the folder's config.json says.
    options |= {"local_files_only": True, "use_safetensors": True, "chunk_size_feed_forward": 0}
    if isinstance(ours, Encoder):
        options["add_pooling_layer"] = ours.pooler is not None
    try:
        theirs, report = getattr(transformers, hf_class(ours)).from_pretrained(folder, **options)
    except Exception as error:  # transformers raises many types, for settings that bertlite ignores
        if is_out_of_memory(error):
            raise
        raise UserError(f"{folder}: transformers cannot load it: {first_line(error)}") from None
    names = map(str, [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]])
    unused = ARCHITECTURES[ours.config.model_type].unused
    return theirs.eval(), [name for name in names if not unused.match(name)]


def silence_transformers() -> None:
    """Let transformers log errors alone, and show no progress bars."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def compare_weights(ours: Model, theirs: nn.Module) -> Check:
    """Count the weights that differ in any bit, by their Hugging Face names."""
    reference = dict(theirs.named_parameters())
    weights = to_hf(ours, dict(ours.named_parameters()))
    differing = sum(
        name not in reference or not torch.equal(weight, reference[name]) for name, weight in weights.items()
    )
    return Check("weights", "tensors not equal bit for bit", float(differing), 0.0)


def make_inputs(config: Architecture) -> dict[str, Inputs]:
    """Make random batches: padded, packed (several documents a sequence), and pairs; with two segments if possible."""
    generator = torch.Generator().manual_seed(0)
    T = min(48, config.max_position_embeddings)
    document_lengths = {
        "padded": [[T], [T * 2 // 3], [T // 3]],
        "packed": [[T // 2, T // 4, T // 8], [T // 3, T // 3, T // 3]],
        "pair": [[T], [T // 2]],
    }
    batches = {}
    for name, sequences in document_lengths.items():
        documents = [[[0] * length for length in sequence] for sequence in sequences]
        _, position_ids, document_ids = map(torch.from_numpy, collate(documents, T, 0))
        real = document_ids > 0
        input_ids, token_labels = torch.randint(config.vocab_size, (2, *real.shape), generator=generator)
        input_ids = torch.where(real, input_ids, config.pad_token_id)
        predicted = real & (torch.rand(real.shape, generator=generator) < 0.15)
        token_labels = torch.where(predicted, token_labels, IGNORED)
        token_labels[:, 0] = input_ids[:, 0]  # at least one prediction in each sequence
        # Segments give tokens something in common. Without it the gradients of q and k are nearly 0 in a model that
        # has learned little, and the comparison is one of roundings.
        second_segment = real & (position_ids >= T // 6) & (config.type_vocab_size > 1)
        batches[name] = Inputs(input_ids, position_ids, document_ids, second_segment.long(), token_labels)
    return batches


def compare(ours: Model, theirs: nn.Module, inputs: Inputs) -> dict[str, float]:
    """Compute the largest relative differences of hidden states, outputs, loss and gradients, at real tokens."""
    head, real = HEADS[ours.head_name], inputs.document_ids > 0
    targets = head.make_targets(ours, inputs.input_ids, inputs.token_labels)
    states = ours.eval().encoder.hidden_states(*inputs[:4])
    outputs = ours.hf_outputs(states[-1])
    reference = theirs(**to_hf_inputs(ours, inputs), **targets, output_hidden_states=True, return_dict=True)
    differences = {
        "hidden states": _relative(torch.stack(states)[:, real], torch.stack(reference.hidden_states)[:, real])
    }
    compared = [name for name in outputs if name != "last_hidden_state"]  # which is among the hidden states
    if compared:
        quantity = "pooler" if compared == ["pooler_output"] else "logits"
        stacked = [
            torch.stack([at_real_tokens(ours, name, side[name], real) for name in compared])
            for side in (outputs, reference)
        ]
        differences[quantity] = _relative(*stacked)
    outputs = {name: output.to(torch.promote_types(output.dtype, torch.float32)) for name, output in outputs.items()}
    our_loss = head.loss(outputs, targets, real)
    # transformers' encoder by itself has no loss.
    their_loss = reference["loss"] if "loss" in reference else head.loss(reference, targets, real)
    differences["loss"] = ((our_loss - their_loss).abs() / (their_loss.abs().item() or 1.0)).item()
    differences["gradients"] = _gradient_difference(ours, _gradients(our_loss, ours), _gradients(their_loss, theirs))
    return differences


def to_hf_inputs(model: Model, inputs: Inputs) -> dict[str, Tensor]:
    """Return the arguments of transformers' model: (B,T) and a mask or, for multiple choice, (1,B,T) each."""
    tensors = {"input_ids": inputs.input_ids, "position_ids": inputs.position_ids}
    tensors["token_type_ids"] = inputs.token_type_ids
    if isinstance(model, MultipleChoice):
        tensors["attention_mask"] = (inputs.document_ids > 0).long()
        return {name: tensor[None] for name, tensor in tensors.items()}
    # The reference is SDPA with a 4-D bool mask: transformers' eager path would add such a mask to the scores.
    return tensors | {"attention_mask": document_mask(inputs.document_ids, inputs.document_ids)}


def at_real_tokens(model: Model, name: str, output: Tensor, real: Tensor) -> Tensor:
    """Select an output at real tokens, or the whole output if it is one per sequence."""
    return output[real] if model.per_token and name != "pooler_output" else output


def _relative(ours: Tensor, reference: Tensor) -> float:
    return ((ours - reference).abs().max() / max(1.0, reference.abs().max().item())).item()


def _gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, weights = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, weights, materialize_grads=True), strict=True))


def _gradient_difference(model: Model, ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Return the largest difference of a gradient, relative to the norm of its reference.

    Softmax ignores what all its inputs share, so that the true gradient of some biases is 0 and only rounding is left:
    of key.bias and of the head's `unseen_biases`. Their difference is relative to the gradient of query.bias, and of
    the weight of the same layer.
    """
    last = model.config.num_hidden_layers - 1
    unseen = [name.format(last=last) for name in HEADS[model.head_name].unseen_biases]
    differences = []
    for name, hf_names in weight_names(model).items():
        for hf_name, gradient in zip(hf_names, ours[name].chunk(len(hf_names)), strict=True):
            scale_name = hf_name.replace("key.bias", "query.bias")
            if name in unseen:
                scale_name = hf_name.replace("bias", "weight")
            norm = reference[scale_name].norm().item()
            differences.append((gradient - reference[hf_name]).norm() / (norm or 1.0))
    return torch.stack(differences).max().item()  # NaN if any is NaN
