"""The models: one stack (decoder or encoder) with its heads, built from a `VariantConfig`."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import Attention
from .block import Block, LearnedScaleResidual
from .builder import (
    build_block,
    build_embedding_norm,
    build_embedding_projection,
    build_final_norm,
    build_loss,
    build_norm,
    build_output_projection,
    build_position_bias,
    build_position_ids,
    build_positions,
    build_rotary_embeddings,
    build_token_embedding,
    build_token_types,
    output_size,
)
from .configuration_variant import VariantConfig
from .normalization import Float32LayerNorm, PerHeadLayerNorm, ZeroCenteredLayerNorm, ZeroCenteredRMSNorm


CAUSAL_MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}
BIDIRECTIONAL_MASKS = {
    "full_attention": create_bidirectional_mask,
    "sliding_attention": create_bidirectional_sliding_window_mask,
}


def slice_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """
    The positions whose logits are asked for: the last n (all for 0), those at the indices of a 1D tensor, or, for a
    2D tensor, row by row. (batch, length, width) -> (batch, kept, width).
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, slice(-logits_to_keep, None) if logits_to_keep else slice(None), :]
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep, :]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep].unsqueeze(0)
    rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)[:, None]
    return hidden_states[rows, logits_to_keep]


class VariantPreTrainedModel(PreTrainedModel):
    """What every model has in common: initialisation, and which attention backends a config can use."""

    config: VariantConfig
    config_class = VariantConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "SequentialBlock", "SequentialCrossBlock", "ParallelBlock", "ParallelCrossBlock", "AttentionBlock",
        "FeedForwardBlock",
    ]  # fmt: skip
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": Block,
        "attentions": OutputRecorder(Attention, index=1, layer_name="self_attn"),
    }

    def __init__(self, config: VariantConfig, *args, **kwargs):
        # Before transformers chooses a backend: an unsupported one is refused there, by name, or not chosen.
        self._supports_sdpa = not config.unsupported_attention_features("sdpa")
        self._supports_flash_attn = not config.unsupported_attention_features("flash_attention")
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if hasattr(module, "reset_buffers"):
            module.reset_buffers()
        if isinstance(module, (ZeroCenteredRMSNorm, ZeroCenteredLayerNorm)) or getattr(module, "unit_offset", False):
            init.zeros_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (Float32LayerNorm, PerHeadLayerNorm)):
            init.ones_(module.weight)
        elif isinstance(module, LearnedScaleResidual):
            init.constant_(module.scale, module.init)
        elif isinstance(module, nn.Linear) and hasattr(module, "xavier_gain"):
            init.xavier_normal_(module.weight, gain=module.xavier_gain)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, Attention):
            if module.has_sinks:
                init.normal_(module.sinks, mean=0.0, std=self.config.initializer_range)
        elif "RotaryEmbedding" not in type(module).__name__:
            super()._init_weights(module)


class VariantModel(VariantPreTrainedModel):
    """The stack without a head: token ids to hidden states."""

    def __init__(self, config: VariantConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = build_token_embedding(config)
        self.token_projection = build_embedding_projection(config, "before_positions")
        self.token_types = build_token_types(config)
        self.embed_positions = build_positions(config)
        self.embedding_norm = build_embedding_norm(config)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout) if config.embedding_dropout else nn.Identity()
        self.embedding_projection = build_embedding_projection(config, "after_norm")
        self.position_ids_of = build_position_ids(config)
        self.rotary_emb, self.rotary_names = build_rotary_embeddings(config)
        self.position_bias = build_position_bias(config)
        self.layers = nn.ModuleList([build_block(config, i) for i in range(config.num_hidden_layers)])
        self.norm = build_final_norm(config)
        self.output_projection = build_output_projection(config)
        self.layerdrop = config.layerdrop
        self.mask_functions = CAUSAL_MASKS if config.is_causal else BIDIRECTIONAL_MASKS
        self.gradient_checkpointing = False
        self.post_init()

    def create_masks(
        self,
        attention_mask: torch.Tensor | dict | None,
        inputs_embeds: torch.Tensor,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None,
    ) -> dict[str, torch.Tensor | None]:
        """One mask per attention type that the stack has."""
        if isinstance(attention_mask, dict):
            return attention_mask
        arguments = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
        }
        if self.config.is_causal:
            arguments["position_ids"] = position_ids
        return {kind: self.mask_functions[kind](**arguments) for kind in dict.fromkeys(self.config.layer_types)}

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        token_type_ids: torch.LongTensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: (batch, length).
            attention_mask: (batch, past + length) with 1 at real tokens, a 4D mask, or one 4D mask per layer type.
            position_ids: (batch, length). Ids that restart without an `attention_mask` mean packed documents, which
                do not see each other.
            past_key_values: a cache, updated in place.
            inputs_embeds: (batch, length, embedding_size), instead of `input_ids`.
            token_type_ids: (batch, length).
            encoder_hidden_states: (batch, source length, width), for cross-attention.
            encoder_attention_mask: as the attention implementation takes it.

        Returns:
            `last_hidden_state` (batch, length, hidden_size) and the cache; `hidden_states` and `attentions` on request.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("`input_ids` and `inputs_embeds` are both set or both missing. Pass exactly one of them.")
        if "cache" in kwargs:
            self._refuse_continuous_batching()
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        # Before a new cache exists, so that packed documents are told apart whether or not one is wanted.
        masks = self.create_masks(attention_mask, inputs_embeds, past_key_values, position_ids)
        padding_mask = attention_mask if torch.is_tensor(attention_mask) and attention_mask.ndim == 2 else None
        if use_cache and past_key_values is None and self.config.is_causal:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = self.position_ids_of(input_ids, inputs_embeds, padding_mask, past)

        hidden_states = self.token_types(self.token_projection(inputs_embeds), token_type_ids)
        hidden_states = self.embed_positions(hidden_states, position_ids)
        hidden_states = self.embedding_projection(self.embedding_dropout(self.embedding_norm(hidden_states)))

        position_embeddings = {name: table(hidden_states, position_ids) for name, table in self.rotary_emb.items()}
        position_biases = self.position_bias(hidden_states, past_key_values, padding_mask, self.config.layer_types)
        for layer_idx, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            if self.layerdrop and self.training and torch.rand(()) < self.layerdrop:
                continue
            if position_biases[layer_idx] is not None:
                kwargs["position_bias"] = position_biases[layer_idx]
            hidden_states = layer(
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                attention_mask=masks[self.config.layer_types[layer_idx]],
                position_embeddings=position_embeddings.get(self.rotary_names[layer_idx]),
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        hidden_states = self.output_projection(self.norm(hidden_states))
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)

    def _refuse_continuous_batching(self) -> None:
        fields = self.config.unsupported_attention_features("paged")
        if fields:
            raise ValueError(
                f"Continuous batching ignores what {', '.join(f'`{field}`' for field in fields)} of this config asks "
                "for. Use `generate` instead of `generate_batch`."
            )


