"""T5Gemma: an encoder-decoder of Gemma 2's blocks, with a config per stack and sandwich norms around all sublayers."""

from collections.abc import Mapping
from typing import Any

from ..config_map import Computed, Entry, Fields, Fixed, Irrelevant, LayerTypes, NestedStack, OnStack, Renamed, Same
from ..errors import ConversionError
from ..family import Family
from ..rules import Rule
from ._common import DROPOUT, HEAD_DIM, KV_HEADS, ONE_ATTENTION_BIAS, RMS_EPS, SIZES, WHOLE_ROPE
from .gemma import QUERY_SCALAR


def _dropout(native: Mapping[str, Any]) -> Fields:
    names = ("residual_dropout", "embedding_dropout", "activation_dropout", "final_dropout")
    return dict.fromkeys(names, native["dropout_rate"])


def _padding(native: Mapping[str, Any]) -> Fields:
    known = native["pad_token_id"] is not None
    return {"pad_token_id": native["pad_token_id"], "padding_mask_source": "input_ids" if known else "none"}


def _padding_of_the_whole(native: Mapping[str, Any]) -> Fields:
    if native["pad_token_id"] != native["decoder"]["pad_token_id"]:
        raise ConversionError(
            f"`pad_token_id` is {native['pad_token_id']} but the decoder's is {native['decoder']['pad_token_id']}, and "
            "the native class reads now one and now the other. Make both equal."
        )
    return {"pad_token_id": native["pad_token_id"]}


# What either stack's config says.
STACK: tuple[Entry, ...] = (
    SIZES, KV_HEADS, HEAD_DIM, RMS_EPS, DROPOUT, ONE_ATTENTION_BIAS, QUERY_SCALAR, WHOLE_ROPE, LayerTypes(window=4096),
    Same("attn_logit_softcapping", "eos_token_id", "initializer_range"),
    Renamed("hidden_activation", "hidden_act"),
    Computed(("pad_token_id",), _padding, lambda fields: {"pad_token_id": fields["pad_token_id"]}),
    Computed(("dropout_rate",), _dropout, lambda fields: {"dropout_rate": fields["residual_dropout"]}),
    Computed((), lambda native: {"embedding_multiplier": native["hidden_size"] ** 0.5}, lambda fields: {}),
    Irrelevant("is_decoder", "set on the stacks by the whole"),
    Irrelevant("cross_attention_hidden_size", "set on the decoder by the whole"),
    Fixed(
        norm_type="rmsnorm", norm_unit_offset=True, norm_casting_mode="gemma", norm_placement="sandwich",
        ffn_type="glu", embedding_multiplier_in_weight_dtype=True,
        embedding_multiplier_position="stack", initializer_scheme="fan_out_heads",
    ),
)  # fmt: skip

CONFIG: tuple[Entry, ...] = (
    NestedStack(
        "encoder", "encoder", *STACK,
        Same("bos_token_id"),
        Irrelevant("final_logit_softcapping", "an encoder has no logits"),
    ),
    NestedStack(
        "decoder", "decoder", *STACK,
        Same("final_logit_softcapping"),
        # What decoder inputs that are made of labels begin with.
        Computed(
            ("bos_token_id",), lambda native: {}, lambda fields: {"bos_token_id": fields["decoder_start_token_id"]}
        ),
    ),
    Computed((), lambda native: {"decoder_start_token_id": native["decoder"]["bos_token_id"]}, lambda fields: {}),
    Computed(("pad_token_id",), _padding_of_the_whole, lambda fields: {"pad_token_id": fields["pad_token_id"]}),
    Fixed(share_embeddings=False, one_vocabulary=True),
    # Of the heads; each stack has its own.
    Same("initializer_range"),
    # The whole's values go to both stacks, which have them already when they are read here.
    Computed(
        ("dropout_rate",), lambda native: {}, lambda fields: {"dropout_rate": fields["decoder.residual_dropout"]}
    ),
    Computed(
        ("attention_dropout",), lambda native: {},
        lambda fields: {"attention_dropout": fields["decoder.attention_dropout"]},
    ),
    # Every stack has a vocabulary of its own.
    Computed(
        ("vocab_size",), lambda native: {}, lambda fields: {"vocab_size": fields["decoder.vocab_size"]},
        kept=("vocab_size",),
    ),
    OnStack(
        "decoder",
        Renamed("classifier_dropout_rate", "classifier_dropout"),
        Fixed(classifier_pooling="last", classifier_bias=True),
    ),
)  # fmt: skip


def weights() -> tuple[Rule, ...]:
    """The same names in both stacks; only the decoder has a cross-attention."""
    rules = [Rule("lm_head.out_proj.weight", "lm_head.weight")]
    for stack, attentions in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "cross_attn"))):
        layer = f"model.{stack}.layers.{{layer}}."
        names = {f"model.{stack}.{name}.weight": f"model.{stack}.{name}.weight" for name in ("embed_tokens", "norm")}
        for sublayer, native in (
            *((name, f"{name}_layernorm") for name in attentions),
            ("mlp", "feedforward_layernorm"),
        ):
            names[f"{layer}pre_{native}.weight"] = f"{layer}{sublayer}_pre_norm.weight"
            names[f"{layer}post_{native}.weight"] = f"{layer}{sublayer}_branch_norm.weight"
        kept = [f"{layer}{name}.{proj}_proj.{{leaf}}" for name in attentions for proj in "qkvo"]
        kept += [f"{layer}mlp.{name}.{{leaf}}" for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
        rules += [Rule(native, ours) for native, ours in names.items()] + [Rule(name, name) for name in kept]
    return tuple(rules)


CLASSIFIER = (Rule("score.out_proj.{leaf}", "score.{leaf}"),)

FAMILIES = (
    Family(
        model_type="t5gemma",
        primary="seq2seq_lm",
        config=CONFIG,
        weights=weights(),
        head_weights={"sequence_classification": CLASSIFIER, "token_classification": CLASSIFIER},
    ),
)
