"""What a training step keeps for its backward pass: less, by computing again what is cheap; the switch."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from transformers.utils import is_tracing

from ..model.feed_forward import FeedForward, FusedGatedFeedForward, GatedFeedForward
from ..model.modeling_variant import VariantPreTrainedModel
from ..model.normalization import (
    DynamicTanh,
    Float32LayerNorm,
    PerHeadLayerNorm,
    RMSNorm,
    StatisticsCastRMSNorm,
    WeightlessFloat32LayerNorm,
    WeightlessRMSNorm,
    ZeroCenteredLayerNorm,
    ZeroCenteredRMSNorm,
)
from .loss import LANGUAGE_MODELS, chunk_loss


def autocast_state(device_type: str) -> Callable[[], AbstractContextManager]:
    """What brings the present autocast back, without its cache: copies of weights made there have no gradient."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext
    return partial(torch.autocast, device_type, torch.get_autocast_dtype(device_type), cache_enabled=False)


def check_version(tensor: torch.Tensor, version: int) -> None:
    """As autograd does for what it saves by itself."""
    if tensor._version != version:
        raise RuntimeError(
            f"A tensor of shape {tuple(tensor.shape)} that the backward pass needs was modified by an in-place operation "
            "after the forward pass. Replace that operation, or take `save_training_memory` back with `restore()` to have "
            "autograd name it."
        )


class Kept:
    """A tensor that is kept as it is, with the version it had."""

    def __init__(self, tensor: torch.Tensor):
        # An output would keep the node alive that keeps it; a leaf stays the object that FSDP and ZeRO-3 fill again.
        self.tensor = tensor if tensor.is_leaf else tensor.detach()
        self.version = tensor._version

    def get(self) -> torch.Tensor:
        check_version(self.tensor, self.version)
        return self.tensor


class Recipe:
    """
    A tensor that is computed again where the backward pass needs it, once for all who do.

    Args:
        tensor: as it was computed.
        compute: the inputs -> the tensor, the same bits.
        inputs: what `Keeper.pack` made of them.
    """

    def __init__(self, tensor: torch.Tensor, compute: Callable, inputs: list):
        self.compute = compute
        self.inputs = inputs
        self.autocast = autocast_state(tensor.device.type)
        self.stride = tensor.stride()
        # How often the tensor was saved, how often it is still to be read, and what is computed in the meantime.
        self.uses = 0
        self.left = 0
        self.result: torch.Tensor | None = None

    def get(self) -> torch.Tensor:
        if self.result is None:
            self.left = self.uses
            with torch.no_grad(), self.autocast():
                result = self.compute(*(kept.get() for kept in self.inputs))
                if result.stride() != self.stride:
                    result = torch.empty_strided(
                        result.shape, self.stride, dtype=result.dtype, device=result.device
                    ).copy_(result)
            self.result = result
        result = self.result
        self.left -= 1
        if self.left <= 0:
            self.result = None
        return result


class View:
    """A recipe's tensor as one of those sees it that save it."""

    def __init__(self, recipe: Recipe, tensor: torch.Tensor):
        recipe.uses += 1
        self.recipe = recipe
        self.layout = tensor.shape, tensor.stride(), tensor.storage_offset()

    def get(self) -> torch.Tensor:
        return self.recipe.get().as_strided(*self.layout)


