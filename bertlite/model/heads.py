"""Heads on top of the encoder, and what transformers, verification and export need to know of each."""

# Shapes: B batch, T tokens, P prediction positions, D hidden size, V vocabulary, L labels.
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from bertlite.config.finetune_settings import SavedTask
from bertlite.config.loading import choose
from bertlite.config.settings import Architecture
from bertlite.core.runtime import Runtime
from bertlite.data.masking import IGNORED
from bertlite.model.architectures import build_encoder
from bertlite.model.encoder import Encoder
from bertlite.model.layers import ACTIVATIONS, Linear, LinearFunction, linear, onednn_linear


class MaskedLMHead(nn.Module):
    """Scores over the vocabulary; the decoder's matrix is the word embedding (Devlin et al. 2018, section 3.1)."""

    linear: LinearFunction = staticmethod(linear)

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.activation = choose(ACTIVATIONS, config.hidden_act, "model.hidden_act")
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, word_embedding: Tensor) -> Tensor:
        """Map hidden states (…,D) to scores (…,V)."""
        return self.linear(self.norm(self.activation(self.dense(hidden))), word_embedding, self.bias)


def set_linear(model: nn.Module, function: LinearFunction) -> None:
    """Let all linear layers of a model compute by a function, in place."""
    for module in model.modules():
        if isinstance(module, Linear | MaskedLMHead):
            module.linear = function


def prepare_for_training(model: nn.Module, runtime: Runtime) -> None:
    """Move a model to the device, with the fastest linear layers there that can be trained, in place."""
    model.to(runtime.device)
    if runtime.multiplies_by_onednn():
        set_linear(model, onednn_linear)


class MaskedLanguageModel(nn.Module):
    """An encoder with the masked language modelling head.

    The last layer and the head compute only the positions where a prediction is wanted.
    """

    head_name = "fill-mask"
    class_suffix = "ForMaskedLM"
    per_token = True

    def __init__(self, config: Architecture, kernel: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config, kernel)
        self.head = MaskedLMHead(config)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        document_ids: Tensor,
        prediction_positions: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the scores (B,P,V) at `prediction_positions` (B,P); all other inputs are (B,T)."""
        hidden = self.encoder(input_ids, position_ids, document_ids, token_type_ids, prediction_positions)
        return self.head(hidden, self.encoder.embeddings.word.weight)

    def hf_outputs(self, hidden: Tensor) -> dict[str, Tensor]:
        """Return what Hugging Face's model returns, by its names, for hidden states (B,T,D)."""
        return {"logits": self.head(hidden, self.encoder.embeddings.word.weight)}


