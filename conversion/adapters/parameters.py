"""What the parameters of one method become on another module.

It is found from their shapes: unchanged, or with their rows (columns) moved as the weight's are. Each such answer is then
proved on layers of these shapes with random weights, by PEFT's own forward: what holds for every input is taken, whatever
the method, and what does not is refused by the names of method and module.
"""

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import ConversionError
from .files import WAY_OUT, Adapter
from .places import Place, gathered, sizes_of
from .settings import SCALES, feed_forward_of, is_initialised_from_base, patterns_of, setting_of
from .workbench import agree, layer_like, parameters_of, with_adapter


# Pairs of factors, (rank, in) and (out, rank), of the methods whose change of a weight is a product of them: adapters of
# several modules become one of the module that holds them all, with the sum of their ranks.
FACTORS = {
    PeftType.LORA: (("lora_A.weight", "lora_B.weight"),),
    PeftType.LOHA: (("hada_w1_b", "hada_w1_a"), ("hada_w2_b", "hada_w2_a")),
}
# What such an adapter may have besides, with a value for every output, and whether that is scaled as the product is.
PER_OUTPUT = {"lora_B.bias": True, "lora_magnitude_vector": False, "lora_magnitude_vector.weight": False}


def _kept(tensors: list[torch.Tensor], place: Place) -> torch.Tensor:
    return tensors[0]


def _moved_rows(tensors: list[torch.Tensor], place: Place, dim: int) -> torch.Tensor:
    return gathered(tensors, place, dim)


def _moved_columns(tensors: list[torch.Tensor], place: Place, dim: int) -> torch.Tensor:
    return tensors[0].index_select(dim, place.columns)


@dataclass
class ParameterTranslator:
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
        if is_initialised_from_base(config):
            self._refuse(module, place, f"was initialised from the base's weights ({config.init_lora_weights!r})")
        if any(values is None for values in given):
            given = self._completed(module, place, given)
        if place.rows is None:
            outs = sizes_of(self.source.get_submodule(place.sources[0]))[0]
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
            outs = sizes_of(self.source.get_submodule(name))[0]
            known = next(
                sizes_of(self.source.get_submodule(n))[0] for n, v in zip(place.sources, given) if v is present
            )
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
        for name, pattern in patterns_of(config).items():
            keys = {bench: get_pattern_key(pattern, module) for bench, module in names.items()}
            setattr(config, name, {bench: pattern[key] for bench, key in keys.items() if key in pattern})
        if hasattr(config, "feedforward_modules"):
            flagged = feed_forward_of(self.source, config)
            config.feedforward_modules = [bench for bench, module in names.items() if module in flagged]
        if rank is not None:
            attribute, alpha = SCALES[config.peft_type]
            setattr(config, attribute, rank[0])
            setattr(config, alpha, rank[1])
            config.rank_pattern, config.alpha_pattern = {}, {}
        return config

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
            repr({name: getattr(config, name) for name in (*patterns_of(config), "feedforward_modules")
                  if hasattr(config, name)}),
        )  # fmt: skip
        if signature not in self.known:
            self.known[signature] = self._prove(place, sources, target, config, equal)
        return self.known[signature]

    def _prove(
        self, place: Place, sources: list[nn.Module], target: nn.Module, config: PeftConfig, equal: frozenset[str]
    ) -> dict[str, Any] | None:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(sizes_of(layer), generator=generator) for layer in sources]
        weight = gathered(weights, place, 0)
        if place.columns is not None:
            weight = weight[:, place.columns]
        benches = {f"source{i}": layer_like(layer, w) for i, (layer, w) in enumerate(zip(sources, weights))}
        target_config = copy.deepcopy(config)
        for name, pattern in patterns_of(config).items():
            setattr(target_config, name, {"target": pattern["source0"]} if "source0" in pattern else {})
        if getattr(target_config, "feedforward_modules", None):
            target_config.feedforward_modules = ["target"]
        # VeRA's matrices, for one, are not on a layer but shared by all.
        try:
            bench = with_adapter(benches, config, 1)
            made = with_adapter({"target": layer_like(target, weight)}, target_config, 2)
        except (ValueError, AttributeError, TypeError):
            return None
        given = [parameters_of(bench, f"source{i}") for i in range(len(sources))]
        for name in equal:
            for values in given[1:]:
                values[name].data.copy_(given[0][name])
        wanted = parameters_of(made, "target")
        if wanted.keys() != given[0].keys():
            return None
        options = [
            _options([values[name] for values in given], wanted[name], place, name in equal or len(given) == 1)
            for name in wanted
        ]
        for chosen in itertools.islice(itertools.product(*options), 64):
            for name, make in zip(wanted, chosen):
                wanted[name].data.copy_(make([values[name] for values in given], place))
            if agree(bench, made, place):
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
            made[outputs] = gathered(blocks, place, 0)
        for name in given[0].keys() - factors:
            scaled = [v[name] * (scale / scales[0] if PER_OUTPUT[name] else 1.0) for v, scale in zip(given, scales)]
            made[name] = gathered(scaled, place, 0)
        rslora = getattr(config, "use_rslora", False)
        self.joined[module] = (rank, scales[0] * (rank**0.5 if rslora else rank))
        return made

    def _scale(self, module: str, rank: int) -> float:
        config = self.adapter.config
        alpha = setting_of(config, SCALES[config.peft_type][1], "alpha_pattern", module)
        return alpha / (rank**0.5 if getattr(config, "use_rslora", False) else rank)


def _alike(given: list[dict[str, torch.Tensor]]) -> bool:
    return all(values.keys() == given[0].keys() for values in given)


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
