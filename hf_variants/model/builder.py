"""
From config to modules: the only place where a config is read to decide what is built.

Functions whose names end in `part` or `parts` say what there will be, as a tree that can be walked before it is built;
those that begin with `build` return functions and other objects without weights.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

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
    TurnedValueAttention,
    multiply,
)
from .block import (
    OVER_TOKENS,
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
from .feed_forward import FeedForward, FusedGatedFeedForward, GatedFeedForward, make_activation
from .heads import POOLINGS, DenseTransform, InputScaling, LogitScaling, NormalizedLinear, Pooler, unread_bias
from .linear import OwnDtypeLinear, UnfusedBiasLinear
from .losses import causal_lm_loss, token_classifier_loss, token_loss
from .normalization import NORM_KINDS, BatchStatistics, NoBatchStatistics, choose_norm, unchanged
from .part import Part
from .positions import (
    AlibiBias,
    CheckpointRotaryEmbedding,
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


def linear_part(linear_class: type[nn.Linear], in_features: int, out_features: int, bias: bool) -> Part:
    return Part(linear_class, in_features=in_features, out_features=out_features, bias=bias)


def dropout_part(probability: float) -> Part | Callable:
    return Part(nn.Dropout, p=probability) if probability else unchanged


def norm_part(config: VariantConfig, dim: int) -> Part:
    """A norm of the config's kind over `dim` channels."""
    norm = choose_norm(dim, **config.norm_arguments())
    if config.initializer_norm_ones:
        norm.attributes["init_weight"] = 1.0
    elif config.initializer_scheme == "fan_in" and config.norm_affine and config.norm_type != "dynamic_tanh":
        norm.attributes["init_weight"] = config.initializer_range - float(config.norm_unit_offset)
    return norm


def build_batch_statistics(config: VariantConfig) -> BatchStatistics | NoBatchStatistics:
    """What tells norms over a batch which of its tokens are real."""
    if not NORM_KINDS[config.norm_type].over_tokens:
        return NoBatchStatistics()
    # Inputs behind an encoder are often made of labels, by collators that pass no mask for them.
    return BatchStatistics(config.pad_token_id if config.add_cross_attention else None)


def qk_norm_part(config: VariantConfig, num_heads: int) -> Part | Callable:
    """The norm on `num_heads` heads of queries or keys; `unchanged` for none."""
    if config.qk_norm == "none":
        return unchanged
    shape = {
        "head": config.head_dim,
        "per_head": (num_heads, config.head_dim),
        "full": num_heads * config.head_dim,
    }[config.qk_norm]
    return choose_norm(shape, **config.qk_norm_arguments())


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
        config.rope_interleaved,
        upcast,
        # Otherwise in the tables' dtype, which under autocast is that of the hidden states.
        round_result=(config.rope_in_float32 or config.rope_table_in_float32) and not config.rope_result_in_float32,
        cast_tables=config.rope_table_stored and not config.rope_table_in_float32,
    )
    if config.heads_first_from == "scores":
        return PositionsFirstRotation(rotation)
    return QueryScalingRotation(rotation) if "llama_4_scaling_beta" in rope_parameters else rotation


def rotary_embedding_parts(config: VariantConfig) -> tuple[Part, list[str | None]]:
    """The distinct tables of angles, and for every layer the name of its own (or `None`)."""
    tables, names, known = {}, [], {}
    for layer_idx, layer in enumerate(config.per_layer_config):
        parameters = config.rope_parameters_of(layer_idx)
        if parameters is None:
            names.append(None)
            continue
        key = json.dumps([parameters, layer.head_dim], sort_keys=True, default=str)
        if key not in known:
            known[key] = f"table_{len(known)}"
            table_class = StoredRotaryEmbedding if config.rope_table_stored else RotaryEmbedding
            if config.rope_table_in_checkpoint:
                table_class = CheckpointRotaryEmbedding
            if config.rope_frequencies_in_float32:
                table_class = Float32RotaryEmbedding
            if "llama_4_scaling_beta" in parameters:
                table_class = QueryScalingRotaryEmbedding
            tables[known[key]] = Part(
                table_class,
                config=layer,
                rope_parameters=parameters,
                interleaved=config.rope_interleaved,
                table_in_float32=config.rope_table_in_float32,
                reversed=config.rope_reversed,
            )
        names.append(known[key])
    return Part(nn.ModuleDict, modules=tables), names


