"""Conversion itself: in memory (`from_native`, `to_native`) and on disk (`convert`, `export`), by the same rules."""

import copy
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, logging

from hf_variants import card
from hf_variants.model.configuration_variant import VariantConfig
from hf_variants.model.custom_code import auto_map_of, write_code

from . import block_configs, checkpoint, folds, gguf_files, output_folder, rules, tensor_files, tensor_writer
from .companions import belongs, copy_companions, refuse_broken_files, root_of
from .config_map import leaves_out_the_pooler, quantisation_of, training_fields
from .errors import ConversionError, NotRepresentable, VerificationFailed, reading
from .family import (
    Family,
    all_families_and_parts,
    family_and_head,
    family_for,
    family_of,
    head_of_variant,
    is_variant,
    read_config,
    stacks,
    variant_class,
)
from .folds import Folding
from .foreign import ForeignCheckpoint, is_foreign, open_foreign, open_x_transformers
from .json_files import read_config_values
from .layout import Layout, Stored, as_transformers_reads, output_embedding, refuse_other_shapes
from .progress import Progress
from .record import (
    Digests,
    HashedMeanwhile,
    command_line,
    is_hub_id,
    last_part,
    public_name,
    weight_files,
    write_record,
)
from .skeleton import empty_model, stored_tensors
from .tokenization import load_tokenizer


if TYPE_CHECKING:
    from .verification import VerificationReport


logger = logging.get_logger(__name__)

# What engines and tools support best, tried first where several types fit.
WIDELY_KNOWN = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "gpt2",
    "gpt_neox",
    "t5",
    "bart",
)


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
        exactness: `"bit-exact"`: every value is a copy; or the weakest class of the folds (see `folds`), or the dtypes
            that values were cast from and to, and how many tensors were.
        folds: rewrites of the weights that the native type asked for needed, each with its class.
        deviations: where the two classes' arithmetic differs, and why.
        non_finite: tensors of the result with NaN or infinite values.
        passed_over: stored tensors that transformers does not load either, each with the reason.
        dropped: training settings that the native config has no place for, with their values.
        tokenizer: in which respects `AutoTokenizer` reads another one from the result, or why that is not known.
        part: what was taken of a checkpoint whose class is not here as a whole; empty for all of it.
        unread: keys of the native config that change nothing, because its class does not read them or does not act on
            their values; kept for the way back.
        notes: what a GGUF file does not say and had to be taken from elsewhere; where the result follows the weights and
            not the config, as transformers does; which of several sets of weights was read.
        command: what does the same in a shell.
        verification: the comparison of source and destination, where it was asked for.
    """

    source: str
    destination: str
    direction: str
    model_type: str
    head: str
    tensors: int
    parameters: int
    exactness: str = "bit-exact"
    folds: list[str] = field(default_factory=list)
    deviations: list[str] = field(default_factory=list)
    non_finite: list[str] = field(default_factory=list)
    passed_over: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, Any] = field(default_factory=dict)
    tokenizer: list[str] = field(default_factory=list)
    command: str = ""
    part: str = ""
    unread: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    verification: "VerificationReport | None" = None

    def _passed_over(self) -> dict[str, str]:
        """Reason -> the first names of tensors."""
        names: dict[str, list[str]] = {}
        for name, reason in self.passed_over.items():
            names.setdefault(reason, []).append(f"`{name}`")
        return {reason: rules.some(found) for reason, found in names.items()}

    def to_dict(self) -> dict[str, Any]:
        verification = None if self.verification is None else self.verification.to_dict()
        return {**asdict(self), "verification": verification}

    def to_markdown(self) -> str:
        what = f"{self.model_type} -> variant" if self.direction == "convert" else f"variant -> {self.model_type}"
        lines = [
            f"**{what}** ({self.head}): {self.tensors} tensors, {self.parameters:,} parameters, {self.exactness}.",
            *([f"- A part: {self.part}"] if self.part else []),
            *(f"- Folded: {fold}" for fold in self.folds),
            *(f"- Rounding differs from the stock class: {reason}" for reason in self.deviations),
            *(f"- NaN or infinite values in {name}" for name in self.non_finite),
            *(f"- Passed over ({reason}): {names}" for reason, names in self._passed_over().items()),
            *(f"- Not kept, for training only: `{name}` = {value!r}" for name, value in self.dropped.items()),
            *(f"- Tokenizer: {note}" for note in self.tokenizer),
            *(f"- {note[0].upper()}{note[1:]}." for note in self.notes),
        ]
        if self.unread:
            names = ", ".join(f"`{name}`" for name in sorted(self.unread))
            lines.append(f"- Kept for the way back, and without effect on the stock class: {names}")
        if self.verification is not None:
            lines += ["", self.verification.to_markdown()]
        return "\n".join(lines)


@dataclass
class Writing:
    """
    How weights are written.

    Attributes:
        max_shard_bytes: largest size of one file.
        workers: threads; by default one for each of up to four cores.
        task: the same value for the same bytes, where a run that was killed may be gone on with; the folder then comes
            from `new_folder` with this task.
    """

    max_shard_bytes: int = tensor_writer.MAX_SHARD_BYTES
    workers: int | None = None
    task: str | None = None


@dataclass
class Written:
    """What was seen of the weights on their way: tensors with NaN or infinite values, and the hashes of all."""

    non_finite: list[str]
    digests: Digests


def _parameters(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _check_ties(model: PreTrainedModel, names: Iterable[str], load: tensor_files.TensorSource) -> list[str]:
    """
    The stored names; copies of tied tensors are left out after a look at their values.

    Raises:
        ConversionError: if a tensor that the config ties to another differs from it.
    """
    kept, present = [], set(names)
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
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


@dataclass
class _Translation:
    """The steps from one model's tensors to another's; every check of names has run."""

    steps: list[rules.Step]
    load: tensor_files.TensorSource
    config: VariantConfig
    shapes: Mapping[str, torch.Size]
    to_native: bool

    def tensors(
        self,
        load: tensor_files.TensorSource | None = None,
        unread: tensor_files.StoredSource | None = None,
        but: Set[str] = frozenset(),
    ) -> Iterator[tuple[str, Any]]:
        """
        The target's tensors one by one; they may be views of the source's memory. Those that no checkpoint has are in its
        dtype, or in float32 where that would round them (a table of sinusoids): who loads the result in float32 has them
        exact, as the class that computes them.

        Args:
            load: of the source's tensors; by default their values.
            unread: for those that only change their names, which come out as it gives them.
            but: names of those of the target that are not asked for; they come only where they are made with others.
        """
        computed = self.computed
        for name, tensor in rules.run(
            rules.without(self.steps, but),
            load or self.load,
            self.config,
            self.shapes,
            to_native=self.to_native,
            unread=unread,
        ):
            if name in computed:
                cast = tensor.to(self.config.dtype or torch.float32)
                tensor = cast if torch.equal(cast.to(tensor.dtype), tensor) else tensor
            yield name, tensor

    @property
    def computed(self) -> set[str]:
        """Names of the target's tensors that are made of no stored one."""
        return {name for step in self.steps if not step.sources for name in step.targets}

    def lookup(self, load: tensor_files.TensorSource | None = None) -> tensor_files.TensorSource:
        """The same by name, in any order; what a step makes together is kept until another step is asked for."""
        step_of = {name: step for step in self.steps for name in step.targets}
        made: dict[str, torch.Tensor] = {}

        def one(name: str) -> torch.Tensor:
            if name not in made:
                made.clear()
                made.update(replace(self, steps=[step_of[name]]).tensors(load))
            return made[name]

        return one

    def is_recomputed(self, name: str) -> bool:
        """Whether a tensor of the target has the values that the native class computes where a checkpoint lacks it."""
        for step in self.steps:
            if step.targets == [name] and step.rule.absent is not None:
                ((_, tensor),) = rules.run([step], self.load, self.config, self.shapes, to_native=self.to_native)
                computed = step.rule.absent(rules.resolved(self.config, step, self.to_native))
                return torch.equal(tensor, computed.to(tensor.dtype))
        return False

    def widened(self, header: tensor_files.TensorSource) -> list[str]:
        """Names of the target's tensors that join tensors of several dtypes, and take the wider one."""
        return [
            name
            for step in self.steps
            if len({header(source).dtype for source in step.sources}) > 1
            for name in step.targets
            if len(step.targets) == 1
        ]

    def headers(self, header: tensor_files.TensorSource | None) -> dict[str, torch.Tensor]:
        """
        Shapes and dtypes of the target's tensors.

        Args:
            header: the same of a source's tensor, or `None` where only the values tell.
        """
        return {name: tensor.to("meta") for name, tensor in self.tensors(header)}

    def in_memory(self, dtype: torch.dtype | str | None) -> dict[str, torch.Tensor]:
        """
        The target's tensors, independent of the source's memory.

        Args:
            dtype: of the model that they are for; by default, and with `"auto"`, each keeps its own.
        """
        own = self.config.dtype or torch.float32
        rounded = self.computed if dtype in (None, "auto") else set()
        return {
            name: (tensor.to(own) if name in rounded else tensor).clone(memory_format=torch.contiguous_format)
            for name, tensor in self.tensors()
        }


