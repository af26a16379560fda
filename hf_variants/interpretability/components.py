"""What stands around the modules of a model so that TransformerLens sees what passes: each computes what it wraps."""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    GatedMLPBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from ..model.attention import Attention
from ..model.block import ParallelBlock
from ..model.feed_forward import FeedForward, GatedFeedForward
from ..model.normalization import (
    Float32LayerNorm,
    RMSNorm,
    WeightlessFloat32LayerNorm,
    ZeroCenteredLayerNorm,
    ZeroCenteredRMSNorm,
)
from ..model.positions import NoRotation


LAYER_NORMS = (nn.LayerNorm, Float32LayerNorm, WeightlessFloat32LayerNorm)

# A slot of a block -> its name there; TransformerLens gives the first four. Norms behind the residual are named apart:
# its tools take `ln1` and `ln2` for what feeds a sublayer.
NORMS = {
    "self_attn_pre_norm": "ln1",
    "self_attn_branch_norm": "ln1_post",
    "mlp_pre_norm": "ln2",
    "mlp_branch_norm": "ln2_post",
    "cross_attn_pre_norm": "ln_cross",
    "cross_attn_branch_norm": "ln_cross_post",
    "self_attn_post_norm": "ln1_residual",
    "cross_attn_post_norm": "ln_cross_residual",
    "mlp_post_norm": "ln2_residual",
}


class Norm(NormalizationBridge):
    """An RMSNorm or LayerNorm: its own result, unless a hook changes `hook_scale` or `hook_normalized`."""

    def __init__(self, name: str, config: Any, module: nn.Module):
        super().__init__(
            name,
            config,
            use_native_layernorm_autograd=True,
            uses_rms_norm=isinstance(module, RMSNorm),
            uses_weight_offset=(
                isinstance(module, (ZeroCenteredRMSNorm, ZeroCenteredLayerNorm))
                or getattr(module, "unit_offset", False)
            ),
        )

    def _apply_weight_and_bias(self, hidden_states: torch.Tensor, input_dtype: torch.dtype) -> torch.Tensor:
        if getattr(self.original_component, "weight", None) is None:
            return hidden_states.to(input_dtype)
        return super()._apply_weight_and_bias(hidden_states, input_dtype)


def norm_component(name: str, config: Any, module: nn.Module) -> GeneralizedComponent:
    """Around a norm; only those that divide by a scale have one to show."""
    if isinstance(module, (RMSNorm, *LAYER_NORMS)):
        return Norm(name, config, module)
    return GeneralizedComponent(name, config)


class Added(GeneralizedComponent):
    """A table whose vectors are added to the embeddings: `hook_out` has the vectors, not the sum."""

    def forward(self, embeddings: torch.Tensor, *args: Any) -> torch.Tensor:
        """embeddings (batch, length, width) and what chooses the vectors -> the sum, (batch, length, width)."""
        embeddings = self.hook_in(embeddings)
        return embeddings + self.hook_out(self.original_component(torch.zeros_like(embeddings), *args))


