"""From config to modules: the only place where a config is read to decide what is built."""

import json
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from .attention import (
    Attention,
    CrossAttention,
    FullNormAttention,
    FullNormCrossAttention,
    HeadNormAttention,
    HeadNormCrossAttention,
    HeadsFirstNormAttention,
    NormAfterRotationAttention,
    multiply,
)
from .block import (
    AttentionBlock,
    Block,
    FeedForwardBlock,
    LearnedScaleResidual,
    ParallelBlock,
    ParallelCrossBlock,
    Residual,
    SequentialBlock,
    SequentialCrossBlock,
    any_infinite,
    any_not_finite,
    clamp_float16,
)
from .configuration_variant import VariantConfig
from .embedding import (
    NoTokenTypes,
    RoundedScaleEmbedding,
    ScaledEmbedding,
    TokenTypes,
    add_types_among_tokens,
    multiply_rounded,
    no_types_among_tokens,
)
from .feed_forward import FeedForward, FusedGatedFeedForward, GatedFeedForward
from .heads import POOLINGS, DenseTransform, InputScaling, LogitScaling, NormalizedLinear, Pooler
from .linear import OwnDtypeLinear, UnfusedBiasLinear
from .losses import causal_lm_loss, token_loss
from .normalization import make_norm, unchanged
from .positions import (
    AlibiBias,
    Float32RotaryEmbedding,
    GrowingSinusoidalPositions,
    InputIdPaddingMask,
    InputIdPositions,
    LearnedFromSinusoids,
    LearnedPositions,
    NoPositionBias,
    NoPositions,
    NoRotation,
    PaddingMaskSource,
    PartialRotation,
    PositionIdSource,
    PositionsFirstRotation,
    QueryScalingRotaryEmbedding,
    QueryScalingRotation,
    RelativeBias,
    RotaryEmbedding,
    Rotation,
    SinusoidalPositions,
    StoredRotaryEmbedding,
    StoredSinusoidalPositions,
    attention_mask_positions,
    no_padding_mask,
    sequence_positions,
)


# norm_placement -> the slots that hold a norm
NORM_SLOTS = {
    "pre": ("pre_norm",),
    "post": ("post_norm",),
    "branch": ("branch_norm",),
    "sandwich": ("pre_norm", "branch_norm"),
    "deepnorm": ("post_norm",),
}

# clamp_in_float16 -> what is done to a sublayer's or a block's output
FLOAT16_LIMITS: dict[str, Callable] = {
    "none": unchanged,
    "sublayers": partial(clamp_float16, overflows=any_infinite),
    "blocks": clamp_float16,
    "infinite_blocks": partial(clamp_float16, overflows=any_not_finite),
}

SELF_ATTENTION = {
    "none": Attention,
    "head": HeadNormAttention,
    "per_head": HeadNormAttention,
    "full": FullNormAttention,
}
CROSS_ATTENTION = {
    "none": CrossAttention,
    "head": HeadNormCrossAttention,
    "per_head": HeadNormCrossAttention,
    "full": FullNormCrossAttention,
}


def build_norm(config: VariantConfig, dim: int) -> nn.Module:
    """A norm of the config's kind over `dim` channels."""
    norm = make_norm(dim, **config.norm_arguments())
    if config.initializer_norm_ones:
        norm.init_weight = 1.0
    elif config.initializer_scheme == "fan_in" and config.norm_affine and config.norm_type != "dynamic_tanh":
        norm.init_weight = config.initializer_range - float(config.norm_unit_offset)
    return norm


def build_qk_norm(config: VariantConfig, num_heads: int) -> Callable:
    """The norm on `num_heads` heads of queries or keys; `unchanged` for none."""
    if config.qk_norm == "none":
        return unchanged
    shape = {
        "head": config.head_dim,
        "per_head": (num_heads, config.head_dim),
        "full": num_heads * config.head_dim,
    }[config.qk_norm]
    return make_norm(shape, **config.qk_norm_arguments())


