"""Marian, Pegasus and M2M-100 (NLLB): BART with sinusoidal positions."""

from hf_variants.model.positions import sinusoidal_table

from ..config_map import HEAD_KEY, Computed, Fixed, OnBothStacks, OnStack, Renamed
from ..errors import ConversionError
from ..family import Family
from ..rules import Rule
from ._common import multiplied_by_stack
from .bart import (
    CLAMP,
    CLAMP_INFINITE,
    COMMON,
    DECODER_START,
    EMBEDDINGS_AND_HEAD,
    SHARED_TABLE,
    STACK_WEIGHTS,
    layer_norms,
    with_decoder,
)
from .mbart import FINAL_NORMS


def _table(config):
    return sinusoidal_table(config.max_position_embeddings, config.hidden_size, config.sinusoidal_layout)


# Checkpoints often lack the tables, which the native class computes then.
STORED_SINUSOIDS = tuple(
    Rule(f"model.{stack}.embed_positions.weight", f"model.{stack}.embed_positions.weight", absent=_table)
    for stack in ("encoder", "decoder")
)


def _tables(native):
    """One table for both stacks, one for either, or (without ties) one for either and one that nothing reads."""
    shared, tied = native["share_encoder_decoder_embeddings"], native["tie_word_embeddings"]
    unequal = native["decoder_vocab_size"] != native["vocab_size"]
    if shared and unequal and not tied and native[HEAD_KEY] != "causal_lm":
        raise ConversionError(
            f"`share_encoder_decoder_embeddings` is set and `tie_word_embeddings` is not, so the LM head has "
            f"`vocab_size` {native['vocab_size']} rows and the decoder's embedding `decoder_vocab_size` "
            f"{native['decoder_vocab_size']}. Make them equal, or unset the first flag."
        )
    return {
        "tie_word_embeddings": tied,
        "share_embeddings": shared and tied,
        "unread_shared_embedding": shared and not tied,
    }


def _flags(fields):
    return {
        "tie_word_embeddings": fields["tie_word_embeddings"],
        "share_encoder_decoder_embeddings": fields["share_embeddings"] or fields["unread_shared_embedding"],
    }


def _vocabulary_of_decoder(native):
    """That of the source, where one table is all there is, whatever the key says."""
    one = native["share_encoder_decoder_embeddings"] and native["tie_word_embeddings"]
    return {"vocab_size": native["vocab_size" if one and native[HEAD_KEY] != "causal_lm" else "decoder_vocab_size"]}


def _head_of_decoder(native):
    """The decoder alone: its LM head has rows for the source's vocabulary, unless it is the embedding."""
    rows, known = native["vocab_size"], native["decoder_vocab_size"]
    if rows != known and not native["tie_word_embeddings"]:
        raise ConversionError(
            f"The LM head of MarianForCausalLM has `vocab_size` {rows} rows, and its embedding `decoder_vocab_size` "
            f"{known}. Make them equal, or set `tie_word_embeddings`."
        )
    return {}


_DECODER_VOCABULARY = Computed(
    ("decoder_vocab_size",),
    _vocabulary_of_decoder,
    lambda fields: {"decoder_vocab_size": fields["vocab_size"]},
    kept=("decoder_vocab_size",),
)
_HEAD_OF_DECODER = Computed(
    ("vocab_size",), _head_of_decoder, lambda fields: {"vocab_size": fields["vocab_size"]}, kept=("vocab_size",)
)
# The decoder multiplies `decoder_inputs_embeds` as well, the encoder the embeddings of its tokens alone.
_SCALED_BY_DECODER = OnStack(
    "decoder", Computed((), lambda native: multiplied_by_stack(native["scale_embedding"]), lambda fields: {})
)
_SINUSOIDS = Fixed(position_embedding_type="sinusoidal", sinusoidal_layout="half", sinusoidal_table_stored=True)

FAMILIES = (
    with_decoder(Family(
        model_type="marian",
        primary="seq2seq_lm",
        config=(
            *COMMON, DECODER_START, CLAMP_INFINITE, _SCALED_BY_DECODER,
            OnBothStacks(Fixed(norm_placement="post"), _SINUSOIDS),
            OnStack("encoder", Renamed("vocab_size", "vocab_size")),
            OnStack("decoder", _DECODER_VOCABULARY),
            Computed(("share_encoder_decoder_embeddings", "tie_word_embeddings"), _tables, _flags),
            Fixed(final_logits_bias=True, labels_disable_cache=True),
        ),
        weights=(
            *EMBEDDINGS_AND_HEAD, *STORED_SINUSOIDS, *STACK_WEIGHTS, *layer_norms("post_norm"),
            Rule("model.encoder.embed_tokens.weight", "model.encoder.embed_tokens.weight"),
            Rule("model.decoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
        ),
    ), _HEAD_OF_DECODER),
    with_decoder(Family(
        model_type="pegasus",
        primary="seq2seq_lm",
        config=(
            *COMMON, SHARED_TABLE, DECODER_START, CLAMP, _SCALED_BY_DECODER,
            OnBothStacks(Fixed(norm_placement="pre"), _SINUSOIDS),
            # Not a key of the class, but of some checkpoints.
            Computed(
                ("bos_token_id",),
                lambda native: {"bos_token_id": native.get("bos_token_id")},
                lambda fields: {} if fields["bos_token_id"] is None else {"bos_token_id": fields["bos_token_id"]},
            ),
            Fixed(final_logits_bias=True, labels_disable_cache=True),
        ),
        weights=(
            *EMBEDDINGS_AND_HEAD, *STORED_SINUSOIDS, *STACK_WEIGHTS, *layer_norms("pre_norm"), *FINAL_NORMS,
        ),
    )),
    Family(
        model_type="m2m_100",
        primary="seq2seq_lm",
        config=(
            *COMMON, SHARED_TABLE, DECODER_START, CLAMP,
            OnBothStacks(
                Fixed(
                    norm_placement="pre", position_embedding_type="sinusoidal", sinusoidal_layout="tensor2tensor",
                    sinusoidal_padding_zero=True, sinusoidal_table_grows=True, position_ids_source="input_ids",
                ),
                # The table has two rows more than the key says.
                Computed(
                    ("max_position_embeddings",),
                    lambda native: {"max_position_embeddings": native["max_position_embeddings"] + 2},
                    lambda fields: {"max_position_embeddings": fields["max_position_embeddings"] - 2},
                ),
            ),
        ),
        weights=(
            *EMBEDDINGS_AND_HEAD, *STACK_WEIGHTS, *layer_norms("pre_norm"), *FINAL_NORMS,
        ),
    ),
)  # fmt: skip