def linear_class(config: VariantConfig) -> type[nn.Linear]:
    """Of the projections inside a layer."""
    return UnfusedBiasLinear if config.unfused_bias else nn.Linear


def _attention_arguments(config: VariantConfig, layer_idx: int, key_value_size: int) -> dict:
    """What self- and cross-attention have in common, from one layer's resolved config."""
    size, linear = config.hidden_size, linear_class(config)
    width = config.num_attention_heads * config.head_dim
    key_value_width = config.num_key_value_heads * config.head_dim
    gate_width = {"none": 0, "headwise": config.num_attention_heads, "elementwise": width}[config.attention_gate]
    scaling = config.head_dim**-0.5 if config.attention_scaling is None else config.attention_scaling
    return {
        "q_proj": linear_part(linear, size, width, config.attention_bias),
        "k_proj": linear_part(linear, key_value_size, key_value_width, config.attention_bias),
        "v_proj": linear_part(linear, key_value_size, key_value_width, config.attention_bias),
        "o_proj": linear_part(linear, width, size, config.attention_output_bias),
        "g_proj": linear_part(nn.Linear, size, gate_width, bias=False) if gate_width else None,
        "num_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "broadcast_key_value": config.broadcast_key_value,
        "scaling": scaling / (layer_idx + 1) if config.scale_attn_by_inverse_layer_idx else scaling,
        "scale_query": config.scale_query,
        "score_form": config.attention_score_form,
        "scores_in_float32": config.attention_scores_in_float32,
        "softmax_in_float32": config.attention_softmax_in_float32,
        "dropout": config.attention_dropout,
        "q_norm": qk_norm_part(config, config.num_attention_heads),
        "k_norm": qk_norm_part(config, config.num_key_value_heads),
        "softcap": config.attn_logit_softcapping,
        "clip": config.clip_qkv,
        "sinks": config.attention_sinks,
        "gate": config.attention_gate,
        "sub_norm": norm_part(config, width) if config.attention_sub_norm else unchanged,
    }


def self_attention_part(config: VariantConfig, layer_idx: int) -> Part:
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
    elif config.rope_turns_values:
        attention_class = TurnedValueAttention
    return Part(
        attention_class,
        config=config,
        layer_idx=layer_idx,
        is_causal=config.is_causal,
        rotation=build_rotation(config, config.rope_parameters_of(layer_idx)),
        sliding_window=window,
        **_attention_arguments(layer, layer_idx, config.hidden_size),
    )


def cross_attention_part(config: VariantConfig, layer_idx: int) -> Part:
    layer = config.per_layer_config[layer_idx]
    arguments = _attention_arguments(layer, layer_idx, config.cross_attention_hidden_size or config.hidden_size)
    if layer.attention_score_form == "biased":
        # There is no position bias here that a product could begin with.
        arguments["score_form"] = "multiplied"
    return Part(
        CROSS_ATTENTION[layer.qk_norm],
        config=config,
        layer_idx=layer_idx,
        is_causal=False,
        rotation=NoRotation(),
        sliding_window=None,
        **arguments,
    )


