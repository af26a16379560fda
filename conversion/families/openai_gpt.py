"""The first GPT: post-norm blocks, learned positions and Conv1D projections, with scores divided by the root of d."""

from ..config_map import Fixed, Mapped
from ..family import Family
from ..rules import Rule, Transpose
from ._common import (
    ALL_BIASES,
    FUSED_GRADIENT,
    FUSED_PRODUCT,
    GPT2_NAMES,
    LAYERNORM_BLOCK,
    NO_PADDING_ROW,
    QKV_IN_COLUMNS,
    TRANSPOSED_PRODUCT,
    fourfold_ffn,
    fused_qkv,
)


LAYER, OURS = "transformer.h.{layer}.", "model.layers.{layer}."

FAMILIES = (
    Family(
        model_type="openai-gpt",
        config=(
            *GPT2_NAMES,
            # The class has a table of its own, in which "gelu" is the approximation.
            Mapped("afn", "hidden_act", {"gelu": "gelu_new", "relu": "relu", "silu": "silu", "swish": "swish"}),
            LAYERNORM_BLOCK, ALL_BIASES, NO_PADDING_ROW, fourfold_ffn("n_embd"),
            Fixed(
                norm_placement="post", final_norm=False, position_embedding_type="learned",
                attention_score_form="divided", attention_softmax_in_float32=False,
            ),
        ),
        weights=(
            Rule("transformer.tokens_embed.weight", "model.embed_tokens.weight"),
            Rule("transformer.positions_embed.weight", "model.embed_positions.weight"),
            fused_qkv(LAYER + "attn.c_attn", QKV_IN_COLUMNS),
            Rule(LAYER + "attn.c_proj.{leaf}", OURS + "self_attn.o_proj.{leaf}", Transpose()),
            Rule(LAYER + "ln_1.{leaf}", OURS + "self_attn_post_norm.{leaf}"),
            Rule(LAYER + "mlp.c_fc.{leaf}", OURS + "mlp.up_proj.{leaf}", Transpose()),
            Rule(LAYER + "mlp.c_proj.{leaf}", OURS + "mlp.down_proj.{leaf}", Transpose()),
            Rule(LAYER + "ln_2.{leaf}", OURS + "mlp_post_norm.{leaf}"),
            Rule("lm_head.weight", "lm_head.weight"),
        ),
        deviations=(FUSED_GRADIENT, FUSED_PRODUCT, TRANSPOSED_PRODUCT),
    ),
)  # fmt: skip
