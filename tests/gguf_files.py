"""
GGUF files of stock models, as llama.cpp's converter writes them: keys, names and order of rows.

Written from what the format prescribes and not from what `conversion/gguf_files` reads, so that the two check each other.
"""

import math
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from hf_variants.conversion.skeleton import stored_tensors


# Architectures whose converter pairs the rotary channels of queries and keys.
PAIRED = {"llama", "mistral3", "arcee", "granite", "smollm3", "olmo", "baichuan"}
OFFSET = {"gemma", "gemma2", "gemma3", "gemma-embedding", "nemotron"}
RMS = {
    "llama", "mistral3", "arcee", "granite", "smollm3", "olmo2", "baichuan", "apertus", "ernie4_5", "seed_oss",
    "hunyuan-dense", "qwen2", "qwen3", "exaone4", "gemma", "gemma2", "gemma3", "gemma-embedding", "phi3", "chatglm",
    "glm4", "eurobert",
}  # fmt: skip
WINDOWS = {"gemma2", "gemma3", "gemma-embedding", "cohere2", "olmo2", "exaone4", "starcoder2"}


def write(model: PreTrainedModel, path: Path, architecture: str, kind: str = "F32", **extra) -> Path:
    """
    Write a stock model.

    Args:
        kind: the format of matrices; norms and biases are float32 in any case.
        extra: keys of the architecture beside those that follow from the config, with __ for a dot; `None` leaves one out.
    """
    writer = gguf.GGUFWriter(path, architecture)
    values = {**_keys(model.config, architecture), **{name.replace("__", "."): value for name, value in extra.items()}}
    for name, value in values.items():
        if value is not None:
            _add(writer, f"{architecture}.{name}", value)
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (number := getattr(model.config, f"{ours}_token_id", None)) is not None:
            writer.add_uint32(f"tokenizer.ggml.{theirs}_token_id", number)
    if architecture == "apertus":
        for leaf in ("alpha_p", "alpha_n", "beta", "eps"):
            layers = [getattr(layer.mlp.act_fn, leaf) for layer in model.model.layers]
            writer.add_array(f"xielu.{leaf}", [float(value.float().item()) for value in layers])
    for name, array in tensors(model, architecture).items():
        quantised = array.ndim > 1 and not name.startswith("rope_") and kind != "F32"
        number = gguf.GGMLQuantizationType[kind if quantised else "F32"]
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(array), number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, name: str, value) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(name, value)


def _get(config, *names):
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _keys(config, architecture: str) -> dict:
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = _get(config, "head_dim") or hidden // heads
    width = _get(config, "intermediate_size", "n_inner", "d_ff", "ffn_hidden_size", "hidden_dim") or 4 * hidden
    epsilon = _get(
        config, "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"
    )  # fmt: skip
    keys = {
        "context_length": _get(config, "max_position_embeddings", "max_seq_len", "n_positions", "model_max_length"),
        "embedding_length": hidden,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": width,
        "attention.head_count": heads,
        "attention.head_count_kv": _kv_heads(config),
        f"attention.layer_norm_{'rms_' * (architecture in RMS)}epsilon": epsilon or {"olmo": 1e-5}.get(architecture, 1e-12),
    }  # fmt: skip
    if _get(config, "head_dim"):
        keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    rope = _get(config, "rope_parameters")
    if rope:
        full = rope.get("full_attention", rope)
        keys |= _rope(full, config, head_dim)
        if architecture in ("gemma3", "gemma-embedding", "modern-bert"):
            keys["rope.freq_base_swa"] = rope["sliding_attention"]["rope_theta"]
    if architecture in WINDOWS and _get(config, "sliding_window"):
        keys["attention.sliding_window"] = config.sliding_window
        if architecture in ("olmo2", "exaone4"):
            keys["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config.layer_types]
    return keys | _own_keys(config, architecture)


def _kv_heads(config) -> int:
    if config.model_type == "falcon":
        multi = config.multi_query and not config.new_decoder_architecture
        return 1 if multi else config.num_kv_heads
    return _get(config, "num_key_value_heads") or config.num_attention_heads


def _rope(rope: dict, config, head_dim: int) -> dict:
    keys = {
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
    }
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": rope["factor"]}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        for ours, theirs in (
            ("attention_factor", "yarn_attn_factor"), ("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow"),
            ("mscale_all_dim", "yarn_log_multiplier"),
        ):  # fmt: skip
            if rope.get(ours) is not None:
                keys[f"rope.scaling.{theirs}"] = rope[ours]
    if kind == "longrope":
        original = rope["original_max_position_embeddings"]
        scale = config.max_position_embeddings / original
        keys |= {
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0,
        }
    return keys