def feed_forward_part(config: VariantConfig) -> Part:
    """The feed-forward network of one layer's resolved config."""
    outer, inner, linear = config.hidden_size, config.intermediate_size, linear_class(config)
    output_class = OwnDtypeLinear if config.ffn_output_in_float32 else linear
    arguments = {
        "up_proj": linear_part(linear, outer, inner, config.mlp_bias),
        "down_proj": linear_part(output_class, inner, outer, config.mlp_output_bias),
        "act_fn": Part(make_activation, name=config.hidden_act),
        "dropout": config.activation_dropout,
        "sub_norm": norm_part(config, inner) if config.ffn_sub_norm else unchanged,
    }
    if config.ffn_type == "mlp":
        return Part(FeedForward, **arguments)
    gated_class = FusedGatedFeedForward if config.fused_gate_up else GatedFeedForward
    return Part(gated_class, **arguments, gate_proj=linear_part(linear, outer, inner, config.mlp_bias))


def residual_part(config: VariantConfig, sublayer: str) -> Part:
    """How the branch of `sublayer` joins the residual stream."""
    # Whether `residual_dropout` applies, or a probability of the branch's own.
    own = config.ffn_residual_dropout if sublayer == "mlp" else config.attention_residual_dropout
    dropout = own * config.residual_dropout if isinstance(own, bool) else own
    if config.parallel_block != "none" and config.dropout_after_sum:
        dropout = 0.0
    if config.learned_scale_type != "none":
        shape = (config.hidden_size,) if config.learned_scale_type == "channel" else ()
        return Part(LearnedScaleResidual, shape=shape, init=config.layer_scale_init, dropout=dropout)
    return Part(
        Residual,
        dropout=dropout,
        branch_multiplier=config.residual_multiplier,
        residual_scale=config.deepnorm_alpha if config.norm_placement == "deepnorm" else 1.0,
    )


def slot_parts(config: VariantConfig, sublayer: str, layer_idx: int) -> dict[str, Part | Callable]:
    """The norm slots and the residual around `sublayer`, of one layer's resolved config."""
    filled = set(NORM_SLOTS[config.norm_placement])
    parts: dict[str, Part | Callable] = {
        f"{sublayer}_{slot}": norm_part(config, config.hidden_size) if slot in filled else unchanged
        for slot in ("pre_norm", "branch_norm", "post_norm")
    }
    if sublayer == "self_attn" and layer_idx == 0 and not config.first_layer_pre_norm:
        parts["self_attn_pre_norm"] = unchanged
    if sublayer != "self_attn" and config.parallel_block == "shared_norm":
        # The first sublayer's serves all.
        del parts[f"{sublayer}_pre_norm"]
    parts[f"{sublayer}_residual"] = residual_part(config, sublayer)
    return parts


def block_class(config: VariantConfig, plain: type[Block]) -> type[Block]:
    """The class of a block, or the one whose norms see the batch."""
    return OVER_TOKENS[plain] if NORM_KINDS[config.norm_type].over_tokens else plain


def block_part(config: VariantConfig, layer_idx: int) -> Part:
    """Layer `layer_idx` of the stack."""
    layer = config.per_layer_config[layer_idx]
    skipped = set(getattr(layer, "skip", ()))
    sublayers: dict[str, Part] = {}
    if "self_attn" not in skipped:
        sublayers["self_attn"] = self_attention_part(config, layer_idx)
    if layer.add_cross_attention:
        sublayers["cross_attn"] = cross_attention_part(config, layer_idx)
    if "mlp" not in skipped:
        sublayers["mlp"] = feed_forward_part(layer)
    if layer.norm_placement == "deepnorm":
        _set_deepnorm_gains(sublayers, layer.deepnorm_beta)
    _set_initial_stds(sublayers, layer, config)
    modules: dict[str, Part | Callable] = {}
    for name, sublayer in sublayers.items():
        modules |= {name: sublayer, **slot_parts(layer, name, layer_idx)}
    if layer.parallel_block != "none":
        return Part(
            block_class(config, ParallelCrossBlock if layer.add_cross_attention else ParallelBlock),
            shared_norm=layer.parallel_block == "shared_norm",
            residual_first=layer.parallel_sum_order == "residual_first",
            sum_dropout=layer.residual_dropout if layer.dropout_after_sum else 0.0,
            **modules,
        )
    sequential = SequentialCrossBlock if layer.add_cross_attention else SequentialBlock
    if skipped:
        sequential = FeedForwardBlock if "self_attn" in skipped else AttentionBlock
    limit = FLOAT16_LIMITS[config.clamp_in_float16]
    return Part(
        block_class(config, sequential),
        residual_from_norm=layer.residual_from_norm,
        ffn_chunk_size=layer.ffn_chunk_size,
        limit_attention=limit if config.clamp_in_float16 == "sublayers" or "mlp" in skipped else unchanged,
        limit_output=limit,
        **modules,
    )


