"""Any checkpoint that can be converted, and any of ours, as a variant whose tensors are read one by one."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from . import checkpoint, tensor_files
from .companions import copy_companions
from .errors import ConversionError
from .family import is_variant, read_config, variant_class
from .foreign import is_foreign, open_foreign
from .generation_settings import write_generation_config
from .gguf_source import is_gguf, open_gguf, write_gguf_companions
from .layout import as_transformers_reads, refuse_other_shapes
from .native_source import NativeSource, open_native, refuse_more_layers_than_tensors
from .rules import by_name
from .skeleton import empty_model, stored_tensors
from .translation import check_ties, for_other_heads


@dataclass
class OpenedVariant:
    """
    A checkpoint as a variant, native or ours; no weight is read before it is asked for.

    Attributes:
        source: as the caller named it.
        path: the folder.
        config: ours.
        model_class: ours, for its head.
        load, header: one of our tensors by name, and one of its shape and dtype without values.
        stored: the same for whoever needs no values but copies them.
        apart: names of tensors that the class leaves out and models with another head have (a trained pooler).
        model_type: what it is a checkpoint of.
        deviations: where the arithmetic of a native class differs, and why.
        write_companions: put what travels beside weights and config into a folder whose config.json has been written;
            returns notes on the tokenizer.
        skeleton: the model without memory for its weights.
        native: the same as its own class has it; `None` for one of ours.
        weights: in the folder; `None` for other files.
    """

    source: str
    path: Path
    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    load: tensor_files.TensorSource
    header: tensor_files.TensorSource
    stored: tensor_files.StoredSource
    apart: list[str]
    model_type: str
    deviations: list[str]
    write_companions: Callable[[Path], list[str]]
    skeleton: PreTrainedModel
    native: NativeSource | None = None
    weights: checkpoint.Weights | None = None

    @property
    def files(self) -> Path:
        """What was read: the folder, or the file."""
        return Path(self.source) if is_gguf(self.source) else self.path


def open_variant(source: str | Path, ignore_keys: Iterable[str] = ()) -> OpenedVariant:
    """
    Open whatever `convert` takes, or one of our own folders, as a variant.

    Raises:
        as `convert`; ConversionError for a variant that is quantised, or whose weights are not those of its config.
    """
    if is_foreign(source):
        return _open_foreign(source)
    if is_gguf(source):
        file, opened = open_gguf(Path(source), ignore_keys)
        return _as_variant(str(source), opened, lambda folder: write_gguf_companions(Path(source), file, folder))
    path = checkpoint.resolve_folder(source)
    checkpoint.refuse_adapter(path)
    config = read_config(path)
    if is_variant(config):
        return _open_own(source, path, config)
    opened = open_native(source, ignore_keys)

    def write_companions(folder: Path) -> list[str]:
        notes = copy_companions(path, folder)
        write_generation_config(folder, opened.native, path)
        return notes

    return _as_variant(str(source), opened, write_companions)


def _as_variant(source: str, opened: NativeSource, write_companions: Callable[[Path], list[str]]) -> OpenedVariant:
    model_class = opened.family.variant_class(opened.head)
    target = empty_model(model_class, opened.config)
    translation, layout = opened.translation(target), opened.layout
    apart = {
        ours: native for native, ours in for_other_heads(opened.family, opened.head, layout.apart, target).items()
    }
    load, header = translation.lookup(), translation.lookup(layout.header)
    stored = translation.lookup(unread=layout.stored)
    return OpenedVariant(
        source=source,
        path=opened.path,
        config=opened.config,
        model_class=model_class,
        load=lambda name: layout.load(apart[name]) if name in apart else load(name),
        header=lambda name: layout.header(apart[name]) if name in apart else header(name),
        stored=lambda name: layout.stored(apart[name]) if name in apart else stored(name),
        apart=list(apart),
        model_type=opened.family.model_type,
        deviations=[deviation.reason for deviation in opened.family.deviations_of(opened.config)],
        write_companions=write_companions,
        skeleton=target,
        native=opened,
        weights=opened.weights,
    )


def _open_foreign(source: str | Path) -> OpenedVariant:
    """A checkpoint of another code base."""
    opened = open_foreign(source)
    target, shapes = opened.target()
    steps = opened.plan(shapes)

    def lookup(load: tensor_files.StoredSource) -> Callable[[str], Any]:
        return by_name(steps, lambda some: opened.tensors(some, shapes, load))

    header = lookup(opened.weights.__getitem__)
    return OpenedVariant(
        source=str(source),
        path=opened.path,
        config=opened.config,
        model_class=variant_class(opened.class_name),
        load=lookup(opened.load),
        header=lambda name: header(name).to("meta"),
        stored=lookup(opened.stored),
        apart=[],
        model_type=opened.code_base,
        deviations=[],
        write_companions=opened.write_companions,
        skeleton=target,
    )


def _open_own(source: str | Path, path: Path, config: PreTrainedConfig) -> OpenedVariant:
    """A folder of ours."""
    if getattr(config, "quantization_config", None) is not None:
        raise ConversionError(
            "The checkpoint is quantised (`quantization_config`). Take the model as it was before, or, where its "
            "quantiser can, `model.dequantize()` it and save it."
        )
    model_class = variant_class((config.architectures or ["VariantForCausalLM"])[0])
    weights = checkpoint.weights_of(source, path)
    refuse_more_layers_than_tensors(config, weights)
    model = empty_model(model_class, config)
    refuse_other_shapes(model, weights)
    layout = as_transformers_reads(model, weights)
    names = check_ties(model, layout.names, layout.load)
    if missing := sorted(stored_tensors(model).keys() - set(names)):
        raise ConversionError(
            f"The checkpoint lacks the tensors {', '.join(missing[:6])}. It is incomplete, or the config does not belong "
            "to it."
        )
    if config.dtype not in tensor_files.FLOATS:
        config.dtype = weights.dtype()
    return OpenedVariant(
        source=str(source),
        path=path,
        config=config,
        model_class=model_class,
        load=layout.load,
        header=layout.header,
        stored=layout.stored,
        apart=[name for name in layout.apart if re.search(r"(^|\.)pooler\.", name)],
        model_type=(config.native_leftovers or {}).get("model_type", config.model_type),
        deviations=[],
        write_companions=lambda folder: copy_companions(path, folder),
        skeleton=model,
        weights=weights,
    )
