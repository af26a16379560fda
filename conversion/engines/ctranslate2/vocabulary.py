"""The tokens that a CTranslate2 model knows its ids by, and which of them it takes for special ones."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig

from ..tokens import first_id


def tokens_of(tokenizer: Any, size: int) -> list[str]:
    """
    The token of every id from 0 to `size`; an id without one, and every one without a tokenizer, is named by its number.

    Raises nothing: ids of the tokenizer past the embedding cannot be used by the model either.
    """
    named = {} if tokenizer is None else {index: token for token, index in tokenizer.get_vocab().items()}
    taken = set(named.values())
    tokens = []
    for index in range(size):
        token = named.get(index, f"<id_{index}>")
        while index not in named and token in taken:
            token += "_"
        tokens.append(token)
    return tokens


def register(spec: Any, config: PreTrainedConfig, tokenizer: Any) -> list[str]:
    """
    Give a specification its vocabularies and special tokens.

    Returns:
        notes on what the engine cannot be told.
    """
    notes = []
    if config.is_encoder_decoder:
        source, target = (tokens_of(tokenizer, stack.vocab_size) for stack in (config.encoder, config.decoder))
        spec.register_source_vocabulary(source)
        spec.register_target_vocabulary(target)
        start = config.decoder_start_token_id
        spec.config.decoder_start_token = None if start is None else target[start]
        # Texts are tokenised with their special tokens.
        spec.config.add_source_bos = spec.config.add_source_eos = False
        if start is None:
            notes.append("`decoder_start_token_id` is not set: give every target's first token as its prefix")
    else:
        target = tokens_of(tokenizer, config.vocab_size)
        spec.register_vocabulary(target)
    if tokenizer is None:
        notes.append("There is no tokenizer beside the model: its tokens are named by their ids")
    # The engine appends an unknown token that its vocabulary lacks, which the embedding then has no row for.
    unknown = None if tokenizer is None else tokenizer.unk_token_id
    spec.config.unk_token = target[_within(unknown, target, 0)]
    ends = config.eos_token_id if isinstance(config.eos_token_id, (list, tuple)) else [config.eos_token_id]
    spec.config.bos_token = target[_within(first_id(config.bos_token_id), target, 0)]
    spec.config.eos_token = target[_within(first_id(config.eos_token_id), target, 0)]
    if len(ends) > 1:
        others = ", ".join(repr(target[index]) for index in ends if _within(index, target, -1) >= 0)
        notes.append(f"Several tokens end a text; give them with every call, as `end_token` ({others})")
    if first_id(config.eos_token_id) is None:
        notes.append("`eos_token_id` is not set: the engine takes token 0 for the end of a text")
    return notes


def _within(index: int | None, tokens: Iterable[str], default: int) -> int:
    return index if index is not None and 0 <= index < len(list(tokens)) else default
