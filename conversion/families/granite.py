"""Granite, Granite SWA and HyperCLOVA X: Llama with multipliers on embeddings, branches, scores and logits."""

from ..config_map import Computed, Fixed, LayerTypes, Mapped, Renamed, Same, rotated_layers
from ..family import Family
from ..rules import Rule
from ._common import (
    DROPOUT,
    HEAD_DIM,
    KV_HEADS,
    LLAMA_BLOCK,
    LLAMA_WEIGHTS,
    ONE_ATTENTION_BIAS,
    RMS_EPS,
    SIZES,
    UNDECLARED_HEAD_DIM,
    WHOLE_ROPE,
    layer_norms,
    multiplied_by_stack,
)


def attention_multiplier(fields):
    """The scale of the scores, which is derived here where it is not set."""
    scaling = fields["attention_scaling"]
    return {"attention_multiplier": fields["head_dim"] ** -0.5 if scaling is None else scaling}


def layer_rope_theta(fields):
    """The base of every layer, from this field or from what else says which layers rotate."""
    thetas = fields["layer_rope_theta"]
    if thetas is None:
        thetas = [WHOLE_ROPE.backward(fields)["rope_parameters"]["rope_theta"]] * fields["num_hidden_layers"]
    rotated = rotated_layers(fields)
    return {"layer_rope_theta": [theta if on else 0 for theta, on in zip(thetas, rotated, strict=True)]}


SHARED = (
    SIZES, KV_HEADS, RMS_EPS, DROPOUT, WHOLE_ROPE, ONE_ATTENTION_BIAS,
    Same("hidden_act", "mlp_bias", "embedding_multiplier", "residual_multiplier"),
    Computed((), lambda native: multiplied_by_stack(native["embedding_multiplier"] != 1.0), lambda fields: {}),
    Computed(
        ("attention_multiplier",),
        lambda native: {"attention_scaling": native["attention_multiplier"]},
        attention_multiplier,
    ),
)  # fmt: skip

# Engines read a multiplier; the reciprocal of a reciprocal can miss the last digit of the native value.
DIVIDED_LOGITS = Computed(
    ("logits_scaling",),
    lambda native: {"logit_scale": 1.0 / native["logits_scaling"], "logit_scale_by_division": True},
    lambda fields: {"logits_scaling": 1.0 / fields["logit_scale"]},
    kept=("logits_scaling",),
)

FAMILIES = (
    Family(
        model_type="granite",
        config=(*SHARED, *LLAMA_BLOCK, UNDECLARED_HEAD_DIM, DIVIDED_LOGITS),
        weights=LLAMA_WEIGHTS,
    ),
    Family(
        model_type="granite_swa",
        config=(
            *SHARED, *LLAMA_BLOCK, UNDECLARED_HEAD_DIM, DIVIDED_LOGITS, LayerTypes(window=128),
            Fixed(attention_sinks=True, initializer_sinks="zero"),
            Computed(
                ("layer_rope_theta",),
                lambda native: {"layer_rope_theta": list(native["layer_rope_theta"])},
                layer_rope_theta,
            ),
        ),
        weights=(
            *LLAMA_WEIGHTS,
            Rule("model.layers.{layer}.self_attn.sinks", "model.layers.{layer}.self_attn.sinks"),
        ),
    ),
    Family(
        model_type="hyperclovax",
        config=(
            *SHARED, HEAD_DIM, Renamed("logits_scaling", "logit_scale"),
            Fixed(norm_type="rmsnorm", norm_casting_mode="llama", ffn_type="glu"),
            Mapped("use_post_norm", "norm_placement", {True: "sandwich", False: "pre"}),
        ),
        weights=(
            *LLAMA_WEIGHTS,
            *layer_norms(self_attn_branch_norm="post_norm1", mlp_branch_norm="post_norm2"),
        ),
    ),
)  # fmt: skip
