"""Synthetic tasks whose answers are known: what is asked at which position follows from what stands before it."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np


# Of labels that are not asked for.
IGNORED = -100


@dataclass(frozen=True)
class Task:
    """
    Makes examples out of a random generator: tokens and labels, both (length,) int64.

    Labels equal the tokens where they are asked for and are -100 elsewhere; a model sees the tokens before a label alone.
    """

    @property
    def vocab_size(self) -> int:
        raise NotImplementedError

    @property
    def choices(self) -> int:
        """How many answers there are, each as likely as the others."""
        raise NotImplementedError

    def length(self, size: int) -> int:
        """Tokens of an example of a size, which is what `lengths` of a plan names."""
        raise NotImplementedError

    def size(self) -> int:
        """That of training."""
        raise NotImplementedError

    def example(self, random: np.random.Generator, size: int, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError


@dataclass(frozen=True)
class Recall(Task):
    """
    Multi-query associative recall (https://arxiv.org/abs/2312.04927): pairs of key and value, then every key once more in
    another order, each followed by its value, which is asked for.

    Args:
        pairs: of an example in training.
        keys, values: how many there are to draw from.
    """

    pairs: int = 8
    keys: int = 64
    values: int = 64

    @property
    def vocab_size(self) -> int:
        return self.keys + self.values

    @property
    def choices(self) -> int:
        return self.values

    def length(self, size: int) -> int:
        return 4 * size

    def size(self) -> int:
        return self.pairs

    def example(self, random: np.random.Generator, size: int, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
        keys = random.choice(self.keys, size, replace=False)
        values = self.keys + random.integers(self.values, size=size)
        order = random.permutation(size)
        # (pairs, 2) -> (2 * pairs,)
        tokens = np.concatenate(
            [np.stack([keys, values], 1).ravel(), np.stack([keys[order], values[order]], 1).ravel()]
        )
        labels = tokens.copy()
        labels[: 2 * size] = IGNORED
        labels[::2] = IGNORED
        return tokens, labels


@dataclass(frozen=True)
class Induction(Task):
    """
    Tokens that are all different, and then a stretch of them again, from its second token on asked for
    (induction heads, https://arxiv.org/abs/2209.11895).

    Args:
        tokens: of the first part, in training; the stretch is half as long.
        symbols: how many tokens there are to draw from.
    """

    tokens: int = 32
    symbols: int = 128

    @property
    def vocab_size(self) -> int:
        return self.symbols

    @property
    def choices(self) -> int:
        return self.symbols

    def length(self, size: int) -> int:
        return size + size // 2

    def size(self) -> int:
        return self.tokens

    def example(self, random: np.random.Generator, size: int, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
        first = random.choice(self.symbols, size, replace=False)
        start = random.integers(size - size // 2 + 1)
        tokens = np.concatenate([first, first[start : start + size // 2]])
        labels = tokens.copy()
        labels[: size + 1] = IGNORED
        return tokens, labels


@dataclass(frozen=True)
class Copy(Task):
    """
    A sequence, a separator, and the sequence again, which is asked for.

    Args:
        tokens: of the sequence, in training.
        symbols: how many tokens there are to draw from, beside the separator.
    """

    tokens: int = 16
    symbols: int = 32

    @property
    def vocab_size(self) -> int:
        return self.symbols + 1

    @property
    def choices(self) -> int:
        return self.symbols

    def length(self, size: int) -> int:
        return 2 * size + 1

    def size(self) -> int:
        return self.tokens

    def example(self, random: np.random.Generator, size: int, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
        first = random.integers(self.symbols, size=size)
        tokens = np.concatenate([first, [self.symbols], first])
        labels = tokens.copy()
        labels[: size + 1] = IGNORED
        return tokens, labels


@dataclass(frozen=True)
class Modular(Task):
    """
    a, b, "=", and (a + b) modulo a prime, which is asked for. Part of all pairs is never trained on
    (https://arxiv.org/abs/2201.02177).

    Args:
        prime: the modulus.
        trained: share of the pairs that are trained on.
    """

    prime: int = 31
    trained: float = 0.6

    @property
    def vocab_size(self) -> int:
        return self.prime + 1

    @property
    def choices(self) -> int:
        return self.prime

    def length(self, size: int) -> int:
        return 4

    def size(self) -> int:
        return 1

    def example(self, random: np.random.Generator, size: int, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
        # The same split for every seed.
        pairs = np.random.default_rng(0).permutation(self.prime**2)
        edge = round(self.trained * len(pairs))
        left, right = divmod(int(random.choice(pairs[edge:] if held_out else pairs[:edge])), self.prime)
        answer = (left + right) % self.prime
        tokens = np.array([left, right, self.prime, answer])
        return tokens, np.array([IGNORED, IGNORED, IGNORED, answer])


TASKS: dict[str, type[Task]] = {"recall": Recall, "induction": Induction, "copy": Copy, "modular": Modular}


def make_task(name: str, options: dict[str, Any]) -> Task:
    """
    A task by its name.

    Raises:
        ValueError: for another name or option.
    """
    if name not in TASKS:
        raise ValueError(f"`data.task` is {name!r}. Use one of: {', '.join(TASKS)}.")
    known = [field.name for field in fields(TASKS[name])]
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"`data.{unknown[0]}` is no option of the task {name}. It has: {', '.join(known)}.")
    task = TASKS[name](**options)
    distinct = {"recall": ("pairs", "keys"), "induction": ("tokens", "symbols")}.get(name)
    if distinct and getattr(task, distinct[0]) > getattr(task, distinct[1]):
        raise ValueError(
            f"`data.{distinct[0]}` is larger than `data.{distinct[1]}`, of which each stands once. Raise the latter."
        )
    return task
