"""Folds: the native model computes what the variant computes, and the report says what was done to the weights."""

import logging
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_variants
from hf_variants.conversion import NotRepresentable, export
from tests.parity import hostile_, relative_error


PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}

# name: (native type, fields of the variant, folds that it takes)
CASES = {
    "offset of RMSNorm": ("llama", {"norm_unit_offset": True, "norm_casting_mode": "gemma"}, "casts|offset of 1"),
    "offset of LayerNorm": (
        "stablelm",
        {"norm_type": "layernorm", "norm_unit_offset": True, "rope_parameters": PARTIAL},
        "offset of 1",
    ),
    "offset added": ("gemma", {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}, None),
    "offset of QK-norm": (
        "qwen3",
        {"norm_unit_offset": True, "norm_casting_mode": "gemma", "qk_norm": "head"},
        "casts|offset of 1",
    ),
    "interleaved, biases, grouped heads": (
        "llama",
        {"rope_interleaved": True, "attention_bias": True, "num_key_value_heads": 2},
        "reordered",
    ),
    "interleaved, QK-norm": ("qwen3", {"rope_interleaved": True, "qk_norm": "head"}, "reordered"),
    "interleaved, QK-norm over all heads": (
        "olmo2",
        {"rope_interleaved": True, "qk_norm": "full", "norm_placement": "branch", "num_key_value_heads": 2},
        "casts|reordered",
    ),
    "interleaved, own QK-norm per head, partial": (
        "stablelm",
        {"rope_interleaved": True, "qk_norm": "per_head", "norm_type": "layernorm", "rope_parameters": PARTIAL},
        "reordered",
    ),
    "halves to interleaved": ("helium", {}, "casts|reordered"),
    "interleaved, YaRN": (
        "llama",
        {
            "rope_interleaved": True,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
            },
        },
        "reordered",
    ),
    "rotation backwards": ("llama", {"rope_reversed": True}, "other sense"),
    "rotation backwards, interleaved": ("llama", {"rope_reversed": True, "rope_interleaved": True}, "reordered|other"),
    "grouped heads to all": (
        "gpt_neox",
        {
            "num_key_value_heads": 2, "norm_type": "layernorm", "ffn_type": "mlp", "hidden_act": "gelu",
            "attention_bias": True, "mlp_bias": True,
        },
        "repeated",
    ),
    "one key head to all": (
        "gpt_neox",
        {
            "num_key_value_heads": 1, "norm_type": "layernorm", "ffn_type": "mlp", "hidden_act": "gelu",
            "attention_bias": True, "mlp_bias": True,
        },
        "repeated",
    ),
    "attention scale": ("llama", {"attention_scaling": 0.37, "attention_bias": True}, "scale goes"),
    "attention scale, QK-norm": ("qwen3", {"attention_scaling": 0.37, "qk_norm": "head"}, "scale goes"),
    "attention scale, offset QK-norm": (
        "gemma3_text",
        {
            "attention_scaling": 0.37, "qk_norm": "head", "norm_unit_offset": True, "norm_casting_mode": "gemma",
            "norm_placement": "sandwich", "hidden_act": "gelu_pytorch_tanh", "embedding_multiplier": 8.0,
            "embedding_multiplier_in_weight_dtype": True, "tie_word_embeddings": True,
        },
        None,
    ),
    "attention scale under a soft cap": (
        "gemma2",
        {
            "attention_scaling": 0.37, "attn_logit_softcapping": 5.0, "norm_unit_offset": True,
            "norm_casting_mode": "gemma", "norm_placement": "sandwich", "hidden_act": "gelu_pytorch_tanh",
            "embedding_multiplier": 8.0, "embedding_multiplier_in_weight_dtype": True, "tie_word_embeddings": True,
        },
        None,
    ),
    "embedding multiplier": ("llama", {"embedding_multiplier": 3.3}, "into the embeddings"),
    "embedding multiplier, tied": (
        "llama",
        {"embedding_multiplier": 3.3, "tie_word_embeddings": True},
        "into the embeddings",
    ),
    "embedding multiplier, in the embedding": ("granite", {"embedding_multiplier": 3.3}, "token ids"),
    "logit scale": ("llama", {"logit_scale": 0.3, "lm_head_bias": False}, "into the head"),
    "logit scale, tied": ("llama", {"logit_scale": 0.3, "tie_word_embeddings": True}, "into the head"),
    "scale of the head's input": ("llama", {"lm_head_input_scale": 0.3, "tie_word_embeddings": True}, "into the head"),
    "both, tied": (
        "llama",
        {"logit_scale": 0.3, "embedding_multiplier": 3.3, "tie_word_embeddings": True},
        "into the embeddings|into the head",
    ),
    "residual multiplier": (
        "llama",
        {"residual_multiplier": 0.7, "attention_bias": True, "mlp_bias": True},
        "branches' output",
    ),
    "residual multiplier, branch norms": (
        "olmo2",
        {"residual_multiplier": 0.7, "norm_placement": "branch", "qk_norm": "full"},
        "casts|branches' output",
    ),
    "layer scale": ("llama", {"learned_scale_type": "channel", "layer_scale_init": 1.0}, "layer scales"),
    "ReZero, branch norms": (
        "olmo2",
        {"learned_scale_type": "scalar", "layer_scale_init": 1.0, "norm_placement": "branch", "qk_norm": "full"},
        "casts|layer scales",
    ),
    "no biases": ("qwen2", {}, "zeros"),
    "token types": ("llama", {"token_type_table": "tokens"}, "left out"),
    "no biases, no norm weights": (
        "gpt_neox",
        {"norm_type": "layernorm", "norm_affine": False, "ffn_type": "mlp", "hidden_act": "gelu"},
        "zeros",
    ),
    "scaled queries": ("llama", {"scale_query": True}, "casts"),
    "all at once": (
        "llama",
        {
            "norm_unit_offset": True, "norm_casting_mode": "gemma", "rope_interleaved": True, "residual_multiplier": 0.7,
            "attention_scaling": 0.06, "embedding_multiplier": 2.0, "logit_scale": 0.25, "tie_word_embeddings": True,
            "learned_scale_type": "none", "attention_bias": True, "attention_output_bias": False,
        },
        "casts|zeros|offset|reordered|attention's scale|embeddings|head|branches",
    ),
}  # fmt: skip


