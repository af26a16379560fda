"""BART: the 2017 encoder-decoder with learned positions (offset 2), a norm on the embeddings and a logits bias."""

from dataclasses import replace

import torch

from ..config_map import Computed, Entry, Fixed, Irrelevant, OfDecoder, OnBothStacks, OnStack, Renamed, Same
from ..family import Family
from ..rules import Rule


def _embedding_scale(native):
    scaled = native["scale_embedding"]
    return {"embedding_multiplier": native["d_model"] ** 0.5 if scaled else 1.0}


SCALED_EMBEDDING = Computed(
    ("scale_embedding",),
    _embedding_scale,
    lambda fields: {"scale_embedding": fields["embedding_multiplier"] != 1.0},
)


def stack_sizes(stack: str) -> Entry:
    """The native keys that exist once per stack."""
    return OnStack(
        stack,
        Renamed(f"{stack}_layers", "num_hidden_layers"),
        Renamed(f"{stack}_attention_heads", "num_attention_heads"),
        Renamed(f"{stack}_ffn_dim", "intermediate_size"),
        Renamed(f"{stack}_layerdrop", "layerdrop"),
    )


# Without ties a table stays that no stack reads.
SHARED_TABLE = Computed(
    ("tie_word_embeddings",),
    lambda native: {
        "tie_word_embeddings": native["tie_word_embeddings"],
        "share_embeddings": native["tie_word_embeddings"],
        "unread_shared_embedding": not native["tie_word_embeddings"],
    },
    lambda fields: {"tie_word_embeddings": fields["tie_word_embeddings"]},
)

# The decoder's last end-of-sequence token through a dense layer, with dropout before and behind it; none before the head
# of question answering.
DENSE_CLASSIFIER = Fixed(classifier_pooling="end_of_sequence", classifier_bias=True, classifier_transform=True)
CLASSIFIER_DROPOUT = Computed(
    ("classifier_dropout",),
    lambda native: {"classifier_dropout": native["classifier_dropout"], "qa_dropout": 0.0},
    lambda fields: {"classifier_dropout": fields["classifier_dropout"]},
)
CLASSIFIERS = OnStack("decoder", CLASSIFIER_DROPOUT, DENSE_CLASSIFIER)
CLASSIFIER_WEIGHTS = (
    Rule("classification_head.dense.{leaf}", "pre_classifier.dense.{leaf}"),
    Rule("classification_head.out_proj.{leaf}", "score.{leaf}"),
)
HEADS = {"sequence_classification": CLASSIFIER_WEIGHTS}

# What BART and its relatives have in common.
COMMON: tuple[Entry, ...] = (
    OnBothStacks(
        Same("vocab_size", "max_position_embeddings", "attention_dropout", "activation_dropout", "pad_token_id"),
        Renamed("d_model", "hidden_size"),
        Renamed("activation_function", "hidden_act"),
        Renamed("init_std", "initializer_range"),
        Computed(
            ("dropout",),
            lambda native: {"residual_dropout": native["dropout"], "embedding_dropout": native["dropout"]},
            lambda fields: {"dropout": fields["residual_dropout"]},
        ),
        SCALED_EMBEDDING,
        Fixed(
            norm_type="layernorm",
            norm_eps=1e-5,
            attention_bias=True,
            mlp_bias=True,
            ffn_type="mlp",
            attention_softmax_in_float32=False,
        ),
    ),
    stack_sizes("encoder"),
    stack_sizes("decoder"),
    # Both stacks' and the whole's.
    Same("pad_token_id"),
    # What generation reads is not listed as unread.
    Irrelevant("forced_eos_token_id", "a generation setting"),
    Irrelevant("encoder_no_repeat_ngram_size", "a generation setting"),
)
DECODER_START = Same("decoder_start_token_id")  # fmt: skip
# Of what decoder inputs are made that are absent.
FROM_SOURCE = Fixed(decoder_inputs_from_source=True)
# The encoder's blocks, in float16.
CLAMP = OnStack("encoder", Fixed(clamp_in_float16="blocks"))
CLAMP_INFINITE = OnStack("encoder", Fixed(clamp_in_float16="infinite_blocks"))

