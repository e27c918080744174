"""A model in Python: `from bertlite import load`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from bertlite.attention import best_kernel
from bertlite.embed import Embedder
from bertlite.errors import UserError
from bertlite.fill import fill
from bertlite.hf import Model, load_model, load_tokenizer_of
from bertlite.inference import for_use
from bertlite.model import Classifier, MaskedLanguageModel
from bertlite.predict import predict
from bertlite.run_folder import model_folder
from bertlite.runtime import Runtime


class LoadedModel:
    """A model that is ready for use: `model`, `tokenizer`, and what the commands of the same names do."""

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerBase, runtime: Runtime) -> None:
        self.model = for_use(model, runtime)
        self.tokenizer = tokenizer
        self.runtime = runtime

    def encode(self, texts: str | Sequence[str], **options: Any) -> np.ndarray:
        """The vectors of texts, (N,D) in fp32, or of one text, (D,).

        Options are those of `embed.Embedder`: pooling, layer, normalize, sequence_length.
        """
        embedder = Embedder(self.model.encoder, self.tokenizer, **options)
        with self.runtime.autocast():
            vectors = embedder([texts] if isinstance(texts, str) else list(texts))
        return vectors[0] if isinstance(texts, str) else vectors

    def fill(self, text: str, top_k: int = 5) -> list[Any]:
        """What the model expects in place of [MASK], as Hugging Face's fill-mask gives it."""
        if not isinstance(self.model, MaskedLanguageModel):
            raise UserError("fill: the model has no masked language modelling head")
        with self.runtime.autocast():
            return fill(self.model, self.tokenizer, text, top_k)

    def predict(self, texts: str | Sequence[str], pairs: bool = False, top_k: int = 1) -> Any:
        """What a fine-tuned model says of texts, a list, or of one text; in the form of `predict.predict`."""
        if not isinstance(self.model, Classifier):
            raise UserError("predict: the model is not fine-tuned, so it predicts no labels; see bertlite finetune")
        several = [texts] if isinstance(texts, str) else texts
        results = list(predict(self.model, self.tokenizer, several, self.runtime, pairs, top_k))
        return results[0] if isinstance(texts, str) else results


def load(name: str, precision: str = "fp32") -> LoadedModel:
    """A model by its folder, run folder or hub name, on the GPU if there is one; `precision` is fp32 or bf16.

    Raises UserError, naming the file, for what is no model that bertlite reads.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runtime = Runtime(device, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision], compile=False)
    folder = model_folder(str(name))
    model = load_model(folder, best_kernel(device))
    return LoadedModel(model, load_tokenizer_of(folder, model), runtime)
