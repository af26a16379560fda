"""mBART, PLBart, MVP, BlenderBot, Marian, Pegasus and M2M-100: BART's relatives."""

import random

import transformers
from packaging import version

from tests.native_rows.bart import bart_sizes
from tests.parity import Row


# Before, beam search took the encoder's vocabulary for the decoder's and failed.
TWO_VOCABULARIES = version.parse(transformers.__version__) >= version.parse("5.23")


def relative(rng: random.Random, **overrides):
    """BART's options, and embeddings with and without ties."""
    return bart_sizes(
        rng,
        encoder_layerdrop=rng.choice((0.0, 0.1)),
        decoder_layerdrop=rng.choice((0.0, 0.2)),
        tie_word_embeddings=rng.random() < 0.7,
        **overrides,
    )


def plbart(rng: random.Random):
    # Not a key of its config class.
    return {key: value for key, value in relative(rng).items() if key != "decoder_start_token_id"}


def marian(rng: random.Random):
    """One vocabulary in one table, or one or two in two tables."""
    shared = rng.random() < 0.5
    return relative(
        rng,
        share_encoder_decoder_embeddings=shared,
        decoder_vocab_size=71 if shared or not TWO_VOCABULARIES else rng.choice((71, 83)),
        pad_token_id=rng.choice((0, 70)),
        bos_token_id=rng.choice((3, None)),
    )


def pegasus(rng: random.Random):
    """Its config class has no `bos_token_id`, but some checkpoints do."""
    sizes = relative(rng)
    return sizes if rng.random() < 0.5 else {key: value for key, value in sizes.items() if key != "bos_token_id"}


def m2m_100(rng: random.Random):
    """A table that inputs fit into, or outgrow."""
    return relative(rng, max_position_embeddings=rng.choice((64, 30, 16)))


ROWS = (
    Row("mbart", relative, heads=("base",)),
    Row("plbart", plbart, heads=("base",)),
    Row("mvp", relative, backends=("eager",), heads=("base",)),
    Row("blenderbot", relative, heads=("base",)),
    Row("blenderbot-small", relative, heads=("base",)),
    Row("marian", marian, heads=("base",)),
    Row("pegasus", pegasus, heads=("base",)),
    Row("m2m_100", m2m_100, heads=("base",)),
)
