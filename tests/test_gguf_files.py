"""GGUF files: every architecture, number format, key and kind of damage."""

import contextlib
import inspect
import random
import re
import struct

import gguf
import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_variants
from hf_variants.conversion import ConversionError, convert, verify
from hf_variants.conversion.family import family_of
from hf_variants.conversion.gguf_files import layouts
from hf_variants.conversion.gguf_files.architectures import ARCHITECTURES
from hf_variants.conversion.gguf_files.container import GGUFFile
from tests import gguf_files
from tests.parity import hostile_, inputs_of, logits_of, relative_error
from tests.test_block_configs import HEADS, IDS, WIDTHS, by_hand


SIZES = {
    "vocab_size": 71, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
HEAD = {**GROUPED, "head_dim": 16}


def rope(kind: str = "default", **parameters):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **parameters}}


LLAMA3 = rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)  # fmt: skip
LONG = rope(
    "longrope", factor=2.0, original_max_position_embeddings=32, short_factor=[1.0, 1.25, 1.5, 2.0],
    long_factor=[1.0, 2.0, 4.0, 8.0],
)  # fmt: skip
NESTED = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 90000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
    }
}
GPT2_SIZES = {
    "vocab_size": 71,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FALCON = {name: value for name, value in SIZES.items() if name != "intermediate_size"} | {"ffn_hidden_size": 48}
T5_SIZES = {
    "vocab_size": 71,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
}

# What it shows -> llama.cpp's architecture, the native type, its config, and keys of the file.
MODELS = {
    "llama": ("llama", "llama", {**HEAD, **rope()}, {}),
    "llama biases tied": (
        "llama",
        "llama",
        {**GROUPED, **rope(), "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {},
    ),
    "llama linear": ("llama", "llama", {**GROUPED, **rope("linear", factor=4.0)}, {}),
    "llama yarn": ("llama", "llama", {**HEAD, **rope("yarn", factor=4.0, original_max_position_embeddings=16)}, {}),
    "llama yarn, all keys": (
        "llama",
        "llama",
        {
            **HEAD,
            **rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=16,
                attention_factor=0.75,
                beta_fast=16.0,
                beta_slow=2.0,
            ),
        },
        {},
    ),
    "llama 3.1": ("llama", "llama", {**HEAD, **LLAMA3}, {}),
    "mistral with a window": (
        "llama",
        "mistral",
        {**HEAD, **rope(), "sliding_window": 8},
        {"attention__sliding_window": 8},
    ),
    "ministral 3": (
        "mistral3",
        "ministral3",
        {
            **HEAD,
            **rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=16,
                beta_fast=32.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=0.5,
                llama_4_scaling_beta=0.25,
            ),
        },
        {},
    ),
    "arcee": ("arcee", "arcee", {**HEAD, **rope()}, {}),
    "granite": (
        "granite",
        "granite",
        {
            **GROUPED,
            **rope(),
            "attention_multiplier": 0.25,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 4.0,
        },
        {},
    ),
    "smollm3": ("smollm3", "smollm3", {**GROUPED, **rope(), "num_hidden_layers": 5}, {}),
    "olmo": ("olmo", "olmo", {**GROUPED, **rope(), "clip_qkv": 0.5}, {}),
    "olmo2": ("olmo2", "olmo2", {**GROUPED, **rope()}, {}),
    "olmo3": (
        "olmo2",
        "olmo3",
        {
            **GROUPED,
            "num_hidden_layers": 5,
            "sliding_window": 8,
            "rope_parameters": {
                "full_attention": rope("yarn", factor=4.0, original_max_position_embeddings=16)["rope_parameters"],
                "sliding_attention": rope()["rope_parameters"],
            },
        },
        {},
    ),
    "baichuan": ("baichuan", "baichuan", SIZES, {}),
    "apertus": ("apertus", "apertus", {**GROUPED, **LLAMA3}, {}),
    "ernie4_5": ("ernie4_5", "ernie4_5", {**HEAD, **rope(), "use_bias": False}, {}),
    "seed_oss": ("seed_oss", "seed_oss", {**HEAD, **rope(), "attention_bias": True, "attention_out_bias": False}, {}),
    "hunyuan": ("hunyuan-dense", "hunyuan_v1_dense", {**HEAD, **rope()}, {}),
    "jais2": ("jais2", "jais2", {**HEAD, **rope()}, {}),
    "qwen2": ("qwen2", "qwen2", {**GROUPED, **rope()}, {}),
    "qwen3": ("qwen3", "qwen3", {**HEAD, **rope()}, {}),
    "exaone4": (
        "exaone4",
        "exaone4",
        {**GROUPED, **rope(), "num_hidden_layers": 5, "sliding_window": 8, "sliding_window_pattern": 4},
        {},
    ),
    "exaone4 without a window": (
        "exaone4",
        "exaone4",
        {**GROUPED, **rope(), "sliding_window": None, "layer_types": ["full_attention"] * 2},
        {},
    ),
    "gemma": ("gemma", "gemma", {**HEAD, **rope()}, {"rope__dimension_count": None}),
    "gemma2": (
        "gemma2",
        "gemma2",
        {
            **HEAD,
            **rope(),
            "sliding_window": 8,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
        {},
    ),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {**HEAD, **NESTED, "num_hidden_layers": 7, "sliding_window": 8},
        {},
    ),
    "gemma3, capped": (
        "gemma3",
        "gemma3_text",
        {**HEAD, **NESTED, "sliding_window": 8, "final_logit_softcapping": 5.0},
        {},
    ),
    "embedding gemma": (
        "gemma-embedding",
        "gemma3_text",
        {
            **HEAD,
            **NESTED,
            "num_hidden_layers": 7,
            "sliding_window": 16,
            "use_bidirectional_attention": True,
        },
        {"attention__sliding_window": 16},
    ),
    "nemotron": ("nemotron", "nemotron", {**GROUPED, **rope(partial_rotary_factor=0.5), "head_dim": 8}, {}),
    "stablelm": ("stablelm", "stablelm", {**GROUPED, **rope(partial_rotary_factor=0.5), "use_qkv_bias": True}, {}),
    "stablelm, parallel with norms": (
        "stablelm",
        "stablelm",
        {**GROUPED, **rope(partial_rotary_factor=0.25), "use_parallel_residual": True, "qk_layernorm": True},
        {},
    ),
    "phi": ("phi2", "phi", {**SIZES, **rope(partial_rotary_factor=0.5)}, {}),
    "phi3": ("phi3", "phi3", {**GROUPED, **rope(), "sliding_window": 8}, {}),
    "phi3 long": ("phi3", "phi3", {**GROUPED, **LONG, "original_max_position_embeddings": 32}, {}),
    "starcoder2": ("starcoder2", "starcoder2", {**GROUPED, **rope(), "sliding_window": 8}, {}),
    "cohere": ("command-r", "cohere", {**GROUPED, **rope(), "logit_scale": 0.25, "use_qk_norm": True}, {}),
    "cohere2": (
        "cohere2",
        "cohere2",
        {**HEAD, **rope(), "num_hidden_layers": 5, "sliding_window": 8, "logit_scale": 0.25},
        {},
    ),
    "glm": ("chatglm", "glm", {**HEAD, **rope(partial_rotary_factor=0.5), "attention_bias": True}, {}),
    "glm4": ("glm4", "glm4", {**HEAD, **rope(partial_rotary_factor=0.5), "attention_bias": True}, {}),
    "gpt2": ("gpt2", "gpt2", {**GPT2_SIZES, "n_inner": 48}, {}),
    "starcoder": ("starcoder", "gpt_bigcode", {**GPT2_SIZES, "n_inner": 48}, {}),
    "gptneox": ("gptneox", "gpt_neox", {**SIZES, **rope(partial_rotary_factor=0.25)}, {}),
    "gptneox, sequential": (
        "gptneox",
        "gpt_neox",
        {**SIZES, **rope(partial_rotary_factor=0.25), "use_parallel_residual": False},
        {},
    ),
    "falcon 7b": ("falcon", "falcon", {**FALCON, **rope(), "multi_query": True}, {}),
    "falcon 40b": ("falcon", "falcon", {**FALCON, **rope(), "new_decoder_architecture": True, "num_kv_heads": 2}, {}),
    "falcon 11b": (
        "falcon",
        "falcon",
        {**FALCON, **rope(), "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        {},
    ),
    "bloom": (
        "bloom",
        "bloom",
        {"vocab_size": 71, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        {"context_length": 64},
    ),
    "mpt": (
        "mpt",
        "mpt",
        {
            "vocab_size": 71,
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": 64,
            "attn_config": {"clip_qkv": 0.5},
        },
        {},
    ),
    "t5": ("t5", "t5", {**T5_SIZES}, {}),
    "t5 1.1": ("t5", "t5", {**T5_SIZES, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, {}),
    "umt5": ("t5", "umt5", {**T5_SIZES, "feed_forward_proj": "gated-gelu"}, {}),
    "bert": ("bert", "bert", {**SIZES, "pad_token_id": 0}, {}),
    "distilbert": (
        "bert",
        "distilbert",
        {"vocab_size": 71, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
        {},
    ),
    "nomic-bert": ("nomic-bert", "nomic_bert", {**SIZES, **rope(), "pad_token_id": 0}, {}),
    "modern-bert": (
        "modern-bert",
        "modernbert",
        {
            **SIZES,
            "num_hidden_layers": 5,
            "local_attention": 8,
            "pad_token_id": 0,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        {},
    ),
    "eurobert": ("eurobert", "eurobert", {**GROUPED, **rope(), "pad_token_id": 0}, {}),
}


def stock(title):
    """A stock model with hostile weights."""
    architecture, model_type, values, _ = MODELS[title]
    family = family_of(model_type)
    model_class = family.native_class(ARCHITECTURES[architecture].head or family.primary)
    pooler = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    model = model_class(family.config_map.native_class(**values), **({"add_pooling_layer": False} if pooler else {}))
    if title == "t5 1.1":
        # As it is once it has been loaded.
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
        del model.all_tied_weights_keys["lm_head.weight"]
        model.tie_weights = lambda *args, **kwargs: None
    return hostile_(model).eval()


def written(title, tmp_path, **extra):
    architecture, _, _, keys = MODELS[title]
    model = stock(title)
    return model, gguf_files.write(model, tmp_path / "model.gguf", architecture, **{**keys, **extra})


@pytest.mark.parametrize("title", MODELS)
def test_a_file_is_the_stock_model_it_was_written_from(title, tmp_path):
    native, path = written(title, tmp_path)
    ours = hf_variants.from_native(path)
    state, expected = ours.state_dict(), {}
    if title != "bert":
        # The family knows BERT without its pooler from GGUF files alone.
        expected = hf_variants.from_native(native).state_dict()
        assert state.keys() == expected.keys()
    # Offsets of norms are taken off in float32, which rounds the last bits of small weights.
    offset = layouts.OffsetNorm in map(type, ARCHITECTURES[MODELS[title][0]].layouts.values())
    for name, tensor in expected.items():
        if offset and "norm" in name:
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=3e-7)
        elif "embed_positions" in name and native.config.model_type == "roberta":
            assert torch.equal(state[name][2:], tensor[2:])
        else:
            assert torch.equal(state[name], tensor), name
    if native.config.model_type == "baichuan":
        return
    inputs = inputs_of(native, 60)["long"]
    made, reference = logits_of(ours, inputs), logits_of(native, inputs)
    bounds = [deviation.bound for deviation in family_of(native.config.model_type).deviations_of(ours.config)]
    assert torch.equal(made, reference) or relative_error(made, reference) < max(bounds, default=2e-6 * offset)


# Layers that differ

HEADS_OF_LAYERS, WIDTHS_OF_LAYERS = [entry or 0 for entry in HEADS], [entry or 0 for entry in WIDTHS]
QUERIES_OF_LAYERS = [4 if entry else 0 for entry in HEADS]
PLACES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def with_own_layers(path, **changes):
    """A Llama put together by hand of layers with other sizes, and its file."""
    native = by_hand(LlamaConfig, LlamaForCausalLM)
    keys = {
        "block_count": 5, "embedding_length": 48, "context_length": 64, "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": native.config.rope_parameters["rope_theta"], "attention.key_length": 12,
        "attention.value_length": 12, "attention.head_count": QUERIES_OF_LAYERS,
        "attention.head_count_kv": HEADS_OF_LAYERS, "feed_forward_length": WIDTHS_OF_LAYERS, **changes,
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, "deci")
    for name, value in keys.items():
        gguf_files._add(writer, f"deci.{name}", value)
    for name, tensor in native.state_dict().items():
        stem, _, leaf = name.rpartition(".")
        if stem in OUTSIDE:
            theirs = OUTSIDE[stem]
        else:
            layer, _, place = stem.removeprefix("model.layers.").partition(".")
            theirs = f"blk.{layer}.{PLACES[place]}"
            if theirs.endswith(("attn_q", "attn_k")):
                heads = 4 if theirs.endswith("q") else HEADS[int(layer)]
                tensor = tensor.reshape(heads, 2, 6, 48).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{theirs}.{leaf}", tensor.detach().numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return native, path


def test_layers_of_their_own_sizes(tmp_path):
    native, path = with_own_layers(tmp_path / "model.gguf")
    report = convert(path, tmp_path / "ours", verify=True)
    assert report.exactness == "bit-exact"
    ours = hf_variants.from_native(path)
    assert torch.equal(ours(IDS).logits, native(IDS, use_cache=False).logits)
    assert ours.config.to_dict()["per_layer_config"] == {
        "1": {"skip": ["self_attn"], "intermediate_size": 512},
        "2": {"skip": ["mlp"], "num_key_value_heads": 1},
        "4": {"num_key_value_heads": 4, "intermediate_size": 768},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention.head_count_kv": [2, 0, 0, 2, 4]}, "linear"),
        ({"attention.head_count_kv": [2, 0, 1, 2]}, "no 5 counts"),
        ({"feed_forward_length": [256, 512, 0, 256, -1]}, "no 5 counts"),
        ({"feed_forward_length": [256, 512, 0, 256, 512]}, r"blk\.4\.ffn|shape"),
        ({"attention.head_count": [4, 0, 4, 4, 3]}, "num_attention_heads"),
        ({"feed_forward_length": [256, 0, 0, 256, 768]}, "does nothing"),
        ({"attention.sliding_window": 8}, "sliding_window"),
    ],
    ids=str,
)
def test_layers_of_sizes_that_cannot_be(changes, message, tmp_path):
    with_own_layers(tmp_path / "model.gguf", **changes)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "model.gguf", tmp_path / "ours")


# Number formats, and the result's dtype


def small(tmp_path, kind="F32", name="model.gguf", **extra):
    """A Llama wide enough for every block of a quantised format."""
    model = family_of("llama").native_class("causal_lm")(
        family_of("llama").config_map.native_class(
            **{**GROUPED, "hidden_size": 256, "intermediate_size": 256}, **rope()
        )
    )
    return hostile_(model).eval(), gguf_files.write(model, tmp_path / name, "llama", kind, **extra)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_values_are_those_of_the_packages_own_reader(kind, tmp_path):
    _, path = small(tmp_path, kind)
    file = GGUFFile(path)
    for tensor in gguf.GGUFReader(path).tensors:
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(file.load(tensor.name).float(), expected), tensor.name


@pytest.mark.parametrize(
    "kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ3_S", "TQ1_0"]
)
def test_formats_that_the_package_only_reads(kind, tmp_path):
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    raw = np.random.default_rng(0).integers(0, 60, (4, size * 256 // block), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", raw, raw_shape=raw.shape, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = GGUFFile(tmp_path / "model.gguf").load("token_embd.weight")
    assert made.dtype == torch.float32
    assert made.shape == (4, 256)
    assert torch.equal(made, torch.from_numpy(gguf.dequantize(raw, number)))


@pytest.mark.parametrize(
    ("kind", "expected"), [("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.float32)]
)
def test_a_model_in_half_precision_stays_so_where_every_value_fits(kind, expected, tmp_path):
    model, _ = small(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    path = gguf_files.write(model, tmp_path / "half.gguf", "llama", kind)
    assert hf_variants.from_native(path).dtype == expected
    with torch.no_grad():
        model.model.norm.weight[0] = 1.0001
    path = gguf_files.write(model, tmp_path / "wide.gguf", "llama", kind)
    assert hf_variants.from_native(path).dtype == torch.float32
    assert hf_variants.from_native(path, dtype=torch.bfloat16).dtype == torch.bfloat16


# Keys


def test_divisors_that_no_formula_gives_are_kept_as_they_are(tmp_path, monkeypatch):
    divisors = np.array([1.0, 1.5, 2.25, 7.0], dtype=np.float32)
    monkeypatch.setattr(gguf_files, "_rope_tensors", lambda *_: {"rope_freqs.weight": divisors})
    native, path = written("llama linear", tmp_path, rope__scaling__type=None, rope__scaling__factor=None)
    ours = hf_variants.from_native(path)
    native.model.rotary_emb.inv_freq = 5000.0 ** -(torch.arange(0, 8, 2) / 8) / torch.from_numpy(divisors)
    inputs = inputs_of(native, 60)["long"]
    assert relative_error(logits_of(ours, inputs), logits_of(native, inputs)) < 1e-5


@pytest.mark.parametrize(
    ("title", "extra", "message"),
    [
        ("llama", {"attention__scale": 0.3}, "llama.attention.scale"),
        ("llama", {"final_logit_softcapping": 3.0}, "final_logit_softcapping"),
        ("llama", {"rope__scaling__type": "ntk"}, "'ntk'"),
        ("llama", {"rope__scaling__type": "yarn", "rope__scaling__yarn_ext_factor": 0.5}, "yarn_ext_factor"),
        ("llama", {"attention__head_count_kv": [2, 1]}, "head_count_kv"),
        ("llama", {"attention__value_length": 8}, "value_length"),
        ("llama", {"attention__head_count_kv": 3}, "head_count_kv"),
        ("llama", {"rope__dimension_count": 18}, "rope.dimension_count"),
        ("gemma2", {"attention__scale": "much"}, "attention.scale"),
        ("gemma2", {"attention__scale": float("nan")}, "attention.scale"),
        ("gemma2", {"attention__scale": 0.0}, "attention.scale"),
        ("llama", {"vocab_size": 70}, "vocab_size"),
        ("llama", {"embedding_length": None}, "embedding_length"),
        ("llama", {"expert_count": 8, "expert_used_count": 2}, "expert_count"),
        ("llama", {"attention__causal": False}, "attention.causal"),
        ("mpt", {"attention__max_alibi_bias": 16.0}, "max_alibi_bias"),
        ("bloom", {"feed_forward_length": 64}, "feed_forward_length"),
        ("olmo", {"attention__layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ("qwen2", {"attention__layer_norm_epsilon": 1e-3}, "two epsilons"),
        ("bert", {"classifier__output_labels": ["a", "b"]}, "output_labels"),
    ],
)
def test_what_the_native_class_does_not_compute_is_refused_by_name(title, extra, message, tmp_path):
    _, path = written(title, tmp_path, **extra)
    with pytest.raises(ConversionError, match=re.escape(message)):
        hf_variants.from_native(path)


def test_a_key_that_the_caller_knows_is_ignored(tmp_path):
    native, path = written("llama", tmp_path, something_new=1)
    with pytest.raises(ConversionError, match="something_new"):
        hf_variants.from_native(path)
    ours = hf_variants.from_native(path, ignore_keys=["llama.something_new"])
    assert torch.equal(ours.lm_head.weight, native.lm_head.weight)


def test_keys_that_say_nothing_are_no_obstacle(tmp_path):
    _, path = written("llama", tmp_path, expert_count=0, rope__scaling__finetuned=True, tensor_data_layout="reference")
    hf_variants.from_native(path)


def test_generation_settings(tmp_path):
    native = stock("llama")
    path = tmp_path / "model.gguf"
    original = gguf_files._add

    def add(writer, name, value):
        original(writer, name, value)
        if name == "llama.block_count":
            writer.add_uint32("tokenizer.ggml.eot_token_id", 5)
            writer.add_float32("general.sampling.temp", 0.5)
            writer.add_int32("general.sampling.top_k", 7)

    gguf_files._add, saved = add, original
    try:
        gguf_files.write(native, path, "llama")
    finally:
        gguf_files._add = saved
    config = hf_variants.from_native(path).generation_config
    assert (config.eos_token_id, config.temperature, config.top_k, config.do_sample) == ([2, 5], 0.5, 7, True)


# Files


def test_a_split_file_is_read_from_any_part(tmp_path):
    native = stock("llama")
    whole = gguf_files.tensors(native, "llama")
    names = sorted(whole)
    for part in range(3):
        path = tmp_path / f"m-{part + 1:05d}-of-00003.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", 3)
        writer.add_int32("split.tensors.count", len(names))
        if part == 0:
            for name, value in gguf_files._keys(native.config, "llama").items():
                gguf_files._add(writer, f"llama.{name}", value)
        for name in names[part::3]:
            writer.add_tensor(name, np.ascontiguousarray(whole[name]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    for part in (1, 3):
        ours = hf_variants.from_native(tmp_path / f"m-{part:05d}-of-00003.gguf")
        assert torch.equal(ours.lm_head.weight, native.lm_head.weight)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(FileNotFoundError, match="m-00002-of-00003"):
        hf_variants.from_native(tmp_path / "m-00001-of-00003.gguf")


def test_the_other_byte_order(tmp_path, monkeypatch):
    native = stock("llama")
    writer_class = gguf.GGUFWriter
    monkeypatch.setattr(gguf, "GGUFWriter", lambda *args: writer_class(*args, endianess=gguf.GGUFEndian.BIG))
    path = gguf_files.write(native, tmp_path / "model.gguf", "llama")
    assert torch.equal(hf_variants.from_native(path).lm_head.weight, native.lm_head.weight)


def test_version_2(tmp_path):
    native, path = written("llama", tmp_path)
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", 2)
    path.write_bytes(data)
    assert torch.equal(hf_variants.from_native(path).lm_head.weight, native.lm_head.weight)
    data[4:8] = struct.pack("<I", 1)
    path.write_bytes(data)
    with pytest.raises(ConversionError, match="version 1"):
        hf_variants.from_native(path)


def test_a_damaged_file_ends_in_a_sentence(tmp_path):
    _, path = written("llama", tmp_path)
    good = path.read_bytes()
    header = GGUFFile(path).tensors["token_embd.weight"].offset
    random_ = random.Random(0)
    path.write_bytes(b"")
    with pytest.raises(ConversionError, match="not a GGUF file"):
        hf_variants.from_native(path)
    for trial in range(60):
        data = bytearray(good)
        if trial < 20:
            data = data[: random_.randrange(4, len(good))]
        for _ in range(trial % 5):
            data[random_.randrange(min(header, len(data)))] = random_.randrange(256)
        path.write_bytes(data)
        # What a flipped bit changes may also be a weight.
        with contextlib.suppress(ConversionError, FileNotFoundError):
            hf_variants.from_native(path)
    path.write_bytes(good[: len(good) - 40])
    with pytest.raises(ConversionError, match="cut off"):
        hf_variants.from_native(path)


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        ("llama", {"general.type": "adapter"}, "LoRA adapter"),
        ("clip", {}, "images or sound"),
        ("llama", {"general.type": "imatrix"}, "statistics"),
        ("llama", {}, "a vocabulary and no weights"),
        ("mamba", {"tensor": True}, "'mamba'"),
        ("qwen3moe", {"tensor": True, "qwen3moe.expert_count": 4}, "mixture-of-experts"),
        ("t5encoder", {"tensor": True}, "'t5encoder'"),
    ],
)
def test_files_that_hold_no_model_of_ours(architecture, keys, message, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
    for name, value in keys.items():
        if name == "tensor":
            writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_string(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConversionError, match=message):
        hf_variants.from_native(tmp_path / "m.gguf")


def test_a_tensor_too_many_and_one_too_few(tmp_path, monkeypatch):
    whole = gguf_files.tensors

    def changed(model, architecture):
        made = whole(model, architecture)
        made["blk.0.attn_gate.weight"] = made.pop("blk.1.ffn_up.weight")
        return made

    monkeypatch.setattr(gguf_files, "tensors", changed)
    _, path = written("llama", tmp_path)
    with pytest.raises(ConversionError, match="attn_gate"):
        hf_variants.from_native(path)
    monkeypatch.setattr(
        gguf_files, "tensors", lambda *args: {k: v for k, v in whole(*args).items() if "1.ffn_up" not in k}
    )
    _, path = written("llama", tmp_path)
    with pytest.raises(ConversionError, match="up_proj"):
        hf_variants.from_native(path)


def test_every_architecture_that_transformers_reads_and_we_have_a_family_for():
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    from hf_variants.conversion.family import all_families

    # "general" and "tokenizer" are groups of keys; Mistral's files are Llama's, UMT5's T5's.
    theirs = set(GGUF_SUPPORTED_ARCHITECTURES) & set(all_families()) - {"mistral", "umt5"}
    assert theirs <= set(ARCHITECTURES)
    assert set(ARCHITECTURES) <= set(gguf.MODEL_ARCH_NAMES.values())


# The commands


def test_convert_and_verify(tmp_path):
    native, path = written("llama 3.1", tmp_path, vocab_size=71)
    report = convert(path, tmp_path / "out", verify=True)
    seen = {check.name: check for check in report.verification.checks}
    assert "21 of 21, bit-identical" in seen["GGUF file"].detail
    assert "drops rope_freqs.weight" in seen["GGUF file"].detail
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    inputs = inputs_of(native, 60)["long"]
    assert torch.equal(logits_of(ours, inputs), logits_of(native, inputs))


def test_verify_asks_transformers_loader_where_it_reads_everything(tmp_path):
    _, path = written("qwen2", tmp_path, vocab_size=71)
    convert(path, tmp_path / "out")
    report = verify(path, tmp_path / "out")
    assert report.ok, report.to_markdown()
    assert "transformers' GGUF loader: bit-identical" in report.to_markdown()


def test_verify_finds_a_layout_that_is_read_wrong(tmp_path, monkeypatch):
    _, path = written("llama", tmp_path)
    monkeypatch.setattr(layouts.PairedRotation, "to_native", lambda self, tensor, heads: tensor)
    convert(path, tmp_path / "out")
    report = verify(path, tmp_path / "out")
    assert [check.name for check in report.checks if not check.ok] == ["GGUF file"]


def test_an_encoder_without_its_pooler_is_verified(tmp_path):
    _, path = written("bert", tmp_path)
    report = convert(path, tmp_path / "out", verify=True)
    assert report.verification.ok
    assert "no tokenizer" in report.tokenizer[0]