def build_rotation(config: VariantConfig, rope_parameters: dict | None) -> Callable:
    """How one layer turns its queries and keys, with its flat RoPE parameters or `None`."""
    if rope_parameters is None:
        return NoRotation()
    # "proportional" spreads a table of full width, with zero frequencies, over all channels. A factor of 1 is a split
    # with nothing left over, as in the native classes that read one: without it gradients round differently.
    partial_table = (
        rope_parameters.get("partial_rotary_factor") is not None and rope_parameters["rope_type"] != "proportional"
    )
    # Tables in float32 promote the products by themselves, each with its own rounding of the gradient (OLMo 2).
    upcast = config.rope_in_float32 and not config.rope_table_in_float32
    rotation = (PartialRotation if partial_table else Rotation)(
        config.rope_interleaved, upcast, round_result=not config.rope_result_in_float32
    )
    if config.heads_first_from == "scores":
        return PositionsFirstRotation(rotation)
    return QueryScalingRotation(rotation) if "llama_4_scaling_beta" in rope_parameters else rotation


def build_rotary_embeddings(config: VariantConfig) -> tuple[nn.ModuleDict, list[str | None]]:
    """The distinct tables of angles, and for every layer the name of its own (or `None`)."""
    tables, names, known = nn.ModuleDict(), [], {}
    for layer_idx, layer in enumerate(config.per_layer_config):
        parameters = config.rope_parameters_of(layer_idx)
        if parameters is None:
            names.append(None)
            continue
        key = json.dumps([parameters, layer.head_dim], sort_keys=True, default=str)
        if key not in known:
            known[key] = f"table_{len(known)}"
            table_class = StoredRotaryEmbedding if config.rope_table_stored else RotaryEmbedding
            if config.rope_frequencies_in_float32:
                table_class = Float32RotaryEmbedding
            if "llama_4_scaling_beta" in parameters:
                table_class = QueryScalingRotaryEmbedding
            tables[known[key]] = table_class(
                layer,
                parameters,
                interleaved=config.rope_interleaved,
                table_in_float32=config.rope_table_in_float32,
                reversed=config.rope_reversed,
            )
        names.append(known[key])
    return tables, names


def linear_class(config: VariantConfig) -> type[nn.Linear]:
    """Of the projections inside a layer."""
    return UnfusedBiasLinear if config.unfused_bias else nn.Linear


def _attention_arguments(config: VariantConfig, layer_idx: int) -> dict:
    """What self- and cross-attention have in common, from one layer's resolved config."""
    scaling = config.head_dim**-0.5 if config.attention_scaling is None else config.attention_scaling
    return {
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "bias": config.attention_bias,
        "output_bias": config.attention_output_bias,
        "linear_class": linear_class(config),
        "broadcast_key_value": config.broadcast_key_value,
        "scaling": scaling / (layer_idx + 1) if config.scale_attn_by_inverse_layer_idx else scaling,
        "scale_query": config.scale_query,
        "score_form": config.attention_score_form,
        "scores_in_float32": config.attention_scores_in_float32,
        "softmax_in_float32": config.attention_softmax_in_float32,
        "dropout": config.attention_dropout,
        "q_norm": build_qk_norm(config, config.num_attention_heads),
        "k_norm": build_qk_norm(config, config.num_key_value_heads),
        "softcap": config.attn_logit_softcapping,
        "clip": config.clip_qkv,
        "sinks": config.attention_sinks,
        "gate": config.attention_gate,
        "sub_norm": (
            build_norm(config, config.num_attention_heads * config.head_dim)
            if config.attention_sub_norm
            else unchanged
        ),
    }


def build_self_attention(config: VariantConfig, layer_idx: int) -> Attention:
    layer = config.per_layer_config[layer_idx]
    window = None
    if config.layer_types[layer_idx] == "sliding_attention":
        # FlashAttention counts the current token on either side; an encoder's window does not (ModernBERT).
        window = config.sliding_window + (0 if config.is_causal else 1)
    attention_class = SELF_ATTENTION[layer.qk_norm]
    if layer.qk_norm_after_rope:
        attention_class = NormAfterRotationAttention
    elif config.heads_first_from == "norm":
        attention_class = HeadsFirstNormAttention
    return attention_class(
        config,
        layer_idx,
        is_causal=config.is_causal,
        rotation=build_rotation(config, config.rope_parameters_of(layer_idx)),
        sliding_window=window,
        **_attention_arguments(layer, layer_idx),
    )


