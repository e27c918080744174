"""BERT (Devlin et al. 2018) in plain PyTorch, from the bottom to the top."""

# Shapes: B batch, T tokens, P output positions, D hidden size.
import torch
from torch import Tensor, nn

from bertlite.config.loading import choose
from bertlite.config.settings import Architecture
from bertlite.model.attention import MultiHeadAttention
from bertlite.model.encoder import Encoder, gather_positions
from bertlite.model.layers import ACTIVATIONS, Linear


class Embeddings(nn.Module):
    """The sum of word, position and segment embeddings, normalized (Devlin et al. 2018, figure 2)."""

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
    """One encoder layer: attention and feed-forward, each added to its input and normalized (post-layer-norm)."""

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
        """Return (B,T,D), or (B,P,D) at `output_positions` (B,P) alone; the mask is then (B,1,P,T)."""
        y = x if output_positions is None else gather_positions(x, output_positions)
        y = self.attention_norm(y + self.dropout(self.attention(y, x, x, mask)))
        return self.norm(y + self.dropout(self.down(self.activation(self.up(y)))))


class Pooler(nn.Module):
    """The first token's vector through a dense layer and tanh, for heads on whole sequences."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden[:, 0]))  # (B,D)


def build_bert(config: Architecture, kernel: str, pooler: bool) -> Encoder:
    """Compose BERT's encoder of its embeddings, layers and, if wanted, pooler."""
    embeddings = Embeddings(config)
    layers = [Layer(config, kernel) for _ in range(config.num_hidden_layers)]
    return Encoder(config, embeddings, layers, Pooler(config) if pooler else None)
