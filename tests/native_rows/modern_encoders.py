"""Encoders with rotary positions: ModernBERT and EuroBERT."""

import random

from tests.native_rows.gpt_and_alibi import modernbert_decoder
from tests.native_rows.llama import llama
from tests.parity import Row


def modernbert(rng: random.Random):
    """The decoder's options and the encoder's own."""
    return modernbert_decoder(rng) | {
        "pad_token_id": rng.choice((None, 0, 5)),
        "classifier_pooling": rng.choice(("cls", "mean")),
        "classifier_dropout": rng.choice((0.0, 0.1)),
        "attention_dropout": rng.choice((0.0, 0.1)),
        "sparse_prediction": rng.random() < 0.3,
        "deterministic_flash_attn": rng.random() < 0.3,
        "local_attention": rng.choice((2, 6, 15, 32, 128)),
    }


def eurobert(rng: random.Random):
    return llama(rng) | {"classifier_pooling": rng.choice(("bos", "mean", "late"))}


CLASSIFIERS = ("base", "sequence_classification", "token_classification")
ROWS = (
    Row("modernbert", modernbert, seeds=8, heads=(*CLASSIFIERS, "question_answering")),
    Row("eurobert", eurobert, seeds=8, heads=CLASSIFIERS),
)
