"""nanochat: norms without weights, also after the embedding and, on queries and keys, after a reversed rotation."""

from ..config_map import Fixed, Same
from ..family import Family
from ..rules import Rule
from ._common import (
    ATTENTION,
    DROPOUT,
    EMBEDDINGS_AND_HEAD,
    KV_HEADS,
    ONE_ATTENTION_BIAS,
    RMS_EPS,
    SIZES,
    UNDECLARED_HEAD_DIM,
    UNGATED_BLOCK,
    WHOLE_ROPE,
)


FAMILIES = (
    Family(
        model_type="nanochat",
        config=(
            SIZES, KV_HEADS, UNDECLARED_HEAD_DIM, RMS_EPS, DROPOUT, *UNGATED_BLOCK, WHOLE_ROPE, ONE_ATTENTION_BIAS,
            Same("hidden_act", "final_logit_softcapping"),
            Fixed(
                norm_affine=False, embedding_norm=True, rope_reversed=True, qk_norm="head", qk_norm_after_rope=True,
                initializer_scheme="depth_scaled_attention",
            ),
        ),
        weights=(
            *EMBEDDINGS_AND_HEAD, *ATTENTION,
            Rule("model.layers.{layer}.mlp.fc1.weight", "model.layers.{layer}.mlp.up_proj.weight"),
            Rule("model.layers.{layer}.mlp.fc2.weight", "model.layers.{layer}.mlp.down_proj.weight"),
            Rule("model.layers.{layer}.mlp.activation_fn.weight", "model.layers.{layer}.mlp.act_fn.weight"),
        ),
    ),
)  # fmt: skip
