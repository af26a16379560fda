"""Overrides of a saved config obey the rules of its construction, whichever way they come."""

import inspect
import logging

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_variants import (
    VariantConfig,
    VariantForCausalLM,
    VariantForConditionalGeneration,
    VariantModel,
    VariantSeq2SeqConfig,
)


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


def plain(config):
    return {name: value for name, value in config.to_dict().items() if name not in ("_name_or_path", "architectures")}


def by_auto_config(config, folder, overrides):
    config.save_pretrained(folder)
    return AutoConfig.from_pretrained(folder, **overrides)


def by_class(config, folder, overrides):
    config.save_pretrained(folder)
    return type(config).from_pretrained(folder, **overrides)


def by_dict(config, folder, overrides):
    return type(config).from_dict(config.to_dict(), **overrides)


def by_update(config, folder, overrides):
    config.update(overrides)
    return config


WAYS = pytest.mark.parametrize("override", [by_auto_config, by_class, by_dict, by_update])
ROPE = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("saved", "overrides", "constructed"),
    [
        ({}, {"hidden_size": 64}, {"hidden_size": 64}),
        ({}, {"num_attention_heads": 8}, {"num_attention_heads": 8}),
        # What was chosen is kept; what follows from the others follows.
        ({"head_dim": 16, "num_key_value_heads": 2}, {"num_attention_heads": 2},
         {"head_dim": 16, "num_key_value_heads": 2, "num_attention_heads": 2}),
        ({"embedding_size": 16}, {"hidden_size": 64}, {"embedding_size": 16, "hidden_size": 64}),
        ({}, {"norm_type": "layernorm", "norm_placement": "post"}, {"norm_type": "layernorm", "norm_placement": "post"}),
        ({}, {"num_hidden_layers": 2}, {"num_hidden_layers": 2}),
        ({"sliding_window": 8}, {"num_hidden_layers": 2}, {"sliding_window": 8, "num_hidden_layers": 2}),
        ({"norm_placement": "deepnorm"}, {"num_hidden_layers": 2}, {"norm_placement": "deepnorm", "num_hidden_layers": 2}),
        ({"layer_types": "SF", "sliding_window": 8}, {"layer_types": "F", "num_hidden_layers": 2},
         {"layer_types": "F", "num_hidden_layers": 2, "sliding_window": 8}),
        ({}, {"learned_scale_type": "scalar"}, {"learned_scale_type": "scalar"}),
        ({}, {"layer_scale_type": "scalar"}, {"learned_scale_type": "scalar"}),
        ({}, {"rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"rope_theta": 5e5}, {"rope_scaling": LINEAR}, {"rope_parameters": {**LINEAR, "rope_theta": 5e5}}),
        ({"rope_parameters": ROPE}, {"rope_theta": 1e4}, {"rope_parameters": {**ROPE, "rope_theta": 1e4}}),
        ({"rope_parameters": ROPE}, {"partial_rotary_factor": 0.25},
         {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.25}}),
        ({"rope_parameters": {**LINEAR, "rope_theta": 5e5}}, {"rope_scaling": None}, {"rope_theta": 5e5}),
        ({"rope_theta": 5e5}, {"rope_parameters": {**LINEAR, "rope_theta": 1e3}},
         {"rope_parameters": {**LINEAR, "rope_theta": 1e3}}),
        ({}, {"per_layer_config": {1: {"num_key_value_heads": 2}}}, {"per_layer_config": {1: {"num_key_value_heads": 2}}}),
        ({"per_layer_config": {1: {"intermediate_size": 48}}}, {"hidden_size": 64},
         {"per_layer_config": {1: {"intermediate_size": 48}}, "hidden_size": 64}),
        ({"intermediate_size": 96, "per_layer_config": {1: {"head_dim": 16}}}, {"attention_dropout": 0.1},
         {"intermediate_size": 96, "per_layer_config": {1: {"head_dim": 16}}, "attention_dropout": 0.1}),
        ({}, {"num_labels": 5, "use_cache": False}, {"num_labels": 5, "use_cache": False}),
    ],
)  # fmt: skip
def test_an_override_gives_what_construction_gives(saved, overrides, constructed):
    changed = VariantConfig.from_dict(VariantConfig(**{**SIZES, **saved}).to_dict(), **overrides)
    assert plain(changed) == plain(VariantConfig(**{**SIZES, **constructed}))


@WAYS
def test_every_way_does_the_same(override, tmp_path):
    overrides = {"hidden_size": 64, "rope_theta": 5e5, "per_layer_config": {1: {"num_key_value_heads": 2}}}
    assert plain(override(VariantConfig(**SIZES), tmp_path, overrides)) == plain(VariantConfig(**SIZES | overrides))
    for wrong, message in (({"norm_placment": "post"}, "did you mean"), ({"hidden_size": 30}, "`hidden_size`")):
        config = VariantConfig(**SIZES)
        before = plain(config)
        with pytest.raises(ValueError, match=message):
            override(config, tmp_path, wrong)
        assert plain(config) == before


