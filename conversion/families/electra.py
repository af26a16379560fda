"""ELECTRA: BERT with narrow embeddings, projected after their norm; the generator has the LM head."""

from collections.abc import Mapping
from typing import Any

from transformers.activations import ACT2FN

from ..config_map import HEAD_KEY, Computed, Fields, Fixed, Same
from ..errors import ConversionError
from ..family import Family
from ..rules import Rule
from .bert import (
    CLASSIFIER,
    CLASSIFIERS,
    COMMON,
    DENSE_CLASSIFIER,
    POST_NORM,
    attention,
    embeddings,
    post_norms,
    with_decoder,
)


SUMMARY = ("summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout")
# Without an index, which the class never gives, the last token is taken for the one that classifies.
SUMMARIES = {
    "first": "first", "last": "last_position", "mean": "mean_of_positions", "cls_index": "last_position",
}  # fmt: skip


def _summary(native: Mapping[str, Any]) -> Fields:
    """Of keys that the model which chooses among sequences reads, and no other."""
    kind, projects = native["summary_type"], native["summary_use_proj"]
    act = native["summary_activation"] or "linear"
    if native[HEAD_KEY] == "multiple_choice" and (
        kind not in SUMMARIES or act not in ACT2FN or (act != "linear" and not projects)
    ):
        raise ConversionError(
            f"`summary_type` is {kind!r}, `summary_use_proj` {projects} and `summary_activation` {act!r}. Supported are "
            f"the types {', '.join(SUMMARIES)}, and an activation behind the projection alone."
        )
    return {
        "choice_pooling": SUMMARIES.get(kind),
        "choice_transform": bool(projects),
        "choice_transform_act": act if act in ACT2FN else "linear",
        "choice_dropout": native["summary_last_dropout"],
        "choice_transform_dropout": False,
    }


def _summary_of(fields: Mapping[str, Any]) -> Fields:
    kinds = {ours: kind for kind, ours in reversed(SUMMARIES.items())}
    return {
        "summary_type": kinds.get(fields["choice_pooling"], "first"),
        "summary_use_proj": fields["choice_transform"],
        "summary_activation": fields["choice_transform_act"] if fields["choice_transform"] else "linear",
        "summary_last_dropout": fields["choice_dropout"],
    }


FAMILIES = (
    with_decoder(Family(
        model_type="electra",
        primary="masked_lm",
        config=(
            *COMMON, POST_NORM, Same("embedding_size"),
            Fixed(
                embedding_projection_bias=True,
                embedding_projection_position="after_norm",
                lm_head_transform_act="gelu",
            ),
            Fixed(classifier_transform=True, classifier_transform_act="gelu"),
            Computed(SUMMARY, _summary, _summary_of, kept=SUMMARY),
        ),
        weights=(
            *embeddings("electra"),
            *attention("electra"),
            *post_norms("electra"),
            Rule("electra.embeddings_project.{leaf}", "model.embedding_projection.{leaf}"),
            Rule("generator_predictions.dense.{leaf}", "lm_head_transform.dense.{leaf}"),
            Rule("generator_predictions.LayerNorm.{leaf}", "lm_head_transform.norm.{leaf}"),
            Rule("generator_lm_head.{leaf}", "lm_head.{leaf}"),
        ),
        head_weights={
            **CLASSIFIERS,
            "sequence_classification": DENSE_CLASSIFIER,
            "multiple_choice": (
                Rule("sequence_summary.summary.{leaf}", "pre_classifier.dense.{leaf}"), *CLASSIFIER,
            ),
        },
    )),
)  # fmt: skip
