"""Baichuan 2, whose class is in its own checkpoints: from a folder and back, and generation."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_variants
from hf_variants.conversion import ConversionError, convert, export, verify
from tests.native_rows.baichuan import BaichuanConfig, BaichuanForCausalLM
from tests.parity import hostile_


SIZES = {
    "vocab_size": 71,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "z_loss_weight": 1e-4,
}
KINDS = {
    "7b": {**SIZES, "max_position_embeddings": 64, "model_max_length": 64},
    "13b": {**SIZES, "num_attention_heads": 6, "model_max_length": 64},
}


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    """A checkpoint as it is published: the keys of its own config class, and a pointer to code."""
    model = hostile_(BaichuanForCausalLM(BaichuanConfig(**KINDS[request.param]))).eval()
    model.save_pretrained(tmp_path / "native")
    path = tmp_path / "native" / "config.json"
    config = {
        "_from_model_config": True,
        "architectures": ["BaichuanForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_baichuan.BaichuanConfig",
            "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
        },
        "tokenizer_class": "BaichuanTokenizer",
        "model_type": "baichuan",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "gradient_checkpointing": [False],
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.29.2",
        "use_cache": True,
        **KINDS[request.param],
    }
    path.write_text(json.dumps(config))
    return tmp_path / "native", model


def test_converts_and_exports_on_disk(folder, tmp_path):
    source, reference = folder
    convert(source, tmp_path / "variant")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "variant").eval()
    assert ours.config.lm_head_normalized
    ids = torch.randint(3, 71, (2, 40), generator=torch.Generator().manual_seed(0))
    for backend in ("eager", "sdpa") if ours.config.position_embedding_type == "rope" else ("eager",):
        reference.set_attn_implementation(backend)
        ours.set_attn_implementation(backend)
        with torch.no_grad():
            assert torch.equal(ours(ids).logits, reference(ids).logits), backend
    export(tmp_path / "variant", tmp_path / "back")
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "back"))
    assert after["architectures"] == before["architectures"]
    # How transformers of today writes the rest, and the code, which is not copied.
    for volatile in (
        "auto_map", "tokenizer_class", "torch_dtype", "dtype", "transformers_version", "gradient_checkpointing",
    ):  # fmt: skip
        before.pop(volatile, None)
        after.pop(volatile, None)
    assert after == before


def test_generates_with_a_repetition_penalty(folder):
    source, reference = folder
    reference.set_attn_implementation("eager")
    ours = hf_variants.from_native(source)
    ours.set_attn_implementation("eager")
    prompt = torch.randint(3, 71, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(prompt)
    mask[1, :3] = 0
    tokens = [
        model.generate(
            prompt, attention_mask=mask, repetition_penalty=1.3, do_sample=False, max_new_tokens=16,
            min_new_tokens=16, eos_token_id=None, pad_token_id=0,
        )
        for model in (reference, ours)
    ]  # fmt: skip
    assert torch.equal(*tokens)


def test_the_head_has_rows_of_length_one(folder):
    ours = hf_variants.from_native(folder[0])
    hidden = torch.randn(3, 48)
    before = ours.lm_head(hidden)
    with torch.no_grad():
        ours.lm_head.weight.mul_(torch.rand(71, 1) + 0.5)
    assert torch.allclose(ours.lm_head(hidden), before, atol=1e-5)


def test_baichuan_1_has_a_plain_head():
    config = BaichuanConfig(**{**KINDS["13b"], "vocab_size": 64000})
    ours = hf_variants.from_native(hostile_(BaichuanForCausalLM(config)).eval())
    assert not ours.config.lm_head_normalized
    hf_variants.to_native(ours, "baichuan")


def test_baichuan_1_with_rope_is_refused():
    config = BaichuanConfig(**{**KINDS["7b"], "vocab_size": 64000})
    with pytest.raises(ConversionError, match="Baichuan 1"):
        hf_variants.from_native(BaichuanForCausalLM(config))


def test_a_tied_head_is_refused():
    config = BaichuanConfig(**KINDS["13b"], tie_word_embeddings=True)
    with pytest.raises(ConversionError, match="tie_word_embeddings"):
        hf_variants.from_native(BaichuanForCausalLM(config))


def test_verification_compares_what_can_be_compared(folder, tmp_path):
    """The weights against a folder, whose code is not run; everything against a model that is loaded."""
    source, reference = folder
    convert(source, tmp_path / "variant")
    report = verify(source, tmp_path / "variant", progress=False)
    assert report.ok, report.to_markdown()
    report = verify(reference, tmp_path / "variant", new_tokens=4, progress=False)
    assert report.ok, report.to_markdown()
    assert any("tokens" in check.name for check in report.checks)
