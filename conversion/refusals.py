"""Native model types that a dense, config-driven stack cannot express, by the mechanism it lacks.

Most mechanisms show in the fields of a type's config class, so that a new mixture of experts is refused by name without
an entry here. `MECHANISMS` holds the rest.
"""

import difflib
from collections.abc import Container

from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


# A field of the config class -> the mechanism that it belongs to. All that apply are named.
MARKERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        "mixture-of-experts feed-forward layers",
    ),
    (("kv_lora_rank", "o_lora_rank"), "multi-head latent attention"),
    (("index_topk", "index_topk_blocks", "indexer_budget"), "sparse attention chosen by an indexer"),
    (("mamba_d_state", "ssm_state_size", "state_size"), "state-space layers"),
    (("linear_conv_kernel_dim", "short_conv_kernel_size", "linear_attn_alpha_factor"), "linear-attention layers"),
    (("conv_L_cache", "conv_kernel_size", "conv_window"), "convolutional layers"),
    (("altup_num_inputs",), "alternating updates of several residual streams (AltUp)"),
    (("hidden_size_per_layer_input",), "token embeddings for every layer"),
    (("num_kv_shared_layers",), "layers that use the keys and values of another layer"),
    (("heads_per_ngram",), "n-gram embeddings"),
    (("ngpt_alpha_init",), "residuals that move on a sphere (nGPT)"),
    (("n_recurrent_loops",), "layers that run in loops"),
    (("output_vocab_size",), "an output head with fewer rows than the token embedding"),
)

_SPARSE = "block-sparse attention"
_TOWERS = "towers for several modalities"

# What the config's fields do not show. An entry replaces what they do show.
MECHANISMS: dict[str, str] = {
    "albert": "layers that share one set of weights",
    "big_bird": _SPARSE,
    "bigbird_pegasus": _SPARSE,
    "blt": "bytes grouped into patches by a second model",
    "bros": "two-dimensional page positions",
    "canine": "hashes of characters in place of a vocabulary, and a sequence that is shortened between layers",
    "cpmant": "a position bias that depends on segments, and learned prompts",
    "dbrx": "mixture-of-experts feed-forward layers",
    "deberta": "disentangled attention of content and position",
    "deberta-v2": "disentangled attention of content and position",
    "diffllama": "differential attention",
    "doge": "dynamic mask attention",
    "encoder-decoder": "two native models joined at run time",
    "esm": "embeddings rescaled by the share of masked tokens",
    "fnet": "Fourier transforms in place of attention",
    "fsmt": "a decoder that sees later tokens while its cache is on, and an LM head inside the bare model",
    "funnel": "a sequence that is pooled between layers",
    "gemma4_assistant": "keys and values of the model that it drafts for, and logits over clusters of tokens",
    "gemma4_unified_assistant": "keys and values of the model that it drafts for, and logits over clusters of tokens",
    "gemma4_text": "token embeddings for every layer, and a norm on values",
    "gemma4_unified_text": "a norm on values, and keys that serve as values",
    "hrm_text": "stacks that run in nested loops",
    "ibert": "integer arithmetic",
    "layoutlm": "two-dimensional page positions",
    "layoutlmv2": "two-dimensional page positions, and images",
    "layoutlmv3": "two-dimensional page positions, and images",
    "led": _SPARSE,
    "lilt": "two-dimensional page positions",
    "longformer": _SPARSE,
    "longt5": _SPARSE,
    "luke": "entity embeddings and attention between words and entities",
    "lxmert": _TOWERS,
    "markuplm": "embeddings of paths in a document's markup",
    "mobilebert": "bottlenecks around every layer",
    "moshi": _TOWERS,
    "mpnet": "a relative position bias on top of learned positions",
    "mra": "attention approximated at several resolutions",
    "musicgen": _TOWERS,
    "musicgen_melody": _TOWERS,
    "neomme": "value embeddings and image patches",
    "nystromformer": "attention approximated from landmarks",
    "pegasus_x": _SPARSE,
    "perceiver": "cross-attention to an array of latents",
    "phi4_multimodal": _TOWERS,
    "prophetnet": "n-gram streams of the decoder",
    "recurrent_gemma": "gated linear recurrences",
    "reformer": "hashed attention and reversible layers",
    "rembert": "an output head of another width than the embeddings",
    "roc_bert": "shape and pronunciation embeddings",
    "rwkv": "linear recurrences in place of attention",
    "seamless_m4t": _TOWERS,
    "seamless_m4t_v2": _TOWERS,
    "squeezebert": "grouped convolutions in place of linear layers",
    "t5gemma2": "self- and cross-attention merged into one softmax",
    "tapas": "table-structure embeddings",
    "whisper": "a speech encoder, and key projections without the biases that queries and values have",
    "xlnet": "relative positions of Transformer-XL and two attention streams",
    "xlstm": "recurrent cells in place of attention",
    "xmod": "adapters for every language",
    "yoso": "attention approximated by hashing",
    "zamba": "state-space layers and attention layers that share one set of weights",
    "zamba2": "state-space layers and attention layers that share one set of weights",
    "zaya": "mixture-of-experts feed-forward layers, and convolutions inside attention",
}