def _translation(
    family: Family,
    head: str,
    source_model: PreTrainedModel,
    target_model: PreTrainedModel,
    names: Iterable[str],
    load: tensor_files.TensorSource,
    variant_config: VariantConfig,
    to_native: bool,
) -> _Translation:
    shapes = {name: tensor.shape for name, tensor in stored_tensors(target_model).items()}
    names = _check_ties(source_model, list(names), load)
    steps = rules.plan(family.rules_for(head), names, shapes, to_native=to_native)
    return _Translation(steps, load, variant_config, shapes, to_native)


def translation_to_native(
    family: Family,
    head: str,
    source: PreTrainedModel,
    target: PreTrainedModel,
    names: Iterable[str],
    load: tensor_files.TensorSource,
    config: VariantConfig,
) -> _Translation:
    """The way from a variant's tensors to those of a native model without memory; every check of names has run."""
    return _translation(family, head, source, target, names, load, config, to_native=True)


def _for_other_heads(
    family: Family, head: str, names: Iterable[str], variant: PreTrainedModel, to_native: bool = False
) -> dict[str, str]:
    """
    Of the stored tensors those that the class of this head leaves out and models with another head have, with the names
    they go under: the trained pooler of a masked LM, which a classifier begins with.

    Args:
        variant: our model, with or without weights.
    """
    if not isinstance(variant.config, VariantConfig) or not variant.config.pooler:
        return {}
    moves = rules.renamed((*family.base_weights, *family.rules_for(head)), list(names), to_native)
    ours = {source if to_native else target for source, target in moves.items()} - set(variant.state_dict())
    return {source: target for source, target in moves.items() if (source if to_native else target) in ours}


def native_family_and_head(config: PreTrainedConfig, weights: checkpoint.Weights | None = None) -> tuple[Family, str]:
    """
    Of a checkpoint, from `architectures`. Where that says nothing, or only a name that no class of transformers has and
    no task can be read from, it is the family's language model, or the bare model if `weights` have nothing of its head.
    """
    class_name = next(iter(config.architectures or ()), None)
    family = family_of(config.model_type)
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


@dataclass
class _NativeSource:
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

    def translation(self, target: PreTrainedModel) -> _Translation:
        return _translation(
            self.family, self.head, self.native, target, self.layout.names, self.layout.load, self.config,
            to_native=False,
        )  # fmt: skip


