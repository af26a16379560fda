"""Where norms and residuals sit: the block and its slots.

Every sublayer (self-attention, cross-attention, feed-forward) has three norm slots; a slot that the norm placement
leaves empty passes its input on:

    x ───────────────────────────────────────────────┐
    │                                                │
    [pre_norm] ─ sublayer ─ [branch_norm] ─ [residual: dropout, multiplier, (+)] ─ [post_norm] ─ x'

    pre        pre_norm                   Llama, GPT-2, T5
    post       post_norm                  2017 Transformer, BERT
    branch     branch_norm                OLMo 2
    sandwich   pre_norm, branch_norm      Gemma 2
    deepnorm   post_norm, and the residual is multiplied by alpha
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers import initialization
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import apply_chunking_to_forward

from .adapters import NormGuard
from .attention import multiply
from .axis import PER_LAYER, ROUNDING, TRAINING, Axis, Check, Idle, axis, setting
from .normalization import tell_norms, unchanged
from .part import SHAPES, states


@axis
class PlacementAxis(Axis):
    """
    norm_placement (`str`): `"pre"` (Llama, GPT-2), `"post"` (2017, BERT), `"branch"` (OLMo 2), `"sandwich"`
        (Gemma 2), `"deepnorm"` (https://arxiv.org/abs/2203.00555).
    parallel_block (`str`): `"none"`, `"shared_norm"` (GPT-J, PaLM, Cohere) or `"two_norms"` (GPT-NeoX).
    final_norm (`bool`): norm after the last block; default: yes unless the blocks end in one (post, deepnorm).
    embedding_norm (`bool`): norm right after the embeddings (BERT, BLOOM, BART).
    embedding_norm_position (`str`): norm the whole sum, `"after_positions"`, or the token embedding before
        anything is added to it, `"before_positions"` (the decoder of BlenderBot small).
    first_layer_pre_norm (`bool`): whether layer 0's attention has its pre-norm (ModernBERT: no).
    residual_from_norm (`bool`): the residual branch starts after the pre-norm (BLOOM's option).
    residual_multiplier (`float`): every branch is multiplied by it before the addition (Granite).
    learned_scale_type (`str`): `"none"`, `"channel"` (LayerScale, https://arxiv.org/abs/2103.17239) or `"scalar"`
        (ReZero, https://arxiv.org/abs/2003.04887); `layer_scale_init` (`float`) is the learned scale's start.
    deepnorm_alpha, deepnorm_beta (`float`): residual multiplier and initialisation gain; derived from the depth.

    Rounding:
    parallel_sum_order (`str`): `"branches_first"`: (attention + FFN) + residual; `"residual_first"`: (residual +
        attention) + FFN.
    """

    title = "block"

    norm_placement: Literal["pre", "post", "branch", "sandwich", "deepnorm"] = setting("pre", PER_LAYER)
    parallel_block: Literal["none", "shared_norm", "two_norms"] = setting("none", PER_LAYER)
    final_norm: bool | None = None
    embedding_norm: bool = False
    embedding_norm_position: Literal["after_positions", "before_positions"] = "after_positions"
    first_layer_pre_norm: bool = True
    residual_from_norm: bool = setting(False, PER_LAYER)
    residual_multiplier: int | float = setting(1.0, PER_LAYER)
    learned_scale_type: Literal["none", "channel", "scalar"] = setting("none", PER_LAYER)
    layer_scale_init: int | float | None = setting(None, PER_LAYER, TRAINING)
    deepnorm_alpha: int | float | None = setting(None, PER_LAYER)
    deepnorm_beta: int | float | None = setting(None, PER_LAYER, TRAINING)

    parallel_sum_order: Literal["branches_first", "residual_first"] = setting("branches_first", PER_LAYER, ROUNDING)

    def derive(self) -> None:
        if self.final_norm is None:
            self.final_norm = self.norm_placement not in ("post", "deepnorm")
        if self.layer_scale_init is None:
            self.layer_scale_init = {"none": 1.0, "channel": 1e-5, "scalar": 0.0}[self.learned_scale_type]
        if self.norm_placement == "deepnorm" and self.num_hidden_layers > 0:
            # Section 4 and table 1 of the paper, for a stack of one kind; encoder-decoders set both explicitly.
            if self.deepnorm_alpha is None:
                self.deepnorm_alpha = (2 * self.num_hidden_layers) ** 0.25
            if self.deepnorm_beta is None:
                self.deepnorm_beta = (8 * self.num_hidden_layers) ** -0.25

    def checks(self) -> list[Check]:
        parallel = self.parallel_block != "none"
        return [
            Check(
                parallel and self.norm_placement not in ("pre", "sandwich"),
                f"`parallel_block` {self.parallel_block} is set with `norm_placement` {self.norm_placement}.",
                "Use `norm_placement` 'pre' or 'sandwich', or `parallel_block='none'`.",
            ),
            Check(
                parallel and self.residual_from_norm,
                "`residual_from_norm` is set with a `parallel_block`.",
                "Set `residual_from_norm=False` or `parallel_block='none'`.",
            ),
            Check(
                self.residual_from_norm and self.norm_placement not in ("pre", "sandwich"),
                f"`residual_from_norm` is set, but `norm_placement` {self.norm_placement} has no pre-norm.",
                "Set `residual_from_norm=False`, or `norm_placement` to 'pre' or 'sandwich'.",
            ),
            Check(
                not self.first_layer_pre_norm and self.norm_placement not in ("pre", "sandwich"),
                f"`first_layer_pre_norm` is off, but `norm_placement` {self.norm_placement} has no pre-norm.",
                "Leave `first_layer_pre_norm=True`.",
            ),
            Check(
                not self.first_layer_pre_norm and parallel,
                "`first_layer_pre_norm` is off with a `parallel_block`, whose FFN shares that norm.",
                "Leave `first_layer_pre_norm=True` or set `parallel_block='none'`.",
            ),
            Check(
                self.norm_placement != "deepnorm" and (self.deepnorm_alpha, self.deepnorm_beta) != (None, None),
                f"`deepnorm_alpha` or `deepnorm_beta` is set, but `norm_placement` is {self.norm_placement}.",
                "Set `norm_placement='deepnorm'` or leave both unset.",
            ),
            Check(
                self.norm_placement == "deepnorm" and None in (self.deepnorm_alpha, self.deepnorm_beta),
                "`per_layer_config` sets `norm_placement` deepnorm without `deepnorm_alpha` and `deepnorm_beta`.",
                "Set the two beside it: they are derived for a stack of one kind only.",
            ),
            Check(
                self.norm_placement == "deepnorm" and self.residual_multiplier != 1.0,
                "`residual_multiplier` is set with `norm_placement` deepnorm, which scales the residual itself.",
                "Set `residual_multiplier=1.0` and `deepnorm_alpha` instead.",
            ),
            Check(
                self.norm_placement == "deepnorm" and self.learned_scale_type != "none",
                "`learned_scale_type` is set with `norm_placement` deepnorm.",
                "Use one of the two.",
            ),
            Check(
                self.learned_scale_type != "none" and self.residual_multiplier != 1.0,
                "`learned_scale_type` and `residual_multiplier` both scale the branch.",
                "Use one of the two.",
            ),
        ]

    def idle(self) -> list[Idle]:
        placement = f"`norm_placement` is {self.norm_placement}"
        return [
            Idle(not self.embedding_norm, ["embedding_norm_position"], "`embedding_norm` is off"),
            Idle(self.parallel_block == "none", ["parallel_sum_order"], "`parallel_block` is none"),
            Idle(self.learned_scale_type == "none", ["layer_scale_init"], "`learned_scale_type` is none"),
            Idle(self.norm_placement != "deepnorm", ["deepnorm_alpha", "deepnorm_beta"], placement),
        ]


def clamp_float16(hidden_states: torch.Tensor, overflows: Callable | None = None) -> torch.Tensor:
    """
    Values of float16 within 1000 of its largest number; other dtypes pass.

    Args:
        overflows: of the values, whether to; by default always.
    """
    if hidden_states.dtype != torch.float16:
        return hidden_states
    limit = torch.finfo(torch.float16).max
    if overflows is None:
        return torch.clamp(hidden_states, -(limit - 1000), limit - 1000)
    bound = torch.where(overflows(hidden_states), limit - 1000, limit)
    return torch.clamp(hidden_states, -bound, bound)


def any_infinite(hidden_states: torch.Tensor) -> torch.Tensor:
    """Whether a value is infinite, as a tensor."""
    return torch.isinf(hidden_states).any()


def any_not_finite(hidden_states: torch.Tensor) -> torch.Tensor:
    """Whether a value is infinite or NaN, as a tensor."""
    return ~torch.isfinite(hidden_states).all()


class Residual(nn.Module):
    """residual + dropout(branch) * multiplier, with `residual_scale` (DeepNorm's alpha) on the residual."""

    def __init__(self, dropout: float = 0.0, branch_multiplier: float = 1.0, residual_scale: float = 1.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout) if dropout else unchanged
        self.multiply_branch = unchanged if branch_multiplier == 1.0 else partial(multiply, factor=branch_multiplier)
        self.scale_residual = unchanged if residual_scale == 1.0 else partial(multiply, factor=residual_scale)

    def scale_branch(self, branch: torch.Tensor) -> torch.Tensor:
        return self.multiply_branch(self.dropout(branch))

    def add(self, residual: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        return self.scale_residual(residual) + self.scale_branch(branch)


class LearnedScaleResidual(Residual):
    """residual + scale * dropout(branch), one learned scale per channel (LayerScale) or one in all (ReZero)."""

    def __init__(self, shape: tuple[int, ...], init: float, dropout: float = 0.0):
        super().__init__(dropout)
        self.init = init
        self.scale = nn.Parameter(torch.full(shape, float(init)))

    def reset_weights(self) -> None:
        initialization.constant_(self.scale, self.init)

    def scale_branch(self, branch: torch.Tensor) -> torch.Tensor:
        # As a call of the module, at which ZeRO-3 and FSDP gather its parameter.
        return self(branch)

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        return self.scale * self.dropout(branch)


@states(SHAPES, LearnedScaleResidual)
def learned_scale_shapes(shape: tuple[int, ...], **_: Any) -> dict[str, tuple[int, ...]]:
    return {"scale": shape}


class Block(NormGuard, GradientCheckpointingLayer):
    """
    Base of all blocks: holds the sublayers and their slots under the names that checkpoints use.

    Args:
        residual_from_norm (`bool`): the residual starts after `pre_norm`.
        ffn_chunk_size (`int`): number of tokens that the feed-forward sublayer takes at a time; 0 for all.
        limit_attention, limit_output (`Callable`): keep what attention and the block give in range; `unchanged` for none.
        modules: of `self_attn`, `cross_attn` and `mlp` the sublayers that there are, and for each what stands around it:
            `self_attn_pre_norm`, `self_attn_branch_norm`, `self_attn_post_norm` and `self_attn_residual`, and so on.

    Tensors that take part in the gradient are positional arguments of `forward`: reentrant checkpointing stops at
    those, and would go through a keyword's graph once per layer.
    """

    def __init__(
        self,
        residual_from_norm: bool = False,
        ffn_chunk_size: int = 0,
        limit_attention: Callable = unchanged,
        limit_output: Callable = unchanged,
        **modules: Callable,
    ):
        super().__init__()
        self.residual_from_norm = residual_from_norm
        self.limit_attention = limit_attention
        self.limit_output = limit_output
        if ffn_chunk_size:
            self.feed_forward = partial(apply_chunking_to_forward, self.feed_forward, ffn_chunk_size, 1)
        for name, module in modules.items():
            setattr(self, name, module)

    def attend_to_self(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        normed = self.self_attn_pre_norm(hidden_states)
        residual = normed if self.residual_from_norm else hidden_states
        branch, _ = self.self_attn(normed, **kwargs)
        joined = self.self_attn_residual.add(residual, self.self_attn_branch_norm(branch))
        return self.limit_attention(self.self_attn_post_norm(joined))

    def attend_to_encoder(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        normed = self.cross_attn_pre_norm(hidden_states)
        residual = normed if self.residual_from_norm else hidden_states
        branch, _ = self.cross_attn(normed, **kwargs)
        joined = self.cross_attn_residual.add(residual, self.cross_attn_branch_norm(branch))
        return self.limit_attention(self.cross_attn_post_norm(joined))

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = self.mlp_pre_norm(hidden_states)
        residual = normed if self.residual_from_norm else hidden_states
        branch = self.mlp(normed)
        joined = self.mlp_residual.add(residual, self.mlp_branch_norm(branch))
        return self.limit_output(self.mlp_post_norm(joined))


class SequentialBlock(Block):
    """Self-attention, then the feed-forward network."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """(batch, length, hidden_size) -> the same; `kwargs` reach the attention."""
        return self.feed_forward(self.attend_to_self(hidden_states, position_bias=position_bias, **kwargs))


class SequentialCrossBlock(Block):
    """Self-attention, cross-attention where there are encoder states, then the feed-forward network."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        hidden_states = self.attend_to_self(hidden_states, position_bias=position_bias, **kwargs)
        if encoder_hidden_states is not None:
            hidden_states = self.attend_to_encoder(
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                **kwargs,
            )
        return self.feed_forward(hidden_states)


class AttentionBlock(Block):
    """Self-attention alone (`per_layer_config` skips the feed-forward network)."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        return self.attend_to_self(hidden_states, position_bias=position_bias, **kwargs)


class FeedForwardBlock(Block):
    """The feed-forward network alone (`per_layer_config` skips the attention)."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        return self.feed_forward(hidden_states)


class ParallelBlock(Block):
    """
    Attention and feed-forward network side by side on the same input (GPT-J, GPT-NeoX, PaLM, Cohere).

    With a shared norm the feed-forward network reads the attention's normalised input; with two norms its own.
    """

    def __init__(self, shared_norm: bool, residual_first: bool, sum_dropout: float = 0.0, **modules: Callable):
        super().__init__(**modules)
        self.shared_norm = shared_norm
        self.residual_first = residual_first
        self.sum_dropout = nn.Dropout(sum_dropout) if sum_dropout else unchanged

    def sum_branches(self, residual: torch.Tensor, *branches: torch.Tensor) -> torch.Tensor:
        """The same sum in the two orders that native models round it in."""
        if self.residual_first:
            return sum(branches, start=residual)
        return self.sum_dropout(sum(branches[1:], start=branches[0])) + residual

    def branches(self, hidden_states: torch.Tensor, **kwargs) -> list[torch.Tensor]:
        normed = self.self_attn_pre_norm(hidden_states)
        attention, _ = self.self_attn(normed, **kwargs)
        feed_forward = self.mlp(normed if self.shared_norm else self.mlp_pre_norm(hidden_states))
        return [
            self.self_attn_residual.scale_branch(self.self_attn_branch_norm(attention)),
            self.mlp_residual.scale_branch(self.mlp_branch_norm(feed_forward)),
        ]

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        return self.sum_branches(hidden_states, *self.branches(hidden_states, position_bias=position_bias, **kwargs))


class ParallelCrossBlock(ParallelBlock):
    """Self-attention, cross-attention and feed-forward network side by side; a shared norm serves all three."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        if encoder_hidden_states is None:
            return super().forward(hidden_states, position_bias, **kwargs)
        normed = (self.self_attn_pre_norm if self.shared_norm else self.cross_attn_pre_norm)(hidden_states)
        cross, _ = self.cross_attn(
            normed,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **kwargs,
        )
        cross = self.cross_attn_residual.scale_branch(self.cross_attn_branch_norm(cross))
        branches = self.branches(hidden_states, position_bias=position_bias, **kwargs)
        return self.sum_branches(hidden_states, *branches, cross)


class TellsNorms:
    """
    Mixed into a block with norms over the tokens of a batch, before it: it tells them which are real.

    In `forward`, which gradient checkpointing repeats with its arguments: the stack may have seen another batch since.
    """

    def forward(
        self, hidden_states: torch.Tensor, *args, real_tokens: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        """(batch, length, hidden_size) -> the same; `real_tokens` are bool (batch or 1, length)."""
        tell_norms(self, real_tokens)
        return super().forward(hidden_states, *args, **kwargs)


class SequentialTokensBlock(TellsNorms, SequentialBlock):
    """`SequentialBlock` with norms over the tokens of a batch."""


class SequentialCrossTokensBlock(TellsNorms, SequentialCrossBlock):
    """`SequentialCrossBlock` with norms over the tokens of a batch."""


class AttentionTokensBlock(TellsNorms, AttentionBlock):
    """`AttentionBlock` with norms over the tokens of a batch."""


class FeedForwardTokensBlock(TellsNorms, FeedForwardBlock):
    """`FeedForwardBlock` with norms over the tokens of a batch."""


class ParallelTokensBlock(TellsNorms, ParallelBlock):
    """`ParallelBlock` with norms over the tokens of a batch."""


class ParallelCrossTokensBlock(TellsNorms, ParallelCrossBlock):
    """`ParallelCrossBlock` with norms over the tokens of a batch."""


# A block -> the one with norms over the tokens of a batch.
OVER_TOKENS: dict[type[Block], type[Block]] = {
    SequentialBlock: SequentialTokensBlock,
    SequentialCrossBlock: SequentialCrossTokensBlock,
    AttentionBlock: AttentionTokensBlock,
    FeedForwardBlock: FeedForwardTokensBlock,
    ParallelBlock: ParallelTokensBlock,
    ParallelCrossBlock: ParallelCrossTokensBlock,
}
