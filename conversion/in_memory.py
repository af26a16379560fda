"""Models in memory: from native ones, from checkpoints of any kind, and back."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .errors import ConversionError
from .family import head_of_variant
from .foreign import ForeignCheckpoint, is_foreign, open_foreign, open_x_transformers
from .generation_settings import copy_generation_config, stored_generation_config
from .gguf_source import is_gguf, open_gguf
from .native_source import open_native, opened_in_memory
from .native_target import exported, target_of, without_pooler
from .report import note_folds, report_of
from .skeleton import empty_model, stored_tensors


def from_native(
    source: str | Path | PreTrainedModel,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    ignore_keys: Iterable[str] = (),
) -> PreTrainedModel:
    """
    Our model with a native model's weights.

    Args:
        source: a loaded native model, a checkpoint folder, a Hub id, a GGUF file, or a checkpoint of another code base
            (see `foreign`).
        dtype: of the weights; by default as they are.
        device_map: as in `from_pretrained`.
        ignore_keys: keys of the native config that its class reads and that are known to be meaningless all the same.

    Returns:
        the model in evaluation mode; it shares no memory with `source`.

    Raises:
        UnsupportedModelType: if the architecture needs a mechanism that is missing here; before any weight is read.
        ConversionError: if config and weights do not fit each other, or a config key is not understood.
    """
    if isinstance(source, (str, Path)):
        if is_gguf(source):
            return _from_gguf(Path(source), dtype, device_map, ignore_keys)
        if is_foreign(source):
            return _from_foreign(source, dtype, device_map)
        opened = open_native(source, ignore_keys)
    else:
        opened = opened_in_memory(source, ignore_keys)
    target_class = opened.family.variant_class(opened.head)
    translation = opened.translation(empty_model(target_class, opened.config))
    model = build(target_class, opened.config, translation.in_memory(dtype), dtype, device_map)
    if isinstance(source, PreTrainedModel):
        copy_generation_config(model, source)
    elif model.can_generate():
        model.generation_config = stored_generation_config(opened.path)
    return model


def to_native(model: PreTrainedModel, model_type: str | None = None) -> PreTrainedModel:
    """
    The stock transformers model with the same weights.

    Args:
        model: one of ours.
        model_type: the native type; by default the one it came from, or else one that fits as it is. A type that is
            asked for by name may need folds (see `folds`), which are logged.

    Returns:
        the native model in evaluation mode; it shares no memory with `model`. Its `conversion_report` says what was
        done, folds and their exactness included.

    Raises:
        NotRepresentable: naming every field in the way.
        ConversionError: if the model is quantised.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise ConversionError(
            "The model is quantised (`quantization_config`). Take it as it was before, or, where its quantiser can, "
            "`model.dequantize()` it first."
        )
    head = head_of_variant(type(model).__name__)
    family, native_config, folding = target_of(model.config, model_type, head)
    target, translation = exported(
        family, head, model, list(stored_tensors(model)), model.state_dict().__getitem__, native_config, folding
    )
    native_config.dtype = model.dtype
    options = without_pooler(model.config, head, type(target))
    native = build(type(target), native_config, translation.in_memory(None), None, None, **options)
    copy_generation_config(native, model)
    report = report_of(type(model).__name__, type(native).__name__, "export", family, head, model.config, target)
    note_folds(report, folding, model.dtype)
    native.conversion_report = report
    return native


def from_x_transformers(
    source: torch.nn.Module | Mapping[str, torch.Tensor],
    arguments: Mapping[str, Any],
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
) -> PreTrainedModel:
    """
    A variant with the weights of a model of x-transformers (https://github.com/lucidrains/x-transformers).

    Args:
        source: a `TransformerWrapper`, an `AutoregressiveWrapper` of one, an `XTransformer`, or its state dict.
        arguments: those that it was made with, which a module does not keep. Of a `TransformerWrapper`, `attn_layers` is a
            map of the arguments of its layers, with `causal`: true for a `Decoder`, false for an `Encoder`.
        dtype, device_map: see `from_native`.

    Returns:
        a `VariantForCausalLM` of a decoder, a `VariantForMaskedLM` of an encoder, a `VariantModel` with
        `return_only_embed`, a `VariantForConditionalGeneration` of an `XTransformer`; in evaluation mode.

    Raises:
        ConversionError: naming arguments that no field expresses, or tensors that do not belong to them.
    """
    return _model_of_foreign(open_x_transformers(source, arguments), dtype, device_map)


def build(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    **options: Any,
) -> PreTrainedModel:
    """A model with these weights, in the dtypes that they have or in one, in evaluation mode; `options` are the class's."""
    dtypes = Counter(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    arguments = {} if device_map is None else {"device_map": device_map}
    own = config.dtype if config.dtype in dtypes else next(iter(dtypes), torch.float32)
    as_they_are = dtype in (None, "auto")
    nested = {name: inner.dtype for name in config.sub_configs if (inner := getattr(config, name, None)) is not None}
    model = model_class.from_pretrained(
        None, config=config, state_dict=tensors, dtype=own if as_they_are else dtype, **arguments, **options
    )
    if as_they_are and len(dtypes) > 1:
        _give_back_dtypes(model, tensors, own)
    # `from_pretrained` records where it loaded from, which was nowhere.
    model.config.name_or_path = model.name_or_path = ""
    # It also writes the dtype into nested configs, which may not have had one.
    for name, inner_dtype in nested.items():
        getattr(model.config, name).dtype = inner_dtype
    return model.eval()


def _give_back_dtypes(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], cast_to: torch.dtype) -> None:
    """`from_pretrained` casts all to one dtype: give the tensors that had another theirs again."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype != cast_to:
            loaded = model.get_parameter_or_buffer(name)
            # The class may have asked for more precision.
            if loaded.dtype == cast_to and loaded.device.type != "meta":
                loaded.data = tensor.to(loaded.device)


def _from_gguf(
    path: Path, dtype: torch.dtype | str | None, device_map: Any, ignore_keys: Iterable[str]
) -> PreTrainedModel:
    file, opened = open_gguf(path, ignore_keys)
    target_class = opened.family.variant_class(opened.head)
    translation = opened.translation(empty_model(target_class, opened.config))
    model = build(target_class, opened.config, translation.in_memory(dtype), dtype, device_map)
    if model.can_generate():
        model.generation_config = file.generation_config()
    return model


def _from_foreign(source: str | Path, dtype: torch.dtype | str | None, device_map: Any) -> PreTrainedModel:
    return _model_of_foreign(open_foreign(source), dtype, device_map)


def _model_of_foreign(opened: ForeignCheckpoint, dtype: torch.dtype | str | None, device_map: Any) -> PreTrainedModel:
    target, shapes = opened.target()
    tensors = opened.tensors(opened.plan(shapes), shapes, opened.load)
    # As copies, which do not change with the file.
    in_memory = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors}
    model = build(type(target), opened.config, in_memory, dtype, device_map)
    model.generation_config = opened.generation_config()
    return model
