"""Native types that are not supported: each is refused by the mechanism it needs, before a weight is read."""

import json

import pytest
from transformers import Gemma3ForConditionalGeneration
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_variants
from hf_variants.conversion import (
    ConversionError,
    UnsupportedModelType,
    convert,
    family,
    refusals,
    supported_model_types,
    verify,
)


SUPPORTED = supported_model_types()
CAUSAL = sorted(set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - {"hf_variant"})
OTHERS = sorted(
    {*modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, *modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES}
    - {"hf_variant", "hf_variant_seq2seq", *CAUSAL}
)


@pytest.mark.parametrize("model_type", [*CAUSAL, *OTHERS])
def test_every_native_type_is_supported_or_refused_with_its_reason(model_type):
    if model_type in SUPPORTED:
        assert refusals.mechanism(model_type) is None, "it is supported: remove the refusal"
        return
    sentence = refusals.sentence(model_type, SUPPORTED)
    assert model_type in sentence
    assert any(part in sentence for part in ("no family here yet", "which a dense stack does not have", "text tower"))


@pytest.mark.parametrize(
    ("model_type", "mechanism"),
    [
        ("mixtral", "mixture-of-experts"),
        ("gpt_oss", "mixture-of-experts"),
        ("deepseek_v3", "multi-head latent attention"),
        ("minicpm3", "multi-head latent attention"),
        ("mamba2", "state-space"),
        ("jamba", "state-space"),
        ("qwen3_next", "linear-attention"),
        ("lfm2", "convolutional"),
        ("gemma3n_text", "AltUp"),
        ("diffllama", "differential attention"),
        ("doge", "dynamic mask attention"),
        ("hrm_text", "loops"),
        ("longt5", "block-sparse attention"),
        ("deberta-v2", "disentangled attention"),
        ("prophetnet", "n-gram streams"),
        ("albert", "share one set of weights"),
        ("gemma3", "several modalities"),
        # Since transformers 5.24.
        *([("dory", "nGPT"), ("apertus1p5_text", "fewer rows")] if "dory" in CONFIG_MAPPING else []),
    ],
)
def test_the_mechanism_is_named(model_type, mechanism):
    assert mechanism in refusals.sentence(model_type)


def test_explicit_entries_are_types_of_transformers():
    assert [model_type for model_type in refusals.MECHANISMS if model_type not in CONFIG_MAPPING] == []


def test_a_multimodal_model_points_to_its_text_tower():
    assert "gemma3_text" in refusals.sentence("gemma3", ["gemma3_text"])
    assert "gemma3_text" not in refusals.sentence("gemma3", [])


def test_the_text_tower_converts_as_the_sentence_says():
    text = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = CONFIG_MAPPING["gemma3"](text_config=text, vision_config=vision, mm_tokens_per_image=4)
    ours = hf_variants.from_native(Gemma3ForConditionalGeneration(config).get_decoder())
    assert type(ours) is hf_variants.VariantModel


@pytest.mark.parametrize("function", [hf_variants.from_native, lambda path: convert(path, path / "out")])
@pytest.mark.parametrize("model_type", ["mixtral", "xlm", "gemma3", "no_such_type", ""])
def test_refused_before_any_weight_is_read(tmp_path, function, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "auto_map": {"AutoConfig": "evil.C"}}))
    (tmp_path / "evil.py").write_text("raise SystemExit('code of the checkpoint was run')")
    with pytest.raises(UnsupportedModelType):
        function(tmp_path)
    assert not (tmp_path / "out").exists()


def test_verify_refuses_too(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(UnsupportedModelType, match="mixture-of-experts"):
        verify(tmp_path, tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_a_broken_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConversionError, match=r"config\.json"):
        hf_variants.from_native(tmp_path)


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        hf_variants.from_native(tmp_path)


def test_a_type_of_another_release_is_called_one(monkeypatch):
    monkeypatch.setattr(family, "known_families", lambda: {"tomorrow": None})
    with pytest.raises(UnsupportedModelType, match="no type 'tomorrow', and another release has"):
        family.family_of("tomorrow")
