"""What is to be compared: a plan of configs, seeds and learning rates, and how runs are made equal."""

import difflib
import json
from dataclasses import dataclass, field, fields
from importlib import import_module
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassFieldValidationError

from ..cost.compute import backward_flops, forward_flops
from ..cost.parameters import count_parameters, structure
from ..cost.subject import read_subject
from ..model.configuration_variant import VariantConfig
from ..model.part import Call
from .data import Data, read_data


# Deeper ones are a slip of the pen: lists with an entry for each of their layers would take the memory.
MAX_LAYERS = 100_000
EQUAL = ("tokens", "parameters", "flops")
TESTS = ("paired-t", "permutation", "wilcoxon")
SCHEDULES = ("constant", "linear", "cosine")
# Name -> what it is, in nats where nothing else is said.
METRICS = {
    "loss": "loss on the test part",
    "accuracy": "share of right answers on the test part",
    "sensitivity": "by how much other learning rates are worse than the best, on average",
    "first_gradient": "gradient's norm in the first layer, before training",
    "last_gradient": "gradient's norm in the last layer, before training",
    "gradient_ratio": "gradient's norm in the first layer over the last, before training",
    "max_logit": "largest attention logit at the end",
    "log_z": "mean square of log Z at the end",
    "step_ms": "processor time of a step, in milliseconds",
}


class PlanError(ValueError):
    """A plan that says what cannot be done."""


@dataclass(frozen=True)
class Training:
    """
    How every run is trained; a config of the plan may differ in all of it but `batch_size`.

    Attributes:
        steps: of AdamW (betas 0.9 and 0.95); 0 looks at untrained models.
        batch_size: examples a step.
        schedule: of the learning rate after the warm-up.
        warmup: steps over which it rises.
        weight_decay: of matrices; norms and biases have none.
        max_grad_norm: gradients are clipped to it; 0 for none.
    """

    steps: int = 200
    batch_size: int = 16
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Expectation:
    """That a metric of one config is less than that of another; `expected` is false where nobody claims so."""

    less: str
    than: str
    metric: str = "loss"
    expected: bool = True


@dataclass(frozen=True)
class Arm:
    """
    A config of the plan, made equal to the others.

    Attributes:
        name: in the plan.
        config: the variant's.
        training: its own.
        parameters: of the model.
        flops: of all its training.
    """

    name: str
    config: Any
    training: Training
    parameters: int
    flops: int


@dataclass(frozen=True)
class Plan:
    """
    What `ablate` runs.

    Attributes:
        title: of the page.
        configs: name -> fields that differ from `base`, and `training`, settings that differ.
        data: see `data.read_data`.
        base: fields of all; `preset` or `config` names what they start from.
        reference: what others are compared with (default: the first).
        equal: what runs have the same of: `"tokens"`, `"parameters"` (and tokens), by the inner width of the
            feed-forward network, or `"flops"`, by the number of steps.
        seeds: how many, each of initial weights and of the order of examples, which configs share.
        learning_rates: each is run; a config is judged by the one that is best on the validation part.
        training: see `Training`.
        lengths: sizes to test beside training's: tokens of a text, or what a task is made with.
        test: `"paired-t"`, `"permutation"` (of signs, exact) or `"wilcoxon"`, over seeds.
        noise: whether the reference is run with as many other seeds.
        control: with how many seeds the reference is trained on shuffled targets.
        probes: how often a model is looked at (`probes.Probe`), at equal distances, the start and the end among them.
        expect: comparisons that a claim makes; otherwise every config is compared with the reference.
        claim, source, caveat: sentences of the page.
    """

    title: str
    configs: dict[str, dict[str, Any]]
    data: dict[str, Any]
    base: dict[str, Any] = field(default_factory=dict)
    reference: str = ""
    equal: str = "tokens"
    seeds: int = 5
    learning_rates: tuple[float, ...] = (1e-3,)
    training: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    test: str = "paired-t"
    noise: bool = True
    control: int = 1
    probes: int = 2
    expect: tuple[dict[str, Any], ...] = ()
    claim: str = ""
    source: str = ""
    caveat: str = ""

    def expectations(self) -> list[Expectation]:
        """What is compared."""
        if self.expect:
            return [Expectation(**each) for each in self.expect]
        names = (name for name in self.configs if name != self.reference)
        return [Expectation(name, self.reference, expected=False) for name in names]


