"""How many floating-point operations a call takes."""

from collections import Counter
from dataclasses import dataclass, replace

from ..model.modeling_variant import SequenceScoring
from ..model.part import Call, Part


@dataclass(frozen=True)
class Flops:
    """
    Multiplications and additions of the matrix products, as torch's FlopCounterMode counts them; what is computed value
    by value (norms, activations, softmax) counts as none.

    Attributes:
        dense: with all scores of attention, as eager attention and sdpa with a mask compute them.
        masked: with those alone that the mask leaves, which is what FlashAttention and FlexAttention come close to.
        by_part: the dense ones, by the last two names of the module.
    """

    dense: int
    masked: int
    by_part: dict[str, int]


def forward_flops(model: Part, call: Call) -> Flops:
    """Of one forward."""
    by_part: Counter[str] = Counter()
    masked = 0
    for (path, part, dense_call), (_, _, masked_call) in zip(
        model.calls(replace(call, masked=False)), model.calls(replace(call, masked=True)), strict=True
    ):
        if flops := part.flops(dense_call):
            by_part[_short(path)] += flops
            masked += part.flops(masked_call)
    return Flops(by_part.total(), masked, dict(by_part))


def backward_flops(model: Part, call: Call, checkpointing: bool = False) -> int:
    """
    Of one backward: two products for each of the forward, one for its input and one for its weights.

    Args:
        checkpointing: with the layers' forward once more.
    """
    # A pooler that stands in a model whose head reads the tokens gets no gradient.
    unread = "model.pooler.dense" if not model.is_a(SequenceScoring) else ""
    products = sum(part.flops(its_call) for path, part, its_call in model.calls(call) if path != unread)
    return 2 * products + (layer_flops(model, call) if checkpointing else 0)


def layer_flops(model: Part, call: Call) -> int:
    """Of the layers alone, which checkpointing computes twice."""
    return sum(part.flops(layer_call) for path, part, layer_call in model.calls(call) if ".layers." in f".{path}")


def _short(path: str) -> str:
    """`model.layers.3.self_attn.q_proj` -> `self_attn.q_proj`."""
    return ".".join([name for name in path.split(".") if not name.isdigit() and name not in ("model", "layers")][-2:])
