"""The config: what it derives, what it refuses and in which words, and that JSON keeps all of it."""

import json
import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from hypothesis import given
from transformers import AutoConfig, PreTrainedConfig

import hf_variants
from hf_variants import VariantConfig
from hf_variants.model.axis import ROUNDING, VariantConfigError, own_fields
from hf_variants.model.configuration_variant import AXES, FIELDS
from tests.strategies import variant_fields


SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "vocab_size": 64}

# What the validation must say: overrides of SMALL, and a part of the sentence. Every row of the table is here.
REFUSED = [
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "and a rotation is made of positive numbers."),
    ({"vocab_size": 0}, "`vocab_size` is 0. Set `vocab_size` to at least 1."),
    ({"hidden_size": 0, "head_dim": 8}, "`hidden_size` is 0."),
    ({"intermediate_size": 0}, "`intermediate_size` is 0."),
    ({"num_hidden_layers": 0}, "`num_hidden_layers` is 0."),
    ({"num_attention_heads": 0}, "`num_attention_heads` is 0."),
    ({"num_key_value_heads": 0}, "`num_key_value_heads` is 0."),
    ({"head_dim": 0}, "`head_dim` is 0."),
    ({"max_position_embeddings": 0}, "`max_position_embeddings` is 0."),
    ({"embedding_size": 0}, "`embedding_size` is 0."),
    ({"attention_dropout": 1.5}, "`attention_dropout` is 1.5, not a probability."),
    ({"residual_dropout": -0.1}, "`residual_dropout` is -0.1, not a probability."),
    ({"embedding_dropout": 1.0}, "`embedding_dropout` is 1.0, not a probability."),
    ({"activation_dropout": 2}, "`activation_dropout` is 2, not a probability."),
    ({"layerdrop": 1}, "`layerdrop` is 1, not a probability."),
    ({"final_dropout": 1}, "`final_dropout` is 1, not a probability."),
    ({"attention_residual_dropout": 1.5}, "`attention_residual_dropout` is 1.5, not a probability."),
    ({"classifier_dropout": -1}, "`classifier_dropout` is -1, not a probability."),
    ({"hidden_size": 30}, "`hidden_size` 30 is not a multiple of `num_attention_heads` 4."),
    ({"num_key_value_heads": 3}, "`num_attention_heads` 4 is not a multiple of `num_key_value_heads` 3."),
    ({"hidden_act": "gelu_tahn"}, "`hidden_act` gelu_tahn is not an activation that transformers has."),
    ({"lm_head_transform_act": "swush"}, "`lm_head_transform_act` swush is not an activation"),
    ({"classifier_transform_act": "tahn"}, "`classifier_transform_act` tahn is not an activation"),
    ({"choice_transform_act": "tahn"}, "`choice_transform_act` tahn is not an activation"),
    ({"pad_token_id": 64}, "`pad_token_id` 64 is outside the vocabulary of 64."),
    ({"norm_eps": 0.0}, "`norm_eps` is 0.0. Set `norm_eps` above 0"),
    ({"norm_bias": True}, "`norm_bias` is set, but `norm_type` rmsnorm has no bias."),
    (
        {"norm_type": "layernorm", "norm_bias": True, "norm_affine": False},
        "`norm_bias` is set, but `norm_affine` is not.",
    ),
    ({"norm_unit_offset": True, "norm_affine": False}, "without `norm_affine` there is no weight to offset."),
    (
        {"norm_type": "layernorm", "norm_casting_mode": "llama"},
        "`norm_casting_mode` llama is not defined for `norm_type` layernorm.",
    ),
    (
        {"norm_type": "dynamic_tanh", "norm_unit_offset": True},
        "`norm_unit_offset` is set, but `norm_type` dynamic_tanh has no form with `1 + w`.",
    ),
    ({"qk_norm": "head", "qk_norm_type": "dynamic_tanh", "qk_norm_affine": False}, "dynamic_tanh has no form without"),
    (
        {"norm_type": "batchnorm", "norm_unit_offset": True},
        "`norm_unit_offset` is set, but `norm_type` batchnorm has no form with `1 + w`.",
    ),
    (
        {"norm_type": "batchnorm", "qk_norm": "full"},
        "`qk_norm_type` batchnorm takes statistics of tokens, and `qk_norm`",
    ),
    ({"norm_type": "batchnorm", "ffn_chunk_size": 2}, "of which `ffn_chunk_size` shows the norm a part."),
    (
        {
            "norm_type": "batchnorm",
            "lm_head_transform": True,
            "classifier_transform": True,
            "classifier_transform_norm": True,
        },
        "of which `lm_head_transform`, `classifier_transform_norm` shows the norm a part.",
    ),
    ({"norm_type": "batchnorm", "norm_casting_mode": "none"}, "`norm_casting_mode` none is not defined for"),
    ({"norm_type": "batchnorm", "norm_momentum": 0.0}, "`norm_momentum` is 0.0."),
    (
        {"norm_type": "layernorm", "norm_casting_mode": "gemma"},
        "gemma for layernorm is defined without a bias (Cohere).",
    ),
    ({"qk_norm": "head", "qk_norm_bias": True}, "`qk_norm_bias` is set, but `qk_norm_type` rmsnorm has no bias."),
    (
        {"qk_norm": "per_head", "qk_norm_type": "layernorm", "qk_norm_bias": True},
        "`qk_norm_bias` is set, but `qk_norm` per_head has no bias.",
    ),
    (
        {"qk_norm": "head", "qk_norm_type": "layernorm", "qk_norm_bias": True, "qk_norm_affine": False},
        "`qk_norm_bias` is set, but `qk_norm_affine` is not.",
    ),
    (
        {
            "norm_type": "layernorm",
            "norm_bias": False,
            "norm_casting_mode": "gemma",
            "qk_norm": "head",
            "qk_norm_bias": True,
        },
        "`qk_norm_bias` is set, but `norm_casting_mode` gemma for layernorm has no bias (Cohere).",
    ),
    ({"qk_norm": "full", "qk_norm_after_rope": True}, "`qk_norm_after_rope` is set with `qk_norm` full."),
    ({"qk_norm_after_rope": True}, "`qk_norm_after_rope` is set, but `qk_norm` is none."),
    ({"heads_first_from": "norm"}, "`heads_first_from` is norm, but there is no norm on heads before the rotation."),
    (
        {"heads_first_from": "scores", "position_embedding_type": "none"},
        "`heads_first_from` is scores, but there is no rotation",
    ),
    (
        {"parallel_block": "two_norms", "norm_placement": "post"},
        "`parallel_block` two_norms is set with `norm_placement` post.",
    ),
    (
        {"parallel_block": "shared_norm", "residual_from_norm": True},
        "`residual_from_norm` is set with a `parallel_block`.",
    ),
    (
        {"residual_from_norm": True, "norm_placement": "branch"},
        "`residual_from_norm` is set, but `norm_placement` branch has no pre-norm.",
    ),
    (
        {"first_layer_pre_norm": False, "norm_placement": "branch"},
        "`first_layer_pre_norm` is off, but `norm_placement` branch has no pre-norm.",
    ),
    (
        {"first_layer_pre_norm": False, "parallel_block": "shared_norm"},
        "`first_layer_pre_norm` is off with a `parallel_block`",
    ),
    ({"deepnorm_alpha": 2.0}, "`deepnorm_alpha` or `deepnorm_beta` is set, but `norm_placement` is pre."),
    (
        {"per_layer_config": {1: {"norm_placement": "deepnorm"}}},
        "`per_layer_config` sets `norm_placement` deepnorm without `deepnorm_alpha` and `deepnorm_beta`.",
    ),
    (
        {"norm_placement": "deepnorm", "residual_multiplier": 0.5},
        "`residual_multiplier` is set with `norm_placement` deepnorm",
    ),
    (
        {"norm_placement": "deepnorm", "learned_scale_type": "channel"},
        "`learned_scale_type` is set with `norm_placement` deepnorm.",
    ),
    (
        {"residual_multiplier": 0.5, "learned_scale_type": "scalar"},
        "`learned_scale_type` and `residual_multiplier` both scale the branch.",
    ),
    ({"attn_logit_softcapping": 0}, "`attn_logit_softcapping` is 0. Set it above 0"),
    (
        {"token_type_table": "tokens", "embedding_size": 8, "tie_word_embeddings": False},
        "`token_type_table` tokens adds rows of `embedding_size`",
    ),
    ({"final_logit_softcapping": -1.0}, "`final_logit_softcapping` is -1.0."),
    (
        {"attn_logit_softcapping": 5.0, "attention_sinks": True},
        "`attn_logit_softcapping` and `attention_sinks` are both set",
    ),
    ({"logit_scale": 0, "logit_scale_by_division": True}, "`logit_scale_by_division` is set, but `logit_scale` is 0."),
    ({"clip_qkv": 0.0}, "`clip_qkv` is 0.0."),
    ({"layer_types": "SF"}, "`layer_types` has sliding layers, but `sliding_window` is not set."),
    ({"sliding_window": -1}, "`sliding_window` is -1."),
    ({"sliding_window": 1}, "`sliding_window` is 1, which transformers' caches cannot hold"),
    ({"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, "`layer_types` has ['chunked_attention']."),
    ({"layer_types": ["full_attention"] * 3}, "`layer_types` has 3 entries for 4 layers."),
    ({"no_rope_layers": [1]}, "`no_rope_layers` has 1 entries for 4 layers."),
    ({"no_rope_layers": [1, 2, 1, 1]}, "`no_rope_layers` has entries other than 0 and 1."),
    ({"layer_rope_theta": [1.0]}, "`layer_rope_theta` is [1.0] for 4 layers."),
    (
        {"no_rope_layers": [1, 0, 1, 1], "position_embedding_type": "alibi"},
        "`no_rope_layers` switches the rotation off in some layers, but `position_embedding_type` is alibi.",
    ),
    ({"rope_interleaved": True, "position_embedding_type": "learned"}, "but `position_embedding_type` is learned."),
    (
        {"longrope_recomputes_cache": True},
        "`longrope_recomputes_cache` is set, but `rope_parameters` has no",
    ),
    ({"rope_table_in_float32": True}, "`rope_table_in_float32` is set without `rope_in_float32`"),
    ({"rope_result_in_float32": True}, "`rope_result_in_float32` is set without `rope_in_float32`"),
    (
        {"rope_table_stored": True, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "`rope_table_stored` is set, but the `rope_type` depends on the length",
    ),
    ({"head_dim": 7}, "The rotated part of `head_dim` is odd or empty"),
    ({"rope_parameters": {"rope_type": "spiral"}}, "`rope_parameters` has the unknown rope_type spiral."),
    (
        {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
        "`rope_parameters` has no high_freq_factor and low_freq_factor, which its `rope_type` reads.",
    ),
    (
        {"head_dim": 2, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "`rope_parameters` of type dynamic rotates two channels",
    ),
    (
        {
            "head_dim": 12,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 32,
                "partial_rotary_factor": 0.25,
            },
        },
        "`rope_parameters` of type yarn rotates an odd number of channels",
    ),
    (
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 2.0, 3.0, 4.0]}},
        "`rope_parameters` of type longrope has not one factor for every pair of rotated channels.",
    ),
    ({"position_offset": 2}, "`position_offset` is set, but `position_embedding_type` rope has no table."),
    ({"position_offset": -1, "position_embedding_type": "learned"}, "`position_offset` is -1."),
    (
        {"position_embedding_type": "sinusoidal", "hidden_size": 33, "head_dim": 8},
        "Sinusoidal positions need an even width, not 33.",
    ),
    ({"position_ids_source": "input_ids"}, "`position_ids_source` input_ids counts non-padding tokens"),
    ({"padding_mask_source": "input_ids"}, "`padding_mask_source` input_ids masks padding tokens"),
    (
        {"position_ids_source": "attention_mask", "position_embedding_type": "learned"},
        "`position_ids_source` attention_mask gives padding the position -1",
    ),
    (
        {"sinusoidal_padding_zero": True, "position_embedding_type": "sinusoidal"},
        "`sinusoidal_padding_zero` is set, but `pad_token_id` is not.",
    ),
    ({"relative_attention_max_distance": 16}, "`relative_attention_num_buckets` must be at least 4"),
    ({"is_causal": False, "alibi_form": "key_position"}, "`alibi_form` key_position depends on the key alone"),
    (
        {"position_embedding_type": "alibi", "alibi_form": "key_offset", "attention_sinks": True},
        "`alibi_form` key_offset shifts all scores of a query, which `attention_sinks` do not cancel.",
    ),
    (
        {"embedding_size": 16, "tie_word_embeddings": True},
        "`tie_word_embeddings` is set, but `embedding_size` differs from `hidden_size`.",
    ),
    ({"output_projection": True}, "`output_projection` is set, but `embedding_size` equals `hidden_size`."),
    (
        {"clamp_in_float16": "blocks", "parallel_block": "shared_norm"},
        "`clamp_in_float16` is set with a `parallel_block`, which has no place for it.",
    ),
    (
        {"ffn_output_in_float32": True, "norm_type": "layernorm"},
        "`ffn_output_in_float32` is set with norms that give the dtype of their input.",
    ),
    (
        {"output_projection": True, "lm_head_transform": True, "embedding_size": 16},
        "`output_projection` and `lm_head_transform` both stand before the LM head.",
    ),
    (
        {"per_layer_config": {1: {"skip": ["mlp"]}}, "parallel_block": "shared_norm"},
        "`per_layer_config` skips a sublayer of a layer with `parallel_block` or `add_cross_attention`.",
    ),
    ({"add_cross_attention": True, "is_causal": False}, "`add_cross_attention` is set on an encoder"),
    ({"fused_gate_up": True, "ffn_type": "mlp"}, "`fused_gate_up` is set, but `ffn_type` mlp has no gate."),
    (
        {"lm_head_transform": True, "lm_head_input_scale": 0.5},
        "`lm_head_input_scale` and `lm_head_transform` both stand before the LM head.",
    ),
    ({"z_loss_coefficient": -1e-4}, "`z_loss_coefficient` is -0.0001."),
    ({"initializer_cutoff_factor": 0}, "`initializer_cutoff_factor` is 0."),
    ({"label_smoothing": 1.0}, "`label_smoothing` is 1.0."),
    (
        {"attention_score_form": "biased"},
        "`attention_score_form` is biased, but `position_embedding_type` rope has no",
    ),
    (
        {"attention_score_form": "biased", "position_embedding_type": "alibi", "attn_logit_softcapping": 5.0},
        "`attention_score_form` biased and `attn_logit_softcapping` are both set",
    ),
    (
        {"attention_score_form": "divided", "scale_query": True},
        "`attention_score_form` divided and `scale_query` are both set",
    ),
    ({"alibi_bias_max": 0}, "`alibi_bias_max` is 0."),
    ({"lm_head_unread_bias": True}, "`lm_head_unread_bias` is set without `lm_head_bias`, the one that is read."),
    (
        {"position_embedding_type": "sinusoidal", "sinusoidal_table_stored": True, "sinusoidal_table_grows": True},
        "`sinusoidal_table_stored` and `sinusoidal_table_grows` are both set, and a stored table has one length.",
    ),
    ({"ffn_chunk_size": -1}, "`ffn_chunk_size` is -1."),
    (
        {"ffn_chunk_size": 2, "parallel_block": "shared_norm"},
        "`ffn_chunk_size` is set with a `parallel_block`, which runs whole.",
    ),
    ({"alibi_divisor": 0}, "`alibi_divisor` is 0."),
    ({"broadcast_key_value": True}, "`broadcast_key_value` is set with 4 key/value heads."),
    (
        {"broadcast_key_value": True, "num_key_value_heads": 1, "attention_score_form": "fused"},
        "`broadcast_key_value` is set with `attention_score_form` fused, whose product cannot broadcast.",
    ),
    (
        {"rope_table_stored": True, "position_ids_source": "attention_mask"},
        "`position_ids_source` attention_mask gives padding the position -1, which the table of",
    ),
    (
        {"rope_table_in_checkpoint": True, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        "`rope_table_in_checkpoint` is set, but `rope_parameters` asks for more than the plain angles",
    ),
    (
        {"rope_table_in_checkpoint": True, "rope_frequencies_in_float32": True},
        "`rope_table_in_checkpoint` is set with `rope_table_stored`, `rope_frequencies_in_float32` or",
    ),
    (
        {"rope_turns_values": True, "qk_norm": "head"},
        "`rope_turns_values` is set with `qk_norm` or `heads_first_from`.",
    ),
    (
        {"rope_frequencies_in_float32": True, "rope_table_stored": True},
        "`rope_frequencies_in_float32` is set with `rope_table_stored` or `llama_4_scaling_beta`.",
    ),
]

REFUSED_PER_LAYER = [
    (
        {1: {"num_attention_heads": 2, "num_key_value_heads": 2}},
        {"position_embedding_type": "alibi"},
        "`position_embedding_type` alibi has one bias per head, shared by the layers.",
    ),
    ({1: {"skip": ["self_attn", "norm"]}}, {}, "`per_layer_config` skips `norm`."),
    ({1: {"skip": ["self_attn", "mlp"]}}, {}, "`per_layer_config` skips everything in layer 1."),
    ({0: {"skip": ["self_attn"]}}, {}, "`per_layer_config` skips `self_attn` in layer 0, the first of its layer type"),
]


def refusal(overrides: dict) -> str:
    with pytest.raises(VariantConfigError) as error:
        VariantConfig(**{**SMALL, **overrides})
    assert isinstance(error.value, ValueError)
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"), REFUSED, ids=lambda value: value[:40] if type(value) is str else ""
)
def test_refused(overrides, sentence):
    assert sentence in refusal(overrides)


