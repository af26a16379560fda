"""What is trained on: examples whose order hangs on a seed alone, and held-out ones that are the same for all."""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .tasks import IGNORED, Task, make_task


# Tokens of held-out text, and examples of a task, in each of the two parts.
HELD_OUT_SHARE, HELD_OUT_TOKENS, HELD_OUT_EXAMPLES = 0.05, 8192, 128
PARTS = ("validation", "test")

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Data:
    """
    A source of examples.

    Attributes:
        vocab_size: tokens, with the one that masks where `masked` is set.
        length: tokens of an example in training.
        masked: share of tokens that an encoder guesses; 0 for decoders.
        padding: up to which share of an example is padding on the right.
        digest: of everything that examples hang on but the seed.
    """

    vocab_size: int
    length: int
    masked: float
    padding: float
    digest: str

    def example(self, seed: int, index: int) -> Batch:
        """
        Of training: `input_ids`, `labels` and `attention_mask`, (length,) int64. Labels are the tokens, where they are
        asked for, and -100 elsewhere.
        """
        raise NotImplementedError

    def held_out(self, part: str, size: int | None = None) -> list[Batch]:
        """Batches of (16, length) of one of `PARTS`; of another size than training's, where one is given."""
        raise NotImplementedError

    @cached_property
    def blind_loss(self) -> float:
        """The least loss on the test part for who knows how often each answer comes, and nothing else; in nats."""
        labels = torch.cat([batch["labels"].flatten() for batch in self.held_out("test")])
        counts = labels[labels != IGNORED].bincount().double()
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * shares.log()).sum())

    @property
    def passes(self) -> Callable[[int], float]:
        """Examples -> how often the data is gone through; 0 where it never repeats."""
        return lambda examples: 0.0

    def _finished(self, tokens: np.ndarray, labels: np.ndarray, random: np.random.Generator) -> Batch:
        """With masks and padding, which one generator decides."""
        ids, targets = torch.from_numpy(tokens.copy()).long(), torch.from_numpy(labels.copy()).long()
        mask = torch.ones_like(ids)
        if self.masked:
            hidden = torch.from_numpy(random.random(len(ids)) < self.masked)
            hidden[random.integers(len(ids))] = True
            targets[~hidden] = IGNORED
            ids[hidden] = self.vocab_size - 1
        if self.padding:
            kept = random.integers(math.ceil((1 - self.padding) * len(ids)), len(ids) + 1)
            mask[kept:] = 0
            ids[kept:] = 0
            targets[kept:] = IGNORED
        return {"input_ids": ids, "labels": targets, "attention_mask": mask}


@dataclass(frozen=True)
class Tokens(Data):
    """Windows of a text, in an order that the seed draws, each once before any comes again."""

    ids: np.ndarray
    # Tokens of each part that is held out, at the end of the text.
    kept_back: int

    @cached_property
    def windows(self) -> int:
        """How many there are to train on."""
        return (len(self.ids) - 2 * self.kept_back) // self.length

    @property
    def passes(self) -> Callable[[int], float]:
        return lambda examples: examples / self.windows

    def example(self, seed: int, index: int) -> Batch:
        turn, index = divmod(index, self.windows)
        start = int(self._order(seed, turn)[index]) * self.length
        window = self.ids[start : start + self.length]
        return self._finished(window, window, np.random.default_rng([seed, turn, index]))

    def _order(self, seed: int, turn: int) -> np.ndarray:
        if self._drawn.get("turn") != (seed, turn):
            self._drawn.update(turn=(seed, turn), order=np.random.default_rng([seed, turn]).permutation(self.windows))
        return self._drawn["order"]

    @cached_property
    def _drawn(self) -> dict[str, Any]:
        return {}

    def held_out(self, part: str, size: int | None = None) -> list[Batch]:
        size = size or self.length
        end = len(self.ids) - (0 if part == "test" else self.kept_back)
        ids = self.ids[end - self.kept_back : end]
        random = np.random.default_rng(0)
        windows = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
        if not windows:
            raise ValueError(
                f"The held-out text has {len(ids)} tokens, fewer than `lengths` or `data.length` asks for, {size}. "
                "Give a longer text, or a shorter length."
            )
        return _stacked(self._finished(window, window, random) for window in windows)


@dataclass(frozen=True)
class Examples(Data):
    """Of a task: as many as are wanted."""

    task: Task

    def example(self, seed: int, index: int) -> Batch:
        random = np.random.default_rng([seed, index])
        return self._finished(*self.task.example(random, self.task.size(), held_out=False), random)

    def held_out(self, part: str, size: int | None = None) -> list[Batch]:
        # Behind all seeds of training.
        random = np.random.default_rng([2**31 + PARTS.index(part)])
        size = size or self.task.size()
        return _stacked(
            self._finished(*self.task.example(random, size, held_out=True), random) for _ in range(HELD_OUT_EXAMPLES)
        )

    @cached_property
    def blind_loss(self) -> float:
        return math.log(self.task.choices)


