"""Adapters (PEFT's): one that was trained on a native model for its variant, and back.

Where weights go is said by the family's rules (`rules`). Each only moves values, so a table of which row and column of
which native weight every row and column of ours is can be read off the operation itself. What an adapter's parameters
must become is found from their shapes: unchanged, or with their rows (columns) moved as the weight's are. Each such
answer is then proved on layers of these shapes with random weights, by PEFT's own forward: what holds for every input
is taken, whatever the method, and what does not is refused by the names of method and module.
"""

import copy
import itertools
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel, PeftType, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import get_peft_model_state_dict
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hf_variants.model.configuration_variant import VariantConfig

from . import checkpoint, output_folder, rules
from .companions import copy_files
from .errors import ConversionError
from .family import Family, family_and_head, family_with_head, head_of_variant, is_variant, read_config
from .native_target import native_config_for
from .pickles import load_state_dict
from .skeleton import empty_model, stored_tensors


logger = logging.get_logger(__name__)

# What a task of PEFT's needs of the base; where it names none, the adapter names the class, or the base has its own.
TASK_HEADS = {
    TaskType.SEQ_CLS: "sequence_classification",
    TaskType.TOKEN_CLS: "token_classification",
    TaskType.QUESTION_ANS: "question_answering",
    TaskType.CAUSAL_LM: "causal_lm",
    TaskType.SEQ_2_SEQ_LM: "seq2seq_lm",
    TaskType.FEATURE_EXTRACTION: "base",
}
# Pairs of factors, (rank, in) and (out, rank), of the methods whose change of a weight is a product of them: adapters of
# several modules become one of the module that holds them all, with the sum of their ranks.
FACTORS = {
    PeftType.LORA: (("lora_A.weight", "lora_B.weight"),),
    PeftType.LOHA: (("hada_w1_b", "hada_w1_a"), ("hada_w2_b", "hada_w2_a")),
}
# What such an adapter may have besides, with a value for every output, and whether that is scaled as the product is.
PER_OUTPUT = {"lora_B.bias": True, "lora_magnitude_vector": False, "lora_magnitude_vector.weight": False}
# Of a factorised method, the config's names of rank and of the numerator of its scale.
SCALES = {PeftType.LORA: ("r", "lora_alpha"), PeftType.LOHA: ("r", "alpha")}
# Ways to initialise that take something out of the base's weight, which PEFT computes again on loading.
INITIALISED_FROM_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
WAY_OUT = "Merge it into its model (`merge_and_unload`), save that, and convert the result."
# Between two ways to the same product in float32; what is wrong differs by about one.
PROOF_TOLERANCE = 1e-4


@dataclass
class AdapterReport:
    """
    What a translation did.

    Attributes:
        source, destination: folders.
        direction: `"convert"` (native to variant) or `"export"` (variant to native).
        model_type: the native type.
        method: of PEFT, such as `"LORA"`.
        modules: how many modules have a part of the adapter.
        whole: tensors that are stored whole (`modules_to_save`, biases, embeddings).
        joined: modules whose adapter is made of several, with a larger rank.
        base: what the result names as its base, or `None`.
    """

    source: str
    destination: str
    direction: str
    model_type: str
    method: str
    modules: int
    whole: int
    joined: list[str] = field(default_factory=list)
    base: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_markdown(self) -> str:
        what = f"{self.model_type} -> variant" if self.direction == "convert" else f"variant -> {self.model_type}"
        lines = [f"**{what}** ({self.method} adapter): {self.modules} modules, {self.whole} whole tensors."]
        if self.joined:
            lines.append(f"- {len(self.joined)} modules hold what several had, with the sum of their ranks")
        if self.base is None:
            lines.append("- It names no base: load that and put the adapter on with `PeftModel.from_pretrained`.")
        return "\n".join(lines)


@dataclass
class Adapter:
    """An adapter in memory: its config, and its tensors by the names of PEFT's file."""

    config: PeftConfig
    tensors: dict[str, torch.Tensor]

    def __post_init__(self):
        # PEFT writes a resized embedding that is trained whole three times, and reads what bears the model's own name.
        copies = {
            name
            for part in (".modules_to_save.", ".original_module.")
            for name in self.tensors
            if name.replace(part, ".") != name and name.replace(part, ".") in self.tensors
        }
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name not in copies}

    @property
    def method(self) -> str:
        return str(getattr(self.config.peft_type, "value", self.config.peft_type))

    @property
    def prefix(self) -> str:
        """What stands before a module's name in the file: a tuner is between PEFT's model and ours, but for prompts."""
        return "base_model." if self.config.is_prompt_learning else "base_model.model."


def is_adapter(source: str | Path) -> bool:
    """Whether a folder holds an adapter, beside a model or alone."""
    return (Path(source).expanduser() / CONFIG_NAME).is_file()


def read_adapter(folder: str | Path) -> Adapter:
    """
    An adapter's config and tensors.

    Raises:
        FileNotFoundError: if one of the two files is missing; ConversionError if PEFT does not know the method.
    """
    folder = Path(folder).expanduser()
    if not is_adapter(folder):
        raise FileNotFoundError(f"{folder} has no {CONFIG_NAME}. Give the folder of an adapter.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise ConversionError(
            f"{folder / CONFIG_NAME} is not a config that peft {peft.__version__} understands ({error}). Install the "
            "version that the adapter was saved with."
        ) from error
    if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    elif (folder / WEIGHTS_NAME).is_file():
        tensors = load_state_dict(folder / WEIGHTS_NAME)
    else:
        raise FileNotFoundError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}. The adapter is incomplete.")
    return Adapter(config, tensors)


