"""Apertus: Llama's attention with a norm per head, and an ungated network whose activation xIELU is learned."""

from ..config_map import Fixed, Same
from ..family import Family
from ..rules import Rule
from ._common import (
    ATTENTION,
    DROPOUT,
    EMBEDDINGS_AND_HEAD,
    KV_HEADS,
    ONE_ATTENTION_BIAS,
    QK_NORM,
    RMS_EPS,
    SIZES,
    UNDECLARED_HEAD_DIM,
    UNGATED_BLOCK,
    UNGATED_FFN,
    WHOLE_ROPE,
    layer_norms,
)


# Two learned, two constant.
XIELU = tuple(
    Rule(f"model.layers.{{layer}}.mlp.act_fn.{name}", f"model.layers.{{layer}}.mlp.act_fn.{name}")
    for name in ("alpha_p", "alpha_n", "beta", "eps")
)

FAMILIES = (
    Family(
        model_type="apertus",
        config=(
            SIZES, KV_HEADS, UNDECLARED_HEAD_DIM, RMS_EPS, DROPOUT, *UNGATED_BLOCK, WHOLE_ROPE, ONE_ATTENTION_BIAS,
            Same("hidden_act"),
            Fixed(qk_norm="head"),
        ),
        weights=(
            *EMBEDDINGS_AND_HEAD, *ATTENTION, *QK_NORM, *UNGATED_FFN, *XIELU,
            *layer_norms(self_attn_pre_norm="attention_layernorm", mlp_pre_norm="feedforward_layernorm"),
        ),
    ),
)  # fmt: skip
