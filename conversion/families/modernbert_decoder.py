"""ModernBERT's decoder: gated GELU, local and global rotary layers, no norm before the first attention, dense head."""

from collections.abc import Callable, Mapping
from typing import Any

from ..config_map import (
    Computed,
    Entry,
    Fields,
    Fixed,
    Irrelevant,
    NestedRopeParameters,
    Renamed,
    Same,
)
from ..family import Family
from ..rules import Rule
from ._common import FUSED_GRADIENT, ONE_ATTENTION_BIAS, fused_gate_up


LAYER = "model.layers.{layer}."


def _prediction_head(native):
    """The same dense head stands before the LM head and before a classifier."""
    bias, act = native["classifier_bias"], native["classifier_activation"]
    return {
        "lm_head_transform_bias": bias, "lm_head_transform_act": act,
        "classifier_transform": True, "classifier_transform_bias": bias, "classifier_transform_act": act,
        "classifier_transform_norm": True, "classifier_transform_dropout": False, "classifier_bias": bias,
    }  # fmt: skip


# What the decoder and the encoder have in common.
COMMON: tuple[Entry, ...] = (
    Same(
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings", "norm_eps", "norm_bias", "embedding_dropout", "classifier_dropout",
    ),
    # Of the probabilities and, after the last projection, of the attention's output.
    Computed(
        ("attention_dropout",),
        lambda native: {
            "attention_dropout": native["attention_dropout"],
            "residual_dropout": native["attention_dropout"],
            "ffn_residual_dropout": False,
        },
        lambda fields: {"attention_dropout": fields["attention_dropout"]},
    ),
    Renamed("hidden_activation", "hidden_act"),
    Renamed("mlp_dropout", "activation_dropout"),
    Renamed("decoder_bias", "lm_head_bias"),
    ONE_ATTENTION_BIAS,
    Computed(
        ("mlp_bias",),
        lambda native: {"mlp_bias": native["mlp_bias"], "mlp_output_bias": native["mlp_bias"]},
        lambda fields: {"mlp_bias": fields["mlp_bias"]},
    ),
    Fixed(
        norm_type="layernorm", norm_casting_mode="none", norm_placement="pre", first_layer_pre_norm=False,
        ffn_type="glu", fused_gate_up=True, embedding_norm=True, lm_head_transform=True, rope_in_float32=True,
        initializer_scheme="depth_scaled_and_heads",
    ),
    NestedRopeParameters("full_attention", "sliding_attention"),
    Computed(
        ("initializer_cutoff_factor",),
        # The class's own default.
        lambda native: {"initializer_cutoff_factor": native["initializer_cutoff_factor"] or 3},
        lambda fields: {"initializer_cutoff_factor": fields["initializer_cutoff_factor"] or 2.0},
        kept=("initializer_cutoff_factor",),
    ),
)  # fmt: skip
COMMON_WEIGHTS = (
    Rule("model.embeddings.tok_embeddings.weight", "model.embed_tokens.weight"),
    Rule("model.embeddings.norm.{leaf}", "model.embedding_norm.{leaf}"),
    Rule(LAYER + "attn_norm.{leaf}", LAYER + "self_attn_pre_norm.{leaf}"),
    Rule(LAYER + "attn.Wo.{leaf}", LAYER + "self_attn.o_proj.{leaf}"),
    Rule(LAYER + "mlp_norm.{leaf}", LAYER + "mlp_pre_norm.{leaf}"),
    fused_gate_up(LAYER + "mlp.Wi"),
    Rule(LAYER + "mlp.Wo.{leaf}", LAYER + "mlp.down_proj.{leaf}"),
    Rule("model.final_norm.{leaf}", "model.norm.{leaf}"),
    Rule("decoder.{leaf}", "lm_head.{leaf}"),
)


def prediction_head(translate: Callable[[Mapping[str, Any]], Fields]) -> Computed:
    """The keys of the dense head, which stands before the LM head and before a classifier."""
    return Computed(
        ("classifier_bias", "classifier_activation"),
        translate,
        lambda fields: {
            "classifier_bias": fields["lm_head_transform_bias"],
            "classifier_activation": fields["lm_head_transform_act"],
        },
    )


FAMILIES = (
    Family(
        model_type="modernbert-decoder",
        config=(
            *COMMON,
            prediction_head(_prediction_head),
            Computed(
                ("layer_types", "sliding_window", "local_attention"),
                # -1 stands for no window.
                lambda native: {
                    "layer_types": native["layer_types"],
                    "sliding_window": native["sliding_window"] if native["sliding_window"] > 0 else None,
                },
                lambda fields: {
                    "layer_types": fields["layer_types"],
                    "sliding_window": fields["sliding_window"] or -1,
                    "local_attention": 2 * fields["sliding_window"] if fields["sliding_window"] else None,
                },
                kept=("local_attention",),
            ),
            Irrelevant("position_embedding_type", "a key of the encoder's config, which the class does not read"),
        ),
        weights=(
            *COMMON_WEIGHTS,
            *(
                Rule(f"{LAYER}attn.{name}_proj.{{leaf}}", f"{LAYER}self_attn.{name}_proj.{{leaf}}")
                for name in "qkv"
            ),
            Rule("lm_head.dense.{leaf}", "lm_head_transform.dense.{leaf}"),
            Rule("lm_head.norm.{leaf}", "lm_head_transform.norm.{leaf}"),
        ),
        head_weights={
            "sequence_classification": (
                Rule("head.dense.{leaf}", "pre_classifier.dense.{leaf}"),
                Rule("head.norm.{leaf}", "pre_classifier.norm.{leaf}"),
                Rule("classifier.{leaf}", "score.{leaf}"),
            )
        },
        deviations=(FUSED_GRADIENT,),
    ),
)  # fmt: skip
