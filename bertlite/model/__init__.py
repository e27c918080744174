"""The encoder, its heads and its weights."""

from bertlite.model.attention import MultiHeadAttention

__all__ = ["MultiHeadAttention"]