@pytest.mark.parametrize(
    ("saved", "overrides", "message"),
    [
        ({"layer_types": "SF", "sliding_window": 8}, {"num_hidden_layers": 2}, "layer"),
        ({"head_dim": 16}, {"rope_scaling": {"rope_type": "linear"}}, "has no factor"),
        ({"layer_rope_theta": [1e4] * 4}, {"rope_theta": 5e5}, "`rope_theta` would change the rotation of all layers"),
        (
            {"layer_types": "SF", "sliding_window": 8,
             "rope_parameters": {"full_attention": None, "sliding_attention": {"rope_theta": 1e4}}},
            {"rope_theta": 5e5},
            "`rope_theta` would change the rotation of all layers",
        ),
        ({}, {"norm_type": "rmsnorm", "norm_bias": True}, "`norm_bias`"),
    ],
)  # fmt: skip
def test_what_construction_refuses_is_refused(saved, overrides, message):
    with pytest.raises(ValueError, match=message):
        VariantConfig.from_dict(VariantConfig(**{**SIZES, **saved}).to_dict(), **overrides)


@WAYS
def test_stacks_of_an_encoder_decoder_are_overridden_in_part(override, tmp_path):
    stacks = {"encoder": {**SIZES, "norm_placement": "deepnorm"}, "decoder": {**SIZES, "norm_placement": "deepnorm"}}
    config = VariantSeq2SeqConfig(**stacks)
    changed = override(config, tmp_path, {"decoder": {"num_hidden_layers": 2}, "tie_word_embeddings": False})
    decoder = {**stacks["decoder"], "num_hidden_layers": 2}
    expected = VariantSeq2SeqConfig(encoder=stacks["encoder"], decoder=decoder, tie_word_embeddings=False)
    assert plain(changed) == plain(expected)
    assert changed.num_hidden_layers == 2
    for overrides, message in (
        ({"hidden_size": 64}, "Set it in `decoder`"),
        ({"norm_placement": "post"}, "of its stacks"),
        ({"decoder": {"norm_placment": "post"}}, "did you mean"),
        ({"share_embedings": False}, "did you mean"),
    ):
        with pytest.raises(ValueError, match=message):
            override(VariantSeq2SeqConfig(**stacks), tmp_path, overrides)


def test_a_model_is_loaded_with_overrides(tmp_path):
    model = VariantForCausalLM(VariantConfig(**SIZES)).eval()
    model.save_pretrained(tmp_path)
    for loader in (AutoModelForCausalLM, VariantForCausalLM):
        changed = loader.from_pretrained(tmp_path, rope_theta=50.0, attn_implementation="eager", dtype=torch.float64)
        assert changed.config.rope_parameters["rope_theta"] == 50.0
        assert (changed.dtype, changed.config._attn_implementation) == (torch.float64, "eager")
        ids = torch.arange(3, 20)[None]
        assert not torch.allclose(changed.float()(ids).logits, model(ids).logits, atol=1e-4)
        with pytest.raises(ValueError, match="did you mean"):
            loader.from_pretrained(tmp_path, norm_placment="post")
        # Once it built a factorised embedding beside weights that do not fit.
        with pytest.raises(RuntimeError, match="size"):
            loader.from_pretrained(tmp_path, hidden_size=16)


def test_what_loading_takes_is_not_mistaken_for_a_field():
    hub = {"cache_dir", "code_revision", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
           "trust_remote_code", "return_unused_kwargs", "adapter_kwargs", "device_map", "max_memory", "offload_folder",
           "quantization_config", "attn_implementation", "tp_plan", "gguf_file", "state_dict", "dtype", "torch_dtype",
           "output_loading_info", "is_decoder", "low_cpu_mem_usage", "distributed_config"}  # fmt: skip
    names = hub | inspect.signature(PreTrainedModel.from_pretrained).parameters.keys()
    for config_class in (VariantConfig, VariantSeq2SeqConfig):
        config_class.refuse_near_misses(dict.fromkeys(names))


def test_what_is_not_used_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        config = VariantConfig.from_dict(VariantConfig(**SIZES).to_dict(), n_layer=3)
    assert "`n_layer`: no field" in caplog.text
    config.n_layer = 3
    assert config.n_layer == 3