def _set_initial_stds(sublayers: dict[str, Part], layer: VariantConfig, config: VariantConfig) -> None:
    """The standard deviations of a layer's new matrices, where they are not `initializer_range`."""
    size, heads = layer.hidden_size, layer.num_attention_heads * layer.head_dim
    at_the_end = (2 * config.num_hidden_layers) ** -0.5
    factors = {
        "normal": {},
        "depth_scaled": dict.fromkeys(("o_proj", "down_proj"), at_the_end),
        "depth_scaled_attention": {"o_proj": at_the_end},
        "depth_scaled_and_heads": dict.fromkeys(("o_proj", "down_proj"), at_the_end),
        "fan_out_heads": {},
        "fan_in": {
            **dict.fromkeys(("k_proj", "v_proj", "g_proj", "gate_proj", "up_proj"), size**-0.5),
            # With the scale that T5's scores lack.
            "q_proj": (size * layer.head_dim) ** -0.5,
            "o_proj": heads**-0.5,
            "down_proj": layer.intermediate_size**-0.5,
        },
    }[config.initializer_scheme]
    for sublayer in sublayers.values():
        for name in factors.keys() & sublayer.arguments.keys():
            if sublayer.arguments[name] is not None:
                sublayer.arguments[name].attributes["init_std"] = config.initializer_range * factors[name]


def _set_deepnorm_gains(sublayers: dict[str, Part], beta: float) -> None:
    """DeepNorm's Xavier gains (figure 2 of the paper): beta for values, outputs and the FFN, 1 for queries and keys."""
    for sublayer in sublayers.values():
        for name, part in sublayer.arguments.items():
            if name.endswith("_proj") and part is not None:
                part.attributes["xavier_gain"] = 1.0 if name in ("q_proj", "k_proj", "g_proj") else beta


def token_embedding_part(config: VariantConfig) -> Part:
    embedding_class, scale = nn.Embedding, {}
    if config.embedding_multiplier != 1.0 and config.embedding_multiplier_position == "embedding":
        embedding_class = RoundedScaleEmbedding if config.embedding_multiplier_in_weight_dtype else ScaledEmbedding
        scale = {"embed_scale": config.embedding_multiplier}
    return Part(
        embedding_class,
        num_embeddings=config.vocab_size,
        embedding_dim=config.embedding_size,
        padding_idx=config.pad_token_id if config.padding_embedding_frozen else None,
        **scale,
    )


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


def embedding_projection_part(config: VariantConfig, position: str) -> Part | Callable:
    """The projection from `embedding_size` to `hidden_size`, if it stands at this position."""
    if config.embedding_size == config.hidden_size or config.embedding_projection_position != position:
        return unchanged
    return linear_part(nn.Linear, config.embedding_size, config.hidden_size, config.embedding_projection_bias)


def types_part(config: VariantConfig, num_types: int) -> Part:
    """Vectors of token or task types, if there are any."""
    if not num_types:
        return Part(NoTokenTypes)
    return Part(TokenTypes, num_embeddings=num_types, embedding_dim=_width_of_sum(config))


