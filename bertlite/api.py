"""A model in Python: `from bertlite import load`."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from bertlite.config.loading import choose
from bertlite.config.settings import DataLocation
from bertlite.core.errors import UserError
from bertlite.core.logging import logger
from bertlite.core.runtime import PRECISIONS, Runtime
from bertlite.data.formats import TableFile
from bertlite.data.sources import find_source_files, read_file_texts
from bertlite.finetuning.evaluate import evaluate_files
from bertlite.finetuning.inputs import choose_inputs, read_inputs, read_single_texts
from bertlite.finetuning.predict import predict
from bertlite.inference.batching import prepare_for_inference
from bertlite.inference.embed import Embedder
from bertlite.inference.fill import fill
from bertlite.model.attention import best_kernel
from bertlite.model.heads import Classifier, MaskedLanguageModel
from bertlite.model.huggingface import load_model, load_tokenizer_of
from bertlite.model.sentence_transformers import read_vector_options
from bertlite.training.run_folder import model_folder


class LoadedModel:
    """A model prepared for inference; its methods do what the commands of the same names do.

    Attributes are `model`, `tokenizer`, `folder` and `runtime`. Raises UserError, naming the file, for a folder that
    bertlite cannot read, and for what the model cannot do.
    """

    def __init__(self, name: str | Path, runtime: Runtime) -> None:
        self.folder = model_folder(str(name))
        if self.folder != Path(name) and self.folder.parent.name == "checkpoints":
            logger.info(f"{name}: the run has not finished; this is its {self.folder.name}")
        model = load_model(self.folder, best_kernel(runtime.device))
        self.model = prepare_for_inference(model, runtime)
        self.runtime = runtime

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer_of(self.folder, self.model.config)

    @property
    def masked_lm(self) -> MaskedLanguageModel:
        if not isinstance(self.model, MaskedLanguageModel):
            raise UserError(f"{self.folder}: the model has no masked language modelling head")
        return self.model

    def embedder(self, **options: Any) -> Embedder:
        """Make what turns texts into vectors; the options are those of `inference.embed.Embedder`.

        Options that are left out, or None, are as a sentence-transformers folder says, or else the defaults.
        """
        given = {name: value for name, value in options.items() if value is not None}
        own = read_vector_options(self.folder, given)
        if own:
            settings = ", ".join(f"{name} {value}" for name, value in own.items() if value is not False)
            logger.info(f"{self.folder}: as its modules.json says: {settings}")
        positions = self.model.config.max_position_embeddings
        if "sequence_length" in own:
            own["sequence_length"] = min(own["sequence_length"], positions)
        return Embedder(self.model.encoder, self.tokenizer, **own, **given)

    def read_texts(self, file: str, column: str | None = None, field: str | None = None) -> Iterator[str]:
        """Read the lines of a text file, or a column of a table; a model of single texts reads its own columns."""
        if column is None and self.is_fine_tuned and Path(file).is_file():
            settings = choose_inputs(self.classifier, self.tokenizer)
            if len(settings.text) == 1 and settings.type != "multiple-choice":
                return read_single_texts(file, settings, field)
        source = DataLocation(path=file, field=field)
        tables = [
            TableFile(path, format=source.given_format, field=field) for path in find_source_files(source, "FILE")
        ]
        return (text for table in tables for text in read_file_texts(table, column))

    def encode(self, texts: str | Sequence[str], **options: Any) -> np.ndarray:
        """Return the vectors of texts, (N,D) in fp32, or of one text, (D,); options as for `embedder`."""
        with self.runtime.autocast():
            vectors = self.embedder(**options)([texts] if isinstance(texts, str) else list(texts))
        return vectors[0] if isinstance(texts, str) else vectors

    def fill(self, text: str, top_k: int = 5) -> list[Any]:
        """Predict the tokens in place of [MASK], in the form of Hugging Face's fill-mask."""
        with self.runtime.autocast():
            return fill(self.masked_lm, self.tokenizer, text, top_k)

    @property
    def is_fine_tuned(self) -> bool:
        return isinstance(self.model, Classifier)

    @property
    def classifier(self) -> Classifier:
        if not isinstance(self.model, Classifier):
            raise UserError(
                f"{self.folder}: the model is not fine-tuned, so it predicts no labels; see bertlite finetune"
            )
        return self.model

    def evaluate(
        self,
        files: list[str],
        columns: list[str] | None = None,
        label: list[str] | None = None,
        field: str | None = None,
        on_bad_example: Literal["error", "skip"] | None = None,
    ) -> dict[str, Any]:
        """Return the metrics of a fine-tuned model on labelled files, by `finetuning.evaluate.evaluate_files`."""
        return evaluate_files(
            self.classifier, self.tokenizer, files, self.runtime, columns, label, field, on_bad_example
        )

    def predict(self, texts: str | Sequence[str], pairs: bool = False, top_k: int = 1) -> Any:
        """Predict labels for texts, a list, or for one text, in the form of `finetuning.predict.predict`.

        If the model reads pairs, or with `pairs` if its folder does not say so, a text holds two with a tab between.
        """
        results = list(self.predictions([texts] if isinstance(texts, str) else texts, pairs, top_k))
        return results[0] if isinstance(texts, str) else results

    def predictions(self, texts: Iterable[str], pairs: bool = False, top_k: int = 1) -> Iterator[Any]:
        """Predict labels for any number of texts, one after the other."""
        settings = choose_inputs(self.classifier, self.tokenizer, pairs=pairs)
        records = read_inputs(texts, None, settings)
        results = predict(self.classifier, self.tokenizer, records, settings, self.runtime, top_k)
        return (prediction for _, prediction in results)


def load(name: str | Path, precision: str = "fp32") -> LoadedModel:
    """Load a model by its folder, run folder or hub name, on the GPU if there is one; `precision` is fp32 or bf16."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return LoadedModel(name, Runtime(device, choose(PRECISIONS, precision, "precision"), compile=False))
