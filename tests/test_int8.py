"""Weights of 8 bits: what they round, that they save and load, and what refuses them."""

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM

from hf_variants import (
    VariantConfig,
    VariantForCausalLM,
    accelerate_decoding,
    quantize_int8,
    to_native,
)
from hf_variants.fast.int8 import Int8Config, Int8Embedding, Int8Linear, Int8Rows, round_rows
from hf_variants.presets import PRESETS
from tests.test_fast import NEW, decode
from tests.test_random_configs import assert_close, build, preset_config, sentences
from tests.test_seq2seq import PAIRS, VOCABULARY
from tests.test_seq2seq import build as build_seq2seq


DECODERS = [name for name in PRESETS if preset_config(name).is_causal]
# As the models here are built, so that bits can be compared.
EAGER = {"attn_implementation": "eager"}
# What the kernel's inputs and outputs, of 8 bits of mantissa, may add up to in these small models.
KERNEL_ROUNDING = 0.1


def test_rows_are_rounded_to_the_nearest():
    weight = torch.randn(5, 33, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-3], [1], [50], [0], [7]]
    )
    integers, scale = round_rows(weight)
    assert integers.dtype == torch.int8
    assert integers.abs().amax(1).tolist() == [127, 127, 127, 0, 127]
    assert ((integers * scale[:, None] - weight).abs() <= 0.501 * scale[:, None]).all()


@pytest.mark.parametrize("rows", [1, 3, 16, 17])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer(rows, bias):
    torch.manual_seed(0)
    # The kernel takes other sizes a part at a time.
    for in_features, out_features in ((64, 48), (37, 29), (1, 1)):
        plain = torch.nn.Linear(in_features, out_features, bias=bias)
        layer = Int8Linear(in_features, out_features, bias)
        layer.round(plain.weight)
        layer.bias = plain.bias
        x = torch.randn(2, rows, in_features)
        expected = torch.nn.functional.linear(x, layer.weight * layer.weight_scale[:, None], plain.bias)
        with torch.no_grad():
            assert (layer(x) - expected).abs().max() <= 0.02 * expected.abs().max()
            assert layer(x.bfloat16()).dtype == torch.bfloat16


def rounded_in_floats(model):
    """The model with the values that 8 bits hold, in float32."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if type(module).__name__ in ("Linear", "UnfusedBiasLinear", "OwnDtypeLinear") or name.endswith(
                "embed_tokens"
            ):
                integers, scale = round_rows(module.weight)
                module.weight.copy_(integers * scale[:, None])
    return model


@pytest.mark.parametrize("preset", DECODERS)
def test_decoders_compute_with_the_rounded_weights(preset):
    model = quantize_int8(build(preset_config(preset)))
    assert not [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    reference = rounded_in_floats(build(preset_config(preset)))
    # Many rows at a time are computed in float32.
    ids = sentences(batch=4, length=9)
    with torch.no_grad():
        expected = reference(ids).logits
        assert_close(model(ids).logits, expected, expected)
    expected = decode(reference)
    assert (decode(model) - expected).pow(2).mean().sqrt() < KERNEL_ROUNDING * expected.std()


@pytest.mark.parametrize("preset", ["llama", "gemma", "gpt2", "falcon"])
def test_saved_loaded_and_back_in_floats(preset, tmp_path):
    model = quantize_int8(build(preset_config(preset)))
    plain = decode(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **EAGER)
    assert {type(module) for module in loaded.modules() if isinstance(module, Int8Rows)} == {Int8Linear, Int8Embedding}
    assert torch.equal(decode(loaded), plain)

    floats, reference = loaded.dequantize(), rounded_in_floats(build(preset_config(preset)))
    assert not hasattr(floats.config, "quantization_config")
    assert [type(module) for module in floats.modules()] == [type(module) for module in reference.modules()]
    with torch.no_grad():
        expected = reference(sentences()).logits
        assert_close(floats(sentences()).logits, expected, expected)
    if floats.config.tie_word_embeddings:
        assert floats.lm_head.weight is floats.get_input_embeddings().weight


def test_ties_last(tmp_path):
    model = quantize_int8(build(VariantConfig.from_preset("llama", **small(), tie_word_embeddings=True)))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for tied in (model, loaded):
        assert tied.lm_head.weight is tied.get_input_embeddings().weight
        assert tied.lm_head.weight.dtype == torch.int8


@pytest.mark.parametrize("preset", ["llama", "gemma2", "bloom", "gpt2"])
def test_the_fast_path_takes_them(preset):
    model = quantize_int8(build(preset_config(preset)))
    plain = decode(model)
    with accelerate_decoding(model) as acceleration:
        fast = decode(model)
        assert acceleration.steps == NEW, acceleration.why_plain
        assert not [name for name in acceleration.called_modules if name.endswith(("proj", "head"))]
    assert (fast - plain).pow(2).mean().sqrt() < KERNEL_ROUNDING * plain.std()


def test_an_encoder_decoder(tmp_path):
    for encoder, decoder in PAIRS[::4]:
        model = quantize_int8(build_seq2seq(encoder, decoder))
        inputs = {
            "input_ids": torch.randint(3, VOCABULARY, (2, 9)),
            "decoder_input_ids": torch.ones(2, 9, dtype=torch.long),
        }
        with torch.no_grad():
            expected = model(**inputs).logits
            model.save_pretrained(tmp_path / f"{encoder}-{decoder}")
            loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / f"{encoder}-{decoder}")
            assert torch.equal(loaded(**inputs).logits, expected)


def test_a_checkpoint_is_rounded_while_it_loads(tmp_path):
    model = build(preset_config("llama"))
    model.save_pretrained(tmp_path / "floats")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "floats", quantization_config=Int8Config(), **EAGER)
    assert torch.equal(decode(loaded), decode(quantize_int8(model)))
    loaded.save_pretrained(tmp_path / "int8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", **EAGER)
    assert torch.equal(decode(again), decode(loaded))


def test_bytes(tmp_path):
    """One for every number of a matrix, stored once where it is tied, and four for every row."""
    config = VariantConfig.from_preset("llama", vocab_size=512, hidden_size=128, intermediate_size=256,
                                       num_attention_heads=4, num_hidden_layers=2, tie_word_embeddings=True)  # fmt: skip
    model = VariantForCausalLM(config)
    model.save_pretrained(tmp_path / "floats")
    quantize_int8(model).save_pretrained(tmp_path / "int8")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("floats", "int8")]
    assert sizes[1] < 0.35 * sizes[0]
    with safe_open(tmp_path / "int8" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    memory = sum(parameter.nbytes for parameter in model.parameters())
    assert memory < 0.35 * sizes[0]


def test_refusals():
    with pytest.raises(ValueError, match="`lm_head_normalized`"):
        quantize_int8(build(VariantConfig.from_preset("llama", **small(), lm_head_normalized=True)))
    model = quantize_int8(build(preset_config("llama")))
    with pytest.raises(ValueError, match="quantised already"):
        quantize_int8(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM is not a model of this package"):
        quantize_int8(LlamaForCausalLM(LlamaConfig(**small())))
    tuned = peft.get_peft_model(build(preset_config("llama")), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapters"):
        quantize_int8(tuned)
    with pytest.raises(ValueError, match="The model is quantised"):
        to_native(model)
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


def small() -> dict:
    return {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    }
