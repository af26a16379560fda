"""RoBERTa with norms before the sublayers, and BERT with rotary positions and a gated FFN."""

import random

from tests.parity import Row

from .encoders import HEADS, bert
from .llama import rope


def _rotary(rng: random.Random, **overrides):
    config = bert(rng, **overrides)
    config["rope_parameters"] = rope(rng, config.get("head_dim") or 32 // config["num_attention_heads"])
    return config


def nomic_bert(rng: random.Random):
    config = _rotary(rng, head_dim=rng.choice((None, 8, 16)))
    # The class declares no such key, and ties the head where it is absent.
    if rng.random() < 0.4:
        del config["tie_word_embeddings"]
    return config


def gte(rng: random.Random):
    # An undeclared key, which the class reads all the same.
    head_dim = {"head_dim": rng.choice((8, 16))} if rng.random() < 0.4 else {}
    return _rotary(rng, type_vocab_size=rng.choice((0, 1, 2)), pad_token_id=rng.choice((None, 0, 5)), **head_dim)


def jina_embeddings_v3(rng: random.Random):
    config = _rotary(rng)
    del config["chunk_size_feed_forward"]
    return config


def roformer(rng: random.Random):
    config = bert(
        rng,
        embedding_size=rng.choice((None, 16, 24, 32, 40)),
        rotary_value=rng.random() < 0.5,
        pad_token_id=rng.choice((None, 0, 5)),
    )
    del config["classifier_dropout"]
    return config


# Neither has a head for question answering.
ROTARY_HEADS = ("base", "sequence_classification", "token_classification")

ROWS = (
    Row("roberta-prelayernorm", bert, heads=HEADS),
    Row("xlm-roberta-xl", bert, heads=HEADS),
    # The class has eager attention only.
    Row("roformer", roformer, heads=HEADS, backends=("eager",)),
    Row("jina_embeddings_v3", jina_embeddings_v3, heads=HEADS),
    Row("nomic_bert", nomic_bert, heads=ROTARY_HEADS),
    Row("gte", gte, heads=ROTARY_HEADS),
)
