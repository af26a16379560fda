"""BERT and the encoders in its shape: post-norm blocks, learned positions, a dense head in front of the LM head."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..config_map import Computed, Entry, Fields, Fixed, Renamed, Required, Same
from ..errors import ConversionError
from ..family import Family
from ..rules import Rule
from ._common import ALL_BIASES, SIZES


def _learned_positions(native: Mapping[str, Any]) -> Fields:
    kind = native.get("position_embedding_type") or "absolute"
    if kind != "absolute":
        raise ConversionError(
            f"`position_embedding_type` is {kind!r}, which transformers 5 no longer computes. Only 'absolute' is "
            "supported."
        )
    return {"position_embedding_type": "learned"}


def _classifier_dropout(native: Mapping[str, Any]) -> Fields:
    dropout = native.get("classifier_dropout")
    if dropout is None:
        dropout = native["hidden_dropout_prob"]
    return {"classifier_dropout": dropout, "token_classifier_dropout": dropout, "qa_dropout": 0.0}


# Configs of transformers 4 have the key; the classes of transformers 5 know one kind.
LEARNED_POSITIONS = Computed(
    ("position_embedding_type",), _learned_positions, lambda fields: {}, kept=("position_embedding_type",)
)
HIDDEN_DROPOUT = Computed(
    ("hidden_dropout_prob",),
    lambda native: {
        "residual_dropout": native["hidden_dropout_prob"],
        "embedding_dropout": native["hidden_dropout_prob"],
    },
    lambda fields: {"hidden_dropout_prob": fields["residual_dropout"]},
)
# Before a classifier, but not before the head of question answering.
CLASSIFIER_DROPOUT = Computed(
    ("classifier_dropout",),
    _classifier_dropout,
    lambda fields: {"classifier_dropout": fields["classifier_dropout"]},
    kept=("classifier_dropout",),
)
# Before the classifier of choices, of types that read no key for it.
CHOICE_DROPOUT = Computed((), lambda native: {"choice_dropout": native["hidden_dropout_prob"]}, lambda fields: {})
CHUNKED_FFN = Renamed("chunk_size_feed_forward", "ffn_chunk_size")
ENCODER_BLOCK = Fixed(
    is_causal=False,
    norm_type="layernorm",
    norm_casting_mode="none",
    ffn_type="mlp",
    attention_softmax_in_float32=False,
)
DENSE_LM_HEAD = Fixed(lm_head_transform=True, lm_head_bias=True)
# Where the embeddings are tied, the head's bias has two names for one tensor; else there are two, one of them unread.
TIED_BIAS = Computed(
    ("tie_word_embeddings",),
    lambda native: {
        "tie_word_embeddings": native["tie_word_embeddings"],
        "lm_head_unread_bias": not native["tie_word_embeddings"],
    },
    lambda fields: {"tie_word_embeddings": fields["tie_word_embeddings"]},
)
NO_DECODER = Required(
    "is_decoder",
    False,
    reason="this is an encoder",
)
NO_CROSS_ATTENTION = Required("add_cross_attention", False, reason="stacks of this type are converted without")
ENCODER: tuple[Entry, ...] = (
    SIZES, Same("type_vocab_size", "hidden_act"), Renamed("layer_norm_eps", "norm_eps"), HIDDEN_DROPOUT,
    Renamed("attention_probs_dropout_prob", "attention_dropout"), LEARNED_POSITIONS, CHUNKED_FFN, ENCODER_BLOCK,
    DENSE_LM_HEAD, ALL_BIASES, NO_DECODER, NO_CROSS_ATTENTION,
)  # fmt: skip
# What BERT, RoBERTa, ELECTRA and ERNIE have in common.
COMMON = (*ENCODER, CLASSIFIER_DROPOUT)
POST_NORM = Fixed(norm_placement="post", embedding_norm=True)
POOLED = Fixed(pooler=True, pooler_scope="base_and_classifier")


def embeddings(prefix: str) -> tuple[Rule, ...]:
    """The tables; the model inside a head is called `prefix`."""
    return (
        Rule(f"{prefix}.embeddings.word_embeddings.weight", "model.embed_tokens.weight"),
        Rule(f"{prefix}.embeddings.position_embeddings.weight", "model.embed_positions.weight"),
        Rule(f"{prefix}.embeddings.token_type_embeddings.weight", "model.token_types.weight"),
    )


def attention(prefix: str) -> tuple[Rule, ...]:
    """The projections of every layer."""
    layer, ours = f"{prefix}.encoder.layer.{{layer}}.", "model.layers.{layer}."
    return (
        *(
            Rule(f"{layer}attention.self.{native}.{{leaf}}", f"{ours}self_attn.{native[0]}_proj.{{leaf}}")
            for native in ("query", "key", "value")
        ),
        Rule(layer + "attention.output.dense.{leaf}", ours + "self_attn.o_proj.{leaf}"),
        Rule(layer + "intermediate.dense.{leaf}", ours + "mlp.up_proj.{leaf}"),
        Rule(layer + "output.dense.{leaf}", ours + "mlp.down_proj.{leaf}"),
    )


def post_norms(prefix: str) -> tuple[Rule, ...]:
    """The norms of the embeddings and of every layer."""
    layer, ours = f"{prefix}.encoder.layer.{{layer}}.", "model.layers.{layer}."
    return (
        Rule(f"{prefix}.embeddings.LayerNorm.{{leaf}}", "model.embedding_norm.{leaf}"),
        Rule(layer + "attention.output.LayerNorm.{leaf}", ours + "self_attn_post_norm.{leaf}"),
        Rule(layer + "output.LayerNorm.{leaf}", ours + "mlp_post_norm.{leaf}"),
    )


def lm_head(head: str, dense: str, norm: str) -> tuple[Rule, ...]:
    """The LM head, whose bias is `head.bias`, tied to `head.decoder.bias`; `dense` and `norm` stand before it."""
    return (
        Rule(dense + ".{leaf}", "lm_head_transform.dense.{leaf}"),
        Rule(norm + ".{leaf}", "lm_head_transform.norm.{leaf}"),
        Rule(f"{head}.decoder.weight", "lm_head.weight"),
        Rule(f"{head}.bias", "lm_head.bias"),
        Rule((f"{head}.decoder.bias", f"{head}.bias"), ("lm_head.bias", "lm_head.unread_bias")),
    )


def pooler(prefix: str) -> tuple[Rule, ...]:
    """The pooler of the bare model."""
    return (Rule(f"{prefix}.pooler.dense.{{leaf}}", "model.pooler.dense.{leaf}"),)


CLASSIFIER = (Rule("classifier.{leaf}", "score.{leaf}"),)
# A head of a dense layer and the classifier.
DENSE_CLASSIFIER = (
    Rule("classifier.dense.{leaf}", "pre_classifier.dense.{leaf}"),
    Rule("classifier.out_proj.{leaf}", "score.{leaf}"),
)
# Every head of BERT is a plain classifier behind what it reads.
CLASSIFIERS = dict.fromkeys(("sequence_classification", "token_classification", "multiple_choice"), CLASSIFIER)
BERT_HEADS = {**CLASSIFIERS, "next_sentence_prediction": (Rule("cls.seq_relationship.{leaf}", "score.{leaf}"),)}
BERT_LM_HEAD = lm_head("cls.predictions", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm")


def bert_weights(prefix: str) -> tuple[Rule, ...]:
    """BERT's tensors."""
    return (
        *embeddings(prefix),
        *attention(prefix),
        *post_norms(prefix),
        *BERT_LM_HEAD,
    )


