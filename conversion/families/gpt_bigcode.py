"""GPT-BigCode (StarCoder 1, SantaCoder): GPT-2 with plain linear layers, and one key/value head or all of them."""

from ..config_map import Computed, Fixed, Irrelevant, Required
from ..family import Family
from ..rules import Identity, Op, Rule
from ._common import (
    ALL_BIASES,
    FUSED_GRADIENT,
    FUSED_PRODUCT,
    GPT2_FFN,
    GPT2_NAMES,
    LAYERNORM_BLOCK,
    NO_PADDING_ROW,
    QKV_BY_HEAD,
    QKV_IN_BLOCKS,
    fused_qkv,
    gpt2_weights,
)


class QkvOfEither(Op):
    """[q k v] with one key/value head, interleaved by head otherwise."""

    @staticmethod
    def _op(config) -> Op:
        return QKV_IN_BLOCKS if config.num_key_value_heads == 1 else QKV_BY_HEAD

    def forward(self, tensors, config):
        return self._op(config).forward(tensors, config)

    def backward(self, tensors, config):
        return self._op(config).backward(tensors, config)


FAMILIES = (
    Family(
        model_type="gpt_bigcode",
        config=(
            *GPT2_NAMES, *GPT2_FFN,
            Computed(
                ("scale_attn_weights",),
                lambda native: {"attention_scaling": None if native["scale_attn_weights"] else 1.0},
                lambda fields: {"scale_attn_weights": fields["attention_scaling"] != 1.0},
            ),
            Computed(
                ("multi_query", "num_key_value_heads"),
                lambda native: {"num_key_value_heads": 1 if native["multi_query"] else native["n_head"]},
                lambda fields: {"multi_query": fields["num_key_value_heads"] == 1},
                # With one head, both are the same model in the same layout.
                kept=("multi_query",),
            ),
            LAYERNORM_BLOCK, ALL_BIASES, NO_PADDING_ROW,
            Fixed(position_embedding_type="learned", initializer_scheme="depth_scaled"),
            Required("add_cross_attention", False, reason="a decoder inside an encoder-decoder does not stand alone"),
            Irrelevant("attention_softmax_in_fp32", "the class always computes the softmax in float32"),
            Irrelevant("scale_attention_softmax_in_fp32", "the class always scales before the softmax"),
        ),
        weights=(
            *gpt2_weights(Identity()),
            fused_qkv("transformer.h.{layer}.attn.c_attn", QkvOfEither()),
            Rule("transformer.h.{layer}.attn.c_proj.{leaf}", "model.layers.{layer}.self_attn.o_proj.{leaf}"),
        ),
        head_weights={"token_classification": (Rule("classifier.{leaf}", "score.{leaf}"),)},
        deviations=(FUSED_PRODUCT, FUSED_GRADIENT,),
    ),
)  # fmt: skip