def _own_keys(config, architecture: str) -> dict:
    match architecture:
        case "gemma2":
            return {
                "attn_logit_softcapping": config.attn_logit_softcapping,
                "final_logit_softcapping": config.final_logit_softcapping,
            }
        case "gemma3":
            return {"final_logit_softcapping": config.final_logit_softcapping}
        case "granite":
            return {
                "attention.scale": config.attention_multiplier, "embedding_scale": config.embedding_multiplier,
                "residual_scale": config.residual_multiplier, "logit_scale": config.logits_scaling,
            }  # fmt: skip
        case "command-r" | "cohere2":
            return {"logit_scale": config.logit_scale, "rope.scaling.type": "none"}
        case "olmo":
            return {"attention.clamp_kqv": config.clip_qkv}
        case "mpt":
            return {"attention.max_alibi_bias": 8.0, "attention.clamp_kqv": config.attn_config.clip_qkv}
        case "gptneox" | "stablelm":
            return {"use_parallel_residual": True if architecture == "stablelm" else config.use_parallel_residual}
        case "falcon":
            return {"tensor_data_layout": "jploski"}
        case "phi3":
            return {"attention.sliding_window": config.sliding_window or 0}
        case "mistral3":
            return {"attention.temperature_scale": config.rope_parameters["llama_4_scaling_beta"]}
        case "t5":
            return {
                "attention.key_length": config.d_kv, "attention.value_length": config.d_kv,
                "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon,
                "attention.relative_buckets_count": config.relative_attention_num_buckets,
                "decoder_start_token_id": 0, "decoder_block_count": config.num_decoder_layers,
            }  # fmt: skip
        case "bert" | "nomic-bert" | "eurobert":
            keys = {"attention.causal": False}
            if config.model_type in ("roberta", "xlm-roberta"):
                keys["context_length"] = config.max_position_embeddings - 2
            return keys
        case "modern-bert":
            return {
                "attention.causal": False, "attention.sliding_window": config.local_attention,
                "attention.sliding_window_pattern": 3, "rope.scaling.type": "none",
            }  # fmt: skip
    return {}


def tensors(model: PreTrainedModel, architecture: str) -> dict[str, np.ndarray]:
    """By the names in the file, in its layout, as float32."""
    config = model.config
    heads, kv_heads = config.num_attention_heads, _kv_heads(config)
    number = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    layers = max(config.num_hidden_layers, getattr(config, "num_decoder_layers", None) or 0)
    names = gguf.get_tensor_name_map(number, layers)
    made: dict[str, np.ndarray] = {}
    rope = _get(config, "rope_parameters") or {}
    made |= _rope_tensors(model, rope.get("full_attention", rope))
    stored = _stored(model)
    norms: dict[str, list[np.ndarray]] = {}
    for name, tensor in stored.items():
        array = tensor.detach().float().numpy()
        if name.split(".")[-2] == "act_fn":
            continue
        if ".norms." in name:
            # Of StableLM, one per head.
            _, _, layer, _, norm, *_ = name.split(".")
            norms.setdefault(f"blk.{layer}.attn_{norm[0]}_norm.weight", []).append(array)
            continue
        if "W_pack" in name:
            block = name.split(".")[2]
            for part, rows in zip("qkv", np.split(array, 3)):
                rows = rows if part == "v" else _paired(rows, heads)
                made[f"blk.{block}.attn_{part}.weight"] = rows
            continue
        suffixes = (".weight", ".bias")
        target = names.get_name(name, suffixes) or names.get_name(name.removeprefix("transformer."), suffixes)
        assert target is not None, name
        if architecture in PAIRED and ".attn_q." in target:
            array = _paired(array, heads)
        if architecture in PAIRED and ".attn_k." in target:
            array = _paired(array, kv_heads)
        if architecture in OFFSET and target.endswith("norm.weight"):
            array = array + 1
        if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            array = array.T
        if "query_key_value" in name:
            groups = array.reshape(kv_heads, heads // kv_heads + 2, -1, *array.shape[1:])
            parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
            array = np.concatenate([part.reshape(-1, *array.shape[1:]) for part in parts])
        if config.model_type in ("roberta", "xlm-roberta") and target == "position_embd.weight":
            array = array[2:]
        made[target] = array
    return made | {name: np.stack(arrays) for name, arrays in norms.items()}


def _stored(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    if model.config.model_type != "nomic_bert":
        return stored_tensors(model)
    # transformers saves it as the original code did.
    renamed = {}
    state = dict(model.state_dict())
    for layer in range(model.config.num_hidden_layers):
        old, new = f"layers.{layer}.", f"encoder.layers.{layer}."
        qkv = [state.pop(f"{old}self_attn.{part}_proj.weight") for part in "qkv"]
        renamed[new + "attn.Wqkv.weight"] = torch.cat(qkv)
        for theirs, ours in (
            ("self_attn.o_proj", "attn.out_proj"), ("mlp.up_proj", "mlp.fc11"), ("mlp.gate_proj", "mlp.fc12"),
            ("mlp.down_proj", "mlp.fc2"), ("post_attention_layernorm", "norm1"), ("post_mlp_layernorm", "norm2"),
        ):  # fmt: skip
            for leaf in ("weight", "bias"):
                if f"{old}{theirs}.{leaf}" in state:
                    renamed[f"{new}{ours}.{leaf}"] = state.pop(f"{old}{theirs}.{leaf}")
    for leaf in ("weight", "bias"):
        renamed[f"emb_ln.{leaf}"] = state.pop(f"embeddings.LayerNorm.{leaf}")
    return renamed | state


def _paired(array: np.ndarray, heads: int) -> np.ndarray:
    return array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _rope_tensors(model: PreTrainedModel, rope: dict) -> dict[str, np.ndarray]:
    kind = rope.get("rope_type")
    if kind == "longrope":
        return {
            f"rope_factors_{length}.weight": np.array(rope[f"{length}_factor"], dtype=np.float32)
            for length in ("long", "short")
        }
    if kind != "llama3":
        return {}
    config = model.config
    dim = _get(config, "head_dim") or config.hidden_size // config.num_attention_heads
    freqs = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    factors = []
    for freq in freqs:
        wavelength = 2 * math.pi / freq
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(rope["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return {"rope_freqs.weight": np.array(factors, dtype=np.float32)}