def build_cross_attention(config: VariantConfig, layer_idx: int) -> Attention:
    layer = config.per_layer_config[layer_idx]
    return CROSS_ATTENTION[layer.qk_norm](
        config,
        layer_idx,
        is_causal=False,
        rotation=NoRotation(),
        sliding_window=None,
        key_value_size=config.cross_attention_hidden_size or config.hidden_size,
        **_attention_arguments(layer, layer_idx),
    )


def build_feed_forward(config: VariantConfig) -> FeedForward:
    """The feed-forward network of one layer's resolved config."""
    gated_class = FusedGatedFeedForward if config.fused_gate_up else GatedFeedForward
    return (gated_class if config.ffn_type == "glu" else FeedForward)(
        config.hidden_size,
        config.intermediate_size,
        hidden_act=config.hidden_act,
        bias=config.mlp_bias,
        output_bias=config.mlp_output_bias,
        linear_class=linear_class(config),
        output_class=OwnDtypeLinear if config.ffn_output_in_float32 else linear_class(config),
        dropout=config.activation_dropout,
        sub_norm=build_norm(config, config.intermediate_size) if config.ffn_sub_norm else unchanged,
    )


def build_residual(config: VariantConfig, sublayer: str) -> Residual:
    """How the branch of `sublayer` joins the residual stream."""
    # Whether `residual_dropout` applies, or a probability of the branch's own.
    own = config.ffn_residual_dropout if sublayer == "mlp" else config.attention_residual_dropout
    dropout = own * config.residual_dropout if isinstance(own, bool) else own
    if config.parallel_block != "none" and config.dropout_after_sum:
        dropout = 0.0
    if config.learned_scale_type != "none":
        shape = (config.hidden_size,) if config.learned_scale_type == "channel" else ()
        return LearnedScaleResidual(shape, config.layer_scale_init, dropout=dropout)
    return Residual(
        dropout=dropout,
        branch_multiplier=config.residual_multiplier,
        residual_scale=config.deepnorm_alpha if config.norm_placement == "deepnorm" else 1.0,
    )


def build_slots(config: VariantConfig, sublayer: str, skip_pre_norm: bool) -> dict[str, Callable]:
    """The norm slots and the residual around `sublayer`."""
    filled = set(NORM_SLOTS[config.norm_placement]) - ({"pre_norm"} if skip_pre_norm else set())
    slots: dict[str, Callable] = {
        slot: build_norm(config, config.hidden_size) if slot in filled else unchanged
        for slot in ("pre_norm", "branch_norm", "post_norm")
    }
    slots["residual"] = build_residual(config, sublayer)
    return slots


def build_block(config: VariantConfig, layer_idx: int) -> Block:
    """Layer `layer_idx` of the stack."""
    layer = config.per_layer_config[layer_idx]
    skipped = set(getattr(layer, "skip", ()))
    sublayers: dict[str, nn.Module] = {}
    if "self_attn" not in skipped:
        sublayers["self_attn"] = build_self_attention(config, layer_idx)
    if layer.add_cross_attention:
        sublayers["cross_attn"] = build_cross_attention(config, layer_idx)
    if "mlp" not in skipped:
        sublayers["mlp"] = build_feed_forward(layer)
    slots = {
        name: build_slots(
            layer, name, skip_pre_norm=name == "self_attn" and layer_idx == 0 and not layer.first_layer_pre_norm
        )
        for name in sublayers
    }
    if layer.norm_placement == "deepnorm":
        _set_deepnorm_gains(sublayers, layer.deepnorm_beta)
    _set_initial_stds(sublayers, layer, config)
    if layer.parallel_block != "none":
        return (ParallelCrossBlock if layer.add_cross_attention else ParallelBlock)(
            sublayers,
            slots,
            shared_norm=layer.parallel_block == "shared_norm",
            residual_first=layer.parallel_sum_order == "residual_first",
            sum_dropout=layer.residual_dropout if layer.dropout_after_sum else 0.0,
        )
    block_class = SequentialCrossBlock if layer.add_cross_attention else SequentialBlock
    if skipped:
        block_class = FeedForwardBlock if "self_attn" in skipped else AttentionBlock
    limit = FLOAT16_LIMITS[config.clamp_in_float16]
    return block_class(
        sublayers,
        slots,
        layer.residual_from_norm,
        layer.ffn_chunk_size,
        limit_attention=limit if config.clamp_in_float16 == "sublayers" or "mlp" in skipped else unchanged,
        limit_output=limit,
    )


