"""ModernBERT: its decoder's blocks with a bidirectional mask, fused projections, and a dense head before every head."""

from collections.abc import Mapping
from typing import Any

from ..config_map import Computed, Fields, Fixed, Irrelevant, Mapped
from ..errors import ConversionError
from ..family import Family
from ..rules import Rule
from ._common import FUSED_GRADIENT, FUSED_PRODUCT, QKV_IN_BLOCKS, fused_qkv
from .modernbert_decoder import COMMON, COMMON_WEIGHTS, LAYER, prediction_head


def _prediction_head(native: Mapping[str, Any]) -> Fields:
    bias, act = native["classifier_bias"], native["classifier_activation"]
    return {
        "lm_head_transform_bias": bias, "lm_head_transform_act": act,
        "classifier_transform": True, "classifier_transform_bias": bias, "classifier_transform_act": act,
        "classifier_transform_norm": True, "classifier_transform_on_tokens": True, "classifier_transform_dropout": False,
    }  # fmt: skip


def _window(native: Mapping[str, Any]) -> Fields:
    # `local_attention` counts both sides.
    window = native["local_attention"] // 2
    if window < 1 and "sliding_attention" in native["layer_types"]:
        raise ConversionError(
            f"`local_attention` is {native['local_attention']}, so that tokens of the sliding layers see none but "
            "themselves. At least 2 is supported."
        )
    return {"layer_types": native["layer_types"], "sliding_window": window if window >= 1 else None}


def _choice_pooling(native: Mapping[str, Any]) -> Fields:
    # The model that chooses looks for the first token; the classifier of sequences takes it to stand first.
    return {"choice_pooling": {"cls": "first_real"}.get(native["classifier_pooling"], native["classifier_pooling"])}


def classifier(score: str) -> tuple[Rule, ...]:
    """The dense head and the classifier, which is called `score` here."""
    return (
        Rule("head.dense.{leaf}", "pre_classifier.dense.{leaf}"),
        Rule("head.norm.{leaf}", "pre_classifier.norm.{leaf}"),
        Rule("classifier.{leaf}", score + ".{leaf}"),
    )


FAMILIES = (
    Family(
        model_type="modernbert",
        primary="masked_lm",
        config=(
            *COMMON,
            Fixed(is_causal=False),
            prediction_head(_prediction_head),
            Mapped("classifier_pooling", "classifier_pooling", {"cls": "first", "mean": "mean"}),
            Computed((), _choice_pooling, lambda fields: {}),
            Computed(
                ("layer_types", "local_attention"),
                _window,
                lambda fields: {
                    "layer_types": fields["layer_types"],
                    "local_attention": 2 * (fields["sliding_window"] or 0),
                },
                kept=("local_attention",),
            ),
            Irrelevant("sparse_prediction", "leaves out logits that no label is compared with"),
            Irrelevant("sparse_pred_ignore_index", "read only with labels and `sparse_prediction`"),
            Irrelevant("deterministic_flash_attn", "the order of sums in one kernel's gradients"),
            Irrelevant("position_embedding_type", "a key of the original code, which the class does not read"),
        ),
        weights=(
            *COMMON_WEIGHTS,
            fused_qkv(LAYER + "attn.Wqkv", QKV_IN_BLOCKS),
            Rule("head.dense.{leaf}", "lm_head_transform.dense.{leaf}"),
            Rule("head.norm.{leaf}", "lm_head_transform.norm.{leaf}"),
        ),
        head_weights={
            **dict.fromkeys(
                ("sequence_classification", "token_classification", "multiple_choice"), classifier("score")
            ),
            "question_answering": classifier("qa_outputs"),
        },
        deviations=(FUSED_PRODUCT, FUSED_GRADIENT),
    ),
)  # fmt: skip
