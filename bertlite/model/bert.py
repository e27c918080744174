"""The encoder, from the bottom to the top: BERT (Devlin et al. 2018) in plain PyTorch."""

# Shapes: B batch, T tokens, Q queries, P positions of a row, D hidden size, E outputs, H heads, K = D // H,
# V vocabulary, L labels.

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bertlite.config.loading import choose
from bertlite.config.settings import Architecture
from bertlite.model.attention import MultiHeadAttention
from bertlite.model.layers import ACTIVATIONS, Linear, at_positions, same_document


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


class Pooler(nn.Module):
    """The first token's vector through a dense layer and tanh, for heads on whole sequences."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden[:, 0]))  # (B,D)