def _set_initial_stds(sublayers: dict[str, nn.Module], layer: VariantConfig, config: VariantConfig) -> None:
    """The standard deviations of a layer's new matrices, where they are not `initializer_range`."""
    size, heads = layer.hidden_size, layer.num_attention_heads * layer.head_dim
    at_the_end = (2 * config.num_hidden_layers) ** -0.5
    factors = {
        "normal": {},
        "depth_scaled": dict.fromkeys(("o_proj", "down_proj"), at_the_end),
        "depth_scaled_attention": {"o_proj": at_the_end},
        "depth_scaled_and_heads": dict.fromkeys(("o_proj", "down_proj"), at_the_end),
        "fan_in": {
            **dict.fromkeys(("k_proj", "v_proj", "g_proj", "gate_proj", "up_proj"), size**-0.5),
            # With the scale that T5's scores lack.
            "q_proj": (size * layer.head_dim) ** -0.5,
            "o_proj": heads**-0.5,
            "down_proj": layer.intermediate_size**-0.5,
        },
    }[config.initializer_scheme]
    for sublayer in sublayers.values():
        for name, module in sublayer.named_children():
            if name in factors:
                module.init_std = config.initializer_range * factors[name]


def _set_deepnorm_gains(sublayers: dict[str, nn.Module], beta: float) -> None:
    """DeepNorm's Xavier gains (figure 2 of the paper): beta for values, outputs and the FFN, 1 for queries and keys."""
    for sublayer in sublayers.values():
        for name, module in sublayer.named_children():
            if isinstance(module, nn.Linear):
                module.xavier_gain = 1.0 if name in ("q_proj", "k_proj", "g_proj") else beta


def build_token_embedding(config: VariantConfig) -> nn.Embedding:
    padding_idx = config.pad_token_id if config.padding_embedding_frozen else None
    if config.embedding_multiplier == 1.0 or config.embedding_multiplier_position == "stack":
        return nn.Embedding(config.vocab_size, config.embedding_size, padding_idx)
    embedding_class = RoundedScaleEmbedding if config.embedding_multiplier_in_weight_dtype else ScaledEmbedding
    return embedding_class(config.vocab_size, config.embedding_size, padding_idx, config.embedding_multiplier)


def build_embedding_multiplier(config: VariantConfig) -> Callable:
    """What the stack multiplies its token embeddings by."""
    if config.embedding_multiplier == 1.0 or config.embedding_multiplier_position != "stack":
        return unchanged
    multiply_by = multiply_rounded if config.embedding_multiplier_in_weight_dtype else multiply
    return partial(multiply_by, factor=config.embedding_multiplier)


def _width_of_sum(config: VariantConfig) -> int:
    """Width at which token, type and position embeddings are added."""
    projected = config.embedding_projection_position == "before_positions"
    return config.hidden_size if projected else config.embedding_size


def build_embedding_projection(config: VariantConfig, position: str) -> Callable:
    """The projection from `embedding_size` to `hidden_size`, if it stands at this position."""
    if config.embedding_size == config.hidden_size or config.embedding_projection_position != position:
        return unchanged
    return nn.Linear(config.embedding_size, config.hidden_size, bias=config.embedding_projection_bias)


def build_token_types(config: VariantConfig) -> nn.Module:
    return TokenTypes(config.type_vocab_size, _width_of_sum(config)) if config.type_vocab_size else NoTokenTypes()


def build_types_among_tokens(config: VariantConfig) -> Callable:
    """Token types that are looked up among the tokens, if they are."""
    among_tokens = config.token_type_table == "tokens" and not config.type_vocab_size
    return add_types_among_tokens if among_tokens else no_types_among_tokens


