"""Presets are what their sources are: compared with transformers' own configs, and with what the papers say."""

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_variants
from hf_variants import VariantConfig
from hf_variants.conversion.config_map import differing_fields
from hf_variants.conversion.family import family_of
from hf_variants.presets import PRESETS, resolve_preset


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

# The defaults of `GraniteConfig` switch its multipliers off; these are Granite 3.0 2B's.
GRANITE_2B = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.015625,
    "logits_scaling": 8.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
NATIVE_OPTIONS = {"granite": GRANITE_2B}

WITH_NATIVE = {
    name: model_type
    for name, preset in PRESETS.items()
    if (model_type := preset.source.split(",")[0]) in CONFIG_MAPPING
}


def small(name: str, **overrides) -> VariantConfig:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 8, "vocab_size": 99}
    return VariantConfig.from_preset(name, **{**sizes, **overrides})


def test_only_presets_without_a_native_class_go_unchecked():
    assert set(PRESETS) - set(WITH_NATIVE) == {"vanilla", "deepnorm", "palm"}


@pytest.mark.parametrize("name", WITH_NATIVE)
def test_agrees_with_the_native_config(name):
    native = CONFIG_MAPPING[WITH_NATIVE[name]](**NATIVE_OPTIONS.get(name, {}))
    converted = family_of(WITH_NATIVE[name]).config_map.to_variant(native)
    given = {field: getattr(converted, field) for field in (*SIZES, *SPECIAL_TOKENS)}
    assert differing_fields(VariantConfig.from_preset(name, **given), converted) == {}


def test_palm_is_the_papers():
    # https://arxiv.org/abs/2204.02311, section 2: no biases in dense kernels or norms, SwiGLU with 4d, one key and
    # value head, parallel layers, and shared embeddings whose logits are scaled by 1 / sqrt(d) (section 5).
    config = small("palm")
    assert (config.attention_bias, config.mlp_bias, config.norm_bias) == (False, False, False)
    assert (config.intermediate_size, config.num_key_value_heads) == (256, 1)
    assert (config.parallel_block, config.logit_scale, config.tie_word_embeddings) == ("shared_norm", 1 / 8, True)


def test_vanilla_and_deepnorm_are_the_papers():
    vanilla, deepnorm = small("vanilla"), small("deepnorm")
    assert (vanilla.embedding_multiplier, vanilla.norm_placement, vanilla.final_norm) == (8.0, "post", False)
    # Table 1 of https://arxiv.org/abs/2203.00555, decoder-only with M layers: (2M)^(1/4) and (8M)^(-1/4).
    assert deepnorm.deepnorm_alpha == pytest.approx(2.0)
    assert deepnorm.deepnorm_beta == pytest.approx(64**-0.25)
    differences = differing_fields(vanilla, deepnorm)
    assert set(differences) == {"norm_placement", "deepnorm_alpha"}


def test_values_that_depend_on_sizes_follow_the_overrides():
    assert small("gemma2", hidden_size=144).embedding_multiplier == 12.0
    assert small("granite", head_dim=32).attention_scaling == 1 / 32
    assert small("granite").attention_scaling == 1 / 16
    assert small("smollm3", num_hidden_layers=5).no_rope_layers == [1, 1, 1, 0, 1]


def test_patterns_are_expanded_over_the_depth():
    kinds = small("gemma3").layer_types
    assert kinds == ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 2
    config = small("command-a")
    rotated = [config.rope_parameters_of(i) is not None for i in range(8)]
    assert rotated == [kind == "sliding_attention" for kind in config.layer_types] == [True, True, True, False] * 2


def test_a_stack_too_shallow_for_the_pattern_is_built():
    assert small("command-a", num_hidden_layers=2).layer_types == ["sliding_attention"] * 2


def test_overrides_win():
    config = small("gemma2", norm_placement="pre", attn_logit_softcapping=None, layer_types="F")
    assert (config.norm_placement, config.attn_logit_softcapping) == ("pre", None)
    assert set(config.layer_types) == {"full_attention"}
    assert small("gemma2", embedding_multiplier=1.0).embedding_multiplier == 1.0


def test_rope_keywords_win_inside_the_presets_dictionary():
    entry = small("gpt-neox", rope_theta=5e5, partial_rotary_factor=0.5).rope_parameters
    assert (entry["rope_theta"], entry["partial_rotary_factor"]) == (5e5, 0.5)
    parameters = small("gemma3", rope_theta=5e5).rope_parameters
    assert {entry["rope_theta"] for entry in parameters.values()} == {5e5}


def test_presets_are_not_changed_by_use():
    # transformers completes RoPE dictionaries in place.
    before = resolve_preset("gemma3", {})
    small("gemma3", rope_theta=1.0)
    assert resolve_preset("gemma3", {}) == before


@pytest.mark.parametrize(
    ("name", "hint"),
    [("lama", "Did you mean `llama`?"), ("cohere", "Did you mean `command-r` or `command-a`?"), ("GPT2", "`gpt2`")],
)
def test_unknown_name_is_answered_with_near_ones(name, hint):
    with pytest.raises(ValueError, match="There is no preset") as error:
        VariantConfig.from_preset(name)
    assert hint in str(error.value)


def test_a_name_like_no_other_gets_the_way_to_the_list():
    with pytest.raises(ValueError, match=r"There is no preset `zzz`. `hf_variants.presets\(\)` lists all"):
        VariantConfig.from_preset("zzz")


def test_presets_are_listed_with_a_line_each():
    lines = hf_variants.presets()
    assert list(lines) == list(PRESETS)
    assert all("\n" not in line and PRESETS[name].source in line for name, line in lines.items())


def test_a_misspelt_override_is_refused():
    with pytest.raises(ValueError, match="did you mean `norm_placement`"):
        small("llama", norm_placment="post")
