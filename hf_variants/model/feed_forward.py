"""What the feed-forward network of a block computes."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2CLS, ACT2FN

from .adapters import NormGuard
from .axis import PER_LAYER, ROUNDING, TRAINING, Axis, Check, activation_check, axis, setting
from .normalization import unchanged
from .part import SHAPES, states


# The activations of transformers' `ACT2FN` that have parameters.
LEARNED_ACTIVATIONS = ("prelu", "xielu")


@axis
class FeedForwardAxis(Axis):
    """
    ffn_type (`str`): `"mlp"` or `"glu"` (https://arxiv.org/abs/2002.05202); hidden_act (`str`): a key of
        transformers' `ACT2FN` (silu + glu is SwiGLU).
    mlp_bias, mlp_output_bias (`bool`): biases of the inner and the output projection.
    ffn_sub_norm (`bool`): norm before the output projection (sub-LN, NormFormer, BitNet).

    Rounding:
    unfused_bias (`bool`): here and in attention, round the product before a bias is added (Falcon).
    fused_gate_up (`bool`): the activation reads one half of a tensor with gate and up side by side, as one product
        for both leaves it (GLM, Phi-3), which CPU kernels round differently.
    ffn_output_in_float32 (`bool`): the output projection stays in float32 where a model is loaded in float16, and so
        does the residual stream behind it; norms give their weights' dtype (T5).
    clamp_in_float16 (`str`): of float16 only, to keep values finite: `"none"`; `"sublayers"`: after every sublayer,
        1000 below the largest number where one is infinite (T5); `"blocks"`: so after every block (mBART); or
        `"infinite_blocks"`: where one is not finite (BART).
    ffn_chunk_size (`int`): tokens that the network, with the norms and the residual around it, takes at a time, to
        save memory (BERT's `chunk_size_feed_forward`); 0: all.
    """

    title = "feed-forward"

    ffn_type: Literal["mlp", "glu"] = setting("glu", PER_LAYER)
    hidden_act: str = setting("silu", PER_LAYER)
    mlp_bias: bool = setting(False, PER_LAYER)
    mlp_output_bias: bool | None = setting(None, PER_LAYER)
    ffn_sub_norm: bool = setting(False, PER_LAYER)

    unfused_bias: bool = setting(False, PER_LAYER, ROUNDING)
    fused_gate_up: bool = setting(False, PER_LAYER, ROUNDING)
    ffn_output_in_float32: bool = setting(False, ROUNDING, TRAINING)
    clamp_in_float16: Literal["none", "sublayers", "blocks", "infinite_blocks"] = setting("none", ROUNDING, TRAINING)
    ffn_chunk_size: int = setting(0, PER_LAYER, ROUNDING)

    def derive(self) -> None:
        if self.mlp_output_bias is None:
            self.mlp_output_bias = self.mlp_bias

    def checks(self) -> list[Check]:
        parallel = self.parallel_block != "none"
        return [
            activation_check("hidden_act", self.hidden_act),
            Check(self.ffn_chunk_size < 0, f"`ffn_chunk_size` is {self.ffn_chunk_size}.", "Set it to 0 or more."),
            Check(
                parallel and self.ffn_chunk_size > 0,
                "`ffn_chunk_size` is set with a `parallel_block`, which runs whole.",
                "Set `ffn_chunk_size=0` or `parallel_block='none'`.",
            ),
            Check(
                self.fused_gate_up and self.ffn_type != "glu",
                f"`fused_gate_up` is set, but `ffn_type` {self.ffn_type} has no gate.",
                "Set `ffn_type='glu'` or `fused_gate_up=False`.",
            ),
            Check(
                self.clamp_in_float16 != "none" and parallel,
                "`clamp_in_float16` is set with a `parallel_block`, which has no place for it.",
                "Leave one of the two at 'none'.",
            ),
            Check(
                self.ffn_output_in_float32
                and (self.norm_type, self.norm_casting_mode, self.norm_affine) != ("rmsnorm", "llama", True),
                "`ffn_output_in_float32` is set with norms that give the dtype of their input.",
                "Set `norm_type='rmsnorm'` with `norm_casting_mode='llama'` and a weight, or leave it unset.",
            ),
        ]


def make_activation(name: str) -> nn.Module:
    """The activation of this name in transformers' `ACT2FN`, with its learned parameters in torch's default dtype."""
    if name == "xielu":
        # bfloat16 in any model, unless it is told.
        return ACT2CLS[name](dtype=torch.get_default_dtype())
    return ACT2FN[name]


@states(SHAPES, make_activation)
def activation_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Transformers' class says them alone."""
    if name not in LEARNED_ACTIVATIONS:
        return {}
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in make_activation(name).named_parameters()}


def reset_activation(activation: nn.Module) -> None:
    """Set the learned parameters of an activation of `make_activation`, as transformers' class does on construction."""
    (name,) = (name for name in LEARNED_ACTIVATIONS if isinstance(activation, ACT2CLS[name]))
    with torch.device("cpu"):
        fresh = make_activation(name)
    for name, tensor in fresh.state_dict().items():
        init.copy_(getattr(activation, name), tensor)


class FeedForward(NormGuard, nn.Module):
    """
    Two-matrix network: down(act(up(x))) (2017 Transformer, GPT-2, Nemotron).

    Args:
        up_proj, down_proj (`nn.Linear`): from the outer to the inner width, and back.
        act_fn (`nn.Module`): the activation.
        dropout (`float`): probability of dropping an inner activation.
        sub_norm (`Callable`): applied before `down_proj`; `unchanged` for none.

    Shape: (batch, length, hidden_size) -> (batch, length, hidden_size).
    """

    def __init__(
        self, up_proj: nn.Linear, down_proj: nn.Linear, act_fn: nn.Module, dropout: float, sub_norm: Callable
    ):
        super().__init__()
        self.up_proj = up_proj
        self.down_proj = down_proj
        self.act_fn = act_fn
        self.sub_norm = sub_norm
        self.dropout = nn.Dropout(dropout) if dropout else unchanged

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.dropout(self.act_fn(self.up_proj(hidden_states)))
        return self.down_proj(self.sub_norm(hidden_states))


class GatedFeedForward(FeedForward):
    """Gated network: down(act(gate(x)) * up(x)) (https://arxiv.org/abs/2002.05202; with silu: SwiGLU, Llama)."""

    def __init__(self, *, gate_proj: nn.Linear, **arguments):
        super().__init__(**arguments)
        self.gate_proj = gate_proj

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
