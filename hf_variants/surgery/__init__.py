"""Any checkpoint in another shape: operations on config and tensors together, each with its exactness stated."""

from .distill import Distillation, Recovery
from .edit import EditReport, edit, edit_model
from .head_size import HeadSize
from .heads import KeyValueHeads
from .influence import DropLeastInfluential
from .kind import DropHead, EncoderAlone, ToClassifier, ToEncoder
from .layers import DropLayers, GrowLayers, SelectLayers
from .norms import FuseNorms
from .operation import Operation, apply
from .positions import ContextLength, DropRotation
from .renorm import AddLayerScale, AddNorms, ToRMSNorm
from .sizes import Heads, HiddenSize, ParameterCount
from .subject import Outcome, Subject, SurgeryError
from .ties import Tie, Untie
from .two_stacks import ToEmbedder, ToEncoderDecoder
from .vocabulary import ExtendVocabulary, KeepTokens, PadVocabulary, TrimVocabulary
from .width import FeedForwardWidth


__all__ = [
    "AddLayerScale",
    "AddNorms",
    "ContextLength",
    "Distillation",
    "DropHead",
    "DropLayers",
    "DropLeastInfluential",
    "DropRotation",
    "EditReport",
    "EncoderAlone",
    "ExtendVocabulary",
    "FeedForwardWidth",
    "FuseNorms",
    "GrowLayers",
    "HeadSize",
    "Heads",
    "HiddenSize",
    "KeepTokens",
    "KeyValueHeads",
    "Operation",
    "Outcome",
    "PadVocabulary",
    "ParameterCount",
    "Recovery",
    "SelectLayers",
    "Subject",
    "SurgeryError",
    "Tie",
    "ToClassifier",
    "ToEmbedder",
    "ToEncoder",
    "ToEncoderDecoder",
    "ToRMSNorm",
    "TrimVocabulary",
    "Untie",
    "apply",
    "edit",
    "edit_model",
]