def build_task_types(config: VariantConfig) -> nn.Module:
    if not config.task_type_vocab_size:
        return NoTokenTypes()
    return TokenTypes(config.task_type_vocab_size, _width_of_sum(config))


def build_positions(config: VariantConfig) -> nn.Module:
    """What is added to the embeddings."""
    width = _width_of_sum(config)
    if config.position_embedding_type == "learned":
        has_padding_row = config.position_ids_source == "input_ids" and config.padding_embedding_frozen
        padding_idx = config.pad_token_id if has_padding_row else None
        table_class = LearnedPositions if config.initializer_positions == "normal" else LearnedFromSinusoids
        return table_class(config.max_position_embeddings, width, config.position_offset, padding_idx)
    if config.position_embedding_type == "sinusoidal":
        table_class = SinusoidalPositions
        if config.sinusoidal_table_stored:
            table_class = StoredSinusoidalPositions
        elif config.sinusoidal_table_grows:
            table_class = GrowingSinusoidalPositions
        return table_class(
            config.max_position_embeddings,
            width,
            layout=config.sinusoidal_layout,
            offset=config.position_offset,
            padding_idx=config.pad_token_id if config.sinusoidal_padding_zero else None,
        )
    return NoPositions()


def position_limit(config: VariantConfig) -> int | None:
    """The number of positions that a table of the stack has; `None` where no table ends."""
    has_table = (
        config.position_embedding_type == "learned"
        or (config.position_embedding_type == "sinusoidal" and not config.sinusoidal_table_grows)
        or (config.position_embedding_type == "rope" and config.rope_table_stored)
    )
    return config.max_position_embeddings if has_table else None


def build_position_ids(config: VariantConfig) -> PositionIdSource:
    """Where absent position ids come from."""
    limit = position_limit(config)
    if config.position_ids_source == "input_ids":
        return InputIdPositions(config.pad_token_id, limit)
    sources = {"sequence": sequence_positions, "attention_mask": attention_mask_positions}
    return partial(sources[config.position_ids_source], limit=limit)


def build_padding_mask(config: VariantConfig) -> PaddingMaskSource:
    """What stands for an absent attention mask."""
    return InputIdPaddingMask(config.pad_token_id) if config.padding_mask_source == "input_ids" else no_padding_mask


def build_position_bias(config: VariantConfig) -> nn.Module:
    """What is added to the attention scores."""
    if config.position_embedding_type == "alibi":
        return AlibiBias(
            config.num_attention_heads,
            config.alibi_bias_max,
            order=config.alibi_slope_order,
            form=config.alibi_form,
            in_bfloat16=config.alibi_slopes_in_bfloat16,
            in_float32=config.alibi_in_float32,
            in_float64=config.alibi_slopes_in_float64,
            divisor=config.alibi_divisor,
        )
    if config.position_embedding_type == "relative_bias":
        return RelativeBias(
            config.num_attention_heads,
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
            bidirectional=not config.is_causal,
            num_tables=config.num_hidden_layers if config.relative_attention_per_layer else 1,
        )
    return NoPositionBias()


def build_embedding_norm(config: VariantConfig, position: str) -> Callable:
    """The norm on the embeddings, if it stands at this position."""
    if not config.embedding_norm or config.embedding_norm_position != position:
        return unchanged
    return build_norm(config, _width_of_sum(config))


def build_final_norm(config: VariantConfig) -> nn.Module:
    return build_norm(config, config.hidden_size)


def build_output_projection(config: VariantConfig) -> Callable:
    """Back to `embedding_size` before the LM head (OPT-350m)."""
    if not config.output_projection:
        return unchanged
    return nn.Linear(config.hidden_size, config.embedding_size, bias=config.embedding_projection_bias)


def output_size(config: VariantConfig) -> int:
    """Width of `last_hidden_state`."""
    return config.embedding_size if config.output_projection else config.hidden_size


