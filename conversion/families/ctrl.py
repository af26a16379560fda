"""CTRL (https://arxiv.org/abs/1909.05858): GPT-2's time, the first Transformer's sinusoids and scaled embeddings."""

import math

from ..config_map import Computed, Fixed, Renamed, Required, Same
from ..family import Family
from ..rules import Rule
from ._common import ALL_BIASES, LAYERNORM_BLOCK, NO_PADDING_ROW


LAYER, OURS = "transformer.h.{layer}.", "model.layers.{layer}."

FAMILIES = (
    Family(
        model_type="ctrl",
        config=(
            Same("vocab_size"),
            Renamed("n_positions", "max_position_embeddings"),
            Renamed("n_embd", "hidden_size"),
            Renamed("n_layer", "num_hidden_layers"),
            Renamed("n_head", "num_attention_heads"),
            Renamed("dff", "intermediate_size"),
            Renamed("resid_pdrop", "residual_dropout"),
            Renamed("embd_pdrop", "embedding_dropout"),
            # Of the last norm alone; those of the layers have this one whatever it says.
            Required("layer_norm_epsilon", 1e-6, reason="the norms of the layers would keep 1e-06 in the native class"),
            LAYERNORM_BLOCK, ALL_BIASES, NO_PADDING_ROW,
            Computed((), lambda native: {"embedding_multiplier": math.sqrt(native["n_embd"])}, lambda fields: {}),
            Fixed(
                norm_eps=1e-6, hidden_act="relu", attention_dropout=0.0, lm_head_bias=True,
                embedding_multiplier_position="stack", position_embedding_type="sinusoidal",
                sinusoidal_layout="half_in_float32", attention_softmax_in_float32=False,
            ),
        ),
        weights=(
            Rule("transformer.w.weight", "model.embed_tokens.weight"),
            *(
                Rule(LAYER + f"multi_head_attention.{theirs}.{{leaf}}", OURS + f"self_attn.{ours}_proj.{{leaf}}")
                for theirs, ours in {"Wq": "q", "Wk": "k", "Wv": "v", "dense": "o"}.items()
            ),
            Rule(LAYER + "layernorm1.{leaf}", OURS + "self_attn_pre_norm.{leaf}"),
            Rule(LAYER + "layernorm2.{leaf}", OURS + "mlp_pre_norm.{leaf}"),
            Rule(LAYER + "ffn.0.{leaf}", OURS + "mlp.up_proj.{leaf}"),
            Rule(LAYER + "ffn.2.{leaf}", OURS + "mlp.down_proj.{leaf}"),
            Rule("transformer.layernorm.{leaf}", "model.norm.{leaf}"),
            Rule("lm_head.{leaf}", "lm_head.{leaf}"),
        ),
        head_weights={"sequence_classification": (Rule("classifier.{leaf}", "score.{leaf}"),)},
    ),
)  # fmt: skip