@dataclass
class Pair:
    """
    A native model and its variant, without memory for weights.

    Attributes:
        native, variant: on the meta device.
        config (`VariantConfig`): that the rules' operations read.
    """

    family: Family
    head: str
    native: PreTrainedModel
    variant: PreTrainedModel
    config: VariantConfig

    @classmethod
    def of_native(cls, config: PreTrainedConfig, head: str, ignore_keys: Iterable[str] = ()) -> "Pair":
        family = family_with_head(config, head)
        native_class = family.native_class(head)
        if native_class is None:
            raise ConversionError(
                f"The adapter is for {head}, and {config.model_type} has no such class. Correct `task_type` in its "
                f"{CONFIG_NAME}, or `base_model_name_or_path`."
            )
        variant_config = family.config_map.to_variant(config, ignore_keys, head)
        variant = empty_model(family.variant_class(head), variant_config)
        return cls(family, head, empty_model(native_class, config), variant, variant_config)

    @classmethod
    def of_variant(cls, config: VariantConfig, head: str, model_type: str | None = None) -> "Pair":
        family, native_config = native_config_for(config, model_type, head)
        native_class = family.native_class(head)
        if native_class is None:
            raise ConversionError(f"{family.model_type} has no class for {head}. Name another type.")
        variant = empty_model(family.variant_class(head), config)
        return cls(family, head, empty_model(native_class, native_config), variant, config)

    def steps(self, to_native: bool) -> list[rules.Step]:
        """Where every tensor goes; of tied tensors each for itself, since an adapter may have untied them."""
        all_rules = self.family.rules_for(self.head)
        native, ours = stored_tensors(self.native), stored_tensors(self.variant)
        source, target = (ours, native) if to_native else (native, ours)
        found = rules.plan(all_rules, source, target, to_native=to_native)
        places = set((self.native if to_native else self.variant).state_dict()) - set(target)
        for name in (self.variant if to_native else self.native).state_dict().keys() - source.keys():
            for rule in all_rules:
                step = rules.single(rule, name, to_native)
                if step is not None and (step.targets[0] in places or step.targets[0] in target):
                    found.append(step)
                    break
        return found

    def fit(self, adapter: Adapter, to_native: bool) -> int | None:
        """
        Give both models the adapter's number of labels and of tokens.

        Returns:
            the number of tokens, if the adapter's is not the base's.
        """
        labels = next((rule for rule in self.family.rules_for(self.head) if _is_about(rule, "score.{leaf}")), None)
        if labels is not None:
            name = "score.weight" if to_native else labels.native_names()[0].replace("{leaf}", "weight")
            tensor = adapter.tensors.get(adapter.prefix + name)
            if tensor is not None and tensor.shape[0] != self.native.config.num_labels:
                for side in ("native", "variant"):
                    model = getattr(self, side)
                    config = copy.deepcopy(model.config)
                    config.num_labels = tensor.shape[0]
                    setattr(self, side, empty_model(type(model), config))
        rows = vocabulary_of(adapter, self.variant if to_native else self.native)
        if rows is not None:
            for model in (self.native, self.variant):
                model.resize_token_embeddings(rows, mean_resizing=False)
        return rows


def _is_about(rule: rules.Rule, ours: str) -> bool:
    return rule.ours == ours


def vocabulary_of(adapter: Adapter, model: PreTrainedModel) -> int | None:
    """How many tokens an adapter has rows for, where that is not the model's own number."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = getattr(module, "weight", None)
        name = next((name for name, other in model.named_modules() if other is module), None)
        if weight is None or name is None:
            continue
        for key, tensor in adapter.tensors.items():
            inner = key.removeprefix(adapter.prefix)
            if not inner.startswith(f"{name}."):
                continue
            if inner.endswith(".weight") and tensor.shape[1:] == weight.shape[1:]:
                rows = tensor.shape[0]
            elif inner.endswith("lora_embedding_A"):
                rows = tensor.shape[1]
            else:
                continue
            if rows != weight.shape[0]:
                return rows
    return None


def _wrapped(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """What PEFT makes of a model without memory: every module that the config means is found by PEFT itself."""
    config = copy.deepcopy(config)
    if _is_initialised_from_base(config):
        config.init_lora_weights = True
    for name in ("num_layers", "token_dim", "num_attention_heads") if config.is_prompt_learning else ():
        # Of the model, and not what the adapter says of it.
        setattr(config, name, None)
    model_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model_class(copy.deepcopy(model), config, low_cpu_mem_usage=True)


def _is_initialised_from_base(config: PeftConfig) -> bool:
    way = getattr(config, "init_lora_weights", None)
    return isinstance(way, str) and way.lower().startswith(INITIALISED_FROM_BASE)


def _saved_shapes(wrapped: PeftModel) -> dict[str, torch.Size]:
    if wrapped.active_peft_config.is_prompt_learning:
        # Their modules compute what is saved, which they cannot without memory.
        whole = [
            f"base_model.{module}.{name}"
            for module, layer in wrapped.base_model.named_modules()
            if isinstance(layer, ModulesToSaveWrapper)
            for name in layer.original_module.state_dict()
        ]
        own = {f"base_model.{name}": tensor.shape for name, tensor in wrapped.get_base_model().state_dict().items()}
        own = {name.replace(".original_module.", "."): shape for name, shape in own.items()}
        prompts = wrapped.prompt_encoder[wrapped.active_adapter].embedding.weight.shape
        return {"prompt_embeddings": prompts} | {name: own[name] for name in whole}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return {name: tensor.shape for name, tensor in state.items()}


def _plain(name: str) -> str:
    """The model's own name for a tensor, without the layers that PEFT puts around a module."""
    return name.replace(".token_adapter.", ".").replace(".base_layer.", ".")