def _open_native(source: str | Path, ignore_keys: Iterable[str]) -> _NativeSource:
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
    opened = _NativeSource(family, head, native, config, layout, dtype, path, weights=weights)
    if weights.others:
        opened.notes.append(f"Read {weights.file}, as transformers does; {', '.join(weights.others)} was left alone")
    opened.notes += weights.notes
    _untie(opened, native_config, ignore_keys)
    _leave_out_the_pooler(opened)
    _follow_attention(opened)
    return opened


def refuse_quantised(path: Path, values: Mapping[str, Any]) -> None:
    """`ConversionError` for a config.json that says so, by the method's name."""
    if packed := quantisation_of(values):
        raise ConversionError(
            f"{path} says that the weights are quantised ({packed}). Take the model as it was before."
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


def _in_memory(native: PreTrainedModel, ignore_keys: Iterable[str]) -> _NativeSource:
    family, head = family_and_head(native.config, type(native).__name__)
    config = family.config_map.to_variant(native.config, ignore_keys, head)
    part, names, load = _part_of(native, family.native_class(head))
    layout = Layout(names, load, lambda name: load(name).to("meta"), load)
    config.dtype = native.dtype
    opened = _NativeSource(family, head, part, config, layout, native.dtype)
    _untie(opened, native.config, ignore_keys)
    _leave_out_the_pooler(opened)
    _follow_attention(opened)
    return opened


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


def _untie(opened: _NativeSource, native_config: PreTrainedConfig, ignore_keys: Iterable[str]) -> None:
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


def _take_bias_of_head(opened: _NativeSource, bias: str, source: str) -> None:
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


def _leave_out_the_pooler(opened: _NativeSource) -> None:
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


def _follow_attention(opened: _NativeSource) -> None:
    """Attention runs as the native config asks."""
    is_eager = any(stack.eager_by_default for stack in stacks(opened.config))
    asked = opened.native.config._attn_implementation
    if asked not in (None, "eager" if is_eager else "sdpa"):
        opened.config._attn_implementation = asked


def _generation_config(model: PreTrainedModel, source: PreTrainedModel) -> None:
    if model.can_generate() and source.can_generate():
        model.generation_config = copy.deepcopy(source.generation_config)


def stored_generation_config(folder: Path) -> GenerationConfig:
    """
    What stock classes that generate have after loading from a folder; before transformers 4.25, config.json held it.
    """
    path = folder / GENERATION_CONFIG_NAME
    if path.is_file():
        with reading(path):
            return GenerationConfig.from_pretrained(folder)
    with reading(folder / CONFIG_NAME):
        return GenerationConfig.from_pretrained(folder, config_file_name=CONFIG_NAME, _from_model_config=True)


def _write_generation_config(folder: Path, native: PreTrainedModel, source: Path) -> None:
    """Beside a variant, whose config.json does not hold what generation reads, the settings of its source."""
    path = folder / GENERATION_CONFIG_NAME
    theirs = source / GENERATION_CONFIG_NAME
    if path.is_file() or not native.can_generate() or (theirs.is_file() and not belongs(theirs, source)):
        return
    # Not `save_pretrained`, which refuses settings that have no effect together; they were published so.
    path.write_text(stored_generation_config(source).to_json_string(), encoding="utf-8")


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
        opened = _open_native(source, ignore_keys)
    else:
        opened = _in_memory(source, ignore_keys)
    target_class = opened.family.variant_class(opened.head)
    translation = opened.translation(empty_model(target_class, opened.config))
    model = build(target_class, opened.config, translation.in_memory(dtype), dtype, device_map)
    if isinstance(source, PreTrainedModel):
        _generation_config(model, source)
    elif model.can_generate():
        model.generation_config = stored_generation_config(opened.path)
    return model


def native_config_for(
    config: VariantConfig, model_type: str | None = None, head: str = "causal_lm"
) -> tuple[Family, PreTrainedConfig]:
    """
    The native family that can express a variant as it is, and its config.

    Args:
        model_type: the type to use; by default the one it was converted from, or else the first that fits, of which
            those that most engines know come first.
        head: that the type must have a class for.

    Raises:
        NotRepresentable: naming every field in the way and, without `model_type`, the nearest type.
    """
    if model_type is not None:
        family = family_for(model_type, config)
        return family, family.config_map.to_native(config, head)
    origin = (config.native_leftovers or {}).get("model_type")
    candidates = [family for family in all_families_and_parts() if isinstance(config, family.config_map.config_class)]
    nearest: NotRepresentable | None = None
    order = (origin, *WIDELY_KNOWN)
    ranks = {model_type: rank for rank, model_type in reversed(list(enumerate(order)))}
    for family in sorted(candidates, key=lambda family: ranks.get(family.model_type, len(order))):
        # Importing every native class takes seconds, and the first one usually fits.
        if family.native_class(head) is None:
            continue
        try:
            return family, family.config_map.to_native(config, head)
        except NotRepresentable as error:
            if "config" not in error.fields and (nearest is None or len(error.fields) < len(nearest.fields)):
                nearest = error
    if nearest is None:
        raise NotRepresentable("native", {"config": ("this variant", "no type that comes near")})
    raise NotRepresentable(nearest.model_type, nearest.fields, advice=_advice(config, nearest.model_type, head))


def _advice(config: VariantConfig, nearest: str, head: str) -> str:
    """What to do when no native type can express a variant as it is."""
    try:
        _, _, folding = folds.plan(config, nearest, head)
    except NotRepresentable:
        return (
            "No supported native type can express it; this one comes nearest. Change those fields, or share the model "
            "as a variant."
        )
    ways = "; ".join(folding.sentences(config.dtype or torch.float32))
    return f"Ask for {nearest} by name to have the difference folded into the weights: {ways}."


def _target_of(config: VariantConfig, model_type: str | None, head: str) -> tuple[Family, PreTrainedConfig, Folding]:
    """What to export to, with the folds that a type which is asked for by name needs."""
    if model_type is None:
        family, native_config = native_config_for(config, head=head)
        folding = Folding(config)
    else:
        family, native_config, folding = folds.plan(config, model_type, head)
    if family.native_class(head) is None:
        raise NotRepresentable(family.model_type, {"architectures": (family.variant_class(head).__name__, None)})
    return family, native_config, folding


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
    family, native_config, folding = _target_of(model.config, model_type, head)
    target, translation = _exported(
        family, head, model, list(stored_tensors(model)), model.state_dict().__getitem__, native_config, folding
    )
    native_config.dtype = model.dtype
    options = _without_pooler(model.config, head, type(target))
    native = build(type(target), native_config, translation.in_memory(None), None, None, **options)
    _generation_config(native, model)
    report = _report(type(model).__name__, type(native).__name__, "export", family, head, model.config, target)
    _note_folds(report, folding, model.dtype)
    native.conversion_report = report
    return native


def _without_pooler(config: PreTrainedConfig, head: str, native_class: type[PreTrainedModel]) -> dict[str, bool]:
    """The argument with which a stock class makes a bare encoder without a pooler, where ours has none."""
    return {"add_pooling_layer": False} if leaves_out_the_pooler(config, head, (native_class,)) else {}


def _exported(
    family: Family,
    head: str,
    model: PreTrainedModel,
    names: list[str],
    load: tensor_files.TensorSource,
    native_config: PreTrainedConfig,
    folding: Folding,
) -> tuple[PreTrainedModel, _Translation]:
    """An empty native model, and the way to its tensors."""
    native_class = family.native_class(head)
    target = empty_model(native_class, native_config, **_without_pooler(model.config, head, native_class))
    if not model.config.tie_word_embeddings:
        target.all_tied_weights_keys.pop(family.loosely_tied, None)
    names = _check_ties(model, names, load)
    names, load = folding.apply(names, load)
    source = folding.rewrites[-1].after if folding.rewrites else model
    return target, _translation(family, head, source, target, names, load, folding.config, to_native=True)


def _note_folds(report: Report, folding: Folding, dtype: torch.dtype) -> None:
    """Put the folds into a report, and say them aloud: nothing is folded silently."""
    if not folding.rewrites:
        return
    report.folds = folding.sentences(dtype)
    report.exactness = folding.exactness(dtype)
    logger.warning(
        f"This variant is a {report.model_type} model only after changes to its weights, which keep its function: "
        f"{'; '.join(report.folds)}."
    )


def is_gguf(source: str | Path) -> bool:
    """Whether a source is one GGUF file."""
    return str(source).endswith(".gguf")


def config_of_gguf(path: Path) -> VariantConfig:
    """The config of the variant that a GGUF file converts to."""
    return variant_of_gguf(gguf_files.open_checkpoint(path))


def variant_of_gguf(opened: gguf_files.GGUFCheckpoint) -> VariantConfig:
    """
    The config of the variant that an understood GGUF file converts to.

    Raises:
        ConversionError: also if the file says another number of key/value heads than the native class has.
    """
    config = opened.family.config_map.to_variant(opened.config, (), opened.head)
    for stack in stacks(config):
        if stack.num_key_value_heads != opened.heads.keys:
            raise ConversionError(
                f"`{opened.metadata.name('attention.head_count_kv')}` is {opened.heads.keys} in {opened.file.path}, and "
                f"{opened.family.model_type} has {stack.num_key_value_heads}. The file is damaged."
            )
    if not opened.has_pooler:
        config.pooler = False
    config.dtype = opened.dtype
    return config


def _open_gguf(path: Path, ignore_keys: Iterable[str]) -> tuple[gguf_files.GGUFCheckpoint, _NativeSource]:
    """A GGUF file as a native checkpoint, some tensors of which have the names that transformers stores."""
    file = gguf_files.open_checkpoint(path, ignore_keys)
    for note in file.notes:
        logger.warning(f"{file.file.path}: {note}.")
    layout = as_transformers_reads(file.native, _GGUFWeights(file))
    opened = _NativeSource(
        file.family, file.head, file.native, variant_of_gguf(file), layout, file.dtype, path.parent, list(file.notes)
    )
    _untie(opened, file.config, ignore_keys)
    _follow_attention(opened)
    return file, opened


class _GGUFWeights:
    """The tensors of a GGUF file as those of other files are read."""

    def __init__(self, file: gguf_files.GGUFCheckpoint):
        self._file = file

    def names(self) -> list[str]:
        return list(self._file.names())

    def __call__(self, name: str) -> torch.Tensor:
        return self._file.load(name)

    stored = __call__

    def header(self, name: str) -> torch.Tensor:
        return self._file.header(name)


def _from_gguf(
    path: Path, dtype: torch.dtype | str | None, device_map: Any, ignore_keys: Iterable[str]
) -> PreTrainedModel:
    file, opened = _open_gguf(path, ignore_keys)
    target_class = opened.family.variant_class(opened.head)
    translation = opened.translation(empty_model(target_class, opened.config))
    model = build(target_class, opened.config, translation.in_memory(dtype), dtype, device_map)
    if model.can_generate():
        model.generation_config = file.generation_config()
    return model


def _target_of_foreign(opened: ForeignCheckpoint) -> tuple[PreTrainedModel, dict[str, torch.Size]]:
    """The model to fill, without values, and the shapes of its tensors."""
    target = empty_model(variant_class(opened.class_name), opened.config)
    return target, {name: tensor.shape for name, tensor in stored_tensors(target).items()}


def _from_foreign(source: str | Path, dtype: torch.dtype | str | None, device_map: Any) -> PreTrainedModel:
    return _model_of_foreign(open_foreign(source), dtype, device_map)


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


def _model_of_foreign(opened: ForeignCheckpoint, dtype: torch.dtype | str | None, device_map: Any) -> PreTrainedModel:
    target, shapes = _target_of_foreign(opened)
    tensors = opened.tensors(opened.plan(shapes), shapes, opened.load)
    # As copies, which do not change with the file.
    in_memory = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors}
    model = build(type(target), opened.config, in_memory, dtype, device_map)
    model.generation_config = _generation_of_foreign(opened)
    return model


