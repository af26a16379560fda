"""Phi-3 and 4: Llama without biases, with fused projections, a partial or long RoPE and one window for all layers."""

from dataclasses import replace

from ..config_map import Computed, Fixed, Irrelevant, Renamed, RopeParameters, Same
from ..family import Family
from ..rules import Rule
from ._common import (
    DROPOUT,
    EMBEDDINGS_AND_HEAD,
    FUSED_GRADIENT,
    FUSED_PRODUCT,
    KV_HEADS,
    LLAMA_BLOCK,
    PRE_NORMS,
    QKV_IN_BLOCKS,
    RMS_EPS,
    SIZES,
    UNDECLARED_HEAD_DIM,
    WHOLE_WINDOW,
    fused_gate_up,
    fused_qkv,
)


LAYER = "model.layers.{layer}."

FAMILIES = (
    Family(
        model_type="phi3",
        config=(
            SIZES, KV_HEADS, UNDECLARED_HEAD_DIM, RMS_EPS, DROPOUT, *LLAMA_BLOCK, Same("hidden_act"), WHOLE_WINDOW,
            RopeParameters(per_layer_type=False),
            Renamed("resid_pdrop", "residual_dropout"),
            Fixed(fused_gate_up=True),
            Irrelevant("partial_rotary_factor", "the class writes it into `rope_parameters`"),
            # The class also writes it into the parameters of a long RoPE, where the angles come from.
            Computed(
                ("original_max_position_embeddings",),
                lambda native: {"longrope_recomputes_cache": native["rope_parameters"]["rope_type"] == "longrope"},
                lambda fields: (
                    {"original_max_position_embeddings": fields["rope_parameters"]["original_max_position_embeddings"]}
                    if fields["longrope_recomputes_cache"]
                    else {}
                ),
                kept=("original_max_position_embeddings",),
            ),
        ),
        weights=(
            *EMBEDDINGS_AND_HEAD, *PRE_NORMS,
            fused_qkv(LAYER + "self_attn.qkv_proj", QKV_IN_BLOCKS),
            Rule(LAYER + "self_attn.o_proj.{leaf}", LAYER + "self_attn.o_proj.{leaf}"),
            fused_gate_up(LAYER + "mlp.gate_up_proj"),
            Rule(LAYER + "mlp.activation_fn.{leaf}", LAYER + "mlp.act_fn.{leaf}"),
            Rule(LAYER + "mlp.down_proj.{leaf}", LAYER + "mlp.down_proj.{leaf}"),
        ),
        deviations=(
            FUSED_GRADIENT,
            # Measured: 2.5e-5 with one key/value head of eight channels.
            replace(FUSED_PRODUCT, bound=1e-4),
        ),
    ),
)  # fmt: skip
