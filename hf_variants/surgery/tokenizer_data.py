"""tokenizer.json as data: which pieces a vocabulary cannot do without, and the same under other numbers."""

import copy
import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from ..conversion.companions import TOKENIZER_CONFIG, tokenizer_files
from ..conversion.tokenization import differences, load_tokenizer
from .subject import Subject, SurgeryError


def load(subject: Subject) -> Any:
    """
    The tokenizer of a subject.

    Raises:
        SurgeryError: if there is none, or none that the tokenizers library runs.
    """
    if subject.tokenizer_path is None:
        raise SurgeryError("There is no tokenizer beside a model in memory. Edit the checkpoint's folder.")
    tokenizer = load_tokenizer(subject.tokenizer_path)
    if isinstance(tokenizer, str):
        raise SurgeryError(
            f"The vocabulary needs the tokenizer, and {tokenizer[0].lower()}{tokenizer[1:]}. Add its files."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise SurgeryError(
            f"{type(tokenizer).__name__} is not run by the tokenizers library, so its vocabulary cannot be rewritten. "
            "Convert it to a tokenizer.json first."
        )
    if subject.tokenizer_json is not None:
        tokenizer._tokenizer = Tokenizer.from_str(subject.tokenizer_json)
    return tokenizer


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    """Piece -> id, of any kind of model."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary
    return {piece: number for number, (piece, _) in enumerate(vocabulary)}


def _parts(data: Any) -> Iterator[Mapping[str, Any]]:
    """Every object in the data, at any depth."""
    if isinstance(data, dict):
        yield data
        for value in data.values():
            yield from _parts(value)
    elif isinstance(data, list) and data and isinstance(data[0], dict):
        for value in data:
            yield from _parts(value)


def closed(data: Mapping[str, Any], wanted: set[int], tokenizer: Any) -> set[int]:
    """
    The ids that a vocabulary with these wanted ones needs: special and added tokens, what unknown text becomes, the single
    bytes, and the pieces from which wanted ones are merged.
    """
    model = data["model"]
    vocabulary = _vocabulary(model)
    kept = set(wanted) | {entry["id"] for entry in data["added_tokens"]}
    kept |= {token for token in tokenizer.all_special_ids if token is not None}
    kept |= {number for part in _parts(data["post_processor"]) for number in _special_ids(part)}
    if model.get("unk_token") in vocabulary:
        kept.add(vocabulary[model["unk_token"]])
    if model.get("unk_id") is not None:
        kept.add(model["unk_id"])
    around = [data[name] for name in ("normalizer", "pre_tokenizer", "decoder")]
    if any(part.get("type") == "ByteLevel" for place in around for part in _parts(place)):
        kept |= {vocabulary[byte] for byte in pre_tokenizers.ByteLevel.alphabet() if byte in vocabulary}
    if model.get("byte_fallback"):
        kept |= {vocabulary[byte] for byte in (f"<0x{i:02X}>" for i in range(256)) if byte in vocabulary}
    if model["type"] == "Unigram":
        # What unknown characters cost is counted from the least likely piece.
        kept.add(min(range(len(model["vocab"])), key=lambda number: model["vocab"][number][1]))
    if model["type"] == "BPE":
        pieces = {number: piece for piece, number in vocabulary.items()}
        merges = _Merges(model)
        for number in list(kept):
            if number in pieces:
                kept |= {vocabulary[part] for part in merges.parts_of(pieces[number]) if part in vocabulary}
    return kept


def _special_ids(part: Mapping[str, Any]) -> list[int]:
    """The token ids in one part of a post-processor."""
    ids = [number for number in part.get("ids", ()) if isinstance(number, int)]
    return ids + [part[name][1] for name in ("sep", "cls") if isinstance(part.get(name), list)]


class _Merges:
    """The merges of a BPE model, in their order."""

    def __init__(self, model: Mapping[str, Any]):
        pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self.prefix = model.get("continuing_subword_prefix") or ""
        self.suffix = model.get("end_of_word_suffix") or ""

    def joined(self, a: str, b: str) -> str:
        return a + b.removeprefix(self.prefix)

    def parts_of(self, piece: str) -> set[str]:
        """Everything that a piece is on the way from its characters to itself."""
        body = piece.removesuffix(self.suffix) if self.suffix else piece
        has_prefix = bool(self.prefix) and body.startswith(self.prefix)
        letters = list(body.removeprefix(self.prefix) if has_prefix else body)
        symbols = [self.prefix + c if (i or has_prefix) else c for i, c in enumerate(letters)]
        if symbols and len(body) < len(piece):
            symbols[-1] += self.suffix
        found = set(symbols)
        while len(symbols) > 1:
            last = len(self.ranks)
            ranked = [(self.ranks.get(pair, last), place) for place, pair in enumerate(pairwise(symbols))]
            rank, place = min(ranked)
            if rank == last:
                break
            symbols[place : place + 2] = [self.joined(symbols[place], symbols[place + 1])]
            found.add(symbols[place])
        return found


def renumbered(data: Mapping[str, Any], numbers: Mapping[int, int]) -> dict[str, Any]:
    """A tokenizer of which only these ids are left, under their new numbers."""
    made = copy.deepcopy(dict(data))
    model = made["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {piece: numbers[old] for piece, old in model["vocab"].items() if old in numbers}
        # Ids in their order, as in files that the library writes.
        model["vocab"] = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    else:
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in numbers]
    if model.get("unk_id") is not None:
        model["unk_id"] = numbers[model["unk_id"]]
    if model["type"] == "BPE":
        merges = _Merges(model)
        model["merges"] = [
            list(pair)
            for pair in merges.ranks
            if all(piece in model["vocab"] for piece in (*pair, merges.joined(*pair)))
        ]
    for entry in made["added_tokens"]:
        entry["id"] = numbers[entry["id"]]
    for part in _parts(made["post_processor"]):
        if "ids" in part:
            part["ids"] = [numbers[number] for number in part["ids"]]
        for name in ("sep", "cls"):
            if isinstance(part.get(name), list):
                part[name] = [part[name][0], numbers[part[name][1]]]
    if made.get("padding"):
        made["padding"]["pad_id"] = numbers[made["padding"]["pad_id"]]
    return made


def write(subject: Subject, folder: Path) -> list[str]:
    """
    Put the tokenizer of a subject into a folder in the place of the one that is there.

    Returns:
        in which respects `AutoTokenizer` reads another one from there.
    """
    tokenizer = load(subject)
    for path in tokenizer_files(folder):
        path.unlink()
    # What was told of added tokens was told with their old numbers.
    tokenizer.init_kwargs.pop("added_tokens_decoder", None)
    tokenizer.save_pretrained(folder)
    left = _differences(tokenizer, folder)
    if left:
        # The class makes a tokenizer of its own of the vocabulary; this one takes the file as it is.
        path = folder / TOKENIZER_CONFIG
        settings = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(
            json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )
        left = [note for note in _differences(tokenizer, folder) if not note.startswith("classes ")]
    return left


def _differences(tokenizer: Any, folder: Path) -> list[str]:
    made = load_tokenizer(folder)
    return [made] if isinstance(made, str) else differences(tokenizer, made)
