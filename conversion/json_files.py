"""The small files of strangers: read as what they must be, or refused in a sentence that names file and key."""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import config_keys
from .errors import ConversionError


# More than any such file has; the largest are tokenizers' with some ten million characters.
MAX_JSON_BYTES = 100_000_000
# Numbers of these are made into lists before anything can be compared with the weights.
HEADS = r"(.*_)?(n|num)_(.*_)?heads?(_kv)?"
MAX_COUNTS = {r"(.*_)?(n|num)?_?(hidden_)?layers?": 10_000, HEADS: 100_000, "num_labels": 1_000_000}
# What transformers reads before any class of a config checks its types.
TYPES: dict[str, tuple[type, ...]] = {
    "model_type": (str,), "architectures": (list,), "quantization_config": (dict,), "attn_implementation": (str, dict),
    "dtype": (str, dict), "torch_dtype": (str,), "id2label": (dict,), "label2id": (dict,), "auto_map": (dict,),
}  # fmt: skip
# What torch counts with.
MAX_INTEGER = 2**63 - 1


def read_text(path: Path) -> str:
    """
    The content of a small file.

    Raises:
        ConversionError: if it is no file, is too large, or is not UTF-8.
    """
    if not path.is_file():
        raise ConversionError(f"{path} is not a file. Put the file itself there, or fetch it again.")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ConversionError(
            f"{path} has {path.stat().st_size:,} bytes, and no file of its kind does. Fetch it again."
        )
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConversionError(f"{path} is not UTF-8 ({error}). The file is damaged; fetch it again.") from error


def read_json(path: Path, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """
    The content of a JSON file.

    Args:
        hook: makes something of the pairs of every object, as for `json.loads`.

    Raises:
        ConversionError: as `read_text`, and if it is no JSON.
    """
    try:
        return json.loads(read_text(path), object_pairs_hook=hook)
    except RecursionError:
        raise ConversionError(f"{path} is nested deeper than any file of its kind. Do not trust it.") from None
    except ConversionError:
        raise
    except ValueError as error:
        raise ConversionError(
            f"{path} is not JSON ({error}). The file is damaged; fetch it again, or mend it."
        ) from error


class _Object(dict):
    """A JSON object, with the keys that stand there with several values, of which Python takes the last."""

    contradictions: tuple[str, ...] = ()


def _with_contradictions(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = _Object(pairs)
    if len(values) < len(pairs):
        # NaN differs from itself, and is looked for by itself.
        values.contradictions = tuple(key for key, value in pairs if value != values[key] and value == value)
    return values


def _contradictions(values: Any, key: str = "") -> Iterator[str]:
    """Every key that has several values, with those that lead to it."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    if isinstance(values, _Object):
        yield from (f"{key}.{name}" if key else name for name in values.contradictions)
    for name, value in inner:
        yield from _contradictions(value, key if isinstance(values, list) else f"{key}.{name}" if key else name)


def read_object(
    path: Path, is_read: Callable[[dict[str, Any], str], bool] = lambda values, key: True
) -> dict[str, Any]:
    """
    The content of a JSON file that is an object.

    Args:
        is_read: whether anything reads a key of it; only those must have one value, and finite numbers.

    Raises:
        ConversionError: as `read_json`, and for other content.
    """
    values = read_json(path, _with_contradictions)
    if not isinstance(values, dict):
        raise ConversionError(f"{path} holds {_kind(values)}, not a JSON object. Fetch it again, or mend it.")
    for key in _contradictions(values):
        if is_read(values, key.partition(".")[0]):
            raise ConversionError(
                f"The key {key!r} stands in {path} twice, with two values. Remove the one that is not meant."
            )
    for key, value in _numbers(values):
        if not math.isfinite(value) and is_read(values, key.partition(".")[0]):
            raise ConversionError(f"`{key}` in {path} is {value}, which is no number. Write a number there, or null.")
    return values


def read_config_values(path: Path) -> dict[str, Any]:
    """
    The content of a config.json.

    Raises:
        ConversionError: as `read_object`, and for numbers that nothing can be built of.
    """
    values = read_object(path, _is_read)
    for key, kinds in TYPES.items():
        if (value := values.get(key)) is not None and not isinstance(value, kinds):
            raise ConversionError(
                f"`{key}` in {path} is {_kind(value)}, which means nothing. Correct it or remove it."
            )
    if not all(isinstance(name, str) for name in values.get("architectures") or ()):
        raise ConversionError(f"`architectures` in {path} holds other things than names. Correct it or remove it.")
    for key, value in _numbers(values):
        name = key.rpartition(".")[2]
        limits = [limit for pattern, limit in MAX_COUNTS.items() if re.fullmatch(pattern, name)]
        if abs(value) > min([MAX_INTEGER, *limits]) and (limits or _is_read(values, key.partition(".")[0])):
            raise ConversionError(
                f"`{key}` is {value} in {path}, and no model has so many. The config is damaged; fetch it again."
            )
        if value < 0 and re.fullmatch(HEADS, name):
            raise ConversionError(
                f"`{key}` is {value} in {path}, which is no number of heads. The config is damaged; fetch it again."
            )
    return values


def _is_read(values: dict[str, Any], key: str) -> bool:
    """Whether anything reads a key of a config.json."""
    return key in TYPES or config_keys.may_be_read(values.get("model_type"), key)


def _numbers(values: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number with the keys that lead to it."""
    if isinstance(values, (int, float)) and not isinstance(values, bool):
        yield key, values
    elif isinstance(values, dict):
        for name, value in values.items():
            yield from _numbers(value, f"{key}.{name}" if key else name)
    elif isinstance(values, list):
        for value in values:
            yield from _numbers(value, key)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, (int, float)):
        return "a number"
    return {list: "a list", dict: "a map", str: "a text"}.get(type(value), "null")
