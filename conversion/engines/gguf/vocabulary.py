"""A tokenizer as a GGUF file has it: tokens, kinds, merges or scores, how text is cut, special tokens, chat templates."""

import json
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...errors import ConversionError
from ...gguf_files.tokenizer import IN_ORDER, SPACE, SPECIAL, WORDS, tokenizer_of
from ...tokenization import ids_that_differ
from .outline import Outline


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class NoVocabulary(ConversionError):
    """A tokenizer that a GGUF file cannot hold, with the reason."""


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, size: int, architecture: str) -> dict[str, Any]:
    """
    The keys of a tokenizer.

    Args:
        size: of the embedding; ids without a token are filled up.
        architecture: as llama.cpp calls it.

    Raises:
        NoVocabulary: if none that our reader builds from such keys makes the same ids of text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise NoVocabulary(f"{type(tokenizer).__name__} has no fast tokenizer, from which its rules could be read")
    if len(tokenizer) > size:
        raise NoVocabulary(f"it has {len(tokenizer)} tokens, and the model embeds {size}")
    state = json.loads(backend.to_str())
    kinds = {
        "BPE": (_sentencepiece if state["model"].get("byte_fallback") else _byte_level),
        "WordPiece": _word_piece,
        "Unigram": _unigram,
    }
    kind = state["model"]["type"]
    if kind not in kinds:
        raise NoVocabulary(f"llama.cpp has no tokenizer of the kind {kind!r}")
    shared = {**_special(tokenizer), **_templates(tokenizer)}
    reasons = []
    for made in kinds[kind](tokenizer, state, _tokens(tokenizer, size), architecture):
        keys = {f"tokenizer.ggml.{name}": value for name, value in made.items() if value is not None} | shared
        try:
            reread = tokenizer_of(Outline({"general.architecture": architecture, **keys}, {}, {}))
        except ConversionError as error:
            reasons.append(str(error))
            continue
        difference = ids_that_differ(tokenizer, reread)
        if difference is None:
            return keys
        reasons.append(difference)
    raise NoVocabulary(f"read back it is another one ({reasons[-1] if reasons else 'no way to cut text fits'})")


def _tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> list[str | None]:
    tokens: list[str | None] = [None] * size
    for token, index in tokenizer.get_vocab().items():
        tokens[index] = token
    return tokens


def _filled(tokens: list[str | None]) -> list[str]:
    return [f"[PAD{index}]" if token is None else token for index, token in enumerate(tokens)]


def _kinds(tokenizer: PreTrainedTokenizerBase, tokens: list[str | None], unknown: str | None = None) -> list[int]:
    added = {index: token.special for index, token in tokenizer.added_tokens_decoder.items()}
    special = set(tokenizer.all_special_ids)
    kinds = []
    for index, token in enumerate(tokens):
        if token is None:
            kinds.append(UNUSED)
        elif token == unknown:
            kinds.append(UNKNOWN)
        elif index in special or added.get(index):
            kinds.append(CONTROL)
        elif index in added:
            kinds.append(USER_DEFINED)
        else:
            kinds.append(NORMAL)
    return kinds


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    found = {}
    for name, theirs in SPECIAL.items():
        index = getattr(tokenizer, f"{name}_id", None)
        if index is not None:
            found[f"tokenizer.ggml.{theirs}_token_id"] = index
    return found


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, dict):
        return {"tokenizer.chat_template": template} if template else {}
    named = {f"tokenizer.chat_template.{name}": text for name, text in template.items() if name != "default"}
    names = {"tokenizer.chat_templates": [key.rpartition(".")[2] for key in named]} if named else {}
    return named | names | ({"tokenizer.chat_template": template["default"]} if "default" in template else {})


def _ends(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Whether a text begins and ends with the special tokens."""
    ids = tokenizer("a").input_ids
    bare = tokenizer("a", add_special_tokens=False).input_ids
    before, behind = (ids[:1], ids[-1:]) if ids != bare else ([], [])
    starts = before != [] and before != bare[:1]
    ends = behind != [] and behind != bare[-1:]
    return {"add_bos_token": starts, "add_eos_token": ends}


