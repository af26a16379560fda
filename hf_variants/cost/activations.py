"""
What a forward keeps for the backward. Every forward says so itself: it runs on tensors without memory, and what autograd
saves is counted, each storage once, weights aside.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from ..conversion.skeleton import empty_model
from ..model.attention import Attention
from ..model.part import Call, Part
from ..model.positions import GrowingSinusoidalPositions, RotaryEmbedding, SinusoidalPositions, no_padding_mask


@dataclass(frozen=True)
class Activations:
    """
    Bytes that are kept between forward and backward.

    Attributes:
        total: of the whole model.
        checkpointed: where layers keep their input alone and are computed again, at the moment when most is kept: in the
            backward of one layer.
        per_layer: of the layer that keeps most.
        outside: of embeddings, masks, head and loss.
    """

    total: int
    checkpointed: int
    per_layer: int
    outside: int


def activations(model: Part, call: Call, *, dtype: str = "bfloat16", fused: bool = True) -> Activations:
    """
    Of a training step without padding, with a loss on every position where the model has one.

    Args:
        call: its batch, length and source count.
        dtype: of the weights.
        fused: attention keeps queries, keys, values, its output and a number per query, as FlashAttention does
            (https://arxiv.org/abs/2307.08691); or all weights of attention, as eager attention does.
    """
    model_class: Any = model.cls
    built = empty_model(model_class, **model.arguments).to(getattr(torch, dtype))
    counts = {id(stack): _keep_one_of_each(stack, part) for part, stack in _stacks(model, built)}
    built.set_attn_implementation("eager")
    if fused:
        for module in built.modules():
            if isinstance(module, Attention):
                module.eager_attention = cast(Any, fused_attention)
    _spare_values(built, call)
    kept = Kept(built)
    layers: list[tuple[int, int, int]] = []
    for module in built.modules():
        if id(module) in counts:
            for layer, count in zip(module.layers, counts[id(module)], strict=True):
                _watch(layer, count, kept, layers)
    with kept.watching():
        _forward(built.train(), call)
    inside = sum(own for _, own, _ in layers)
    outside = kept.total - inside
    largest = max((own for _, own, _ in layers), default=0)
    total = outside + sum(count * own for count, own, _ in layers)
    # Beside its input, a layer that is computed again holds what it reads: tables, masks and biases.
    held = kept.total_of(tensor for key, tensor in kept.shared.items() if key not in kept.seen)
    checkpointed = outside + held + sum(count * entering for count, _, entering in layers) + largest
    return Activations(total, checkpointed, largest, outside)


class Kept:
    """Storages that autograd has saved so far, each counted once, and none of the model's own."""

    def __init__(self, model: nn.Module):
        self.seen = {tensor.untyped_storage()._cdata: tensor for tensor in (*model.parameters(), *model.buffers())}
        self.shared: dict[int, torch.Tensor] = {}
        self.total = self.own = 0

    def watching(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor)

    def _save(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            # Held, so that no later storage takes its place.
            self.seen[storage._cdata] = tensor
            self.total += storage.nbytes()
            if storage._cdata not in self.shared:
                self.own += storage.nbytes()
        return tensor

    @staticmethod
    def total_of(tensors: Iterable[torch.Tensor]) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def share(self, *values: Any) -> None:
        """Note tensors that several layers read."""
        for value in values:
            if isinstance(value, (tuple, list)):
                self.share(*value)
            elif torch.is_tensor(value):
                self.shared[value.untyped_storage()._cdata] = value


def _watch(layer: nn.Module, count: int, kept: Kept, layers: list[tuple[int, int, int]]) -> None:
    """Note for a layer how many are like it, what it keeps, and the bytes of its input."""
    before = 0

    def enter(module: nn.Module, arguments: tuple, options: dict) -> None:
        nonlocal before
        kept.share(*arguments[1:], *options.values())
        before = kept.own

    def leave(module: nn.Module, arguments: tuple, output: Any) -> None:
        layers.append((count, kept.own - before, arguments[0].nbytes))

    layer.register_forward_pre_hook(enter, with_kwargs=True)
    layer.register_forward_hook(leave)


def _stacks(model: Part, built: nn.Module) -> Iterator[tuple[Part, nn.Module]]:
    """Every stack of layers, described and built."""
    for path, part in model.walk():
        if "layers" in part.children():
            yield part, built.get_submodule(path)


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


def _keep_one_of_each(stack: Any, part: Part) -> list[int]:
    """Leave one layer of each kind in a stack. Returns how many there were of each."""
    blocks = part.children()["layers"].arguments["modules"]
    # Layers with a table of their own are each of a kind.
    numbered = getattr(stack.position_bias, "per_layer", False)
    kinds = [
        (index if numbered else 0, stack.layer_types[index], stack.rotary_names[index], _described(block))
        for index, block in enumerate(blocks)
    ]
    counts = Counter(kinds)
    first = [kinds.index(kind) for kind in counts]
    stack.layers = nn.ModuleList([stack.layers[index] for index in first])
    stack.layer_types = [stack.layer_types[index] for index in first]
    stack.rotary_names = [stack.rotary_names[index] for index in first]
    return list(counts.values())


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
        raise NotImplementedError


def fused_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """As an attention function of transformers, of which the shapes alone are right."""
    return _FusedAttention.apply(query, key, value), None


def _forward(model: nn.Module, call: Call) -> None:
    config = model.config
    ids = torch.zeros(call.batch, call.length, dtype=torch.long, device="meta")
    inputs: dict[str, Any] = {"input_ids": ids}
    if config.is_encoder_decoder:
        source = torch.zeros(call.batch, call.source, dtype=torch.long, device="meta")
        inputs = {"input_ids": source, "decoder_input_ids": ids}
    if hasattr(model, "lm_head"):
        inputs["labels"] = ids
    model(**inputs, use_cache=False)
