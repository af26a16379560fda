"""BertGeneration: BERT without token types, with nothing between the last block and the LM head."""

from ..config_map import Fixed, Renamed, Same
from ..family import Family
from ..rules import Rule
from ._common import ALL_BIASES, SIZES
from .bert import (
    CHUNKED_FFN,
    ENCODER_BLOCK,
    HIDDEN_DROPOUT,
    LEARNED_POSITIONS,
    NO_CROSS_ATTENTION,
    NO_DECODER,
    POST_NORM,
    TIED_BIAS,
    attention,
    embeddings,
    post_norms,
    with_decoder,
)


FAMILIES = (
    with_decoder(
        Family(
            model_type="bert-generation",
            config=(
                SIZES, Renamed("layer_norm_eps", "norm_eps"), Same("hidden_act"), HIDDEN_DROPOUT,
                Renamed("attention_probs_dropout_prob", "attention_dropout"), LEARNED_POSITIONS, CHUNKED_FFN,
                ALL_BIASES, ENCODER_BLOCK, POST_NORM, TIED_BIAS, NO_DECODER, NO_CROSS_ATTENTION, Fixed(lm_head_bias=True),
            ),
            weights=(
                *embeddings("bert"),
                *attention("bert"),
                *post_norms("bert"),
                Rule("lm_head.decoder.weight", "lm_head.weight"),
                Rule("lm_head.bias", "lm_head.bias"),
                Rule(("lm_head.decoder.bias", "lm_head.bias"), ("lm_head.bias", "lm_head.unread_bias")),
            ),
        )
    ),
)  # fmt: skip
