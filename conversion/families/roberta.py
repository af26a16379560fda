"""RoBERTa, CamemBERT and XLM-RoBERTa: BERT whose positions are counted over the tokens that are not padding."""

from ..config_map import Entry, Fixed
from ..family import Family
from .bert import (
    CHOICE_DROPOUT,
    CLASSIFIERS,
    COMMON,
    DENSE_CLASSIFIER,
    POST_NORM,
    TIED_BIAS,
    attention,
    embeddings,
    lm_head,
    pooler,
    post_norms,
    with_decoder,
)


# What sets them apart from BERT, wherever their norms are.
ROBERTA: tuple[Entry, ...] = (
    *COMMON, TIED_BIAS, Fixed(position_ids_source="input_ids", lm_head_transform_act="gelu"),
    Fixed(pooler=True, pooler_scope="base_and_choices", classifier_transform=True, classifier_transform_act="tanh"),
    CHOICE_DROPOUT, Fixed(choice_transform=False),
)  # fmt: skip
ROBERTA_LM_HEAD = lm_head("lm_head", "lm_head.dense", "lm_head.layer_norm")
ROBERTA_HEADS = {**CLASSIFIERS, "sequence_classification": DENSE_CLASSIFIER}


FAMILIES = tuple(
    with_decoder(
        Family(
            model_type=model_type,
            primary="masked_lm",
            config=(*ROBERTA, POST_NORM),
            weights=(
                *embeddings("roberta"),
                *attention("roberta"),
                *post_norms("roberta"),
                *ROBERTA_LM_HEAD,
            ),
            base_weights=pooler("roberta"),
            head_weights=ROBERTA_HEADS,
        )
    )
    for model_type in ("roberta", "camembert", "xlm-roberta")
)