def _stacked(examples: Iterator[Batch]) -> list[Batch]:
    found = list(examples)
    return [stack(found[start : start + 16]) for start in range(0, len(found), 16)]


def stack(examples: list[Batch]) -> Batch:
    """(length,) each -> (batch, length)."""
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def read_data(settings: dict[str, Any], folder: Path) -> Data:
    """
    What a plan's `data` says.

    Args:
        settings: `task` and its options; or `text`, a file, or `dataset`, what `datasets.load_dataset` takes, with its
            `column` and `split`; with `length`, and `tokens`: `"bytes"`, `"characters"` or a tokenizer's folder or Hub id.
            With any: `masked`, `padding`.
        folder: that a relative path starts from.

    Raises:
        ValueError: for settings that make no data; `OSError` if a file cannot be read.
    """
    settings = dict(settings)
    masked, padding = (_share(settings, name) for name in ("masked", "padding"))
    sources = [name for name in ("task", "text", "dataset") if name in settings]
    if len(sources) != 1:
        raise ValueError("`data` names no source, or several. Give one of `task`, `text` and `dataset`.")
    if sources == ["task"]:
        task = make_task(settings.pop("task"), settings)
        digest = _digest(repr(task), str(masked), str(padding))
        return Examples(task.vocab_size + bool(masked), task.length(task.size()), masked, padding, digest, task)
    text = _read_text(settings, folder)
    ids, vocab_size = _tokenized(text, settings.pop("tokens", "bytes"), folder)
    length = settings.pop("length", 128)
    kept_back = min(settings.pop("held_out", HELD_OUT_TOKENS), int(len(ids) * HELD_OUT_SHARE))
    if (limit := settings.pop("limit", None)) is not None:
        # Of what is trained on alone.
        ids = np.concatenate([ids[: min(limit, len(ids) - 2 * kept_back)], ids[len(ids) - 2 * kept_back :]])
    if settings:
        raise ValueError(
            f"`data.{next(iter(settings))}` is no setting. A text has: tokens, length, limit, held_out, masked, padding."
        )
    digest = _digest(hashlib.sha256(ids.tobytes()).hexdigest(), str((kept_back, length, masked, padding)))
    found = Tokens(vocab_size + bool(masked), length, masked, padding, digest, ids, kept_back)
    if found.windows < 1 or kept_back < length:
        raise ValueError(
            f"The text has {len(ids):,} tokens, too few for windows of {length}, of which {HELD_OUT_SHARE:.0%} are held "
            "out twice. Give a longer text, or a smaller `data.length`."
        )
    return found


def _share(settings: dict[str, Any], name: str) -> float:
    share = settings.pop(name, 0.0)
    if not isinstance(share, (int, float)) or not 0 <= share < 1:
        raise ValueError(f"`data.{name}` is {share!r}. Give a share of at least 0 and below 1.")
    return float(share)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _read_text(settings: dict[str, Any], folder: Path) -> str:
    if "text" in settings:
        path = folder / Path(settings.pop("text")).expanduser()
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text. Convert it, or give another file.") from error
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError("`data.dataset` needs the package datasets. Install it, or give a `text`.") from error
    name, column, split = settings.pop("dataset"), settings.pop("column", "text"), settings.pop("split", "train")
    rows = load_dataset(*([name] if isinstance(name, str) else name), split=split)
    if column not in rows.column_names:
        raise ValueError(f"The data set has no column {column}. Set `data.column` to one of {rows.column_names}.")
    return "\n".join(rows[column])


def _tokenized(text: str, kind: str, folder: Path) -> tuple[np.ndarray, int]:
    """Tokens, int64, and how many kinds there are."""
    if kind == "bytes":
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64), 256
    if kind == "characters":
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        alphabet, ids = np.unique(codes, return_inverse=True)
        return ids.astype(np.int64), len(alphabet)
    from transformers import AutoTokenizer

    place = folder / kind
    tokenizer = AutoTokenizer.from_pretrained(str(place) if place.exists() else kind)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return np.array(ids, dtype=np.int64), len(tokenizer)


class Shuffle:
    """
    The control that must fail: puts examples of training together and permutes the labels of what is asked for over the
    whole batch, so that nothing but how often each comes can be learned.
    """

    def __init__(self, seed: int):
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, examples: list[Batch]) -> Batch:
        batch = stack(examples)
        asked = batch["labels"] != IGNORED
        targets = batch["labels"][asked]
        batch["labels"][asked] = targets[torch.randperm(len(targets), generator=self.random)]
        return batch
