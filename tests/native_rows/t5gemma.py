"""T5Gemma."""

import random

from transformers.models.t5gemma.modeling_t5gemma import T5GemmaPreTrainedModel

from tests.native_rows.gpt_and_gemma import windows
from tests.native_rows.llama import rope, sizes
from tests.parity import Row


def stack(rng: random.Random):
    """Widths, depths and vocabularies of either stack are its own."""
    config = sizes(
        rng, vocab_size=rng.choice((71, 80)), hidden_size=rng.choice((32, 48)), pad_token_id=rng.choice((0, 5))
    )
    layers = rng.choice((2, 3))
    options = {
        "num_hidden_layers": layers,
        "rope_parameters": rope(rng, config["head_dim"]),
        "rms_norm_eps": rng.choice((1e-6, 1e-3)),
        "hidden_activation": rng.choice(("gelu_pytorch_tanh", "gelu", "silu")),
        "attention_bias": rng.random() < 0.5,
        "query_pre_attn_scalar": rng.choice((8, 11, 144)),
        "attn_logit_softcapping": rng.choice((None, 2.0, 50.0)),
        "final_logit_softcapping": rng.choice((None, 3.0, 30.0)),
        "sliding_window": rng.choice((3, 5)),
    }
    del config["tie_word_embeddings"]
    return config | options | (windows(rng, layers) if rng.random() < 0.7 else {})


def t5gemma(rng: random.Random):
    return {
        "encoder": stack(rng),
        "decoder": stack(rng),
        "vocab_size": 71,
        "tie_word_embeddings": rng.random() < 0.5,
        "dropout_rate": rng.choice((0, 0.1)),
        "attention_dropout": rng.choice((0.0, 0.2)),
        "classifier_dropout_rate": rng.choice((0.0, 0.3)),
    }


def backends(config):
    """Some versions offer sdpa, which ignores the soft caps."""
    capped = config.encoder.attn_logit_softcapping or config.decoder.attn_logit_softcapping
    return ("eager", "sdpa") if T5GemmaPreTrainedModel._supports_sdpa and not capped else ("eager",)


ROWS = (Row("t5gemma", t5gemma, seeds=8, heads=("base",), backends=backends),)
