"""Positions: rotations for another context, tables of another length, layers without a rotation."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..model.configuration_variant import VariantConfig
from .layers import parse_layers
from .operation import Operation
from .subject import APPROXIMATE, SAME_BITS, Outcome, Subject, SurgeryError, with_stacks


# transformers' kinds of rotation.
SCALINGS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
# Keys that say how a rotation is scaled; the others are of every kind.
OF_SCALING = {
    "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor",
}  # fmt: skip
# Searched for with every pair of channels (https://arxiv.org/abs/2402.13753).
FACTORS = ("short_factor", "long_factor")
# Llama 3.1's.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@dataclass(frozen=True)
class ContextLength(Operation):
    """
    Another context length. A rotation is rescaled to it; a learned table is cut, or grows by repeating itself
    (https://arxiv.org/abs/2004.05150); other positions only have the number in their config.

    Args:
        length: in tokens.
        scaling: of a rotation: `"none"`, as it is; or one of transformers' kinds, `"default"` (not scaled), `"linear"`,
            `"dynamic"`, `"yarn"`, `"longrope"` or `"llama3"`. A rotation that is scaled already is scaled anew, from the
            context that it had before.
        stack: `"encoder"` or `"decoder"`; by default every stack.
        factors: of longrope: `short_factor` and `long_factor`, each a number for every pair of rotated channels, or the
            path of a JSON file with them.
    """

    length: int
    scaling: str = "none"
    stack: str = ""
    factors: Mapping[str, Sequence[float]] | Path | None = None

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
        if config.rope_table_in_checkpoint:
            raise SurgeryError(
                "The rotation is a table of the checkpoint (`rope_table_in_checkpoint`). Leave its length."
            )
        changes: dict[str, Any] = {"max_position_embeddings": self.length}
        if self.scaling == "none":
            flat = [entry for entry in [config.rope_parameters, *(config.rope_parameters or {}).values()] if entry]
            types = {entry.get("rope_type") for entry in flat if isinstance(entry, dict)}
            if config.position_embedding_type == "rope" and (bound := types & {"dynamic", "longrope"}):
                raise SurgeryError(
                    f"The rotation (`rope_type` {bound.pop()}) depends on `max_position_embeddings`, so that another "
                    "context would change it for every text. Say how it is scaled to it (`--rope-scaling`)."
                )
            return changes
        if config.position_embedding_type != "rope":
            raise SurgeryError(
                f"`position_embedding_type` is {config.position_embedding_type}, which has no rotation to scale. Leave "
                "`--rope-scaling` out."
            )
        if self.scaling not in SCALINGS:
            raise SurgeryError(
                f"There is no rotation {self.scaling!r} (`rope_type`). Choose of {', '.join(SCALINGS)}."
            )
        parameters = copy.deepcopy(config.rope_parameters)
        nested = [key for key in parameters if key in ("full_attention", "sliding_attention")]
        # A window never sees further than before.
        of_full = parameters.get("full_attention") if nested else parameters
        if of_full is None:
            raise SurgeryError(
                "Only windows rotate (`rope_parameters`), which see no further. Leave `--rope-scaling` out."
            )
        scaled, original = self._scaled(of_full, config.max_position_embeddings)
        of_full.clear()
        of_full |= scaled
        if self.scaling == "dynamic":
            # It begins to scale where its config's context ends.
            changes["max_position_embeddings"] = original
        return changes | {"rope_parameters": parameters}

    def _scaled(self, entry: Mapping[str, Any], context: int) -> tuple[dict[str, Any], int]:
        """The parameters of a rotation under the other scaling, and the context that it is scaled from."""
        before = entry.get("rope_type", "default")
        if before not in SCALINGS or entry.get("alpha"):
            why = "`alpha`" if before in SCALINGS else f"`rope_type` {before}"
            raise SurgeryError(
                f"The rotation is stretched in a way of its own ({why}), from which none of the others follows. Write "
                "other `rope_parameters` into the config."
            )
        original = entry.get("original_max_position_embeddings") or context
        made = {key: value for key, value in entry.items() if key not in OF_SCALING} | {"rope_type": self.scaling}
        if before == self.scaling:
            # What follows from the factor is derived anew.
            made = {key: value for key, value in entry.items() if key != "attention_factor"}
        if self.scaling == "default":
            return made, original
        if before == "linear":
            if self.scaling != "linear":
                raise SurgeryError(
                    "The rotation is scaled by a factor (`rope_type` linear), and its config does not say from which "
                    f"context. Give linear instead of {self.scaling}, or default and then another edit."
                )
            # All positions are divided; by how much more follows from the context that it has.
            return made | {"factor": entry["factor"] * self.length / original}, original
        if self.length < original:
            raise SurgeryError(
                f"{self.length} tokens are fewer than the {original} that the rotation is scaled from "
                "(`max_position_embeddings`). Leave `--rope-scaling` out, or give default."
            )
        made["factor"] = self.length / original
        if self.scaling in ("yarn", "llama3", "longrope"):
            made["original_max_position_embeddings"] = original
        if self.scaling == "llama3":
            made = LLAMA3 | made
        if self.scaling == "longrope":
            made |= self._factors(made)
        return made, original

    def _factors(self, known: Mapping[str, Any]) -> dict[str, list[float]]:
        """LongRoPE's, as they are given; whether there are enough is the config's to check."""
        if self.factors is None:
            if all(name in known for name in FACTORS):
                return {name: known[name] for name in FACTORS}
            raise SurgeryError(
                "LongRoPE's `short_factor` and `long_factor` come from a search, and follow from no length. Give a JSON "
                "file with both (`--rope-factors`)."
            )
        given: Any = self.factors
        if isinstance(given, Path):
            given = json.loads(given.read_text(encoding="utf-8"))
        if not isinstance(given, Mapping) or any(not isinstance(given.get(name), Sequence) for name in FACTORS):
            raise SurgeryError(
                "The factors of LongRoPE have no lists `short_factor` and `long_factor`. Give a JSON object with both."
            )
        return {name: list(given[name]) for name in FACTORS}


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
                f"`position_embedding_type` is {config.position_embedding_type}: there is no rotation to drop. Leave "
                "`--drop-rotation` out."
            )
        rotates = [0 if layer in layers else value for layer, value in enumerate(config.no_rope_layers)]
        exactness = SAME_BITS if rotates == list(config.no_rope_layers) else APPROXIMATE
        outcome = Outcome(f"no rotation in layers {', '.join(map(str, layers))}", exactness)
        return subject.changed(outcome, config=with_stacks(subject.config, {stack: {"no_rope_layers": rotates}}))
