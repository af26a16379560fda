"""Decoders with LayerNorm and learned, sinusoidal or ALiBi positions, and ModernBERT's decoder."""

import random

from tests.native_rows.llama import rope
from tests.native_rows.olmo import BROKEN_BY_TYPE
from tests.parity import Row


def tokens(rng: random.Random, pads: tuple = (None, 0, 5)):
    """The vocabulary and its special tokens."""
    return {
        "vocab_size": 71,
        "tie_word_embeddings": rng.random() < 0.5,
        "pad_token_id": rng.choice(pads),
        "bos_token_id": 1,
        "eos_token_id": rng.choice((2, [2, 3])),
    }


# More than eight heads, and no power of two, have slopes that are not exact in bfloat16.
ALIBI_HEADS = (2, 3, 5, 12, 16)


def width_and_heads(rng: random.Random, heads: tuple[int, ...] = (2, 3, 4), head_dims: tuple[int, ...] = (6, 8, 12)):
    """Heads in odd numbers too, and head widths whose root is no power of two."""
    num_heads = rng.choice(heads)
    return num_heads * rng.choice(head_dims), num_heads


def flip(rng: random.Random) -> bool:
    return rng.random() < 0.5


def opt(rng: random.Random):
    width, heads = width_and_heads(rng)
    return tokens(rng) | {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": 3,
        "ffn_dim": rng.choice((40, 56)),
        "max_position_embeddings": 64,
        "do_layer_norm_before": flip(rng),
        "_remove_final_layer_norm": rng.random() < 0.3,
        "word_embed_proj_dim": rng.choice((None, width, 20)),
        "activation_function": rng.choice(("relu", "gelu", "gelu_new")),
        "enable_bias": flip(rng),
        "layer_norm_elementwise_affine": flip(rng),
        "dropout": rng.choice((0.0, 0.1)),
        "attention_dropout": rng.choice((0.0, 0.2)),
        "layerdrop": rng.choice((0.0, 0.3)),
    }


def bloom(rng: random.Random):
    width, heads = width_and_heads(rng, heads=ALIBI_HEADS)
    slow = flip(rng)
    return tokens(rng) | {
        "hidden_size": width,
        "n_head": heads,
        "n_layer": 3,
        "layer_norm_epsilon": rng.choice((1e-5, 1e-3)),
        "apply_residual_connection_post_layernorm": flip(rng),
        "slow_but_exact": slow,
        "pretraining_tp": 1 if slow else rng.choice((1, 2)),
        "hidden_dropout": rng.choice((0.0, 0.1)),
        "attention_dropout": rng.choice((0.0, 0.2)),
    }


def mpt(rng: random.Random):
    width, heads = width_and_heads(rng, heads=ALIBI_HEADS)
    return tokens(rng) | {
        "d_model": width,
        "n_heads": heads,
        "n_layers": 3,
        "max_seq_len": 64,
        "layer_norm_epsilon": rng.choice((1e-5, 1e-3)),
        "expansion_ratio": rng.choice((4, 2)),
        "learned_pos_emb": flip(rng),
        "no_bias": flip(rng),
        "logit_scale": rng.choice((None, 0.5, "inv_sqrt_d_model")),
        "resid_pdrop": rng.choice((0.0, 0.1)),
        "use_cache": flip(rng),
        "attn_config": {
            "clip_qkv": rng.choice((None, 0.0, 1.5)),
            "softmax_scale": rng.choice((None, 0.3)),
            "alibi_bias_max": rng.choice((8, 16)),
            "attn_type": rng.choice(("multihead_attention", "multiquery_attention")),
            "qk_ln": flip(rng),
            "prefix_lm": flip(rng),
            "alibi": flip(rng),
            "attn_impl": rng.choice(("torch", "triton")),
        },
    }


def gpt_bigcode(rng: random.Random):
    # Narrower heads round differently, which a classifier's few outputs can show enlarged.
    width, heads = width_and_heads(rng, heads=(1, 2, 3, 4), head_dims=(12, 20))
    return tokens(rng) | {
        "n_embd": width,
        "n_head": heads,
        "n_layer": 3,
        "n_positions": 64,
        "n_inner": rng.choice((None, 40, 4 * width)),
        "activation_function": rng.choice(("gelu_pytorch_tanh", "gelu", "relu")),
        "layer_norm_epsilon": rng.choice((1e-5, 1e-3)),
        "scale_attn_weights": flip(rng),
        "attention_softmax_in_fp32": flip(rng),
        "scale_attention_softmax_in_fp32": flip(rng),
        "multi_query": flip(rng),
        "attn_pdrop": rng.choice((0.0, 0.2)),
    }


def gpt_neo(rng: random.Random):
    width, heads = width_and_heads(rng)
    types, layers = rng.choice(
        (
            ([[["global", "local"], 2]], 4),
            ([[["global"], 3]], 3),
            ([[["local"], 2]], 2),
            ([[["local", "global"], 1], [["global"], 2]], 4),
        )
    )
    return tokens(rng) | {
        "hidden_size": width,
        "num_heads": heads,
        "num_layers": layers,
        "attention_types": types,
        "window_size": rng.choice((3, 7, 16)),
        "intermediate_size": rng.choice((None, 40, 4 * width)),
        "max_position_embeddings": 64,
        "activation_function": rng.choice(("gelu_new", "gelu", "silu")),
        "layer_norm_epsilon": rng.choice((1e-5, 1e-3)),
        "resid_dropout": rng.choice((0.0, 0.1)),
        "embed_dropout": rng.choice((0.0, 0.1)),
        "attention_dropout": rng.choice((0.0, 0.2)),
    }


