"""The other sizes: query heads, the residual stream, and how many parameters there are in all."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..conversion.folds import is_zero_centered
from ..conversion.skeleton import empty_model, stored_tensors
from ..model.configuration_variant import VariantConfig
from ..model.normalization import unchanged
from .observed import mean_squares
from .operation import Operation
from .subject import (
    APPROXIMATE,
    SAME_BITS,
    SAME_FUNCTION,
    Outcome,
    Subject,
    SurgeryError,
    fields_by_layer,
    with_stacks,
)
from .ties import HEAD, Untie
from .width import FeedForwardWidth, body_prefix


NEW = -1
# Name of an attention -> its new heads by their old numbers, `NEW` for none, and the config that its layer had.
Chosen = dict[str, tuple[list[int], VariantConfig]]
ATTENTIONS = ("self_attn", "cross_attn")
OF_ATTENTION = re.compile(rf"(.*layers\.(\d+)\.(?:{'|'.join(ATTENTIONS)}))\.(\w+)(?:\.(weight|bias))?")
# Whose rows are vectors of the stream, and not functions of it.
TABLES = re.compile(r".*(embed_tokens|embed_positions|token_types|task_types)\.weight")


@dataclass(frozen=True)
class Heads(Operation):
    """
    So many query heads in every attention. Fewer are those that matter most: on a text, by the size of what they add to
    the stream; without one, by their weights. More give nothing at first, which keeps the function. A head keeps its
    key/value head; where every head has its own, these go and come with it.

    Args:
        count: of heads; where several share a key/value head, a multiple of those.
        stack: `"encoder"` or `"decoder"`; by default every stack.
        text: the text, or the path of a file with it.
    """

    count: int
    stack: str = ""
    text: str | Path | None = None

    def apply(self, subject: Subject) -> Subject:
        stacks = [subject.stack(self.stack)] if self.stack else list(subject.stacks)
        changes: dict[str, dict[str, Any]] = {}
        before: set[int] = set()
        for stack in stacks:
            config = subject.stacks[stack]
            layers = list(config.per_layer_config)
            before |= {layer.num_attention_heads for layer in layers}
            own = fields_by_layer(config, but="num_attention_heads")
            for number, layer in enumerate(layers):
                self._refuse(number, layer)
                has_own = layer.num_key_value_heads == layer.num_attention_heads
                fields = own.setdefault(number, {})
                fields["num_key_value_heads"] = self.count if has_own else layer.num_key_value_heads
            shared = own[0]["num_key_value_heads"]
            for fields in own.values():
                if fields["num_key_value_heads"] == shared:
                    del fields["num_key_value_heads"]
            changes[stack] = {
                "num_attention_heads": self.count,
                "num_key_value_heads": shared,
                "per_layer_config": {number: fields for number, fields in own.items() if fields} or None,
            }
            if shared > 1:
                changes[stack]["broadcast_key_value"] = False
        chosen = self._chosen(subject, stacks)
        exactness = SAME_BITS if before == {self.count} else SAME_FUNCTION
        if max(before) > self.count:
            exactness = APPROXIMATE
        how = {SAME_BITS: "as before", SAME_FUNCTION: "new ones give nothing", APPROXIMATE: "those that matter most"}
        what = f"{self.count} heads from {', '.join(map(str, sorted(before)))}: {how[exactness]}"
        return subject.changed(
            Outcome(what, exactness),
            lambda name, old: _with_heads(name, old, chosen),
            config=with_stacks(subject.config, changes),
        )

    def _refuse(self, number: int, layer: VariantConfig) -> None:
        heads, shared = layer.num_attention_heads, layer.num_key_value_heads
        if self.count < 1 or (shared != heads and self.count % shared):
            raise SurgeryError(
                f"{self.count} heads cannot share the {shared} key/value heads of layer {number} evenly. Give a multiple of "
                f"{shared}, or change `--kv-heads` first."
            )
        if self.count == heads:
            return
        if layer.position_embedding_type == "alibi":
            raise SurgeryError(
                "ALiBi's slopes follow from the number of heads (`position_embedding_type`), so that other heads would be "
                "those of another model. Change `--kv-heads` or `--ffn-width` instead."
            )
        if self.count > heads and (layer.attention_sub_norm or layer.qk_norm == "full"):
            field = "attention_sub_norm" if layer.attention_sub_norm else "qk_norm"
            raise SurgeryError(
                f"Layer {number} normalises all heads together (`{field}`), so that new ones would change the others. "
                "Choose fewer heads, or leave them."
            )

    def _chosen(self, subject: Subject, stacks: list[str]) -> "Chosen":
        """Which heads every attention will have."""
        scores = self._scores(subject, stacks)
        chosen: Chosen = {}
        for stack in stacks:
            config, prefix = subject.stacks[stack], subject.prefix(stack)
            tables = config.position_embedding_type == "relative_bias" and not config.relative_attention_per_layer
            if tables and scores:
                # One bias for the heads of all layers.
                own = {name: score for name, score in scores.items() if name.startswith(f"{prefix}layers.")}
                for kind in ATTENTIONS:
                    names = [name for name in own if name.endswith(kind)]
                    if names:
                        together = torch.stack([own[name] / own[name].sum() for name in names]).sum(0)
                        scores |= dict.fromkeys(names, together)
            for number, layer in enumerate(config.per_layer_config):
                for kind in ATTENTIONS:
                    name = f"{prefix}layers.{number}.{kind}"
                    if f"{name}.q_proj.weight" not in subject.stored:
                        continue
                    heads, shared = layer.num_attention_heads, layer.num_key_value_heads
                    groups = 1 if shared == heads else shared
                    score = scores.get(name)
                    chosen[name] = (_in_groups(score, heads, groups, self.count), layer)
        return chosen

    def _scores(self, subject: Subject, stacks: list[str]) -> dict[str, torch.Tensor]:
        """Name of an attention that gets fewer heads -> (heads,)."""
        prefix = body_prefix(subject)
        shapes: dict[str, tuple[int, int, int]] = {}
        for stack in stacks:
            for number, layer in enumerate(subject.stacks[stack].per_layer_config):
                for kind in ATTENTIONS:
                    name = f"{subject.prefix(stack)}layers.{number}.{kind}"
                    if layer.num_attention_heads > self.count and f"{name}.q_proj.weight" in subject.stored:
                        shapes[name] = (layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim)
        squares = {}
        if self.text is not None and shapes:
            watched = {f"{name}.o_proj".removeprefix(prefix): "input" for name in shapes}
            squares = mean_squares(subject, self.text, watched)
        scores = {}
        for name, (heads, shared, size) in shapes.items():
            columns = subject.load(f"{name}.o_proj.weight").double().square().sum(0)
            if self.text is not None:
                inner = squares[f"{name}.o_proj".removeprefix(prefix)]
            else:
                values = subject.load(f"{name}.v_proj.weight").double().square().sum(1)
                inner = values.view(shared, size).repeat_interleave(heads // shared, dim=0).flatten()
            scores[name] = (columns * inner).view(heads, size).sum(1)
        return scores


def _in_groups(score: torch.Tensor | None, heads: int, groups: int, count: int) -> list[int]:
    """So many heads, as many of each group: the best in their old order, or all and new ones behind them."""
    old, new = heads // groups, count // groups
    chosen: list[int] = []
    for group in range(groups):
        numbers = list(range(group * old, (group + 1) * old))
        if score is not None and new < old:
            numbers = sorted(sorted(numbers, key=lambda head: -float(score[head]))[:new])
        chosen += numbers[:new] + [NEW] * (new - len(numbers[:new]))
    return chosen


def _with_heads(name: str, before: Subject, chosen: Chosen) -> torch.Tensor:
    """A tensor with other heads; `chosen` as of `Heads`."""
    old = before.load(name)
    match = OF_ATTENTION.fullmatch(name)
    if match is None:
        if ".position_bias.tables." in f".{name}":
            # (buckets, heads): of one layer, or of all.
            stack = name.partition("position_bias.")[0]
            table = int(name.partition(".tables.")[2].partition(".")[0])
            own = chosen.get(f"{stack}layers.{table}.self_attn")
            return old if own is None else _picked(old, 1, own[0], 1, 0.0)
        return old
    if match[1] not in chosen:
        return old
    (heads, layer), part, leaf = chosen[match[1]], match[3], match[4]
    total, size = layer.num_attention_heads, layer.head_dim
    if part == "o_proj":
        return _picked(old, 1, heads, size, 0.0) if leaf == "weight" else old
    if part in ("k_proj", "v_proj", "k_norm") and layer.num_key_value_heads != total:
        # Every key/value head keeps some of its query heads.
        return old
    if part in ("q_norm", "k_norm") and layer.qk_norm == "head":
        return old
    fill = 0.0
    if part.endswith("_norm") and leaf == "weight":
        fill = 0.0 if is_zero_centered(before.skeleton.get_submodule(f"{match[1]}.{part}")) else 1.0
    return _picked(old, 0, heads, old.shape[0] // total, fill)


def _picked(tensor: torch.Tensor, dim: int, chosen: list[int], size: int, fill: float) -> torch.Tensor:
    """Blocks of `size` along a dimension, by their old numbers; those that are `NEW` have one value."""
    index = torch.tensor([block * size + i if block >= 0 else 0 for block in chosen for i in range(size)])
    made = tensor.index_select(dim, index.to(tensor.device))
    new = torch.tensor([block < 0 for block in chosen for _ in range(size)])
    if new.any():
        made = made.clone().index_fill(dim, new.nonzero()[:, 0].to(tensor.device), fill)
    return made


@dataclass(frozen=True)
class HiddenSize(Operation):
    """
    The width of the residual stream, the same channels in every layer. Fewer are those that carry most on a text, behind the
    norms (https://arxiv.org/abs/2407.14679). More keep the function: zeros, with the weights and the epsilon of RMS norms
    scaled to the longer mean; or the whole stream several times, of which the first is read, where a norm would see zeros.

    Args:
        size: of the stream; of an encoder-decoder, of both.
        text: the text, or the path of a file with it; needed for fewer channels.
    """

    size: int
    text: str | Path | None = None

    def apply(self, subject: Subject) -> Subject:
        before = self._before(subject)
        if self.size == before:
            return subject.changed(Outcome(f"a stream of {before} channels, as before", SAME_BITS))
        repeats = self.size > before and self._repeats(subject, before)
        if repeats and subject.config.tie_word_embeddings and HEAD in subject.skeleton.state_dict():
            # The head reads one copy, the embedding writes all.
            subject = Untie().apply(subject)
        changes: dict[str, dict[str, Any]] = {}
        for stack, config in subject.stacks.items():
            changes[stack] = {"hidden_size": self.size}
            if config.embedding_size == before:
                changes[stack]["embedding_size"] = self.size
            if getattr(config, "cross_attention_hidden_size", None) == before:
                changes[stack]["cross_attention_hidden_size"] = self.size
            if self.size > before and not repeats and config.norm_type == "rmsnorm":
                changes[stack]["norm_eps"] = config.norm_eps * before / self.size
        if self.size < before:
            kept = self._kept(subject, before)
            outcome = Outcome(f"{self.size} of {before} channels of the stream, by the text", APPROXIMATE)
        elif repeats:
            kept = torch.arange(self.size) % before
            what = f"the stream of {before} channels {self.size // before} times side by side, read once"
            outcome = Outcome(what, SAME_FUNCTION)
        else:
            kept = torch.cat([torch.arange(before), torch.full((self.size - before,), NEW)])
            outcome = Outcome(f"a stream of {self.size} channels from {before}, new ones zeros", SAME_FUNCTION)
        longer = 1.0 if repeats or self.size < before else (self.size / before) ** 0.5
        norms = {
            name: module
            for name, module in subject.skeleton.named_modules()
            if type(module).__module__ == unchanged.__module__ and isinstance(module, nn.Module)
        }
        dynamic = {stack: config.norm_type == "dynamic_tanh" for stack, config in subject.stacks.items()}
        factor = 1.0 if any(dynamic.values()) else longer

        def tensor(name: str, source: Subject) -> torch.Tensor:
            old = source.load(name)
            new = after.stored[name].shape
            for dim, (was, becomes) in enumerate(zip(old.shape, new)):
                if was != becomes:
                    old = self._along(name, old, dim, kept, repeats, norms, factor)
            return old

        after = subject.changed(outcome, tensor, config=with_stacks(subject.config, changes))
        return after

    def _along(
        self,
        name: str,
        tensor: torch.Tensor,
        dim: int,
        kept: torch.Tensor,
        repeats: bool,
        norms: dict[str, nn.Module],
        factor: float,
    ) -> torch.Tensor:
        """A tensor with other channels of the stream along a dimension."""
        owner, _, leaf = name.rpartition(".")
        made = tensor.index_select(dim, kept.clamp(min=0).to(tensor.device))
        fresh = (kept == NEW).nonzero()[:, 0].to(tensor.device)
        if repeats and dim == 1 and not TABLES.fullmatch(name):
            fresh = torch.arange(tensor.shape[dim], self.size, device=tensor.device)
        fill = 0.0
        if owner in norms and leaf == "weight":
            offset = 1.0 if is_zero_centered(norms[owner]) else 0.0
            fill = 1.0 - offset
            if len(fresh):
                # The root of the mean of squares is smaller by this factor.
                made = ((made.double() + offset) / factor - offset).to(tensor.dtype)
        elif leaf == "scale":
            fill = 1.0
        return made.clone().index_fill(dim, fresh, fill) if len(fresh) else made

    def _before(self, subject: Subject) -> int:
        sizes = {config.hidden_size for config in subject.stacks.values()}
        if self.size < 1:
            raise SurgeryError(f"A stream cannot be {self.size} channels wide. Give at least 1.")
        if len(sizes) > 1:
            raise SurgeryError(
                f"`hidden_size` of the stacks is {' and '.join(map(str, sorted(sizes)))}. "
                "Take the encoder alone (`--encoder-alone`)."
            )
        before = sizes.pop()
        for config in subject.stacks.values():
            if config.position_embedding_type == "sinusoidal" and self.size != before:
                raise SurgeryError(
                    "Sinusoids follow from the width of the stream (`position_embedding_type`), so that others would be "
                    "those of another model. Change `--ffn-width` or `--heads` instead."
                )
        return before

    def _repeats(self, subject: Subject, before: int) -> bool:
        """Whether the stream must be repeated to grow; refused where it cannot be."""
        for config in subject.stacks.values():
            inner = (
                "ffn_sub_norm" if config.ffn_sub_norm else "attention_sub_norm" if config.attention_sub_norm else ""
            )
            if config.norm_type == "dynamic_tanh" or (
                config.norm_type == "rmsnorm" and config.norm_affine and not inner
            ):
                continue
            if self.size % before:
                why = f"`{inner}` shares its epsilon" if inner else f"`norm_type` {config.norm_type} sees zeros"
                raise SurgeryError(
                    f"The stream of {before} channels can grow to a multiple of them only, because {why}. Give a multiple, "
                    "or make the norms `--to-rmsnorm` first."
                )
            return True
        return False

    def _kept(self, subject: Subject, before: int) -> torch.Tensor:
        if self.text is None:
            raise SurgeryError(
                "Channels of the stream are chosen by what they carry on a text. Give one with `--text`."
            )
        prefix = body_prefix(subject)
        watched = {
            name.removeprefix(prefix): "output"
            for name, module in subject.skeleton.named_modules()
            if re.search(r"(pre_norm|post_norm|(^|\.)norm)$", name)
            and isinstance(module, nn.Module)
            and name.startswith(prefix)
        }
        squares = mean_squares(subject, self.text, watched)
        # Of every norm the same weight, whatever its scale.
        score = sum(seen.sqrt() / seen.sqrt().sum() for seen in squares.values() if len(seen) == before)
        if not isinstance(score, torch.Tensor):
            raise SurgeryError("No norm has the width of the stream, by which channels would be chosen.")
        return score.topk(self.size).indices.sort().values


@dataclass(frozen=True)
class ParameterCount(Operation):
    """
    As many parameters as possible up to a number, by the width of the feed-forward networks alone.

    Args:
        count: of all parameters.
        text: to choose channels by, as of `FeedForwardWidth`.
    """

    count: int
    text: str | Path | None = None

    def apply(self, subject: Subject) -> Subject:
        widths = {
            layer.intermediate_size
            for config in subject.stacks.values()
            for layer in config.per_layer_config
            if "mlp" not in getattr(layer, "skip", ())
        }
        if len(widths) != 1:
            raise SurgeryError(
                "The feed-forward networks have several widths, so that one number cannot say them all. Give `--ffn-width`."
            )
        (width,) = widths
        total = sum(tensor.numel() for tensor in subject.stored.values())
        one_more = {
            stack: {
                "intermediate_size": width + 1,
                "per_layer_config": fields_by_layer(config, but="intermediate_size") or None,
            }
            for stack, config in subject.stacks.items()
        }
        skeleton = empty_model(subject.model_class, with_stacks(subject.config, one_more))
        wider = sum(tensor.numel() for tensor in stored_tensors(skeleton).values())
        new = width + (self.count - total) // (wider - total)
        if new < 1:
            least = total - (width - 1) * (wider - total)
            raise SurgeryError(
                f"{self.count:,} parameters are fewer than the {least:,} that stay with feed-forward networks one channel "
                "wide. Drop layers or tokens first."
            )
        # Products of a width with few factors of two are slow.
        new = new // 8 * 8 if new >= 64 else new
        return FeedForwardWidth(new, text=self.text).apply(subject)