class Keeper:
    """What is saved in one forward pass, and what of it can be computed again."""

    def __init__(self) -> None:
        # Address of a storage -> the tensor that fills it, its version, its recipe.
        self.made: dict[int, tuple[weakref.ref, int, Recipe]] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)
        self.patched: list[tuple[nn.Module, Callable]] = []

    def pack(self, tensor: torch.Tensor) -> Kept | View:
        if type(tensor) is torch.Tensor and tensor.layout == torch.strided and self.made:
            address = tensor.untyped_storage()._cdata
            reference, version, recipe = self.made.get(address, (lambda: None, 0, None))
            made = reference()
            # Another tensor may have come to the address, or a view in another dtype.
            if (
                made is not None
                and made.untyped_storage()._cdata == address
                and made._version == version
                and tensor.dtype == made.dtype
            ):
                return View(recipe, tensor)
        return Kept(tensor)

    @staticmethod
    def unpack(packed: Kept | View) -> torch.Tensor:
        return packed.get()

    def computes_again(self, tensor: torch.Tensor) -> bool:
        """Whether what is computed of a tensor is to be computed again: saved here, and not by a checkpoint within."""
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return torch.is_grad_enabled() and hooks is not None and hooks[0] == self.pack and type(tensor) is torch.Tensor

    def note(self, tensor: torch.Tensor, compute: Callable, *inputs: torch.Tensor) -> torch.Tensor:
        """Have `tensor` computed of the inputs where it is needed, instead of kept; gives the tensor."""
        storage = tensor.untyped_storage()
        if storage.nbytes() == tensor.numel() * tensor.element_size():
            recipe = Recipe(tensor, compute, [self.pack(each) for each in inputs])
            self.made[storage._cdata] = weakref.ref(tensor), tensor._version, recipe
        return tensor

    def run(self, compute: Callable, *inputs: torch.Tensor) -> torch.Tensor:
        """The same as `compute(*inputs)`, of which nothing is kept but the inputs."""
        if not any(tensor.requires_grad for tensor in inputs) or not self.computes_again(inputs[0]):
            return compute(*inputs)
        return self.note(Recomputed.apply(compute, *inputs), compute, *inputs)

    # Entering and leaving a forward pass

    def enter(self, model: nn.Module) -> None:
        for module in model.modules():
            forward = FORWARDS.get(type(module))
            # What was replaced by others wins.
            if forward is not None and "forward" not in module.__dict__:
                patch = partial(forward, self, module)
                module.__dict__["forward"] = patch
                self.patched.append((module, patch))
        self.hooks.__enter__()

    def leave(self) -> None:
        for module, patch in self.patched:
            if module.__dict__.get("forward") is patch:
                del module.__dict__["forward"]
        self.patched.clear()
        # The graph holds on to `pack`, and must not to what it frees on its way back.
        self.made.clear()
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is not None and hooks[0] == self.pack:
            self.hooks.__exit__()


class Recomputed(torch.autograd.Function):
    """(compute, *inputs) -> compute(*inputs); the backward pass computes it again, and differentiates that."""

    @staticmethod
    def forward(ctx, compute: Callable, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.compute = compute
        ctx.autocast = autocast_state(inputs[0].device.type)
        ctx.save_for_backward(*inputs)
        with ctx.autocast():
            return compute(*inputs)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        # With a graph of the backward pass itself, the inputs stay in theirs.
        create_graph = torch.is_grad_enabled()
        needed = ctx.needs_input_grad[1:]
        inputs = ctx.saved_tensors
        if not create_graph:
            inputs = [tensor.detach().requires_grad_(need) for tensor, need in zip(inputs, needed, strict=True)]
        with torch.enable_grad(), ctx.autocast():
            output = ctx.compute(*inputs)
        wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
        gradients = iter(torch.autograd.grad(output, wanted, gradient, create_graph=create_graph))
        return None, *(next(gradients) if need else None for need in needed)


class RootMeanSquareNorm(torch.autograd.Function):
    """
    (x, weight, eps, whether the weight is applied as 1 + w) -> RMSNorm in one dtype, of which x and a number per row
    are kept.

    With n = x / rms(x) and h = gradient * weight, the gradient of x is (h - n mean(h n)) / rms(x). LayerNorm's kernel
    gives (h - mean(h) - n mean(h n)) / rms(x) where it is told that the means are 0, in one pass.
    """

    @staticmethod
    def forward(
        ctx, hidden_states: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.eps, ctx.unit_offset = eps, unit_offset
        inverse = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + eps)
        ctx.mark_non_differentiable(inverse)
        ctx.save_for_backward(hidden_states, weight, inverse)
        return scaled_rows(hidden_states, weight, inverse, unit_offset), inverse

    @staticmethod
    def backward(ctx, gradient: torch.Tensor, _: torch.Tensor) -> tuple:
        hidden_states, weight, inverse = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            applied = 1.0 + weight if ctx.unit_offset else weight
            mean_square = hidden_states.pow(2).mean(-1, keepdim=True)
            output = hidden_states * torch.rsqrt(mean_square + ctx.eps) * applied
            wanted = [tensor for tensor, need in zip((hidden_states, weight), needed, strict=True) if need]
            gradients = iter(torch.autograd.grad(output, wanted, gradient, create_graph=True))
            return *(next(gradients) if need else None for need in needed), None, None
        applied = 1.0 + weight if ctx.unit_offset else weight
        shape = hidden_states.shape[-1:]
        of_states, of_weight, _ = torch.ops.aten.native_layer_norm_backward(
            gradient, hidden_states, shape, torch.zeros_like(inverse), inverse, applied, None, [*needed, False]
        )
        if needed[0]:
            mean = torch.matmul(gradient, applied).unsqueeze(-1) / shape[0]
            of_states.add_(mean * inverse)
        return of_states, of_weight, None, None


def scaled_rows(
    hidden_states: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor, unit_offset: bool
) -> torch.Tensor:
    """The rows times a number each, times the weight."""
    return (hidden_states * inverse).mul_(1.0 + weight if unit_offset else weight)


# Norms


@contextmanager
def with_parameters(module: nn.Module, parameters: dict[str, torch.Tensor]) -> Iterator[None]:
    """Have other tensors stand in the place of a module's own parameters."""
    before = dict(module._parameters)
    module._parameters.update(parameters)
    try:
        yield
    finally:
        module._parameters.update(before)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter] | None:
    """The parameters of a module, or `None` where they cannot be told: in other modules, or tensors in their place."""
    inner = any(True for child in module.children() for _ in child.parameters())
    views = any(torch.is_tensor(value) for value in module.__dict__.values())
    return None if inner or views else {name: each for name, each in module._parameters.items() if each is not None}


