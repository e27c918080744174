"""`bertlite export`: a model folder for the world, checked before it gets its name."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from bertlite.config import choose
from bertlite.errors import Failure, UserError
from bertlite.files import new_folder
from bertlite.hf import load_model, load_tokenizer_of, save_model
from bertlite.model import Encoder, MaskedLanguageModel
from bertlite.parity import check_parity


def hugging_face(model: MaskedLanguageModel | Encoder, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A Hugging Face folder: config.json, model.safetensors and the tokenizer, equal to transformers in all numbers."""
    save_model(model, folder)
    tokenizer.save_pretrained(folder)
    failed = [check for check in check_parity(folder) if not check.ok]
    if failed:
        worst = failed[0]
        raise Failure(f"the exported model differs from transformers: {worst.inputs}: {worst.quantity}; see verify")


# Each format takes a model, its tokenizer and an empty folder, and raises Failure when its own check does not hold.
FORMATS: dict[str, Callable[[MaskedLanguageModel | Encoder, PreTrainedTokenizerBase, Path], None]] = {
    "hf": hugging_face
}


def export(source: Path, out: Path, format: str) -> None:
    """Write the model in folder `source` to `out`, which must not exist or be empty.

    Raises UserError for an unknown format or a folder in use, Failure when the check of the result does not hold;
    nothing is written then.
    """
    write = choose(FORMATS, format, "--format")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; name a new folder, or empty this one")
    model = load_model(source)
    tokenizer = load_tokenizer_of(source, model)
    with new_folder(out) as aside:
        write(model, tokenizer, aside)
