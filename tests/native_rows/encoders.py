"""BERT and its relatives."""

import random

from tests.parity import Row


HEADS = ("base", "sequence_classification", "token_classification", "question_answering")


def bert(rng: random.Random, **overrides):
    """Options that BERT, RoBERTa, ELECTRA and ERNIE share."""
    return {
        "vocab_size": 71,
        "hidden_size": 32,
        "intermediate_size": rng.choice((40, 56)),
        "num_hidden_layers": rng.choice((2, 3)),
        "num_attention_heads": rng.choice((2, 4)),
        "max_position_embeddings": 64,
        "type_vocab_size": rng.choice((1, 2, 4)),
        "hidden_act": rng.choice(("gelu", "relu", "silu", "gelu_new")),
        "layer_norm_eps": rng.choice((1e-12, 1e-5)),
        "hidden_dropout_prob": rng.choice((0.0, 0.1)),
        "attention_probs_dropout_prob": rng.choice((0.0, 0.2)),
        "classifier_dropout": rng.choice((None, 0.0, 0.3)),
        "initializer_range": rng.choice((0.02, 0.1)),
        "chunk_size_feed_forward": rng.choice((0, 0, 1, 4)),
        "tie_word_embeddings": rng.random() < 0.5,
        "pad_token_id": rng.choice((0, 5)),
        **overrides,
    }


def bert_without_padding(rng: random.Random):
    """As BERT, also without a padding token, which RoBERTa's positions need."""
    return bert(rng, pad_token_id=rng.choice((None, 0, 5)))


def ernie(rng: random.Random):
    return bert(rng, use_task_id=rng.random() < 0.6, task_type_vocab_size=rng.choice((2, 3)))


def megatron_bert(rng: random.Random):
    config = bert(rng)
    del config["classifier_dropout"]
    return config


def electra(rng: random.Random):
    return bert(rng, embedding_size=rng.choice((16, 24, 32, 40)), summary_type=rng.choice(("first", "mean")))


def bert_generation(rng: random.Random):
    # The class generates, and fails on lengths that are no multiples of a chunk.
    config = bert(rng, pad_token_id=rng.choice((None, 0, 5)), chunk_size_feed_forward=rng.choice((0, 1)))
    del config["classifier_dropout"], config["type_vocab_size"]
    return config


def distilbert(rng: random.Random):
    return {
        "vocab_size": 71,
        "dim": 32,
        "hidden_dim": rng.choice((40, 56)),
        "n_layers": rng.choice((2, 3)),
        "n_heads": rng.choice((2, 4)),
        "max_position_embeddings": 64,
        "activation": rng.choice(("gelu", "relu", "silu")),
        "dropout": rng.choice((0.0, 0.1)),
        "attention_dropout": rng.choice((0.0, 0.2)),
        "qa_dropout": rng.choice((0.0, 0.1, 0.3)),
        "seq_classif_dropout": rng.choice((0.0, 0.2)),
        "sinusoidal_pos_embds": rng.random() < 0.5,
        "chunk_size_feed_forward": rng.choice((0, 0, 1, 4)),
        "tie_word_embeddings": rng.random() < 0.5,
        "pad_token_id": rng.choice((None, 0, 5)),
    }


ROWS = (
    Row("bert", bert_without_padding, heads=HEADS),
    Row("bert-generation", bert_generation, heads=("base",)),
    Row("roberta", bert, heads=HEADS),
    Row("data2vec-text", bert, heads=HEADS),
    Row("camembert", bert, heads=HEADS),
    Row("xlm-roberta", bert, heads=HEADS),
    Row("distilbert", distilbert, heads=HEADS),
    Row("electra", electra, heads=HEADS),
    Row("ernie", ernie, heads=HEADS),
    # The class has eager attention only.
    Row("megatron-bert", megatron_bert, heads=HEADS, backends=("eager",)),
)
