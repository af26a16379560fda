"""Nemotron 3 and 4: LayerNorm applied as 1 + w, ungated squared ReLU, partial rotation."""

from ..config_map import Fixed, PartialRopeParameters, Same
from ..family import Family
from ._common import (
    ATTENTION,
    DROPOUT,
    EMBEDDINGS_AND_HEAD,
    HEAD_DIM,
    KV_HEADS,
    ONE_ATTENTION_BIAS,
    PRE_NORMS,
    SIZES,
    UNGATED_FFN,
)


FAMILIES = (
    Family(
        model_type="nemotron",
        config=(
            SIZES, KV_HEADS, HEAD_DIM, DROPOUT, ONE_ATTENTION_BIAS, PartialRopeParameters(),
            Same("hidden_act", "mlp_bias", "norm_eps"),
            Fixed(
                norm_type="layernorm", norm_bias=True, norm_unit_offset=True, norm_casting_mode="none",
                norm_placement="pre", ffn_type="mlp", initializer_norm_ones=True,
            ),
        ),
        weights=(*EMBEDDINGS_AND_HEAD, *ATTENTION, *UNGATED_FFN, *PRE_NORMS),
    ),
)  # fmt: skip