def build_types_among_tokens(config: VariantConfig) -> Callable:
    """Token types that are looked up among the tokens, if they are."""
    among_tokens = config.token_type_table == "tokens" and not config.type_vocab_size
    return add_types_among_tokens if among_tokens else no_types_among_tokens


def positions_part(config: VariantConfig) -> Part:
    """What is added to the embeddings."""
    table = {
        "num_positions": config.max_position_embeddings,
        "dim": _width_of_sum(config),
        "offset": config.position_offset,
    }
    if config.position_embedding_type == "learned":
        has_padding_row = config.position_ids_source == "input_ids" and config.padding_embedding_frozen
        table_class = LearnedPositions if config.initializer_positions == "normal" else LearnedFromSinusoids
        return Part(table_class, **table, padding_idx=config.pad_token_id if has_padding_row else None)
    if config.position_embedding_type == "sinusoidal":
        table_class = SinusoidalPositions
        if config.sinusoidal_table_stored:
            table_class = StoredSinusoidalPositions
        elif config.sinusoidal_table_grows:
            table_class = GrowingSinusoidalPositions
        padding_idx = config.pad_token_id if config.sinusoidal_padding_zero else None
        return Part(table_class, **table, layout=config.sinusoidal_layout, padding_idx=padding_idx)
    return Part(NoPositions)


