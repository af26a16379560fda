"""BERT with rotary positions and a gated FFN: Nomic BERT and GTE."""

from ..config_map import Computed, Entry, Fixed, Renamed, Same
from ..family import Family
from ..rules import Rule
from ._common import NULLABLE_HEAD_DIM, SIZES, UNDECLARED_HEAD_DIM, WHOLE_ROPE
from .bert import CLASSIFIER, CLASSIFIER_DROPOUT, HIDDEN_DROPOUT, POST_NORM, lm_head, pooler


ROTARY_ENCODER: tuple[Entry, ...] = (
    SIZES, Same("type_vocab_size", "hidden_act"), Renamed("layer_norm_eps", "norm_eps"), HIDDEN_DROPOUT,
    Renamed("attention_probs_dropout_prob", "attention_dropout"), CLASSIFIER_DROPOUT, WHOLE_ROPE, POST_NORM,
    Fixed(
        pooler=True,
        pooler_scope="classifier",
        is_causal=False,
        norm_type="layernorm",
        norm_casting_mode="none",
        ffn_type="glu",
        mlp_bias=False,
        attention_softmax_in_float32=False,
        position_embedding_type="rope",
        lm_head_transform=True,
        lm_head_bias=True,
    ),
)  # fmt: skip
# The head is tied where the config does not have the key, and its bias then has two names for one tensor.
TIED_UNLESS_TOLD = Computed(
    ("tie_word_embeddings",),
    lambda native: {
        "tie_word_embeddings": native.get("tie_word_embeddings", True),
        "lm_head_unread_bias": not native.get("tie_word_embeddings", True),
    },
    lambda fields: {} if fields["tie_word_embeddings"] else {"tie_word_embeddings": False},
    kept=("tie_word_embeddings",),
)
HEADS = {"sequence_classification": CLASSIFIER, "token_classification": CLASSIFIER}
OURS = "model.layers.{layer}."


def _weights(prefix: str) -> tuple[Rule, ...]:
    """The tensors as the classes hold them; the model inside a head is called `prefix`."""
    layer = f"{prefix}.layers.{{layer}}."
    return (
        Rule(f"{prefix}.embeddings.word_embeddings.weight", "model.embed_tokens.weight"),
        Rule(f"{prefix}.embeddings.token_type_embeddings.weight", "model.token_types.weight"),
        Rule(f"{prefix}.embeddings.LayerNorm.{{leaf}}", "model.embedding_norm.{leaf}"),
        *(
            Rule(f"{layer}{name}.{{leaf}}", f"{OURS}{name}.{{leaf}}")
            for name in (
                "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
            )
        ),
        Rule(layer + "post_attention_layernorm.{leaf}", OURS + "self_attn_post_norm.{leaf}"),
        Rule(layer + "post_mlp_layernorm.{leaf}", OURS + "mlp_post_norm.{leaf}"),
    )  # fmt: skip


FAMILIES = (
    Family(
        model_type="nomic_bert",
        primary="masked_lm",
        config=(
            *ROTARY_ENCODER, NULLABLE_HEAD_DIM, TIED_UNLESS_TOLD,
            Fixed(attention_bias=False, attention_output_bias=False, mlp_output_bias=False),
        ),
        weights=(
            *_weights("nomic_bert"),
            *lm_head("cls.predictions", "cls.predictions.transform.dense", "cls.predictions.transform.layer_norm"),
        ),
        base_weights=pooler("nomic_bert"),
        head_weights=HEADS,
    ),
    Family(
        model_type="gte",
        primary="masked_lm",
        config=(
            *ROTARY_ENCODER, UNDECLARED_HEAD_DIM,
            Fixed(
                attention_bias=True, attention_output_bias=True, mlp_output_bias=True, lm_head_transform_act="gelu",
            ),
            # The gated activation is dropped out, too.
            Computed((), lambda native: {"activation_dropout": native["hidden_dropout_prob"]}, lambda fields: {}),
        ),
        weights=(
            *_weights("gte"),
            Rule("lm_head.dense.{leaf}", "lm_head_transform.dense.{leaf}"),
            Rule("lm_head.layer_norm.{leaf}", "lm_head_transform.norm.{leaf}"),
            Rule("lm_head.decoder.{leaf}", "lm_head.{leaf}"),
        ),
        base_weights=pooler("gte"),
        head_weights=HEADS,
    ),
)  # fmt: skip