class VariantAttention(AttentionBridge):
    """
    Self- or cross-attention that hands its scores and weights to hooks while it computes, so that edits have an effect.

    `hook_attn_scores` has what the softmax sees, with mask and bias; `hook_pattern` its result, before attention sinks
    take their share; `hook_rot_q` and `hook_rot_k` queries and keys as they enter the scores, where they are rotated.
    """

    # Those hooks would stand before the projections and a copy of the residual stream for every head.
    supports_split_qkv_fork = False

    def __init__(self, name: str, config: Any, module: Attention):
        config = copy(config)
        config.n_heads = module.q_proj.out_features // module.head_dim
        config.n_key_value_heads = module.k_proj.out_features // module.head_dim
        config.d_head = module.head_dim
        config.per_layer_head_dim = None
        rotates = not isinstance(module.rotation, NoRotation)
        config.positional_embedding_type = "rotary" if rotates else "none"
        parts = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "gate": "g_proj"}
        found: dict[str, GeneralizedComponent] = {
            key: LinearBridge(part) for key, part in parts.items() if hasattr(module, part)
        }
        for part in ("q_norm", "k_norm", "sub_norm"):
            if isinstance(getattr(module, part), nn.Module):
                found[part] = GeneralizedComponent(part)
        super().__init__(name, config, submodules=found)

    def set_original_component(self, original_component: nn.Module) -> None:
        super().set_original_component(original_component)
        attention: Any = original_component
        attention.eager_attention = partial(
            attention.eager_attention, see_scores=self.hook_attn_scores, see_weights=self.hook_pattern
        )
        if hasattr(self, "hook_rot_q"):
            attention.rotate = self._hooked_rotation(attention.rotate)

    def _hooked_rotation(self, rotate: Callable) -> Callable:
        def rotate_and_show(query: torch.Tensor, key: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
            query, key = rotate(query, key, *args)
            return self.hook_rot_q(query), self.hook_rot_k(key)

        return rotate_and_show

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, length, hidden_size) -> the same, and the weights (batch, heads, length, keys)."""
        output, weights = self.original_component(self.hook_in(hidden_states), **kwargs)
        return self.hook_out(output), weights


def feed_forward_component(name: str, config: Any, module: FeedForward) -> MLPBridge:
    """Around a feed-forward network, gated or not."""
    parts: dict[str, GeneralizedComponent] = {"in": LinearBridge("up_proj"), "out": LinearBridge("down_proj")}
    if isinstance(module.sub_norm, nn.Module):
        parts["sub_norm"] = GeneralizedComponent("sub_norm")
    if isinstance(module, GatedFeedForward):
        return GatedMLPBridge(name, config, submodules={**parts, "gate": LinearBridge("gate_proj")})
    return MLPBridge(name, config, submodules=parts)


class VariantBlock(BlockBridge):
    """
    A layer, with whatever it has: layers of one stack may differ.

    `hook_attn_out`, `hook_cross_attn_out` and `hook_mlp_out` have what each branch adds to the residual stream, after its
    norm and its multiplier; `hook_resid_mid` and, before the feed-forward network behind cross-attention,
    `hook_resid_mid2` the stream between the sublayers. Parallel sublayers have no stream between them.
    """

    hook_aliases = {"hook_resid_pre": "hook_in", "hook_resid_post": "hook_out"}
    attention_name = "attn"

    def set_original_component(self, original_component: nn.Module) -> None:
        """Called for every layer, before its parts are looked for."""
        super().set_original_component(original_component)
        block: Any = original_component
        parts: dict[str, GeneralizedComponent] = {}
        for slot, name in NORMS.items():
            if isinstance(norm := getattr(block, slot, None), nn.Module):
                parts[name] = norm_component(slot, self.config, norm)
        if hasattr(block, "self_attn"):
            parts[self.attention_name] = VariantAttention("self_attn", self.config, block.self_attn)
            self._show_branch(block.self_attn_residual, "hook_attn_out")
        if hasattr(block, "cross_attn"):
            parts["cross_attn"] = VariantAttention("cross_attn", self.config, block.cross_attn)
            self._show_branch(block.cross_attn_residual, "hook_cross_attn_out")
        if hasattr(block, "mlp"):
            parts["mlp"] = feed_forward_component("mlp", self.config, block.mlp)
            self._show_branch(block.mlp_residual, "hook_mlp_out")
        self.submodules = parts
        self.mlp_reads_resid_directly = "ln2" not in parts
        self._show_streams(block)

    def _show_branch(self, residual: Any, name: str) -> None:
        setattr(self, name, HookPoint())
        residual.scale_branch = _then(residual.scale_branch, getattr(self, name))

    def _show_streams(self, block: Any) -> None:
        if isinstance(block, ParallelBlock) or not (hasattr(block, "self_attn") and hasattr(block, "mlp")):
            return
        # Written out for the whole length: chunks would pass the hooks one after the other.
        block.__dict__.pop("feed_forward", None)
        self.hook_resid_mid = HookPoint()
        if hasattr(block, "cross_attn"):
            self.hook_resid_mid2 = HookPoint()
            block.attend_to_encoder = _first(self.hook_resid_mid, block.attend_to_encoder)
            block.feed_forward = _first(self.hook_resid_mid2, block.feed_forward)
        else:
            block.feed_forward = _first(self.hook_resid_mid, block.feed_forward)


class DecoderBlock(VariantBlock):
    """A layer of an encoder-decoder's decoder, which has two attentions."""

    attention_name = "self_attn"


def _then(compute: Callable, hook: HookPoint) -> Callable:
    def computed(*args: Any) -> torch.Tensor:
        return hook(compute(*args))

    return computed


def _first(hook: HookPoint, compute: Callable) -> Callable:
    def computed(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return compute(hook(hidden_states), **kwargs)

    return computed