@pytest.mark.parametrize(("layers", "overrides", "sentence"), REFUSED_PER_LAYER)
def test_refused_per_layer(layers, overrides, sentence):
    assert sentence in refusal({"per_layer_config": layers, **overrides})


@pytest.mark.parametrize(
    ("table", "cases"),
    [
        ("checks", [overrides for overrides, _ in REFUSED]),
        ("per_layer_checks", [{"per_layer_config": layers, **rest} for layers, rest, _ in REFUSED_PER_LAYER]),
    ],
)
def test_every_row_has_a_case(table, cases, monkeypatch):
    original, seen = getattr(VariantConfig, table), []

    def spy(self):
        seen.append(original(self))
        return seen[-1]

    monkeypatch.setattr(VariantConfig, table, spy)
    for overrides in cases:
        refusal(overrides)
    assert len({len(rows) for rows in seen}) == 1, "the tables' rows must not depend on the config"
    broken = {index for rows in seen for index, row in enumerate(rows) if row[0]}
    untested = [row[1] for index, row in enumerate(seen[0]) if index not in broken]
    assert untested == []


def test_every_problem_is_reported_once():
    message = refusal(
        {"norm_eps": 0.0, "clip_qkv": -1.0, "final_logit_softcapping": 0, "per_layer_config": {1: {"mlp_bias": True}}}
    )
    assert [message.count(field) for field in ("`norm_eps` is", "`clip_qkv` is", "`final_logit_softcapping` is")] == [
        1,
        1,
        1,
    ]


