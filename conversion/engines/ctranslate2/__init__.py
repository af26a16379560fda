"""CTranslate2: what its kernels lack, its specification of a model, its vocabulary, and the proof."""

import copy
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ...errors import ConversionError
from ...verification import Check
from ..fields import refuse
from .kernels import ctranslate2_package
from .lacks import stacks_in_the_way
from .proof import check, integers
from .spec import build_spec
from .vocabulary import register, tokens_of


NAME = "CTranslate2"
TAKES_COMPANIONS = False
USE = "Decoders run as `ctranslate2.Generator`, encoder-decoders as `Translator`, encoders as `Encoder`."
# As the engine calls them -> what the proof calls what they round weights to.
QUANTIZATIONS = {
    None: None, "float32": None, "float16": "float16", "bfloat16": "bfloat16", "int16": "int16", "int8": "int8",
    "int8_float32": "int8", "int8_float16": "int8", "int8_bfloat16": "int8",
}  # fmt: skip


def refuse_unrepresentable(config: Any) -> None:
    """`NotRepresentable`, naming every field that the engine does not compute."""
    refuse(NAME, stacks_in_the_way(config))


def losses(model: PreTrainedModel, tokenizer: Any = None) -> list[str]:
    """
    What the engine leaves out of a model of ours, with or without weights.

    Raises:
        NotRepresentable: as `refuse_unrepresentable`.
        ConversionError: for a decoder that is no language model.
    """
    refuse_unrepresentable(model.config)
    return _left_behind(model)


def _left_behind(model: PreTrainedModel) -> list[str]:
    if model.config.is_encoder_decoder or model.config.is_causal:
        if not model.can_generate():
            raise ConversionError(
                f"The engine's decoders are language models, and {type(model).__name__} has no head that gives tokens. "
                "Export it with transformers or to ONNX, or convert the model that its head was put on."
            )
        return []
    return [f"The engine's encoders give hidden states: the head of {type(model).__name__} stays behind"]


def write(model: PreTrainedModel, tokenizer: Any, folder: Path, quantization: str | None) -> list[str]:
    """
    Write a model of ours.

    Args:
        model: ours, without anything that `refuse_unrepresentable` names.
        tokenizer: its tokenizer, or `None`.
        folder: which exists.
        quantization: of the weights, a key of `QUANTIZATIONS`; `None`: as they are stored.

    Returns:
        notes.
    """
    # The package rounds to integers in place.
    spec = build_spec(copy.deepcopy(model) if str(quantization).startswith("int") else model)
    notes = register(spec, model.config, tokenizer)
    notes += _left_behind(model)
    spec.validate()
    spec.optimize(quantization=quantization)
    spec.save(str(folder))
    return notes


def prove(
    folder: Path, model: PreTrainedModel, tokenizer: Any, quantization: str | None
) -> tuple[list[Check], list[str]]:
    """Run the written model beside ours, which is in float32: what was compared, and notes."""
    config, rounded = model.config, QUANTIZATIONS[quantization]
    stacks = (config.encoder, config.decoder) if config.is_encoder_decoder else (config, config)
    source, target = (tokens_of(tokenizer, stack.vocab_size) for stack in stacks)
    tokens = {"source": source, "target": target}
    checks = check(folder, model, tokens, rounded)
    return checks, integers(folder, model, tokens) if rounded == "int8" else []


def version() -> str:
    return f"ctranslate2 {ctranslate2_package().__version__}"


def refuse_quantization(quantization: str | None) -> None:
    if quantization not in QUANTIZATIONS:
        raise ConversionError(
            f"CTranslate2 has no quantization {quantization!r}. Use one of {', '.join(filter(None, QUANTIZATIONS))}."
        )
