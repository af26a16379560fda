"""Draws damage at random: bytes and values of header, index, config and tokenizer files."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .corpus import NATIVE, VARIANT, Case, sharded


VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    2**31,
    2**63,
    10**20,
    -(2**40),
    0.0,
    0.5,
    -1.5,
    1e-300,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "llama",
    "\x1b[31m",
    "none",
    "../..",
    [],
    [0],
    ["full_attention"],
    [[]],
    {},
    {"a": 1},
    {"rope_type": "yarn"},
)
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "model.safetensors",
    "index",
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container inside a value with each of its keys."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


def _value(draw: random.Random, content: Any) -> Any:
    """Another value, a lost key or a new one somewhere."""
    places = _places(content)
    holder, key = draw.choice(places)
    what = draw.random()
    if what < 0.15 and isinstance(holder, dict):
        del holder[key]
    elif what < 0.25 and isinstance(holder, dict):
        other, elsewhere = draw.choice(places)
        holder[draw.choice((str(elsewhere), "x" * 300, "\x07"))] = other[elsewhere]
    elif what < 0.4:
        other, elsewhere = draw.choice(places)
        # A copy, so that nothing holds itself.
        holder[key] = json.loads(json.dumps(other[elsewhere]))
    else:
        holder[key] = draw.choice(VALUES)
    return content


def _bytes(draw: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    # The first bytes say most: the length of a header and the header itself.
    end = min(len(changed), draw.choice((9, 400, len(changed))))
    for _ in range(draw.choice((1, 1, 3, 20))):
        place = draw.randrange(end)
        what = draw.random()
        if what < 0.6:
            changed[place] = draw.randrange(256)
        elif what < 0.8:
            del changed[place : place + draw.randrange(1, 40)]
            end = min(end, len(changed)) or 1
        else:
            changed[place:place] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 20)))
    return bytes(changed)


def _header(draw: random.Random, content: bytes) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    header = json.dumps(_value(draw, json.loads(content[8 : 8 + length]))).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def case(seed: int) -> tuple[Case, str, tuple[str, str]]:
    """One draw: an input, a command and a checkpoint."""
    draw = random.Random(seed)
    file = draw.choice(FILES)
    kind = draw.choice(("native", "variant"))
    of = (kind, draw.choice(("llama", "llama", "gpt2", "bart", "bert")))
    able = NATIVE if kind == "native" else VARIANT
    # It takes as long as all others together where the damage is none.
    command = "verify" if draw.random() < 0.03 else draw.choice([name for name in able if name != "verify"])
    by_bytes = draw.random() < 0.4

    def change(folder: Path) -> None:
        if file == "index":
            sharded(folder)
        path = folder / ("model.safetensors.index.json" if file == "index" else file)
        if not path.is_file():
            path = folder / "config.json"
        content = path.read_bytes()
        path.unlink()
        rewrite: Callable[[random.Random, bytes], bytes] = _bytes
        if not by_bytes:
            rewrite = (
                _header if file == "model.safetensors" else lambda d, c: json.dumps(_value(d, json.loads(c))).encode()
            )
        path.write_bytes(rewrite(draw, content))

    return Case(f"fuzz: {file}", str(seed), change), command, of