class Classifier(nn.Module):
    """An encoder with one linear layer whose outputs `labels` name: what all fine-tuned models share.

    `problem_type` is Hugging Face's name of what the scores of a sequence mean: one of the labels, several of them, or
    numbers.
    """

    head_name: str  # a key of HEADS
    class_suffix: str  # of transformers' class: BertForTokenClassification
    per_token = True  # whether there are scores for each token, or for each sequence
    pooler = False  # whether the encoder needs one
    task: SavedTask | None = None  # what task.json says

    def __init__(
        self, config: Architecture, labels: list[str], kernel: str = "sdpa", problem_type: str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.labels = labels
        self.problem_type = problem_type
        self.encoder = build_encoder(config, kernel, self.pooler)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = Linear(config.hidden_size, self.num_scores)

    @property
    def num_scores(self) -> int:
        return len(self.labels)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, document_ids: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Return the scores, (B,L) or (B,T,L); all inputs are (B,T)."""
        return self.classify(self.encoder(input_ids, position_ids, document_ids, token_type_ids))

    def classify(self, hidden: Tensor) -> Tensor:
        """Map the encoder's hidden states (B,T,D) to scores."""
        pooler = self.encoder.pooler
        return self.classifier(self.dropout(hidden if pooler is None else pooler(hidden)))

    def hf_outputs(self, hidden: Tensor) -> dict[str, Tensor]:
        """Return what Hugging Face's model returns, by its names, for hidden states (B,T,D)."""
        return {"logits": self.classify(hidden)}


class SequenceClassifier(Classifier):
    """Scores (B,L) of each sequence, from its first token through the pooler (Devlin et al. 2018, section 4.1)."""

    class_suffix = "ForSequenceClassification"
    per_token = False
    pooler = True

    @property
    def head_name(self) -> str:  # type: ignore[override]
        """The problem type; what transformers assumes where config.json does not say it."""
        return self.problem_type or ("regression" if len(self.labels) == 1 else "single_label_classification")


class TokenClassifier(Classifier):
    """Scores (B,T,L) of each token (Devlin et al. 2018, section 5.3)."""

    head_name = "token-classification"
    class_suffix = "ForTokenClassification"


class QuestionAnswerer(Classifier):
    """Scores (B,T,2) of each token as the answer's start and end (Devlin et al. 2018, section 4.2); no dropout."""

    head_name = "question-answering"
    class_suffix = "ForQuestionAnswering"

    def classify(self, hidden: Tensor) -> Tensor:
        return self.classifier(hidden)

    def hf_outputs(self, hidden: Tensor) -> dict[str, Tensor]:
        scores = self.classify(hidden)
        return {"start_logits": scores[..., 0], "end_logits": scores[..., 1]}


class MultipleChoice(Classifier):
    """A score (B,1) of each sequence, which holds one choice (Devlin et al. 2018, section 4.4).

    `labels` name the choices, as far as they do.
    """

    head_name = "multiple-choice"
    class_suffix = "ForMultipleChoice"
    per_token = False
    pooler = True
    num_scores = 1

    def hf_outputs(self, hidden: Tensor) -> dict[str, Tensor]:
        """Return scores (1,B): the sequences are the choices of one example."""
        return {"logits": self.classify(hidden).T}


Model = Encoder | MaskedLanguageModel | Classifier
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Head:
    """The targets and loss of a head for comparison with transformers, its decisions, and its pipeline.

    `make_targets` makes up targets from the model, token ids (B,T), and token labels (B,T): token ids, or IGNORED.
    `loss` computes transformers' loss from outputs by name, such targets, and which tokens are real (B,T).
    """

    pipeline: str  # Hugging Face's name of the task
    make_targets: Callable[[Any, Tensor, Tensor], dict[str, Tensor]]
    loss: Callable[[Tensors, Tensors, Tensor], Tensor]
    decide: Callable[[list[NDArray[Any]]], NDArray[Any]] | None = None  # from outputs to decisions
    example: str = '"A sentence."'  # an input of the pipeline, as Python code
    unseen_biases: tuple[str, ...] = ()  # without effect on the loss: softmax ignores what all scores share


def encoder_loss(outputs: Tensors, targets: Tensors, real: Tensor) -> Tensor:
    """Compute a number that depends on every output, each with its own weight; transformers has none for encoders."""
    hidden = outputs["last_hidden_state"]
    weights = torch.linspace(-1, 1, hidden.shape[-1], dtype=hidden.dtype)
    loss = (hidden[real] @ weights).square().mean()
    return loss + (outputs["pooler_output"] @ weights).square().mean() if "pooler_output" in outputs else loss


def label_loss(outputs: Tensors, targets: Tensors, real: Tensor) -> Tensor:
    """Cross entropy in nats, averaged over the labels that are not IGNORED."""
    return F.cross_entropy(outputs["logits"].flatten(0, -2), targets["labels"].flatten(), ignore_index=IGNORED)


def answer_loss(outputs: Tensors, targets: Tensors, real: Tensor) -> Tensor:
    """Cross entropy in nats among the tokens of a sequence, the mean of the answer's start and end."""
    start = F.cross_entropy(outputs["start_logits"], targets["start_positions"])
    return (start + F.cross_entropy(outputs["end_logits"], targets["end_positions"])) / 2


def make_number_labels(model: Classifier, input_ids: Tensor, modulus: int) -> dict[str, Tensor]:
    """Make up numbers (B,L) below `modulus`, in the model's dtype."""
    numbers = input_ids[:, :1] + torch.arange(len(model.labels))
    return {"labels": (numbers % modulus).to(model.classifier.weight.dtype)}


def make_token_labels(model: Classifier, input_ids: Tensor, token_labels: Tensor) -> dict[str, Tensor]:
    """Make up a label for each token that is not IGNORED."""
    return {"labels": torch.where(token_labels == IGNORED, IGNORED, token_labels % len(model.labels))}


def make_answers(model: Classifier, input_ids: Tensor, token_labels: Tensor) -> dict[str, Tensor]:
    """Make up the first and last token of each answer."""
    positions = input_ids % input_ids.shape[1]
    return {"start_positions": positions[:, 0], "end_positions": positions[:, 1]}


def choose_highest(outputs: list[NDArray[Any]]) -> NDArray[Any]:
    """Return the index of the highest score in the last dimension of each output."""
    return np.stack([output.argmax(-1) for output in outputs])


# Keys are a model's `head_name`: the pipeline of transformers or, of a sequence classifier, the problem type.
HEADS = {
    "feature-extraction": Head("feature-extraction", lambda *_: {}, encoder_loss),
    "fill-mask": Head(
        "fill-mask",
        make_targets=lambda model, input_ids, token_labels: {"labels": token_labels},
        loss=label_loss,
        decide=choose_highest,
        example='"A [MASK] of words."',
    ),
    "single_label_classification": Head(
        "text-classification",
        make_targets=lambda model, input_ids, _: {"labels": input_ids[:, 0] % len(model.labels)},
        loss=label_loss,
        decide=choose_highest,
    ),
    "multi_label_classification": Head(
        "text-classification",
        make_targets=lambda model, input_ids, _: make_number_labels(model, input_ids, 2),
        loss=lambda outputs, targets, _: F.binary_cross_entropy_with_logits(outputs["logits"], targets["labels"]),
        decide=lambda outputs: outputs[0] > 0,
    ),
    "regression": Head(
        "text-classification",
        make_targets=lambda model, input_ids, _: make_number_labels(model, input_ids, 5),
        loss=lambda outputs, targets, _: F.mse_loss(outputs["logits"], targets["labels"]),
    ),
    "token-classification": Head("token-classification", make_token_labels, label_loss, choose_highest),
    "question-answering": Head(
        "question-answering",
        make_answers,
        answer_loss,
        choose_highest,
        unseen_biases=("classifier.bias", "encoder.layers.{last}.norm.bias"),
    ),
    "multiple-choice": Head(
        "multiple-choice",
        make_targets=lambda model, input_ids, _: {"labels": input_ids[:1, 0] % len(input_ids)},
        loss=label_loss,
        decide=choose_highest,
        unseen_biases=("classifier.bias",),
    ),
}