def _generation_of_foreign(opened: ForeignCheckpoint) -> GenerationConfig:
    """The tokens that generation begins and ends with, where the code base has them."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    return GenerationConfig(**{name: getattr(opened.config, name, None) for name in names})


def _convert_foreign(
    source: str | Path, destination: str | Path, dtype: torch.dtype | None, writing: Writing, verify: bool
) -> Report:
    """A checkpoint of another code base."""
    opened = open_foreign(source)
    target, shapes = _target_of_foreign(opened)
    _refuse_to_verify_a_cast(verify, {header.dtype for header in opened.weights.values()}, dtype)
    steps = opened.plan(shapes)
    headers = {name: tensor.to("meta") for name, tensor in opened.tensors(steps, shapes, opened.weights.__getitem__)}
    if dtype is not None:
        opened.config.dtype = dtype
    report = Report(
        source=str(source),
        destination=str(destination),
        direction="convert",
        model_type=opened.code_base,
        head=head_of_variant(opened.class_name),
        tensors=len(headers),
        parameters=_parameters(headers),
        passed_over=dict.fromkeys(opened.computed, "the model computes it"),
        notes=list(opened.notes),
    )
    report.command = command_line("convert", source, destination, dtype=_named(dtype), verify=verify)
    _note_cast(report, headers, dtype)
    as_written = _cast_headers(headers, dtype)
    states = [tensor_files.state_of(path) for path in opened.files]
    writing.task = _task(opened.path, opened.config, as_written, writing.max_shard_bytes, "foreign", states)

    def tensors(but: Set[str]) -> Iterator[tuple[str, Any]]:
        return _cast(opened.tensors(rules.without(steps, but), shapes), dtype)

    with output_folder.new_folder(destination, writing.task) as temporary:
        written = write_checkpoint(temporary, opened.config, target, tensors, as_written, writing, opened.path)
        _note_non_finite(report, written.non_finite)
        _generation_of_foreign(opened).save_pretrained(temporary)
        _complete(temporary, report, opened.path, verify, (), written.digests)
    return report


def load_gguf(path: Path, ignore_keys: Iterable[str] = ()) -> PreTrainedModel:
    """The stock model in a GGUF file."""
    opened = gguf_files.open_checkpoint(path, ignore_keys)
    arguments = {} if opened.has_pooler else {"add_pooling_layer": False}
    model = opened.family.native_class(opened.head).from_pretrained(
        None, config=opened.config, state_dict={name: opened.load(name) for name in opened.names()},
        dtype=opened.dtype, **arguments,
    )  # fmt: skip
    if model.can_generate():
        model.generation_config = opened.generation_config()
    return model.eval()


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ConversionError(f"{dtype!r} is not a floating-point dtype. Use float32, bfloat16 or float16.")
    return named


def _named(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _cast(
    tensors: Iterable[tuple[str, torch.Tensor | tensor_files.Unread]], dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor | tensor_files.Unread]]:
    """The tensors in another dtype."""
    return ((name, tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor) for name, tensor in tensors)


def _cast_headers(headers: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    if dtype is None:
        return dict(headers)
    return {name: header.to(dtype) if header.is_floating_point() else header for name, header in headers.items()}


def write_checkpoint(
    folder: Path,
    config: PreTrainedConfig,
    target: PreTrainedModel,
    tensors: Callable[[Set[str]], Iterable[tuple[str, torch.Tensor | tensor_files.Unread]]],
    headers: Mapping[str, torch.Tensor],
    writing: Writing,
    source: Path,
    weights: checkpoint.Weights | None = None,
    hashes: HashedMeanwhile | None = None,
) -> Written:
    """
    Weights and config of `source` into a folder.

    Args:
        tensors: given the names of those that an earlier run has written, makes the others.
        weights: of the source, where they are read through it.
        hashes: of the source's files, of a caller who has other work while they are computed; by default this waits for
            them, where the tensors' are not taken as they pass by.
    """
    digests = Digests()
    if weights is not None and weights.hash_what_is_read():
        digests.source = weights.digests
    progress = None
    if writing.task is not None:
        shards = tensor_writer.in_shards(headers, writing.max_shard_bytes)
        progress = Progress(folder, writing.task, shards, digests.source)
    kept = {} if progress is None else progress.kept
    config.architectures = [type(target).__name__]
    if is_variant(config):
        config.auto_map = auto_map_of(config, type(target).__name__)
        write_code(folder)
    files = weight_files(source) if digests.source is None else ()
    with nullcontext(hashes) if hashes is not None else HashedMeanwhile(files):
        non_finite = tensor_writer.write_safetensors(
            tensors({name for entry in kept.values() for name in entry.tensors}), headers, folder,
            writing.max_shard_bytes, workers=writing.workers, digests=digests.result, progress=progress,
        )  # fmt: skip
    if progress is not None and digests.source is not None:
        digests.source = progress.source | digests.source
    config.save_pretrained(folder)
    if is_variant(config) and config._attn_implementation is not None:
        # What the source asks for: transformers reads this key, and does not write it.
        path = folder / CONFIG_NAME
        settings = json.loads(path.read_text(encoding="utf-8")) | {"attn_implementation": config._attn_implementation}
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Written(non_finite, digests)


def _task(
    source: Path, config: PreTrainedConfig, headers: Mapping[str, torch.Tensor], max_shard_bytes: int, *more: Any
) -> str:
    """
    A value that is the same where the same tensors come of the same files into the same files.

    Args:
        source: folder or file; of its files of weights and its config, size and time of the last change count.
        more: what else decides.
    """
    files = [*weight_files(source), *([source / CONFIG_NAME] if source.is_dir() else [])]
    said = [
        {str(path.resolve()): tensor_files.state_of(path) for path in files},
        config.to_json_string(use_diff=False),
        [(name, str(header.dtype), list(header.shape)) for name, header in headers.items()],
        max_shard_bytes,
        [version(name) for name in ("hf-variants", "transformers", "torch")],
        more,
    ]
    return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()


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
        apart: names of tensors that the class leaves out and models with another head have (a trained pooler).
        model_type: what it is a checkpoint of.
        deviations: where the arithmetic of a native class differs, and why.
        write_companions: put what travels beside weights and config into a folder whose config.json has been written;
            returns notes on the tokenizer.
        skeleton: the model without memory for its weights.
        native: the same as its own class has it; `None` for one of ours.
    """

    source: str
    path: Path
    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    load: tensor_files.TensorSource
    header: tensor_files.TensorSource
    apart: list[str]
    model_type: str
    deviations: list[str]
    write_companions: Callable[[Path], list[str]]
    skeleton: PreTrainedModel
    native: _NativeSource | None = None

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
    if is_gguf(source):
        file, opened = _open_gguf(Path(source), ignore_keys)
        return _as_variant(str(source), opened, lambda folder: _write_gguf_companions(Path(source), file, folder))
    path = checkpoint.resolve_folder(source)
    config = read_config(path)
    if is_variant(config):
        return _open_own(source, path, config)
    opened = _open_native(source, ignore_keys)

    def write_companions(folder: Path) -> list[str]:
        notes = copy_companions(path, folder)
        _write_generation_config(folder, opened.native, path)
        return notes

    return _as_variant(str(source), opened, write_companions)


