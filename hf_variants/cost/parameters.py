"""How many parameters there are, in which parts, and what they weigh."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

from torch import nn

import hf_variants

from ..model.linear import OwnDtypeLinear
from ..model.part import Part


# Bytes of one value.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Weight-only quantisation of the layers' matrices, as tools do it by default: bits of a weight, and how many weights of a
# row share one scale of 16 bits (0: the whole row).
QUANTISED = {"int8": (8, 0), "int4": (4, 128)}
# What PEFT gives an adapter by default in the Llama shape, whose names are ours.
LORA_TARGETS = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Weight:
    """
    One parameter.

    Attributes:
        name: as in `named_parameters`.
        shape: its own.
        kind: the part that it belongs to: `"embedding"`, `"attention"`, `"feed_forward"`, `"norms"`, `"head"` or
            `"scales"`.
        part: the structure's part that has it.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    part: Part

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def is_looked_up(self) -> bool:
        """Whether a token reads one row of it, as of an embedding."""
        return self.part.is_a(nn.Embedding)

    @property
    def is_quantised(self) -> bool:
        """Whether tools for weight-only quantisation take it: a matrix inside a layer."""
        return self.part.is_a(nn.Linear) and ".layers." in f".{self.name}" and len(self.shape) == 2


def structure(config: Any, class_name: str | None = None) -> Part:
    """The model of a config before it is built; by default the one with a language-modelling head."""
    if class_name is None:
        decoder = "VariantForConditionalGeneration" if config.is_encoder_decoder else "VariantForCausalLM"
        class_name = decoder if config.is_encoder_decoder or config.is_causal else "VariantForMaskedLM"
    return Part(getattr(hf_variants, class_name), config=config)


@lru_cache(maxsize=8)
def weights(model: Part) -> tuple[Weight, ...]:
    """The parameters of a model, each tied one once, under the name that it is saved with."""
    tied = set(_tied_names(model))
    return tuple(
        Weight(name, shape, _kind(name, part), part)
        for path, part in model.walk()
        for own, shape in part.shapes().items()
        if (name := ".".join(filter(None, (path, own)))) not in tied
    )


def _tied_names(model: Part) -> Iterator[str]:
    for path, part in model.walk():
        config = part.arguments.get("config")
        for name in getattr(part.cls, "_tied_weights_keys", None) or ():
            field = "share_embeddings" if name.endswith("embed_tokens.weight") else "tie_word_embeddings"
            if getattr(config, field):
                yield f"{path}.{name}" if path else name


def _kind(name: str, part: Part) -> str:
    names = name.split(".")
    owner = names[-2] if len(names) > 1 else ""
    if owner.endswith("norm"):
        return "norms"
    if owner.endswith("_residual"):
        return "scales"
    if {"self_attn", "cross_attn", "position_bias", "rotary_emb"}.intersection(names):
        return "attention"
    if "mlp" in names:
        return "feed_forward"
    inner = {"embed_tokens", "token_projection", "token_types", "embed_positions", "task_types", "embedding_projection",
             "unread_embedding"}  # fmt: skip
    return "embedding" if inner.intersection(names) else "head"


@dataclass(frozen=True)
class Parameters:
    """
    Attributes:
        total: each tied one counted once.
        by_part: of the kinds of `Weight`, those that there are.
        looked_up: in tables of which a token reads a row.
        active: what a token is multiplied with: all but those tables, and with a table that the head is tied to.
        trainable: all but frozen tables, or the weights of LoRA alone.
    """

    total: int
    by_part: dict[str, int]
    looked_up: int
    active: int
    trainable: int


def count_parameters(
    model: Part, lora_rank: int | None = None, lora_targets: tuple[str, ...] = LORA_TARGETS
) -> Parameters:
    """
    Args:
        lora_rank: of adapters, with which they alone are trained.
        lora_targets: names of the linear layers that get one.
    """
    found = weights(model)
    by_part: Counter[str] = Counter()
    for weight in found:
        by_part[weight.kind] += weight.count
    total = by_part.total()
    looked_up = sum(weight.count for weight in found if weight.is_looked_up)
    # A tied head multiplies with the table.
    heads = sum(prod(part.shapes()["weight"]) for path, part in model.walk() if path == "lm_head")
    own_head = sum(weight.count for weight in found if weight.name == "lm_head.weight")
    trainable = total - sum(weight.count for weight in found if is_frozen(weight))
    if lora_rank is not None:
        trainable = sum(
            lora_rank * sum(weight.shape)
            for weight in found
            if weight.name.endswith(tuple(f".{target}.weight" for target in lora_targets))
        )
    return Parameters(total, dict(by_part), looked_up, total - looked_up + heads - own_head, trainable)


def is_frozen(weight: Weight) -> bool:
    """Whether it is a table that is stored and not learned."""
    return (weight.name.endswith("embed_positions.weight") and not weight.is_looked_up) or "rotary_emb" in weight.name


def weight_bytes(model: Part) -> dict[str, int]:
    """Bytes of the weights by dtype; of the quantised kinds, with scales, and the other weights in bfloat16."""
    found = weights(model)
    sizes = {}
    for dtype, width in DTYPE_BYTES.items():
        # What stays in float32 where the rest is in float16 (T5).
        wide = [weight for weight in found if weight.part.cls is OwnDtypeLinear] if dtype == "float16" else []
        sizes[dtype] = width * sum(weight.count for weight in found) + 2 * sum(weight.count for weight in wide)
    for kind, (bits, group) in QUANTISED.items():
        sizes[kind] = sum(
            _quantised_bytes(weight.shape, bits, group) if weight.is_quantised else 2 * weight.count
            for weight in found
        )
    return sizes


def _quantised_bytes(shape: tuple[int, ...], bits: int, group: int) -> int:
    rows, columns = shape
    scales = -(-columns // group) if group else 1
    return rows * (-(-columns * bits // 8) + 2 * scales)
