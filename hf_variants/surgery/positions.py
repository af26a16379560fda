"""Positions: rotations for another context, tables of another length, layers without a rotation."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..model.configuration_variant import VariantConfig
from .layers import parse_layers
from .operation import Operation
from .subject import APPROXIMATE, SAME_BITS, Outcome, Subject, SurgeryError, with_stacks


# Kinds that follow from a factor alone; the others have values of their own to give.
SCALINGS = ("linear", "dynamic", "yarn", "llama3")
# Llama 3.1's.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@dataclass(frozen=True)
class ContextLength(Operation):
    """
    Another context length. A rotation is rescaled to it; a learned table is cut, or grows by repeating itself
    (https://arxiv.org/abs/2004.05150); other positions only have the number in their config.

    Args:
        length: in tokens.
        scaling: of a rotation: `"none"`, or transformers' `"linear"`, `"dynamic"`, `"yarn"` or `"llama3"`.
        stack: `"encoder"` or `"decoder"`; by default every stack.
    """

    length: int
    scaling: str = "none"
    stack: str = ""

    def apply(self, subject: Subject) -> Subject:
        if self.length < 1:
            raise SurgeryError(f"A context cannot be {self.length} tokens long. Give at least 1.")
        stacks = [subject.stack(self.stack)] if self.stack else list(subject.stacks)
        changes = {stack: self._changes(subject.stacks[stack]) for stack in stacks}
        grown = [stack for stack in stacks if self.length > subject.stacks[stack].max_position_embeddings]
        tables = [s for s in stacks if f"{subject.prefix(s)}embed_positions.weight" in subject.stored]
        if any(subject.stacks[stack].position_embedding_type != "learned" for stack in set(grown) & set(tables)):
            raise SurgeryError("The table of sinusoids is stored (`sinusoidal_table_stored`). Only make it shorter.")
        is_scaled = any("rope_parameters" in fields for fields in changes.values())
        exactness = APPROXIMATE if is_scaled or set(grown) & set(tables) else SAME_BITS
        how = f", rotations scaled ({self.scaling})" if is_scaled else ""
        tables_of = {f"{subject.prefix(stack)}embed_positions.weight": subject.stacks[stack] for stack in tables}

        def tensor(name: str, before: Subject) -> torch.Tensor:
            old = before.load(name)
            if name not in tables_of:
                return old
            config = tables_of[name]
            # Rows before the first position, which are no positions, stay.
            ahead = old.shape[0] - config.max_position_embeddings
            first = config.pad_token_id + 1 if config.position_ids_source == "input_ids" else ahead
            count = after.stored[name].shape[0] - first
            rows = torch.arange(count) % (old.shape[0] - first) + first
            return torch.cat([old[:first], old[rows.to(old.device)]])

        what = f"a context of {self.length} tokens{how}"
        after = subject.changed(Outcome(what, exactness), tensor, config=with_stacks(subject.config, changes))
        return after

    def _changes(self, config: VariantConfig) -> dict[str, Any]:
        changes: dict[str, Any] = {"max_position_embeddings": self.length}
        if self.scaling == "none":
            flat = [entry for entry in [config.rope_parameters, *(config.rope_parameters or {}).values()] if entry]
            types = {entry.get("rope_type") for entry in flat if isinstance(entry, dict)}
            if config.position_embedding_type == "rope" and (bound := types & {"dynamic", "longrope"}):
                raise SurgeryError(
                    f"The rotation (`rope_type` {bound.pop()}) depends on `max_position_embeddings`, so that another "
                    "context would change it for every text. Write other `rope_parameters` into the config."
                )
            return changes
        if config.position_embedding_type != "rope":
            raise SurgeryError(
                f"`position_embedding_type` is {config.position_embedding_type}, which has no rotation to scale. Leave "
                "`--rope-scaling` out."
            )
        if self.scaling not in SCALINGS:
            raise SurgeryError(
                f"There is no way to derive a {self.scaling!r} scaling. Choose of {', '.join(SCALINGS)}."
            )
        parameters = copy.deepcopy(config.rope_parameters)
        nested = [key for key in parameters if key in ("full_attention", "sliding_attention")]
        # A window never sees further than before.
        entries = [parameters["full_attention"]] if "full_attention" in nested else [parameters]
        for entry in filter(None, entries):
            if entry.get("rope_type", "default") != "default":
                raise SurgeryError(
                    f"The rotation is scaled already (`rope_type` {entry['rope_type']}). Write other `rope_parameters` into "
                    "the config."
                )
            original = config.max_position_embeddings
            entry |= {"rope_type": self.scaling, "factor": self.length / original}
            if self.scaling in ("yarn", "llama3"):
                entry["original_max_position_embeddings"] = original
            if self.scaling == "llama3":
                entry |= LLAMA3
            if self.scaling == "dynamic":
                # It begins to scale where its config's context ends.
                changes["max_position_embeddings"] = original
        return changes | {"rope_parameters": parameters}


@dataclass(frozen=True)
class DropRotation(Operation):
    """
    Layers without a rotation (https://arxiv.org/abs/2501.18795).

    Args:
        layers: from 0; or as `parse_layers` reads them.
        stack: `"encoder"` or `"decoder"` of an encoder-decoder.
    """

    layers: Sequence[int] | str
    stack: str = ""

    def apply(self, subject: Subject) -> Subject:
        layers = parse_layers(self.layers) if isinstance(self.layers, str) else tuple(self.layers)
        stack = subject.stack(self.stack)
        config = subject.stacks[stack]
        if beyond := [layer for layer in layers if not 0 <= layer < config.num_hidden_layers]:
            raise SurgeryError(f"There is no layer {beyond[0]}. Name layers from 0 to {config.num_hidden_layers - 1}.")
        if config.position_embedding_type != "rope":
            raise SurgeryError(
                f"`position_embedding_type` is {config.position_embedding_type}: there is no rotation to drop."
            )
        rotates = [0 if layer in layers else value for layer, value in enumerate(config.no_rope_layers)]
        exactness = SAME_BITS if rotates == list(config.no_rope_layers) else APPROXIMATE
        outcome = Outcome(f"no rotation in layers {', '.join(map(str, layers))}", exactness)
        return subject.changed(outcome, config=with_stacks(subject.config, {stack: {"no_rope_layers": rotates}}))