def _as_variant(source: str, opened: _NativeSource, write_companions: Callable[[Path], list[str]]) -> OpenedVariant:
    model_class = opened.family.variant_class(opened.head)
    target = empty_model(model_class, opened.config)
    translation, layout = opened.translation(target), opened.layout
    apart = {
        ours: native for native, ours in _for_other_heads(opened.family, opened.head, layout.apart, target).items()
    }
    load, header = translation.lookup(), translation.lookup(layout.header)
    return OpenedVariant(
        source=source,
        path=opened.path,
        config=opened.config,
        model_class=model_class,
        load=lambda name: layout.load(apart[name]) if name in apart else load(name),
        header=lambda name: layout.header(apart[name]) if name in apart else header(name),
        apart=list(apart),
        model_type=opened.family.model_type,
        deviations=[deviation.reason for deviation in opened.family.deviations_of(opened.config)],
        write_companions=write_companions,
        skeleton=target,
        native=opened,
    )


def _open_own(source: str | Path, path: Path, config: PreTrainedConfig) -> OpenedVariant:
    """A folder of ours."""
    if getattr(config, "quantization_config", None) is not None:
        raise ConversionError(
            "The checkpoint is quantised (`quantization_config`). Take the model as it was before, or, where its "
            "quantiser can, `model.dequantize()` it and save it."
        )
    checkpoint.refuse_adapter(path)
    model_class = variant_class((config.architectures or ["VariantForCausalLM"])[0])
    model = empty_model(model_class, config)
    weights = checkpoint.weights_of(source, path)
    layout = as_transformers_reads(model, weights)
    names = _check_ties(model, layout.names, layout.load)
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
        apart=[name for name in layout.apart if re.search(r"(^|\.)pooler\.", name)],
        model_type=(config.native_leftovers or {}).get("model_type", config.model_type),
        deviations=[],
        write_companions=lambda folder: copy_companions(path, folder),
        skeleton=model,
    )