def position_limit(config: VariantConfig) -> int | None:
    """The number of positions that a table of the stack has; `None` where no table ends."""
    has_table = (
        config.position_embedding_type == "learned"
        or (config.position_embedding_type == "sinusoidal" and not config.sinusoidal_table_grows)
        or (config.position_embedding_type == "rope" and (config.rope_table_stored or config.rope_table_in_checkpoint))
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


def position_bias_part(config: VariantConfig) -> Part:
    """What is added to the attention scores."""
    if config.position_embedding_type == "alibi":
        return Part(
            AlibiBias,
            num_heads=config.num_attention_heads,
            bias_max=config.alibi_bias_max,
            order=config.alibi_slope_order,
            form=config.alibi_form,
            in_bfloat16=config.alibi_slopes_in_bfloat16,
            in_float32=config.alibi_in_float32,
            in_float64=config.alibi_slopes_in_float64,
            divisor=config.alibi_divisor,
        )
    if config.position_embedding_type == "relative_bias":
        fan_in = config.initializer_scheme == "fan_in"
        return Part(
            RelativeBias,
            num_heads=config.num_attention_heads,
            num_buckets=config.relative_attention_num_buckets,
            max_distance=config.relative_attention_max_distance,
            bidirectional=not config.is_causal,
            num_tables=config.num_hidden_layers if config.relative_attention_per_layer else 1,
            init_std=config.initializer_range * config.hidden_size**-0.5 if fan_in else None,
        )
    return Part(NoPositionBias)


def embedding_norm_part(config: VariantConfig, position: str) -> Part | Callable:
    """The norm on the embeddings, if it stands at this position."""
    if not config.embedding_norm or config.embedding_norm_position != position:
        return unchanged
    return norm_part(config, _width_of_sum(config))


def output_projection_part(config: VariantConfig) -> Part | Callable:
    """Back to `embedding_size` before the LM head (OPT-350m)."""
    if not config.output_projection:
        return unchanged
    return linear_part(nn.Linear, config.hidden_size, config.embedding_size, config.embedding_projection_bias)


def stack_parts(config: VariantConfig, role: str = "base") -> dict[str, Any]:
    """What `VariantModel` is made of, by name, and in the order in which data passes it."""
    embed_tokens = token_embedding_part(config)
    if config.initializer_scheme == "fan_in":
        embed_tokens.attributes["init_std"] = config.initializer_range
    rotary_emb, rotary_names = rotary_embedding_parts(config)
    return {
        "embed_tokens": embed_tokens,
        "multiply_embeddings": build_embedding_multiplier(config),
        "token_projection": embedding_projection_part(config, "before_positions"),
        "token_norm": embedding_norm_part(config, "before_positions"),
        "token_types": types_part(config, config.type_vocab_size),
        "embed_positions": positions_part(config),
        "task_types": types_part(config, config.task_type_vocab_size),
        "types_among_tokens": build_types_among_tokens(config),
        "embedding_norm": embedding_norm_part(config, "after_positions"),
        "embedding_dropout": dropout_part(config.embedding_dropout),
        "embedding_projection": embedding_projection_part(config, "after_norm"),
        "rotary_emb": rotary_emb,
        "rotary_names": rotary_names,
        "position_bias": position_bias_part(config),
        "layers": Part(nn.ModuleList, modules=[block_part(config, i) for i in range(config.num_hidden_layers)]),
        "norm": norm_part(config, config.hidden_size) if config.final_norm else unchanged,
        "final_dropout": dropout_part(config.final_dropout),
        "output_projection": output_projection_part(config),
        "pooler": pooler_part(config) if config.has_pooler(role) else None,
    }


def output_size(config: VariantConfig) -> int:
    """Width of `last_hidden_state`."""
    return config.embedding_size if config.output_projection else config.hidden_size


def _set_head_std(layer: Part, config: VariantConfig, of_classes: bool = False) -> Part:
    """The standard deviation of a new matrix of a head, where it is not `initializer_range`."""
    from_input = layer.arguments["in_features"] ** -0.5
    if config.initializer_scheme == "fan_in":
        layer.attributes["init_std"] = config.initializer_range * from_input
    elif config.initializer_scheme == "fan_out_heads":
        # Of the range of the model that the head belongs to, which need not be its stack's.
        layer.attributes["init_factor"] = layer.arguments["out_features"] ** -0.5
    elif config.initializer_scheme == "depth_scaled_and_heads":
        depth_scaled = config.initializer_range * (2 * config.num_hidden_layers) ** -0.5
        layer.attributes["init_std"] = from_input if of_classes else depth_scaled
    return layer


def lm_head_transform_part(config: VariantConfig) -> Part | Callable:
    """What stands between the last hidden state and the LM head."""
    if not config.lm_head_transform:
        scale = config.lm_head_input_scale
        return unchanged if scale == 1.0 else Part(InputScaling, scale=scale)
    dense = linear_part(nn.Linear, config.hidden_size, config.embedding_size, config.lm_head_transform_bias)
    return Part(
        DenseTransform,
        dense=_set_head_std(dense, config),
        act_fn=Part(make_activation, name=config.lm_head_transform_act),
        norm=norm_part(config, config.embedding_size),
    )


def lm_head_part(config: VariantConfig) -> Part:
    width = config.embedding_size if config.lm_head_transform else output_size(config)
    head_class = NormalizedLinear if config.lm_head_normalized else nn.Linear
    head = linear_part(head_class, width, config.vocab_size, config.lm_head_bias)
    if config.initializer_scheme == "fan_in":
        head.attributes["init_std"] = config.initializer_range
    else:
        _set_head_std(head, config)
    if config.lm_head_unread_bias:
        head.attributes["unread_bias"] = Part(unread_bias, size=config.vocab_size)
    return head


def language_head_parts(config: VariantConfig) -> dict[str, Part | Callable]:
    """From the last hidden state to logits over the vocabulary."""
    return {
        "lm_head_transform": lm_head_transform_part(config),
        "lm_head": lm_head_part(config),
        "logit_scaling": logit_scaling_part(config),
    }


def logit_scaling_part(config: VariantConfig) -> Part:
    return Part(
        LogitScaling,
        scale=config.logit_scale,
        softcap=config.final_logit_softcapping,
        by_division=config.logit_scale_by_division,
    )


def pooler_part(config: VariantConfig) -> Part:
    return Part(Pooler, dense=linear_part(nn.Linear, config.hidden_size, config.hidden_size, bias=True))


def build_pooling(kind: str) -> Callable:
    """Which vector stands for a sequence."""
    return POOLINGS[kind]


def classifier_transform_part(config: VariantConfig, on_tokens: bool = False) -> Part | Callable:
    """What stands between the pooled vector, or every token's, and the classifier."""
    if not config.classifier_transform or (on_tokens and not config.classifier_transform_on_tokens):
        return unchanged
    return _transform_before_classes(
        config,
        config.classifier_transform_act,
        config.classifier_dropout if config.classifier_transform_dropout else 0.0,
    )


def _transform_before_classes(config: VariantConfig, act: str, dropout: float) -> Part:
    width = output_size(config)
    dense = linear_part(nn.Linear, width, width, config.classifier_transform_bias)
    return Part(
        DenseTransform,
        dense=_set_head_std(dense, config),
        act_fn=Part(make_activation, name=act),
        norm=norm_part(config, width) if config.classifier_transform_norm else unchanged,
        dropout=dropout,
    )


def classifier_part(config: VariantConfig, num_labels: int, bias: bool) -> Part:
    classifier = linear_part(nn.Linear, output_size(config), num_labels, bias)
    return _set_head_std(classifier, config, of_classes=True)


def sequence_classifier_parts(config: VariantConfig, num_labels: int) -> dict[str, Part | Callable]:
    """From one vector per sequence to classes."""
    return {
        "pre_classifier": classifier_transform_part(config),
        "dropout": Part(nn.Dropout, p=config.classifier_dropout),
        "score": classifier_part(config, num_labels, bias=config.classifier_bias),
    }


def choice_classifier_parts(config: VariantConfig) -> dict[str, Part | Callable]:
    """From one vector per choice to its logit."""
    dropout = config.choice_dropout
    transform: Part | Callable = unchanged
    if config.choice_transform:
        before = dropout if config.choice_transform_dropout else 0.0
        transform = _transform_before_classes(config, config.choice_transform_act, before)
    return {
        "pre_classifier": transform,
        "dropout": Part(nn.Dropout, p=dropout),
        "score": classifier_part(config, num_labels=1, bias=config.classifier_bias),
    }


def next_sentence_parts(config: VariantConfig) -> dict[str, Part | Callable]:
    """From one vector per sequence to two logits: that its second part follows the first, and that it does not."""
    return {
        "pre_classifier": unchanged,
        "dropout": unchanged,
        "score": classifier_part(config, num_labels=2, bias=True),
    }


def token_classifier_parts(config: VariantConfig, num_labels: int) -> dict[str, Part | Callable]:
    """From every token's vector to classes."""
    score = classifier_part(config, num_labels, bias=True)
    if config.initializer_scheme == "fan_in":
        # T5's, unlike its other heads.
        score.attributes["init_std"] = config.initializer_range
    return {
        "pre_classifier": classifier_transform_part(config, on_tokens=True),
        "dropout": Part(nn.Dropout, p=config.token_classifier_dropout),
        "score": score,
    }


def span_classifier_parts(config: VariantConfig) -> dict[str, Part | Callable]:
    """From every token's vector to two logits: that a span starts there, and that it ends there."""
    return {
        "pre_classifier": classifier_transform_part(config, on_tokens=True),
        "dropout": dropout_part(config.qa_dropout),
        "qa_outputs": classifier_part(config, num_labels=2, bias=True),
    }


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
    if not config.z_loss_coefficient and not config.label_smoothing and config.loss_in_float32:
        return None
    return partial(
        causal_lm_loss if shifted else token_loss,
        z_loss_coefficient=config.z_loss_coefficient,
        label_smoothing=config.label_smoothing,
        in_float32=config.loss_in_float32,
    )


def build_token_classifier_loss(config: VariantConfig) -> Callable | None:
    """The loss of a classifier of tokens, or `None` where it is transformers' own."""
    return None if config.token_classifier_loss_in_float32 else token_classifier_loss
