"""Any checkpoint in another shape: operations on config and tensors together, each with its exactness stated."""

from .edit import EditReport, edit, edit_model
from .heads import KeyValueHeads
from .kind import DropHead, EncoderAlone, ToClassifier, ToEncoder
from .layers import DropLayers, GrowLayers, SelectLayers
from .operation import Operation, apply
from .subject import Outcome, Subject, SurgeryError
from .ties import Tie, Untie
from .vocabulary import ExtendVocabulary, KeepTokens, PadVocabulary, TrimVocabulary


__all__ = [
    "DropHead",
    "DropLayers",
    "EditReport",
    "EncoderAlone",
    "ExtendVocabulary",
    "GrowLayers",
    "KeepTokens",
    "KeyValueHeads",
    "Operation",
    "Outcome",
    "PadVocabulary",
    "SelectLayers",
    "Subject",
    "SurgeryError",
    "Tie",
    "ToClassifier",
    "ToEncoder",
    "TrimVocabulary",
    "Untie",
    "apply",
    "edit",
    "edit_model",
]