def _write_gguf_companions(path: Path, file: gguf_files.GGUFCheckpoint, folder: Path) -> list[str]:
    """Tokenizer and generation settings of a GGUF file; returns notes on the tokenizer."""
    notes = []
    tokenizer = load_tokenizer(path)
    if isinstance(tokenizer, str):
        notes.append(tokenizer)
        logger.warning(f"No tokenizer is written: {tokenizer}")
    else:
        tokenizer.save_pretrained(folder)
    if file.native.can_generate():
        file.generation_config().save_pretrained(folder)
    return notes


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    ignore_keys: Iterable[str] = (),
    max_shard_bytes: int = tensor_writer.MAX_SHARD_BYTES,
    workers: int | None = None,
    verify: bool = False,
    memory: int | None = None,
) -> Report:
    """
    Convert a native checkpoint into a new folder that `AutoModel*.from_pretrained` loads as a variant, with a model card
    and, in conversion_report.json, what was done.

    Args:
        source: a folder, a Hub id, a file of weights beside a config.json (safetensors, or a state dict that torch
            saved), a GGUF file, or a checkpoint of another code base (see `foreign`).
        destination: a folder that does not exist yet; it appears when everything is written.
        dtype: cast the weights; by default they are copied as they are.
        ignore_keys: keys of the native config that its class reads and that are known to be meaningless all the same.
        max_shard_bytes: largest size of one file.
        workers: threads that read, hash, look through and write tensors; by default one for each of up to four cores.
        verify: compare the result with the source, as `verify` does, which loads both; the card shows the comparison.
        memory: of that comparison, see `verify`.

    A run that was killed is gone on with by the next of the same source, destination and options.

    Raises:
        as `from_native`; FileExistsError if the destination is not empty; VerificationFailed, and nothing is written, if
            the two differ.
    """
    output_folder.refuse_occupied(destination)
    target_dtype = _as_dtype(dtype)
    if memory is not None and (is_gguf(source) or is_foreign(source)):
        raise ConversionError(f"`memory` is for checkpoints in folders, and {source} is none. Leave it out.")
    writing = Writing(max_shard_bytes, workers)
    if is_gguf(source):
        return _convert_gguf(Path(source), destination, target_dtype, ignore_keys, writing, verify)
    if is_foreign(source):
        return _convert_foreign(source, destination, target_dtype, writing, verify)
    opened = _open_native(source, ignore_keys)
    refuse_broken_files(opened.path)
    with _converted(opened, source, destination, target_dtype, writing, verify, ignore_keys) as (
        folder,
        report,
        digests,
    ):
        report.tokenizer = copy_companions(opened.path, folder)
        _write_generation_config(folder, opened.native, opened.path)
        _complete(folder, report, opened.path, verify, ignore_keys, digests, memory)
    return report


