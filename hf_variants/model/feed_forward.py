"""What the feed-forward network of a block computes."""

import torch
from torch import nn
from transformers.activations import ACT2FN


class FeedForward(nn.Module):
    """
    Two-matrix network: down(act(up(x))) (2017 Transformer, GPT-2, Nemotron).

    Args:
        hidden_size, intermediate_size (`int`): outer and inner width.
        hidden_act (`str`): a key of transformers' `ACT2FN`.
        bias, output_bias (`bool`): biases of `up_proj` and of `down_proj`.
        dropout (`float`): probability of dropping an inner activation.
        sub_norm (`nn.Module`): applied before `down_proj`; `nn.Identity()` for none.

    Shape: (batch, length, hidden_size) -> (batch, length, hidden_size).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
        bias: bool,
        output_bias: bool,
        dropout: float,
        sub_norm: nn.Module,
    ):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=output_bias)
        self.act_fn = ACT2FN[hidden_act]
        self.sub_norm = sub_norm
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.dropout(self.act_fn(self.up_proj(hidden_states)))
        return self.down_proj(self.sub_norm(hidden_states))


class GatedFeedForward(FeedForward):
    """Gated network: down(act(gate(x)) * up(x)) (https://arxiv.org/abs/2002.05202; with silu: SwiGLU, Llama)."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
        bias: bool,
        output_bias: bool,
        dropout: float,
        sub_norm: nn.Module,
    ):
        super().__init__(hidden_size, intermediate_size, hidden_act, bias, output_bias, dropout, sub_norm)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(self.sub_norm(self.dropout(hidden_states)))
