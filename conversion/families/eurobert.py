"""EuroBERT: Llama with a bidirectional mask and three ways to classify a sequence."""

from ..config_map import Computed, Fixed, Irrelevant, Mapped, Same
from ..family import Family
from ..rules import Rule
from ._common import (
    DROPOUT,
    HEAD_DIM,
    KV_HEADS,
    LLAMA_BLOCK,
    LLAMA_WEIGHTS,
    ONE_ATTENTION_BIAS,
    RMS_EPS,
    SIZES,
    WHOLE_ROPE,
)
from .bert import CLASSIFIER


FAMILIES = (
    Family(
        model_type="eurobert",
        primary="masked_lm",
        config=(
            SIZES, KV_HEADS, HEAD_DIM, RMS_EPS, DROPOUT, *LLAMA_BLOCK, WHOLE_ROPE,
            Fixed(is_causal=False, token_classifier_dropout=0.0),
            Same("hidden_act", "mlp_bias"), ONE_ATTENTION_BIAS,
            # The FFN's flag is the LM head's as well.
            Computed((), lambda native: {"lm_head_bias": native["mlp_bias"]}, lambda fields: {}),
            Mapped(
                "classifier_pooling",
                "classifier_pooling",
                {"bos": "first", "mean": "mean_in_float32", "late": "mean_of_logits"},
            ),
            Fixed(classifier_transform=True, classifier_transform_act="gelu"),
            Irrelevant("hidden_dropout", "a key of the original code, which the class does not read"),
        ),
        weights=LLAMA_WEIGHTS,
        head_weights={
            "sequence_classification": (Rule("dense.{leaf}", "pre_classifier.dense.{leaf}"), *CLASSIFIER),
            "token_classification": CLASSIFIER,
        },
    ),
)  # fmt: skip