@contextmanager
def _converted(
    opened: _NativeSource,
    source: str | Path,
    destination: str | Path,
    dtype: torch.dtype | None,
    writing: Writing,
    verify: bool,
    ignore_keys: Iterable[str],
) -> Iterator[tuple[Path, Report, Digests]]:
    """Weights and config of a variant, in a folder that becomes `destination` when the block ends well."""
    target = empty_model(opened.family.variant_class(opened.head), opened.config)
    translation = opened.translation(target)
    _refuse_to_verify_a_cast(verify, opened.layout.dtypes(), dtype)
    layout = opened.layout
    apart = _for_other_heads(opened.family, opened.head, layout.apart, target)
    headers = translation.headers(layout.header) | {ours: layout.header(name) for name, ours in apart.items()}
    if dtype is not None:
        opened.config.dtype = dtype
    report = _report(source, destination, "convert", opened.family, opened.head, opened.config, target)
    options = {"dtype": _named(dtype), "ignore-key": list(ignore_keys), "verify": verify}
    report.command = command_line("convert", source, destination, **options)
    report.unread = _unread(opened)
    report.part = opened.family.taken_part(next(iter(opened.native.config.architectures or [""])), opened.head)
    report.passed_over, report.notes = layout.passed_over_but(apart), opened.notes
    _note_widened(report, translation.widened(opened.layout.header))
    _note_cast(report, headers, dtype)
    as_written = _cast_headers(headers, dtype)
    files = Path(source) if is_gguf(source) else opened.path
    writing.task = _task(files, opened.config, as_written, writing.max_shard_bytes, "convert")

    def tensors(but: Set[str]) -> Iterator[tuple[str, Any]]:
        beside = ((ours, layout.stored(name)) for name, ours in apart.items() if ours not in but)
        return _cast(chain(translation.tensors(unread=layout.stored, but=but), beside), dtype)

    with output_folder.new_folder(destination, writing.task) as temporary:
        written = write_checkpoint(
            temporary, opened.config, target, tensors, as_written, writing, files, opened.weights
        )
        _note_non_finite(report, written.non_finite)
        yield temporary, report, written.digests
        if opened.weights is not None:
            opened.weights.refuse_changed()


def _convert_gguf(
    path: Path,
    destination: str | Path,
    dtype: torch.dtype | None,
    ignore_keys: Iterable[str],
    writing: Writing,
    verify: bool,
) -> Report:
    checkpoint_file, opened = _open_gguf(path, ignore_keys)
    with _converted(opened, path, destination, dtype, writing, verify, ignore_keys) as (folder, report, digests):
        report.tokenizer = _write_gguf_companions(path, checkpoint_file, folder)
        _complete(folder, report, path.parent, verify, ignore_keys, digests)
    return report


def _refuse_to_verify_a_cast(verify: bool, stored: set[torch.dtype], dtype: torch.dtype | None) -> None:
    if verify and dtype is not None and stored != {dtype}:
        names = ", ".join(sorted(map(str, stored)))
        raise ConversionError(
            f"`verify` compares values bit by bit, and `dtype` {dtype} rounds the source's, which are {names}. "
            "Leave one of the two out."
        )


def _complete(
    folder: Path,
    report: Report,
    opened: Path,
    verify: bool,
    ignore_keys: Iterable[str],
    digests: Digests,
    memory: int | None = None,
) -> None:
    """
    Compare a converted checkpoint with its source, if asked, and write down what was done and seen.

    Args:
        folder: where the checkpoint is until it has its name.
        opened: the folder of the source.
        digests: of the weights.
        memory: of the comparison.
    """
    if verify:
        report.verification = _verified(report, folder, ignore_keys, memory)
    write_record(folder, report.to_dict(), Path(report.source) if is_gguf(report.source) else opened, digests)
    card.write_card(folder, name=last_part(report.destination), lineage=lineage_of_source(report.source, opened))


def lineage_of_source(source: str, opened: Path) -> dict[str, Any]:
    """What the card of a result takes from its source, whose folder is `opened`."""
    lineage = card.lineage_of(root_of(opened))
    return {**lineage, "base_model": source} if is_hub_id(source) else lineage


def _verified(report: Report, folder: Path, ignore_keys: Iterable[str], memory: int | None) -> "VerificationReport":
    # That module reads this one.
    from .verification import verify

    names = {report.source: public_name(report.source), str(folder): last_part(report.destination)}
    verification = verify(report.source, folder, ignore_keys=ignore_keys, memory=memory)
    verification.a, verification.b = names.values()
    for check in verification.checks:
        for path, name in names.items():
            check.name = check.name.replace(f"tensors of {path}", f"tensors of {name}")
    if not verification.ok:
        raise VerificationFailed(verification)
    return verification


