"""What each built module computes for one new token per row, on tensors without the dimension of length.

A part is a function that reads the module's own parameters where they lie. Where a module is of a class that is not
known here, or has a hook, or was replaced (PEFT, quantizers), the part is a call of that module.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import NewGELUActivation

from ..model.attention import (
    Attention,
    CrossAttention,
    FullNormAttention,
    FullNormCrossAttention,
    HeadNormAttention,
    HeadNormCrossAttention,
    HeadsFirstNormAttention,
    NormAfterRotationAttention,
    TurnedValueAttention,
    _elementwise_gate,
    _headwise_gate,
    _no_gate,
)
from ..model.block import OVER_TOKENS, Block, LearnedScaleResidual, ParallelBlock
from ..model.feed_forward import FeedForward, FusedGatedFeedForward, GatedFeedForward
from ..model.normalization import (
    BatchNorm,
    Float32LayerNorm,
    RMSNorm,
    StatisticsCastRMSNorm,
    WeightlessFloat32LayerNorm,
    WeightlessRMSNorm,
    ZeroCenteredRMSNorm,
    unchanged,
)
from ..model.positions import NoRotation, PartialRotation, PositionsFirstRotation, QueryScalingRotation, Rotation
from .caches import RoomyLayer
from .int8 import LINEAR, Int8Linear
from .products import few_rows_products
from .watch import is_readable, is_untouched


SELF_ATTENTION = (
    Attention,
    HeadNormAttention,
    HeadsFirstNormAttention,
    FullNormAttention,
    NormAfterRotationAttention,
    TurnedValueAttention,
)
CROSS_ATTENTION = (CrossAttention, HeadNormCrossAttention, FullNormCrossAttention)
BLOCKS = (*OVER_TOKENS, *OVER_TOKENS.values())
# Kernels for what a module writes out in several operations.
ACTIVATIONS: dict[type, Callable] = {NewGELUActivation: partial(F.gelu, approximate="tanh")}


@dataclass
class Token:
    """
    What the layers share in one step.

    Attributes:
        layers: of the self-attention's cache; source_layers: of the cross-attention's.
        rotations: table name -> (cos, sin, scale of the queries or `None`), (rows or 1, 1, head_dim) each.
        score_bias: for every layer, what is added to the scores, (rows or 1, heads or 1, 1, keys), or `None`.
        source_bias: the same for cross-attention.
        attends_to_source: whether there are encoder states.
        arguments: of a layer, for attention modules that are called.
    """

    layers: list = field(default_factory=list)
    source_layers: list = field(default_factory=list)
    rotations: dict = field(default_factory=dict)
    score_bias: list = field(default_factory=list)
    source_bias: torch.Tensor | None = None
    attends_to_source: bool = False
    arguments: Callable | None = None
    source_arguments: dict = field(default_factory=dict)


class Parts:
    """
    Makes parts, and notes what they pass by.

    Attributes:
        passed_by (`list[nn.Module]`): modules whose `forward` is not called.
        called (`list[nn.Module]`): modules that are, since nothing is known about them.
    """

    def __init__(self):
        self.passed_by: list[nn.Module] = []
        self.called: list[nn.Module] = []

    @staticmethod
    def is_known(module: nn.Module, classes: tuple[type, ...]) -> bool:
        """Whether a module is exactly of one of these classes, with nothing hooked to it and weights that can be read."""
        return type(module) in classes and is_untouched(module) and all(map(is_readable, module._parameters.values()))

    def passes_by(self, module: nn.Module, classes: tuple[type, ...]) -> bool:
        """The same; notes what is done with the module."""
        known = self.is_known(module, classes)
        (self.passed_by if known else self.called).append(module)
        return known

    def linear(self, module: nn.Module) -> Callable:
        """(rows, in) -> (rows, out)."""
        if type(module) is Int8Linear and is_untouched(module):
            self.passed_by.append(module)
            return module.product
        if not self.passes_by(module, LINEAR):
            return as_called(module)
        products = few_rows_products(weight_and_bias(module))
        return lambda x: products(x)[0]

    def linears(self, *modules: nn.Module) -> Callable:
        """(rows, in) -> a list of (rows, out), for layers that read the same input."""
        if all(self.is_known(module, LINEAR) for module in modules):
            self.passed_by.extend(modules)
            return few_rows_products(*map(weight_and_bias, modules))
        each = [self.linear(module) for module in modules]
        return lambda x: [layer(x) for layer in each]

    def norm(self, module: Callable) -> Callable:
        """(rows, ..., channels) -> the same."""
        if module is unchanged or not isinstance(module, nn.Module):
            return module
        weight = getattr(module, "weight", None)
        # Own weights per head, too, are left to the module.
        if weight is not None and weight.ndim != 1:
            self.called.append(module)
            return module
        if not self.passes_by(
            module,
            (
                RMSNorm,
                StatisticsCastRMSNorm,
                ZeroCenteredRMSNorm,
                WeightlessRMSNorm,
                nn.LayerNorm,
                Float32LayerNorm,
                WeightlessFloat32LayerNorm,
                BatchNorm,
            ),
        ):
            return module
        weight = None if weight is None else weight.detach()
        bias = getattr(module, "bias", None)
        bias = None if bias is None else bias.detach()
        kind = type(module)
        if kind is WeightlessRMSNorm:
            return partial(weightless_rms_norm, eps=module.eps)
        if kind in (RMSNorm, StatisticsCastRMSNorm, ZeroCenteredRMSNorm):
            return rms_norm(weight, module.eps, offset=kind is ZeroCenteredRMSNorm)
        if kind is nn.LayerNorm:
            return partial(
                F.layer_norm, normalized_shape=module.normalized_shape, weight=weight, bias=bias, eps=module.eps
            )
        if kind is BatchNorm:
            # Read where they lie: training goes on between two generations.
            return lambda x: F.batch_norm(
                x, module.running_mean, module.running_var, weight, bias, training=False, eps=module.eps
            )
        if kind is WeightlessFloat32LayerNorm:
            return partial(F.layer_norm, normalized_shape=(module.dim,), eps=module.eps)
        if module.unit_offset:
            return partial(zero_centered_layer_norm, weight=weight, eps=module.eps)
        return partial(F.layer_norm, normalized_shape=tuple(weight.shape), weight=weight, eps=module.eps)

    def activation(self, module: nn.Module) -> Callable:
        if not self.passes_by(module, (type(module),)):
            return module
        return ACTIVATIONS.get(type(module), module.forward)

    def feed_forward(self, module: nn.Module) -> Callable:
        """(rows, hidden_size) -> the same."""
        if not self.passes_by(module, (FeedForward, GatedFeedForward, FusedGatedFeedForward)):
            return as_called(module)
        self.drops(module.dropout)
        act, sub_norm, down = self.activation(module.act_fn), self.norm(module.sub_norm), self.linear(module.down_proj)
        if type(module) is FeedForward:
            up = self.linear(module.up_proj)
            return lambda x: down(sub_norm(act(up(x))))
        gate_up = self.linears(module.gate_proj, module.up_proj)

        def gated(x: torch.Tensor) -> torch.Tensor:
            gate, up = gate_up(x)
            return down(sub_norm(act(gate).mul_(up)))

        return gated

    def drops(self, dropout: Callable) -> None:
        """Note a dropout, which must be off."""
        if isinstance(dropout, nn.Module):
            self.passed_by.append(dropout)

    def residual(self, module: nn.Module) -> tuple[Callable, Callable]:
        """The functions (residual, branch) -> sum, and branch -> branch."""
        self.passed_by.append(module)
        self.drops(module.dropout)
        factor = 1.0 if module.multiply_branch is unchanged else module.multiply_branch.keywords["factor"]
        alpha = 1.0 if module.scale_residual is unchanged else module.scale_residual.keywords["factor"]
        if type(module) is LearnedScaleResidual:
            scale = module.scale.detach()
            return (lambda residual, branch: torch.addcmul(residual, branch, scale)), (lambda branch: branch * scale)
        scale_branch = unchanged if factor == 1.0 else partial(torch.mul, other=factor)
        if alpha != 1.0:
            # torch.add(a, b, alpha=c) is a + c b.
            return (lambda residual, branch: scale_branch(branch).add(residual, alpha=alpha)), scale_branch
        if factor != 1.0:
            return partial(torch.add, alpha=factor), scale_branch
        return torch.add, scale_branch

    def attention(self, module: nn.Module, table: str | None) -> Callable:
        """
        (x, token) -> branch, (rows, hidden_size) both.

        Args:
            table: name of the rotary table, if there is one.
        """
        is_cross = isinstance(module, CROSS_ATTENTION)
        rotation = getattr(module, "rotation", None)
        if not is_known_rotation(rotation) or not self.passes_by(module, SELF_ATTENTION + CROSS_ATTENTION):
            return called_attention(module, is_cross)
        norm_first = isinstance(module, (HeadNormAttention, HeadsFirstNormAttention))
        norm_last = isinstance(module, NormAfterRotationAttention)
        norm_all = isinstance(module, FullNormAttention)
        turns_value = isinstance(module, TurnedValueAttention)
        q_norm, k_norm = self.norm(module.q_norm), self.norm(module.k_norm)
        o_proj, sub_norm = self.linear(module.o_proj), self.norm(module.sub_norm)
        clip, scale_query, head_dim, layer_idx = module.clip, module.scale_query, module.head_dim, module.layer_idx
        rotates = type(rotation) is not NoRotation
        gate = self.gate(module)
        attend = attention_function(module)

        def query_heads(query: torch.Tensor) -> torch.Tensor:
            """(rows, heads * head_dim) -> (rows, heads, head_dim)."""
            query = clip(query)
            if norm_all:
                return scale_query(q_norm(query)).view(query.shape[0], -1, head_dim)
            query = query.view(query.shape[0], -1, head_dim)
            return scale_query(q_norm(query) if norm_first else query)

        def key_heads(key: torch.Tensor) -> torch.Tensor:
            """(rows, kv_heads * head_dim) -> (rows, kv_heads, head_dim)."""
            key = clip(key)
            if norm_all:
                return k_norm(key).view(key.shape[0], -1, head_dim)
            key = key.view(key.shape[0], -1, head_dim)
            return k_norm(key) if norm_first else key

        def finish(output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            # (rows, heads, 1, head_dim) -> (rows, heads * head_dim)
            return o_proj(sub_norm(gate(output.reshape(x.shape[0], -1), x)))

        if is_cross:
            q_proj = self.linear(module.q_proj)

            def cross_attention(x: torch.Tensor, token: Token) -> torch.Tensor:
                layer = token.source_layers[layer_idx]
                query = query_heads(q_proj(x)).unsqueeze(2)
                return finish(attend(query, layer.keys, layer.values, token.source_bias), x)

            return cross_attention

        project = self.linears(module.q_proj, module.k_proj, module.v_proj)

        def self_attention(x: torch.Tensor, token: Token) -> torch.Tensor:
            query, key, value = project(x)
            query, key = query_heads(query), key_heads(key)
            value = clip(value).view(value.shape[0], -1, head_dim)
            if rotates:
                turn, scale = token.rotations[table]
                turned = turn(torch.cat((query, key), dim=1))
                query, key = turned.split((query.shape[1], key.shape[1]), dim=1)
                if scale is not None:
                    query = query * scale
                if turns_value:
                    value = turn(value)
            if norm_last:
                query, key = q_norm(query), k_norm(key)
            layer = token.layers[layer_idx]
            if isinstance(layer, RoomyLayer):
                keys, values = layer.append(key, value)
            else:
                keys, values = layer.update(key.unsqueeze(2), value.unsqueeze(2))
            return finish(attend(query.unsqueeze(2), keys, values, token.score_bias[layer_idx]), x)

        return self_attention

    def gate(self, module: Attention) -> Callable:
        """(output, x) -> output: (rows, heads * head_dim), (rows, hidden_size) -> (rows, heads * head_dim)."""
        if module.gate is _no_gate:
            return lambda output, x: output
        project = self.linear(module.g_proj)
        if module.gate is _elementwise_gate:
            return lambda output, x: output * torch.sigmoid(project(x))
        if module.gate is not _headwise_gate:
            raise NotImplementedError(f"The gate {module.gate} is not known.")
        head_dim = module.head_dim
        return lambda output, x: (
            output.unflatten(1, (-1, head_dim)) * torch.sigmoid(project(x)).unsqueeze(-1)
        ).flatten(1)

    def sublayer(self, block: Block, name: str, compute: Callable) -> Callable:
        """(x, token) -> x: norms, a sublayer and the residual, one after the other."""
        pre, branch_norm, post = (
            self.norm(getattr(block, f"{name}_{slot}")) for slot in ("pre_norm", "branch_norm", "post_norm")
        )
        join, _ = self.residual(getattr(block, f"{name}_residual"))
        from_norm = block.residual_from_norm

        def sublayer(x: torch.Tensor, token: Token) -> torch.Tensor:
            normed = pre(x)
            branch = branch_norm(compute(normed, token))
            return post(join(normed if from_norm else x, branch))

        return sublayer

    def block(self, block: Block, table: str | None) -> Callable:
        """(x, token) -> x, (rows, hidden_size) both."""
        if not self.passes_by(block, BLOCKS):
            raise NotImplementedError(f"{type(block).__name__} is not a block that is known here.")
        sublayers: dict[str, Callable] = {}
        for name in ("self_attn", "cross_attn"):
            if (module := getattr(block, name, None)) is not None:
                sublayers[name] = self.attention(module, table)
        if getattr(block, "mlp", None) is not None:
            feed_forward = self.feed_forward(block.mlp)
            sublayers["mlp"] = lambda x, token: feed_forward(x)
        if isinstance(block, ParallelBlock):
            return self.parallel(block, sublayers)
        steps = {name: self.sublayer(block, name, compute) for name, compute in sublayers.items()}
        if "cross_attn" not in steps:
            return in_turn(*steps.values())
        without = in_turn(steps["self_attn"], steps["mlp"])
        whole = in_turn(steps["self_attn"], steps["cross_attn"], steps["mlp"])
        return lambda x, token: (whole if token.attends_to_source else without)(x, token)

    def parallel(self, block: ParallelBlock, sublayers: dict[str, Callable]) -> Callable:
        self.drops(block.sum_dropout)
        # In the order in which the block adds them.
        names = [name for name in ("self_attn", "mlp", "cross_attn") if name in sublayers]
        pre_norm = self.norm(block.self_attn_pre_norm)
        pre_norms = {
            name: None if name == "self_attn" or block.shared_norm else self.norm(getattr(block, f"{name}_pre_norm"))
            for name in names
        }
        branches = [
            (
                name,
                pre_norms[name],
                sublayers[name],
                self.norm(getattr(block, f"{name}_branch_norm")),
                self.residual(getattr(block, f"{name}_residual"))[1],
            )
            for name in names
        ]

        def parallel(x: torch.Tensor, token: Token) -> torch.Tensor:
            normed = pre_norm(x)
            total = x
            for name, own_norm, compute, branch_norm, scale in branches:
                if name != "cross_attn" or token.attends_to_source:
                    own = normed if own_norm is None else own_norm(x)
                    total = total + scale(branch_norm(compute(own, token)))
            return total

        return parallel


def in_turn(*steps: Callable) -> Callable:
    if len(steps) == 1:
        return steps[0]
    if len(steps) == 2:
        first, second = steps
        return lambda x, token: second(first(x, token), token)

    def run(x: torch.Tensor, token: Token) -> torch.Tensor:
        for step in steps:
            x = step(x, token)
        return x

    return run


def weight_and_bias(module: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The parameters of a linear layer as tensors without a gradient, in the same memory."""
    return module.weight.detach(), None if module.bias is None else module.bias.detach()


