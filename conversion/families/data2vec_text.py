"""data2vec's text encoder: RoBERTa's stack and heads under other names."""

from ..family import Family
from .bert import POST_NORM, attention, embeddings, pooler, post_norms, with_decoder
from .roberta import ROBERTA, ROBERTA_HEADS, ROBERTA_LM_HEAD


FAMILIES = (
    with_decoder(
        Family(
            model_type="data2vec-text",
            primary="masked_lm",
            config=(*ROBERTA, POST_NORM),
            weights=(
                *embeddings("data2vec_text"),
                *attention("data2vec_text"),
                *post_norms("data2vec_text"),
                *ROBERTA_LM_HEAD,
            ),
            base_weights=pooler("data2vec_text"),
            head_weights=ROBERTA_HEADS,
        )
    ),
)