def export(
    source: str | Path,
    destination: str | Path,
    *,
    model_type: str | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_bytes: int = tensor_writer.MAX_SHARD_BYTES,
    workers: int | None = None,
    verify: bool = False,
    memory: int | None = None,
) -> Report:
    """
    Write a variant's checkpoint as a native one that stock transformers and every engine load.

    Args:
        source: a folder or Hub id of one of our checkpoints.
        destination: a folder that does not exist yet.
        model_type: as in `to_native`.
        dtype, max_shard_bytes, workers, verify, memory: as in `convert`.

    Raises:
        NotRepresentable: naming every field in the way; ConversionError if the source is not a variant;
            VerificationFailed, and nothing is written, if the two differ.
    """
    target_dtype = _as_dtype(dtype)
    output_folder.refuse_occupied(destination)
    folder = checkpoint.resolve_folder(source)
    config = read_config(folder)
    if not is_variant(config):
        raise ConversionError(
            f"{source} is a {config.model_type} checkpoint, not a variant. Convert it first, or export another folder."
        )
    refuse_quantised(folder / CONFIG_NAME, read_config_values(folder / CONFIG_NAME))
    head = head_of_variant((config.architectures or ["VariantForCausalLM"])[0])
    weights = checkpoint.weights_of(source, folder)
    refuse_more_layers_than_tensors(config, weights)
    variant = empty_model(variant_class((config.architectures or ["VariantForCausalLM"])[0]), config)
    refuse_other_shapes(variant, weights)
    with reading(folder / CONFIG_NAME):
        family, native_config, folding = _target_of(config, model_type, head)
    refuse_broken_files(folder)
    layout = as_transformers_reads(variant, weights)
    _refuse_to_verify_a_cast(verify, layout.dtypes(), target_dtype)
    apart = _for_other_heads(family, head, layout.apart, variant, to_native=True)
    names = _check_ties(variant, layout.names, layout.load)
    target, translation = _exported(family, head, variant, names, layout.load, native_config, folding)
    _, header = folding.apply(names, layout.header)
    stored = config.dtype if config.dtype in tensor_files.FLOATS else weights.dtype()
    native_config.dtype = target_dtype or stored
    headers = translation.headers(header) | {native: layout.header(name) for name, native in apart.items()}
    as_written = Stored(
        target,
        _cast_headers(headers, target_dtype),
        lambda name: target_dtype in (None, headers[name].dtype) and translation.is_recomputed(name),
    )
    report = _report(source, destination, "export", family, head, config, target)
    options = {"to": model_type, "dtype": _named(target_dtype), "verify": verify}
    report.command = command_line("export", source, destination, **options)
    report.tensors, report.parameters = len(as_written.headers), _parameters(as_written.headers)
    report.passed_over, report.notes = layout.passed_over_but(apart), list(weights.notes)
    _note_folds(report, folding, target_dtype or stored)
    _note_widened(report, translation.widened(header))
    _note_cast(report, headers, target_dtype)
    writing = Writing(max_shard_bytes, workers)
    writing.task = _task(
        folder, native_config, as_written.headers, max_shard_bytes, "export", config.to_json_string(), report.folds
    )

    def tensors(but: Set[str]) -> Iterator[tuple[str, Any]]:
        but = as_written.made_of_all(but)
        beside = ((native, layout.stored(name)) for name, native in apart.items() if native not in but)
        unread = None if folding.rewrites else layout.stored
        return as_written(_cast(chain(translation.tensors(unread=unread, but=but), beside), target_dtype))

    with output_folder.new_folder(destination, writing.task) as temporary:
        written = write_checkpoint(
            temporary, native_config, target, tensors, as_written.headers, writing, folder, weights
        )
        report.tokenizer = copy_companions(folder, temporary, to_native=True)
        _note_non_finite(report, written.non_finite)
        if verify:
            report.verification = _verified(report, temporary, (), memory)
        write_record(temporary, report.to_dict(), folder, written.digests)
        card.write_native_card(
            temporary,
            report,
            family.variant_class(head).__name__,
            last_part(destination),
            lineage_of_source(report.source, folder),
        )
        weights.refuse_changed()
    return report


def _note_non_finite(report: Report, names: list[str]) -> None:
    report.non_finite = names
    warn_of_non_finite(names)


def warn_of_non_finite(names: list[str]) -> None:
    """Say aloud which tensors have values that are no numbers."""
    if names:
        logger.warning(
            f"{len(names)} tensors have NaN or infinite values, {names[0]} first: the source is damaged, or "
            "its values are too large for the dtype."
        )


def _note_cast(report: Report, headers: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> None:
    """What a dtype that was asked for does to weights of these: `headers` are those before."""
    floats = [header.dtype for header in headers.values() if header.is_floating_point()]
    cast = [stored for stored in floats if stored != dtype]
    if dtype is None or not cast:
        return
    stored = " and ".join(sorted({str(stored).removeprefix("torch.") for stored in cast}))
    report.exactness = f"cast from {stored} to {str(dtype).removeprefix('torch.')}"
    if len(cast) < len(floats):
        report.exactness += f" ({len(cast)} of {len(floats)} tensors)"


def _unread(opened: _NativeSource) -> dict[str, Any]:
    """The keys that change nothing, without those that stand at what their class has in any case."""
    config = opened.native.config
    usual = type(config)().to_dict()
    found = opened.family.config_map.unread(config, opened.head)
    return {key: value for key, value in found.items() if key not in usual or usual[key] != value}


def _note_widened(report: Report, names: list[str]) -> None:
    if names:
        report.notes.append(f"In the wider of their parts' dtypes, which keeps every value: {rules.some(names)}")


def _report(source, destination, direction, family, head, config, target) -> Report:
    tensors = stored_tensors(target)
    return Report(
        source=str(source),
        destination=str(destination),
        direction=direction,
        model_type=family.model_type,
        head=head,
        tensors=len(tensors),
        parameters=_parameters(tensors),
        deviations=[deviation.reason for deviation in family.deviations_of(config)],
        dropped=_dropped(family, head, config, target.config) if direction == "export" else {},
    )


def _dropped(family: Family, head: str, config: PreTrainedConfig, native: PreTrainedConfig) -> dict[str, Any]:
    """The training settings of a variant that do not come out of its native config again."""
    kept = training_fields(family.config_map.to_variant(native, config.native_leftovers or (), head))
    dropped = {name: value for name, value in training_fields(config).items() if value != kept[name]}
    is_classifier = head not in ("base", "causal_lm", "masked_lm", "seq2seq_lm")
    return {name: value for name, value in dropped.items() if is_classifier or "classifier" not in name}
