"""GGUF files for llama.cpp: which of its architectures a config is, the file, and the proof."""

from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ....model.configuration_variant import VariantConfig
from ...errors import ConversionError
from ...gguf_files.architectures import ARCHITECTURES
from ...gguf_files.container import gguf_package
from ...skeleton import stored_tensors
from ...translation import translation_to_native
from ...verification import Check
from .file import FORMATS, OF_DTYPE, write_file
from .keys import rotations
from .proof import check
from .target import Config, Target, as_stored, head_of, target_of, without_head
from .vocabulary import NoVocabulary, vocabulary_of


NAME = "GGUF, llama.cpp"
FILE = "model.gguf"
TAKES_COMPANIONS = False
USE = f"llama.cpp and what is built on it run `{FILE}`; `hf-variants convert` reads it back."
# What a file can hold of each kind of model; heads of encoders stay behind.
WRITTEN = ("VariantForCausalLM", "VariantForConditionalGeneration", "VariantModel", "VariantForMaskedLM")


def refuse_unrepresentable(config: Config) -> None:
    """`NotRepresentable`, naming every field that none of llama.cpp's architectures has."""
    target_of(config)


def refuse_quantization(quantization: str | None) -> None:
    if quantization is not None and quantization not in FORMATS:
        raise ConversionError(f"Files are not written in {quantization!r}. Use one of {', '.join(FORMATS)}.")


def version() -> str:
    gguf_package()
    return f"gguf {version_of('gguf')}"


def losses(model: PreTrainedModel, tokenizer: Any = None) -> list[str]:
    """
    What a file leaves out of a model of ours, with or without weights, and of its tokenizer, or llama.cpp computes in
    another way.

    Raises:
        ConversionError: as `refuse_unrepresentable` and `write`.
    """
    body, notes = body_of(model)
    target = target_of(body.config)
    _, said = ({}, []) if tokenizer is None else _vocabulary(tokenizer, _vocabulary_size(target), target)
    return [*notes, *_otherwise(target.config), *said]


def write(model: PreTrainedModel, tokenizer: Any, folder: Path, quantization: str | None) -> list[str]:
    """
    Write a model of ours as `FILE`.

    Args:
        model: ours, without anything that `refuse_unrepresentable` names.
        tokenizer: its tokenizer, or `None`.
        folder: which exists.
        quantization: of the matrices, a key of `FORMATS`; `None`: as they are stored.

    Returns:
        notes.
    """
    body, notes = body_of(model)
    target = target_of(body.config)
    wanted = OF_DTYPE[body.dtype] if quantization is None else FORMATS[quantization]
    native = _native_tensors(body, target)
    keys = {**target.keys, **_learned(target, native), **_general(body)}
    vocabulary, said = _vocabulary(tokenizer, _vocabulary_size(target), target)
    tensors = [(name, part.make(native.__getitem__)) for name, part in target.parts.items()]
    tensors += target.settings.items()
    narrow = write_file(folder / FILE, target.architecture, keys | vocabulary, tensors, wanted)
    if narrow:
        notes.append(f"In F16, because their rows are no whole blocks of {wanted}: {len(narrow)} matrices")
    notes += _otherwise(target.config)
    return [f"llama.cpp's architecture {target.architecture}", *notes, *target.notes, *said]


def _otherwise(config: Config) -> list[str]:
    """What llama.cpp computes in another way, up to rounding or from a length on."""
    stacks = (config,) if isinstance(config, VariantConfig) else (config.encoder, config.decoder)
    notes = []
    if any("gelu" in layer.hidden_act for stack in stacks for layer in stack.per_layer_config):
        notes.append("llama.cpp looks GELU up in a table of its tanh form in half precision")
    kinds = {rotation["rope_type"] for stack in stacks for rotation in rotations(stack).values()}
    if "longrope" in kinds:
        notes.append("llama.cpp takes the long factors by the length of its context, transformers by that of the text")
    return notes


def body_of(model: PreTrainedModel) -> tuple[PreTrainedModel, list[str]]:
    """
    What a file holds of a model, and a note on what stays behind.

    Raises:
        ConversionError: for classes that a file does not hold.
    """
    name, causal = type(model).__name__, getattr(model.config, "is_causal", True)
    if name not in WRITTEN or (name == "VariantModel" and causal):
        raise ConversionError(
            f"A GGUF file holds language models and bare encoders, and {name} is neither. Export it with transformers, or "
            "convert the model that its head was put on."
        )
    if name != "VariantForMaskedLM":
        return model, []
    return model.base_model, [f"The file gives hidden states: the head of {name} stays behind"]


def _native_tensors(body: PreTrainedModel, target: Target) -> dict[str, torch.Tensor]:
    """By native names, the tensors of a model without its pooler."""
    state = body.state_dict()
    names = [name for name in stored_tensors(body) if "pooler" not in name.split(".") or target.config.pooler]
    translation = translation_to_native(
        target.family, head_of(target.config), body, target.model, names, state.__getitem__, target.config
    )
    tensors = translation.tensors()
    return dict(as_stored(target.model)(tensors) if ARCHITECTURES[target.architecture].stored_names else tensors)


def _learned(target: Target, native: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """The parameters of learned activations, one value per layer in order."""
    found: dict[str, list[float]] = {}
    for name, tensor in native.items():
        key = f"xielu.{name.rpartition('.')[2]}"
        if key in target.keys:
            found.setdefault(key, []).append(float(tensor.float().item()))
    return found


def _general(body: PreTrainedModel) -> dict[str, Any]:
    names = gguf_package().Keys.General
    return {names.TYPE: "model", names.SIZE_LABEL: _size_label(body.num_parameters())}


def _size_label(parameters: int) -> str:
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{letter}"
    return str(parameters)


def _vocabulary_size(target: Target) -> int:
    return (target.config if head_of(target.config) != "seq2seq_lm" else target.config.encoder).vocab_size


def _vocabulary(tokenizer: Any, size: int, target: Target) -> tuple[dict[str, Any], list[str]]:
    """The keys of a tokenizer, or of none, with the reason."""
    told = target.keys.get("tokenizer.ggml.model")
    if tokenizer is None:
        reason = "there is none beside the model"
    else:
        try:
            made = vocabulary_of(tokenizer, size, target.architecture)
            if told in (None, made["tokenizer.ggml.model"]):
                return made, []
            reason = f"llama.cpp tells a {target.family.model_type} by another kind of tokenizer"
        except NoVocabulary as error:
            reason = str(error)
    if told is not None:
        raise ConversionError(
            f"The tokenizer is not in the file ({reason}), and llama.cpp tells a {target.family.model_type} model by it. "
            "Put its tokenizer beside the model."
        )
    note = f"The file has no vocabulary ({reason}): llama.cpp takes and gives ids alone"
    return {"tokenizer.ggml.model": "no_vocab"}, [note]


def prove(
    folder: Path, model: PreTrainedModel, tokenizer: Any, quantization: str | None
) -> tuple[list[Check], list[str]]:
    """Read the file back, and compare it with ours, which is in float32: what was compared, and notes."""
    body, _ = body_of(model)
    return check(folder / FILE, body, without_head(body.config), tokenizer)
