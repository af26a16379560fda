"""SmolLM3: Llama without a rotation in some layers, which may have a window instead."""

from ..config_map import Computed, Irrelevant, LayerTypes, Same, rotated_layers
from ..family import Family
from ._common import (
    DROPOUT,
    KV_HEADS,
    LLAMA_BLOCK,
    LLAMA_WEIGHTS,
    ONE_ATTENTION_BIAS,
    RMS_EPS,
    SIZES,
    UNDECLARED_HEAD_DIM,
    WHOLE_ROPE,
)


FAMILIES = (
    Family(
        model_type="smollm3",
        config=(
            SIZES, KV_HEADS, UNDECLARED_HEAD_DIM, RMS_EPS, DROPOUT, *LLAMA_BLOCK, WHOLE_ROPE, ONE_ATTENTION_BIAS,
            Same("hidden_act", "mlp_bias"),
            LayerTypes(),
            # The masks have windows by `layer_types` alone; FlashAttention needs the flag as well.
            Computed(
                ("use_sliding_window",),
                lambda native: {},
                lambda fields: {"use_sliding_window": "sliding_attention" in fields["layer_types"]},
                kept=("use_sliding_window",),
            ),
            # The native list may be longer than the stack.
            Computed(
                ("no_rope_layers",),
                lambda native: {
                    "no_rope_layers": [int(bool(x)) for x in native["no_rope_layers"][: native["num_hidden_layers"]]]
                },
                lambda fields: {"no_rope_layers": [int(rotates) for rotates in rotated_layers(fields)]},
                kept=("no_rope_layers",),
            ),
            Irrelevant("no_rope_layer_interval", "read only where `no_rope_layers` is not given, to fill it in"),
        ),
        weights=LLAMA_WEIGHTS,
    ),
)  # fmt: skip
