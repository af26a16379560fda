"""What stands in a native checkpoint or model: whatever names and headers say against it is said before a weight is read."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, logging

from hf_variants.model.configuration_variant import VariantConfig

from . import block_configs, checkpoint, tensor_files
from .companions import is_sentence_encoder
from .config_map import quantisation_of
from .errors import ConversionError, reading
from .family import Family, family_and_head, family_of, is_variant, read_config, stacks
from .json_files import read_config_values
from .layout import Layout, as_transformers_reads, output_embedding
from .skeleton import empty_model, stored_tensors
from .translation import Translation, translation_between


logger = logging.get_logger(__name__)


@dataclass
class NativeSource:
    """
    A native model, in memory or in a folder, understood and not yet read: every refusal that names and headers allow has
    happened, no weight is loaded.

    Attributes:
        native: the model, or one without memory for its weights.
        config: ours.
        dtype: what transformers gives the model: of the config, else of the first tensor.
        weights: in the folder, of its class's own format.
    """

    family: Family
    head: str
    native: PreTrainedModel
    config: PreTrainedConfig
    layout: Layout
    dtype: torch.dtype
    path: Path | None = None
    notes: list[str] = field(default_factory=list)
    weights: checkpoint.Weights | None = None

    def translation(self, target: PreTrainedModel) -> Translation:
        return translation_between(
            self.family, self.head, self.native, target, self.layout.names, self.layout.load, self.config,
            to_native=False,
        )  # fmt: skip


def open_native(source: str | Path, ignore_keys: Iterable[str]) -> NativeSource:
    """What stands in a folder or a file of weights, or behind a Hub id."""
    path = checkpoint.resolve_folder(source)
    native_config = read_config(path)
    family_of(native_config.model_type)
    checkpoint.refuse_adapter(path)
    weights = checkpoint.weights_of(source, path)
    refuse_more_layers_than_tensors(native_config, weights)
    family, head, config, native = _understood(path / CONFIG_NAME, native_config, weights, ignore_keys)
    layout = as_transformers_reads(native, weights)
    dtype = native_config.dtype if native_config.dtype in tensor_files.FLOATS else weights.dtype()
    config.dtype = dtype
    opened = NativeSource(family, head, native, config, layout, dtype, path, weights=weights)
    if weights.others:
        opened.notes.append(f"Read {weights.file}, as transformers does; {', '.join(weights.others)} was left alone")
    opened.notes += weights.notes
    untie(opened, native_config, ignore_keys)
    _leave_out_the_pooler(opened)
    follow_attention(opened)
    return opened


def opened_in_memory(native: PreTrainedModel, ignore_keys: Iterable[str]) -> NativeSource:
    family, head = family_and_head(native.config, type(native).__name__)
    config = family.config_map.to_variant(native.config, ignore_keys, head)
    part, names, load = _part_of(native, family.native_class(head))
    layout = Layout(names, load, lambda name: load(name).to("meta"), load)
    config.dtype = native.dtype
    opened = NativeSource(family, head, part, config, layout, native.dtype)
    untie(opened, native.config, ignore_keys)
    _leave_out_the_pooler(opened)
    follow_attention(opened)
    return opened


def native_family_and_head(config: PreTrainedConfig, weights: checkpoint.Weights | None = None) -> tuple[Family, str]:
    """
    Of a checkpoint, from `architectures`. Where that says nothing, or only a name that no class of transformers has and
    no task can be read from, it is the family's language model, or the bare model if `weights` have nothing of its head.
    Of an encoder-decoder that lies as a sentence encoder, it is the encoder, which is all that Sentence Transformers loads.
    """
    class_name = next(iter(config.architectures or ()), None)
    family = family_of(config.model_type)
    if weights is not None and family.encoder is not None and is_sentence_encoder(weights.folder):
        return family.encoder, "base"
    if class_name is not None and family.knows(class_name):
        return family_and_head(config, class_name)
    bare = family.native_class("base")
    if weights is None or bare is None:
        return family, family.primary
    model = block_configs.native_skeleton(family, family.primary, config)
    inside = empty_model(bare, config).state_dict().keys()
    head = {name for name in stored_tensors(model) if name.removeprefix(f"{model.base_model_prefix}.") not in inside}
    layout = as_transformers_reads(model, weights)
    return family, family.primary if not head or not head.isdisjoint(layout.names) else "base"


def refuse_quantised(path: Path, values: Mapping[str, Any]) -> None:
    """`ConversionError` for a config.json that says so, by the method's name."""
    if packed := quantisation_of(values):
        raise ConversionError(
            f"{path} says that the weights are quantised ({packed}). Take the model as it was before."
        )


def refuse_more_layers_than_tensors(config: PreTrainedConfig, weights: checkpoint.Weights) -> None:
    """Before a model of that size is described: each layer has at least one tensor."""
    if is_variant(config) and config.is_encoder_decoder:
        for stack in stacks(config):
            refuse_more_layers_than_tensors(stack, weights)
    for key in ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"):
        layers = getattr(config, key, None)
        if isinstance(layers, int) and layers > len(weights.files):
            raise ConversionError(
                f"`{key}` is {layers}, and the checkpoint in {weights.folder} has {len(weights.files)} tensors. "
                "It is incomplete, or the config does not belong to these weights."
            )


