"""GPT-2: learned positions, biased LayerNorm, ungated GELU, Conv1D projections with queries, keys and values fused."""

from ..config_map import Computed, Fixed, Required, Same
from ..family import Family
from ..rules import Rule, Transpose
from ._common import (
    ALL_BIASES,
    FUSED_GRADIENT,
    FUSED_PRODUCT,
    GPT2_FFN,
    GPT2_NAMES,
    LAYERNORM_BLOCK,
    NO_PADDING_ROW,
    QKV_IN_COLUMNS,
    TRANSPOSED_PRODUCT,
    fused_qkv,
    gpt2_weights,
)


LAYER = "transformer.h.{layer}.attn."

FAMILIES = (
    Family(
        model_type="gpt2",
        config=(
            *GPT2_NAMES, *GPT2_FFN,
            Same("scale_attn_by_inverse_layer_idx"),
            Computed(
                ("scale_attn_weights",),
                lambda native: {"attention_scaling": None if native["scale_attn_weights"] else 1.0},
                lambda fields: {"scale_attn_weights": fields["attention_scaling"] != 1.0},
            ),
            # About eager attention alone: the kernels of other backends accumulate in float32 anyway.
            Computed(
                ("reorder_and_upcast_attn",),
                lambda native: {
                    "attention_score_form": "fused" if native["reorder_and_upcast_attn"] else "multiplied",
                    "attention_scores_in_float32": native["reorder_and_upcast_attn"],
                },
                lambda fields: {"reorder_and_upcast_attn": fields["attention_scores_in_float32"]},
            ),
            LAYERNORM_BLOCK, ALL_BIASES, NO_PADDING_ROW,
            Fixed(
                position_embedding_type="learned", attention_softmax_in_float32=False,
                initializer_scheme="depth_scaled",
            ),
            Required("add_cross_attention", False, reason="a decoder inside an encoder-decoder does not stand alone"),
        ),
        weights=(
            *gpt2_weights(Transpose()),
            fused_qkv(LAYER + "c_attn", QKV_IN_COLUMNS),
            Rule(LAYER + "c_proj.{leaf}", "model.layers.{layer}.self_attn.o_proj.{leaf}", Transpose()),
        ),
        deviations=(FUSED_GRADIENT, FUSED_PRODUCT, TRANSPOSED_PRODUCT),
        head_weights={"token_classification": (Rule("classifier.{leaf}", "score.{leaf}"),)},
    ),
)  # fmt: skip
