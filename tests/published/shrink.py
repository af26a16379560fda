"""A published config at a tiny size: every key stays, every value that is no size stays as it is."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedConfig


VOCABULARY, HIDDEN, HEADS, FFN, LAYERS, CONTEXT, WINDOW = 256, 64, 4, 96, 2, 96, 12
MOST_LAYERS = 8

# The names that config classes and published files have for a size.
NAMES = {
    "vocab_size": ("vocab_size", "decoder_vocab_size"),
    "hidden_size": ("hidden_size", "n_embd", "n_embed", "d_model", "dim"),
    "intermediate_size": (
        "intermediate_size", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "hidden_dim",
        "ffn_hidden_size",
    ),
    "num_hidden_layers": (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers",
        "decoder_layers",
    ),
    "num_attention_heads": (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "attention_heads",
    ),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim", "d_kv"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length"),
    "sliding_window": ("sliding_window", "window_size", "local_attention"),
    "layers_list": ("layer_types", "no_rope_layers", "attention_layers"),
}  # fmt: skip


def _own_name(config_class: type[PreTrainedConfig], canonical: str) -> str:
    return config_class.attribute_map.get(canonical, canonical)


def shrunk(published: Mapping[str, Any], config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """
    The config with small sizes.

    Args:
        published: config.json as it was published.
        config_class: of its type; sizes that the file leaves to it are written out.
    """
    values = copy.deepcopy(dict(published))
    for key in ("encoder", "decoder"):
        if isinstance(values.get(key), dict):
            values[key] = shrunk(values[key], config_class.sub_configs[key])
    layers = _layers(values)
    own_names = {canonical: _own_name(config_class, canonical) for canonical in NAMES}
    declared = config_class.__dataclass_fields__
    for canonical in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        names = NAMES[canonical]
        if not any(name in values for name in names) and own_names[canonical] in declared:
            values[own_names[canonical]] = declared[own_names[canonical]].default
    context = next((values[name] for name in NAMES["max_position_embeddings"] if values.get(name)), None)
    heads = next((values[name] for name in NAMES["num_attention_heads"] if values.get(name)), HEADS)
    wide = next((values[name] for name in NAMES["hidden_size"] if values.get(name)), HIDDEN)
    for key, value in values.items():
        if value is None or isinstance(value, (bool, dict, str)):
            continue
        if key in NAMES["vocab_size"]:
            values[key] = VOCABULARY
        elif key in NAMES["hidden_size"]:
            values[key] = HIDDEN
        elif key in NAMES["intermediate_size"]:
            values[key] = FFN
        elif key in NAMES["num_hidden_layers"]:
            values[key] = layers
        elif key in NAMES["num_attention_heads"]:
            values[key] = HEADS
        elif key in NAMES["num_key_value_heads"]:
            values[key] = HEADS if value == heads else 1 if value == 1 else HEADS // 2
        elif key in NAMES["head_dim"]:
            values[key] = HIDDEN // HEADS if value * heads == wide else HIDDEN // HEADS + 8
        elif key in NAMES["max_position_embeddings"]:
            # Rows that a table has beside its positions (514) stay.
            values[key] = min(value, CONTEXT + value % 128 if value % 128 < 8 else CONTEXT)
        elif key in NAMES["sliding_window"]:
            values[key] = WINDOW if context is None or value < context else value
        elif key in NAMES["layers_list"]:
            values[key] = value[:layers]
        elif key == "embedding_size" or key == "word_embed_proj_dim":
            values[key] = HIDDEN if value == wide else HIDDEN // 2
        elif key == "rotary_dim":
            values[key] = max(2, value * HIDDEN // wide * heads // HEADS // 2 * 2)
        elif key == "max_window_layers":
            values[key] = layers if value >= (published.get("num_hidden_layers") or 0) else layers // 2
        elif key == "attention_types":
            values[key] = [[pattern, layers // len(pattern)] for pattern, _ in value[:1]]
        elif key == "original_max_position_embeddings":
            values[key] = CONTEXT if not context or value >= context else CONTEXT // 3
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(values.get(key), dict):
            values[key] = _rope(values[key], values, context)
    return _ids(values, _large_ids(values))


def _layers(values: Mapping[str, Any]) -> int:
    """Enough layers to have one of each kind, and one after."""
    types = values.get("layer_types") or values.get("attention_layers") or values.get("no_rope_layers")
    if types:
        last = max(types.index(kind) for kind in set(types)) + 2
        return min(last + last % 2, MOST_LAYERS, len(types))
    pattern = values.get("sliding_window_pattern") or values.get("global_attn_every_n_layers")
    return min(pattern + 1, MOST_LAYERS) if isinstance(pattern, int) else LAYERS


def _rope(parameters: dict[str, Any], values: Mapping[str, Any], context: int | None) -> dict[str, Any]:
    made = {}
    for key, value in parameters.items():
        if isinstance(value, dict):
            made[key] = _rope(value, values, context)
        elif key == "original_max_position_embeddings" and value:
            made[key] = CONTEXT if not context or value >= context else CONTEXT // 3
        elif key in ("short_factor", "long_factor"):
            factor = parameters.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
            made[key] = value[: int((values.get("head_dim") or HIDDEN // HEADS) * factor) // 2]
        else:
            made[key] = value
    return made


def _numbers(value: Any) -> Iterable[int]:
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _names_ids(key: str) -> bool:
    return key.endswith(("_token_id", "_token_ids", "suppress_tokens", "bad_words_ids"))


def _large_ids(values: Mapping[str, Any]) -> dict[int, int]:
    """Tokens beyond the small vocabulary -> its last ones, in order; the same for every key."""
    nested = [part for part in values.values() if isinstance(part, dict)]
    every = {n for part in (values, *nested) for key, ids in part.items() if _names_ids(key) for n in _numbers(ids)}
    large = sorted(n for n in every if n >= VOCABULARY)
    return {n: VOCABULARY - len(large) + index for index, n in enumerate(large)}


def _ids(values: dict[str, Any], small: Mapping[int, int]) -> dict[str, Any]:
    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        return small.get(value, value) if isinstance(value, int) and not isinstance(value, bool) else value

    return {key: moved(value) if _names_ids(key) else value for key, value in values.items()}
