"""Conversion itself: in memory (`from_native`, `to_native`) and on disk (`convert`, `export`), by the same rules."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from hf_variants.model.configuration_variant import VariantConfig

from . import checkpoint, rules
from .errors import ConversionError, NotRepresentable
from .family import Family, all_families, family_of, head_of_variant, is_variant, variant_class


@dataclass
class Report:
    """
    What a conversion did.

    Attributes:
        source, destination: where from and where to.
        direction: `"convert"` (native to variant) or `"export"` (variant to native).
        model_type: the native type.
        head: `"base"`, `"causal_lm"`, ...
        tensors, parameters: how many of the result.
        exactness: `"bit-exact"`: every value is a copy.
        deviations: where the two classes' arithmetic differs, and why.
        dropped: training settings that the native config has no place for, with their values.
    """

    source: str
    destination: str
    direction: str
    model_type: str
    head: str
    tensors: int
    parameters: int
    exactness: str = "bit-exact"
    deviations: list[str] = field(default_factory=list)
    dropped: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def to_markdown(self) -> str:
        what = f"{self.model_type} -> variant" if self.direction == "convert" else f"variant -> {self.model_type}"
        lines = [
            f"**{what}** ({self.head}): {self.tensors} tensors, {self.parameters:,} parameters, {self.exactness}.",
            *(f"- Rounding differs from the stock class: {reason}" for reason in self.deviations),
            *(f"- Not kept, for training only: `{name}` = {value!r}" for name, value in self.dropped.items()),
        ]
        return "\n".join(lines)


def _empty(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def stored_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict as a checkpoint stores it: of tied tensors only the source."""
    state = model.state_dict()
    if not getattr(model.config, "tie_word_embeddings", False):
        return state
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: tensor for name, tensor in state.items() if name not in tied}


def _parameters(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _check_ties(model: PreTrainedModel, names: Iterable[str], load: checkpoint.TensorSource) -> list[str]:
    """
    The stored names; copies of tied tensors are left out after a look at their values.

    Raises:
        ConversionError: if a tensor that the config ties to another differs from it.
    """
    kept, present = [], set(names)
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    tied = tied if getattr(model.config, "tie_word_embeddings", False) else {}
    for name in names:
        source = tied.get(name)
        if source is None or source not in present:
            kept.append(name)
        elif not torch.equal(load(name), load(source)):
            raise ConversionError(
                f"The config ties {name} to {source} (`tie_word_embeddings`), but the checkpoint has different values "
                "for them. Set `tie_word_embeddings` to false in its config.json if they are meant to differ."
            )
    return kept


def _translated(
    family: Family,
    head: str,
    source_model: PreTrainedModel,
    target_model: PreTrainedModel,
    names: Iterable[str],
    load: checkpoint.TensorSource,
    variant_config: VariantConfig,
    to_native: bool,
) -> tuple[list[rules.Step], Any]:
    """The plan and a generator of the target's tensors; every check of names runs before the first tensor is made."""
    shapes = {name: tensor.shape for name, tensor in stored_tensors(target_model).items()}
    names = _check_ties(source_model, list(names), load)
    steps = rules.plan(family.rules_for(head), names, shapes, to_native=to_native)
    return steps, rules.run(steps, load, variant_config, shapes, to_native=to_native)


def _native_head(family: Family, config: PreTrainedConfig) -> str:
    """The head of a checkpoint, from `architectures`; a causal LM where it says nothing."""
    architectures = config.architectures or []
    return family.head_of(architectures[0]) if architectures else "causal_lm"


def _build(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype | str | None,
    device_map: Any,
) -> PreTrainedModel:
    own = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
    arguments = {} if device_map is None else {"device_map": device_map}
    if dtype in (None, "auto"):
        dtype = own
    model = model_class.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, **arguments)
    # `from_pretrained` records where it loaded from, which was nowhere.
    model.config.name_or_path = model.name_or_path = ""
    return model.eval()


def _generation_config(model: PreTrainedModel, source: PreTrainedModel) -> None:
    if model.can_generate() and source.can_generate():
        model.generation_config = copy.deepcopy(source.generation_config)


