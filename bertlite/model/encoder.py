"""The encoder: a stack of layers on top of embeddings, whatever an architecture puts there."""

# Shapes: B batch, T tokens, P output positions, D hidden size.
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bertlite.config.settings import Architecture
from bertlite.model.attention import document_mask


class Encoder(nn.Module):
    """Embeddings, a stack of layers and, for heads on whole sequences, a pooler; `bert.py` builds BERT's.

    `embeddings(input_ids, position_ids, token_type_ids)` returns (B,T,D). A layer maps x (B,T,D) and a mask (B,1,T,T)
    to (B,T,D); with `output_positions` (B,P) and a mask (B,1,P,T), to (B,P,D). `pooler` maps (B,T,D) to (B,D).
    Parts share no state, so that each layer can be wrapped, checkpointed or frozen by itself.
    """

    embeddings: Any  # a module with `word`, the nn.Embedding that a masked language modelling head shares
    head_name = "feature-extraction"
    class_suffix = "Model"
    per_token = True

    def __init__(
        self, config: Architecture, embeddings: nn.Module, layers: Iterable[nn.Module], pooler: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embeddings = embeddings
        self.layers = nn.ModuleList(layers)
        self.pooler = pooler

    @property
    def encoder(self) -> "Encoder":
        """The encoder itself: every model has the attribute."""
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
        """Return the hidden states (B,T,D) after the last layer, or after the first `depth` layers.

        Inputs are (B,T). `document_ids` numbers the documents of a packed sequence from 1; padding is 0. Tokens attend
        within their document alone, so that for one padded document they are the attention mask.
        With `output_positions` (B,P) the result is (B,P,D), and the last layer computes these positions alone.
        """
        mask = document_mask(document_ids, document_ids)
        x = self.embeddings(input_ids, position_ids, token_type_ids)
        layers = self.layers if depth is None else self.layers[:depth]
        for layer in layers:
            inputs: tuple[Tensor, ...] = (x, mask)
            if output_positions is not None and layer is layers[-1]:
                query_ids = document_ids.gather(1, output_positions)
                inputs = x, document_mask(query_ids, document_ids), output_positions
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x = layer(*inputs)
        return x

    def hidden_states(self, *inputs: Tensor) -> list[Tensor]:
        """Return the outputs of the embeddings and of each layer, (B,T,D) each; inputs as for `forward`."""
        states: list[Tensor] = []
        modules = [self.embeddings, *self.layers]
        hooks = [module.register_forward_hook(lambda module, inputs, x: states.append(x)) for module in modules]
        try:
            self(*inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return states

    def hf_outputs(self, hidden: Tensor) -> dict[str, Tensor]:
        """Return what Hugging Face's model returns, by its names, for hidden states (B,T,D)."""
        pooled = {} if self.pooler is None else {"pooler_output": self.pooler(hidden)}
        return {"last_hidden_state": hidden, **pooled}


def gather_positions(x: Tensor, positions: Tensor) -> Tensor:
    """Return the vectors of x (B,T,D) at `positions` (B,P) of each sequence: (B,P,D)."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))