def read_plan(source: str | Path | dict[str, Any]) -> tuple[Plan, Path]:
    """
    A plan, and the folder that its paths start from.

    Args:
        source: a .yaml, .toml or .json file, or what is in one.

    Raises:
        PlanError: naming the field that is wrong.
    """
    folder = Path()
    if not isinstance(source, dict):
        path = Path(source)
        folder, source = path.parent, _parsed(path)
    known = [each.name for each in fields(Plan)]
    _refuse_unknown(source, known, "the plan")
    if missing := [name for name in ("title", "configs", "data") if not source.get(name)]:
        raise PlanError(f"The plan has no `{missing[0]}`. Add it.")
    _check_kinds(source)
    settings: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in source.items()
    }
    plan = Plan(**settings)
    if not isinstance(plan.configs, dict) or not all(
        isinstance(fields_, dict | None) for fields_ in plan.configs.values()
    ):
        raise PlanError("`configs` is no table of names and fields. Write `name: {field: value}` for each.")
    configs = {str(name): fields_ or {} for name, fields_ in plan.configs.items()}
    plan = Plan(**{**vars(plan), "configs": configs, "reference": plan.reference or next(iter(configs))})
    _check(plan)
    return plan, folder


def _parsed(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    try:
        text = content.decode()
        if path.suffix == ".json":
            found = json.loads(text)
        elif path.suffix == ".toml":
            found = _toml().loads(text)
        else:
            import yaml

            found = yaml.safe_load(text)
    except Exception as error:
        raise PlanError(f"{path} cannot be read ({error}). Write YAML, .toml or .json.") from error
    if not isinstance(found, dict):
        raise PlanError(f"{path} holds no table of settings. Begin with `title`, `configs` and `data`.")
    return found


def _check_kinds(source: dict[str, Any]) -> None:
    """Refuse a list or a text where a table is read, and so on."""
    kinds: dict[str, tuple[Any, str]] = {
        "base": (dict, "a table"), "data": (dict, "a table"), "training": (dict, "a table"),
        "learning_rates": ((list, tuple), "a list"), "lengths": ((list, tuple), "a list"),
        "expect": ((list, tuple), "a list"),
    }  # fmt: skip
    for name, (kind, what) in kinds.items():
        if name in source and not isinstance(source[name], kind):
            raise PlanError(f"`{name}` of the plan is {source[name]!r}, and must be {what}. Correct it.")
    if strange := [each for each in source.get("expect", ()) if not isinstance(each, dict)]:
        raise PlanError(f"`expect` of the plan has {strange[0]!r}. Write a table with `less` and `than` for each.")


def _toml() -> Any:
    """The standard library's reader, or, before Python 3.11, the package that it was made from."""
    return import_module("tomllib" if find_spec("tomllib") else "tomli")


def _refuse_unknown(settings: dict[str, Any], known: list[str], where: str) -> None:
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"Did you mean `{near[0]}`?" if near else f"It has: {', '.join(known)}."
            raise PlanError(f"`{name}` is no setting of {where}. {hint}")


def _check(plan: Plan) -> None:
    if plan.reference not in plan.configs:
        raise PlanError(
            f"`reference` is {plan.reference}, which is none of `configs`. Use one of {list(plan.configs)}."
        )
    for name, allowed in (("equal", EQUAL), ("test", TESTS)):
        if getattr(plan, name) not in allowed:
            raise PlanError(f"`{name}` is {getattr(plan, name)!r}. Use one of: {', '.join(allowed)}.")
    # The training of no config may have what another cannot be paired with.
    for settings in (plan.training, *(fields_.get("training", {}) for fields_ in plan.configs.values())):
        _refuse_unknown(settings, [each.name for each in fields(Training)], "`training`")
    for fields_ in plan.configs.values():
        if "batch_size" in fields_.get("training", {}):
            raise PlanError("A config has a `batch_size` of its own. Set it for all, so that batches are the same.")
    counts = {"seeds": 2, "control": 0, "probes": 0}
    for name, least in counts.items():
        value = getattr(plan, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise PlanError(f"`{name}` is {value!r}. Set a number of at least {least}.")
    if not plan.learning_rates or not all(isinstance(rate, float) and rate > 0 for rate in plan.learning_rates):
        raise PlanError(
            f"`learning_rates` is {list(plan.learning_rates)}. Give numbers above 0; YAML wants a point in 1.0e-3."
        )
    for comparison in plan.expect:
        _refuse_unknown(comparison, [each.name for each in fields(Expectation)], "`expect`")
    for found in plan.expectations():
        if unknown := [name for name in (found.less, found.than) if name not in plan.configs]:
            raise PlanError(f"`expect` names {unknown[0]}, which is none of `configs`. Use their names.")
        base = found.metric.split("@")[0]
        if base not in METRICS or (found.metric != base and base not in ("loss", "accuracy")):
            raise PlanError(f"`expect` names the metric {found.metric}. Use one of {list(METRICS)}, or loss@LENGTH.")
        if found.metric != base and found.metric.split("@")[1] not in map(str, plan.lengths):
            raise PlanError(f"`expect` names {found.metric}, a length that is not in `lengths`. Add it there.")


def read_plan_data(plan: Plan, folder: Path) -> Data:
    """The plan's examples."""
    return read_data(plan.data, folder)


def arms(plan: Plan, data: Data) -> list[Arm]:
    """
    Every config of the plan, made equal, the reference first.

    Raises:
        PlanError: where a config cannot be made equal, or is none that is trained here.
    """
    names = [plan.reference, *(name for name in plan.configs if name != plan.reference)]
    made: list[Arm] = []
    for name in names:
        own = dict(plan.configs[name])
        training = Training(**{**plan.training, **own.pop("training", {})})
        _check_training(name, training)
        reference = made[0] if made else None
        config = _config(plan, name, own, data)
        if plan.equal == "parameters" and reference is not None:
            config = _with_parameters(plan, name, own, data, reference.parameters)
        per_step = _step_flops(config, training, data)
        if plan.equal == "flops" and reference is not None and per_step:
            training = Training(**{**vars(training), "steps": round(reference.flops / per_step)})
        parameters = count_parameters(structure(config)).total
        made.append(Arm(name, config, training, parameters, per_step * training.steps))
    return made


def _check_training(name: str, training: Training) -> None:
    if training.schedule not in SCHEDULES:
        raise PlanError(f"`schedule` of {name} is {training.schedule!r}. Use one of: {', '.join(SCHEDULES)}.")
    for setting in ("steps", "batch_size", "warmup", "weight_decay", "max_grad_norm"):
        value = getattr(training, setting)
        whole = setting in ("steps", "batch_size", "warmup")
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or value < 0:
            raise PlanError(f"`{setting}` of {name} is {value!r}. Set a number of at least 0.")
    if training.batch_size < 1:
        raise PlanError(f"`batch_size` is {training.batch_size}. Set it to at least 1.")


def _config(plan: Plan, name: str, own: dict[str, Any], data: Data) -> Any:
    settings = {"vocab_size": data.vocab_size, **plan.base, **own}
    preset, native = settings.pop("preset", None), settings.pop("config", None)
    layers = settings.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise PlanError(f"`num_hidden_layers` of {name} is {layers}. Set it to {MAX_LAYERS:,} at most.")
    try:
        if preset is not None:
            config = VariantConfig.from_preset(preset, **settings)
        elif native is not None:
            config = read_subject(native)[0]
            config.update(settings)
        else:
            config = VariantConfig(**settings)
    except StrictDataclassFieldValidationError as error:
        # A value of another kind, said by a library in three lines.
        raise PlanError(
            f"The config of {name} cannot be built: {' '.join(str(error).split())}. Correct it."
        ) from error
    if config.is_encoder_decoder:
        raise PlanError(f"{name} is an encoder-decoder, which `ablate` does not train. Compare decoders, or encoders.")
    if config.is_causal == bool(data.masked):
        needed, has = ("no `data.masked`", "one") if data.masked else ("`data.masked`, such as 0.15,", "none")
        raise PlanError(f"{name} has `is_causal={config.is_causal}` and needs {needed} but the plan has {has}.")
    if config.is_causal and not config.shift_labels:
        raise PlanError(f"{name} sets `shift_labels` off, but labels are the input tokens here. Leave it on.")
    if config.vocab_size < data.vocab_size:
        raise PlanError(f"`vocab_size` of {name} is {config.vocab_size}, but the data has {data.vocab_size} tokens.")
    return config


def _with_parameters(plan: Plan, name: str, own: dict[str, Any], data: Data, wanted: int) -> Any:
    """The config with an inner width at which it has so many parameters, as nearly as whole channels allow."""
    if "intermediate_size" in own:
        raise PlanError(
            f"`intermediate_size` of {name} is set, but `equal: parameters` chooses it. Leave it out, or use another."
        )

    def count(width: int) -> int:
        return count_parameters(structure(_config(plan, name, {**own, "intermediate_size": width}, data))).total

    # They are linear in the width.
    first, second = count(8), count(16)
    width = round(8 + (wanted - first) * 8 / (second - first)) if second > first else 0
    if width < 1 or abs(count(width) - wanted) > 0.01 * wanted:
        raise PlanError(
            f"No inner width gives {name} {wanted:,} parameters. Use `equal: tokens`, or change the reference's size."
        )
    return _config(plan, name, {**own, "intermediate_size": width}, data)


def _step_flops(config: Any, training: Training, data: Data) -> int:
    model, call = structure(config), Call(training.batch_size, data.length)
    return forward_flops(model, call).dense + backward_flops(model, call)


def tokens_of(training: Training, data: Data) -> int:
    return prod((training.steps, training.batch_size, data.length))
