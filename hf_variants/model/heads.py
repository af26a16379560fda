"""What stands between the last hidden state and logits: pooling, transforms, scaling."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN


class DenseTransform(nn.Module):
    """
    Dense layer, activation and norm in front of an LM head or a classifier (BERT, ModernBERT, RoBERTa).

    Args:
        input_size, output_size (`int`): widths.
        bias (`bool`): bias of the dense layer.
        act (`str`): a key of transformers' `ACT2FN`.
        norm (`nn.Module`): applied last; `nn.Identity()` for none.
        dropout (`float`): probability of dropping an input of the dense layer.

    Shape: (..., input_size) -> (..., output_size).
    """

    def __init__(self, input_size: int, output_size: int, bias: bool, act: str, norm: nn.Module, dropout: float = 0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.dense = nn.Linear(input_size, output_size, bias=bias)
        self.act_fn = ACT2FN[act]
        self.norm = norm

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(self.act_fn(self.dense(self.dropout(hidden_states))))


class Pooler(nn.Module):
    """Dense layer and tanh on the first token (BERT): (batch, length, hidden_size) -> (batch, hidden_size)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(hidden_states[:, 0]))


class NormalizedLinear(nn.Linear):
    """A linear layer with rows of length 1, whatever the stored weight (Baichuan 2)."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states, F.normalize(self.weight), self.bias)


class InputScaling(nn.Module):
    """Multiplies what enters the LM head (T5: hidden_size ** -0.5 where the embeddings are tied)."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.scale


class LogitScaling(nn.Module):
    """
    logits * scale, then cap * tanh(logits / cap); either part is optional (Cohere, Gemma 2).

    Args:
        scale (`float`): 1 for none.
        softcap (`float`): the cap, or `None`.
        by_division (`bool`): divide by 1 / scale instead (Granite).
    """

    def __init__(self, scale: float, softcap: float | None, by_division: bool = False):
        super().__init__()
        self.scale_logits = partial(torch.div, other=1.0 / scale) if by_division else partial(torch.mul, other=scale)
        self.is_scaled = scale != 1.0
        self.softcap = softcap

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        if self.is_scaled:
            logits = self.scale_logits(logits)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def first_token(hidden_states: torch.Tensor, real_tokens: torch.Tensor | None) -> torch.Tensor:
    """(batch, length, width) -> (batch, width): the first token."""
    return hidden_states[:, 0]


def last_real_token(hidden_states: torch.Tensor, real_tokens: torch.Tensor) -> torch.Tensor:
    """(batch, length, width) -> (batch, width): the last token that is not padding, wherever the padding is."""
    indices = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    last = (indices * real_tokens).argmax(dim=-1)
    return hidden_states[torch.arange(hidden_states.shape[0], device=hidden_states.device), last]


def mean_of_tokens(hidden_states: torch.Tensor, real_tokens: torch.Tensor | None) -> torch.Tensor:
    """(batch, length, width) -> (batch, width): the mean over tokens that are not padding, or over all."""
    if real_tokens is None:
        real_tokens = torch.ones(hidden_states.shape[:2], device=hidden_states.device)
    mask = real_tokens.unsqueeze(-1).to(hidden_states.dtype)
    return (hidden_states * mask).sum(dim=1) / mask.sum(dim=1)


def mean_in_float32(hidden_states: torch.Tensor, real_tokens: torch.Tensor | None) -> torch.Tensor:
    """As `mean_of_tokens`, with torch's own mean, which rounds once, where no token is padding (EuroBERT)."""
    return hidden_states.mean(dim=1) if real_tokens is None else mean_of_tokens(hidden_states, real_tokens)


POOLINGS = {
    "first": first_token,
    "last": last_real_token,
    "mean": mean_of_tokens,
    "mean_in_float32": mean_in_float32,
    "mean_of_logits": mean_in_float32,
}