def _byte_level(
    tokenizer: PreTrainedTokenizerBase, state: dict[str, Any], tokens: list[str | None], architecture: str
) -> Iterator[dict[str, Any]]:
    """One after the other the ways to cut text that have the same steps as the tokenizer, or may."""
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in state["model"]["merges"]]
    common = {
        "model": "gpt2",
        "tokens": _filled(tokens),
        "token_type": _kinds(tokenizer, tokens),
        "merges": merges,
        **_ends(tokenizer),
    }
    if _adds_prefix_space(state):
        common["add_space_prefix"] = True
    for name in WORDS:
        yield {**common, "pre": name}


def _adds_prefix_space(state: dict[str, Any]) -> bool:
    steps = state.get("pre_tokenizer") or {}
    return any(step.get("add_prefix_space") for step in [steps, *steps.get("pretokenizers", [])])


def _sentencepiece(
    tokenizer: PreTrainedTokenizerBase, state: dict[str, Any], tokens: list[str | None], architecture: str
) -> Iterator[dict[str, Any]]:
    unknown = state["model"].get("unk_token")
    kinds = [
        BYTE if token is not None and len(token) == 6 and token.startswith("<0x") else kind
        for token, kind in zip(tokens, _kinds(tokenizer, tokens, unknown))
    ]
    # A token's score is its place in the order of merges; what is never merged comes last.
    first: dict[str, int] = {}
    for rank, merge in enumerate(state["model"]["merges"]):
        left, right = merge if isinstance(merge, list) else merge.split(" ", 1)
        first.setdefault(left + right, rank)
    scores = [
        -float(first.get(token or "", len(first))) if kind == NORMAL else 0.0 for token, kind in zip(tokens, kinds)
    ]
    names = _filled(tokens)
    if architecture in IN_ORDER:
        # Runs of spaces are spelled out.
        names = [" " * len(name) if name and not name.strip(SPACE) else name for name in names]
    for prefix in (False, True):
        yield {
            "model": "llama",
            "pre": "default",
            "tokens": names,
            "scores": scores,
            "token_type": kinds,
            "add_space_prefix": prefix,
            **_ends(tokenizer),
        }


def _word_piece(
    tokenizer: PreTrainedTokenizerBase, state: dict[str, Any], tokens: list[str | None], architecture: str
) -> Iterator[dict[str, Any]]:
    kinds = _kinds(tokenizer, tokens)
    prefix = state["model"]["continuing_subword_prefix"]
    names = [
        token if kind != NORMAL else token.removeprefix(prefix) if token.startswith(prefix) else SPACE + token
        for token, kind in zip(_filled(tokens), kinds)
    ]
    yield {
        "model": "bert",
        "pre": "default",
        "tokens": names,
        "token_type": [CONTROL if kind == UNUSED else kind for kind in kinds],
        "bos_token_id": tokenizer.cls_token_id,
    }


def _unigram(
    tokenizer: PreTrainedTokenizerBase, state: dict[str, Any], tokens: list[str | None], architecture: str
) -> Iterator[dict[str, Any]]:
    scores = [score for _, score in state["model"]["vocab"]]
    scores += [0.0] * (len(tokens) - len(scores))
    unknown = state["model"]["vocab"][state["model"]["unk_id"]][0]
    steps = state.get("normalizer") or {}
    charsmap = next(
        (
            step["precompiled_charsmap"]
            for step in [steps, *steps.get("normalizers", [])]
            if step.get("precompiled_charsmap")
        ),
        None,
    )
    for remove in (True, False):
        yield {
            "model": "t5",
            "pre": "default",
            "tokens": _filled(tokens),
            "scores": scores,
            "token_type": _kinds(tokenizer, tokens, unknown),
            "precompiled_charsmap": None if charsmap is None else _bytes(charsmap),
            "remove_extra_whitespaces": remove,
            "add_space_prefix": True,
            **_ends(tokenizer),
        }


def _bytes(charsmap: str | list[int]) -> list[int]:
    import base64

    return list(base64.b64decode(charsmap)) if isinstance(charsmap, str) else list(charsmap)