def _understood(
    path: Path, native_config: PreTrainedConfig, weights: checkpoint.Weights, ignore_keys: Iterable[str]
) -> tuple[Family, str, VariantConfig, PreTrainedModel]:
    """
    What a native config stands for: our config, and the native model without memory for its weights.

    Args:
        path: of the config.json, in whose values everything is looked for that fails.
    """

    def understand(native_config: PreTrainedConfig) -> tuple[Family, str, VariantConfig, PreTrainedModel]:
        family, head = native_family_and_head(native_config, weights)
        config = family.config_map.to_variant(native_config, ignore_keys, head)
        return family, head, config, block_configs.native_skeleton(family, head, native_config)

    values = read_config_values(path)
    refuse_quantised(path, values)

    def without(key: str) -> Any:
        left = {name: value for name, value in values.items() if name != key}
        return understand(type(native_config).from_dict(left))

    with reading(path, values, without):
        return understand(native_config)


def untie(opened: NativeSource, native_config: PreTrainedConfig, ignore_keys: Iterable[str]) -> None:
    """Where the config ties tensors that differ: transformers goes by the weights."""
    native, layout = opened.native, opened.layout
    # What the config says, of which a model that was loaded may have let go.
    tied = native.get_expanded_tied_weights_keys(all_submodels=True)
    head = output_embedding(native) or ""
    bias = head.removesuffix("weight") + "bias"
    apart = [
        name
        for name, source in tied.items()
        if {name, source} <= set(layout.names)
        and not (name in native.all_tied_weights_keys and torch.equal(layout.load(name), layout.load(source)))
    ]
    family = opened.family
    if apart == [bias]:
        _take_bias_of_head(opened, bias, tied[bias])
        return
    if not apart or (family.loosely_tied and head not in apart):
        return
    if family.loosely_tied:
        native.all_tied_weights_keys.pop(head, None)
        opened.config.tie_word_embeddings = False
    else:
        untied_config = copy.deepcopy(native_config)
        untied_config.tie_word_embeddings = False
        dtype = opened.config.dtype
        opened.config = family.config_map.to_variant(untied_config, ignore_keys, opened.head)
        opened.config.dtype = dtype
        opened.native = block_configs.native_skeleton(family, opened.head, untied_config)
        # Its bias may stay tied; both are then asked for.
        copies = {name: source for name, source in tied.items() if name not in layout.names}
        opened.layout = replace(
            layout,
            names=[*layout.names, *copies],
            load=lambda name: layout.load(copies.get(name, name)),
            header=lambda name: layout.header(copies.get(name, name)),
            stored=lambda name: layout.stored(copies.get(name, name)),
        )
    opened.notes += [
        f"Not tied: the config ties {name} to {tied[name]}, and the checkpoint has different values for them"
        for name in apart
    ]


def _take_bias_of_head(opened: NativeSource, bias: str, source: str) -> None:
    """The LM head's own bias where the one that it is tied to differs, which transformers loads and does not read."""
    layout = opened.layout
    opened.native.all_tied_weights_keys.pop(bias, None)

    def own(name: str) -> str:
        return bias if name == source else name

    opened.layout = replace(
        layout,
        names=[name for name in layout.names if name != bias],
        load=lambda name: layout.load(own(name)),
        header=lambda name: layout.header(own(name)),
        stored=lambda name: layout.stored(own(name)),
        passed_over={
            **layout.passed_over,
            source: f"differs from {bias}, which is what transformers adds to the logits",
        },
    )
    opened.notes.append(
        f"Not tied: the config ties {bias} to {source}, and the checkpoint has different values for them"
    )


def _leave_out_the_pooler(opened: NativeSource) -> None:
    """A bare encoder whose checkpoint has no pooler is one without: transformers would draw a random one."""
    config = opened.config
    if opened.head != "base" or not isinstance(config, VariantConfig) or not config.has_pooler("base"):
        return
    if not any(name.startswith("pooler.") for name in opened.layout.names):
        opened.config.pooler = False
        opened.notes.append("Without a pooler: the checkpoint has none, and transformers would draw a random one")


def _part_of(
    source: PreTrainedModel, native_class: type[PreTrainedModel]
) -> tuple[PreTrainedModel, list[str], tensor_files.TensorSource]:
    """A loaded model as one of this class, where it is another one that has all of its tensors (`BertForPreTraining`)."""
    state = source.state_dict()
    if type(source) is native_class or native_class.__name__ == type(source).__name__:
        return source, list(state), state.__getitem__
    native = empty_model(native_class, source.config)
    wanted = native.state_dict().keys()
    prefix = f"{source.base_model_prefix}."
    stored = {name if name in wanted else name.removeprefix(prefix): name for name in state}
    names = [name for name in stored if name in wanted]
    logger.warning(f"Of {type(source).__name__}, what {native_class.__name__} has is converted.")
    return native, names, lambda name: state[stored[name]]


def follow_attention(opened: NativeSource) -> None:
    """Attention runs as the native config asks."""
    is_eager = any(stack.eager_by_default for stack in stacks(opened.config))
    asked = opened.native.config._attn_implementation
    if asked not in (None, "eager" if is_eager else "sdpa"):
        opened.config._attn_implementation = asked