def make_variant(dtype=torch.float32, **fields):
    config = {
        "vocab_size": 83, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "head_dim": 16, "max_position_embeddings": 64, "eos_token_id": None,
    }  # fmt: skip
    model = hf_variants.VariantForCausalLM(hf_variants.VariantConfig(**{**config, **fields}))
    model = hostile_(model).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_residual.scale"):
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return model.to(dtype)


def logits(model):
    model.set_attn_implementation("eager")
    ids = torch.randint(0, 83, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]


@pytest.mark.parametrize("case", CASES)
def test_a_folded_model_computes_the_same(case):
    model_type, fields, expected = CASES[case]
    model = make_variant(**fields)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    native = hf_variants.to_native(model, model_type)
    assert native.config.model_type == model_type
    assert relative_error(logits(native), logits(model)) < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    if expected is not None:
        names = native.conversion_report.folds
        assert len(names) == len(expected.split("|"))
        assert all(re.search(part, name) for part, name in zip(expected.split("|"), names, strict=True))


def test_reordered_and_repeated_weights_keep_their_bits():
    model = make_variant(rope_interleaved=True, num_key_value_heads=2, attention_bias=True)
    native = hf_variants.to_native(model, "llama")
    assert native.conversion_report.exactness == "bit-exact"
    for ours, theirs in zip(model.model.layers, native.model.layers, strict=True):
        for name in ("q_proj", "k_proj"):
            for leaf in ("weight", "bias"):
                before = getattr(getattr(ours.self_attn, name), leaf).unflatten(0, (-1, 8, 2))
                after = getattr(getattr(theirs.self_attn, name), leaf).unflatten(0, (-1, 2, 8))
                assert torch.equal(before.transpose(1, 2), after)
        assert torch.equal(ours.self_attn.v_proj.weight, theirs.self_attn.v_proj.weight)