def test_every_sentence_ends_and_has_a_remedy():
    rows = VariantConfig(**SMALL).checks()
    assert all(part[-1] == "." and part[:1] not in (" ", "") for row in rows for part in row[1:])


@pytest.mark.parametrize(
    ("misspelt", "field"),
    [
        ("norm_placment", "norm_placement"),
        ("hidden_dim", None),
        ("num_attention_head", "num_attention_heads"),
        ("attn_logit_softcaping", "attn_logit_softcapping"),
        ("rope_interleave", "rope_interleaved"),
    ],
)
def test_near_misses_are_refused(misspelt, field):
    if field is None:
        assert getattr(VariantConfig(**SMALL, **{misspelt: 1}), misspelt) == 1
        return
    with pytest.raises(VariantConfigError, match=f"`{misspelt}` is not a field; did you mean `{field}`?"):
        VariantConfig(**SMALL, **{misspelt: 1})


@pytest.mark.parametrize(
    "overrides", [{"vocab_size": "64"}, {"norm_type": "groupnorm"}, {"layer_types": 4}, {"attention_bias": 1}]
)
def test_wrong_types_are_refused(overrides):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(overrides))):
        VariantConfig(**{**SMALL, **overrides})


@pytest.mark.parametrize(
    ("pattern", "kinds"), [("SSSF", "SSSF"), ("F", "FFFF"), ("sf", "SFSF"), ("SSSSSF", "SSSS"), ("SFF", "SFFS")]
)
def test_patterns_are_repeated_over_the_depth(pattern, kinds):
    letters = {"F": "full_attention", "S": "sliding_attention"}
    config = VariantConfig(**SMALL, layer_types=pattern, sliding_window=8)
    assert config.layer_types == [letters[kind] for kind in kinds]


