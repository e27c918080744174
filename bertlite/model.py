"""The encoder, from the bottom to the top: BERT (Devlin et al. 2018) in plain PyTorch."""

# Shapes: B batch, T tokens, Q queries, P positions of a row, D hidden size, E outputs, H heads, K = D // H,
# V vocabulary, L labels.
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bertlite.attention import KERNELS, attention_weights
from bertlite.config import Architecture
from bertlite.config_file import choose

gelu_new = partial(F.gelu, approximate="tanh")  # Google's (Hendrycks and Gimpel 2016)
# Keys as in Hugging Face's hidden_act.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": gelu_new,
    "gelu_pytorch_tanh": gelu_new,
    "relu": F.relu,
}


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x Wᵀ + b of x (…,D), weight (E,D) and bias (E,): (…,E).

    The bias is added apart: compiled, it joins what follows; inside the product it costs a copy on CPUs.
    """
    y = F.linear(x, weight)
    return y + bias.to(y.dtype)  # under autocast the product is in bf16, and so remains the sum


class Linear(nn.Linear):
    """x Wᵀ + b by `product`, for which `inference` has a faster one."""

    product = staticmethod(linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)

    def part(self, x: Tensor, coordinates: slice) -> Tensor:
        """Some of the output's coordinates."""
        return self.product(x, self.weight[coordinates], self.bias[coordinates])


class Embeddings(nn.Module):
    """The sum of word, position and segment embeddings, normalised (Devlin et al. 2018, figure 2)."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        D = config.hidden_size
        self.word = nn.Embedding(config.vocab_size, D, padding_idx=config.pad_token_id)
        self.position = nn.Embedding(config.max_position_embeddings, D)
        self.segment = nn.Embedding(config.type_vocab_size, D)
        self.norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        segment = self.segment.weight[0] if token_type_ids is None else self.segment(token_type_ids)
        return self.dropout(self.norm(self.word(input_ids) + self.position(position_ids) + segment))  # (B,T,D)


class MultiHeadAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2), as a layer by itself and in the encoder.

    `attention(query, key, value, mask)` takes query (B,Q,D), key and value (B,T,D), and a bool mask that broadcasts
    to (B,H,Q,T), True = may attend (padding, causal, documents, or any other); without a mask all attend to all.
    It returns (B,Q,D). `attention.weights(query, key, mask)` returns what each head attends to, (B,H,Q,T).
    Self-attention is `attention(x, x, x, mask)`, which computes q, k and v by one matrix product.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float = 0.0, kernel: str = "sdpa") -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide hidden_size {hidden_size}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.kernel = KERNELS[kernel]
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.out = Linear(hidden_size, hidden_size)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self._project(query, key, value)
        y = self.kernel(q, k, v, mask, self.dropout if self.training else 0.0)  # (B,H,Q,K)
        return self.out(y.transpose(1, 2).flatten(2))

    def weights(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """What each head attends to, before dropout: (B,H,Q,T), rows sum to 1."""
        q, k, _ = self._project(query, key, key)
        return attention_weights(q, k, mask)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k and v, (B,H,·,K) each: by one matrix product where all are of one tensor, by two where k and v are."""
        D = query.shape[-1]
        if query is key is value:
            projected = self.qkv(query).chunk(3, dim=-1)
        elif key is value:
            projected = self.qkv.part(query, slice(D)), *self.qkv.part(key, slice(D, None)).chunk(2, dim=-1)
        else:
            thirds = [slice(number * D, (number + 1) * D) for number in range(3)]
            projected = tuple(map(self.qkv.part, (query, key, value), thirds))
        return tuple(x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected)


class Layer(nn.Module):
    """One encoder layer: attention and feed-forward, each added to its input and normalised (post-layer-norm)."""

    def __init__(self, config: Architecture, kernel: str) -> None:
        super().__init__()
        D = config.hidden_size
        self.attention = MultiHeadAttention(D, config.num_attention_heads, config.attention_probs_dropout_prob, kernel)
        self.attention_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.up = Linear(D, config.intermediate_size)
        self.activation = choose(ACTIVATIONS, config.hidden_act, "model.hidden_act")
        self.down = Linear(config.intermediate_size, D)
        self.norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, mask: Tensor | None, output_positions: Tensor | None = None) -> Tensor:
        """The output (B,T,D), or (B,P,D) at `output_positions` (B,P) alone; the mask is then (B,1,P,T)."""
        y = x if output_positions is None else at_positions(x, output_positions)
        y = self.attention_norm(y + self.dropout(self.attention(y, x, x, mask)))
        return self.norm(y + self.dropout(self.down(self.activation(self.up(y)))))


