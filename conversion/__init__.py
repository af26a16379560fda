"""Native checkpoints in, variants out again, with proof. A family per native type, each written once for both ways."""

import contextlib

from .errors import ConversionError, NotRepresentable, UnsupportedModelType, VerificationFailed
from .family import supported_model_types
from .torch_modules import from_torch, from_torch_seq2seq, to_torch
from .translate import Report, convert, export, from_native, to_native
from .verification import VerificationReport, verify


# Where peft is not installed, there are no adapters.
with contextlib.suppress(ImportError):
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
    "load_adapter",
    "supported_model_types",
    "to_native",
    "to_torch",
    "verify",
]