class LMHeadTransform(nn.Module):
    """
    Dense layer, activation and norm in front of an LM head (BERT, ModernBERT).

    Shape: (..., hidden_size) -> (..., embedding_size).
    """

    def __init__(self, hidden_size: int, embedding_size: int, bias: bool, act: str, norm: nn.Module):
        super().__init__()
        self.dense = nn.Linear(hidden_size, embedding_size, bias=bias)
        self.act_fn = ACT2FN[act]
        self.norm = norm

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(self.act_fn(self.dense(hidden_states)))


class LogitScaling(nn.Module):
    """logits * scale, then cap * tanh(logits / cap); either part is optional (Cohere, Gemma 2)."""

    def __init__(self, scale: float, softcap: float | None):
        super().__init__()
        self.scale = scale
        self.softcap = softcap

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def build_lm_head_transform(config: VariantConfig) -> nn.Module:
    if not config.lm_head_transform:
        return nn.Identity()
    return LMHeadTransform(
        config.hidden_size,
        config.embedding_size,
        config.lm_head_transform_bias,
        config.lm_head_transform_act,
        build_norm(config, config.embedding_size),
    )


def build_lm_head(config: VariantConfig) -> nn.Linear:
    width = config.embedding_size if config.lm_head_transform else output_size(config)
    return nn.Linear(width, config.vocab_size, bias=config.lm_head_bias)


class VariantForCausalLM(VariantPreTrainedModel, GenerationMixin):
    """A decoder with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: VariantConfig):
        super().__init__(config)
        if not config.is_causal:
            raise ValueError(
                "`is_causal` is False, so every token sees those it would have to predict. "
                "Use `VariantForMaskedLM` for an encoder, or set `is_causal=True`."
            )
        self.model = VariantModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head_transform = build_lm_head_transform(config)
        self.lm_head = build_lm_head(config)
        self.logit_scaling = LogitScaling(config.logit_scale, config.final_logit_softcapping)
        if (loss := build_loss(config, shifted=True)) is not None:
            self.loss_function = loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds: see `VariantModel`.
            labels: (batch, length), -100 where nothing is scored; shifted here.
            logits_to_keep: compute logits for the last n positions only (0: all), or at these indices.

        Returns:
            `logits` (batch, kept length, vocab_size), the cache, and `loss` if there are labels.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = slice_positions(outputs.last_hidden_state, logits_to_keep)
        logits = self.logit_scaling(self.lm_head(self.lm_head_transform(hidden_states)))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class VariantForSequenceClassification(GenericForSequenceClassification, VariantPreTrainedModel):
    """A decoder with a classifier on the last token that is not padding."""


class VariantForTokenClassification(GenericForTokenClassification, VariantPreTrainedModel):
    """A stack with a classifier on every token."""


class VariantForQuestionAnswering(GenericForQuestionAnswering, VariantPreTrainedModel):
    """A stack with a span classifier: start and end logits for every token."""


__all__ = [
    "VariantForCausalLM",
    "VariantForQuestionAnswering",
    "VariantForSequenceClassification",
    "VariantForTokenClassification",
    "VariantModel",
    "VariantPreTrainedModel",
]
