"""What is operated on: a variant's config, its class, and where every tensor comes from, without weights in memory."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..conversion.in_memory import build
from ..conversion.opened_variant import OpenedVariant
from ..conversion.skeleton import empty_model, stored_tensors
from ..conversion.tensor_files import Unread
from ..model.axis import nobody_chose
from ..model.block import Block
from ..model.configuration_variant import VariantConfig
from ..model.configuration_variant_seq2seq import DECODER_FIELDS


Load = Callable[[str], torch.Tensor]

# What an operation does to the function that a model computes, from the strongest statement to the weakest.
SAME_BITS = "same bits"
SAME_FUNCTION = "same function"
APPROXIMATE = "approximate"
EXACTNESS = (SAME_BITS, SAME_FUNCTION, APPROXIMATE)


def of_no_file(header: torch.Tensor) -> None:
    """Where no tensor can come unread: of a model in memory, and where training changed all of them."""


class SurgeryError(ValueError):
    """An operation that is not possible on this model."""


@dataclass(frozen=True)
class Outcome:
    """
    What one operation did.

    Attributes:
        operation: in words.
        exactness: `"same bits"`: what is kept gives the same bits; `"same function"`: in exact arithmetic; or
            `"approximate"`: another function.
        notes: what followed, and what is said about it.
    """

    operation: str
    exactness: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """
    A model between operations.

    Attributes:
        config: a `VariantConfig` or `VariantSeq2SeqConfig`.
        model_class: one of our classes.
        source, header_source: one stored tensor by name, of the class or one of `apart`; and the same without values.
        unread: of what `header_source` gave for a tensor of a file, that tensor as it lies there; `None` of anything else.
        apart: tensors that the class leaves out and models with another head have.
        tokens: of every token id the id that it had in the source, -1 for a new one; `None` while all are as they were.
        tokenizer_path: where its tokenizer is, a folder or a GGUF file; `None` for a model in memory.
        tokenizer_json: what has become of its tokenizer.json; `None` while it is as it was.
        files: what belongs beside the result, as name and text.
        outcomes: of the operations so far.
    """

    config: Any
    model_class: type[PreTrainedModel]
    source: Load
    header_source: Load
    unread: Callable[[torch.Tensor], torch.Tensor | Unread | None] = of_no_file
    apart: tuple[str, ...] = ()
    tokens: tuple[int, ...] | None = None
    tokenizer_path: Path | None = None
    tokenizer_json: str | None = None
    files: tuple[tuple[str, str], ...] = ()
    outcomes: tuple[Outcome, ...] = field(default=())

    @classmethod
    def of(cls, opened: OpenedVariant) -> "Subject":
        """A checkpoint that was opened."""
        headers: dict[str, torch.Tensor] = {}
        names: dict[int, str] = {}

        def header(name: str) -> torch.Tensor:
            if name not in headers:
                headers[name] = opened.header(name)
                names[id(headers[name])] = name
            return headers[name]

        made = cls(
            opened.config,
            opened.model_class,
            opened.load,
            header,
            lambda header: opened.stored(names[id(header)]) if id(header) in names else None,
            tuple(opened.apart),
            tokenizer_path=opened.files,
        )
        made.__dict__["skeleton"] = opened.skeleton
        return made

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> "Subject":
        """A loaded variant."""
        state = model.state_dict()
        return cls(model.config, type(model), state.__getitem__, lambda name: state[name].to("meta"))

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model without memory for its weights; it refuses what cannot be built."""
        return empty_model(self.model_class, self.config)

    @cached_property
    def stored(self) -> dict[str, torch.Tensor]:
        """What a checkpoint stores, without values."""
        return stored_tensors(self.skeleton)

    def load(self, name: str) -> torch.Tensor:
        """A tensor by name; of a tied one, what it is tied to."""
        tied = self.skeleton.all_tied_weights_keys
        while name not in self.stored and name in tied:
            name = tied[name]
        return self.source(name)

    def without_values(self) -> "Subject":
        """The same whose tensors have shape and dtype alone."""
        made = replace(self, source=self.header_source)
        # Seconds for a large model, and what it says is the same.
        made.__dict__["skeleton"] = self.skeleton
        return made

    def headers(self) -> dict[str, torch.Tensor]:
        """
        Shape and dtype of what a checkpoint stores, as tensors without values.

        Raises:
            SurgeryError: for a tensor of another shape than the config wants.
        """
        as_headers = self.without_values()
        headers = {name: as_headers.load(name) for name in self.stored}
        for name, empty in self.stored.items():
            if headers[name].shape != empty.shape:
                raise SurgeryError(
                    f"{name} has shape {tuple(headers[name].shape)} where the config wants {tuple(empty.shape)}. "
                    "The config does not belong to these weights."
                )
        return headers | {name: self.header_source(name) for name in self.apart}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor | Unread]]:
        """
        What a checkpoint stores, one by one, unread where no operation changes its values; others may be views of the
        source's memory.
        """
        for name, header in self.headers().items():
            unread = self.unread(header)
            yield name, self.load(name) if unread is None else unread

    def model(self) -> PreTrainedModel:
        """The model with its weights, in evaluation mode; it shares no memory with the source."""
        weights = {name: self.load(name).clone(memory_format=torch.contiguous_format) for name in self.stored}
        return build(self.model_class, copy.deepcopy(self.config), weights)

    def to_measure(self) -> PreTrainedModel:
        """
        The same as it runs anywhere: with an attention that is there, on inputs of every length, and in one dtype, the
        widest that tensors have, where they have several.
        """
        dtypes = {tensor.dtype for tensor in self.headers().values() if tensor.is_floating_point()}
        weights = {name: self.load(name).clone(memory_format=torch.contiguous_format) for name in self.stored}
        # Chunks save memory and want lengths that are multiples of them.
        whole = {
            name: {"ffn_chunk_size": 0, "per_layer_config": fields_by_layer(stack, but="ffn_chunk_size") or None}
            for name, stack in self.stacks.items()
        }
        config = with_stacks(self.config, whole)
        if config._attn_implementation != "eager":
            config._attn_implementation = None
        return build(
            self.model_class, config, weights, reduce(torch.promote_types, dtypes) if len(dtypes) > 1 else None
        )

    # Stacks

    @property
    def stacks(self) -> dict[str, VariantConfig]:
        """The stacks by name; the one of a model that has a single one is called ""."""
        if isinstance(self.config, VariantConfig):
            return {"": self.config}
        return {"encoder": self.config.encoder, "decoder": self.config.decoder}

    @property
    def context(self) -> int:
        """The number of tokens that every stack takes at once."""
        # RoBERTa's first tokens stand behind the padding token, in a table of this size.
        return min(
            config.max_position_embeddings
            - (config.pad_token_id + 1 if config.position_ids_source == "input_ids" else 0)
            for config in self.stacks.values()
        )

    def stack(self, name: str) -> str:
        """
        The stack that is meant.

        Raises:
            SurgeryError: if there are two and none is named, or there is no such stack.
        """
        if name in self.stacks:
            return name
        if not name:
            raise SurgeryError("An encoder-decoder has two stacks. Say which: encoder or decoder (`--stack`).")
        raise SurgeryError(f"The model has one stack and no {name}. Leave `--stack` out.")

    def module(self, stack: str) -> nn.Module:
        """The skeleton of one stack."""
        return getattr(self.skeleton.base_model, stack) if stack else self.skeleton.base_model

    def blocks(self, stack: str) -> list[Block]:
        """The layers of that skeleton."""
        layers: Any = self.module(stack).layers
        return list(layers)

    def prefix(self, stack: str) -> str:
        """What the names of a stack's tensors begin with."""
        wanted = self.module(stack)
        name = next(name for name, module in self.skeleton.named_modules() if module is wanted)
        return f"{name}." if name else ""

    # Changes

    def changed(
        self,
        outcome: Outcome,
        tensor: Callable[[str, "Subject"], torch.Tensor] | None = None,
        **changes: Any,
    ) -> "Subject":
        """
        The next subject.

        Args:
            outcome: of the operation.
            tensor: (name, this subject) -> the next one's tensor of that name; by default the one that has it. It is also
                called for tensors without values, with which it must not look at any; one that it then gives back as it
                is must be one that it does not change.
            changes: attributes of the next one.
        """
        read = tensor or (lambda name, before: before.load(name))
        without_values = self.without_values()
        after = replace(
            self,
            source=lambda name: read(name, self),
            header_source=lambda name: read(name, without_values),
            outcomes=(*self.outcomes, outcome),
            **changes,
        )
        # Built here, so that what no config expresses is refused before any weight is read.
        after.skeleton  # noqa: B018
        return after


