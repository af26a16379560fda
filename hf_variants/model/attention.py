"""Who attends to whom and how: self- and cross-attention with every option of the config."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .adapters import NormGuard
from .arguments import CACHE
from .axis import PER_LAYER, ROUNDING, TRAINING, Axis, Check, Idle, axis, setting
from .normalization import NORM_KINDS, NormType, unchanged
from .part import CALLS, FLOPS, SHAPES, Call, states


@axis
class AttentionAxis(Axis):
    """
    attention_bias, attention_output_bias (`bool`): biases of q/k/v and of the output projection.
    qk_norm (`str`): `"none"`, `"head"` (one weight per head channel, Qwen 3), `"full"` (over all heads, OLMo 2) or
        `"per_head"` (own weights for every head, StableLM, Cohere).
    qk_norm_type, qk_norm_eps, qk_norm_affine, qk_norm_bias: as the `norm_*` fields, which they default to.
    qk_norm_after_rope (`bool`): normalise after the rotation (HunYuan, nanochat).
    attention_scaling (`float`): multiplier of the scores; default `head_dim ** -0.5`.
    scale_attn_by_inverse_layer_idx (`bool`): also divide the scores by the layer's number, from 1 (GPT-2's option).
    attn_logit_softcapping (`float`): scores become `c * tanh(scores / c)` (Gemma 2).
    attention_sinks (`bool`): one learned extra logit per head in the softmax's denominator (gpt-oss).
    attention_gate (`str`): `"none"`, `"headwise"` or `"elementwise"` sigmoid gate on the attention's output, from
        its input (https://arxiv.org/abs/2505.06708).
    attention_sub_norm (`bool`): norm before the output projection (sub-LN, BitNet).
    clip_qkv (`float`): clamp q, k and v to [-c, c] (MPT, OLMo).
    is_causal (`bool`): decoder or bidirectional encoder.
    add_cross_attention (`bool`): attend to encoder states of width `cross_attention_hidden_size` (default:
        `hidden_size`).

    Rounding:
    heads_first_from (`str`): the step from which on heads stand before positions in memory: `"norm"` on heads
        (Phi), `"rotation"` (Llama, Qwen 3) or `"scores"` (GPT-J): the same values, but some gradients sum in another
        order.
    broadcast_key_value (`bool`): leave it to the attention function to give the one key/value head to every query
        head (Falcon); torch's sdpa then takes another kernel.
    scale_query (`bool`): multiply the queries instead of the scores (OPT).
    attention_score_form (`str`): how eager attention rounds the scores: `"multiplied"`, product times scaling,
        plus the position bias; `"batched"`, the same with another layout of the keys, and so another gradient
        (XGLM); `"divided"`, product divided by the scaling's inverse (GPT-J), or `"divided_in_float32"`, which under
        autocast rounds no quotient (CodeGen); `"fused"`, product and scaling in one operation (GPT-2's option);
        `"biased"`, product, scaling and position bias in one operation (BLOOM).
    attention_scores_in_float32 (`bool`): eager attention upcasts queries and keys first (GPT-J, GPT-Neo).
    attention_softmax_in_float32 (`bool`): eager attention computes the softmax in float32, or else in the scores'
        dtype (GPT-2).
    eager_by_default (`bool`): attention runs eager where no implementation is asked for, as in stock classes that have
        no other (GPT-J, BLOOM).
    """

    title = "attention"

    attention_bias: bool = setting(False, PER_LAYER)
    attention_output_bias: bool | None = setting(None, PER_LAYER)
    qk_norm: Literal["none", "head", "full", "per_head"] = setting("none", PER_LAYER)
    qk_norm_type: NormType | None = setting(None, PER_LAYER)
    qk_norm_eps: float | None = setting(None, PER_LAYER)
    qk_norm_affine: bool | None = setting(None, PER_LAYER)
    qk_norm_bias: bool | None = setting(None, PER_LAYER)
    qk_norm_after_rope: bool = setting(False, PER_LAYER)
    attention_scaling: int | float | None = setting(None, PER_LAYER)
    scale_attn_by_inverse_layer_idx: bool = False
    attn_logit_softcapping: int | float | None = setting(None, PER_LAYER)
    attention_sinks: bool = setting(False, PER_LAYER)
    attention_gate: Literal["none", "headwise", "elementwise"] = setting("none", PER_LAYER)
    attention_sub_norm: bool = setting(False, PER_LAYER)
    clip_qkv: int | float | None = setting(None, PER_LAYER)
    is_causal: bool = True
    add_cross_attention: bool = False
    cross_attention_hidden_size: int | None = None

    heads_first_from: Literal["norm", "rotation", "scores"] = setting("rotation", ROUNDING)
    broadcast_key_value: bool = setting(False, PER_LAYER, ROUNDING)
    scale_query: bool = setting(False, PER_LAYER, ROUNDING)
    attention_score_form: Literal["multiplied", "batched", "divided", "divided_in_float32", "fused", "biased"] = (
        setting("multiplied", PER_LAYER, ROUNDING)
    )
    attention_scores_in_float32: bool = setting(False, PER_LAYER, ROUNDING)
    attention_softmax_in_float32: bool = setting(True, PER_LAYER, ROUNDING)
    eager_by_default: bool = setting(False, ROUNDING, TRAINING)

    def derive(self) -> None:
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        if self.qk_norm_type is None:
            self.qk_norm_type = self.norm_type
        if self.qk_norm_eps is None:
            self.qk_norm_eps = self.norm_eps
        if self.qk_norm_affine is None:
            self.qk_norm_affine = self.norm_affine
        if self.qk_norm_bias is None:
            self.qk_norm_bias = (
                NORM_KINDS[self.qk_norm_type].has_bias
                and self.qk_norm_affine
                and self.norm_bias
                and self.qk_norm != "per_head"
            )
        if not self.add_cross_attention and self.cross_attention_hidden_size == self.hidden_size:
            # As older files have it, where nothing reads it.
            self.cross_attention_hidden_size = None

    def checks(self) -> list[Check]:
        kv_heads = self.num_key_value_heads
        rope = self.position_embedding_type == "rope"
        return [
            Check(
                self.qk_norm_bias and not NORM_KINDS[self.qk_norm_type].has_bias,
                f"`qk_norm_bias` is set, but `qk_norm_type` {self.qk_norm_type} has no bias.",
                "Set `qk_norm_bias=False` or `qk_norm_type='layernorm'`.",
            ),
            Check(
                self.qk_norm_bias and self.qk_norm == "per_head",
                "`qk_norm_bias` is set, but `qk_norm` per_head has no bias.",
                "Set `qk_norm_bias=False` or another `qk_norm`.",
            ),
            Check(
                self.qk_norm_bias and not self.qk_norm_affine,
                "`qk_norm_bias` is set, but `qk_norm_affine` is not.",
                "Set `qk_norm_bias=False` or `qk_norm_affine=True`.",
            ),
            Check(
                self.qk_norm_bias and self.norm_casting_mode == "gemma" and self.norm_type == "layernorm",
                "`qk_norm_bias` is set, but `norm_casting_mode` gemma for layernorm has no bias (Cohere).",
                "Set `qk_norm_bias=False` or `norm_casting_mode='none'`.",
            ),
            Check(
                self.qk_norm_after_rope and self.qk_norm in ("full", "per_head"),
                f"`qk_norm_after_rope` is set with `qk_norm` {self.qk_norm}.",
                "Use `qk_norm='head'`, or normalise before the rotation.",
            ),
            Check(
                self.qk_norm_after_rope and self.qk_norm == "none",
                "`qk_norm_after_rope` is set, but `qk_norm` is none.",
                "Set `qk_norm='head'` or `qk_norm_after_rope=False`.",
            ),
            Check(
                self.heads_first_from == "norm" and (self.qk_norm != "head" or self.qk_norm_after_rope),
                "`heads_first_from` is norm, but there is no norm on heads before the rotation.",
                "Set `qk_norm='head'` and `qk_norm_after_rope=False`, or `heads_first_from='rotation'`.",
            ),
            Check(
                self.heads_first_from == "scores"
                and (not rope or any("llama_4_scaling_beta" in entry for entry in self._flat_rope_parameters())),
                "`heads_first_from` is scores, but there is no rotation, or one that scales queries by "
                "`llama_4_scaling_beta`.",
                "Set `heads_first_from='rotation'`.",
            ),
            Check(
                self.attn_logit_softcapping is not None and self.attn_logit_softcapping <= 0,
                f"`attn_logit_softcapping` is {self.attn_logit_softcapping}.",
                "Set it above 0, or to None for no cap.",
            ),
            Check(
                self.attn_logit_softcapping is not None and self.attention_sinks,
                "`attn_logit_softcapping` and `attention_sinks` are both set, which no attention backend combines.",
                "Use one of the two.",
            ),
            Check(
                self.clip_qkv is not None and self.clip_qkv <= 0,
                f"`clip_qkv` is {self.clip_qkv}.",
                "Set it above 0, or to None for no clipping.",
            ),
            Check(
                self.add_cross_attention and not self.is_causal,
                "`add_cross_attention` is set on an encoder (`is_causal=False`).",
                "Only a decoder attends to an encoder; set `is_causal=True` or `add_cross_attention=False`.",
            ),
            Check(
                self.attention_score_form == "biased" and not self.has_sequence_bias,
                f"`attention_score_form` is biased, but `position_embedding_type` {self.position_embedding_type} has no "
                "bias.",
                "Set `attention_score_form='multiplied'`, or use ALiBi or relative biases.",
            ),
            Check(
                self.attention_score_form == "biased" and self.attn_logit_softcapping is not None,
                "`attention_score_form` biased and `attn_logit_softcapping` are both set, and the cap stands between "
                "the product and the bias.",
                "Set `attention_score_form='multiplied'`, or leave the cap unset.",
            ),
            Check(
                self.attention_score_form.startswith("divided") and self.scale_query,
                f"`attention_score_form` {self.attention_score_form} and `scale_query` are both set, so nothing is left to "
                "divide.",
                "Use one of the two.",
            ),
            Check(
                self.broadcast_key_value and kv_heads != 1,
                f"`broadcast_key_value` is set with {kv_heads} key/value heads.",
                "Set `num_key_value_heads=1` or `broadcast_key_value=False`.",
            ),
            Check(
                self.broadcast_key_value and self.attention_score_form in ("batched", "fused", "biased"),
                f"`broadcast_key_value` is set with `attention_score_form` {self.attention_score_form}, whose product "
                "cannot broadcast.",
                "Set `attention_score_form` to 'multiplied' or 'divided', or `broadcast_key_value=False`.",
            ),
        ]

    def idle(self) -> list[Idle]:
        width = ["cross_attention_hidden_size"]
        return [
            Idle(self.qk_norm == "none", self.named("qk_norm_"), "`qk_norm` is none"),
            Idle(not self.add_cross_attention, width, "`add_cross_attention` is off"),
        ]

    @property
    def attention_features(self) -> dict[str, bool]:
        """The features of this config that not every attention backend computes, by field name."""
        layers = list(self.per_layer_config)
        return {
            "attn_logit_softcapping": any(layer.attn_logit_softcapping is not None for layer in layers),
            "attention_sinks": any(layer.attention_sinks for layer in layers),
            "position_embedding_type": self.has_sequence_bias,
        }

    def unsupported_attention_features(self, implementation: str) -> list[str]:
        """
        The fields of this config that an attention implementation would ignore or refuse.

        Args:
            implementation (`str`): `"eager"`, `"sdpa"`, `"flex_attention"`, `"flash_attention"` or `"paged"`
                (continuous batching).
        """
        unable = {
            "eager": (),
            "sdpa": ("attn_logit_softcapping", "attention_sinks"),
            "flex_attention": (),
            "flash_attention": ("attention_sinks", "position_embedding_type"),
            "paged": ("attn_logit_softcapping", "position_embedding_type"),
        }[implementation]
        return [field for field, active in self.attention_features.items() if active and field in unable]


def repeat_heads(states: torch.Tensor, groups: int) -> torch.Tensor:
    """Repeat every key/value head for the query heads of its group: (b, kv_heads, t, d) -> (b, heads, t, d)."""
    if groups == 1:
        return states
    batch, kv_heads, length, head_dim = states.shape
    states = states[:, :, None].expand(batch, kv_heads, groups, length, head_dim)
    return states.reshape(batch, kv_heads * groups, length, head_dim)


def multiplied_scores(
    query: torch.Tensor, key: torch.Tensor, scaling: float, position_bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """query key^T * scaling: (batch, heads, q, k), and the bias that is still to be added."""
    return torch.matmul(query, key.transpose(2, 3)) * scaling, position_bias


def batched_scores(
    query: torch.Tensor, key: torch.Tensor, scaling: float, position_bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same from keys that are contiguous by head, which rounds the queries' gradient differently (XGLM)."""
    products = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2))
    return products.unflatten(0, query.shape[:2]) * scaling, position_bias


