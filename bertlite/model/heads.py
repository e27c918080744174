"""What stands on top of the encoder: the masked language modelling head and those of fine-tuning."""

# Shapes: B batch, T tokens, Q queries, P positions of a row, D hidden size, E outputs, H heads, K = D // H,
# V vocabulary, L labels.

import torch
from torch import Tensor, nn

from bertlite.config.loading import choose
from bertlite.config.settings import Architecture
from bertlite.model.bert import Encoder
from bertlite.model.layers import ACTIVATIONS, Linear, linear


class MaskedLMHead(nn.Module):
    """Scores over the vocabulary; the decoder's matrix is the word embedding (Devlin et al. 2018, section 3.1)."""

    product = staticmethod(linear)

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.activation = choose(ACTIVATIONS, config.hidden_act, "model.hidden_act")
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, word_embedding: Tensor) -> Tensor:
        return self.product(self.norm(self.activation(self.dense(hidden))), word_embedding, self.bias)  # (…,V)


class MaskedLanguageModel(nn.Module):
    """The encoder under a masked language modelling head; last layer and head run only where a prediction is wanted."""

    head_name = "fill-mask"

    def __init__(self, config: Architecture, kernel: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, kernel)
        self.head = MaskedLMHead(config)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        document_ids: Tensor,
        prediction_positions: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Scores (B,P,V) for the tokens at `prediction_positions` (B,P) of each row; all else is (B,T)."""
        hidden = self.encoder(input_ids, position_ids, document_ids, token_type_ids, prediction_positions)
        return self.head(hidden, self.encoder.embeddings.word.weight)


class Classifier(nn.Module):
    """What fine-tuned models share: the encoder under one linear layer, whose outputs `labels` name.

    `problem_type` is Hugging Face's name of what the outputs of a whole sequence mean, where there is a choice.
    """

    pooler = False
    per_token = True  # whether there are scores for each token, or for each sequence
    head_name: str

    def __init__(
        self, config: Architecture, labels: list[str], kernel: str = "sdpa", problem_type: str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.labels = labels
        self.problem_type = problem_type
        self.encoder = Encoder(config, kernel, self.pooler)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = Linear(config.hidden_size, len(labels))

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, document_ids: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Scores of the labels, L of them, for what the class says; all inputs are (B,T)."""
        return self.classify(self.encoder(input_ids, position_ids, document_ids, token_type_ids))

    def classify(self, hidden: Tensor) -> Tensor:
        """Scores from the encoder's output (B,T,D)."""
        pooler = self.encoder.pooler
        return self.classifier(self.dropout(hidden if pooler is None else pooler(hidden)))


class SequenceClassifier(Classifier):
    """Scores (B,L) of each row, from its first token through the pooler (Devlin et al. 2018, section 4.1)."""

    pooler = True
    per_token = False

    @property
    def head_name(self) -> str:  # type: ignore[override]
        """The problem type, which transformers guesses where config.json does not say it."""
        return self.problem_type or ("regression" if len(self.labels) == 1 else "single_label_classification")


class TokenClassifier(Classifier):
    """Scores (B,T,L) of each token (Devlin et al. 2018, section 5.3)."""

    head_name = "token-classification"


class QuestionAnswerer(Classifier):
    """Scores (B,T,2) of each token as the answer's start and end (Devlin et al. 2018, section 4.2); no dropout."""

    head_name = "question-answering"

    def classify(self, hidden: Tensor) -> Tensor:
        return self.classifier(hidden)
