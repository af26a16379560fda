"""EXAONE 4: norms after the sublayers and per head; without a rotation in the full layers of a stack with a window."""

from ..config_map import Computed, Fixed, Irrelevant, Same, rotated_layers
from ..family import Family
from ._common import (
    ATTENTION,
    DROPOUT,
    EMBEDDINGS_AND_HEAD,
    GATED_FFN,
    KV_HEADS,
    QK_NORM,
    RMS_EPS,
    SIZES,
    UNDECLARED_HEAD_DIM,
    WHOLE_ROPE,
    layer_norms,
)


# The window of the published models, where full layers are to be without a rotation and nothing else needs a window.
SOME_WINDOW = 4096


def _layers(native):
    window = native["sliding_window"]
    return {
        "layer_types": native["layer_types"],
        "sliding_window": window,
        "no_rope_layers": [int(window is None or kind == "sliding_attention") for kind in native["layer_types"]],
    }


def _native_layers(fields):
    plain = all(rotated_layers(fields)) and "sliding_attention" not in fields["layer_types"]
    return {
        "layer_types": fields["layer_types"],
        "sliding_window": None if plain else fields["sliding_window"] or SOME_WINDOW,
    }


FAMILIES = (
    Family(
        model_type="exaone4",
        config=(
            SIZES, KV_HEADS, UNDECLARED_HEAD_DIM, RMS_EPS, DROPOUT, WHOLE_ROPE, Same("hidden_act"),
            Fixed(norm_type="rmsnorm", norm_casting_mode="llama", norm_placement="branch", ffn_type="glu"),
            Fixed(qk_norm="head"),
            Computed(("layer_types", "sliding_window"), _layers, _native_layers),
            Irrelevant("sliding_window_pattern", "read only where `layer_types` is not given, to fill it in"),
        ),
        weights=(
            *EMBEDDINGS_AND_HEAD, *ATTENTION, *QK_NORM, *GATED_FFN,
            *layer_norms(
                self_attn_branch_norm="post_attention_layernorm", mlp_branch_norm="post_feedforward_layernorm"
            ),
        ),
    ),
)  # fmt: skip
