"""How tokens become vectors: scaled token embeddings and token types."""

import torch
from torch import nn
from transformers import initialization as init


class ScaledEmbedding(nn.Embedding):
    """
    Token embedding times a constant (`embed_scale`, the name that engines and PEFT read).

    Args:
        num_embeddings, embedding_dim, padding_idx: as `nn.Embedding`.
        embed_scale (`float`): the multiplier.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, embed_scale: float):
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        self.embed_scale = embed_scale

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.embed_scale


class RoundedScaleEmbedding(nn.Embedding):
    """
    Token embedding times a constant that is rounded to the weights' dtype first (Gemma).

    Args:
        num_embeddings, embedding_dim, padding_idx: as `nn.Embedding`.
        embed_scale (`float`): the multiplier.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, embed_scale: float):
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        self.scalar_embed_scale = embed_scale
        self.register_buffer("embed_scale", torch.tensor(embed_scale, dtype=torch.float32), persistent=False)

    def reset_buffers(self) -> None:
        init.constant_(self.embed_scale, self.scalar_embed_scale)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)


def multiply_rounded(embeddings: torch.Tensor, factor: float) -> torch.Tensor:
    """Embeddings times a constant that is rounded to their dtype first (T5Gemma)."""
    return embeddings * torch.tensor(factor, dtype=embeddings.dtype)


class NoTokenTypes(nn.Module):
    """Token types are not part of the model."""

    def forward(self, embeddings: torch.Tensor, token_type_ids: torch.Tensor | None) -> torch.Tensor:
        return embeddings


class TokenTypes(nn.Embedding):
    """Adds a learned vector per token type (BERT) or task type (ERNIE); type 0 where the ids are absent."""

    def forward(self, embeddings: torch.Tensor, token_type_ids: torch.Tensor | None) -> torch.Tensor:
        """embeddings (batch, length, dim), token_type_ids (batch, length) -> (batch, length, dim)."""
        if token_type_ids is None:
            token_type_ids = torch.zeros(embeddings.shape[:-1], dtype=torch.long, device=embeddings.device)
        return embeddings + super().forward(token_type_ids)
