"""
Which keys of a native config its stock class reads: what it does not read changes nothing, and is no obstacle.

The answer comes from the source of the installed transformers: the fields of the config class, and every attribute that
the models' code reads off a config, as far as it reaches through transformers' own modules.
"""

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from hf_variants.model.configuration_variant import VariantConfig
from hf_variants.model.configuration_variant_seq2seq import VariantSeq2SeqConfig


# The types of our own checkpoints.
VARIANT_TYPES = (VariantConfig.model_type, VariantSeq2SeqConfig.model_type)

# Of what models reach, these parts read the configs of other things: drafting models, adapters, experts, ...
ELSEWHERE = tuple(
    f"transformers.{name}"
    for name in (
        "utils", "quantizers", "trainer", "distributed", "models.auto", "generation.candidate_generator",
        "generation.streamers", "generation.configuration_utils", "generation.continuous_batching", "tokenization",
        "processing", "modelcard", "exporters", "safetensors_conversion", "core_model_loading", "fusion_mapping",
        "modeling_gguf_pytorch_utils", "backbone_utils", "dynamic_module_utils", "integrations.peft",
        "integrations.deepspeed", "integrations.hub_kernels", "integrations.moe", "integrations.sonicmoe",
        "integrations.deepgemm", "loss.loss_d", "loss.loss_f", "loss.loss_g", "loss.loss_l", "loss.loss_r",
    )
)  # fmt: skip
# Configs that are not the model's: of generation, loading, compilation, ...
OTHER_CONFIGS = ("generation", "generate", "load", "cache", "compile", "quantization", "watermarking", "kernel")

# What transformers reads of any config without an effect on the outputs of a trained model.
WITHOUT_EFFECT = {
    "gradient_checkpointing": "saves memory in training",
    "initializer_range": "used in the initialisation only",
    "initializer_factor": "used in the initialisation only",
    "init_std": "used in the initialisation only",
    "sep_token_id": "looked at for a warning about padding only",
    "token_classification_bias": "read by token classifiers only, whose weights show it",
}


# What earlier releases computed and the installed one may not read any more, and the values that mean nothing.
RETIRED = {"pruned_heads": (None, {}), "add_cross_attention": (None, False)}

# Keys of older configs for what stands among `rope_parameters` today.
ROPE_KEYS = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")

# Words in the names of keys, and in their values, for position encodings.
POSITIONS = {"rotary": "rope", "rope": "rope", "alibi": "alibi"}

# What a key's value means for a model.
IDLE, UNKNOWN, SWITCHED = "changes nothing", "read, and not understood", "read, and switches something"


@dataclass
class Reads:
    """
    The attributes of a config that code reads.

    Attributes:
        names: of all of them.
        defaults: what `getattr` gives where one of them is absent, wherever that stands there as a literal.
    """

    names: set[str] = field(default_factory=set)
    defaults: dict[str, list[Any]] = field(default_factory=dict)

    def __ior__(self, other: "Reads") -> "Reads":
        self.names |= other.names
        for key, values in other.defaults.items():
            self.defaults.setdefault(key, []).extend(values)
        return self


@dataclass(frozen=True)
class _Module:
    """A module's top-level definitions by name, and what its imports bind: name -> (module, name there)."""

    definitions: dict[str, list[ast.stmt]]
    imports: dict[str, tuple[str, str]]