@pytest.mark.parametrize("pattern", ["", "SSX", "full"])
def test_other_patterns_are_refused(pattern):
    with pytest.raises(VariantConfigError, match="not made of the letters F"):
        VariantConfig(**SMALL, layer_types=pattern, sliding_window=8)


def test_no_rotation_is_written_where_there_is_none():
    """Tools without our code read a config.json as transformers' own class, which refuses to rotate heads of 7 channels."""
    config = VariantConfig(**{**SMALL, "head_dim": 7}, position_embedding_type="learned")
    assert PreTrainedConfig.from_dict(json.loads(config.to_json_string())).head_dim == 7
    assert VariantConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    # A base that somebody set is kept for whoever turns the rotation on again.
    config = VariantConfig(**SMALL, position_embedding_type="none", rope_parameters={"rope_theta": 500.0})
    assert (
        VariantConfig.from_dict(config.to_dict(), position_embedding_type="rope").rope_parameters["rope_theta"]
        == 500.0
    )


def test_defaults_are_derived_and_written_out():
    written = json.loads(VariantConfig(**SMALL).to_json_string())
    assert written["head_dim"] == 8
    assert written["num_key_value_heads"] == 4
    assert written["intermediate_size"] == 128
    assert written["embedding_size"] == 32
    assert written["layer_types"] == ["full_attention"] * 4
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    # Where these are `None`, there is nothing.
    unset = {key for key, value in written.items() if value is None}
    optional = {
        "argument_order", "attention_scaling", "attn_logit_softcapping", "clip_qkv", "cross_attention_hidden_size",
        "deepnorm_alpha",
        "deepnorm_beta", "dtype", "final_logit_softcapping", "initializer_cutoff_factor", "layer_rope_theta",
        "native_leftovers", "pad_token_id", "sliding_window",
    }  # fmt: skip
    assert unset <= optional


