"""ONNX: the graphs of a model, traced by `torch.export`, their weights, and the proof by onnxruntime."""

import copy
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ...errors import ConversionError
from ...family import head_of_variant
from ...native_target import native_config_for
from ...verification import Check, set_attention
from ..export import in_float32
from ..fields import refuse
from .graphs import graphs_of
from .lacks import stacks_in_the_way
from .package import onnx_packages
from .proof import check
from .storage import SharedWeights
from .tracing import traced


NAME = "ONNX, onnxruntime"
USE = (
    "onnxruntime runs the `.onnx` files, which read their weights from the file beside them. Inputs and outputs have the "
    "names that optimum's `ORTModelForCausalLM`, `ORTModelForSeq2SeqLM`, ... use."
)
# As callers name them -> what weights are stored in; the graphs compute in float32.
QUANTIZATIONS = {None: None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What is written is a folder as transformers reads one, with what travels beside a model.
TAKES_COMPANIONS = True


def refuse_unrepresentable(config: Any) -> None:
    """`NotRepresentable`, naming every field that a graph does not compute."""
    refuse(NAME, stacks_in_the_way(config))


def refuse_quantization(quantization: str | None) -> None:
    if quantization not in QUANTIZATIONS:
        raise ConversionError(
            f"ONNX weights are not stored in {quantization!r}. Use one of {', '.join(filter(None, QUANTIZATIONS))}."
        )


def version() -> str:
    *_, onnxruntime = onnx_packages()
    return f"onnx {version_of('onnx')}, by onnxruntime {onnxruntime.__version__}"


def losses(model: PreTrainedModel, tokenizer: Any = None) -> list[str]:
    """
    What the graphs leave out of a model of ours, with or without weights.

    Raises:
        NotRepresentable: as `refuse_unrepresentable`.
        ConversionError: for a class that no graph is written of.
    """
    config = model.config
    refuse_unrepresentable(config)
    if type(model).__name__ == "VariantForMultipleChoice":
        raise ConversionError(
            "Graphs take one sequence a row, and VariantForMultipleChoice takes several choices. Export it with "
            "transformers, or convert the model that its head was put on."
        )
    stacks = (config.encoder, config.decoder) if config.is_encoder_decoder else (config,)
    if model.can_generate() and not stacks[-1].is_causal:
        raise ConversionError(
            "Graphs of a language model take tokens one by one, and with `is_causal=False` a token changes those before it. "
            "Set `is_causal=True`, or export a VariantForMaskedLM."
        )
    notes = []
    if any(stack.type_vocab_size and (stack.is_causal or config.is_encoder_decoder) for stack in stacks):
        notes.append("Decoders and encoder-decoders are given no token types, as by default")
    if any(stack.task_type_vocab_size for stack in stacks):
        notes.append("The graph is given no task types, as by default")
    if any(stack.sinusoidal_table_grows and stack.position_embedding_type == "sinusoidal" for stack in stacks):
        longest = min(stack.max_position_embeddings for stack in stacks)
        notes.append(f"The table of positions does not grow: more than {longest} tokens are an error")
    return notes


def write(model: PreTrainedModel, tokenizer: Any, folder: Path, quantization: str | None) -> list[str]:
    """
    Write the graphs of a model of ours, their weights, and a config.json beside them.

    Args:
        model: ours, without anything that `refuse_unrepresentable` names. It is cast to float32 in place, in which it is
            traced.
        folder: which exists.
        quantization: what weights are stored in, a key of `QUANTIZATIONS`; `None`: as they are.

    Returns:
        notes.
    """
    wanted = QUANTIZATIONS[quantization]
    dtypes = {name: wanted or tensor.dtype for name, tensor in model.state_dict().items()}
    model = in_float32(model)
    set_attention(model, "eager" if _lacks_sdpa(model.config) else "sdpa")
    graphs = graphs_of(model)
    weights = SharedWeights(folder / f"{graphs[0].file}_data", dtypes)
    for graph in graphs:
        written = traced(graph)
        weights.move(written)
        onnx_packages()[0].save(written, folder / graph.file)
    return [*_write_config(model, folder), *losses(model)]


def _lacks_sdpa(config: Any) -> bool:
    """Whether torch's sdpa, or its translation, which does not broadcast a key/value head, lacks what a model has."""
    stacks = (config.encoder, config.decoder) if config.is_encoder_decoder else (config,)
    broadcasts = any(layer.broadcast_key_value for stack in stacks for layer in stack.per_layer_config)
    return broadcasts or bool(config.unsupported_attention_features("sdpa"))


def _write_config(model: PreTrainedModel, folder: Path) -> list[str]:
    """That of a native type where one is the same, which is what others' code knows, or else ours."""
    config, name = copy.deepcopy(model.config), type(model).__name__
    note = "No native type computes the same: config.json is the variant's own, which needs hf-variants"
    try:
        head = head_of_variant(name)
        family, config = native_config_for(config, head=head)
        name = family.native_class(head).__name__
        note = f"config.json is that of a {family.model_type}, which computes the same"
    except ConversionError:
        pass
    config.architectures = [name]
    config.save_pretrained(folder)
    return [note]


def prove(
    folder: Path, model: PreTrainedModel, tokenizer: Any, quantization: str | None
) -> tuple[list[Check], list[str]]:
    """Run the written graphs beside ours, which is in float32: what was compared, and notes."""
    return check(folder, model, None if quantization in (None, "float32") else quantization), []