def openai_gpt(rng: random.Random):
    width, heads = width_and_heads(rng)
    return tokens(rng) | {
        "n_embd": width,
        "n_head": heads,
        "n_layer": 3,
        "n_positions": 64,
        "afn": rng.choice(("gelu", "relu", "silu", "swish")),
        "layer_norm_epsilon": rng.choice((1e-5, 1e-3)),
        "summary_type": rng.choice(("cls_index", "last")),
        "attn_pdrop": rng.choice((0.1, 0.0)),
    }


def ctrl(rng: random.Random):
    width, heads = width_and_heads(rng)
    return tokens(rng, pads=(0, 5)) | {
        "n_embd": width,
        "n_head": heads,
        "n_layer": 3,
        "dff": rng.choice((40, 56)),
        "n_positions": 64,
        "resid_pdrop": rng.choice((0.1, 0.0)),
        "embd_pdrop": rng.choice((0.1, 0.0)),
    }


def biogpt(rng: random.Random):
    width, heads = width_and_heads(rng)
    return tokens(rng) | {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": 3,
        "intermediate_size": rng.choice((40, 56)),
        "max_position_embeddings": 64,
        "hidden_act": rng.choice(("gelu", "relu")),
        "layer_norm_eps": rng.choice((1e-12, 1e-3)),
        "scale_embedding": flip(rng),
        "layerdrop": rng.choice((0.0, 0.3)),
        "activation_dropout": rng.choice((0.0, 0.1)),
        "hidden_dropout_prob": rng.choice((0.0, 0.1)),
        "attention_probs_dropout_prob": rng.choice((0.0, 0.1)),
    }


def xglm(rng: random.Random):
    width, heads = width_and_heads(rng)
    return tokens(rng) | {
        "d_model": width,
        "attention_heads": heads,
        "num_layers": 3,
        "ffn_dim": rng.choice((40, 56)),
        "max_position_embeddings": 64,
        "activation_function": rng.choice(("gelu", "relu")),
        "scale_embedding": flip(rng),
        "layerdrop": rng.choice((0.0, 0.3)),
        "activation_dropout": rng.choice((0.0, 0.1)),
        "dropout": rng.choice((0.0, 0.1)),
        "attention_dropout": rng.choice((0.0, 0.1)),
    }


def modernbert_decoder(rng: random.Random):
    width, heads = width_and_heads(rng)
    width = width if width // heads % 2 == 0 else 2 * width
    layer_types = [rng.choice(("full_attention", "sliding_attention")) for _ in range(3)]
    local = rng.choice((6, 15, 32, 128))
    config = tokens(rng, pads=(0, 5)) | {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": 3,
        "intermediate_size": rng.choice((40, 56)),
        "max_position_embeddings": 64,
        "hidden_activation": rng.choice(("gelu", "silu")),
        "norm_eps": rng.choice((1e-5, 1e-3)),
        "norm_bias": flip(rng),
        "attention_bias": flip(rng),
        "mlp_bias": flip(rng),
        "decoder_bias": flip(rng),
        "classifier_bias": flip(rng),
        "classifier_activation": rng.choice(("gelu", "relu")),
        "local_attention": local,
        "layer_types": rng.choice((layer_types, ["full_attention"] * 3, None)),
        "mlp_dropout": rng.choice((0.0, 0.1)),
        "embedding_dropout": rng.choice((0.0, 0.1)),
    }
    if flip(rng):
        parameters = {kind: rope(rng, width // heads) for kind in ("full_attention", "sliding_attention")}
        config["rope_parameters"] = {kind: p for kind, p in parameters.items() if p["rope_type"] not in BROKEN_BY_TYPE}
    else:
        config |= {"global_rope_theta": 500.0, "local_rope_theta": 331.0, "global_attn_every_n_layers": 2}
    return config


CLASSIFIERS = ("base", "sequence_classification", "token_classification")
SPANS = (*CLASSIFIERS, "question_answering")
ROWS = (
    Row("opt", opt, seeds=8, heads=("base", "sequence_classification", "question_answering")),
    Row("bloom", bloom, backends=("eager",), seeds=6, heads=SPANS),
    Row("mpt", mpt, backends=("eager",), seeds=8, heads=SPANS),
    Row("gpt_bigcode", gpt_bigcode, seeds=6, heads=CLASSIFIERS),
    Row("gpt_neo", gpt_neo, backends=("eager",), seeds=6, heads=SPANS),
    Row("openai-gpt", openai_gpt, backends=("eager",), heads=("base", "sequence_classification")),
    Row("ctrl", ctrl, seeds=6, heads=("base", "sequence_classification")),
    Row("biogpt", biogpt, heads=CLASSIFIERS),
    Row("xglm", xglm, backends=("eager",), heads=("base",)),
    Row("modernbert-decoder", modernbert_decoder, seeds=8, heads=("base", "sequence_classification")),
)