@pytest.mark.parametrize(
    ("overrides", "derived"),
    [
        ({"ffn_type": "mlp"}, {"intermediate_size": 128}),
        ({"hidden_size": 768, "ffn_type": "glu"}, {"intermediate_size": 2048}),
        ({"norm_type": "layernorm"}, {"norm_bias": True, "norm_casting_mode": "none", "qk_norm_type": "layernorm"}),
        ({"norm_type": "layernorm", "norm_affine": False}, {"norm_bias": False, "qk_norm_affine": False}),
        ({"norm_type": "layernorm", "qk_norm": "per_head"}, {"qk_norm_bias": False}),
        ({"norm_placement": "post"}, {"final_norm": False}),
        ({"norm_placement": "branch"}, {"final_norm": True}),
        ({"norm_placement": "deepnorm"}, {"final_norm": False, "deepnorm_alpha": 8**0.25, "deepnorm_beta": 32**-0.25}),
        ({"mlp_bias": True, "attention_bias": True}, {"mlp_output_bias": True, "attention_output_bias": True}),
        ({"learned_scale_type": "scalar"}, {"layer_scale_init": 0.0}),
        ({"learned_scale_type": "channel"}, {"layer_scale_init": 1e-5}),
        ({"sliding_window": 8}, {"layer_types": ["sliding_attention"] * 4}),
        ({"hidden_size": 30, "head_dim": 8}, {"head_dim": 8}),
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ],
)
def test_derived_values(overrides, derived):
    config = VariantConfig(**{**SMALL, **overrides})
    assert {name: getattr(config, name) for name in derived} == derived