def test_a_power_of_two_is_bit_exact_and_other_factors_depend_on_the_dtype():
    def exactness(scale, dtype):
        native = hf_variants.to_native(make_variant(attention_scaling=scale, dtype=dtype), "llama")
        assert native.dtype is dtype
        return native.conversion_report.exactness

    assert exactness(0.5, torch.bfloat16) == "bit-exact"
    assert exactness(0.3, torch.float32) == "fp32-exact"
    assert exactness(0.3, torch.bfloat16) == "bf16-close"


def test_a_folded_bfloat16_model_is_close():
    model = make_variant(norm_unit_offset=True, norm_casting_mode="gemma", attention_scaling=0.05)
    truth = logits(model)
    model = model.to(torch.bfloat16)
    native = hf_variants.to_native(model, "llama")
    assert native.conversion_report.exactness == "bf16-close"
    error = relative_error(logits(native), truth)
    assert error < 2 * relative_error(logits(model), truth)


def test_nothing_is_folded_without_being_asked_for():
    model = make_variant(attention_scaling=0.3, norm_bias=False)
    with pytest.raises(NotRepresentable, match="attention_scaling") as caught:
        hf_variants.to_native(make_variant(attention_scaling=0.3, residual_multiplier=0.3, qk_norm="head"))
    assert "by name" in str(caught.value)
    native = hf_variants.to_native(model)
    assert native.conversion_report.folds == []


def test_folds_are_said_aloud(caplog):
    logging.getLogger("hf_variants").propagate = True
    hf_variants.to_native(make_variant(rope_interleaved=True), "llama")
    assert "rotary channels are reordered between pairs and halves (bit-exact)" in caplog.text


@pytest.mark.parametrize(
    ("fields", "in_the_way"),
    [
        ({"attention_scaling": 0.3, "clip_qkv": 1.0}, "clip_qkv"),
        ({"rope_interleaved": True, "attention_sinks": True}, "attention_sinks"),
        ({"num_key_value_heads": 2, "attn_logit_softcapping": 5.0}, "attn_logit_softcapping"),
        ({"residual_multiplier": 0.5, "norm_placement": "branch", "norm_affine": False}, "norm_placement"),
    ],
)
def test_what_no_fold_helps_is_named_alone(fields, in_the_way):
    with pytest.raises(NotRepresentable) as caught:
        hf_variants.to_native(make_variant(**fields), "llama")
    assert in_the_way in caught.value.fields
    assert not {"rope_interleaved", "num_key_value_heads"} & set(caught.value.fields)


def test_a_head_that_the_target_ties_cannot_be_scaled():
    fields = {
        "norm_unit_offset": True, "norm_casting_mode": "gemma", "norm_placement": "sandwich", "final_norm": True,
        "hidden_act": "gelu_pytorch_tanh", "embedding_multiplier": 8.0, "embedding_multiplier_in_weight_dtype": True,
    }  # fmt: skip
    native = hf_variants.to_native(make_variant(**fields, logit_scale=0.3, tie_word_embeddings=True), "gemma2")
    assert native.config.tie_word_embeddings is False
    assert native.lm_head.weight is not native.model.embed_tokens.weight


def test_other_heads_fold_as_well():
    config = make_variant(embedding_multiplier=3.0, tie_word_embeddings=True).config
    base = hostile_(hf_variants.VariantModel(config)).eval()
    native = hf_variants.to_native(base, "llama")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        ours, theirs = base(ids).last_hidden_state, native(ids).last_hidden_state
    assert relative_error(theirs, ours) < 1e-5


def test_export_folds_on_disk_and_reports_it(tmp_path):
    model = make_variant(embedding_multiplier=3.0, tie_word_embeddings=True, rope_interleaved=True)
    model.save_pretrained(tmp_path / "variant")
    report = export(tmp_path / "variant", tmp_path / "native", model_type="llama")
    assert report.exactness == "fp32-exact"
    assert len(report.folds) == 2
    assert "Folded: " in report.to_markdown()
    stock = hf_variants.to_native(model, "llama")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in stock.state_dict().items())
