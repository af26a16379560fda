"""HunYuan V1, dense: Llama with a norm on queries and keys after the rotation, whose base `alpha` may stretch."""

from ..config_map import Fixed, RopeParameters, Same
from ..family import Family
from ..rules import Rule
from ._common import (
    DROPOUT,
    KV_HEADS,
    LLAMA_BLOCK,
    LLAMA_WEIGHTS,
    NULLABLE_HEAD_DIM,
    ONE_ATTENTION_BIAS,
    RMS_EPS,
    SIZES,
)


QK_NORM = tuple(
    Rule(f"model.layers.{{layer}}.self_attn.{native}.weight", f"model.layers.{{layer}}.self_attn.{ours}.weight")
    for native, ours in (("query_layernorm", "q_norm"), ("key_layernorm", "k_norm"))
)

FAMILIES = (
    Family(
        model_type="hunyuan_v1_dense",
        config=(
            SIZES, KV_HEADS, NULLABLE_HEAD_DIM, RMS_EPS, DROPOUT, *LLAMA_BLOCK, ONE_ATTENTION_BIAS, Same("hidden_act"),
            RopeParameters(partial=False, per_layer_type=False, reads=("alpha",)),
            Fixed(qk_norm="head", qk_norm_after_rope=True),
        ),
        weights=LLAMA_WEIGHTS + QK_NORM,
    ),
)  # fmt: skip
