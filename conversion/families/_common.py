"""Entries and rules that many families share: the Llama shape."""

import torch

from ..config_map import Computed, Entry, Fixed, Irrelevant, LayerTypes, Offered, Renamed, RopeParameters, Same
from ..family import Deviation
from ..rules import Chain, Op, Permute, Rule, Split, Transpose


def multiplied_by_stack(multiplied: bool) -> dict[str, str]:
    """The field that says so, where there is a multiplier: the native stack multiplies `inputs_embeds` as well."""
    return {"embedding_multiplier_position": "stack"} if multiplied else {}


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

# Where it is not given, some classes derive it and some fail.
NULLABLE_HEAD_DIM = Computed(
    ("head_dim",),
    lambda native: {"head_dim": native["head_dim"] or native["hidden_size"] // native["num_attention_heads"]},
    lambda fields: {"head_dim": fields["head_dim"]},
    kept=("head_dim",),
)
# A class that does not declare `head_dim` reads it all the same.
UNDECLARED_HEAD_DIM = Computed(
    ("head_dim",),
    lambda native: {"head_dim": native.get("head_dim") or native["hidden_size"] // native["num_attention_heads"]},
    lambda fields: (
        {}
        if fields["head_dim"] == fields["hidden_size"] // fields["num_attention_heads"]
        else {"head_dim": fields["head_dim"]}
    ),
    kept=("head_dim",),
)
# One flag for all four projections.
ONE_ATTENTION_BIAS = Computed(
    ("attention_bias",),
    lambda native: {"attention_bias": native["attention_bias"], "attention_output_bias": native["attention_bias"]},
    lambda fields: {"attention_bias": fields["attention_bias"]},
)
# The native class rotates whole heads, whatever `partial_rotary_factor` says, and all layers alike.
WHOLE_ROPE = RopeParameters(partial=False, per_layer_type=False)
# All layers slide, or none.
WHOLE_WINDOW = Computed(
    ("sliding_window",),
    lambda native: {
        "sliding_window": native["sliding_window"],
        "layer_types": [
            "full_attention" if native["sliding_window"] is None else "sliding_attention"
        ] * native["num_hidden_layers"],
    },
    lambda fields: {
        "sliding_window": fields["sliding_window"] if "sliding_attention" in fields["layer_types"] else None
    },
)  # fmt: skip
# `layer_types` says what the other keys would decide in its absence.
SWITCHED_WINDOW: tuple[Entry, ...] = (
    LayerTypes(),
    Computed(
        ("use_sliding_window",),
        lambda native: {},
        lambda fields: {"use_sliding_window": fields["sliding_window"] is not None},
        kept=("use_sliding_window",),
    ),
    Irrelevant("max_window_layers", "read only where `layer_types` is not given, to fill it in"),
)

LLAMA_BLOCK: tuple[Entry, ...] = (
    Fixed(norm_type="rmsnorm", norm_casting_mode="llama", norm_placement="pre", ffn_type="glu"),
)
UNGATED_BLOCK: tuple[Entry, ...] = (
    Fixed(norm_type="rmsnorm", norm_casting_mode="llama", norm_placement="pre", ffn_type="mlp"),
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
# An activation has a tensor if it is learned (PReLU).
UNGATED_FFN = tuple(
    Rule(f"model.layers.{{layer}}.mlp.{name}.{{leaf}}", f"model.layers.{{layer}}.mlp.{name}.{{leaf}}")
    for name in ("up_proj", "down_proj", "act_fn")
)
GATED_FFN = (
    Rule("model.layers.{layer}.mlp.gate_proj.{leaf}", "model.layers.{layer}.mlp.gate_proj.{leaf}"),
    *UNGATED_FFN,
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

# The block of GPT-2 and its contemporaries.
LAYERNORM_BLOCK = Fixed(norm_type="layernorm", norm_casting_mode="none", norm_placement="pre", ffn_type="mlp")
# All linear layers have biases.
ALL_BIASES = Fixed(attention_bias=True, attention_output_bias=True, mlp_bias=True, mlp_output_bias=True)
# The embedding of the padding token is trained like any other.
NO_PADDING_ROW = Fixed(padding_embedding_frozen=False)

# The names of GPT-2 and its contemporaries.
# `token_type_ids` are looked up in the token embedding.
TYPES_AMONG_TOKENS = Offered(token_type_table="tokens")
GPT2_NAMES: tuple[Entry, ...] = (
    Same("vocab_size"),
    Renamed("n_positions", "max_position_embeddings"),
    Renamed("n_embd", "hidden_size"),
    Renamed("n_layer", "num_hidden_layers"),
    Renamed("n_head", "num_attention_heads"),
    Renamed("layer_norm_epsilon", "norm_eps"),
    Renamed("resid_pdrop", "residual_dropout"),
    Renamed("embd_pdrop", "embedding_dropout"),
    Renamed("attn_pdrop", "attention_dropout"),
    TYPES_AMONG_TOKENS,
)
# Four times as wide as the model where `n_inner` does not say.
GPT2_FFN: tuple[Entry, ...] = (
    Renamed("activation_function", "hidden_act"),
    Computed(
        ("n_inner",),
        lambda native: {"intermediate_size": 4 * native["n_embd"] if native["n_inner"] is None else native["n_inner"]},
        lambda fields: {
            "n_inner": (
                None if fields["intermediate_size"] == 4 * fields["hidden_size"] else fields["intermediate_size"]
            )
        },
        kept=("n_inner",),
    ),
)


def fourfold_ffn(width: str) -> Computed:
    """The FFN of a native type that is always four times as wide as its key `width` says."""
    return Computed((), lambda native: {"intermediate_size": 4 * native[width]}, lambda fields: {})


def qkv_sizes(config) -> list[int]:
    """Rows of queries, keys and values in a fused projection."""
    kv_rows = config.num_key_value_heads * config.head_dim
    return [config.num_attention_heads * config.head_dim, kv_rows, kv_rows]


def _rows_by_head(config) -> torch.Tensor:
    """Rows of [queries, key, value] for every key/value head -> all queries, all keys, all values."""
    kv_heads, head_dim = config.num_key_value_heads, config.head_dim
    rows = torch.arange(sum(qkv_sizes(config))).view(kv_heads, -1, head_dim)
    return torch.cat([rows[:, :-2].flatten(), rows[:, -2].flatten(), rows[:, -1].flatten()])


# How a fused projection holds queries, keys and values: [q k v], the same for every head, or in Conv1D's columns.
QKV_IN_BLOCKS = Split(qkv_sizes)
QKV_BY_HEAD = Chain(Permute(_rows_by_head), Split(qkv_sizes))
QKV_IN_COLUMNS = Chain(Transpose(), Split(qkv_sizes))


def fused_qkv(native: str, op: Op) -> Rule:
    """A native projection `native` (without its leaf) that holds queries, keys and values."""
    ours = tuple(f"model.layers.{{layer}}.self_attn.{name}_proj.{{leaf}}" for name in "qkv")
    return Rule(native + ".{leaf}", ours, op)


def fused_gate_up(native: str) -> Rule:
    """A native projection `native` (without its leaf) that holds gate and, after it, up; with `fused_gate_up`."""
    ours = tuple(f"model.layers.{{layer}}.mlp.{name}_proj.{{leaf}}" for name in ("gate", "up"))
    return Rule(native + ".{leaf}", ours, Split(lambda config: [config.intermediate_size] * 2))


# Measured on the CPU, in float32.
FUSED_PRODUCT = Deviation(
    "queries, keys and values are columns of one product natively, and the CPU rounds products of fewer than twelve "
    "columns, or of one to three rows with columns left over from whole vectors, in another order",
    applies=lambda config: config.is_heterogeneous or any(size < 12 or size % 4 != 0 for size in qkv_sizes(config)),
)
# One row, as in decoding, to five; with some libraries of products, more.
TRANSPOSED_PRODUCT = Deviation(
    "Conv1D multiplies by a matrix stored the other way round, which the CPU rounds differently for inputs of few tokens"
)
# Against float64, float32 gradients of either class are wrong by up to 1e-5 of the largest spread.
FUSED_GRADIENT = Deviation(
    "a product that is fused natively is stored as several here, so the gradient of its input sums in another order",
    bound=1e-4,
    gradients_only=True,
)


def gpt2_weights(linear: Op) -> tuple[Rule, ...]:
    """GPT-2's names around the attention; `linear` translates the weights of its projections."""
    layer, ours = "transformer.h.{layer}.", "model.layers.{layer}."
    return (
        Rule("transformer.wte.weight", "model.embed_tokens.weight"),
        Rule("transformer.wpe.weight", "model.embed_positions.weight"),
        Rule(layer + "ln_1.{leaf}", ours + "self_attn_pre_norm.{leaf}"),
        Rule(layer + "ln_2.{leaf}", ours + "mlp_pre_norm.{leaf}"),
        Rule(layer + "mlp.c_fc.{leaf}", ours + "mlp.up_proj.{leaf}", linear),
        Rule(layer + "mlp.act.{leaf}", ours + "mlp.act_fn.{leaf}"),
        Rule(layer + "mlp.c_proj.{leaf}", ours + "mlp.down_proj.{leaf}", linear),
        Rule("transformer.ln_f.{leaf}", "model.norm.{leaf}"),
        Rule("lm_head.weight", "lm_head.weight"),
    )