def from_native(
    source: str | Path | PreTrainedModel,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    ignore_keys: Iterable[str] = (),
) -> PreTrainedModel:
    """
    Our model with a native model's weights.

    Args:
        source: a loaded native model, a checkpoint folder, a Hub id, or a GGUF file.
        dtype: of the weights; by default as they are.
        device_map: as in `from_pretrained`.
        ignore_keys: keys of the native config that are known to be meaningless.

    Returns:
        the model in evaluation mode; it shares no memory with `source`.

    Raises:
        UnsupportedModelType: if the architecture needs a mechanism that is missing here; before any weight is read.
        ConversionError: if config and weights do not fit each other, or a config key is not understood.
    """
    if isinstance(source, (str, Path)):
        if _is_gguf(source):
            return from_native(_load_gguf(Path(source)), dtype, device_map, ignore_keys)
        folder = checkpoint.resolve_folder(source)
        native_config = AutoConfig.from_pretrained(folder)
        family = family_of(native_config.model_type)
        head = _native_head(family, native_config)
        variant_config = family.config_map.to_variant(native_config, ignore_keys)
        reader = checkpoint.SafetensorsReader(folder)
        native, names, load = _empty(family.native_class(head), native_config), reader.names(), reader
    else:
        native_config = source.config
        family = family_of(native_config.model_type)
        head = family.head_of(type(source).__name__)
        variant_config = family.config_map.to_variant(native_config, ignore_keys)
        state = source.state_dict()
        native, names, load = source, list(state), state.__getitem__
    target_class = variant_class(head)
    _, tensors = _translated(
        family, head, native, _empty(target_class, variant_config), names, load, variant_config, to_native=False
    )
    model = _build(target_class, variant_config, dict(tensors), dtype, device_map)
    if isinstance(source, PreTrainedModel):
        _generation_config(model, source)
    elif model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def native_config_for(
    config: VariantConfig, model_type: str | None = None
) -> tuple[Family, PreTrainedConfig]:
    """
    The native family that can express a variant, and its config.

    Args:
        model_type: the type to use; by default the one it was converted from, or else the first that fits.

    Raises:
        NotRepresentable: naming every field in the way and, without `model_type`, the nearest type.
    """
    if model_type is not None:
        family = family_of(model_type)
        return family, family.config_map.to_native(config)
    origin = (config.native_leftovers or {}).get("model_type")
    candidates = sorted(all_families().values(), key=lambda family: family.model_type != origin)
    nearest: NotRepresentable | None = None
    for family in candidates:
        try:
            return family, family.config_map.to_native(config)
        except NotRepresentable as error:
            if "config" not in error.fields and (nearest is None or len(error.fields) < len(nearest.fields)):
                nearest = error
    if nearest is None:
        raise NotRepresentable("native", {"config": ("this variant", "no type that comes near")})
    raise NotRepresentable(
        nearest.model_type,
        nearest.fields,
        advice="No supported native type can express it; this one comes nearest. Change those fields, or share the "
        "model as a variant.",
    )


def to_native(model: PreTrainedModel, model_type: str | None = None) -> PreTrainedModel:
    """
    The stock transformers model with the same weights.

    Args:
        model: one of ours.
        model_type: the native type; by default the one it came from, or else one that fits.

    Returns:
        the native model in evaluation mode; it shares no memory with `model`.

    Raises:
        NotRepresentable: naming every field in the way.
    """
    head = head_of_variant(type(model).__name__)
    family, native_config = native_config_for(model.config, model_type)
    target_class = family.native_class(head)
    if target_class is None:
        raise NotRepresentable(family.model_type, {"architectures": (type(model).__name__, None)})
    state = model.state_dict()
    _, tensors = _translated(
        family, head, model, _empty(target_class, native_config), list(state), state.__getitem__, model.config,
        to_native=True,
    )  # fmt: skip
    native = _build(target_class, native_config, dict(tensors), None, None)
    _generation_config(native, model)
    return native


def _is_gguf(source: str | Path) -> bool:
    return str(source).endswith(".gguf")