def _fields(config_class: type[PreTrainedConfig]) -> set[str]:
    """Names that a config class declares, its aliases included."""
    return set(getattr(config_class, "__dataclass_fields__", ())) | set(config_class.attribute_map)


def own_name(model_type: str) -> str:
    """A type by the name that its config class has, where transformers knows it by another as well (GPT-SW3, a GPT-2)."""
    return CONFIG_MAPPING[model_type].model_type if model_type in CONFIG_MAPPING else model_type


def text_tower(model_type: str) -> str | None:
    """The type of a multimodal model's text tower, or `None` where it has none, or none of one type."""
    tower = CONFIG_MAPPING[model_type].sub_configs.get("text_config")
    if tower is None:
        return None
    # An `AutoConfig` leaves the tower open; its default says which one is meant.
    own = getattr(tower, "model_type", "") or getattr(CONFIG_MAPPING[model_type]().text_config, "model_type", "")
    return own or None


def mechanism(model_type: str) -> str | None:
    """
    What a type of the installed transformers needs and a dense stack lacks; `None` if nothing is known to be in the way.

    Args:
        model_type: a key of transformers' table of configs.
    """
    if model_type in MECHANISMS:
        return MECHANISMS[model_type]
    config_class = CONFIG_MAPPING[model_type]
    towers = [name for name in config_class.sub_configs if name.startswith(("vision", "audio", "vq", "text"))]
    if towers:
        return _TOWERS
    fields = _fields(config_class)
    found = [what for names, what in MARKERS if fields & set(names)]
    return " and ".join(filter(None, [", ".join(found[:-1]), *found[-1:]])) or None


def sentence(model_type: str, supported: Container[str] = ()) -> str:
    """
    Why this type is not supported and what to do.

    Args:
        supported: the types that are.
    """
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(model_type, list(CONFIG_MAPPING), n=1)
        hint = f"Did you mean {close[0]}?" if close else "Models that bring their own code cannot be converted."
        return f"{model_type!r} is not a model type of transformers. {hint}"
    missing = mechanism(model_type)
    if missing is None:
        return (
            f"{model_type} has no family here yet. Use the stock class of transformers for it, or add a family "
            "(CONTRIBUTING.md says how)."
        )
    tower = text_tower(model_type) if missing == _TOWERS else None
    if tower is not None and tower in supported:
        return (
            f"{model_type} has {missing}, and one stack is one tower. Its text tower alone is a {tower} model: load "
            "it with the stock class and convert `model.get_decoder()` with `from_native`."
        )
    return (
        f"{model_type} needs {missing}, which a dense stack does not have. Use the stock class of transformers for it."
    )


def uncovered(supported: Container[str]) -> dict[str, str | None]:
    """The installed causal language models that have no family here: type -> the mechanism in the way, if any."""
    types = sorted(set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - {"hf_variant"})
    return {model_type: mechanism(model_type) for model_type in types if own_name(model_type) not in supported}