def call_norm(
    hidden_states: torch.Tensor, *values: torch.Tensor, module: nn.Module, names: tuple[str, ...]
) -> torch.Tensor:
    with with_parameters(module, dict(zip(names, values, strict=True))):
        return type(module).forward(module, hidden_states)


def any_norm(keeper: Keeper, module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """A norm that keeps its input alone."""
    parameters = own_parameters(module)
    if parameters is None or not keeper.computes_again(hidden_states):
        return type(module).forward(module, hidden_states)
    compute = partial(call_norm, module=module, names=tuple(parameters))
    return keeper.run(compute, hidden_states, *parameters.values())


def kernel_norm(keeper: Keeper, module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """A norm through a kernel that keeps its input alone already: what it gives need not be kept."""
    output = type(module).forward(module, hidden_states)
    parameters = own_parameters(module)
    if parameters is None or not keeper.computes_again(hidden_states):
        return output
    compute = partial(call_norm, module=module, names=tuple(parameters))
    return keeper.note(output, compute, hidden_states, *parameters.values())


def rms_norm(keeper: Keeper, module: RMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    """RMSNorm, by hand where it casts nothing."""
    weight = module.weight
    casts = (
        weight is None
        or weight.ndim != 1
        or not hidden_states.dtype == weight.dtype == (module.statistics_dtype or weight.dtype)
    )
    if casts:
        return any_norm(keeper, module, hidden_states)
    if not keeper.computes_again(hidden_states) or not (hidden_states.requires_grad or weight.requires_grad):
        return type(module).forward(module, hidden_states)
    unit_offset = isinstance(module, ZeroCenteredRMSNorm)
    output, inverse = RootMeanSquareNorm.apply(hidden_states, weight, module.eps, unit_offset)
    return keeper.note(output, partial(scaled_rows, unit_offset=unit_offset), hidden_states, weight, inverse)


# Feed-forward networks


def call_activation(gate: torch.Tensor, *values: torch.Tensor, module: nn.Module, names: tuple[str, ...]):
    with with_parameters(module, dict(zip(names, values, strict=True))):
        return module(gate)


def call_gated(gate: torch.Tensor, up: torch.Tensor, *values: torch.Tensor, module: nn.Module, names: tuple[str, ...]):
    return call_activation(gate, *values, module=module, names=names) * up


def call_fused(gate_up: torch.Tensor, *values: torch.Tensor, module: nn.Module, names: tuple[str, ...]):
    gate, up = gate_up.chunk(2, dim=-1)
    return call_gated(gate, up, *values, module=module, names=names)


def feed_forward(keeper: Keeper, module: FeedForward, hidden_states: torch.Tensor) -> torch.Tensor:
    """A feed-forward network that keeps what the activation takes, and not what it gives."""
    parameters = own_parameters(module.act_fn)
    if parameters is None or not keeper.computes_again(hidden_states):
        return type(module).forward(module, hidden_states)
    call, inputs = INNER[type(module)](module, hidden_states)
    compute = partial(call, module=module.act_fn, names=tuple(parameters))
    inner = module.dropout(keeper.run(compute, *inputs, *parameters.values()))
    return module.down_proj(module.sub_norm(inner))


def plain_inner(module: FeedForward, hidden_states: torch.Tensor) -> tuple[Callable, tuple[torch.Tensor, ...]]:
    return call_activation, (module.up_proj(hidden_states),)


def gated_inner(module: GatedFeedForward, hidden_states: torch.Tensor) -> tuple[Callable, tuple[torch.Tensor, ...]]:
    return call_gated, (module.gate_proj(hidden_states), module.up_proj(hidden_states))


def fused_inner(
    module: FusedGatedFeedForward, hidden_states: torch.Tensor
) -> tuple[Callable, tuple[torch.Tensor, ...]]:
    return call_fused, (torch.cat((module.gate_proj(hidden_states), module.up_proj(hidden_states)), dim=-1),)


# A network -> what it computes of its input, and which of the functions above takes that.
INNER: dict[type, Callable] = {
    FeedForward: plain_inner,
    GatedFeedForward: gated_inner,
    FusedGatedFeedForward: fused_inner,
}
# BatchNorm is not among them: it takes statistics of every call.
FORWARDS: dict[type, Callable] = {
    RMSNorm: rms_norm,
    ZeroCenteredRMSNorm: rms_norm,
    StatisticsCastRMSNorm: rms_norm,
    WeightlessRMSNorm: any_norm,
    Float32LayerNorm: any_norm,
    PerHeadLayerNorm: any_norm,
    DynamicTanh: any_norm,
    nn.LayerNorm: kernel_norm,
    ZeroCenteredLayerNorm: kernel_norm,
    WeightlessFloat32LayerNorm: kernel_norm,
    **dict.fromkeys(INNER, feed_forward),
}


# The switch


def begin_forward(model: nn.Module, *inputs: Any) -> None:
    """Before a model's `forward`: in training, unless something looks at its operations."""
    end_forward(model)
    if (
        model.training
        and torch.is_grad_enabled()
        and not is_tracing()
        # functorch's transforms, forward-mode derivatives, and replicas of DataParallel, whose weights are no parameters
        and torch._C._autograd._saved_tensors_hooks_is_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not getattr(model, "_is_replica", False)
    ):
        model.__dict__["_keeper"] = Keeper()
        model.__dict__["_keeper"].enter(model)


def end_forward(model: nn.Module, *inputs_and_output: Any) -> None:
    """After it, also where it failed."""
    keeper = model.__dict__.pop("_keeper", None)
    if keeper is not None:
        keeper.leave()


class TrainingMemory:
    """
    What `save_training_memory` did to a model, to be taken back with `restore()` or at the end of a `with` block.

    Attributes:
        model: the model.
    """

    def __init__(self, model: VariantPreTrainedModel, loss_chunk: int | None):
        self.model = model
        self._loss_chunk = model.__dict__.get("loss_chunk")
        if loss_chunk is not None and isinstance(model, LANGUAGE_MODELS):
            chunk_loss(model, loss_chunk)
        self._handles = [
            model.register_forward_pre_hook(begin_forward),
            model.register_forward_hook(end_forward, always_call=True),
        ]

    def restore(self) -> None:
        """Keep everything again, and compute the loss as before."""
        if self._handles:
            end_forward(self.model)
            self.model.loss_chunk = self._loss_chunk
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> "TrainingMemory":
        return self

    def __exit__(self, *exception) -> None:
        self.restore()


def save_training_memory(model: nn.Module, loss_chunk: int | None = 512) -> TrainingMemory:
    """
    Have a training step keep less for its backward pass, and compute again there what is cheap: norms, activations
    and the products of gated feed-forward networks. Projections and attention are computed once, as ever.

    The forward pass gives the same bits. Gradients are those of the plain one up to rounding. The loss of a language
    model is computed in chunks beside (`chunk_loss`), so that its output has no logits in training. Nothing of it is
    saved, and evaluation, inference and `torch.compile` go as before; so do blocks under gradient checkpointing, what
    others put in the place of a module, and calls under functorch or in `DataParallel`.

    Args:
        model: any model of ours, or a PEFT model of one.
        loss_chunk: positions at a time in the loss of a language model; `None` leaves the loss as it is.

    Returns:
        a `TrainingMemory`, to be restored or used as a context manager.

    Raises:
        ValueError: if the model is of another class, or does so already.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, VariantPreTrainedModel):
        raise ValueError(f"{type(model).__name__} is no model of ours. Convert it with `from_native` first.")
    if begin_forward in model._forward_pre_hooks.values():
        raise ValueError("This model saves training memory already. Call `restore()` on what the first call gave.")
    return TrainingMemory(model, loss_chunk)