def fields_by_layer(config: VariantConfig, but: str = "") -> dict[int, dict[str, Any]]:
    """What `per_layer_config` gives single layers alone, as a copy; without one field, and layers that have no other."""
    found = {
        int(layer): {name: value for name, value in fields.items() if name != but}
        for layer, fields in (config.to_dict().get("per_layer_config") or {}).items()
    }
    return {layer: fields for layer, fields in found.items() if fields}


def edited(config: PreTrainedConfig, **changes: Any) -> Any:
    """A config of ours with other values of some fields; what is not named keeps its value, derived or not."""
    fields = _fields(config)
    if not isinstance(config, VariantConfig):
        fields = {name: value for name, value in fields.items() if name not in DECODER_FIELDS}
    with nobody_chose():
        made = type(config)(**copy.deepcopy({**fields, **changes}))
    made.dtype = config.dtype
    made._attn_implementation = config._attn_implementation
    return made


def with_stacks(config: Any, changes: dict[str, dict[str, Any]]) -> Any:
    """The same for the stacks of a model, which are named as in `Subject.stacks`."""
    if "" in changes:
        return edited(config, **changes[""])
    # Built as a whole: what is unset is derived from both stacks.
    return edited(config, **{stack: {**_fields(getattr(config, stack)), **some} for stack, some in changes.items()})


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name != "model_type"}
