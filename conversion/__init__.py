"""Native checkpoints in, variants out again, with proof. A family per native type, each written once for both ways."""

from typing import TYPE_CHECKING, Any

from .errors import ConversionError, NotRepresentable, UnsupportedModelType, VerificationFailed
from .family import supported_model_types
from .in_memory import from_native, from_x_transformers, to_native
from .on_disk import convert, export
from .report import Report
from .torch_modules import from_torch, from_torch_seq2seq, to_torch
from .verification import VerificationReport, verify


if TYPE_CHECKING:
    from .adapters import convert_adapter, export_adapter, load_adapter

__all__ = [
    "ConversionError",
    "NotRepresentable",
    "Report",
    "UnsupportedModelType",
    "VerificationFailed",
    "VerificationReport",
    "convert",
    "convert_adapter",
    "export",
    "export_adapter",
    "from_native",
    "from_torch",
    "from_torch_seq2seq",
    "from_x_transformers",
    "load_adapter",
    "supported_model_types",
    "to_native",
    "to_torch",
    "verify",
]


def __getattr__(name: str) -> Any:
    # With them comes peft, which takes as long to import as all else where bitsandbytes is installed.
    if name in ("convert_adapter", "export_adapter", "load_adapter"):
        from . import adapters

        return getattr(adapters, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