def test_rope_dictionaries_of_the_caller_are_left_alone():
    # transformers writes the context length into it, which the next config of a sweep would take for its own.
    parameters = {"rope_type": "yarn", "factor": 2.0}
    for context in (128, 512):
        config = VariantConfig(**SMALL, max_position_embeddings=context, rope_parameters=parameters)
        assert config.rope_parameters["original_max_position_embeddings"] == context
    assert parameters == {"rope_type": "yarn", "factor": 2.0}


def test_rope_parameters_per_layer_type_must_be_complete():
    nested = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    kinds = {"layer_types": "SF", "sliding_window": 8}
    sentence = "`rope_parameters` has entries per layer type, but none for full_attention. Add one"
    assert sentence in refusal({**kinds, "rope_parameters": nested})
    config = VariantConfig(**SMALL, **kinds, rope_parameters={**nested, "full_attention": None})
    assert [config.rope_parameters_of(i) is None for i in range(4)] == [False, True, False, True]


def same(first: VariantConfig, second: VariantConfig) -> bool:
    return json.loads(first.to_json_string()) == json.loads(second.to_json_string())


@given(fields=variant_fields())
def test_json_keeps_everything(fields, tmp_path_factory):
    config = VariantConfig(**fields)
    assert same(VariantConfig.from_dict(config.to_dict()), config)
    assert same(VariantConfig.from_dict(config.to_diff_dict()), config)
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(folder)
    loaded = AutoConfig.from_pretrained(folder)
    assert type(loaded) is VariantConfig
    assert same(loaded, config)
    # Nothing that was set is missing from the file: a reader needs no defaults of ours.
    written = json.loads((folder / "config.json").read_text())
    assert {name for name in fields if name not in written} <= {"per_layer_config"}


def test_configs_that_differ_in_a_field_differ_in_the_file():
    reference = VariantConfig(**SMALL)
    for overrides in ({"norm_eps": 1e-5}, {"rope_theta": 1e5}, {"qk_norm": "head"}, {"use_cache": False}):
        assert not same(VariantConfig(**SMALL, **overrides), reference)


def test_layers_may_differ_and_json_keeps_it(tmp_path):
    layers = {1: {"num_key_value_heads": 1, "intermediate_size": 16}, 2: {"skip": ["mlp"]}}
    config = VariantConfig(**SMALL, per_layer_config=layers)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert same(loaded, config)
    assert [layer.num_key_value_heads for layer in loaded.per_layer_config] == [4, 1, 4, 4]
    assert [layer.intermediate_size for layer in loaded.per_layer_config] == [128, 16, 128, 128]
    assert [list(layer.skip) for layer in loaded.per_layer_config] == [[], [], ["mlp"], []]


def test_layers_are_validated_with_what_they_change():
    sentence = "`num_attention_heads` 4 is not a multiple of `num_key_value_heads` 3."
    assert sentence in refusal({"per_layer_config": {2: {"num_key_value_heads": 3}}})