def _load_gguf(path: Path) -> PreTrainedModel:
    """Dequantise a GGUF file with transformers' own loader."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file. Give the path of a GGUF file.")
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    family = family_of(config.model_type)
    return family.native_class("causal_lm").from_pretrained(path.parent, gguf_file=path.name)


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ConversionError(f"{dtype!r} is not a floating-point dtype. Use float32, bfloat16 or float16.")
    return named


def _cast(tensors, dtype: torch.dtype | None):
    for name, tensor in tensors:
        yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _tokenizer_class(model_type: str) -> str | None:
    entry = TOKENIZER_MAPPING_NAMES.get(model_type)
    entry = next((name for name in entry if name), None) if isinstance(entry, tuple) else entry
    return entry


def _write(
    folder: Path,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    steps: list[rules.Step],
    tensors: Iterable[tuple[str, torch.Tensor]],
    max_shard_bytes: int,
) -> None:
    config.architectures = [model_class.__name__]
    checkpoint.write_safetensors(
        tensors, folder, total=sum(len(step.targets) for step in steps), max_shard_bytes=max_shard_bytes
    )
    config.save_pretrained(folder)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    ignore_keys: Iterable[str] = (),
    max_shard_bytes: int = checkpoint.MAX_SHARD_BYTES,
) -> Report:
    """
    Convert a native checkpoint into a new folder that `AutoModel*.from_pretrained` loads as a variant.

    Args:
        source: a folder of safetensors, a Hub id, or a GGUF file.
        destination: a folder that does not exist yet; it appears when everything is written.
        dtype: cast the weights; by default they are copied as they are.
        ignore_keys: keys of the native config that are known to be meaningless.
        max_shard_bytes: largest size of one file, and about the memory that is needed.

    Raises:
        as `from_native`; FileExistsError if the destination is not empty.
    """
    target_dtype = _as_dtype(dtype)
    if _is_gguf(source):
        return _convert_gguf(Path(source), destination, target_dtype, ignore_keys, max_shard_bytes)
    folder = checkpoint.resolve_folder(source)
    native_config = AutoConfig.from_pretrained(folder)
    family = family_of(native_config.model_type)
    head = _native_head(family, native_config)
    config = family.config_map.to_variant(native_config, ignore_keys)
    reader = checkpoint.SafetensorsReader(folder)
    target = _empty(variant_class(head), config)
    steps, tensors = _translated(
        family, head, _empty(family.native_class(head), native_config), target, reader.names(), reader, config,
        to_native=False,
    )  # fmt: skip
    if target_dtype is not None:
        config.dtype = target_dtype
    with checkpoint.new_folder(destination) as temporary:
        _write(temporary, type(target), config, steps, _cast(tensors, target_dtype), max_shard_bytes)
        checkpoint.copy_companions(folder, temporary, _tokenizer_class(family.model_type))
    return _report(source, destination, "convert", family, head, config, target)


def _convert_gguf(
    path: Path, destination: str | Path, dtype: torch.dtype | None, ignore_keys: Iterable[str], max_shard_bytes: int
) -> Report:
    native = _load_gguf(path)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    family = family_of(native.config.model_type)
    config = family.config_map.to_variant(native.config, ignore_keys)
    target = _empty(variant_class("causal_lm"), config)
    state = native.state_dict()
    steps, tensors = _translated(
        family, "causal_lm", native, target, list(state), state.__getitem__, config, to_native=False
    )
    config.dtype = dtype or native.dtype
    with checkpoint.new_folder(destination) as temporary:
        _write(temporary, type(target), config, steps, _cast(tensors, dtype), max_shard_bytes)
        tokenizer.save_pretrained(temporary)
        native.generation_config.save_pretrained(temporary)
    return _report(path, destination, "convert", family, "causal_lm", config, target)


def export(
    source: str | Path,
    destination: str | Path,
    *,
    model_type: str | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_bytes: int = checkpoint.MAX_SHARD_BYTES,
) -> Report:
    """
    Write a variant's checkpoint as a native one that stock transformers and every engine load.

    Args:
        source: a folder or Hub id of one of our checkpoints.
        destination: a folder that does not exist yet.
        model_type: the native type; by default the one it came from, or else one that fits.
        dtype, max_shard_bytes: as in `convert`.

    Raises:
        NotRepresentable: naming every field in the way; ConversionError if the source is not a variant.
    """
    target_dtype = _as_dtype(dtype)
    folder = checkpoint.resolve_folder(source)
    config = AutoConfig.from_pretrained(folder)
    if not is_variant(config):
        raise ConversionError(
            f"{source} is a {config.model_type} checkpoint, not a variant. Convert it first, or export another folder."
        )
    head = head_of_variant((config.architectures or ["VariantForCausalLM"])[0])
    family, native_config = native_config_for(config, model_type)
    target_class = family.native_class(head)
    if target_class is None:
        raise NotRepresentable(family.model_type, {"architectures": (config.architectures, None)})
    reader = checkpoint.SafetensorsReader(folder)
    target = _empty(target_class, native_config)
    steps, tensors = _translated(
        family, head, _empty(variant_class(head), config), target, reader.names(), reader, config, to_native=True
    )
    if target_dtype is not None:
        native_config.dtype = target_dtype
    with checkpoint.new_folder(destination) as temporary:
        _write(temporary, target_class, native_config, steps, _cast(tensors, target_dtype), max_shard_bytes)
        checkpoint.copy_companions(folder, temporary, _tokenizer_class(family.model_type))
    return _report(source, destination, "export", family, head, config, target)


def _report(source, destination, direction, family, head, config, target) -> Report:
    tensors = stored_tensors(target)
    dropped = {}
    if direction == "export":
        dropped = {name: value for name in ("z_loss_coefficient", "label_smoothing") if (value := getattr(config, name))}
    return Report(
        source=str(source),
        destination=str(destination),
        direction=direction,
        model_type=family.model_type,
        head=head,
        tensors=len(tensors),
        parameters=_parameters(tensors),
        deviations=[deviation.reason for deviation in family.deviations_of(config)],
        dropped=dropped,
    )