def assigned(config, overrides):
    for name, value in overrides.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    ("saved", "overrides"),
    [
        ({}, {"hidden_size": 64}),
        ({"tie_word_embeddings": True}, {"hidden_size": 64, "num_attention_heads": 2}),
        ({"norm_placement": "deepnorm"}, {"num_hidden_layers": 6}),
        ({"sliding_window": 8}, {"num_hidden_layers": 2}),
        ({}, {"sliding_window": 8}),
        ({}, {"layer_types": "SF", "sliding_window": 8}),
        ({"norm_type": "layernorm", "qk_norm": "head"}, {"norm_type": "rmsnorm", "norm_placement": "post"}),
        ({"per_layer_config": {1: {"num_key_value_heads": 2}}}, {"num_attention_heads": 8, "num_hidden_layers": 3}),
        ({"per_layer_config": {1: {"intermediate_size": 48}}}, {"hidden_size": 64}),
        ({"head_dim": 16, "num_key_value_heads": 2}, {"num_attention_heads": 2}),
        ({}, {"ffn_type": "mlp", "is_causal": False}),
    ],
)  # fmt: skip
def test_what_derives_from_a_field_follows_an_assignment(saved, overrides):
    expected = VariantConfig(**{**SIZES, **saved, **overrides})
    for config in (
        VariantConfig(**SIZES, **saved),
        VariantConfig.from_dict(VariantConfig(**SIZES, **saved).to_dict()),
    ):
        assert plain(assigned(config, overrides)) == plain(expected)
        for plan in expected.plans():
            assert getattr(config, plan) == getattr(expected, plan)
        VariantModel(config)


def test_a_plan_that_somebody_chose_stays():
    config = assigned(
        VariantConfig(**SIZES), {"base_model_tp_plan": {"layers.*.mlp.up_proj": "colwise"}, "ffn_type": "mlp"}
    )
    assert config.base_model_tp_plan == {"layers.*.mlp.up_proj": "colwise"}
    assert config.intermediate_size == VariantConfig(**SIZES, ffn_type="mlp").intermediate_size


def test_assignments_to_an_encoder_decoder(tmp_path, caplog):
    config = VariantSeq2SeqConfig(encoder=SIZES, decoder={**SIZES, "num_hidden_layers": 2})
    assigned(config, {"vocab_size": 80, "hidden_size": 64, "num_hidden_layers": 3})
    wide = {**SIZES, "vocab_size": 80, "hidden_size": 64}
    expected = VariantSeq2SeqConfig(encoder=wide, decoder={**wide, "num_hidden_layers": 3})
    assert plain(config) == plain(expected)
    # As transformers' own testers do; what has no meaning there is said, and does not make the file unreadable.
    with caplog.at_level(logging.WARNING):
        assigned(config, {"norm_eps": 1.0, "sliding_window": 2})
    assert "`norm_eps`: no field of an encoder-decoder" in caplog.text
    model = VariantForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    loaded = plain(AutoConfig.from_pretrained(tmp_path))
    assert {name: loaded.get(name) for name in plain(expected)} == plain(expected) | {"dtype": "float32"}
    assert not {"norm_eps", "sliding_window"} & loaded.keys()


LABELS = {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}}


@pytest.mark.parametrize("saved", [VariantConfig(**SIZES), VariantSeq2SeqConfig(encoder=SIZES, decoder=SIZES)],
                         ids=["one stack", "two stacks"])  # fmt: skip
@pytest.mark.parametrize(
    "overrides",
    [
        LABELS, {"id2label": LABELS["id2label"]}, {"num_labels": 3, **LABELS}, {"problem_type": "regression"},
        {"output_hidden_states": True, "return_dict": False}, {"attn_implementation": "eager"}, {"dtype": "bfloat16"},
    ],
)  # fmt: skip
def test_what_every_config_of_transformers_takes(saved, overrides, tmp_path, caplog, monkeypatch):
    """As a stock config takes it, and without a word."""
    LlamaConfig(**SIZES).save_pretrained(tmp_path / "stock")
    saved.save_pretrained(tmp_path / "ours")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    stock, ours = (AutoConfig.from_pretrained(tmp_path / name, **overrides) for name in ("stock", "ours"))
    assert not caplog.records
    names = (*LABELS, *overrides, "num_labels", "problem_type", "_attn_implementation")
    for name in names:
        assert getattr(ours, name, None) == getattr(stock, name, None), name


def test_labels_are_given_to_the_model(tmp_path):
    VariantModel(VariantConfig(**SIZES)).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, **LABELS, problem_type="regression")
    assert model.score.out_features == 3
    assert model.config.id2label == LABELS["id2label"]
    assert model.config.problem_type == "regression"


def test_no_field_of_every_config_is_a_misspelt_one():
    for config_class in (VariantConfig, VariantSeq2SeqConfig):
        config_class.refuse_near_misses(dict.fromkeys(PreTrainedConfig.__dataclass_fields__))
