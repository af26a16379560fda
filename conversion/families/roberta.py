"""RoBERTa, CamemBERT and XLM-RoBERTa: BERT whose positions are counted over the tokens that are not padding."""

from ..config_map import Fixed, PerHead
from ..family import Family
from .bert import (
    CLASSIFIER,
    COMMON,
    DENSE_CLASSIFIER,
    POST_NORM,
    TIED_BIAS,
    attention,
    embeddings,
    lm_head,
    pooler,
    post_norms,
    unread_pooler,
)


FAMILIES = tuple(
    Family(
        model_type=model_type,
        primary="masked_lm",
        config=(
            *COMMON, POST_NORM, TIED_BIAS,
            Fixed(position_ids_source="input_ids", lm_head_transform_act="gelu"),
            PerHead(
                base={"pooler": True},
                sequence_classification={"classifier_transform": True, "classifier_transform_act": "tanh"},
            ),
        ),
        weights=(
            *embeddings("roberta"),
            *attention("roberta"),
            *post_norms("roberta"),
            *lm_head("lm_head", "lm_head.dense", "lm_head.layer_norm"),
            unread_pooler("roberta"),
        ),
        base_weights=pooler("roberta"),
        head_weights={"sequence_classification": DENSE_CLASSIFIER, "token_classification": CLASSIFIER},
    )
    for model_type in ("roberta", "camembert", "xlm-roberta")
)  # fmt: skip
