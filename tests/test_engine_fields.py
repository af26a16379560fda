"""Engines: every field of a config is taken, known to change nothing there, or refused by its name."""

import pytest

import hf_variants_cli
from hf_variants import VariantConfig, VariantSeq2SeqConfig
from hf_variants.conversion import NotRepresentable
from hf_variants.conversion.engines import ctranslate2, onnx
from hf_variants.conversion.engines.ctranslate2 import lacks as ct2
from hf_variants.conversion.engines.fields import architectural_fields, in_the_way, pair_fields


SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip


def test_every_field_has_its_place_with_ctranslate2():
    config = VariantConfig(**SIZES)
    lacking = {row.field for row in ct2.lacks(config, config.per_layer_config[0])} - {"skip"}
    assert architectural_fields() == ct2.TAKEN | ct2.WITHOUT_EFFECT.keys() | lacking
    assert not ct2.TAKEN & ct2.WITHOUT_EFFECT.keys()
    assert pair_fields() == ct2.PAIR_TAKEN | ct2.PAIR_WITHOUT_EFFECT.keys()


def test_a_field_that_a_loader_does_not_know_is_refused_where_it_has_an_effect():
    known = (ct2.TAKEN | ct2.WITHOUT_EFFECT.keys()) - {"logit_scale", "sinusoidal_layout"}
    found = in_the_way(VariantConfig(**SIZES, logit_scale=0.3), ct2.lacks, known)
    assert {name: value for name, (value, _) in found.items()} == {"logit_scale": 0.3}
    assert not in_the_way(VariantConfig(**SIZES), ct2.lacks, known)


REFUSED = {
    "norm_type": {"norm_type": "dynamic_tanh"},
    "norm_placement": {"norm_placement": "branch"},
    "deepnorm_alpha": {"norm_placement": "deepnorm"},
    "parallel_block": {"norm_placement": "sandwich", "parallel_block": "two_norms"},
    "residual_from_norm": {"residual_from_norm": True},
    "first_layer_pre_norm": {"first_layer_pre_norm": False},
    "embedding_norm_position": {"embedding_norm": True, "embedding_norm_position": "before_positions"},
    "skip": {"per_layer_config": {1: {"skip": ["mlp"]}}},
    "num_attention_heads": {"num_key_value_heads": 2, "head_dim": 8, "per_layer_config": {1: {"num_attention_heads": 2}}},
    "hidden_act": {"hidden_act": "relu2"},
    "ffn_sub_norm": {"ffn_sub_norm": True},
    "attention_sub_norm": {"attention_sub_norm": True},
    "attention_gate": {"attention_gate": "headwise"},
    "attention_sinks": {"attention_sinks": True},
    "attn_logit_softcapping": {"attn_logit_softcapping": 30.0},
    "clip_qkv": {"clip_qkv": 2.0},
    "qk_norm": {"qk_norm": "full"},
    "qk_norm_type": {"qk_norm": "head", "qk_norm_type": "dynamic_tanh"},
    "qk_norm_eps": {"qk_norm": "head", "qk_norm_eps": 1e-3},
    "qk_norm_after_rope": {"qk_norm": "head", "qk_norm_after_rope": True},
    "sliding_window": {"layer_types": "SF", "sliding_window": 8},
    "position_embedding_type": {"position_embedding_type": "relative_bias"},
    "relative_attention_per_layer": {"position_embedding_type": "relative_bias", "relative_attention_per_layer": True},
    "alibi_bias_max": {"position_embedding_type": "alibi", "alibi_bias_max": 4},
    "alibi_slope_order": {
        "position_embedding_type": "alibi", "alibi_slope_order": "mpt", "num_attention_heads": 3, "head_dim": 8
    },
    "alibi_divisor": {"position_embedding_type": "alibi", "alibi_divisor": 2.5},
    "rope_parameters": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    "rope_turns_values": {"rope_turns_values": True},
    "rope_table_in_checkpoint": {"rope_table_in_checkpoint": True},
    "embedding_projection_position": {
        "embedding_size": 16, "embedding_projection_position": "after_norm", "position_embedding_type": "rope"
    },
    "type_vocab_size": {"type_vocab_size": 2},
    "task_type_vocab_size": {"task_type_vocab_size": 2},
    "lm_head_transform": {"lm_head_transform": True},
    "output_projection": {"is_causal": False, "embedding_size": 16, "output_projection": True},
}  # fmt: skip


def test_every_lack_of_ctranslate2_has_a_case():
    config = VariantConfig(**SIZES)
    assert REFUSED.keys() == {row.field for row in ct2.lacks(config, config.per_layer_config[0])}


@pytest.mark.parametrize("field", REFUSED)
def test_ctranslate2_refuses_by_field(field):
    with pytest.raises(NotRepresentable, match=f"`{field}`") as caught:
        ctranslate2.refuse_unrepresentable(VariantConfig(**SIZES | REFUSED[field]))
    assert field in caught.value.fields


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_parameters"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 32,
                }
            },
            "rope_parameters",
        ),
        ({"add_cross_attention": True}, "add_cross_attention"),
    ],
)  # fmt: skip
def test_onnx_refuses_by_field(fields, named):
    with pytest.raises(NotRepresentable, match=f"`{named}`"):
        onnx.refuse_unrepresentable(VariantConfig(**SIZES | fields))


@pytest.mark.parametrize("fields", [{}, *REFUSED.values()])
def test_onnx_takes_what_does_not_depend_on_the_length(fields):
    config = VariantConfig(**SIZES | fields)
    if "rope_parameters" not in fields:
        onnx.refuse_unrepresentable(config)


def test_a_window_as_wide_as_the_context_is_none():
    ctranslate2.refuse_unrepresentable(VariantConfig(**SIZES, layer_types="SF", sliding_window=64))


def test_of_an_encoder_decoder_the_stack_is_named():
    stacks = {"encoder": {**SIZES, "norm_eps": 1e-3}, "decoder": {**SIZES, "attention_sinks": True}}
    with pytest.raises(NotRepresentable) as caught:
        ctranslate2.refuse_unrepresentable(VariantSeq2SeqConfig(**stacks, decoder_start_token_id=1))
    assert caught.value.fields.keys() == {"decoder.norm_eps", "decoder.attention_sinks"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--engine", "ctranslate2", "--to", "llama"], "--to"),
        (["--engine", "ctranslate2", "--dtype", "bfloat16"], "--quantization"),
        (["--quantization", "int8"], "--engine"),
        (["--ignore-key", "a"], "--engine"),
    ],
)
def test_options_of_the_other_kind_of_export_are_refused(options, named, tmp_path, capsys):
    assert hf_variants_cli.main(["export", str(tmp_path), str(tmp_path / "out"), *options]) == 2
    assert named in capsys.readouterr().err