def as_called(module: nn.Module) -> Callable:
    """A module of (batch, length, width) for one position."""
    return lambda x: module(x.unsqueeze(1)).squeeze(1)


def called_attention(module: nn.Module, is_cross: bool) -> Callable:
    """An attention module that is called as its block would."""

    def call(x: torch.Tensor, token: Token) -> torch.Tensor:
        arguments = token.source_arguments if is_cross else token.arguments(module.layer_idx)
        return module(x.unsqueeze(1), **arguments)[0].squeeze(1)

    return call


def weightless_rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x)."""
    return F.rms_norm(x, x.shape[-1:], None, eps)


def rms_norm(weight: torch.Tensor, eps: float, offset: bool) -> Callable:
    """x / rms(x) * weight, or 1 + weight with the offset; of one vector with a dot product, which is the faster."""
    size = weight.shape[0]
    zero, one = torch.zeros(()), torch.ones(())

    def norm(x: torch.Tensor) -> torch.Tensor:
        applied = weight + one if offset else weight
        if x.numel() != size:
            return F.rms_norm(x, (size,), applied, eps)
        flat = x.view(-1)
        return torch.addcmul(zero, x, applied, value=(torch.dot(flat, flat).item() / size + eps) ** -0.5)

    return norm


def zero_centered_layer_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight + 1.0, None, eps)


def is_known_rotation(rotation: Callable | None) -> bool:
    """Whether a rotation is one of the model's own, of pairs or halves."""
    while type(rotation) in (PositionsFirstRotation, QueryScalingRotation):
        rotation = rotation.rotation
    return type(rotation) in (NoRotation, Rotation, PartialRotation)


