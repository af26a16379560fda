"""Which tensors of one model make which of another: a plan of steps, and its run."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_variants.model.configuration_variant import VariantConfig

from . import rules, tensor_files
from .errors import ConversionError
from .family import Family
from .skeleton import stored_tensors


@dataclass
class Translation:
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

    def lookup(
        self, load: tensor_files.TensorSource | None = None, unread: tensor_files.StoredSource | None = None
    ) -> Callable[[str], Any]:
        """The same by name, in any order."""
        return rules.by_name(self.steps, lambda steps: replace(self, steps=steps).tensors(load, unread))

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


def translation_between(
    family: Family,
    head: str,
    source_model: PreTrainedModel,
    target_model: PreTrainedModel,
    names: Iterable[str],
    load: tensor_files.TensorSource,
    variant_config: VariantConfig,
    to_native: bool,
) -> Translation:
    shapes = {name: tensor.shape for name, tensor in stored_tensors(target_model).items()}
    names = check_ties(source_model, list(names), load)
    steps = rules.plan(family.rules_for(head), names, shapes, to_native=to_native)
    return Translation(steps, load, variant_config, shapes, to_native)


def translation_to_native(
    family: Family,
    head: str,
    source: PreTrainedModel,
    target: PreTrainedModel,
    names: Iterable[str],
    load: tensor_files.TensorSource,
    config: VariantConfig,
) -> Translation:
    """The way from a variant's tensors to those of a native model without memory; every check of names has run."""
    return translation_between(family, head, source, target, names, load, config, to_native=True)


def check_ties(model: PreTrainedModel, names: Iterable[str], load: tensor_files.TensorSource) -> list[str]:
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


def for_other_heads(
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