def test_every_per_layer_field_exists():
    assert set(VariantConfig.__dataclass_fields__) >= VariantConfig.per_layer_fields()


def test_what_a_layer_may_not_change_is_named_with_what_it_may():
    others = {
        "hidden_size": 64, "vocab_size": 8, "norm_type": "layernorm", "norm_eps": 1e-3, "layer_types": ["F"],
        "is_causal": False, "position_embedding_type": "learned", "sliding_window": 9, "tie_word_embeddings": True,
        "max_position_embeddings": 8, "embedding_norm": True, "rope_interleaved": True, "layerdrop": 0.5,
        "hiden_act": "relu",
    }  # fmt: skip
    for field, value in others.items():
        message = refusal({"per_layer_config": {1: {field: value}}})
        assert f"`per_layer_config` changes `{field}`" in message
        assert "`num_key_value_heads`" in message


def test_no_layer_of_a_kind_may_lose_the_attention_that_measures_its_past():
    message = refusal({"layer_types": "FS", "sliding_window": 8, "per_layer_config": {1: {"skip": ["self_attn"]}}})
    assert "skips `self_attn` in layer 1, the first of its layer type" in message
    VariantConfig(**SMALL, layer_types="FS", sliding_window=8, per_layer_config={3: {"skip": ["self_attn"]}})


@pytest.mark.parametrize("backend", ["sdpa", "flex_attention", "flash_attention", "paged", "eager"])
def test_backends_name_the_fields_they_cannot_compute(backend):
    assert VariantConfig(**SMALL).unsupported_attention_features(backend) == []
    capped = VariantConfig(**SMALL, attn_logit_softcapping=5.0).unsupported_attention_features(backend)
    assert capped == (["attn_logit_softcapping"] if backend in ("sdpa", "paged") else [])
    one_layer = VariantConfig(**SMALL, per_layer_config={1: {"attn_logit_softcapping": 5.0}})
    assert one_layer.unsupported_attention_features(backend) == capped


def test_documented_fields_are_the_fields():
    for room in AXES:
        architecture, _, rounding = room.__doc__.partition("Rounding:")
        fields = own_fields(room)
        of_rounding = {name for name, entry in fields.items() if ROUNDING in entry.metadata}
        assert fields.keys() - of_rounding <= set(re.findall(r"\w+", architecture))
        assert of_rounding <= set(re.findall(r"\w+", rounding))
        # Last, and so out of the way of who reads what can be chosen.
        assert set(list(fields)[len(fields) - len(of_rounding) :]) == of_rounding
        assert room.__doc__.splitlines()[1].strip() in VariantConfig.__doc__
    assert FIELDS.keys() <= set(re.findall(r"\w+", VariantConfig.__doc__))
    inherited = PreTrainedConfig.__dataclass_fields__.keys()
    assert VariantConfig.__dataclass_fields__.keys() - inherited <= FIELDS.keys()