def turn_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    The rotation of halves: (rows, heads, head_dim) by tables (rows or 1, 1, 2, head_dim / 2), with the first half of the
    sines negated.
    """
    halves = x.unflatten(-1, (2, -1))
    return torch.addcmul(halves * cos, halves.flip(-2), sin).flatten(-2)


def turn_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The same of neighbouring pairs, by tables (rows or 1, 1, head_dim / 2, 2)."""
    pairs = x.unflatten(-1, (-1, 2))
    return torch.addcmul(pairs * cos, pairs.flip(-1), sin).flatten(-2)


def turn_part(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, turn: Callable, width: int) -> torch.Tensor:
    """The same of the first `width` channels."""
    return torch.cat((turn(x[..., :width], cos, sin), x[..., width:]), dim=-1)


def make_turn(cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, head_dim: int) -> Callable:
    """
    The rotation at one position: (rows, heads, head_dim) -> the same.

    Args:
        cos, sin: (rows or 1, 1, rotary_dim), as the rotary tables give them.
    """
    width = cos.shape[-1]
    pair = (-1, 2) if interleaved else (2, -1)
    cos, sin = cos.unflatten(-1, pair), sin.unflatten(-1, pair)
    if interleaved:
        sin = torch.stack((-sin[..., 0], sin[..., 1]), dim=-1)
    else:
        sin = torch.stack((-sin[..., 0, :], sin[..., 1, :]), dim=-2)
    turn = turn_pairs if interleaved else turn_halves
    if width < head_dim:
        return partial(turn_part, cos=cos, sin=sin, turn=turn, width=width)
    return partial(turn, cos=cos, sin=sin)


