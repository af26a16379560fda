"""
What llama.cpp's architectures are natively: one entry each, with the keys and layouts that are its own.

A file's names of tensors come from the package `gguf`; the sizes, RoPE, biases and token ids that most architectures
write alike are read for all of them in `checkpoint`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from ...model.configuration_variant import VariantConfig
from ..errors import ConversionError
from .layouts import GroupedQKV, Layout, OffsetNorm, PairedRotation, Transposed
from .metadata import Metadata


Options = Callable[[Metadata, Mapping[str, Any]], dict[str, Any]]

# Roberta's positions begin behind the padding token's id, and llama.cpp leaves the rows before them out.
ROBERTA_PADDING = 1


@dataclass(frozen=True)
class Architecture:
    """
    One of llama.cpp's architectures.

    Args:
        model_type: the native type, or how to tell it from the file.
        types: every native type that it may be, where the file tells.
        options: native config values beside those that all architectures have in common, from the metadata and those.
        layouts: pattern of a tensor's name in the file -> how it is laid out there.
        head: of the native class that a file holds; by default the family's usual one.
        stored_names: native names, with `{layer}`, in place of the class's own, where it saves under older ones.
        says_partial: whether the native class rotates a part of every head unless told otherwise.
        undeclared: options that the config class takes without showing them.
        layers_differ: whether layers have sizes of their own, which `block_configs` says natively.
    """

    model_type: str | Callable[[Metadata], str]
    options: Options = lambda metadata, common: {}
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    head: str | None = None
    stored_names: tuple[str, ...] = ()
    says_partial: bool = False
    undeclared: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    layers_differ: bool = False

    @property
    def native_types(self) -> tuple[str, ...]:
        return (self.model_type,) if isinstance(self.model_type, str) else self.types

    def type_of(self, metadata: Metadata) -> str:
        return self.model_type if isinstance(self.model_type, str) else self.model_type(metadata)

    def layout(self, name: str) -> Layout | None:
        """Of a tensor by its name in the file, or `None` for the native one."""
        return next((layout for pattern, layout in self.layouts.items() if re.fullmatch(pattern, name)), None)


PAIRED = {
    r"blk\.\d+\.attn_q\.(weight|bias)": PairedRotation(of_keys=False),
    r"blk\.\d+\.attn_k\.(weight|bias)": PairedRotation(of_keys=True),
}
OFFSET_NORMS = {r".*norm\.weight": OffsetNorm()}
GROUPED = {r"blk\.\d+\.attn_qkv\.(weight|bias)": GroupedQKV()}
CONV1D = {r"blk\.\d+\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight": Transposed()}


class keys:  # noqa: N801
    """Keys of the file under other native names, where they are there: `native="file's"`, with __ for a dot."""

    def __init__(self, **names: str):
        self.names = {native: theirs.replace("__", ".") for native, theirs in names.items()}

    def __call__(self, metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
        found = {native: metadata.get(theirs) for native, theirs in self.names.items()}
        return {native: value for native, value in found.items() if value is not None}

    def of_file(self, native: PreTrainedConfig) -> dict[str, Any]:
        """The way back: keys of the file, with the values of a native config."""
        found = {theirs: getattr(native, name, None) for name, theirs in self.names.items()}
        return {theirs: value for theirs, value in found.items() if value is not None}


class together:  # noqa: N801
    """Several of them."""

    def __init__(self, *readers: Options):
        self.readers = readers

    def __call__(self, metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for read in self.readers for name, value in read(metadata, common).items()}

    def of_file(self, native: PreTrainedConfig) -> dict[str, Any]:
        return {key: value for read in self.readers for key, value in keys_of(read, native).items()}


def keys_of(options: Options, native: PreTrainedConfig) -> dict[str, Any]:
    """The keys of the file that options read under another name, with the values of a native config."""
    return options.of_file(native) if isinstance(options, (keys, together, window, gemma_scale)) else {}


class window:  # noqa: N801
    """
    The window and, where the file has a pattern, `layer_types`.

    Args:
        name: of the window in the native config.
        dense_first: whether a period begins with the layer that sees everything.
        to_both_sides: whether the config class keeps the half of it that lies on one side, and the token itself.
    """

    def __init__(self, name: str = "sliding_window", dense_first: bool = False, to_both_sides: bool = False):
        self.name, self.dense_first, self.to_both_sides = name, dense_first, to_both_sides

    def __call__(self, metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
        width = metadata.uniform("attention.sliding_window") or None
        pattern = metadata.get("attention.sliding_window_pattern")
        layers = range(common["num_hidden_layers"])
        if isinstance(pattern, int) and not isinstance(pattern, bool):
            full = 0 if self.dense_first else pattern - 1
            pattern = [pattern > 0 and layer % pattern != full for layer in layers]
        values = {} if width is None else {self.name: width}
        if pattern is not None:
            if len(pattern) != len(layers):
                raise ConversionError(
                    f"`{metadata.name('attention.sliding_window_pattern')}` has {len(pattern)} entries for "
                    f"{len(layers)} layers. The file is damaged."
                )
            values["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]
        return values

    def of_file(self, native: PreTrainedConfig) -> dict[str, Any]:
        """The way back."""
        width = getattr(native, self.name, None)
        if width is None:
            return {}
        return {"attention.sliding_window": 2 * (width - 1) if self.to_both_sides else width}


def nested_rope(base: float | None) -> Options:
    """RoPE per layer type: layers with a window are never scaled, and have a base of their own, or the same (`None`)."""

    def read(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
        full = common["rope_parameters"]
        theta = metadata.get("rope.freq_base_swa", full["rope_theta"] if base is None else base)
        sliding = {"rope_type": "default", "rope_theta": float(theta)}
        return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}

    return read


def _llama(metadata: Metadata) -> str:
    return "mistral" if metadata.get("attention.sliding_window") else "llama"


def _deci(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    """`block_configs` of a model whose layers differ."""
    layers = common["num_hidden_layers"]
    queries, widths = (metadata.of_layers(key, layers) for key in ("attention.head_count", "feed_forward_length"))
    keys = (
        metadata.of_layers("attention.head_count_kv", layers) if metadata.get("attention.head_count_kv") else queries
    )
    if linear := [layer for layer in range(layers) if queries[layer] and not keys[layer]]:
        raise ConversionError(
            f"Layers {linear[:5]} have heads of queries and none of keys (`{metadata.name('attention.head_count_kv')}`): a "
            "linear layer stands in for their attention, which is missing here. Use the code that belongs to the model."
        )
    entries = [
        {
            "attention": {"num_attention_heads": queries[layer], "num_key_value_heads": keys[layer]}
            if queries[layer]
            else {"no_op": True},
            "ffn": {"intermediate_size": widths[layer]} if widths[layer] else {"no_op": True},
        }
        for layer in range(layers)
    ]
    return {} if all(entry == entries[0] for entry in entries) else {"block_configs": entries}


def _bert(metadata: Metadata) -> str:
    """BERT and its relatives are one architecture; what is there tells them apart."""
    kind = metadata.file.metadata.get("tokenizer.ggml.model")
    if kind in ("gpt2", "t5"):
        return "roberta" if kind == "gpt2" else "xlm-roberta"
    return "bert" if metadata.has("token_types.weight") else "distilbert"


def _bert_options(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    kind = _bert(metadata)
    if kind == "distilbert":
        return {"hidden_dim": common["intermediate_size"]}
    values = {"type_vocab_size": metadata.file.tensors["token_types.weight"].shape[0] if "token_types.weight"
              in metadata.file.tensors else 1}  # fmt: skip
    if kind != "bert":
        values |= {
            "pad_token_id": ROBERTA_PADDING,
            "max_position_embeddings": common["max_position_embeddings"] + ROBERTA_PADDING + 1,
        }
    return values


def _token_types(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    return {"type_vocab_size": metadata.file.tensors["token_types.weight"].shape[0]}


def _falcon(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    heads, kv_heads = common["num_attention_heads"], common["num_key_value_heads"]
    two_norms = metadata.has("blk.0.attn_norm_2.weight")
    return {
        "ffn_hidden_size": common["intermediate_size"],
        "num_kv_heads": heads if kv_heads == 1 and not two_norms else kv_heads,
        "multi_query": kv_heads == 1,
        "new_decoder_architecture": two_norms or kv_heads > 1,
        "num_ln_in_parallel_attn": (2 if two_norms else 1) if two_norms or kv_heads > 1 else None,
        "parallel_attn": True,
        "alibi": False,
        "bias": metadata.has("blk.0.attn_qkv.bias"),
    }


def _gpt2_width(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    return {"n_inner": common["intermediate_size"]}


def _starcoder(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    if common["num_key_value_heads"] != 1:
        raise ConversionError(
            f"The file has {common['num_key_value_heads']} key/value heads, and llama.cpp's layout of this architecture "
            "is known for one alone."
        )
    return {"multi_query": True, **_gpt2_width(metadata, common)}


def _mpt(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    slopes = metadata.get("attention.max_alibi_bias", 8.0)
    if slopes != 8.0:
        raise ConversionError(
            f"`{metadata.name('attention.max_alibi_bias')}` is {slopes}, and the native class computes 8 alone."
        )
    clip = metadata.get("attention.clamp_kqv") or None
    return {"attn_config": {"clip_qkv": clip}, "max_seq_len": common["max_position_embeddings"]}


def _stablelm(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    # Files say True in any case; the tensors do not.
    metadata.get("use_parallel_residual")
    return {
        "use_parallel_residual": not metadata.has("blk.0.ffn_norm.weight"),
        "qk_layernorm": metadata.has("blk.0.attn_q_norm.weight"),
    }


class gemma_scale:  # noqa: N801
    """
    The scale of Gemma 2 and 3: by a key that our files have, or, since others' have none, the class's own. llama.cpp
    knows the 27B model by its number of layers, and scales others by the width of a head.
    """

    def __init__(self, layers_of_27b: int):
        self.layers_of_27b = layers_of_27b

    def __call__(self, metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
        if (scale := metadata.get("attention.scale")) is not None:
            if not isinstance(scale, (int, float)) or not 1e-6 < scale < 1e6:
                raise ConversionError(
                    f"`{metadata.name('attention.scale')}` is {scale!r:.40} in {metadata.file.path}, which scales no "
                    "scores. The file is damaged."
                )
            scalar = scale**-2
            # In float32, as it is in the file.
            return {"query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-4 else scalar}
        if common["num_hidden_layers"] == self.layers_of_27b:
            return {"query_pre_attn_scalar": common["hidden_size"] // common["num_attention_heads"]}
        return {}

    def of_file(self, native: PreTrainedConfig) -> dict[str, Any]:
        """The way back."""
        return {"attention.scale": native.query_pre_attn_scalar**-0.5}

    def of_runtime(self, config: VariantConfig) -> float:
        """What llama.cpp computes with."""
        is_27b = config.num_hidden_layers == self.layers_of_27b
        return (config.hidden_size // config.num_attention_heads if is_27b else config.head_dim) ** -0.5


def _granite(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    # Without a key, or with 0, as other models scale.
    return {"attention_multiplier": metadata.get("attention.scale") or common["head_dim"] ** -0.5}


def _cohere(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    return {"use_qk_norm": metadata.has("blk.0.attn_q_norm.weight")}


def _olmo(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    epsilon = metadata.get("attention.layer_norm_epsilon", 1e-5)
    if epsilon != 1e-5:
        raise ConversionError(f"`{metadata.name('attention.layer_norm_epsilon')}` is {epsilon}; OLMo's is 1e-5.")
    return {"clip_qkv": metadata.get("attention.clamp_kqv") or None}


def _olmo2(metadata: Metadata) -> str:
    return "olmo3" if metadata.get("attention.sliding_window") else "olmo2"


def _olmo2_options(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    if _olmo2(metadata) == "olmo2":
        # Of a file without a window.
        metadata.get("attention.sliding_window_pattern")
        return {}
    return together(window(), nested_rope(None))(metadata, common)


def _exaone4(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    values = window()(metadata, common)
    if "sliding_window" not in values:
        layers = common["num_hidden_layers"]
        # The class divides by the pattern's length in any case.
        return {"sliding_window": None, "sliding_window_pattern": 4, "layer_types": ["full_attention"] * layers}
    return values


def _phi3(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    rope = common["rope_parameters"]
    return {
        # 0 is Phi-4's, which has none.
        "sliding_window": metadata.get("attention.sliding_window") or None,
        "original_max_position_embeddings": rope.get(
            "original_max_position_embeddings", common["max_position_embeddings"]
        ),
    }


def _ministral3(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    beta = metadata.get("attention.temperature_scale", 0.0)
    # The attention's temperature grows beyond the original context.
    original = {"original_max_position_embeddings": common["max_position_embeddings"]}
    return {"rope_parameters": {**original, **common["rope_parameters"], "llama_4_scaling_beta": beta}}


def _t5(metadata: Metadata) -> str:
    later = [name for name in metadata.file.tensors if re.fullmatch(r"enc\.blk\.[1-9]\d*\.attn_rel_b\.weight", name)]
    return "umt5" if later else "t5"


def _t5_options(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    gated = metadata.has("enc.blk.0.ffn_gate.weight")
    return {
        "d_ff": common["intermediate_size"],
        "num_decoder_layers": metadata.get("decoder_block_count", common["num_hidden_layers"]),
        "relative_attention_num_buckets": metadata.need("attention.relative_buckets_count"),
        "decoder_start_token_id": metadata.get("decoder_start_token_id", 0),
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }


def _baichuan(metadata: Metadata, common: Mapping[str, Any]) -> dict[str, Any]:
    # 13B models have ALiBi, which llama.cpp tells by their layers.
    name = "model_max_length" if common["num_hidden_layers"] == 40 else "max_position_embeddings"
    return {"max_position_embeddings": None, name: common["max_position_embeddings"]}


SOFT_CAPS = keys(
    attn_logit_softcapping="attn_logit_softcapping", final_logit_softcapping="final_logit_softcapping"
)  # fmt: skip
GEMMA_SCALES = {"gemma2": gemma_scale(46), "gemma3": gemma_scale(62), "gemma-embedding": gemma_scale(0)}
NOMIC_LAYER = "encoder.layers.{layer}."

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_llama, window(), PAIRED, types=("llama", "mistral")),
    "deci": Architecture("llama", _deci, PAIRED, undeclared=("block_configs",), layers_differ=True),
    "mistral3": Architecture("ministral3", _ministral3, PAIRED),
    "arcee": Architecture("arcee", layouts=PAIRED),
    "granite": Architecture(
        "granite",
        together(
            _granite,
            keys(
                embedding_multiplier="embedding_scale",
                residual_multiplier="residual_scale",
                logits_scaling="logit_scale",
            ),
        ),
        PAIRED,
    ),
    "smollm3": Architecture("smollm3", layouts=PAIRED),
    "olmo": Architecture("olmo", _olmo, PAIRED),
    "olmo2": Architecture(_olmo2, _olmo2_options, types=("olmo2", "olmo3")),
    "baichuan": Architecture(
        "baichuan", _baichuan, PAIRED, undeclared=("max_position_embeddings", "model_max_length")
    ),
    "apertus": Architecture("apertus"),
    "ernie4_5": Architecture("ernie4_5"),
    "seed_oss": Architecture("seed_oss"),
    "hunyuan-dense": Architecture("hunyuan_v1_dense"),
    "jais2": Architecture("jais2"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "exaone4": Architecture("exaone4", _exaone4),
    "gemma": Architecture("gemma", layouts=OFFSET_NORMS),
    "gemma2": Architecture("gemma2", together(window(), SOFT_CAPS, GEMMA_SCALES["gemma2"]), OFFSET_NORMS),
    "gemma3": Architecture(
        "gemma3_text",
        together(
            window(), nested_rope(10000.0), keys(final_logit_softcapping="final_logit_softcapping"), GEMMA_SCALES["gemma3"]
        ),
        OFFSET_NORMS,
    ),
    "gemma-embedding": Architecture(
        "gemma3_text",
        together(
            window(to_both_sides=True),
            nested_rope(10000.0),
            lambda *_: {"use_bidirectional_attention": True},
            GEMMA_SCALES["gemma-embedding"],
        ),
        OFFSET_NORMS,
        head="base",
    ),
    "nemotron": Architecture("nemotron", layouts=OFFSET_NORMS, says_partial=True),
    "stablelm": Architecture("stablelm", _stablelm, says_partial=True),
    "phi2": Architecture("phi", says_partial=True),
    "phi3": Architecture("phi3", _phi3, says_partial=True),
    "starcoder2": Architecture("starcoder2", window()),
    "command-r": Architecture("cohere", together(_cohere, keys(logit_scale="logit_scale"))),
    "cohere2": Architecture("cohere2", together(window(), keys(logit_scale="logit_scale"))),
    "chatglm": Architecture("glm", says_partial=True),
    "glm4": Architecture("glm4", says_partial=True),
    "gpt2": Architecture("gpt2", _gpt2_width, CONV1D),
    "starcoder": Architecture("gpt_bigcode", _starcoder),
    "gptneox": Architecture(
        "gpt_neox", keys(use_parallel_residual="use_parallel_residual"), GROUPED, says_partial=True
    ),
    "falcon": Architecture("falcon", _falcon, GROUPED),
    "bloom": Architecture("bloom", layouts=GROUPED),
    "mpt": Architecture("mpt", _mpt),
    "t5": Architecture(_t5, _t5_options, types=("t5", "umt5")),
    "bert": Architecture(
        _bert, _bert_options, head="base", types=("bert", "roberta", "xlm-roberta", "distilbert")
    ),
    "nomic-bert": Architecture(
        "nomic_bert",
        _token_types,
        head="base",
        stored_names=(
            "embeddings.word_embeddings.weight", "embeddings.token_type_embeddings.weight", "emb_ln.weight",
            "emb_ln.bias",
            *(
                NOMIC_LAYER + name
                for name in (
                    "attn.Wqkv.weight", "attn.out_proj.weight", "mlp.fc11.weight", "mlp.fc12.weight",
                    "mlp.fc2.weight", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias",
                )
            ),
        ),
    ),
    "modern-bert": Architecture(
        "modernbert",
        together(
            window("local_attention", dense_first=True),
            nested_rope(10000.0),
            keys(hidden_activation="hidden_act"),
        ),
        head="base",
    ),
    "eurobert": Architecture("eurobert", head="base"),
}  # fmt: skip
