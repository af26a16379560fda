"""ELECTRA: BERT with narrow embeddings, projected after their norm; the generator has the LM head."""

from ..config_map import Fixed, Same
from ..family import Family
from ..rules import Rule
from .bert import CLASSIFIER, COMMON, DENSE_CLASSIFIER, POST_NORM, attention, embeddings, post_norms, with_decoder


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
        head_weights={"sequence_classification": DENSE_CLASSIFIER, "token_classification": CLASSIFIER},
    )),
)  # fmt: skip