def _set_head_std(layer: nn.Linear, config: VariantConfig, of_classes: bool = False) -> nn.Linear:
    """The standard deviation of a new matrix of a head, where it is not `initializer_range`."""
    if config.initializer_scheme == "fan_in":
        layer.init_std = config.initializer_range * layer.in_features**-0.5
    elif config.initializer_scheme == "depth_scaled_and_heads":
        depth_scaled = config.initializer_range * (2 * config.num_hidden_layers) ** -0.5
        layer.init_std = layer.in_features**-0.5 if of_classes else depth_scaled
    return layer


def build_lm_head_transform(config: VariantConfig) -> Callable:
    """What stands between the last hidden state and the LM head."""
    if config.lm_head_transform:
        transform = DenseTransform(
            config.hidden_size,
            config.embedding_size,
            bias=config.lm_head_transform_bias,
            act=config.lm_head_transform_act,
            norm=build_norm(config, config.embedding_size),
        )
        _set_head_std(transform.dense, config)
        return transform
    return unchanged if config.lm_head_input_scale == 1.0 else InputScaling(config.lm_head_input_scale)


def build_lm_head(config: VariantConfig) -> nn.Linear:
    width = config.embedding_size if config.lm_head_transform else output_size(config)
    head_class = NormalizedLinear if config.lm_head_normalized else nn.Linear
    head = head_class(width, config.vocab_size, bias=config.lm_head_bias)
    if config.initializer_scheme == "fan_in":
        head.init_std = config.initializer_range
    else:
        _set_head_std(head, config)
    if config.lm_head_unread_bias:
        head.unread_bias = nn.Parameter(torch.zeros(config.vocab_size))
    return head


def build_logit_scaling(config: VariantConfig) -> LogitScaling:
    return LogitScaling(config.logit_scale, config.final_logit_softcapping, config.logit_scale_by_division)


def build_pooler(config: VariantConfig) -> Pooler:
    return Pooler(config.hidden_size)


def build_classifier_pooling(config: VariantConfig):
    """Which vector stands for a sequence."""
    return POOLINGS[config.classifier_pooling]


def build_classifier_transform(config: VariantConfig) -> Callable:
    """What stands between the pooled vector and the classifier."""
    if not config.classifier_transform:
        return unchanged
    transform = DenseTransform(
        output_size(config),
        output_size(config),
        bias=config.classifier_transform_bias,
        act=config.classifier_transform_act,
        norm=build_norm(config, output_size(config)) if config.classifier_transform_norm else unchanged,
        dropout=config.classifier_dropout if config.classifier_transform_dropout else 0.0,
    )
    _set_head_std(transform.dense, config)
    return transform


def build_token_classifier_transform(config: VariantConfig) -> Callable:
    """The same for heads on every token."""
    return build_classifier_transform(config) if config.classifier_transform_on_tokens else unchanged


def build_classifier(config: VariantConfig, num_labels: int, bias: bool) -> nn.Linear:
    return _set_head_std(nn.Linear(output_size(config), num_labels, bias=bias), config, of_classes=True)


def build_token_classifier(config: VariantConfig, num_labels: int) -> nn.Linear:
    classifier = build_classifier(config, num_labels, bias=True)
    if config.initializer_scheme == "fan_in":
        # T5's, unlike its other heads.
        classifier.init_std = config.initializer_range
    return classifier


def build_cache_limit(config: VariantConfig) -> int | None:
    """The length up to which generation keeps a cache, if it recomputes longer ones."""
    if not config.longrope_recomputes_cache:
        return None
    return min(
        parameters["original_max_position_embeddings"]
        for parameters in map(config.rope_parameters_of, range(config.num_hidden_layers))
        if parameters is not None and parameters["rope_type"] == "longrope"
    )


def build_loss(config: VariantConfig, shifted: bool) -> partial | None:
    """
    The loss of an LM head, or `None` where transformers' own computes the same.

    Args:
        shifted (`bool`): token n is scored against label n + 1 (causal), or against label n.
    """
    if not config.z_loss_coefficient and not config.label_smoothing:
        return None
    return partial(
        causal_lm_loss if shifted else token_loss,
        z_loss_coefficient=config.z_loss_coefficient,
        label_smoothing=config.label_smoothing,
    )
