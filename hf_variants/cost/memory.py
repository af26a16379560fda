"""What one device of several has to hold."""

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod
from types import SimpleNamespace

from transformers.distributed.pipeline_parallel import PipelineStage

from ..model.distribution import tensor_parallel_plan
from ..model.part import Part
from .cache import cache_bytes
from .parameters import DTYPE_BYTES, LORA_TARGETS, Weight, is_frozen, weight_bytes, weights


# Bytes for every trained parameter beside it and its gradient; `None`: as many as the parameter itself has, so often.
OPTIMIZERS: dict[str, tuple[int, int]] = {
    # (times the parameter's own bytes, bytes)
    "sgd": (0, 0),
    "momentum": (1, 0),
    "adamw": (2, 0),
    # Two states of 8 bits; their scales, one for each block of 256, are 1/64 of that and left out.
    "adamw8bit": (0, 2),
    # The weights in float32 and two states in float32, beside weights in 16 bits (https://arxiv.org/abs/1910.02054).
    "adamw-mixed": (0, 12),
}
SHARDED_ROWS = ("colwise", "colwise_gather_output", "embedding_rowwise")
SHARDED_COLUMNS = ("rowwise", "rowwise_split_input")


@dataclass(frozen=True)
class Plan:
    """
    How training is spread over `dp * fsdp * tp * pp` devices.

    Attributes:
        dp: replicas that see other data (DDP, or ZeRO's ranks).
        zero: stage of ZeRO over the `dp` ranks: they share the optimizer's states (1), gradients (2), weights (3).
        fsdp: ranks that share all of these (FSDP2: each parameter along its first dimension, rounded up).
        tp: ranks that share layers, by the plan of `tensor_parallel_plan`.
        pp: stages of a pipeline: equal runs of layers; where they do not divide, as the installed transformers has it.
        optimizer: a key of `OPTIMIZERS`.
        checkpointing: layers are computed again in the backward.
    """

    dp: int = 1
    zero: int = 0
    fsdp: int = 1
    tp: int = 1
    pp: int = 1
    optimizer: str = "adamw"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if min(self.dp, self.fsdp, self.tp, self.pp) < 1:
            raise ValueError("`dp`, `fsdp`, `tp` and `pp` count devices. Set each to at least 1.")
        if self.zero not in range(4):
            raise ValueError(f"`zero` is {self.zero}, and ZeRO has the stages 1, 2 and 3. Set one, or 0 for none.")
        if self.zero and self.fsdp > 1:
            raise ValueError("`zero` and `fsdp` both share the states of training. Use one of the two.")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"`optimizer` is {self.optimizer!r}. Choose one of {', '.join(OPTIMIZERS)}.")

    @property
    def is_whole(self) -> bool:
        """Whether every device has all of the model, its gradients and states."""
        return self.fsdp == self.tp == self.pp == 1 and not self.zero


@dataclass(frozen=True)
class RankMemory:
    """
    What the ranks of one pipeline stage hold, in bytes, before a forward: activations come on top.

    Attributes:
        stage: which, from 0.
        weights, gradients, optimizer: of training, adapters included.
        gathered_heads: tensor parallelism computes whole heads on every rank of some layer, because it cannot split them.
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    gathered_heads: bool

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def rank_memory(model: Part, plan: Plan, dtype: str, lora_rank: int | None = None) -> list[RankMemory]:
    """
    Of one rank of every stage, the one with most where shards differ.

    Raises:
        ValueError: if there are more stages than layers.
    """
    styles = _styles(model, plan.tp)
    gathered = plan.tp > 1 and any("gather" in style for name, style in styles if "attn" in name)
    width = DTYPE_BYTES[dtype]
    per_copy, per_parameter = OPTIMIZERS[plan.optimizer]
    shards = {
        what: plan.fsdp * (plan.dp if plan.zero >= stage else 1)
        for what, stage in (("optimizer", 1), ("gradients", 2), ("weights", 3))
    }
    stages = []
    for stage, found in enumerate(_stages(model, plan.pp)):
        held = dict.fromkeys(shards, 0)
        for weight in found:
            shape = _tensor_parallel_shape(weight, styles, plan.tp)
            trained = [] if is_frozen(weight) else [shape]
            # Each rank has the gradient of a whole table of embeddings, of which it holds a part; a tied head's is in parts.
            is_apart = weight.is_looked_up and not _serves_the_head(model, weight)
            gradients = [weight.shape for _ in trained] if is_apart else trained
            if lora_rank is not None:
                is_target = weight.name.endswith(tuple(f".{name}.weight" for name in LORA_TARGETS))
                gradients = trained = [(lora_rank, shape[1]), (shape[0], lora_rank)] if is_target else []
                held["weights"] += width * sum(_shard(pair, shards["weights"]) for pair in trained)
            held["weights"] += width * _shard(shape, shards["weights"])
            held["gradients"] += width * sum(_shard(one, shards["gradients"]) for one in gradients)
            held["optimizer"] += (per_copy * width + per_parameter) * sum(
                _shard(one, shards["optimizer"]) for one in trained
            )
        stages.append(RankMemory(stage, **held, gathered_heads=gathered))
    return stages


def _shard(shape: tuple[int, ...], ranks: int) -> int:
    """Values of the largest shard along the first dimension."""
    return ceil(shape[0] / ranks) * prod(shape[1:]) if shape else 1


def _styles(model: Part, ranks: int) -> list[tuple[str, str]]:
    """Tensor-parallel styles by patterns of modules' names."""
    if ranks == 1:
        return []
    found = [("*lm_head", "colwise_gather_output")]
    for path, part in model.walk():
        config = part.arguments.get("config")
        if part.cls.__name__ == "VariantModel":
            prefix = f"{path}." if path else ""
            found += [(f"{prefix}{name}", style) for name, style in tensor_parallel_plan(config, ranks).items()]
            found.append((f"{prefix}embed_tokens", "embedding_rowwise"))
    return found


