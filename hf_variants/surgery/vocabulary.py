"""The vocabulary: trimmed to what a text or a list needs, extended, padded; tokenizer, ids and tied heads follow."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken

from ..model.configuration_variant import VariantConfig
from . import tokenizer_data
from .operation import Operation
from .subject import SAME_BITS, Outcome, Subject, SurgeryError, edited


# The tensors with a row, or an entry, per token.
PER_TOKEN = re.compile(r"(.*\.)?(embed_tokens\.weight|unread_embedding\.weight|lm_head\.(weight|bias|unread_bias))")
PER_TOKEN_IN_ROWS = re.compile(r"(.*\.)?final_logits_bias")
# The fields of configs and generation configs with token ids: a number or a list; lists of sequences; pairs with a place.
IDS = re.compile(r".*_token_ids?|(begin_)?suppress_tokens")
SEQUENCES = ("bad_words_ids", "force_words_ids", "forced_decoder_ids")
TABLES = ("lang_to_id", "task_to_id")


@dataclass(frozen=True)
class TrimVocabulary(Operation):
    """
    The tokens that a text needs, with every special and added one and what stands for single bytes.

    Any text whose tokens are kept encodes to the same tokens as before, and their rows and logits are the same bits.

    Args:
        text: the text, or the path of a file with it.
    """

    text: str | Path

    def apply(self, subject: Subject) -> Subject:
        tokenizer = tokenizer_data.load(subject)
        text = _read(self.text)
        if not text:
            raise SurgeryError("The text is empty. Give one that has the words to keep.")
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        after = _trimmed(subject, tokenizer, set(ids), "a text needs")
        made = tokenizer_data.load(after)(text, add_special_tokens=False, verbose=False).input_ids
        _refuse_other_pieces(tokenizer, tokenizer_data.load(after), ids, made)
        return after


@dataclass(frozen=True)
class KeepTokens(Operation):
    """
    These tokens, with what `TrimVocabulary` keeps beside them, and the pieces that they are merged from.

    Args:
        tokens: as the tokenizer writes them (`Ġthe`, `▁the`), or the path of a file with one on each line.
    """

    tokens: Sequence[str] | Path

    def apply(self, subject: Subject) -> Subject:
        tokenizer = tokenizer_data.load(subject)
        known = tokenizer.get_vocab()
        tokens = _lines(self.tokens)
        if unknown := [token for token in tokens if token not in known]:
            raise SurgeryError(f"The vocabulary has no token {unknown[0]!r}. Write tokens as the tokenizer does.")
        return _trimmed(subject, tokenizer, {known[token] for token in tokens}, "a list names")


@dataclass(frozen=True)
class ExtendVocabulary(Operation):
    """
    New tokens behind the others; the row of each is the mean of the rows of what it was cut into.

    Args:
        tokens: texts, or the path of a file with one on each line.
    """

    tokens: Sequence[str] | Path

    def apply(self, subject: Subject) -> Subject:
        tokenizer = tokenizer_data.load(subject)
        tokens = list(dict.fromkeys(_lines(self.tokens)))
        known = tokenizer.get_vocab()
        if there := [token for token in tokens if token in known]:
            raise SurgeryError(f"The vocabulary has {there[0]!r} already. Leave it out.")
        parts = [tokenizer(token, add_special_tokens=False).input_ids for token in tokens]
        size = _vocabulary_size(subject)
        if lost := [token for token, ids in zip(tokens, parts) if not ids or max(ids) >= size]:
            raise SurgeryError(f"{lost[0]!r} is cut into nothing that has a row in the embedding. Leave it out.")
        backend = tokenizer.backend_tokenizer
        backend.add_tokens([AddedToken(token, normalized=False) for token in tokens])
        rows: list[list[int]] = [[row] for row in range(size)]
        for token, ids in zip(tokens, parts):
            place = backend.token_to_id(token)
            rows += [[0]] * (place + 1 - len(rows))
            rows[place] = [*ids, *ids]
        outcome = Outcome(f"{len(tokens)} tokens added, each the mean of its pieces", SAME_BITS)
        return _with_rows(subject, rows, outcome, {}, backend.to_str())


@dataclass(frozen=True)
class PadVocabulary(Operation):
    """
    Rows behind the last token, up to a multiple; each is the mean of all, as transformers makes new ones.

    Args:
        multiple: of which the vocabulary's size becomes one.
    """

    multiple: int

    def apply(self, subject: Subject) -> Subject:
        if self.multiple < 1:
            raise SurgeryError(f"A vocabulary cannot be padded to a multiple of {self.multiple}. Give 1 or more.")
        size = _vocabulary_size(subject)
        new = -(-size // self.multiple) * self.multiple
        rows = [[row] for row in range(size)] + [list(range(size))] * (new - size)
        outcome = Outcome(f"vocabulary of {size} padded to {new}", SAME_BITS)
        return _with_rows(subject, rows, outcome, {}, subject.tokenizer_json)


def _read(text: str | Path) -> str:
    return text.read_text(encoding="utf-8") if isinstance(text, Path) else text


def _lines(tokens: Sequence[str] | Path) -> list[str]:
    if not isinstance(tokens, Path):
        return list(tokens)
    return [line for line in tokens.read_text(encoding="utf-8").split("\n") if line]


def _vocabulary_size(subject: Subject) -> int:
    sizes = {config.vocab_size for config in subject.stacks.values()}
    if len(sizes) > 1:
        raise SurgeryError(
            f"The stacks have vocabularies of {' and '.join(map(str, sorted(sizes)))} tokens (`vocab_size`), and one "
            "tokenizer cannot say which is whose. Take the encoder alone (`--encoder-alone`)."
        )
    return sizes.pop()


def _trimmed(subject: Subject, tokenizer: Any, wanted: set[int], why: str) -> Subject:
    size = _vocabulary_size(subject)
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = tokenizer_data.closed(data, wanted, tokenizer)
    kept |= {token for token in _ids_in(subject.config) if 0 <= token < size}
    for config in subject.stacks.values():
        if config.pad_token_id is not None and (
            config.position_ids_source == "input_ids" or config.sinusoidal_padding_zero
        ):
            # Positions are counted from the padding token's id.
            kept |= set(range(config.pad_token_id + 1))
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    if beyond := sorted(token for token in kept if token >= size):
        raise SurgeryError(
            f"{names[beyond[0]]!r} has the number {beyond[0]} in the tokenizer, and the model a vocabulary of {size}. Leave "
            "it out of the tokenizer first."
        )
    order = sorted(kept)
    renumbered = {old: new for new, old in enumerate(order)}
    outcome = Outcome(f"{len(order)} of {size} tokens: those that {why}, special, added and byte tokens", SAME_BITS)
    made = json.dumps(tokenizer_data.renumbered(data, renumbered), ensure_ascii=False)
    return _with_rows(subject, [[old] for old in order], outcome, renumbered, made)


def _refuse_other_pieces(before: Any, after: Any, ids: list[int], made: list[int]) -> None:
    """The proof on the text itself: the same pieces."""
    first, second = before.convert_ids_to_tokens(ids), after.convert_ids_to_tokens(made)
    if first != second:
        place = next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
        raise SurgeryError(
            f"The trimmed tokenizer cuts the text another way, from {first[place : place + 3]} on. Please report it."
        )


def _with_rows(
    subject: Subject,
    rows: list[list[int]],
    outcome: Outcome,
    renumbered: Mapping[int, int],
    tokenizer_json: str | None,
) -> Subject:
    """
    The subject with a new vocabulary.

    Args:
        rows: of every new token the old rows of which its own is the mean.
        renumbered: old id -> new one; empty where all stay.
    """
    first = torch.tensor([old[0] for old in rows])
    means = {new: old for new, old in enumerate(rows) if len(old) > 1}
    before_tokens = subject.tokens or tuple(range(_vocabulary_size(subject)))

    def tensor(name: str, before: Subject) -> torch.Tensor:
        old = before.load(name)
        in_rows = PER_TOKEN_IN_ROWS.fullmatch(name)
        if not in_rows and not PER_TOKEN.fullmatch(name):
            return old
        old = old.T if in_rows else old
        made = old[first.to(old.device)]
        known: dict[tuple[int, ...], torch.Tensor] = {}
        for new, parts in means.items():
            key = tuple(parts)
            if key not in known:
                known[key] = old[torch.tensor(parts, device=old.device)].double().mean(0).to(old.dtype)
            made[new] = known[key]
        return made.T if in_rows else made

    config = subject.config
    changes = renumbered_ids(config.to_dict(), renumbered) if renumbered else {}
    changes = {name: value for name, value in changes.items() if name not in subject.stacks}
    if (leftovers := config.native_leftovers) is not None and renumbered:
        changes["native_leftovers"] = leftovers | renumbered_ids(leftovers, renumbered)
    if isinstance(config, VariantConfig):
        changes["vocab_size"] = len(rows)
    else:
        for name, stack in subject.stacks.items():
            fields = stack.to_dict()
            changes[name] = fields | renumbered_ids(fields, renumbered) | {"vocab_size": len(rows)}
    tokens = tuple(before_tokens[old[0]] if len(old) == 1 else -1 for old in rows)
    return subject.changed(
        outcome, tensor, config=edited(config, **changes), tokens=tokens, tokenizer_json=tokenizer_json
    )


def _ids_in(config: Any) -> set[int]:
    """Every token id that a config names."""
    found: set[int] = set()

    def look(fields: Mapping[str, Any]) -> None:
        for name, value in fields.items():
            if isinstance(value, dict) and name in ("encoder", "decoder", "native_leftovers"):
                look(value)
            elif IDS.fullmatch(name):
                found.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))

    look(config.to_dict())
    return found


def renumbered_ids(fields: Mapping[str, Any], renumbered: Mapping[int, int]) -> dict[str, Any]:
    """
    The fields with token ids under their new numbers.

    Lists of tokens to suppress lose those that are gone; sequences with a token that is gone go with it.
    """

    def sequence(ids: Any) -> Any:
        if isinstance(ids, list):
            made = [sequence(one) for one in ids]
            return None if None in made else made
        return renumbered.get(ids)

    made: dict[str, Any] = {}
    for name, value in fields.items():
        if value is None or not renumbered:
            continue
        if name == "forced_decoder_ids":
            pairs = [[place, renumbered.get(token) if token is not None else None] for place, token in value]
            made[name] = [pair for pair in pairs if pair[1] is not None]
        elif name in SEQUENCES and isinstance(value, list):
            made[name] = [one for one in map(sequence, value) if one is not None] or None
        elif name in TABLES and isinstance(value, dict):
            made[name] = {key: renumbered[token] for key, token in value.items() if token in renumbered}
        elif IDS.fullmatch(name) and isinstance(value, list):
            made[name] = [renumbered[token] for token in value if token in renumbered]
        elif IDS.fullmatch(name) and isinstance(value, int) and not isinstance(value, bool):
            # What was beyond the vocabulary was no token before.
            made[name] = renumbered.get(value)
    return made


def renumber_generation_config(path: Path, tokens: Sequence[int]) -> None:
    """Rewrite the ids in a generation_config.json, for a vocabulary whose tokens had these numbers before."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    renumbered = {old: new for new, old in enumerate(tokens) if old >= 0}
    path.write_text(json.dumps(settings | renumbered_ids(settings, renumbered), indent=2) + "\n", encoding="utf-8")
