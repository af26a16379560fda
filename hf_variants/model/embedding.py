"""How tokens become vectors: scaled token embeddings and token types."""

from typing import Literal

import torch
from torch import nn
from transformers import initialization as init

from .axis import ROUNDING, TRAINING, Axis, Check, Idle, axis, setting


@axis
class EmbeddingAxis(Axis):
    """
    embedding_size (`int`): width of the token embedding when factorised (ALBERT, ELECTRA, OPT-350m).
    embedding_projection_bias (`bool`): bias of the projection from `embedding_size` to `hidden_size`.
    embedding_projection_position (`str`): project the token embedding alone, `"before_positions"` (OPT), or the
        normalised sum, `"after_norm"` (ELECTRA).
    tie_word_embeddings (`bool`): the LM head uses the token embedding's weight.
    embedding_multiplier (`float`): multiplies the token embeddings.
    embedding_multiplier_position (`str`): who multiplies: the token embedding (`"embedding"`), or the stack, which
        multiplies `inputs_embeds` as well (`"stack"`; T5Gemma, Granite, the decoders of Marian and Pegasus).
    padding_embedding_frozen (`bool`): the embedding of `pad_token_id` starts at zero and gets no gradient.
    type_vocab_size (`int`): token types, whose learned vectors are added; 0: none.
    token_type_table (`str`): where token types are looked up: in a table of `type_vocab_size` rows, `"own"` (BERT), or,
        without one, among the tokens, `"tokens"`, where ids are given (GPT-2).
    task_type_vocab_size (`int`): task types, whose learned vectors are added last (ERNIE; 0: none).

    Rounding:
    embedding_multiplier_in_weight_dtype (`bool`): round the multiplier to the weights' dtype first (Gemma).
    """

    title = "embedding"

    embedding_size: int | None = None
    embedding_projection_bias: bool = False
    embedding_projection_position: Literal["before_positions", "after_norm"] = "before_positions"
    tie_word_embeddings: bool = False
    embedding_multiplier: int | float = 1.0
    embedding_multiplier_position: Literal["embedding", "stack"] = "embedding"
    padding_embedding_frozen: bool = setting(True, TRAINING)
    type_vocab_size: int = 0
    token_type_table: Literal["own", "tokens"] = "own"
    task_type_vocab_size: int = 0

    embedding_multiplier_in_weight_dtype: bool = setting(False, ROUNDING)

    def derive(self) -> None:
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size

    def checks(self) -> list[Check]:
        return [
            Check(
                self.padding_embedding_frozen
                and self.pad_token_id is not None
                and not -self.vocab_size <= self.pad_token_id < self.vocab_size,
                f"`pad_token_id` {self.pad_token_id} is outside the vocabulary of {self.vocab_size}.",
                "Choose a token of the vocabulary, set it to None, or set `padding_embedding_frozen=False`.",
            ),
            Check(
                self.embedding_size != self.hidden_size
                and self.tie_word_embeddings
                and not self.output_projection
                and not self.lm_head_transform,
                "`tie_word_embeddings` is set, but `embedding_size` differs from `hidden_size`.",
                "Set `output_projection=True` or `lm_head_transform=True`, untie, or make the two equal.",
            ),
            Check(
                self.token_type_table == "tokens"
                and not self.type_vocab_size
                and self.embedding_size != self.hidden_size
                and self.embedding_projection_position == "before_positions",
                "`token_type_table` tokens adds rows of `embedding_size` to vectors of `hidden_size`.",
                "Make the two equal, or use `type_vocab_size`.",
            ),
        ]

    def idle(self) -> list[Idle]:
        plain = self.embedding_size == self.hidden_size
        return [
            Idle(plain, self.named("embedding_projection_"), "`embedding_size` equals `hidden_size`"),
            Idle(self.embedding_multiplier == 1.0, self.named("embedding_multiplier_"), "`embedding_multiplier` is 1"),
            Idle(self.type_vocab_size > 0, ["token_type_table"], "`type_vocab_size` gives token types a table"),
            Idle(self.pad_token_id is None, ["padding_embedding_frozen"], "`pad_token_id` is not set"),
        ]


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


def no_types_among_tokens(
    embeddings: torch.Tensor, token_type_ids: torch.Tensor | None, embed_tokens: nn.Embedding
) -> torch.Tensor:
    """Token types have a table of their own, or none."""
    return embeddings


def add_types_among_tokens(
    embeddings: torch.Tensor, token_type_ids: torch.Tensor | None, embed_tokens: nn.Embedding
) -> torch.Tensor:
    """Adds the vector that a token with the type's id has (GPT-2): embeddings (batch, length, dim) -> the same."""
    return embeddings if token_type_ids is None else embeddings + embed_tokens(token_type_ids)