# Fields whose rule says that they have no effect, each set to other than its default.
IDLE = [
    ({"sliding_window": 3, "layer_types": "F"}, "no layer is sliding_attention"),
    ({"embedding_norm_position": "before_positions"}, "`embedding_norm` is off"),
    ({"parallel_sum_order": "residual_first"}, "`parallel_block` is none"),
    ({"layer_scale_init": 0.3}, "`learned_scale_type` is none"),
    ({"initializer_sinks": "zero"}, "`attention_sinks` is off"),
    ({"initializer_positions": "sinusoidal"}, "`position_embedding_type` is rope"),
    ({"qk_norm_eps": 0.1}, "`qk_norm` is none"),
    ({"norm_alpha_init": 0.7}, "no norm is dynamic_tanh"),
    ({"norm_momentum": 0.7}, "no norm is batchnorm"),
    ({"norm_eps": 0.1, "norm_type": "dynamic_tanh"}, "every norm is dynamic_tanh"),
    ({"qk_norm_type": "layernorm"}, "`qk_norm` is none"),
    ({"qk_norm_affine": False}, "`qk_norm` is none"),
    ({"cross_attention_hidden_size": 12}, "`add_cross_attention` is off"),
    ({"alibi_bias_max": 4}, "`position_embedding_type` is rope"),
    ({"alibi_form": "key_index"}, "`position_embedding_type` is rope"),
    ({"sinusoidal_layout": "half"}, "`position_embedding_type` is rope"),
    ({"relative_attention_per_layer": True}, "`position_embedding_type` is rope"),
    (
        {"position_embedding_type": "alibi", "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
        "`position_embedding_type` is alibi",
    ),
    (
        {"position_embedding_type": "alibi", "position_ids_source": "attention_mask"},
        "`position_embedding_type` is alibi",
    ),
    ({"embedding_projection_bias": True}, "`embedding_size` equals `hidden_size`"),
    ({"embedding_multiplier_position": "stack"}, "`embedding_multiplier` is 1"),
    ({"embedding_multiplier_in_weight_dtype": True}, "`embedding_multiplier` is 1"),
    ({"padding_embedding_frozen": False}, "`pad_token_id` is not set"),
    ({"token_type_table": "tokens", "type_vocab_size": 2}, "`type_vocab_size` gives token types a table"),
    ({"lm_head_transform_act": "relu"}, "`lm_head_transform` is off"),
    ({"lm_head_transform_bias": False}, "`lm_head_transform` is off"),
    ({"logit_scale_by_division": True, "logit_scale": 0.25}, "`logit_scale` is 0.25, a power of two"),
    ({"classifier_transform_norm": True}, "`classifier_transform` is off"),
    ({"ffn_residual_dropout": False}, "`residual_dropout` is 0"),
]


@pytest.fixture
def warnings_of_configs(caplog, monkeypatch):
    from hf_variants.model import configuration_variant

    configuration_variant.logger.warning_once.__func__.cache_clear()
    monkeypatch.setattr(configuration_variant.logger, "propagate", True)
    return caplog


@pytest.mark.parametrize(
    ("overrides", "because"), IDLE, ids=lambda value: next(iter(value)) if type(value) is dict else ""
)
def test_a_field_without_effect_is_said_to_have_none(overrides, because, warnings_of_configs, tmp_path):
    field = (
        "rope_parameters"
        if "rope_parameters" in overrides
        else next(name for name in overrides if name not in ("position_embedding_type", "layer_types", "logit_scale"))
    )
    config = VariantConfig(**SMALL, **overrides)
    assert f"`{field}` is set, but has no effect, because {because}." in warnings_of_configs.text
    assert warnings_of_configs.text.count("no effect") == 1
    # Saved, it is nobody's choice any more.
    warnings_of_configs.clear()
    config.save_pretrained(tmp_path)
    assert same(AutoConfig.from_pretrained(tmp_path), config)
    assert warnings_of_configs.text == ""


@pytest.mark.parametrize(
    ("overrides", "because"), IDLE, ids=lambda value: next(iter(value)) if type(value) is dict else ""
)
def test_a_field_without_effect_has_none(overrides, because):
    config = VariantConfig(**{**SMALL, "num_hidden_layers": 2}, **overrides, attn_implementation="eager")
    untouched = {name: FIELDS[name].default for name in config.idle_fields()}
    plain = VariantConfig(**{**config.to_dict(), **untouched}, attn_implementation="eager")
    assert not same(config, plain)
    models = [hf_variants.VariantForCausalLM(each).eval() for each in (config, plain)]
    models[1].load_state_dict(models[0].state_dict())
    ids = torch.arange(10).repeat(2, 1)
    assert torch.equal(*(model(ids).logits for model in models))


def test_what_is_derived_or_a_presets_is_nobodys_choice(warnings_of_configs):
    VariantConfig(**SMALL)
    VariantConfig(**VariantConfig(**SMALL, position_embedding_type="alibi").to_dict())
    for name in hf_variants.presets():
        VariantConfig.from_preset(name)
    assert warnings_of_configs.text == ""
    no_bias = {"position_embedding_type": "none", "attention_score_form": "multiplied"}
    VariantConfig.from_preset("bloom", **no_bias, alibi_bias_max=4)
    assert "`alibi_bias_max`" in warnings_of_configs.text
    assert "`alibi_form`" not in warnings_of_configs.text


def test_a_field_is_idle_where_no_layer_reads_it():
    one = VariantConfig(**SMALL, per_layer_config={1: {"qk_norm": "head"}}, qk_norm_eps=0.1)
    assert "qk_norm_eps" not in one.idle_fields()
    assert "qk_norm_eps" in VariantConfig(**SMALL, per_layer_config={1: {"mlp_bias": True}}).idle_fields()


def test_fields_of_older_files_load_under_their_new_names():
    config = VariantConfig(layer_scale_type="channel", num_hidden_layers=2)
    assert (config.learned_scale_type, config.layer_scale_init) == ("channel", 1e-5)
    assert "layer_scale_type" not in config.to_dict()
    layers = {1: {"layer_scale_type": "scalar", "layer_scale_init": 0.5}}
    assert (
        VariantConfig(num_hidden_layers=2, per_layer_config=layers).per_layer_config[1].learned_scale_type == "scalar"
    )
