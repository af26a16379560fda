"""Any checkpoint in another shape: operations on config and tensors together, each with its exactness stated."""

from .edit import EditReport, edit, edit_model
from .layers import DropLayers, GrowLayers, SelectLayers
from .operation import Operation, apply
from .subject import Outcome, Subject, SurgeryError


__all__ = [
    "DropLayers",
    "EditReport",
    "GrowLayers",
    "Operation",
    "Outcome",
    "SelectLayers",
    "Subject",
    "SurgeryError",
    "apply",
    "edit",
    "edit_model",
]
