"""What the feed-forward network of a block computes."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2CLS, ACT2FN

from .adapters import NormGuard
from .normalization import unchanged


def make_activation(name: str) -> nn.Module:
    """The activation of this name in transformers' `ACT2FN`, with its learned parameters in torch's default dtype."""
    if name == "xielu":
        # bfloat16 in any model, unless it is told.
        return ACT2CLS[name](dtype=torch.get_default_dtype())
    return ACT2FN[name]


class FeedForward(NormGuard, nn.Module):
    """
    Two-matrix network: down(act(up(x))) (2017 Transformer, GPT-2, Nemotron).

    Args:
        hidden_size, intermediate_size (`int`): outer and inner width.
        hidden_act (`str`): a key of transformers' `ACT2FN`.
        bias, output_bias (`bool`): biases of `up_proj` and of `down_proj`.
        linear_class, output_class (`type`): of the inner projections and of `down_proj`.
        dropout (`float`): probability of dropping an inner activation.
        sub_norm (`Callable`): applied before `down_proj`; `unchanged` for none.

    Shape: (batch, length, hidden_size) -> (batch, length, hidden_size).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
        bias: bool,
        output_bias: bool,
        linear_class: type[nn.Linear],
        output_class: type[nn.Linear],
        dropout: float,
        sub_norm: Callable,
    ):
        super().__init__()
        self.up_proj = linear_class(hidden_size, intermediate_size, bias=bias)
        self.down_proj = output_class(intermediate_size, hidden_size, bias=output_bias)
        self.act_fn = make_activation(hidden_act)
        self.sub_norm = sub_norm
        self.dropout = nn.Dropout(dropout) if dropout else unchanged

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
        linear_class: type[nn.Linear],
        output_class: type[nn.Linear],
        dropout: float,
        sub_norm: Callable,
    ):
        super().__init__(
            hidden_size,
            intermediate_size,
            hidden_act,
            bias,
            output_bias,
            linear_class,
            output_class,
            dropout,
            sub_norm,
        )
        self.gate_proj = linear_class(hidden_size, intermediate_size, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(self.sub_norm(self.dropout(hidden_states)))


class FusedGatedFeedForward(GatedFeedForward):
    """Gated network whose gate and up projections lie side by side, as one fused product leaves them (GLM, Phi-3)."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate_up = torch.cat((self.gate_proj(hidden_states), self.up_proj(hidden_states)), dim=-1)
        gate, up = gate_up.chunk(2, dim=-1)
        hidden_states = self.act_fn(gate) * up
        return self.down_proj(self.sub_norm(self.dropout(hidden_states)))