_ATTENTIONS = (("self_attn", "self_attn"), ("encoder_attn", "cross_attn"))

STACK_WEIGHTS = (
    *(
        Rule(
            f"model.{stack}.layers.{{layer}}.{native}.{name}.{{leaf}}",
            f"model.{stack}.layers.{{layer}}.{ours}.{'o_proj' if name == 'out_proj' else name}.{{leaf}}",
        )
        for stack in ("encoder", "decoder")
        for native, ours in _ATTENTIONS
        for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    ),
    *(
        Rule(
            f"model.{stack}.layers.{{layer}}.{native}.{{leaf}}", f"model.{stack}.layers.{{layer}}.mlp.{ours}.{{leaf}}"
        )
        for stack in ("encoder", "decoder")
        for native, ours in (("fc1", "up_proj"), ("fc2", "down_proj"))
    ),
)


def layer_norms(slot: str) -> tuple[Rule, ...]:
    """The norms of every sublayer, in `pre_norm` or `post_norm`."""
    return tuple(
        Rule(
            f"model.{stack}.layers.{{layer}}.{native}.{{leaf}}",
            f"model.{stack}.layers.{{layer}}.{sublayer}_{slot}.{{leaf}}",
        )
        for stack in ("encoder", "decoder")
        for native, sublayer in (
            ("self_attn_layer_norm", "self_attn"),
            ("encoder_attn_layer_norm", "cross_attn"),
            ("final_layer_norm", "mlp"),
        )
    )


_TABLES = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")

EMBEDDINGS_AND_HEAD = (
    Rule("model.shared.weight", "model.decoder.embed_tokens.weight"),
    Rule(("model.shared.weight", *_TABLES), ("model.unread_embedding.weight", *_TABLES)),
    Rule("lm_head.weight", "lm_head.weight"),
    Rule("final_logits_bias", "final_logits_bias", absent=lambda config: torch.zeros(1, config.decoder.vocab_size)),
)
POSITIONS = tuple(
    Rule(f"model.{stack}.embed_positions.weight", f"model.{stack}.embed_positions.weight")
    for stack in ("encoder", "decoder")
)
EMBEDDING_NORMS = tuple(
    Rule(f"model.{stack}.layernorm_embedding.{{leaf}}", f"model.{stack}.embedding_norm.{{leaf}}")
    for stack in ("encoder", "decoder")
)


def with_decoder(family: Family, *entries: Entry) -> Family:
    """
    A family, and its decoder alone: a language model whose labels are not shifted.

    Args:
        entries: more of the decoder's config.
    """
    table = Rule("model.decoder.embed_tokens.weight", "model.embed_tokens.weight")
    layers = (
        rule.without_prefixes("", "model.decoder.").with_prefixes("", "model.")
        for rule in family.weights
        if rule.is_inside("model.decoder.", "") and rule.native not in ("model.shared.weight", table.native)
    )
    decoder = Family(
        model_type=family.model_type,
        part="decoder",
        config=(
            *map(OfDecoder, family.config),
            Irrelevant("add_cross_attention", "this class has it in any case"),
            Fixed(add_cross_attention=True, shift_labels=False, generation_counts_padding=True),
            *entries,
        ),
        weights=(*layers, table, Rule("lm_head.weight", "lm_head.weight")),
    )
    return replace(family, decoder=decoder)


FAMILIES = (
    with_decoder(Family(
        model_type="bart",
        primary="seq2seq_lm",
        config=(
            *COMMON, SHARED_TABLE, DECODER_START, CLASSIFIERS,
            OnBothStacks(
                Fixed(
                    norm_placement="post", embedding_norm=True, position_embedding_type="learned", position_offset=2,
                )
            ),
            Fixed(final_logits_bias=True, labels_disable_cache=True), CLAMP_INFINITE, FROM_SOURCE,
        ),
        weights=(*EMBEDDINGS_AND_HEAD, *POSITIONS, *EMBEDDING_NORMS, *STACK_WEIGHTS, *layer_norms("post_norm")),
        head_weights=HEADS,
    )),
)  # fmt: skip
