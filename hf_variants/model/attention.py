"""Who attends to whom and how: self- and cross-attention with every option of the config."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def repeat_heads(states: torch.Tensor, groups: int) -> torch.Tensor:
    """Repeat every key/value head for the query heads of its group: (b, kv_heads, t, d) -> (b, heads, t, d)."""
    if groups == 1:
        return states
    batch, kv_heads, length, head_dim = states.shape
    states = states[:, :, None].expand(batch, kv_heads, groups, length, head_dim)
    return states.reshape(batch, kv_heads * groups, length, head_dim)


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
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention written out, with every feature, in the order that transformers' flex attention has: scores, soft-cap,
    mask, bias, softmax in float32, sinks.

    Args:
        query: (batch, heads, q, head_dim); key, value: (batch, kv_heads, k, head_dim).
        attention_mask: additive, (batch, 1, q, k) or `None`.
        softcap: scores become softcap * tanh(scores / softcap).
        s_aux: attention sinks, (heads,): a logit per head that takes part in the denominator alone.
        position_bias: additive, (batch, heads, q, k).

    Returns:
        (batch, q, heads, head_dim) and the weights (batch, heads, q, k).
    """
    key = repeat_heads(key, module.num_key_value_groups)
    value = repeat_heads(value, module.num_key_value_groups)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    if position_bias is not None:
        scores = scores + position_bias
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = torch.matmul(weights, value)
    if s_aux is not None:
        # softmax over [scores, sink] without the sink's column: the weights times sigmoid(logsumexp - sink).
        kept = (torch.logsumexp(scores, dim=-1) - s_aux.view(1, -1, 1)).to(torch.float32).sigmoid()
        output = output * kept.unsqueeze(-1).to(output.dtype)
    return output.transpose(1, 2).contiguous(), weights


def _identity(states: torch.Tensor) -> torch.Tensor:
    return states


def _clamp(states: torch.Tensor, limit: float) -> torch.Tensor:
    return states.clamp(min=-limit, max=limit)


def _multiply(states: torch.Tensor, factor: float) -> torch.Tensor:
    return states * factor


class Attention(nn.Module):
    """
    Multi-head self-attention (MHA, GQA or MQA) without a norm on queries and keys.

    Args:
        config (`PreTrainedConfig`): kept for `config._attn_implementation` alone, which may change at run time.
        layer_idx (`int`): the layer's slot in the cache.
        hidden_size, num_heads, num_key_value_heads, head_dim (`int`): sizes.
        bias, output_bias (`bool`): biases of q/k/v and of the output projection.
        scaling (`float`): multiplier of the scores.
        scale_query (`bool`): apply it to the queries instead.
        dropout (`float`): probability of dropping an attention weight.
        is_causal (`bool`): a query sees no later key.
        rotation (`nn.Module`): applied to (query, key, position_embeddings).
        q_norm, k_norm (`nn.Module`): used by the subclasses; `nn.Identity()` here.
        sliding_window (`int`): number of keys a query sees, or `None`.
        softcap, clip (`float`): soft cap of the scores; limit of q, k and v; `None` for none.
        sinks (`bool`): learn a sink per head.
        gate (`str`): `"none"`, `"headwise"` or `"elementwise"`.
        sub_norm (`nn.Module`): applied before the output projection; `nn.Identity()` for none.
        key_value_size (`int`): width of what keys and values are projected from, for cross-attention.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        layer_idx: int,
        *,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        bias: bool,
        output_bias: bool,
        scaling: float,
        scale_query: bool,
        dropout: float,
        is_causal: bool,
        rotation: nn.Module,
        q_norm: nn.Module,
        k_norm: nn.Module,
        sliding_window: int | None,
        softcap: float | None,
        clip: float | None,
        sinks: bool,
        gate: str,
        sub_norm: nn.Module,
        key_value_size: int | None = None,
    ):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = head_dim
        self.num_key_value_groups = num_heads // num_key_value_heads
        self.attention_dropout = dropout
        self.is_causal = is_causal
        self.sliding_window = sliding_window
        self.scaling = 1.0 if scale_query else scaling
        self.scale_query = partial(_multiply, factor=scaling) if scale_query else _identity
        self.clip = _identity if clip is None else partial(_clamp, limit=clip)
        key_value_size = key_value_size or hidden_size
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(key_value_size, num_key_value_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(key_value_size, num_key_value_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=output_bias)
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
        if gate != "none":
            self.g_proj = nn.Linear(hidden_size, num_heads * (head_dim if gate == "elementwise" else 1), bias=False)

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

    def attend(
        self,
        hidden_states: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores, softmax, gate and output projection: -> (batch, length, hidden_size) and the weights."""
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
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
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        return self.attend(hidden_states, query, key, value, attention_mask, **kwargs)


class HeadNormAttention(Attention):
    """Attention with a norm on every head of queries and keys (Qwen 3, Gemma 3; own weights per head: Cohere)."""

    def project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query = self.clip(self.q_proj(hidden_states)).view(*hidden_states.shape[:-1], -1, self.head_dim)
        return self.scale_query(self.q_norm(query)).transpose(1, 2)

    def project_key(self, hidden_states: torch.Tensor) -> torch.Tensor:
        key = self.clip(self.k_proj(hidden_states)).view(*hidden_states.shape[:-1], -1, self.head_dim)
        return self.k_norm(key).transpose(1, 2)


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
        # These describe the decoder's own positions.
        for name in ("position_embeddings", "position_bias", "attention_mask"):
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