@cache
def _parsed(module_name: str) -> _Module:
    module = sys.modules.get(module_name) or importlib.import_module(module_name)
    package = module_name if hasattr(module, "__path__") else module_name.rpartition(".")[0]
    path = inspect.getsourcefile(module)
    tree = ast.parse(Path(path).read_text(encoding="utf-8") if path else "")
    imports: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            imports |= {alias.asname or alias.name: (origin, alias.name) for alias in node.names}
    definitions: dict[str, list[ast.stmt]] = {}
    for statement in _statements(tree.body):
        for name in _bound(statement):
            definitions.setdefault(name, []).append(statement)
    return _Module(definitions, imports)


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Top-level statements, also those under a condition (`if is_torch_available():`)."""
    for statement in body:
        if isinstance(statement, (ast.If, ast.Try)):
            yield from _statements([*statement.body, *statement.orelse])
        else:
            yield statement


def _bound(statement: ast.stmt) -> list[str]:
    if isinstance(statement, (ast.ClassDef, ast.FunctionDef)):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _definition(module_name: str, name: str) -> tuple[str, str] | None:
    """Where a name that stands in a module is defined, if in code of transformers that models run."""
    while module_name.startswith("transformers.") and not module_name.startswith(ELSEWHERE):
        module = _parsed(module_name)
        if name in module.definitions:
            return (module_name, name) if not _is_config_module(module_name) else None
        if name in module.imports:
            module_name, name = module.imports[name]
            continue
        # A package that imports lazily.
        origin = getattr(getattr(sys.modules[module_name], name, None), "__module__", module_name)
        if origin == module_name:
            return None
        module_name = origin
    return None


def _is_config_module(module_name: str) -> bool:
    """Config classes run when a config is made, and what they read shows in their fields; but see `_methods`."""
    return module_name.rpartition(".")[2].startswith("configuration_")


def _last_name(node: ast.AST) -> str:
    """Of `self.model.config`, `config`; of `config.get_text_config()`, the method."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_config(node: ast.AST, of_config: bool = False) -> bool:
    """Whether an expression is a model's config, as far as its names say; inside a config class, `self` is."""
    if isinstance(node, ast.Subscript):
        return _last_name(node.value) == "per_layer_config"
    name = _last_name(node)
    if name in ("encoder", "decoder") and isinstance(node, ast.Attribute):
        return _is_config(node.value)
    return (of_config and name == "self") or (
        name.lower().endswith("config") and not name.lstrip("_").startswith(OTHER_CONFIGS)
    )


def _looked_up(call: ast.Call, of_config: bool) -> ast.expr | None:
    """The key that `getattr`, `hasattr`, `get` or `pop` looks up in a config."""
    function = _last_name(call)
    if function in ("getattr", "hasattr") and isinstance(call.func, ast.Name) and len(call.args) > 1:
        return call.args[1] if _is_config(call.args[0], of_config) else None
    if function in ("get", "pop") and isinstance(call.func, ast.Attribute) and call.args:
        return call.args[0] if _is_config(call.func.value, of_config) else None
    return None


def _listed_names(function: ast.AST) -> set[str]:
    """The names in a function's lists: one that looks up computed keys may mean any of them."""
    listed = (node for node in ast.walk(function) if isinstance(node, (ast.List, ast.Tuple, ast.Set)))
    constants = (item.value for node in listed for item in node.elts if isinstance(item, ast.Constant))
    return {value for value in constants if isinstance(value, str) and value.isidentifier()}


def _reads_in(code: ast.AST, of_config: bool = False) -> Reads:
    """What a piece of code reads."""
    plain: set[str] = set()
    defaults: dict[str, list[Any]] = {}
    for node in ast.walk(code):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and _is_config(node.value, of_config):
            plain.add(node.attr)
        elif isinstance(node, ast.Call) and (key := _looked_up(node, of_config)) is not None:
            if not isinstance(key, ast.Constant):
                continue
            default = node.args[2] if _last_name(node) == "getattr" and len(node.args) > 2 else None
            if isinstance(default, ast.Constant):
                defaults.setdefault(key.value, []).append(default.value)
            else:
                plain.add(key.value)
        elif isinstance(node, ast.FunctionDef):
            calls = (inner for inner in ast.walk(node) if isinstance(inner, ast.Call))
            keys = (_looked_up(call, of_config) for call in calls)
            if any(key is not None and not isinstance(key, ast.Constant) for key in keys):
                plain |= _listed_names(node)
    return Reads(plain | defaults.keys(), defaults)