def _tensor_parallel_shape(weight: Weight, styles: list[tuple[str, str]], ranks: int) -> tuple[int, ...]:
    owner = weight.name.rpartition(".")[0]
    style = next((style for pattern, style in styles if fnmatch.fnmatchcase(owner, pattern)), None)
    shape = weight.shape
    if style in SHARDED_ROWS and shape:
        return (ceil(shape[0] / ranks), *shape[1:])
    if style in SHARDED_COLUMNS and len(shape) == 2:
        return (shape[0], ceil(shape[1] / ranks))
    return shape


def _stages(model: Part, count: int) -> Iterator[Sequence[Weight]]:
    """The parameters of every stage of a pipeline."""
    found = weights(model)
    if count == 1:
        yield found
        return
    numbered = [(_layer_of(weight.name), weight) for weight in found]
    depth = 1 + max(layer for layer, _ in numbered if layer is not None)
    if count > depth:
        raise ValueError(f"`pp` is {count}, and there are {depth} layers. Set it to at most that.")
    # All that it reads of a stage is the number of them.
    stages = SimpleNamespace(pp_size=count)
    for stage in range(count):
        first, last = stage == 0, stage == count - 1
        layers = range(*PipelineStage.layer_range_for_rank(stages, stage, depth))
        yield [
            weight
            for layer, weight in numbered
            if (layer in layers if layer is not None else first if _is_below(weight) else last)
        ] + [weight for weight in found if last and not first and _serves_the_head(model, weight)]


def _layer_of(name: str) -> int | None:
    names = name.split(".")
    return int(names[names.index("layers") + 1]) if "layers" in names else None


def _is_below(weight: Weight) -> bool:
    """Whether it stands before the layers."""
    names = set(weight.name.split("."))
    return weight.kind == "embedding" or bool(names & {"token_norm", "embedding_norm", "position_bias"})


def _serves_the_head(model: Part, weight: Weight) -> bool:
    """Whether the last stage needs a copy of it: a table that the head is tied to."""
    config = model.arguments["config"]
    return weight.name.endswith("embed_tokens.weight") and "lm_head" in model.children() and config.tie_word_embeddings


def largest_batch(model: Part, memory: float, length: int, dtype: str, source: int = 0) -> int:
    """Sequences of this length whose cache fits beside the weights; 0 if none does."""
    return _largest(lambda batch: _cached(model, length, batch, dtype, source), memory - weight_bytes(model)[dtype])


def largest_length(model: Part, memory: float, batch: int, dtype: str, source: int = 0) -> int:
    """
    Tokens of every sequence of a batch of this size whose cache fits beside the weights; 0 if none does. It may be more
    than the model was trained for; `2**40` stands for any length, as with windows in every layer.
    """
    return _largest(lambda length: _cached(model, length, batch, dtype, source), memory - weight_bytes(model)[dtype])


def _cached(model: Part, length: int, batch: int, dtype: str, source: int) -> int:
    cache = cache_bytes(model, length, batch=batch, source=source, value_bytes=DTYPE_BYTES[dtype])
    return cache.dynamic if cache is not None else 0


def _largest(needed: Callable[[int], int], memory: float) -> int:
    """The largest number for which no more than `memory` is needed, which grows with it."""
    low, high = 0, 1
    while needed(high) <= memory and high < 2**40:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= memory else (low, middle)
    return low