def check(adapter: Adapter, model: PreTrainedModel, what: str) -> PeftModel:
    """
    That an adapter's tensors are those that its config makes on this model.

    Args:
        model: without memory; its vocabulary is the adapter's.
        what: of the adapter, for messages.

    Returns:
        the model with the adapter's modules, without memory.

    Raises:
        ConversionError: naming tensors that are missing, unknown, or of another shape.
    """
    try:
        wrapped = _wrapped(model, adapter.config)
    except (ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        raise ConversionError(
            f"{what} ({adapter.method}) does not fit {type(model).__name__}: {error}. Check that "
            "`base_model_name_or_path` names the model that it was trained on."
        ) from error
    shapes, own = _saved_shapes(wrapped), model.state_dict()
    extra = {
        name: own[plain].shape
        for name in adapter.tensors
        if name not in shapes and (plain := _plain(name.removeprefix(adapter.prefix))) in own
    }
    expected = shapes | extra
    if adapter.config.is_prompt_learning:
        expected |= {name: t.shape for name, t in adapter.tensors.items() if not name.startswith(adapter.prefix)
                     and name not in expected}  # fmt: skip
    # A pruned AdaLoRA has smaller tensors, as its config says.
    pruned = adapter.config.peft_type == PeftType.ADALORA and getattr(adapter.config, "rank_pattern", None)
    for kind, names in (
        ("lacks", sorted(shapes.keys() - adapter.tensors.keys())),
        ("has no module for", sorted(adapter.tensors.keys() - expected.keys())),
        (
            "has another shape for",
            [] if pruned else sorted(n for n in expected.keys() & adapter.tensors.keys()
                                     if adapter.tensors[n].shape != expected[n]),
        ),
    ):  # fmt: skip
        if names:
            subject = f"{type(model).__name__}" if kind != "lacks" else what
            raise ConversionError(
                f"{what} does not belong to this model: {subject} {kind} {rules.some(names, 3)}. Check that "
                "`base_model_name_or_path` names the model that it was trained on."
            )
    return wrapped


@dataclass
class _Parts:
    """An adapter sorted: parameters by the module they are on, tensors stored whole, and what is no module's."""

    modules: dict[str, dict[str, torch.Tensor]]
    whole: dict[str, tuple[str, torch.Tensor]]
    shared: dict[str, torch.Tensor]
    saved_modules: set[str]


def _sorted_parts(adapter: Adapter, model: PreTrainedModel, wrapped: PeftModel) -> _Parts:
    inner = wrapped.base_model if adapter.config.is_prompt_learning else wrapped.base_model.model
    layers = {n for n, m in inner.named_modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))}
    saved = {name for name, module in inner.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    own, own_modules = model.state_dict(), dict(model.named_modules())
    parts = _Parts({}, {}, {}, saved)
    for key, tensor in adapter.tensors.items():
        name = key.removeprefix(adapter.prefix)
        if name == key:
            parts.shared[key] = tensor
        elif (plain := _plain(name)) in own:
            parts.whole[plain] = (name, tensor)
        else:
            module, suffix = name, ""
            while module and module not in layers:
                module, _, last = module.rpartition(".")
                suffix = f"{last}.{suffix}" if suffix else last
            while module and module not in own_modules:
                # Of nested layers the inner ones are PEFT's.
                module, _, last = module.rpartition(".")
                suffix = f"{last}.{suffix}"
            if not module:
                parts.shared[key] = tensor
            else:
                parts.modules.setdefault(module, {})[suffix] = tensor
    return parts


@dataclass(frozen=True)
class Place:
    """
    Where a module's weight comes from.

    Attributes:
        sources: modules of the other side.
        which, rows: for every output of the module, its number in `sources` and its output there; `None`: all outputs of
            the one source in their order.
        columns: for every input of the module, the input of its sources; `None`: the same.
    """

    sources: tuple[str, ...]
    which: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    @property
    def is_rename(self) -> bool:
        return self.rows is None and self.columns is None


def _place(step: rules.Step, index: int, code: torch.Tensor, sides: tuple[int, int], swapped: bool) -> Place:
    """
    Args:
        code: for every value of the target's weight, which source's value it is.
        sides: the largest of the sources' first and second dimensions, which `code` is made of.
        swapped: whether the target's dimensions are (in, out).
    """
    sources = tuple(name.rpartition(".")[0] for name in step.sources)
    which, first, second = code // (sides[0] * sides[1]), code // sides[1] % sides[0], code % sides[1]
    if swapped:
        which, first, second = which.T, first.T, second.T
    # (out, in): outputs of the source are its first dimension or its second (Conv1D).
    for rows, columns in ((first, second), (second, first)):
        if (rows == rows[:, :1]).all() and (columns == columns[:1]).all() and (which == which[:, :1]).all():
            return Place(sources, which[:, 0], rows[:, 0], columns[0])
    raise ConversionError(f"{step.targets[index]} is no rearrangement of rows and columns. {WAY_OUT}")


def _places(pair: Pair, steps: Iterable[rules.Step], to_native: bool, wanted: set[str]) -> dict[str, Place]:
    """For every module of the target that has to do with `wanted` modules of the source, where its weight is from."""
    source, target = (pair.variant, pair.native) if to_native else (pair.native, pair.variant)
    shapes, made = source.state_dict(), target.state_dict()
    found: dict[str, Place] = {}
    for step in steps:
        modules = [name.rpartition(".")[0] for name in step.sources]
        if wanted.isdisjoint(modules) or not step.sources[0].endswith(".weight"):
            continue
        op = step.rule.op
        if type(op) is rules.Identity:
            found |= {t.rpartition(".")[0]: Place((m,)) for m, t in zip(modules, step.targets)}
            continue
        first = max(shapes[name].shape[0] for name in step.sources)
        second = max(shapes[name].shape[-1] for name in step.sources)
        codes = []
        for number, name in enumerate(step.sources):
            shape = shapes[name].shape
            if len(shape) != 2:
                raise ConversionError(f"An adapter on {modules[number]} cannot be translated. {WAY_OUT}")
            rows = (torch.arange(shape[0]) + number * first)[:, None]
            codes.append((rows * second + torch.arange(shape[1])).contiguous())
        config = rules.resolved(pair.config, step, to_native)
        moved = op.backward(codes, config) if to_native else op.forward(codes, config)
        for index, (name, code) in enumerate(zip(step.targets, moved)):
            module = name.rpartition(".")[0]
            swapped = isinstance(target.get_submodule(module), Conv1D)
            if code.shape != made[name].shape:
                raise ConversionError(f"{name} has another shape than what it is made of. {WAY_OUT}")
            place = _place(step, index, code, (first, second), swapped)
            found[module] = _simplified(place, [source.get_submodule(m) for m in modules])
    return found


def _simplified(place: Place, layers: list[nn.Module]) -> Place:
    """The same with only the sources that have a part in it, and without tables that change nothing."""
    used = sorted(set(place.which.tolist()))
    number = torch.zeros(len(place.sources), dtype=torch.long)
    number[used] = torch.arange(len(used))
    outs, ins = _sizes(layers[used[0]])
    columns = None if torch.equal(place.columns, torch.arange(ins)) else place.columns
    sources = tuple(place.sources[i] for i in used)
    if len(used) == 1 and torch.equal(place.rows, torch.arange(outs)):
        return Place(sources, None, None, columns)
    return Place(sources, number[place.which], place.rows, columns)


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def _gathered(tensors: list[torch.Tensor], place: Place, dim: int) -> torch.Tensor:
    """Slices of the sources' tensors along `dim`, as the rows of the weight are."""
    stacked = [tensor.movedim(dim, 0) for tensor in tensors]
    made = stacked[0].new_empty((len(place.rows), *stacked[0].shape[1:]))
    for number, tensor in enumerate(stacked):
        mine = place.which == number
        made[mine] = tensor[place.rows[mine]]
    return made.movedim(0, dim).contiguous()


def _kept(tensors: list[torch.Tensor], place: Place) -> torch.Tensor:
    return tensors[0]


def _moved_rows(tensors: list[torch.Tensor], place: Place, dim: int) -> torch.Tensor:
    return _gathered(tensors, place, dim)


def _moved_columns(tensors: list[torch.Tensor], place: Place, dim: int) -> torch.Tensor:
    return tensors[0].index_select(dim, place.columns)


class _Workbench(nn.Module):
    """Layers of a model's shapes with random weights, on which PEFT puts the adapter of one module."""

    def __init__(self, layers: Mapping[str, nn.Module]):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def _layer_like(layer: nn.Module, weight: torch.Tensor) -> nn.Module:
    """A layer of this kind and shape, without bias, whose weight (out, in) is given."""
    outs, ins = weight.shape
    if isinstance(layer, Conv1D):
        made = Conv1D(outs, ins)
        made.bias.data.zero_()
        made.weight = nn.Parameter(weight.T.contiguous())
        return made
    made = nn.Linear(ins, outs, bias=False)
    made.weight = nn.Parameter(weight.contiguous())
    return made


def _with_adapter(layers: Mapping[str, nn.Module], config: PeftConfig, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    bench = _Workbench(layers)
    conv1d = any(isinstance(layer, Conv1D) for layer in layers.values())
    config = copy.deepcopy(config)
    for name, value in (
        ("target_modules", list(layers)), ("exclude_modules", None), ("layers_to_transform", None),
        ("layers_pattern", None), ("modules_to_save", None), ("trainable_token_indices", None), ("bias", "none"),
        ("fan_in_fan_out", conv1d), ("init_lora_weights", True),
    ):  # fmt: skip
        if hasattr(config, name):
            setattr(config, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(config, bench)
    for parameter in bench.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return bench.eval()


def _parameters(bench: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The parameters that PEFT would save of one of the layers."""
    state = get_peft_model_state_dict(bench, save_embedding_layers=False)
    return {key.removeprefix(f"{name}."): t for key, t in state.items() if key.startswith(f"{name}.")}


@dataclass
class _Translator:
    """Finds what the parameters of one method become, module by module; what is found for a shape is kept."""

    adapter: Adapter
    source: PreTrainedModel
    target: PreTrainedModel
    known: dict[tuple, dict[str, Any]] = field(default_factory=dict)
    joined: dict[str, tuple[int, float]] = field(default_factory=dict)

    def translated(
        self, module: str, place: Place, parameters: Mapping[str, dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """The parameters of a module of the target; `parameters` are those of the source's modules."""
        config = self.adapter.config
        given = [parameters.get(name) for name in place.sources]
        same_kind = isinstance(self.source.get_submodule(place.sources[0]), Conv1D) == isinstance(
            self.target.get_submodule(module), Conv1D
        )
        if place.is_rename and same_kind:
            return dict(given[0])
        if _is_initialised_from_base(config):
            self._refuse(module, place, f"was initialised from the base's weights ({config.init_lora_weights!r})")
        if any(values is None for values in given):
            given = self._completed(module, place, given)
        if place.rows is None:
            outs = _sizes(self.source.get_submodule(place.sources[0]))[0]
            place = Place(place.sources, torch.zeros(outs, dtype=torch.long), torch.arange(outs), place.columns)
        equal = {
            name for name in given[0] if all(torch.equal(given[0][name], v[name]) for v in given[1:] if name in v)
        }
        recipe = self._recipe(module, place, given, frozenset(equal)) if _alike(given) else None
        if recipe is not None:
            return {name: recipe[name]([values[name] for values in given], place) for name in given[0]}
        return self._joined(module, place, given)

    def _refuse(self, module: str, place: Place, why: str) -> None:
        names = ", ".join(place.sources)
        raise ConversionError(
            f"The {self.adapter.method} adapter on {names} {why}, so it has no exact counterpart on {module}. {WAY_OUT}"
        )

    def _completed(self, module: str, place: Place, given: list) -> list:
        """With parameters that change nothing for the sources that have none."""
        present = next(values for values in given if values is not None)
        method = self.adapter.config.peft_type
        if method == PeftType.IA3:
            neutral = torch.ones_like
        elif method in FACTORS and all(PER_OUTPUT.get(name, True) for name in present):
            neutral = torch.zeros_like
        else:
            without = ", ".join(name for name, values in zip(place.sources, given) if values is None)
            self._refuse(module, place, f"leaves out {without}, which is in the same weight")
        completed = []
        for name, values in zip(place.sources, given):
            outs = _sizes(self.source.get_submodule(name))[0]
            known = next(_sizes(self.source.get_submodule(n))[0] for n, v in zip(place.sources, given) if v is present)
            if values is None:
                # Inputs' side as the others have it, outputs' side changes nothing.
                values = {
                    key: neutral(tensor.new_empty((outs, *tensor.shape[1:])))
                    if tensor.shape[0] == known and self._is_outputs(key, tensor) else tensor
                    for key, tensor in present.items()
                }  # fmt: skip
            completed.append(values)
        return completed

    def _is_outputs(self, key: str, tensor: torch.Tensor) -> bool:
        pairs = FACTORS.get(self.adapter.config.peft_type)
        return key in PER_OUTPUT or key in {outputs for _, outputs in pairs} if pairs else tensor.shape[0] > 1

    def _bench_config(self, names: Mapping[str, str], rank: tuple[int, float] | None = None) -> PeftConfig:
        """The adapter's config for layers of a workbench; `names` gives the module of the model that each stands for."""
        config = copy.deepcopy(self.adapter.config)
        for name, pattern in _patterns(config).items():
            keys = {bench: get_pattern_key(pattern, module) for bench, module in names.items()}
            setattr(config, name, {bench: pattern[key] for bench, key in keys.items() if key in pattern})
        if hasattr(config, "feedforward_modules"):
            flagged = self._feed_forward(self.source, config)
            config.feedforward_modules = [bench for bench, module in names.items() if module in flagged]
        if rank is not None:
            attribute, alpha = SCALES[config.peft_type]
            setattr(config, attribute, rank[0])
            setattr(config, alpha, rank[1])
            config.rank_pattern, config.alpha_pattern = {}, {}
        return config

    @staticmethod
    def _feed_forward(model: PreTrainedModel, config: PeftConfig) -> set[str]:
        """The modules whose inputs IA3 scales."""
        chosen = config.feedforward_modules or ()
        if isinstance(chosen, str):
            return {name for name, _ in model.named_modules() if re.fullmatch(chosen, name)}
        return {name for name, _ in model.named_modules() if any(name.endswith(ending) for ending in chosen)}

    def _recipe(
        self, module: str, place: Place, given: list[dict[str, torch.Tensor]], equal: frozenset[str]
    ) -> dict[str, Any] | None:
        """For each parameter what makes the target's of the sources', proved; `None` if nothing does."""
        sources = [self.source.get_submodule(name) for name in place.sources]
        target = self.target.get_submodule(module)
        if not all(isinstance(layer, (nn.Linear, Conv1D)) for layer in (*sources, target)):
            return None
        names = {f"source{i}": name for i, name in enumerate(place.sources)}
        config = self._bench_config(names)
        tables = (place.which, place.rows, place.columns)
        signature = (
            tuple((type(layer), layer.weight.shape) for layer in (*sources, target)),
            tuple(None if table is None else hash(table.numpy().tobytes()) for table in tables),
            tuple((name, tensor.shape) for values in given for name, tensor in values.items()),
            equal,
            repr({name: getattr(config, name) for name in (*_patterns(config), "feedforward_modules")
                  if hasattr(config, name)}),
        )  # fmt: skip
        if signature not in self.known:
            self.known[signature] = self._prove(place, sources, target, config, equal)
        return self.known[signature]

    def _prove(
        self, place: Place, sources: list[nn.Module], target: nn.Module, config: PeftConfig, equal: frozenset[str]
    ) -> dict[str, Any] | None:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(_sizes(layer), generator=generator) for layer in sources]
        weight = _gathered(weights, place, 0)
        if place.columns is not None:
            weight = weight[:, place.columns]
        benches = {f"source{i}": _layer_like(layer, w) for i, (layer, w) in enumerate(zip(sources, weights))}
        target_config = copy.deepcopy(config)
        for name, pattern in _patterns(config).items():
            setattr(target_config, name, {"target": pattern["source0"]} if "source0" in pattern else {})
        if getattr(target_config, "feedforward_modules", None):
            target_config.feedforward_modules = ["target"]
        # VeRA's matrices, for one, are not on a layer but shared by all.
        try:
            bench = _with_adapter(benches, config, 1)
            made = _with_adapter({"target": _layer_like(target, weight)}, target_config, 2)
        except (ValueError, AttributeError, TypeError):
            return None
        given = [_parameters(bench, f"source{i}") for i in range(len(sources))]
        for name in equal:
            for values in given[1:]:
                values[name].data.copy_(given[0][name])
        wanted = _parameters(made, "target")
        if wanted.keys() != given[0].keys():
            return None
        options = [
            _options([values[name] for values in given], wanted[name], place, name in equal or len(given) == 1)
            for name in wanted
        ]
        for chosen in itertools.islice(itertools.product(*options), 64):
            for name, make in zip(wanted, chosen):
                wanted[name].data.copy_(make([values[name] for values in given], place))
            if _agree(bench, made, place):
                return dict(zip(wanted, chosen))
        return None

    def _joined(self, module: str, place: Place, given: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Products of factors on several modules as one on the module that holds them, block by block."""
        config = self.adapter.config
        pairs = FACTORS.get(config.peft_type)
        factors = {name for pair in pairs or () for name in pair}
        if pairs is None or place.columns is not None or any(v.keys() - factors - PER_OUTPUT.keys() for v in given):
            where = (
                "are one weight there"
                if len(place.sources) > 1
                else "is several there, or has its rows in another order"
            )
            self._refuse(module, place, f"has parameters that cannot be moved: what they are on {where}")
        ranks = [values[pairs[0][0]].shape[0] for values in given]
        scales = [self._scale(name, rank) for name, rank in zip(place.sources, ranks)]
        rank = sum(ranks)
        made = {}
        for number, (inputs, outputs) in enumerate(pairs):
            made[inputs] = torch.cat([values[inputs] for values in given])
            blocks, first = [], 0
            for values, mine, scale in zip(given, ranks, scales):
                block = values[outputs].new_zeros((values[outputs].shape[0], rank))
                # One factor takes what one scale for all cannot say.
                block[:, first : first + mine] = values[outputs] * (scale / scales[0] if number == 0 else 1.0)
                blocks.append(block)
                first += mine
            made[outputs] = _gathered(blocks, place, 0)
        for name in given[0].keys() - factors:
            scaled = [v[name] * (scale / scales[0] if PER_OUTPUT[name] else 1.0) for v, scale in zip(given, scales)]
            made[name] = _gathered(scaled, place, 0)
        rslora = getattr(config, "use_rslora", False)
        self.joined[module] = (rank, scales[0] * (rank**0.5 if rslora else rank))
        return made

    def _scale(self, module: str, rank: int) -> float:
        config = self.adapter.config
        alpha = _resolved(config, SCALES[config.peft_type][1], "alpha_pattern", module)
        return alpha / (rank**0.5 if getattr(config, "use_rslora", False) else rank)


def _alike(given: list[dict[str, torch.Tensor]]) -> bool:
    return all(values.keys() == given[0].keys() for values in given)


def _patterns(config: PeftConfig) -> dict[str, dict[str, Any]]:
    """Settings that hold for modules by name, such as `rank_pattern`; AdaLoRA's are the masks of its parameters."""
    if config.peft_type == PeftType.ADALORA:
        return {}
    names = [name for name in vars(config) if name.endswith("_pattern") and isinstance(getattr(config, name), dict)]
    return {name: getattr(config, name) for name in names}


def _resolved(config: PeftConfig, name: str, pattern: str, module: str) -> Any:
    """A setting of one module."""
    values = getattr(config, pattern, None) or {}
    return values.get(get_pattern_key(values, module), getattr(config, name))


def _options(tensors: list[torch.Tensor], wanted: torch.Tensor, place: Place, equal: bool) -> list[Any]:
    """What a parameter may become, judged by its shape; what moves nothing comes last, as a proof would not see it."""
    found: list[Any] = []
    unchanged = equal and wanted.shape == tensors[0].shape
    last = [int(place.rows[place.which == number].max()) for number in range(len(tensors))]
    for dim in range(wanted.ndim):
        others = {tensor.shape[:dim] + tensor.shape[dim + 1 :] for tensor in (*tensors, wanted)}
        has_rows = all(row < tensor.shape[dim] for row, tensor in zip(last, tensors))
        if len(others) == 1 and wanted.shape[dim] == len(place.rows) and has_rows:
            found.append(partial(_moved_rows, dim=dim))
        if place.columns is not None and unchanged and wanted.shape[dim] == len(place.columns):
            found.append(partial(_moved_columns, dim=dim))
    if unchanged:
        found.append(_kept)
    return found


def _agree(bench: nn.Module, made: nn.Module, place: Place) -> bool:
    """Whether the target's outputs are the sources', moved, for random inputs."""
    first = bench.get_submodule("source0")
    inputs = torch.randn((4, first.in_features), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        outputs = [bench.get_submodule(f"source{i}")(inputs) for i in range(len(place.sources))]
        expected = _gathered(outputs, place, 1)
        got = made.get_submodule("target")(inputs if place.columns is None else inputs[:, place.columns])
    return bool((got - expected).abs().max() <= PROOF_TOLERANCE * expected.std())


def _whole_tensors(
    pair: Pair, steps: Iterable[rules.Step], whole: Mapping[str, tuple[str, torch.Tensor]], to_native: bool
) -> dict[str, tuple[str, torch.Tensor]]:
    """Tensors that an adapter stores whole: the target's name for each, with what PEFT puts inside it, and its value."""
    made: dict[str, tuple[str, torch.Tensor]] = {}
    left = set(whole)
    for step in steps:
        if left.isdisjoint(step.sources):
            continue
        missing = [name for name in step.sources if name not in whole]
        if missing:
            raise ConversionError(
                f"The adapter stores {step.sources[0]} and not {', '.join(missing)}, which is one tensor with it "
                f"there. {WAY_OUT}"
            )
        config = rules.resolved(pair.config, step, to_native)
        tensors = [whole[name][1] for name in step.sources]
        op = step.rule.op
        infix = _infix(*whole[step.sources[0]][:1], step.sources[0])
        for name, tensor in zip(
            step.targets, op.backward(tensors, config) if to_native else op.forward(tensors, config)
        ):
            made[name] = (infix, tensor.contiguous())
        left -= set(step.sources)
    if left:
        raise ConversionError(
            f"The adapter stores {rules.some(sorted(left))}, for which the other model has no place. {WAY_OUT}"
        )
    return made


def _infix(name: str, plain: str) -> str:
    """What stands between module and leaf: nothing, `base_layer.` or `token_adapter.base_layer.`."""
    module, _, leaf = plain.rpartition(".")
    return name.removeprefix(f"{module}.").removesuffix(leaf)


def _saved_roots(target: PreTrainedModel, names: set[str]) -> list[str]:
    """The largest modules that consist of these tensors, which is what `modules_to_save` names."""
    roots = set()
    state = list(target.state_dict())
    for name in names:
        module = name.rpartition(".")[0]
        while parent := module.rpartition(".")[0]:
            inside = {other for other in state if other.startswith(f"{parent}.")}
            if not inside <= names or isinstance(target.get_submodule(parent), (nn.ModuleList, PreTrainedModel)):
                break
            module = parent
        roots.add(module)
    return sorted(roots)


def _named(model: PreTrainedModel, modules: Iterable[str], matches: Any) -> list[str]:
    """The last parts of the modules' names where these mean no other module, or else whole names."""
    modules = sorted(modules)
    short = sorted({name.rpartition(".")[2] for name in modules})
    if sorted(name for name, _ in model.named_modules() if name and matches(short, name)) == modules:
        return short
    return modules


def translate_adapter(adapter: Adapter, pair: Pair, to_native: bool) -> tuple[Adapter, list[str]]:
    """
    The adapter for the other model of the pair.

    Returns:
        the adapter, and the modules whose part is made of several modules'.

    Raises:
        ConversionError: if its tensors are not those of the model that it comes from, or a method cannot be carried over.
    """
    config = adapter.config
    source, target = (pair.variant, pair.native) if to_native else (pair.native, pair.variant)
    for name in ("layer_replication", "target_parameters"):
        if getattr(config, name, None):
            raise ConversionError(f"`{name}` of an adapter cannot be translated. {WAY_OUT}")
    parts = _sorted_parts(adapter, source, check(adapter, source, "The adapter"))
    twice = sorted(parts.saved_modules & parts.modules.keys())
    if twice:
        # "all-linear" on a classifier's dense layer: PEFT takes `pre_classifier` for a `classifier` to be saved as well.
        raise ConversionError(
            f"The {adapter.method} adapter is on {twice[0]}, which it stores whole as well. Leave one of the two out "
            f"(`exclude_modules`) in training. {WAY_OUT}"
        )
    if not to_native:
        _leave_out_what_never_runs(adapter, source, parts)
    steps = pair.steps(to_native)
    places = _places(pair, steps, to_native, set(parts.modules))
    adapted = {module: place for module, place in places.items() if not parts.modules.keys().isdisjoint(place.sources)}
    lost = parts.modules.keys() - {name for place in adapted.values() for name in place.sources}
    if lost:
        raise ConversionError(
            f"The {adapter.method} adapter is on {rules.some(sorted(lost))}, for which the other model has no module. "
            f"{WAY_OUT}"
        )
    tied_to_all = [key for key in parts.shared if not config.is_prompt_learning]
    moved = sorted(module for module, place in adapted.items() if not place.is_rename)
    if tied_to_all and moved:
        raise ConversionError(
            f"{adapter.method} shares {tied_to_all[0]} between modules, and {moved[0]} is not one of the source's. "
            f"{WAY_OUT}"
        )
    translator = _Translator(adapter, source, target)
    tensors = dict(parts.shared)
    prefix = adapter.prefix
    modules = {}
    for module, place in adapted.items():
        modules[module] = translator.translated(module, place, parts.modules)
        tensors |= {f"{prefix}{module}.{name}": tensor for name, tensor in modules[module].items()}
    whole = _whole_tensors(pair, steps, parts.whole, to_native)
    for name, (infix, tensor) in whole.items():
        module, _, leaf = name.rpartition(".")
        tensors[f"{prefix}{module}.{infix}{leaf}"] = tensor
    saved = {
        name
        for step in steps
        if any(_is_inside(source_name, parts.saved_modules) for source_name in step.sources)
        for name in step.targets
        if name in whole
    }
    made = Adapter(
        _translated_config(adapter, source, target, adapted, modules, saved, translator.joined),
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
    )
    check(made, target, "The translated adapter")
    return made, sorted(translator.joined)


def _leave_out_what_never_runs(adapter: Adapter, native: PreTrainedModel, parts: _Parts) -> None:
    """
    Take an adapter off a table that both stacks of an encoder-decoder have copies of: its class holds it for its weight
    alone (`shared` of T5 and BART), so that an adapter has no effect there, and would have one here.
    """
    if not native.config.is_encoder_decoder:
        return
    run = {id(module) for stack in (native.get_encoder(), native.get_decoder()) for module in stack.modules()}
    for name, values in list(parts.modules.items()):
        module = native.get_submodule(name)
        # Trained tokens are on every copy: PEFT ties them as the table is tied.
        of_tokens = all(key.startswith("token_adapter.") for key in values)
        if of_tokens or not isinstance(module, nn.Embedding) or id(module) in run:
            continue
        del parts.modules[name]
        what = f"on {name}, which {type(native).__name__} holds for its weight and never runs, where it has no effect"
        if not parts.modules and not parts.whole:
            raise ConversionError(f"The {adapter.method} adapter is {what}. There is nothing to convert.")
        logger.warning(f"The {adapter.method} adapter is {what}. That part is left out.")


def _is_inside(name: str, modules: set[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _translated_config(
    adapter: Adapter,
    source: PreTrainedModel,
    target: PreTrainedModel,
    adapted: Mapping[str, Place],
    parameters: Mapping[str, Mapping[str, torch.Tensor]],
    saved: set[str],
    joined: Mapping[str, tuple[int, float]],
) -> PeftConfig:
    """The config that makes exactly these modules on the target."""
    old = adapter.config
    config = copy.deepcopy(old)
    tokens_only = {
        module for module, values in parameters.items() if all(name.startswith("token_adapter.") for name in values)
    }
    tuned = adapted.keys() - tokens_only
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if hasattr(config, name):
            setattr(config, name, None)
    if hasattr(config, "modules_to_save"):
        roots = _saved_roots(target, saved)
        config.modules_to_save = (
            _named(target, roots, lambda short, name: any(name.endswith(s) for s in short)) or None
        )
    if getattr(config, "target_modules", None) is not None:
        probe = copy.copy(config)

        def matches(short: list[str], name: str) -> bool:
            probe.target_modules = set(short)
            return check_target_module_exists(probe, name) is True

        config.target_modules = set(_named(target, tuned, matches))
    if getattr(config, "feedforward_modules", None):
        flagged = _Translator._feed_forward(source, old)
        inputs = {module for module, place in adapted.items() if not flagged.isdisjoint(place.sources)}
        # PEFT wants these to be among those, as they are spelled.
        short = {name.rpartition(".")[2] for name in inputs} & config.target_modules
        if short and {name for name in tuned if name.rpartition(".")[2] in short} == inputs:
            inputs = short
        else:
            config.target_modules = set(tuned)
        config.feedforward_modules = inputs
    for name, pattern in _patterns(old).items():
        settings = {
            module: pattern[key]
            for module, place in adapted.items()
            if (key := get_pattern_key(pattern, place.sources[0])) in pattern
        }
        setattr(config, name, {re.escape(module): value for module, value in settings.items()})
    if joined:
        _set_ranks(config, old, adapted, joined)
    if isinstance(getattr(config, "trainable_token_indices", None), dict):
        indices = config.trainable_token_indices
        config.trainable_token_indices = {
            module: value
            for key, value in indices.items()
            for module, place in adapted.items()
            if place.sources[0] == key or place.sources[0].endswith(f".{key}")
        }
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = any(isinstance(target.get_submodule(module), Conv1D) for module in tuned)
    if config.peft_type == PeftType.ADALORA and config.rank_pattern:
        config.rank_pattern = _renamed_masks(config.rank_pattern, adapted)
    if config.auto_mapping is not None:
        config.auto_mapping = {
            "base_model_class": type(target).__name__,
            "parent_library": type(target).__module__,
        }
    config.base_model_name_or_path = config.revision = None
    return config


def _renamed_masks(masks: Mapping[str, Any], adapted: Mapping[str, Place]) -> dict[str, Any]:
    """AdaLoRA's masks of the ranks that it kept, by the names of its parameters."""
    renamed = {}
    for key, mask in masks.items():
        for module, place in adapted.items():
            for source in place.sources:
                before, found, after = key.partition(f"{source}.lora_E")
                if found and (not before or before.endswith(".")):
                    renamed[f"{before}{module}.lora_E{after}"] = mask
    return renamed


def _set_ranks(
    config: PeftConfig, old: PeftConfig, adapted: Mapping[str, Place], joined: Mapping[str, tuple[int, float]]
) -> None:
    """Rank and scale of every module, the commonest as the default."""
    rank_name, alpha_name = SCALES[config.peft_type]
    values = {
        module: joined.get(module)
        or (
            _resolved(old, rank_name, "rank_pattern", place.sources[0]),
            _resolved(old, alpha_name, "alpha_pattern", place.sources[0]),
        )
        for module, place in adapted.items()
    }
    (rank, alpha), _ = Counter(values.values()).most_common(1)[0]
    setattr(config, rank_name, rank)
    setattr(config, alpha_name, alpha)
    config.rank_pattern = {re.escape(module): r for module, (r, _) in values.items() if r != rank}
    config.alpha_pattern = {re.escape(module): a for module, (_, a) in values.items() if a != alpha}


def head_of_adapter(adapter: Adapter, base: PreTrainedConfig) -> str:
    """The head that the adapter's base has: of its task, of the class that it names, or of the base's checkpoint."""
    mapping = adapter.config.auto_mapping or {}
    if adapter.config.task_type in TASK_HEADS:
        return TASK_HEADS[adapter.config.task_type]
    class_name = mapping.get("base_model_class") or next(iter(base.architectures or ()), None)
    if is_variant(base):
        return "causal_lm" if class_name is None else head_of_variant(class_name)
    return family_and_head(base, class_name)[1]


def _config_of_base(adapter: Adapter, folder: Path, base: str | Path | None) -> PreTrainedConfig:
    name = base or adapter.config.base_model_name_or_path
    if not name:
        raise ConversionError(
            f"`base_model_name_or_path` in {folder / CONFIG_NAME} is empty. Name the checkpoint that the adapter was "
            "trained on there, or as the base."
        )
    return read_config(checkpoint.resolve_folder(name))


def convert_adapter(
    source: str | Path,
    destination: str | Path,
    *,
    base: str | Path | None = None,
    onto: str | Path | None = None,
    ignore_keys: Iterable[str] = (),
) -> AdapterReport:
    """
    Write an adapter that was trained on a native model as one of its variant, in a new folder.

    Args:
        source: the adapter's folder.
        destination: a folder that does not exist yet.
        base: the native checkpoint it was trained on (of which the config is read); by default the one that it names.
        onto: the variant's checkpoint, which the result names as its base.
        ignore_keys: as in `convert`.

    Raises:
        ConversionError: if its tensors do not belong to the base, or a method cannot be carried over exactly, naming
            method and module.
    """
    adapter = read_adapter(source)
    config = _config_of_base(adapter, Path(source), base)
    if is_variant(config):
        raise ConversionError(f"The base of {source} is a variant already. Export the adapter, or name another base.")
    pair = Pair.of_native(config, head_of_adapter(adapter, config), ignore_keys)
    return _written(adapter, pair, source, destination, onto, to_native=False)


def export_adapter(
    source: str | Path,
    destination: str | Path,
    *,
    base: str | Path | None = None,
    onto: str | Path | None = None,
    model_type: str | None = None,
) -> AdapterReport:
    """
    Write an adapter of a variant as one of the native model that it exports to, in a new folder.

    Args:
        source, destination, base: as in `convert_adapter`; the base is a variant.
        onto: the native checkpoint, which the result names as its base.
        model_type: the native type; by default the one that the variant came from.

    Raises:
        NotRepresentable: if the base is no model of that type as it is; ConversionError as `convert_adapter`.
    """
    adapter = read_adapter(source)
    config = _config_of_base(adapter, Path(source), base)
    if not is_variant(config):
        raise ConversionError(
            f"The base of {source} is a {config.model_type} model, not a variant. Convert it instead."
        )
    pair = Pair.of_variant(config, head_of_adapter(adapter, config), model_type)
    return _written(adapter, pair, source, destination, onto, to_native=True)


def _written(
    adapter: Adapter, pair: Pair, source: str | Path, destination: str | Path, onto: str | Path | None, to_native: bool
) -> AdapterReport:
    output_folder.refuse_occupied(destination)
    pair.fit(adapter, to_native)
    made, joined = translate_adapter(adapter, pair, to_native)
    made.config.base_model_name_or_path = None if onto is None else str(onto)
    with output_folder.new_folder(destination) as temporary:
        _save(made, temporary)
        copy_files(Path(source).expanduser(), temporary)
    whole = sum(_plain(key.removeprefix(made.prefix)) in _state(pair, to_native) for key in made.tensors)
    modules = {key.rpartition(".")[0] for key in made.tensors}
    return AdapterReport(
        source=str(source),
        destination=str(destination),
        direction="export" if to_native else "convert",
        model_type=pair.family.model_type,
        method=adapter.method,
        modules=len(modules) - whole,
        whole=whole,
        joined=joined,
        base=made.config.base_model_name_or_path,
    )


def _state(pair: Pair, to_native: bool) -> Mapping[str, torch.Tensor]:
    return (pair.native if to_native else pair.variant).state_dict()


def _save(adapter: Adapter, folder: Path) -> None:
    save_file(adapter.tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    adapter.config.inference_mode = True
    adapter.config.save_pretrained(str(folder))


def load_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    base: str | Path | None = None,
    ignore_keys: Iterable[str] = (),
) -> PeftModel:
    """
    A variant with an adapter on it, which was trained on this variant or on the native model that it comes from.

    Args:
        model: one of ours; its vocabulary is resized in place where the adapter was trained with more tokens.
        folder: the adapter's.
        base: the checkpoint it was trained on; by default the one that it names. A variant's adapter needs none.

    Raises:
        ConversionError: if its tensors do not belong to the model, or a method cannot be carried over exactly.
    """
    adapter = read_adapter(folder)
    name = base or adapter.config.base_model_name_or_path
    config = None if not name else read_config(checkpoint.resolve_folder(name))
    head = head_of_variant(type(model).__name__)
    if config is not None and not is_variant(config):
        pair = Pair.of_native(config, head, ignore_keys)
        rows = pair.fit(adapter, to_native=False)
        adapter, _ = translate_adapter(adapter, pair, to_native=False)
        adapter.config.base_model_name_or_path = str(name)
    else:
        rows = vocabulary_of(adapter, model)
    tokens = _tokenizer_length(folder)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    elif tokens is not None and tokens > model.get_input_embeddings().weight.shape[0]:
        # As PEFT's own loader does.
        model.resize_token_embeddings(tokens)
    skeleton = empty_model(type(model), model.config)
    check(adapter, skeleton, f"The adapter in {folder}")
    return put_on(model, adapter)


def _tokenizer_length(folder: str | Path) -> int | None:
    if not (Path(folder).expanduser() / "tokenizer_config.json").is_file():
        return None
    return len(AutoTokenizer.from_pretrained(folder))


def put_on(model: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """PEFT's own loading, from a folder: it knows what each method needs."""
    model_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(adapter.config.task_type, PeftModel)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*save_embedding_layers.*")
        _save(adapter, Path(folder))
        return model_class.from_pretrained(model, folder).eval()
