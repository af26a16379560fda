"""Gemma 1 to 3 and VaultGemma: `1 + w` norms, scaled embeddings; sandwich norms, soft caps and windows since 2."""

from collections.abc import Mapping
from typing import Any

from ..config_map import Computed, Fields, Fixed, Irrelevant, LayerTypes, NestedRopeParameters, Renamed, Required, Same
from ..family import Family
from ._common import (
    ATTENTION,
    DROPOUT,
    EMBEDDINGS_AND_HEAD,
    GATED_FFN,
    HEAD_DIM,
    KV_HEADS,
    LLAMA_WEIGHTS,
    ONE_ATTENTION_BIAS,
    QK_NORM,
    RMS_EPS,
    SANDWICH_NORMS,
    SIZES,
    WHOLE_ROPE,
    layer_norms,
)


DECODER = Required(
    "use_bidirectional_attention", None, False, reason="otherwise it depends on the attention backend who sees whom"
)
SHAPE = (
    SIZES, KV_HEADS, HEAD_DIM, RMS_EPS, DROPOUT, ONE_ATTENTION_BIAS,
    Fixed(
        norm_type="rmsnorm", norm_unit_offset=True, norm_casting_mode="gemma", ffn_type="glu",
        embedding_multiplier_in_weight_dtype=True,
    ),
    Computed((), lambda native: {"embedding_multiplier": native["hidden_size"] ** 0.5}, lambda fields: {}),
)  # fmt: skip
ACTIVATION = (Renamed("hidden_activation", "hidden_act"),)
QUERY_SCALAR = Computed(
    ("query_pre_attn_scalar",),
    lambda native: {"attention_scaling": native["query_pre_attn_scalar"] ** -0.5},
    lambda fields: {
        "query_pre_attn_scalar": (
            fields["head_dim"] if fields["attention_scaling"] is None else round(fields["attention_scaling"] ** -2)
        )
    },
)
GEMMA2 = (
    *SHAPE, *ACTIVATION, QUERY_SCALAR, WHOLE_ROPE, LayerTypes(window=4096),
    Same("attn_logit_softcapping", "final_logit_softcapping"),
)  # fmt: skip


def _gemma3_window(native: Mapping[str, Any]) -> Fields:
    """An encoder's window is written as its whole width, and ours as its reach on either side."""
    window = native["sliding_window"]
    if native["use_bidirectional_attention"] and window is not None:
        window //= 2
    return {"layer_types": list(native["layer_types"]), "sliding_window": window}


def _native_gemma3_window(fields: Mapping[str, Any]) -> Fields:
    # The class makes a mask for sliding layers also where it has none.
    window = 4096 if fields["sliding_window"] is None else fields["sliding_window"]
    if not fields["is_causal"]:
        window *= 2
    return {"layer_types": list(fields["layer_types"]), "sliding_window": window}


FAMILIES = (
    Family(
        model_type="gemma",
        config=(
            *SHAPE, Same("hidden_act"), WHOLE_ROPE, DECODER, Fixed(norm_placement="pre"),
        ),
        weights=LLAMA_WEIGHTS,
    ),
    Family(
        model_type="gemma2",
        config=(*GEMMA2, DECODER, Fixed(norm_placement="sandwich")),
        weights=EMBEDDINGS_AND_HEAD + ATTENTION + GATED_FFN + SANDWICH_NORMS,
    ),
    Family(
        model_type="gemma3_text",
        config=(
            *SHAPE, *ACTIVATION, QUERY_SCALAR,
            # An encoder (EmbeddingGemma); both `None` and `False` mean a decoder.
            Computed(
                ("use_bidirectional_attention",),
                lambda native: {"is_causal": not native["use_bidirectional_attention"]},
                lambda fields: {} if fields["is_causal"] else {"use_bidirectional_attention": True},
                kept=("use_bidirectional_attention",),
            ),
            Computed(("layer_types", "sliding_window"), _gemma3_window, _native_gemma3_window),
            NestedRopeParameters("full_attention", "sliding_attention"),
            Same("final_logit_softcapping"),
            Irrelevant("attn_logit_softcapping", "the class does not pass it to the attention"),
            Fixed(norm_placement="sandwich", qk_norm="head"),
        ),
        weights=EMBEDDINGS_AND_HEAD + ATTENTION + QK_NORM + GATED_FFN + SANDWICH_NORMS,
    ),
    Family(
        model_type="vaultgemma",
        config=(*GEMMA2, Fixed(norm_placement="pre")),
        weights=(
            EMBEDDINGS_AND_HEAD + ATTENTION + GATED_FFN
            + layer_norms(self_attn_pre_norm="input_layernorm", mlp_pre_norm="pre_feedforward_layernorm")
        ),
    ),
)  # fmt: skip
