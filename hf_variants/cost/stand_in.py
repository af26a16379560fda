"""A model without memory, in which one layer of each kind stands for all like it: its forward can be run and watched."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import nn

from ..conversion.skeleton import empty_model
from ..model.attention import Attention
from ..model.modeling_variant import VariantForMultipleChoice
from ..model.part import Call, Part
from ..model.positions import GrowingSinusoidalPositions, RotaryEmbedding, SinusoidalPositions, no_padding_mask


@dataclass
class Stack:
    """
    Attributes:
        layers: one of each kind, in the order of the first of them.
        order: of every layer that they stand for, the index of its kind.
    """

    layers: list[nn.Module]
    order: list[int]


class StandIn:
    """
    Attributes:
        model: on the meta device, in training mode.
        stacks: of its layers, in the order in which they run.
    """

    def __init__(self, model: Part, dtype: str):
        model_class: Any = model.cls
        self.model: Any = empty_model(model_class, **model.arguments).to(getattr(torch, dtype)).train()
        self.model.set_attn_implementation("eager")
        self.stacks = [
            _keep_one_of_each(self.model.get_submodule(path), part)
            for path, part in model.walk()
            if "layers" in part.children()
        ]
        self._eager = {
            module: module.eager_attention for module in self.model.modules() if isinstance(module, Attention)
        }

    @staticmethod
    @lru_cache(maxsize=2)
    def of(model: Part, dtype: str) -> "StandIn":
        """One for all that is asked about a model."""
        return StandIn(model, dtype)

    def layers(self) -> Iterator[tuple[nn.Module, int]]:
        """Every layer, and how many it stands for."""
        for stack in self.stacks:
            counts = Counter(stack.order)
            yield from ((layer, counts[kind]) for kind, layer in enumerate(stack.layers))

    def forward(self, call: Call, fused: bool) -> Any:
        """
        Of a training step without padding, with a loss on every position where the model has one.

        Args:
            call: its batch, length and source count.
            fused: attention keeps queries, keys, values, its output and a number per query, as FlashAttention does
                (https://arxiv.org/abs/2307.08691); or all weights of attention, as eager attention does.
        """
        for module, eager_attention in self._eager.items():
            module.eager_attention = cast(Any, fused_attention) if fused else eager_attention
        _spare_values(self.model, call)
        ids = torch.zeros(call.batch, call.length, dtype=torch.long, device="meta")
        # (batch, length) -> (1, batch, length): the choices of one question
        inputs: dict[str, Any] = {"input_ids": ids[None] if isinstance(self.model, VariantForMultipleChoice) else ids}
        if self.model.config.is_encoder_decoder:
            source = torch.zeros(call.batch, call.source, dtype=torch.long, device="meta")
            inputs = {"input_ids": source, "decoder_input_ids": ids}
        if hasattr(self.model, "lm_head"):
            inputs["labels"] = ids
        return self.model(**inputs, use_cache=False)


def _spare_values(built: Any, call: Call) -> None:
    """Replace what looks at values, which there are none of, by what takes the same shapes."""
    if hasattr(built, "pool"):
        # Which token stands for a sequence.
        built.real_tokens = built.marked_tokens = lambda *arguments: None
        built.pool = lambda hidden_states, tokens: hidden_states[:, 0]
    for module in built.modules():
        owner: Any = module
        if isinstance(module, GrowingSinusoidalPositions):
            module.grow(max(call.length, call.source))
            owner.forward = partial(SinusoidalPositions.forward, module)
        elif isinstance(module, RotaryEmbedding):
            # Frequencies follow the longest input for some types, in place.
            module.rope_type = "default"
        elif hasattr(module, "padding_mask_of") and module.padding_mask_of is not no_padding_mask:
            # Without padding a causal mask made of ids has a row for every sequence, and one that sees all is left out.
            owner.padding_mask_of = torch.ones_like if module.config.is_causal else no_padding_mask


def _keep_one_of_each(stack: Any, part: Part) -> Stack:
    """Leave one layer of each kind in a stack."""
    blocks = part.children()["layers"].arguments["modules"]
    # Layers with a table of their own are each of a kind.
    numbered = getattr(stack.position_bias, "per_layer", False)
    kinds = [
        (index if numbered else 0, stack.layer_types[index], stack.rotary_names[index], _described(block))
        for index, block in enumerate(blocks)
    ]
    distinct = list(dict.fromkeys(kinds))
    first = [kinds.index(kind) for kind in distinct]
    # Counted as if all ran.
    stack.layerdrop = 0.0
    stack.layers = nn.ModuleList([stack.layers[index] for index in first])
    stack.layer_types = [stack.layer_types[index] for index in first]
    stack.rotary_names = [stack.rotary_names[index] for index in first]
    return Stack(list(stack.layers), [distinct.index(kind) for kind in kinds])


def _described(block: Part) -> str:
    """A block without its number."""
    return " ".join(
        f"{path} {part.cls.__name__} "
        + str({name: value for name, value in part.arguments.items() if isinstance(value, (int, float, str, bool, tuple))
               and name not in ("layer_idx", "scaling")})
        for path, part in block.walk()
    )  # fmt: skip


class _FusedAttention(torch.autograd.Function):
    """Keeps what FlashAttention keeps; it is run on tensors without values."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        # Tokens before heads in memory, as the output projection reads it.
        output = query.transpose(1, 2).new_empty(query.transpose(1, 2).shape)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def fused_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """As an attention function of transformers, of which the shapes alone are right."""
    return _FusedAttention.apply(query, key, value), None