def at_positions(x: Tensor, positions: Tensor) -> Tensor:
    """The vectors of x (B,T,D) at some positions (B,P) of each row: (B,P,D)."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def same_document(query_ids: Tensor, key_ids: Tensor) -> Tensor:
    """The mask (B,1,P,T) under which tokens see their own document, from document numbers (B,P) and (B,T)."""
    return (query_ids[:, :, None] == key_ids[:, None, :])[:, None]


class Pooler(nn.Module):
    """The first token's vector through a dense layer and tanh, for heads on whole sequences."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden[:, 0]))  # (B,D)


class Encoder(nn.Module):
    """Embeddings and a stack of layers; with `pooler`, also what heads on whole sequences read.

    `document_ids` (B,T) says which document of its row a token belongs to: tokens attend within their document alone.
    Packed rows number their documents from 1; padding is 0. So a padded row's document ids are its attention mask.
    """

    def __init__(self, config: Architecture, kernel: str = "sdpa", pooler: bool = False) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, kernel) for _ in range(config.num_hidden_layers))
        self.pooler = Pooler(config) if pooler else None

    @property
    def encoder(self) -> "Encoder":
        """Itself, as every model has an encoder."""
        return self

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        document_ids: Tensor,
        token_type_ids: Tensor | None = None,
        output_positions: Tensor | None = None,
        depth: int | None = None,
    ) -> Tensor:
        """The output (B,T,D) of the last layer, or of the first `depth` layers.

        With `output_positions` (B,P) it is (B,P,D), what lies there; the last of the layers then computes no more.
        """
        mask = same_document(document_ids, document_ids)
        x = self.embeddings(input_ids, position_ids, token_type_ids)
        layers = self.layers if depth is None else self.layers[:depth]
        for layer in layers:
            inputs: tuple[Tensor, ...] = (x, mask)
            if output_positions is not None and layer is layers[-1]:
                queries = document_ids.gather(1, output_positions)
                inputs = x, same_document(queries, document_ids), output_positions
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x = layer(*inputs)
        return x

    def hidden_states(self, *inputs: Tensor) -> list[Tensor]:
        """The output of the embeddings and of each layer, (B,T,D) each; inputs as for `forward`."""
        states: list[Tensor] = []
        parts = [self.embeddings, *self.layers]
        hooks = [part.register_forward_hook(lambda part, inputs, output: states.append(output)) for part in parts]
        try:
            self(*inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return states


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


class TokenClassifier(Classifier):
    """Scores (B,T,L) of each token (Devlin et al. 2018, section 5.3)."""


class QuestionAnswerer(Classifier):
    """Scores (B,T,2) of each token as the answer's start and end (Devlin et al. 2018, section 4.2); no dropout."""

    def classify(self, hidden: Tensor) -> Tensor:
        return self.classifier(hidden)


def initialize(model: nn.Module, std: float, seed: int, position_init: str = "normal") -> None:
    """BERT's own start: weights normal with `std`, cut at two deviations; biases 0; layer norms 1 and 0.

    With `position_init` "sinusoidal", the position embeddings, which are trained like all else, start as sinusoids.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    for module in model.modules():
        if isinstance(module, Embeddings) and position_init == "sinusoidal":
            module.position.weight.data.copy_(sinusoids(*module.position.weight.shape) * std * math.sqrt(2))


def sinusoids(positions: int, size: int) -> Tensor:
    """A table (positions, size) of sines and cosines of many wave lengths (Vaswani et al. 2017, section 3.5)."""
    frequencies = 10000 ** -(torch.arange(0, size, 2) / size)
    angles = torch.arange(positions)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :size]


def exchange_vocabulary(model: MaskedLanguageModel, old_ids: list[list[int]], pad_token_id: int) -> None:
    """Exchange a model's vocabulary: entry i becomes the mean of the old entries `old_ids[i]`, or of all of them
    where `old_ids[i]` is empty.

    An entry is a row of the word embedding and a number of the decoder's bias.
    """
    for parameter in (model.encoder.embeddings.word.weight, model.head.bias):
        old = parameter.detach()
        new = old.mean(0, keepdim=True).repeat(len(old_ids), *[1] * (old.ndim - 1))
        for number, ids in enumerate(old_ids):
            if ids:
                new[number] = old[ids].mean(0)
        parameter.data = new
    word = model.encoder.embeddings.word
    word.num_embeddings, word.padding_idx = len(old_ids), pad_token_id
    changes = {"vocab_size": len(old_ids), "pad_token_id": pad_token_id}
    model.config = model.encoder.config = model.config.model_copy(update=changes)


def parameter_count(model: nn.Module) -> int:
    """How many numbers a model learns."""
    return sum(parameter.numel() for parameter in model.parameters())