def divided_scores(
    query: torch.Tensor, key: torch.Tensor, scaling: float, position_bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """query key^T / (1 / scaling): the same, rounded differently (GPT-J)."""
    return torch.matmul(query, key.transpose(2, 3)) / (1.0 / scaling), position_bias


def float32_divided_scores(
    query: torch.Tensor, key: torch.Tensor, scaling: float, position_bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same in float32: autocast takes the product in less (CodeGen)."""
    return torch.matmul(query, key.transpose(2, 3)).float() / (1.0 / scaling), position_bias


def fused_scores(
    query: torch.Tensor, key: torch.Tensor, scaling: float, position_bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """query key^T * scaling in one product, with no rounding in between (GPT-2)."""
    ignored = query.new_empty(())
    products = torch.baddbmm(ignored, query.flatten(0, 1), key.transpose(2, 3).flatten(0, 1), beta=0, alpha=scaling)
    return products.unflatten(0, query.shape[:2]), position_bias


def biased_scores(
    query: torch.Tensor, key: torch.Tensor, scaling: float, position_bias: torch.Tensor
) -> tuple[torch.Tensor, None]:
    """bias + query key^T * scaling in one product, with no rounding in between (BLOOM)."""
    products = torch.baddbmm(
        position_bias.expand(query.shape[0], -1, query.shape[2], -1).flatten(0, 1).to(query.dtype),
        query.flatten(0, 1),
        key.flatten(0, 1).transpose(1, 2),
        alpha=scaling,
    )
    return products.unflatten(0, query.shape[:2]), None


def float32_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    position_bias: torch.Tensor | None,
    compute_scores: Callable,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores of upcast queries and keys (GPT-J, GPT-Neo)."""
    return compute_scores(query.float(), key.float(), scaling, position_bias)


def mask_scores(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Scores (batch, heads, q, k) with what a query does not see at the lowest number.

    Args:
        mask: (batch, 1, q, k): added, if of floating point; else true or 1 where a query sees a key, as sdpa takes it.
    """
    if mask.is_floating_point():
        return scores + mask
    return scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    compute_scores: Callable = multiplied_scores,
    softmax_dtype: torch.dtype | None = torch.float32,
    see_scores: Callable = unchanged,
    see_weights: Callable = unchanged,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention written out, with every feature, in the order that transformers' flex attention has: scores, soft-cap,
    mask, bias, softmax, sinks.

    Args:
        query: (batch, heads, q, head_dim); key, value: (batch, kv_heads, k, head_dim).
        attention_mask: (batch, 1, q, k), see `mask_scores`, or `None`.
        softcap: scores become softcap * tanh(scores / softcap).
        s_aux: attention sinks, (heads,): a logit per head that takes part in the denominator alone.
        position_bias: additive, (batch or 1, heads, q or 1, k).
        compute_scores: how scale and bias enter the scores, one of the functions above.
        softmax_dtype: dtype of the weights before they are rounded to the values'; `None`: that of the scores.
        see_scores, see_weights: what passes the scores into the softmax, and the weights on from it.

    Returns:
        (batch, q, heads, head_dim) and the weights (batch, heads, q, k).
    """
    key = repeat_heads(key, module.num_key_value_groups)
    value = repeat_heads(value, module.num_key_value_groups)
    scores, position_bias = compute_scores(query, key, scaling, position_bias)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = mask_scores(scores, attention_mask)
    if position_bias is not None:
        scores = scores + position_bias
    scores = see_scores(scores)
    weights = see_weights(nn.functional.softmax(scores, dim=-1, dtype=softmax_dtype).to(value.dtype))
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = torch.matmul(weights, value)
    if s_aux is not None:
        # softmax over [scores, sink] without the sink's column: the weights times sigmoid(logsumexp - sink).
        kept = (torch.logsumexp(scores, dim=-1) - s_aux.view(1, -1, 1)).to(torch.float32).sigmoid()
        output = output * kept.unsqueeze(-1).to(output.dtype)
    return output.transpose(1, 2).contiguous(), weights


def casts_its_inputs(attention_interface: Callable, query: torch.Tensor) -> bool:
    """
    Whether autocast brings what an attention function takes to one dtype, as for sdpa: after key heads are repeated, so
    that their gradients are added up in the dtype that rotated keys have.
    """
    device = query.device.type
    return (
        attention_interface is sdpa_attention_forward
        and torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
    )


def self_attention_half(cache: Cache | None) -> Cache | None:
    """The cache that self-attention uses: the whole of it, or a decoder's half beside its cross-attention cache."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def with_source_half(cache: Cache) -> EncoderDecoderCache:
    """The cache with a half for cross-attention. That sees the source whole, also in sliding layers."""
    if not isinstance(cache, EncoderDecoderCache):
        return EncoderDecoderCache(cache, DynamicCache())
    if any(cache.cross_attention_cache.is_sliding) and not any(cache.is_updated.values()):
        cache.cross_attention_cache = DynamicCache()
    return cache


def _clamp(states: torch.Tensor, limit: float) -> torch.Tensor:
    return states.clamp(min=-limit, max=limit)


def multiply(states: torch.Tensor, factor: float) -> torch.Tensor:
    return states * factor


# score_form -> the function for eager attention
SCORES: dict[str, Callable] = {
    "multiplied": multiplied_scores,
    "batched": batched_scores,
    "divided": divided_scores,
    "divided_in_float32": float32_divided_scores,
    "fused": fused_scores,
    "biased": biased_scores,
}


class Attention(NormGuard, nn.Module):
    """
    Multi-head self-attention (MHA, GQA or MQA) without a norm on queries and keys.

    Args:
        config (`PreTrainedConfig`): kept for `config._attn_implementation` alone, which may change at run time.
        layer_idx (`int`): the layer's slot in the cache.
        q_proj, k_proj, v_proj, o_proj (`nn.Linear`): to heads, and from them.
        g_proj (`nn.Linear`): to the gate, or `None`.
        num_heads, num_key_value_heads, head_dim (`int`): sizes.
        broadcast_key_value (`bool`): leave it to the attention function to broadcast the one key/value head.
        scaling (`float`): multiplier of the scores.
        scale_query (`bool`): apply it to the queries instead.
        score_form (`str`): how eager attention combines scores, scale and bias, a key of `SCORES`.
        scores_in_float32 (`bool`): whether it upcasts queries and keys first.
        softmax_in_float32 (`bool`): whether its softmax is computed in float32, or in the scores' dtype.
        dropout (`float`): probability of dropping an attention weight.
        is_causal (`bool`): a query sees no later key.
        rotation (`Callable`): applied to (query, key, position_embeddings).
        q_norm, k_norm (`Callable`): used by the subclasses; `unchanged` here.
        sliding_window (`int`): number of keys a query sees, or `None`.
        softcap, clip (`float`): soft cap of the scores; limit of q, k and v; `None` for none.
        sinks (`bool`): learn a sink per head.
        gate (`str`): `"none"`, `"headwise"` or `"elementwise"`.
        sub_norm (`Callable`): applied before the output projection; `unchanged` for none.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        layer_idx: int,
        *,
        q_proj: nn.Linear,
        k_proj: nn.Linear,
        v_proj: nn.Linear,
        o_proj: nn.Linear,
        g_proj: nn.Linear | None,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        broadcast_key_value: bool,
        scaling: float,
        scale_query: bool,
        score_form: str,
        scores_in_float32: bool,
        softmax_in_float32: bool,
        dropout: float,
        is_causal: bool,
        rotation: Callable,
        q_norm: Callable,
        k_norm: Callable,
        sliding_window: int | None,
        softcap: float | None,
        clip: float | None,
        sinks: bool,
        gate: str,
        sub_norm: Callable,
    ):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = head_dim
        self.num_key_value_groups = 1 if broadcast_key_value else num_heads // num_key_value_heads
        self.attention_dropout = dropout
        self.is_causal = is_causal
        self.sliding_window = sliding_window
        self.scaling = 1.0 if scale_query else scaling
        self.scale_query = partial(multiply, factor=scaling) if scale_query else unchanged
        compute_scores = SCORES[score_form]
        if scores_in_float32:
            compute_scores = partial(float32_scores, compute_scores=compute_scores)
        self.eager_attention = partial(
            eager_attention_forward,
            compute_scores=compute_scores,
            softmax_dtype=torch.float32 if softmax_in_float32 else None,
        )
        self.clip = unchanged if clip is None else partial(_clamp, limit=clip)
        self.q_proj = q_proj
        self.k_proj = k_proj
        self.v_proj = v_proj
        self.o_proj = o_proj
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.sub_norm = sub_norm
        self.rotation = rotation
        # What only some backends take is passed only where it is used, so that the others need not ignore it.
        self.score_options = {} if softcap is None else {"softcap": softcap}
        self.has_sinks = sinks
        if sinks:
            self.sinks = nn.Parameter(torch.zeros(num_heads))
        self.gate = _GATES[gate]
        if g_proj is not None:
            self.g_proj = g_proj

    def project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, length, hidden_size) -> (batch, heads, length, head_dim)."""
        query = self.scale_query(self.clip(self.q_proj(hidden_states)))
        return query.view(*hidden_states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def project_key(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, length, hidden_size) -> (batch, kv_heads, length, head_dim)."""
        key = self.clip(self.k_proj(hidden_states))
        return key.view(*hidden_states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def project_value(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, length, hidden_size) -> (batch, kv_heads, length, head_dim)."""
        value = self.clip(self.v_proj(hidden_states))
        return value.view(*hidden_states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, position_embeddings: tuple[torch.Tensor, ...] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rotation(query, key, position_embeddings)

    def turn_value(self, value: torch.Tensor, position_embeddings: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
        return value

    def attend(
        self,
        hidden_states: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_bias: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores, softmax, gate and output projection: -> (batch, length, hidden_size) and the weights."""
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, self.eager_attention
        )
        if position_bias is not None:
            kwargs["position_bias"] = position_bias
        if attention_interface is not self.eager_attention:
            if not casts_its_inputs(attention_interface, query):
                # Kernels take everything in one dtype only.
                query, key = query.to(value.dtype), key.to(value.dtype)
            if position_bias is not None:
                # Flex attention reads it at every index, without broadcasting.
                position_bias = position_bias.expand(query.shape[0], -1, query.shape[2], -1)
                kwargs["position_bias"] = position_bias.to(value.dtype)
        if self.has_sinks:
            kwargs["s_aux"] = self.sinks
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **self.score_options,
            **kwargs,
        )
        # (batch, length, heads, head_dim) -> (batch, length, heads * head_dim)
        output = output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        output = self.gate(self, output, hidden_states)
        return self.o_proj(self.sub_norm(output)), weights

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, ...] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: (batch, length, hidden_size).
            position_embeddings: cos and sin, each (batch or 1, length, rotary_dim), for rotary layers.
            attention_mask: as the attention implementation takes it.
            past_key_values: cache of keys and values, updated in place.
            kwargs: reach the attention implementation (`position_bias`, FlashAttention's `cu_seq_lens_q`, ...).
        """
        query = self.project_query(hidden_states)
        key = self.project_key(hidden_states)
        value = self.project_value(hidden_states)
        query, key = self.rotate(query, key, position_embeddings)
        value = self.turn_value(value, position_embeddings)
        cache = self_attention_half(past_key_values)
        if cache is not None:
            key, value = cache.update(key.to(value.dtype), value, self.layer_idx)
        # Of continuous batching; before transformers 5.24 the attention implementation updates it.
        if CACHE in kwargs:
            key, value = kwargs.pop(CACHE).update(key, value, self.layer_idx, kwargs=kwargs)
        return self.attend(hidden_states, query, key, value, attention_mask, **kwargs)


class HeadNormAttention(Attention):
    """Attention with a norm on every head of queries and keys (Qwen 3, Gemma 3; own weights per head: Cohere)."""

    def project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query = self.clip(self.q_proj(hidden_states)).view(*hidden_states.shape[:-1], -1, self.head_dim)
        return self.scale_query(self.q_norm(query)).transpose(1, 2)

    def project_key(self, hidden_states: torch.Tensor) -> torch.Tensor:
        key = self.clip(self.k_proj(hidden_states)).view(*hidden_states.shape[:-1], -1, self.head_dim)
        return self.k_norm(key).transpose(1, 2)


class HeadsFirstNormAttention(Attention):
    """Attention with a norm on every head of queries and keys, heads before positions (Phi)."""

    def project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query = self.clip(self.q_proj(hidden_states)).view(*hidden_states.shape[:-1], -1, self.head_dim)
        return self.scale_query(self.q_norm(query.transpose(1, 2)))

    def project_key(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.k_norm(super().project_key(hidden_states))


class FullNormAttention(Attention):
    """Attention with one norm over all heads of queries and one over all of keys (OLMo 2)."""

    def project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query = self.scale_query(self.q_norm(self.clip(self.q_proj(hidden_states))))
        return query.view(*hidden_states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def project_key(self, hidden_states: torch.Tensor) -> torch.Tensor:
        key = self.k_norm(self.clip(self.k_proj(hidden_states)))
        return key.view(*hidden_states.shape[:-1], -1, self.head_dim).transpose(1, 2)


class NormAfterRotationAttention(Attention):
    """Attention with a norm on every head of queries and keys after the rotation (HunYuan, nanochat)."""

    def rotate(self, query, key, position_embeddings):
        query, key = self.rotation(query, key, position_embeddings)
        return self.q_norm(query), self.k_norm(key)


class TurnedValueAttention(Attention):
    """Attention that rotates values as it does keys (RoFormer)."""

    def turn_value(self, value, position_embeddings):
        return self.rotation(value, value, position_embeddings)[1]


class CrossAttentionMixin:
    """Keys and values come from an encoder; they are projected once and kept in the cache's cross-attention half."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: (batch, length, hidden_size).
            encoder_hidden_states: (batch, source length, key_value_size).
            encoder_attention_mask: as the attention implementation takes it.
            past_key_values: self- and cross-attention cache.
        """
        # These describe the decoder's own positions; `is_causal` comes from its config.
        for name in ("position_embeddings", "position_bias", "attention_mask", "is_causal"):
            kwargs.pop(name, None)
        query = self.project_query(hidden_states)
        is_cached = past_key_values is not None and past_key_values.is_updated.get(self.layer_idx)
        if is_cached:
            layer = past_key_values.cross_attention_cache.layers[self.layer_idx]
            key, value = layer.keys, layer.values
        else:
            key = self.project_key(encoder_hidden_states)
            value = self.project_value(encoder_hidden_states)
            if past_key_values is not None:
                key, value = past_key_values.cross_attention_cache.update(key, value, self.layer_idx)
                past_key_values.is_updated[self.layer_idx] = True
        return self.attend(hidden_states, query, key, value, encoder_attention_mask, **kwargs)


class CrossAttention(CrossAttentionMixin, Attention):
    """Cross-attention without a norm on queries and keys."""


class HeadNormCrossAttention(CrossAttentionMixin, HeadNormAttention):
    """Cross-attention with a norm on every head."""


class FullNormCrossAttention(CrossAttentionMixin, FullNormAttention):
    """Cross-attention with norms over all heads."""


@states(SHAPES, Attention)
def attention_shapes(num_heads: int, sinks: bool, **_: Any) -> dict[str, tuple[int, ...]]:
    return {"sinks": (num_heads,)} if sinks else {}


@states(FLOPS, Attention)
def self_attention_flops(
    call: Call, num_heads: int, head_dim: int, is_causal: bool, sliding_window: int | None, **_: Any
) -> int:
    """Scores, and weights times values."""
    return 4 * call.batch * num_heads * head_dim * seen_pairs(call, is_causal, sliding_window)


def seen_pairs(call: Call, is_causal: bool, sliding_window: int | None) -> int:
    """Pairs of a query and a key in one sequence; a sliding layer's cache keeps one key less than its window."""
    past = call.past if sliding_window is None else min(call.past, sliding_window - 1)
    if not call.masked:
        return call.length * (past + call.length)
    if not is_causal:
        # An encoder's window counts the token itself, which has one side of it.
        reach = min(call.length if sliding_window is None else sliding_window - 1, call.length)
        return call.length + reach * (reach - 1) + 2 * (call.length - reach) * reach
    most = past + call.length if sliding_window is None else sliding_window
    growing = max(min(most - past, call.length), 0)
    return growing * past + growing * (growing + 1) // 2 + (call.length - growing) * most


@states(FLOPS, CrossAttentionMixin)
def cross_attention_flops(call: Call, num_heads: int, head_dim: int, **_: Any) -> int:
    return 4 * call.batch * num_heads * head_dim * call.length * call.source


@states(CALLS, CrossAttentionMixin)
def calls_in_cross_attention(call: Call, name: str, **_: Any) -> Call:
    if not call.source:
        return call.of_length(0)
    is_source = name in ("k_proj", "k_norm", "v_proj")
    return call.of_length(0 if call.source_is_cached else call.source) if is_source else call


def _no_gate(module: Attention, output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    return output


def _headwise_gate(module: Attention, output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """One gate per head: (batch, length, heads * head_dim) -> the same."""
    gate = torch.sigmoid(module.g_proj(hidden_states)).unsqueeze(-1)
    heads = output.view(*output.shape[:-1], -1, module.head_dim)
    return (heads * gate).flatten(-2)


def _elementwise_gate(module: Attention, output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    return output * torch.sigmoid(module.g_proj(hidden_states))


_GATES: dict[str, Callable] = {"none": _no_gate, "headwise": _headwise_gate, "elementwise": _elementwise_gate}
