"""mBART, PLBart, MVP and BlenderBot: BART with its norms elsewhere, or with other labels, attention and offsets."""

from ..config_map import Fixed, Irrelevant, OnBothStacks, OnStack, Required
from ..family import Family
from ..rules import Rule
from .bart import (
    CLAMP,
    CLAMP_INFINITE,
    CLASSIFIERS,
    COMMON,
    DECODER_START,
    EMBEDDING_NORMS,
    EMBEDDINGS_AND_HEAD,
    FROM_SOURCE,
    HEADS,
    POSITIONS,
    SCALED_EMBEDDING,
    SHARED_TABLE,
    STACK_WEIGHTS,
    layer_norms,
    with_decoder,
)


_ALL_OF_THEM = (*COMMON, SHARED_TABLE, Fixed(final_logits_bias=True))
_NO_CACHE = Fixed(labels_disable_cache=True)
_WEIGHTS = (*EMBEDDINGS_AND_HEAD, *POSITIONS, *STACK_WEIGHTS)
FINAL_NORMS = tuple(
    Rule(f"model.{stack}.layer_norm.{{leaf}}", f"model.{stack}.norm.{{leaf}}") for stack in ("encoder", "decoder")
)

FAMILIES = tuple(map(with_decoder, (
    Family(
        model_type="mbart",
        primary="seq2seq_lm",
        config=(
            *_ALL_OF_THEM, CLASSIFIERS, CLAMP, FROM_SOURCE, DECODER_START, _NO_CACHE,
            OnBothStacks(
                Fixed(
                    norm_placement="pre", embedding_norm=True, position_embedding_type="learned", position_offset=2,
                )
            ),
            # Labels end in the code of their language, which the decoder begins with.
            Fixed(label_shift="last_token"),
        ),
        weights=(*_WEIGHTS, *EMBEDDING_NORMS, *layer_norms("pre_norm"), *FINAL_NORMS),
        head_weights=HEADS,
    ),
    Family(
        model_type="plbart",
        primary="seq2seq_lm",
        config=(
            *_ALL_OF_THEM, CLASSIFIERS, CLAMP_INFINITE, FROM_SOURCE,
            OnBothStacks(
                Fixed(
                    norm_placement="post", embedding_norm=True, position_embedding_type="learned", position_offset=2,
                )
            ),
            Fixed(label_shift="last_token"),
        ),
        weights=(*_WEIGHTS, *EMBEDDING_NORMS, *layer_norms("post_norm")),
        head_weights=HEADS,
    ),
    Family(
        model_type="mvp",
        primary="seq2seq_lm",
        config=(
            *_ALL_OF_THEM, CLASSIFIERS, CLAMP_INFINITE, FROM_SOURCE, DECODER_START, _NO_CACHE,
            OnBothStacks(
                Fixed(
                    norm_placement="post", embedding_norm=True, position_embedding_type="learned", position_offset=2,
                    scale_query=True, attention_score_form="batched",
                )
            ),
            Required("use_prompt", False, reason="learned prompts in front of the keys are not part of the model"),
            Irrelevant("prompt_length", "read with `use_prompt` only"),
            Irrelevant("prompt_mid_dim", "read with `use_prompt` only"),
        ),
        weights=(*_WEIGHTS, *EMBEDDING_NORMS, *layer_norms("post_norm")),
        head_weights=HEADS,
    ),
    Family(
        model_type="blenderbot",
        primary="seq2seq_lm",
        config=(
            *_ALL_OF_THEM, CLAMP, DECODER_START, _NO_CACHE,
            OnBothStacks(Fixed(norm_placement="pre", position_embedding_type="learned")),
        ),
        weights=(*_WEIGHTS, *layer_norms("pre_norm"), *FINAL_NORMS),
    ),
    Family(
        model_type="blenderbot-small",
        primary="seq2seq_lm",
        config=(
            *_ALL_OF_THEM, CLAMP_INFINITE, DECODER_START, _NO_CACHE,
            OnBothStacks(Fixed(norm_placement="post", embedding_norm=True, position_embedding_type="learned")),
            # The class scales the encoder's embedding only.
            OnStack("encoder", SCALED_EMBEDDING),
            OnStack("decoder", Fixed(embedding_norm_position="before_positions", embedding_multiplier=1.0)),
        ),
        weights=(
            *_WEIGHTS, *EMBEDDING_NORMS, *layer_norms("post_norm"),
            Rule("model.decoder.layernorm_embedding.{leaf}", "model.decoder.token_norm.{leaf}"),
        ),
    ),
)))  # fmt: skip