def attention_function(module: Attention) -> Callable:
    """
    (query, keys, values, bias) -> (rows, heads, 1, head_dim), with the module's scale, soft-cap and sinks.

    query is (rows, heads, 1, head_dim), keys and values (rows, kv_heads, keys, head_dim), the bias
    (rows or 1, heads or 1, 1, keys), of float32 or bool, or `None`.
    """
    scaling, softcap = module.scaling, module.score_options.get("softcap")
    sinks = module.sinks.detach() if module.has_sinks else None
    if softcap is None and sinks is None:

        def attend(query, keys, values, bias):
            return F.scaled_dot_product_attention(
                query, keys, values, attn_mask=bias, scale=scaling, enable_gqa=query.shape[1] != keys.shape[1]
            )

        return attend

    def attend_by_parts(query, keys, values, bias):
        rows, heads, _, head_dim = query.shape
        kv_heads = keys.shape[1]
        # The heads of a group as the rows of one product: (rows * kv_heads, group, head_dim).
        grouped = query.reshape(rows * kv_heads, heads // kv_heads, head_dim)
        scores = torch.bmm(grouped, keys.flatten(0, 1).transpose(1, 2)).mul_(scaling)
        if softcap is not None:
            scores = torch.tanh(scores.div_(softcap)).mul_(softcap)
        if bias is not None:
            scores = scores.view(rows, heads, 1, -1)
            scores = scores.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else scores + bias
            scores = scores.view(rows * kv_heads, heads // kv_heads, -1)
        output = torch.bmm(torch.softmax(scores, dim=-1), values.flatten(0, 1)).view(rows, heads, 1, head_dim)
        if sinks is None:
            return output
        kept = (torch.logsumexp(scores, dim=-1).view(rows, heads) - sinks).sigmoid()
        return output * kept.view(rows, heads, 1, 1)

    return attend_by_parts
