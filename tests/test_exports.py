"""Exports tell the truth: a native model or every field in the way; what is lost is named; what builds can be saved."""

from typing import Literal, get_args, get_origin

import pytest
import torch

import hf_variants
from hf_variants import VariantConfig
from hf_variants.card import summary
from hf_variants.conversion import NotRepresentable, supported_model_types
from hf_variants.conversion.native_target import target_of
from hf_variants.describe import describe
from hf_variants.drawing import block_svg
from hf_variants.hub import bundle
from hf_variants.model.axis import VariantConfigError
from hf_variants.model.configuration_variant import FIELDS


SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def encoder(**fields) -> VariantConfig:
    return VariantConfig(
        **SMALL, is_causal=False, norm_type="layernorm", norm_placement="post", ffn_type="mlp", **fields
    )


VARIANTS = {
    "Llama-like": (VariantConfig.from_preset("llama", **SMALL), "causal_lm"),
    "an odd width of heads": (VariantConfig.from_preset("gpt2", **(SMALL | {"hidden_size": 28})), "causal_lm"),
    "an encoder": (encoder(position_embedding_type="learned"), "masked_lm"),
    "layers that differ": (VariantConfig(**SMALL, per_layer_config={1: {"intermediate_size": 32}}), "causal_lm"),
    "an encoder-decoder": (
        hf_variants.VariantSeq2SeqConfig(
            encoder={**SMALL, "is_causal": False}, decoder=SMALL, decoder_start_token_id=0, pad_token_id=0
        ),
        "seq2seq_lm",
    ),
}


def in_the_way(config, model_type: str, head: str) -> dict[str, tuple] | None:
    try:
        target_of(config, model_type, head)
    except NotRepresentable as error:
        return error.fields
    return None


@pytest.mark.parametrize("name", VARIANTS)
def test_every_type_is_a_model_or_names_fields(name):
    config, head = VARIANTS[name]
    known = {*config.to_dict(), *FIELDS, "model_type", "architectures"}
    stacks = {f"{stack}.{field}" for stack in ("encoder", "decoder") for field in known}
    for model_type in supported_model_types():
        fields = in_the_way(config, model_type, head)
        assert fields is None or (fields and set(fields) <= known | stacks), (model_type, fields)


def test_what_single_layers_have_is_in_the_way():
    config, head = VARIANTS["layers that differ"]
    assert in_the_way(config, "llama", head) == {"per_layer_config": ({"1": {"intermediate_size": 32}}, None)}
    assert {"per_layer_config", "norm_type", "position_embedding_type"} <= set(in_the_way(config, "gpt2", head))


def test_a_native_config_that_cannot_be_made_names_the_field():
    config, head = VARIANTS["Llama-like"]
    with pytest.raises(
        NotRepresentable, match="`pad_token_id` is None, which modernbert-decoder does not take"
    ) as error:
        target_of(config, "modernbert-decoder", head)
    assert "bos_token_id" not in error.value.fields


def test_every_training_setting_that_is_lost_is_named():
    lost = {"residual_dropout": 0.1, "embedding_dropout": 0.2, "activation_dropout": 0.3, "layerdrop": 0.4}
    loss = {"z_loss_coefficient": 1e-4, "label_smoothing": 0.1}
    model = hf_variants.VariantForCausalLM(
        VariantConfig.from_preset("llama", **SMALL, attention_dropout=0.5, **lost, **loss)
    )
    native = hf_variants.to_native(model, "llama")
    assert native.config.attention_dropout == 0.5
    assert native.conversion_report.dropped == lost | loss


@pytest.mark.parametrize("field", ["logit_scale", "lm_head_input_scale"])
def test_no_scale_goes_into_a_head_that_is_normalised(field):
    config = VariantConfig.from_preset(
        "llama", **SMALL, pad_token_id=0, rope_in_float32=True, lm_head_normalized=True, **{field: 0.5}
    )
    with pytest.raises(NotRepresentable, match=field):
        hf_variants.to_native(hf_variants.VariantForCausalLM(config), "baichuan")


def another(field: str):
    """A value other than the default, by the field's type."""
    values = {
        "num_attention_heads": 8,
        "intermediate_size": 32,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "hidden_act": "gelu",
        "ffn_chunk_size": 2,
    }
    hint, default = FIELDS[field].type, FIELDS[field].default
    if field in values:
        return values[field]
    if get_origin(hint) is Literal or Literal in map(get_origin, get_args(hint)):
        literal = hint if get_origin(hint) is Literal else next(h for h in get_args(hint) if get_origin(h) is Literal)
        return next(value for value in get_args(literal) if value != default)
    return not default if hint is bool or bool in get_args(hint) else 0.5


@pytest.mark.parametrize("field", sorted(VariantConfig.per_layer_fields()))
def test_layers_that_differ_are_saved_described_and_drawn(field, tmp_path):
    try:
        config = VariantConfig(**SMALL, per_layer_config={1: {field: another(field)}})
    except VariantConfigError as error:
        pytest.skip(f"no such variant: {error}")
    model = hf_variants.VariantForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "saved")
    bundle(tmp_path / "saved", tmp_path / "bundled")
    loaded = hf_variants.VariantForCausalLM.from_pretrained(tmp_path / "bundled")
    assert loaded.config.per_layer_config[1].to_dict()[field] == another(field)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    assert describe(config)
    assert summary(config)
    assert block_svg(config)