# As `is_decoder` has it, tokens see no later ones.
DECODER: tuple[Entry, ...] = (
    Required("is_decoder", True, reason="this is a decoder"),
    Fixed(is_causal=True, classifier_pooling="first", classifier_bias=True),
    Same("add_cross_attention"),
)


def with_decoder(family: Family) -> Family:
    """An encoder's family, and its stack as a decoder: the same tensors, and those of cross-attention where it is added."""
    entries = (entry for entry in family.config if entry not in (NO_DECODER, NO_CROSS_ATTENTION))
    decoder = replace(
        family,
        primary="causal_lm",
        config=(*entries, *DECODER),
        weights=(
            *family.weights,
            *(_of_cross_attention(rule) for rule in family.weights if ".attention." in rule.native),
        ),
    )
    return replace(family, decoder=decoder)


def _of_cross_attention(rule: Rule) -> Rule:
    """What a rule about self-attention says, of the attention to another stack."""
    return replace(
        rule,
        native=rule.native.replace(".attention.", ".crossattention."),
        ours=rule.ours.replace(".self_attn", ".cross_attn"),
    )


def _task_types(native: Mapping[str, Any]) -> Fields:
    return {"task_type_vocab_size": native["task_type_vocab_size"] if native["use_task_id"] else 0}


FAMILIES = tuple(map(with_decoder, (
    Family(
        model_type="bert",
        primary="masked_lm",
        config=(*COMMON, POST_NORM, POOLED, TIED_BIAS),
        weights=bert_weights("bert"),
        base_weights=pooler("bert"),
        head_weights=BERT_HEADS,
    ),
    Family(
        model_type="ernie",
        primary="masked_lm",
        config=(
            *COMMON, POST_NORM, POOLED, TIED_BIAS,
            Computed(
                ("use_task_id", "task_type_vocab_size"),
                _task_types,
                lambda fields: {
                    "use_task_id": fields["task_type_vocab_size"] > 0,
                    "task_type_vocab_size": fields["task_type_vocab_size"],
                },
                kept=("task_type_vocab_size",),
            ),
        ),
        weights=(
            *bert_weights("ernie"),
            Rule("ernie.embeddings.task_type_embeddings.weight", "model.task_types.weight"),
        ),
        base_weights=pooler("ernie"),
        head_weights=BERT_HEADS,
    ),
    # Megatron's BERT: norms before the sublayers, one more at the end, none on the embeddings.
    Family(
        model_type="megatron-bert",
        primary="masked_lm",
        config=(
            *ENCODER, POOLED, TIED_BIAS,
            Fixed(norm_placement="pre", embedding_norm=False, attention_score_form="divided"),
            Computed((), _classifier_dropout, lambda fields: {}), CHOICE_DROPOUT,
        ),
        weights=(
            *embeddings("bert"),
            *attention("bert"),
            Rule("bert.encoder.layer.{layer}.attention.ln.{leaf}", "model.layers.{layer}.self_attn_pre_norm.{leaf}"),
            Rule("bert.encoder.layer.{layer}.ln.{leaf}", "model.layers.{layer}.mlp_pre_norm.{leaf}"),
            Rule("bert.encoder.ln.{leaf}", "model.norm.{leaf}"),
            *BERT_LM_HEAD,
        ),
        base_weights=pooler("bert"),
        head_weights=BERT_HEADS,
    ),
)))  # fmt: skip
