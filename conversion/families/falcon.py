"""Falcon: one key/value head and a shared norm (7B), groups of heads and one or two norms (40B, 11B), or ALiBi (RW).

The stock class adds ALiBi twice in its eager attention; this is its sdpa, which adds it once.
"""

import math

from ..config_map import Computed, Fixed, Renamed, Same
from ..errors import ConversionError
from ..family import Family
from ..rules import Rule
from ._common import FUSED_GRADIENT, FUSED_PRODUCT, LAYERNORM_BLOCK, NO_PADDING_ROW, QKV_BY_HEAD, WHOLE_ROPE, fused_qkv


def _refuse(key, value, condition):
    raise ConversionError(f"`{key}` is {value!r} {condition}, which the native class cannot run.")


def _block(native):
    """Which of the three blocks: new_decoder_architecture decides what the other keys mean."""
    parallel, norms = bool(native["parallel_attn"]), native["num_ln_in_parallel_attn"]
    if native["new_decoder_architecture"]:
        norms = 2 if norms is None else norms
        if not parallel:
            _refuse("parallel_attn", parallel, "with `new_decoder_architecture`")
        if norms not in (1, 2):
            _refuse("num_ln_in_parallel_attn", norms, "with `new_decoder_architecture`")
        return {
            "parallel_block": "two_norms" if norms == 2 else "shared_norm",
            "num_key_value_heads": native["num_kv_heads"],
            "broadcast_key_value": False,
        }
    if parallel and norms == 2:
        _refuse("num_ln_in_parallel_attn", norms, "without `new_decoder_architecture`")
    heads = native["num_attention_heads"]
    if not native["multi_query"] and native["num_kv_heads"] != heads:
        _refuse("num_kv_heads", native["num_kv_heads"], f"with {heads} heads")
    return {
        "parallel_block": "shared_norm" if parallel else "none",
        "num_key_value_heads": 1 if native["multi_query"] else heads,
        "broadcast_key_value": bool(native["multi_query"]),
    }


def _native_block(fields):
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    two_norms = fields["parallel_block"] == "two_norms"
    if two_norms or 1 < kv_heads < heads or (kv_heads == 1 < heads and not fields["broadcast_key_value"]):
        return {
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 2 if two_norms else 1,
            "parallel_attn": fields["parallel_block"] != "none",
            "multi_query": True,
            "num_kv_heads": kv_heads,
        }
    return {
        "new_decoder_architecture": False,
        "num_ln_in_parallel_attn": None,
        "parallel_attn": fields["parallel_block"] != "none",
        "multi_query": fields["broadcast_key_value"],
        "num_kv_heads": heads,
    }


BLOCK_KEYS = ("new_decoder_architecture", "num_ln_in_parallel_attn", "parallel_attn", "multi_query", "num_kv_heads")
LAYER = "transformer.h.{layer}."
OUR_LAYER = "model.layers.{layer}."

FAMILIES = (
    Family(
        model_type="falcon",
        config=(
            Same("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
            # Only scores with ALiBi are dropped, and with it the branch of an attention before the FFN.
            Computed(
                ("attention_dropout",),
                lambda native: {
                    "attention_dropout": native["attention_dropout"] if native["alibi"] else 0.0,
                    "attention_residual_dropout": float(native["attention_dropout"]),
                },
                lambda fields: {"attention_dropout": fields["attention_residual_dropout"]},
                kept=("attention_dropout",),
            ),
            Renamed("hidden_dropout", "residual_dropout"),
            Renamed("ffn_hidden_size", "intermediate_size"),
            Renamed("layer_norm_epsilon", "norm_eps"),
            Renamed("activation", "hidden_act"),
            WHOLE_ROPE, LAYERNORM_BLOCK, NO_PADDING_ROW,
            Computed(BLOCK_KEYS, _block, _native_block, kept=BLOCK_KEYS),
            Computed(
                ("bias",),
                lambda native: dict.fromkeys(
                    ("attention_bias", "attention_output_bias", "mlp_bias", "mlp_output_bias", "unfused_bias"),
                    bool(native["bias"]),
                ),
                lambda fields: {"bias": fields["attention_bias"]},
            ),
            Computed(
                ("alibi",),
                lambda native: {
                    "position_embedding_type": "alibi" if native["alibi"] else "rope",
                    "alibi_divisor": math.sqrt(native["hidden_size"] // native["num_attention_heads"]),
                    "attention_scores_in_float32": bool(native["alibi"]),
                },
                lambda fields: {"alibi": fields["position_embedding_type"] == "alibi"},
            ),
            Fixed(
                alibi_form="key_position", alibi_slopes_in_bfloat16=True, attention_score_form="divided",
                attention_softmax_in_float32=False, dropout_after_sum=True,
            ),
        ),
        weights=(
            Rule("transformer.word_embeddings.weight", "model.embed_tokens.weight"),
            fused_qkv(LAYER + "self_attention.query_key_value", QKV_BY_HEAD),
            Rule(LAYER + "self_attention.dense.{leaf}", OUR_LAYER + "self_attn.o_proj.{leaf}"),
            Rule(LAYER + "mlp.dense_h_to_4h.{leaf}", OUR_LAYER + "mlp.up_proj.{leaf}"),
            Rule(LAYER + "mlp.dense_4h_to_h.{leaf}", OUR_LAYER + "mlp.down_proj.{leaf}"),
            Rule(LAYER + "input_layernorm.{leaf}", OUR_LAYER + "self_attn_pre_norm.{leaf}"),
            Rule(LAYER + "post_attention_layernorm.{leaf}", OUR_LAYER + "mlp_pre_norm.{leaf}"),
            Rule(LAYER + "ln_attn.{leaf}", OUR_LAYER + "self_attn_pre_norm.{leaf}"),
            Rule(LAYER + "ln_mlp.{leaf}", OUR_LAYER + "mlp_pre_norm.{leaf}"),
            Rule("transformer.ln_f.{leaf}", "model.norm.{leaf}"),
            Rule("lm_head.{leaf}", "lm_head.{leaf}"),
        ),
        deviations=(FUSED_PRODUCT, FUSED_GRADIENT),
        head_weights={"token_classification": (Rule("classifier.{leaf}", "score.{leaf}"),)},
    ),
)  # fmt: skip
