"""Configs drawn from the whole decoder space, and weights that leave no term of a forward unseen."""

import torch
from hypothesis import strategies as st
from torch import nn

from hf_variants.model.modeling_variant import VariantModel
from hf_variants.model.normalization import (
    BatchNorm,
    DynamicTanh,
    Float32LayerNorm,
    PerHeadLayerNorm,
    RMSNorm,
    ZeroCenteredLayerNorm,
    ZeroCenteredRMSNorm,
)


# Every test input fits into this context, so that RoPE types which change with the length (dynamic, longrope) have one
# table: a cache keeps keys that were rotated with the table of their time, as in every transformers model.
CONTEXT = 64
VOCAB = 61

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "relu2", "tanh")


def chance(draw, percent: int) -> bool:
    return draw(st.integers(0, 99)) < percent


def one_of(draw, *values):
    return draw(st.sampled_from(values))


def multiplier(draw) -> float:
    return one_of(draw, 0.22, 0.5, 1.5, 3.0)


def draw_sizes(draw) -> dict:
    kv_heads = one_of(draw, 1, 1, 2, 2, 3)
    heads = kv_heads * one_of(draw, *(groups for groups in (1, 2, 4) if kv_heads * groups <= 4))
    return {
        "vocab_size": VOCAB,
        "hidden_size": one_of(draw, 16, 20, 32, 36, 48),
        "intermediate_size": one_of(draw, 8, 24, 40, 63),
        "num_hidden_layers": draw(st.integers(2, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": one_of(draw, 6, 8, 10, 12, 16, 20),
        "max_position_embeddings": CONTEXT,
        "pad_token_id": one_of(draw, None, 0),
    }


def draw_norm(draw) -> dict:
    fields = {
        "norm_type": one_of(draw, "rmsnorm", "layernorm", "dynamic_tanh", "batchnorm"),
        "norm_eps": one_of(draw, 1e-6, 1e-5, 1e-2),
    }
    if fields["norm_type"] == "dynamic_tanh":
        return {
            **fields,
            "norm_alpha_init": one_of(draw, 0.5, 0.8),
            "norm_affine": True,
            "norm_bias": chance(draw, 60),
        }
    fields["norm_affine"] = chance(draw, 85)
    if fields["norm_type"] == "batchnorm":
        return {
            **fields,
            "norm_bias": fields["norm_affine"] and chance(draw, 60),
            "norm_momentum": one_of(draw, 0.1, 0.5, None),
        }
    if fields["norm_type"] == "rmsnorm":
        fields["norm_casting_mode"] = one_of(draw, None, "llama", "gemma", "none")
    else:
        fields["norm_bias"] = fields["norm_affine"] and chance(draw, 60)
        fields["norm_casting_mode"] = "none" if fields["norm_bias"] else one_of(draw, "none", "gemma")
    fields["norm_unit_offset"] = fields["norm_affine"] and chance(draw, 30)
    return fields


def draw_block(draw) -> dict:
    fields = {"norm_placement": one_of(draw, "pre", "pre", "post", "branch", "sandwich", "deepnorm")}
    has_pre_norm = fields["norm_placement"] in ("pre", "sandwich")
    if has_pre_norm and chance(draw, 40):
        fields["parallel_block"] = one_of(draw, "shared_norm", "two_norms")
        fields["parallel_sum_order"] = one_of(draw, "branches_first", "residual_first")
    elif has_pre_norm:
        fields["residual_from_norm"] = chance(draw, 20)
        fields["first_layer_pre_norm"] = chance(draw, 80)
    if fields["norm_placement"] != "deepnorm" and chance(draw, 40):
        if chance(draw, 50):
            fields["residual_multiplier"] = multiplier(draw)
        else:
            fields["learned_scale_type"] = one_of(draw, "channel", "scalar")
            fields["layer_scale_init"] = one_of(draw, None, 0.3)
    fields["final_norm"] = one_of(draw, None, None, True, False)
    fields["embedding_norm"] = chance(draw, 20)
    fields["embedding_norm_position"] = one_of(draw, "after_positions", "after_positions", "before_positions")
    return fields


def draw_feed_forward(draw) -> dict:
    fields = {
        "ffn_type": one_of(draw, "mlp", "glu"),
        "hidden_act": one_of(draw, *ACTIVATIONS),
        "mlp_bias": chance(draw, 40),
        "ffn_sub_norm": chance(draw, 15),
    }
    fields["unfused_bias"] = chance(draw, 20)
    fields["fused_gate_up"] = fields["ffn_type"] == "glu" and chance(draw, 30)
    if chance(draw, 20):
        fields["mlp_output_bias"] = chance(draw, 50)
    return fields


def draw_attention(draw, norm: dict) -> dict:
    fields = {
        "attention_bias": chance(draw, 40),
        "attention_scaling": one_of(draw, None, None, 1.0, 0.1),
        "scale_query": chance(draw, 20),
        "scale_attn_by_inverse_layer_idx": chance(draw, 15),
        "attention_scores_in_float32": chance(draw, 20),
        "attention_softmax_in_float32": chance(draw, 80),
        "eager_by_default": chance(draw, 10),
        "attention_gate": one_of(draw, "none", "none", "headwise", "elementwise"),
        "attention_sub_norm": chance(draw, 15),
        "clip_qkv": one_of(draw, None, None, 1.5),
    }
    if chance(draw, 20):
        fields["attention_output_bias"] = chance(draw, 50)
    forms = (
        ("multiplied", "batched", "fused")
        if fields["scale_query"]
        else ("multiplied", "batched", "divided", "divided_in_float32", "fused")
    )
    fields["attention_score_form"] = one_of(draw, *forms)
    # No backend combines the two.
    if chance(draw, 30):
        fields |= one_of(draw, {"attn_logit_softcapping": 2.5}, {"attention_sinks": True})
    if chance(draw, 50):
        fields |= draw_qk_norm(draw, norm)
    if fields.get("qk_norm") == "head" and not fields["qk_norm_after_rope"]:
        fields["heads_first_from"] = one_of(draw, "norm", "rotation")
    return fields


def draw_qk_norm(draw, norm: dict) -> dict:
    fields = {"qk_norm": one_of(draw, "head", "full", "per_head"), "qk_norm_eps": one_of(draw, None, 1e-3)}
    # BatchNorm has no place on heads.
    as_others = ["rmsnorm", "layernorm"] + [None] * (norm["norm_type"] != "batchnorm")
    fields["qk_norm_type"] = one_of(draw, *as_others)
    kind = fields["qk_norm_type"] or norm["norm_type"]
    # DynamicTanh has no form without a weight.
    fields["qk_norm_affine"] = None if kind == "dynamic_tanh" else one_of(draw, None, True, False)
    if fields["qk_norm"] == "head":
        fields["qk_norm_after_rope"] = chance(draw, 30)
    affine = norm["norm_affine"] if fields["qk_norm_affine"] is None else fields["qk_norm_affine"]
    float32_layernorm = norm["norm_type"] == "layernorm" and norm["norm_casting_mode"] == "gemma"
    if kind == "layernorm" and affine and fields["qk_norm"] != "per_head" and not float32_layernorm:
        fields["qk_norm_bias"] = one_of(draw, None, True, False)
    return fields


def draw_layers(draw, num_layers: int) -> dict:
    if chance(draw, 40):
        return {}
    kinds = [one_of(draw, "full_attention", "sliding_attention") for _ in range(num_layers)]
    return {"layer_types": kinds, "sliding_window": draw(st.integers(2, 6))}


def draw_rope_entry(draw, head_dim: int) -> dict:
    kind = one_of(draw, "default", "default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
    entry = {"rope_type": kind, "rope_theta": one_of(draw, 100.0, 10000.0)}
    # Pairs are rotated, and the dynamic formula needs two of them.
    least = 4 if kind == "dynamic" else 2
    factors = [factor for factor in (0.25, 0.5, 0.75) if int(head_dim * factor) in range(least, head_dim, 2)]
    factor = 1.0
    if factors and (kind == "proportional" or chance(draw, 40)):
        factor = entry["partial_rotary_factor"] = draw(st.sampled_from(factors))
    if kind in ("linear", "dynamic", "yarn", "llama3"):
        entry["factor"] = one_of(draw, 2.0, 4.0)
    if kind in ("yarn", "llama3"):
        entry["original_max_position_embeddings"] = 16
    if kind == "llama3":
        entry |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        pairs = int(head_dim * factor) // 2
        entry["short_factor"] = [1.0 + 0.25 * i for i in range(pairs)]
        entry["long_factor"] = [2.0 + 0.5 * i for i in range(pairs)]
        entry["original_max_position_embeddings"] = CONTEXT
    return entry


def draw_positions(draw, sizes: dict, layers: dict) -> dict:
    kind = one_of(draw, "rope", "rope", "rope", "learned", "sinusoidal", "alibi", "relative_bias", "none")
    fields = {"position_embedding_type": kind, "position_ids_source": one_of(draw, "sequence", "attention_mask")}
    if sizes["pad_token_id"] is not None and chance(draw, 30):
        fields["padding_mask_source"] = "input_ids"
    if kind == "rope":
        fields |= draw_rope(draw, sizes, layers, fields["position_ids_source"])
    if kind in ("learned", "sinusoidal"):
        needs_offset = fields["position_ids_source"] == "attention_mask"
        fields["position_offset"] = one_of(draw, *((1, 2) if needs_offset else (0, 2)))
    if kind == "sinusoidal":
        fields["sinusoidal_table_stored"] = chance(draw, 20)
        fields["sinusoidal_table_grows"] = not fields["sinusoidal_table_stored"] and chance(draw, 20)
        fields["sinusoidal_layout"] = one_of(draw, "interleaved", "half", "half_in_float32", "tensor2tensor")
        fields["sinusoidal_padding_zero"] = sizes["pad_token_id"] is not None and chance(draw, 30)
    if kind == "alibi":
        # With sinks, only the distance itself is the same for every placing of the padding.
        forms = ("distance", "key_position", "key_index", "key_offset")[: 1 if sizes.get("attention_sinks") else None]
        fields["alibi_form"] = one_of(draw, *forms)
        fields["alibi_slope_order"] = one_of(draw, "paper", "mpt")
        fields["alibi_bias_max"] = one_of(draw, 8, 4)
        fields["alibi_slopes_in_bfloat16"] = chance(draw, 20)
        fields["alibi_slopes_in_float64"] = chance(draw, 20)
        fields["alibi_in_float32"] = chance(draw, 20)
        fields["alibi_divisor"] = one_of(draw, 1.0, 2.5)
    if kind in ("alibi", "relative_bias") and "attn_logit_softcapping" not in sizes and chance(draw, 30):
        fields["attention_score_form"] = "biased"
    if kind == "relative_bias":
        fields["relative_attention_num_buckets"] = one_of(draw, 8, 32)
        fields["relative_attention_max_distance"] = one_of(draw, 20, 128)
        fields["relative_attention_per_layer"] = chance(draw, 40)
    return fields


def draw_rope(draw, sizes: dict, layers: dict, source: str) -> dict:
    fields = {
        "rope_interleaved": chance(draw, 30),
        "rope_in_float32": chance(draw, 30),
        "rope_reversed": chance(draw, 20),
    }
    fields["rope_table_in_float32"] = fields["rope_in_float32"] and chance(draw, 50)
    fields["rope_result_in_float32"] = (
        fields["rope_in_float32"] and sizes["attention_scores_in_float32"] and chance(draw, 50)
    )
    if chance(draw, 20):
        fields["no_rope_layers"] = [draw(st.integers(0, 1)) for _ in range(sizes["num_hidden_layers"])]
    if layers and chance(draw, 50):
        fields["rope_parameters"] = {
            kind: None if chance(draw, 25) else draw_rope_entry(draw, sizes["head_dim"])
            for kind in sorted(set(layers["layer_types"]))
        }
    else:
        fields["rope_parameters"] = draw_rope_entry(draw, sizes["head_dim"])
    entries = fields["rope_parameters"]
    entries = list(entries.values()) if "rope_type" not in entries else [entries]
    fixed = all(entry is None or entry["rope_type"] not in ("dynamic", "longrope") for entry in entries)
    if fixed and source == "sequence":
        fields["rope_table_stored"] = chance(draw, 20)
    fields["rope_frequencies_in_float32"] = not fields.get("rope_table_stored") and chance(draw, 20)
    fields["rope_table_in_checkpoint"] = source == "sequence" and chance(draw, 15)
    if fields["rope_table_in_checkpoint"]:
        # Of plain angles, in the dtype of the weights.
        theta = one_of(draw, 100.0, 10000.0)
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
        fields |= dict.fromkeys(("rope_table_stored", "rope_frequencies_in_float32", "rope_table_in_float32"), False)
    if chance(draw, 15):
        fields["layer_rope_theta"] = [one_of(draw, 0, 100.0, 5000.0) for _ in range(sizes["num_hidden_layers"])]
    if sizes.get("qk_norm", "none") == "none" and chance(draw, 20):
        fields["heads_first_from"] = "scores"
    if sizes.get("qk_norm", "none") == "none" and "heads_first_from" not in fields:
        fields["rope_turns_values"] = chance(draw, 15)
    return fields


def draw_embedding_and_head(draw, sizes: dict) -> dict:
    has_transform = sizes["norm_type"] != "batchnorm" and chance(draw, 15)
    fields = {
        "embedding_multiplier": one_of(draw, 1.0, 1.0, 4.5),
        "embedding_multiplier_in_weight_dtype": chance(draw, 30),
        "embedding_multiplier_position": one_of(draw, "embedding", "embedding", "stack"),
        "padding_embedding_frozen": chance(draw, 80),
        "logit_scale": one_of(draw, 1.0, 1.0, 0.3),
        "logit_scale_by_division": chance(draw, 30),
        "final_logit_softcapping": one_of(draw, None, None, 5.0),
        "lm_head_bias": chance(draw, 20),
        "lm_head_normalized": chance(draw, 10),
        "lm_head_transform": has_transform,
        "type_vocab_size": one_of(draw, 0, 0, 0, 2),
        "task_type_vocab_size": one_of(draw, 0, 0, 0, 2),
        "z_loss_coefficient": one_of(draw, 0.0, 0.0, 1e-2),
        "label_smoothing": one_of(draw, 0.0, 0.0, 0.1),
    }
    if not fields["lm_head_transform"]:
        fields["lm_head_input_scale"] = one_of(draw, 1.0, 1.0, 0.4)
    if fields["lm_head_transform"]:
        fields["lm_head_transform_bias"] = chance(draw, 50)
        fields["lm_head_transform_act"] = one_of(draw, None, "gelu")
    if chance(draw, 20):
        fields["embedding_size"] = one_of(draw, 12, 24, 40)
        fields["embedding_projection_bias"] = chance(draw, 40)
        fields["embedding_projection_position"] = one_of(draw, "before_positions", "after_norm")
        if fields["embedding_size"] != sizes["hidden_size"] and not fields["lm_head_transform"]:
            fields["output_projection"] = chance(draw, 40)
    same_width = fields.get("embedding_size", sizes["hidden_size"]) == sizes["hidden_size"]
    if same_width or fields["embedding_projection_position"] == "after_norm":
        fields["token_type_table"] = one_of(draw, "own", "own", "tokens")
    fields["tie_word_embeddings"] = (
        same_width or fields.get("output_projection", False) or fields["lm_head_transform"]
    ) and chance(draw, 50)
    return fields


def draw_layer_override(draw, fields: dict) -> dict:
    """What one layer does differently, of what `per_layer_config` may change under these fields."""
    other_norm = {"qk_norm": "none", "qk_norm_after_rope": False, "qk_norm_bias": False}
    override = one_of(
        draw,
        {"intermediate_size": 16},
        {"num_key_value_heads": 1},
        {"ffn_type": "mlp", "hidden_act": "relu2", "mlp_bias": True, "fused_gate_up": False},
        {"attention_gate": "headwise", "attention_sub_norm": True},
        {"clip_qkv": 0.8, "attention_bias": True, "attention_scaling": 0.2},
        other_norm if fields.get("heads_first_from") != "norm" else {"attention_bias": True},
    )
    if fields["position_embedding_type"] not in ("alibi", "relative_bias") and chance(draw, 30):
        override = override | {"num_attention_heads": 2 * fields["num_key_value_heads"]}
    return override


def draw_per_layer_config(draw, fields: dict) -> dict:
    num_layers = fields["num_hidden_layers"]
    layers = {i: draw_layer_override(draw, fields) for i in range(num_layers) if chance(draw, 50)}
    kinds = fields.get("layer_types") or ["full_attention"] * num_layers
    later = [i for i in range(num_layers) if kinds.index(kinds[i]) != i]
    if fields.get("parallel_block", "none") == "none" and chance(draw, 40):
        # The first layer of a type keeps its attention: its cache tells how long the past is.
        skip = one_of(draw, "self_attn", "mlp")
        candidates = later if skip == "self_attn" else range(num_layers)
        if candidates:
            layers.setdefault(draw(st.sampled_from(list(candidates))), {})["skip"] = [skip]
    return layers


@st.composite
def variant_fields(draw) -> dict:
    """
    The arguments of a valid decoder config of tiny size, from every axis that a decoder has.

    Not the config itself, which hypothesis cannot print where `per_layer_config` makes fields ambiguous.
    """
    fields = draw_sizes(draw)
    norm = draw_norm(draw)
    layers = draw_layers(draw, fields["num_hidden_layers"])
    fields |= norm | draw_block(draw) | draw_feed_forward(draw) | draw_attention(draw, norm) | layers
    fields |= draw_positions(draw, fields, layers)
    fields |= draw_embedding_and_head(draw, fields)
    can_broadcast = fields["num_key_value_heads"] == 1 and fields["attention_score_form"] not in (
        "batched",
        "fused",
        "biased",
    )
    fields["broadcast_key_value"] = can_broadcast and chance(draw, 40)
    if chance(draw, 25):
        fields["per_layer_config"] = draw_per_layer_config(draw, fields)
    return fields


NORMS = (RMSNorm, nn.LayerNorm, Float32LayerNorm, PerHeadLayerNorm, DynamicTanh, BatchNorm)
ZERO_CENTERED_NORMS = (ZeroCenteredRMSNorm, ZeroCenteredLayerNorm)


@torch.no_grad()
def hostile_(model: nn.Module, seed: int = 0) -> nn.Module:
    """
    Fill a model in place with weights far from where initialisation puts them, so that no term goes unseen.

    Norm weights lie in +-[0.3, 2], all distinct; biases have a standard deviation of 0.5; matrices keep the variance
    of their input, with a different gain for every output; sinks, scales and bias tables are spread out. Activations
    stay finite and of order 1 to 100. Returns the model.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor) * scale

    def norm_weight(tensor: torch.Tensor) -> torch.Tensor:
        magnitude = 0.3 + 1.7 * torch.rand(tensor.shape, generator=generator)
        flipped = torch.rand(tensor.shape, generator=generator) < 0.2
        return torch.where(flipped, -magnitude, magnitude).to(tensor)

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                parameter.copy_(normal(parameter, 0.5))
            elif isinstance(module, NORMS):
                zero_centered = isinstance(module, ZERO_CENTERED_NORMS) or getattr(module, "unit_offset", False)
                parameter.copy_(norm_weight(parameter) - float(zero_centered))
            elif isinstance(module, nn.Linear):
                gain = 0.5 + torch.rand((parameter.shape[0], 1), generator=generator)
                parameter.copy_(normal(parameter) * gain.to(parameter) / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(normal(parameter))
    settle_(model, generator)
    return model


def settle_(model: nn.Module, generator: torch.Generator) -> None:
    """
    Give BatchNorms the statistics of a batch: with others, which no training leaves, a stack multiplies its activations
    from layer to layer until they overflow.
    """
    for stack in model.modules():
        norms = [module for module in stack.modules() if isinstance(module, BatchNorm)]
        if not norms or not isinstance(stack, VariantModel):
            continue
        momentum, config = norms[0].momentum, stack.config
        ids = torch.randint(1, config.vocab_size, (4, 16), generator=generator)
        source = torch.randn(4, 16, config.cross_attention_hidden_size or config.hidden_size, generator=generator)
        for norm in norms:
            norm.train().momentum = 1.0
        stack(ids, encoder_hidden_states=source if config.add_cross_attention else None, use_cache=False)
        for norm in norms:
            norm.train(stack.training).momentum = momentum
            norm.num_batches_tracked.zero_()
