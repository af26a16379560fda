"""Adapters (PEFT's): one that was trained on a native model for its variant, and back."""

from .files import Adapter, is_adapter, read_adapter
from .loading import load_adapter, put_on
from .on_disk import AdapterReport, convert_adapter, export_adapter
from .pair import Pair
from .translation import translate_adapter


__all__ = [
    "Adapter",
    "AdapterReport",
    "Pair",
    "convert_adapter",
    "export_adapter",
    "is_adapter",
    "load_adapter",
    "put_on",
    "read_adapter",
    "translate_adapter",
]
