"""Entries and rules that many families share: the Llama shape."""

from ..config_map import Entry, Fixed, Renamed, Same
from ..rules import Rule


SIZES = Same(
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
KV_HEADS = Same("num_key_value_heads")
HEAD_DIM = Same("head_dim")
DROPOUT = Same("attention_dropout")
RMS_EPS = Renamed("rms_norm_eps", "norm_eps")

LLAMA_BLOCK: tuple[Entry, ...] = (
    Fixed(norm_type="rmsnorm", norm_casting_mode="llama", norm_placement="pre", ffn_type="glu"),
)

# The tensors that every family with Llama's names has.
EMBEDDINGS_AND_HEAD = (
    Rule("model.embed_tokens.weight", "model.embed_tokens.weight"),
    Rule("model.norm.{leaf}", "model.norm.{leaf}"),
    Rule("lm_head.{leaf}", "lm_head.{leaf}"),
)
ATTENTION = tuple(
    Rule(f"model.layers.{{layer}}.self_attn.{name}.{{leaf}}", f"model.layers.{{layer}}.self_attn.{name}.{{leaf}}")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj")
)
QK_NORM = tuple(
    Rule(f"model.layers.{{layer}}.self_attn.{name}.{{leaf}}", f"model.layers.{{layer}}.self_attn.{name}.{{leaf}}")
    for name in ("q_norm", "k_norm")
)
GATED_FFN = tuple(
    Rule(f"model.layers.{{layer}}.mlp.{name}.{{leaf}}", f"model.layers.{{layer}}.mlp.{name}.{{leaf}}")
    for name in ("gate_proj", "up_proj", "down_proj")
)


def layer_norms(**names: str) -> tuple[Rule, ...]:
    """Norms inside a layer: our slot = native name, as `mlp_pre_norm="post_attention_layernorm"`."""
    return tuple(
        Rule(f"model.layers.{{layer}}.{native}.{{leaf}}", f"model.layers.{{layer}}.{ours}.{{leaf}}")
        for ours, native in names.items()
    )


PRE_NORMS = layer_norms(self_attn_pre_norm="input_layernorm", mlp_pre_norm="post_attention_layernorm")
SANDWICH_NORMS = layer_norms(
    self_attn_pre_norm="input_layernorm",
    self_attn_branch_norm="post_attention_layernorm",
    mlp_pre_norm="pre_feedforward_layernorm",
    mlp_branch_norm="post_feedforward_layernorm",
)
LLAMA_WEIGHTS = EMBEDDINGS_AND_HEAD + ATTENTION + GATED_FFN + PRE_NORMS