@cache
def _reads_of(module_name: str, name: str) -> tuple[Reads, frozenset[str]]:
    """What a top-level definition reads, and the names that it refers to."""
    reads, referred = Reads(), set()
    for statement in _parsed(module_name).definitions[name]:
        reads |= _reads_in(statement)
        referred |= {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    return reads, frozenset(referred)


@cache
def _methods(config_class: type[PreTrainedConfig], inherited: bool) -> Mapping[str, list[ast.FunctionDef]]:
    """The functions of a config class by name; those of transformers' base class, which models call, if asked."""
    found: dict[str, list[ast.FunctionDef]] = {}
    for owner in config_class.__mro__:
        if owner is PreTrainedConfig and not inherited:
            break
        if owner.__module__.startswith("transformers."):
            for statement in _parsed(owner.__module__).definitions.get(owner.__name__, []):
                for function in ast.walk(statement):
                    if isinstance(function, ast.FunctionDef):
                        found.setdefault(function.name, []).append(function)
    return found


@cache
def reads_of(config_class: type[PreTrainedConfig], model_classes: tuple[type[PreTrainedModel], ...]) -> Reads:
    """
    What models read off their config, beside the fields that its class declares.

    Args:
        config_class: of the models, or of one of their parts.
        model_classes: in transformers.
    """
    reached: set[tuple[str, str]] = set()
    waiting = [(model_class.__module__, model_class.__name__) for model_class in model_classes]
    reads = Reads()
    while waiting:
        place = waiting.pop()
        if place in reached:
            continue
        reached.add(place)
        own, referred = _reads_of(*place)
        reads |= own
        waiting += filter(None, (_definition(place[0], name) for name in referred))
    methods = dict(_methods(config_class, inherited=True))
    while called := reads.names & methods.keys():
        for name in called:
            for function in methods.pop(name):
                reads |= _reads_in(function, of_config=True)
    return reads


@cache
def _texts(module_names: tuple[str, ...]) -> tuple[str, ...]:
    """The source of these modules, and of every module of transformers that their code may lead to (see `reads_of`)."""
    texts: dict[str, str] = {}
    waiting = list(module_names)
    while waiting:
        name = waiting.pop()
        if name in texts or not name.startswith("transformers.") or name.startswith(ELSEWHERE):
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        path = Path(spec.origin)
        texts[name] = path.read_text(encoding="utf-8")
        package = name if spec.submodule_search_locations else name.rpartition(".")[0]
        # Without a boundary before it, since a search for a literal beginning takes a twentieth of the time.
        for dots, module, names in re.findall(r"from\s+(\.*)([\w.]*)\s+import\s+(\w*)", texts[name]):
            base = ".".join(package.split(".")[: 1 - len(dots) or None]) if dots else ""
            waiting.append(".".join(filter(None, (base, module))) or names)
        if spec.submodule_search_locations and name.count(".") == 1:
            # One that imports lazily.
            waiting += (f"{name}.{file.stem}" for file in path.parent.glob("*.py") if file != path)
    return tuple(texts.values())


@cache
def _are_mentioned(
    names: frozenset[str], config_class: type[PreTrainedConfig], model_classes: tuple[type[PreTrainedModel], ...]
) -> bool:
    """
    Whether the code in which `reads_of` looks has one of these names where a read would have it, behind a dot or in quotes.
    Looking for that takes a fiftieth of its time, and where there is none, no key is read.
    """
    classes = (*model_classes, *(owner for owner in config_class.__mro__ if owner is not object))
    texts = _texts(tuple(sorted({found.__module__ for found in classes})))
    # Most names stand in no text at all, which is seen at once.
    return any(
        re.search(rf"(\.\s*|[\"']){re.escape(name)}\b", text) is not None
        for name in names
        for text in texts
        if name in text
    )


@cache
def _read_by_any_class(config_class: type[PreTrainedConfig]) -> frozenset[str]:
    """What the classes of a type read, beside the fields that the config declares."""
    name = config_class.__module__.replace(".configuration_", ".modeling_")
    if importlib.util.find_spec(name) is None:
        # Of a type that runs with another's classes (InternLM 3 with Llama's).
        name = MODEL_MAPPING[config_class].__module__
    module = importlib.import_module(name)
    classes = (
        found for found in vars(module).values() if isinstance(found, type) and found.__module__ == module.__name__
    )
    models = tuple(found for found in classes if issubclass(found, PreTrainedModel))
    return frozenset(reads_of(config_class, models).names | _reads_itself(config_class))


def may_be_read(model_type: Any, key: str) -> bool:
    """
    Whether a class of a type may read a key of its config.json, or transformers may for any type.

    Args:
        model_type: as the file has it.
    """
    if model_type in VARIANT_TYPES:
        # Where what nothing reads is kept for the way back.
        return key != "native_leftovers"
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return True
    config_class = CONFIG_MAPPING[model_type]
    declared = hasattr(config_class, key) or key in (*config_class.__dataclass_fields__, *config_class.attribute_map)
    return declared or key in RETIRED or hasattr(GenerationConfig(), key) or key in _read_by_any_class(config_class)


def verdicts(
    config: PreTrainedConfig,
    values: Mapping[str, Any],
    model_classes: tuple[type[PreTrainedModel], ...],
    is_own: bool = False,
) -> dict[str, str]:
    """
    What each of these keys of a config means: `IDLE`, `UNKNOWN` or `SWITCHED`.

    Args:
        config: native, whole or nested.
        values: those of its keys that are in question, with their values.
        model_classes: that read it.
        is_own: whether the type is not transformers', and other code than its own may have read the config.
    """
    config_class = type(config)
    in_question = values.keys() - RETIRED.keys() - WITHOUT_EFFECT.keys()
    names = frozenset().union(*(_names_of(config_class, key) for key in in_question))
    is_needed = bool(names) and _are_mentioned(names, config_class, model_classes)
    reads = reads_of(config_class, model_classes) if is_needed else Reads()
    declared = config_class.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
    if not is_own:
        declared = {
            name
            for name in declared
            if is_needed and _names_of(config_class, name) & (reads.names | _reads_itself(config_class))
        }
    return {key: _verdict(config, key, value, reads, declared, is_own) for key, value in values.items()}


def _names_of(config_class: type[PreTrainedConfig], name: str) -> set[str]:
    """A field's name and its aliases."""
    return {name, *(alias for alias, target in config_class.attribute_map.items() if target == name)}


@cache
def _reads_itself(config_class: type[PreTrainedConfig]) -> frozenset[str]:
    """What a config class reads of itself, to compute other fields."""
    functions = [function for same in _methods(config_class, inherited=False).values() for function in same]
    return frozenset().union(*(_reads_in(function, of_config=True).names for function in functions))


def _verdict(config: PreTrainedConfig, key: str, value: Any, reads: Reads, declared: set[str], is_own: bool) -> str:
    if key in RETIRED:
        return IDLE if value in RETIRED[key] else SWITCHED
    if key in WITHOUT_EFFECT:
        return IDLE
    if key in declared:
        return UNKNOWN
    if key not in reads.names:
        noted = is_own and not key.startswith("_") and value not in (None, False, {}, [], "")
        return UNKNOWN if noted else IDLE
    if value is None or _is_implied(config, key, value):
        return IDLE
    defaults = reads.defaults.get(key)
    if defaults is None:
        return UNKNOWN
    return IDLE if all(value == default for default in defaults) else SWITCHED


def _is_implied(config: PreTrainedConfig, key: str, value: Any) -> bool:
    """Whether the value of a key that its class does not declare is what transformers takes in its absence."""
    heads = getattr(config, "num_attention_heads", None)
    context = getattr(config, "max_position_embeddings", None)
    if key in ("attention_dropout", "max_position_embeddings"):
        # Looked at by warnings, and by the default length of generation.
        return True
    if key == "embedding_size":
        return value == getattr(config, "hidden_size", None)
    if key == "num_key_value_heads":
        return value == heads
    if key == "head_dim":
        return bool(heads) and value * heads == config.hidden_size
    if key == "layer_types":
        return value == ["full_attention"] * getattr(config, "num_hidden_layers", 0)
    if key == "sliding_window":
        # No position is farther away.
        return context is not None and value >= context
    if key in ROPE_KEYS:
        # The config class moves them into the parameters, which are what models read.
        parameters = getattr(config, "rope_parameters", None) or {}
        scaled = parameters.get("rope_type", "default") in ("llama3", "yarn", "longrope")
        return key in parameters if scaled or key != "original_max_position_embeddings" else True
    return False


def positions_of(key: str, value: Any) -> str | None:
    """The position encoding that a key speaks of, as in `position_embedding_type`; `None` where it says nothing."""
    words = key.lower().replace(".", "_").split("_")
    if value in (None, False, 0, 0.0, "", "none", {}, []):
        return None
    if "type" in words and ({"position", "positional", "positions", "pos"} & {*words}) and isinstance(value, str):
        # What older configs wrote unasked.
        if value in ("absolute", "learned", "learned_absolute", "sinusoidal"):
            return None
        return next((kind for mark, kind in POSITIONS.items() if mark in value.lower()), value)
    return next((kind for mark, kind in POSITIONS.items() if mark in words), None)
