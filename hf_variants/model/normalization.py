"""
How activations are normalised: RMSNorm and LayerNorm, plain or zero-centred, in every order of casts; DynamicTanh; and
BatchNorm, the one that looks at other tokens.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import is_tracing, logging

from .axis import ROUNDING, TRAINING, Axis, Check, Idle, axis, quote, setting
from .part import SHAPES, Part, states


logger = logging.get_logger(__name__)

NormType = Literal["layernorm", "rmsnorm", "dynamic_tanh", "batchnorm"]


class NormKind(NamedTuple):
    """
    What one kind of norm is called and has.

    Attributes:
        name: as people write it.
        has_bias: a learned bias beside the weight, unless it is told not to.
        casting_modes: those that it is defined for, the default first.
        has_unit_offset: there is a form that applies the stored weight `w` as `1 + w`.
        needs_weight: there is no form without one.
        over_tokens: its statistics are of the tokens of a batch, so that it stands where these go by as a whole.
    """

    name: str
    has_bias: bool
    casting_modes: tuple[str, ...]
    has_unit_offset: bool = True
    needs_weight: bool = False
    over_tokens: bool = False


NORM_KINDS = {
    "layernorm": NormKind("LayerNorm", has_bias=True, casting_modes=("none", "gemma")),
    "rmsnorm": NormKind("RMSNorm", has_bias=False, casting_modes=("llama", "gemma", "none")),
    "dynamic_tanh": NormKind(
        "DynamicTanh", has_bias=True, casting_modes=("none",), has_unit_offset=False, needs_weight=True
    ),
    "batchnorm": NormKind(
        "BatchNorm", has_bias=True, casting_modes=("gemma",), has_unit_offset=False, over_tokens=True
    ),
}


@axis
class NormalizationAxis(Axis):
    """
    norm_type (`str`): `"layernorm"`, `"rmsnorm"` (https://arxiv.org/abs/1910.07467), `"dynamic_tanh"`
        (https://arxiv.org/abs/2503.10622), or `"batchnorm"` (https://arxiv.org/abs/1502.03167): in training, the mean and
        variance of each channel over the real tokens of the batch, those that the 2D `attention_mask` shows (all without
        one; behind an encoder, those but `pad_token_id`); in evaluation, running ones. In training a causal decoder so
        sees something of later tokens, and its loss says less about generation. Every process and every step of
        accumulation has statistics of its own.
    norm_eps (`float`): added to the variance or mean square.
    norm_alpha_init (`float`): where DynamicTanh's learned `alpha` starts.
    norm_momentum (`float`): weight of a new batch in BatchNorm's running statistics; `None`: the mean of all batches.
    norm_affine, norm_bias (`bool`): learned weight; learned bias (rmsnorm has none).
    norm_unit_offset (`bool`): the stored weight is `w` and the applied one `1 + w` (Gemma, Nemotron).

    Rounding:
    norm_casting_mode (`str`): order of casts below float32. `"llama"`: normalise in float32, cast, then multiply;
        `"gemma"`: everything in float32, cast once; `"none"`: in the input's dtype (LayerNorm: torch's kernel).
    """

    title = "normalisation"

    norm_type: NormType = "rmsnorm"
    norm_eps: float = 1e-6
    norm_alpha_init: int | float = setting(0.5, TRAINING)
    norm_momentum: int | float | None = setting(0.1, TRAINING)
    norm_affine: bool = True
    norm_bias: bool | None = None
    norm_unit_offset: bool = False

    norm_casting_mode: Literal["llama", "gemma", "none"] | None = setting(None, ROUNDING)

    def derive(self) -> None:
        if self.norm_bias is None:
            self.norm_bias = NORM_KINDS[self.norm_type].has_bias and self.norm_affine
        if self.norm_casting_mode is None:
            self.norm_casting_mode = NORM_KINDS[self.norm_type].casting_modes[0]

    def checks(self) -> list[Check]:
        kind = NORM_KINDS[self.norm_type]
        norms = [(self.norm_type, self.norm_affine)]
        norms += [(self.qk_norm_type, self.qk_norm_affine)] if self.qk_norm != "none" else []
        weightless = [name for name, affine in norms if NORM_KINDS[name].needs_weight and not affine]
        elsewhere = {
            "ffn_chunk_size": self.ffn_chunk_size > 0,
            "lm_head_transform": self.lm_head_transform,
            "classifier_transform_norm": self.classifier_transform and self.classifier_transform_norm,
        }
        momentum = self.norm_momentum
        return [
            Check(self.norm_eps <= 0, f"`norm_eps` is {self.norm_eps}.", "Set `norm_eps` above 0, such as 1e-6."),
            Check(
                self.norm_bias and not kind.has_bias,
                f"`norm_bias` is set, but `norm_type` {self.norm_type} has no bias.",
                "Set `norm_bias=False` or `norm_type='layernorm'`.",
            ),
            Check(
                self.norm_bias and not self.norm_affine,
                "`norm_bias` is set, but `norm_affine` is not.",
                "Set `norm_bias=False` or `norm_affine=True`.",
            ),
            Check(
                self.norm_unit_offset and not self.norm_affine,
                "`norm_unit_offset` is set, but without `norm_affine` there is no weight to offset.",
                "Set `norm_unit_offset=False` or `norm_affine=True`.",
            ),
            Check(
                self.norm_unit_offset and not kind.has_unit_offset,
                f"`norm_unit_offset` is set, but `norm_type` {self.norm_type} has no form with `1 + w`.",
                "Set `norm_unit_offset=False` or another `norm_type`.",
            ),
            Check(
                bool(weightless),
                f"`norm_affine` or `qk_norm_affine` is off, but {''.join(weightless[:1])} has no form without a weight.",
                "Set it, or another `norm_type` or `qk_norm_type`.",
            ),
            Check(
                self.qk_norm != "none" and NORM_KINDS[self.qk_norm_type].over_tokens,
                f"`qk_norm_type` {self.qk_norm_type} takes statistics of tokens, and `qk_norm` is on vectors of heads.",
                "Set `qk_norm_type='layernorm'` or another, or `qk_norm='none'`.",
            ),
            Check(
                kind.over_tokens and any(elsewhere.values()),
                f"`norm_type` {self.norm_type} takes statistics of all tokens of a batch, of which "
                f"{quote([name for name, there in elsewhere.items() if there])} shows the norm a part.",
                "Leave it unset, or set another `norm_type`.",
            ),
            Check(
                momentum is not None and not 0.0 < momentum <= 1.0,
                f"`norm_momentum` is {momentum}.",
                "Set it above 0 and to at most 1, or to None for the mean of all batches.",
            ),
            Check(
                self.norm_casting_mode not in kind.casting_modes,
                f"`norm_casting_mode` {self.norm_casting_mode} is not defined for `norm_type` {self.norm_type}.",
                f"Set `norm_casting_mode` to {' or '.join(map(repr, kind.casting_modes))}.",
            ),
            Check(
                self.norm_casting_mode == "gemma" and self.norm_type == "layernorm" and self.norm_bias,
                "`norm_casting_mode` gemma for layernorm is defined without a bias (Cohere).",
                "Set `norm_bias=False` or `norm_casting_mode='none'`.",
            ),
        ]

    def norm_arguments(self) -> dict[str, Any]:
        """What `choose_norm` takes beside a shape."""
        return {
            "norm_type": self.norm_type,
            "eps": self.norm_eps,
            "alpha": self.norm_alpha_init,
            "momentum": self.norm_momentum,
            "affine": self.norm_affine,
            "bias": self.norm_bias,
            "unit_offset": self.norm_unit_offset,
            # What follows a norm has the weights' dtype, the residual stream may have another.
            "casting_mode": "weight" if self.ffn_output_in_float32 else self.norm_casting_mode,
        }

    def qk_norm_arguments(self) -> dict[str, Any]:
        """The same for the norm on queries and keys, whose kind may be another."""
        same_kind = self.qk_norm_type == self.norm_type
        default_cast = NORM_KINDS[self.qk_norm_type].casting_modes[0]
        return {
            **self.norm_arguments(),
            "norm_type": self.qk_norm_type,
            "eps": self.qk_norm_eps,
            "affine": self.qk_norm_affine,
            "bias": self.qk_norm_bias,
            "unit_offset": self.norm_unit_offset and self.qk_norm_affine and same_kind,
            "casting_mode": self.norm_casting_mode if same_kind else default_cast,
        }

    def idle(self) -> list[Idle]:
        kinds = {self.norm_type} if self.qk_norm == "none" else {self.norm_type, self.qk_norm_type}
        return [
            Idle(not self.norm_affine, ["norm_unit_offset"], "`norm_affine` is off"),
            Idle("dynamic_tanh" not in kinds, ["norm_alpha_init"], "no norm is dynamic_tanh"),
            Idle("batchnorm" not in kinds, ["norm_momentum"], "no norm is batchnorm"),
            Idle(kinds == {"dynamic_tanh"}, ["norm_eps"], "every norm is dynamic_tanh"),
        ]


def unchanged(hidden_states: torch.Tensor) -> torch.Tensor:
    """What stands where there is no norm (and no dropout): no module, so that tools which look for norms find norms."""
    return hidden_states


def _scale_after_cast(normalised: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Llama's order: float32 statistics, rounded to the activations' dtype before the weight is applied."""
    return weight * normalised.to(dtype)


def _scale_before_cast(normalised: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Gemma's order: the weight meets the float32 values, which lift it, and the product is rounded once."""
    return (normalised * weight).to(dtype)


def _scale_in_weight_dtype(normalised: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """T5's order: as Llama's, but rounded to the weight's dtype, where the residual stream has another."""
    return weight * normalised.to(weight.dtype)


# casting_mode -> (dtype of the statistics, None for the input's own; how the weight is applied).
_RMS_CASTS: dict[str, tuple[torch.dtype | None, Callable]] = {
    "llama": (torch.float32, _scale_after_cast),
    "gemma": (torch.float32, _scale_before_cast),
    "none": (None, _scale_after_cast),
    "weight": (torch.float32, _scale_in_weight_dtype),
}


class RMSNorm(nn.Module):
    """
    Root mean square norm over the last dimension (https://arxiv.org/abs/1910.07467).

    Args:
        shape (`int` or `tuple[int, int]`): size of the last dimension, or (heads, head_dim) for own weights per head.
        eps (`float`): added to the mean square.
        casting_mode (`str`): order of casts below float32: `"llama"`, `"gemma"` or `"none"` (see `VariantConfig`), or
            `"weight"`: as `"llama"`, with the weight's dtype as the result's.
        affine (`bool`): learn a weight; without one the module has no parameters.

    Shape: (..., *shape) -> (..., *shape), in the input's dtype.
    """

    def __init__(
        self, shape: int | tuple[int, int], eps: float = 1e-6, casting_mode: str = "llama", affine: bool = True
    ):
        super().__init__()
        self.eps = eps
        self.casting_mode = casting_mode
        # SGLang replaces classes of this name and reads the flag to know whether there is a weight.
        self.with_scale = affine
        self.statistics_dtype, self.apply_weight = _RMS_CASTS[casting_mode]
        self.weight = nn.Parameter(self._initial_weight(shape)) if affine else None

    @staticmethod
    def _initial_weight(shape: int | tuple[int, int]) -> torch.Tensor:
        return torch.ones(shape)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(self.statistics_dtype or dtype)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.eps)
        return self.apply_weight(hidden_states, self.weight, dtype)

    def extra_repr(self) -> str:
        shape = tuple(self.weight.shape) if self.weight is not None else None
        return f"{shape}, eps={self.eps}, casting_mode={self.casting_mode}"


class StatisticsCastRMSNorm(RMSNorm):
    """
    RMSNorm that is cast for its statistics alone (T5), so that the gradients of both factors meet in the input's dtype.

    Args: see `RMSNorm`.
    """

    def __init__(self, shape: int | tuple[int, int], eps: float = 1e-6):
        super().__init__(shape, eps=eps, casting_mode="weight")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.eps)
        return self.apply_weight(hidden_states, self.weight, hidden_states.dtype)


class WeightlessRMSNorm(RMSNorm):
    """RMSNorm without a learned weight (nanochat)."""

    def __init__(self, shape: int | tuple[int, int], eps: float = 1e-6, casting_mode: str = "llama"):
        super().__init__(shape, eps=eps, casting_mode=casting_mode, affine=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(self.statistics_dtype or dtype)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return (hidden_states * torch.rsqrt(variance + self.eps)).to(dtype)


class ZeroCenteredRMSNorm(RMSNorm):
    """RMSNorm whose stored weight `w` is applied as `1 + w` (Gemma), so that weight decay pulls towards the identity."""

    def __init__(
        self, shape: int | tuple[int, int], eps: float = 1e-6, casting_mode: str = "gemma", affine: bool = True
    ):
        super().__init__(shape, eps=eps, casting_mode=casting_mode, affine=affine)

    @staticmethod
    def _initial_weight(shape: int | tuple[int, int]) -> torch.Tensor:
        return torch.zeros(shape)

    def reset_weights(self) -> None:
        init.zeros_(self.weight)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(self.statistics_dtype or dtype)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.eps)
        # In float32, as Gemma does: `1 + w` stored or computed in bfloat16 would lose the low bits of w. The last cast
        # matters in Llama's order alone, where a float32 weight would lift the activations.
        return self.apply_weight(hidden_states, 1.0 + self.weight.to(hidden_states.dtype), dtype).to(dtype)


class ZeroCenteredLayerNorm(nn.LayerNorm):
    """LayerNorm whose stored weight `w` is applied as `1 + w` (Nemotron's LayerNorm1P)."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def reset_weights(self) -> None:
        init.zeros_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(hidden_states, self.normalized_shape, self.weight + 1.0, self.bias, self.eps)


class Float32LayerNorm(nn.Module):
    """
    LayerNorm without a bias, computed in float32 up to the product with the weight (Cohere).

    Args:
        shape (`int` or `tuple[int, int]`): size of the last dimension, or (heads, head_dim) for own weights per head.
        eps (`float`): added to the variance.
        unit_offset (`bool`): apply the stored weight `w` as `1 + w`.

    Shape: (..., *shape) -> (..., *shape), in the input's dtype.
    """

    def __init__(self, shape: int | tuple[int, int], eps: float = 1e-5, unit_offset: bool = False):
        super().__init__()
        self.eps = eps
        self.unit_offset = unit_offset
        self.weight = nn.Parameter(torch.zeros(shape) if unit_offset else torch.ones(shape))

    def reset_weights(self) -> None:
        init.constant_(self.weight, 0.0 if self.unit_offset else 1.0)

    def _applied_weight(self) -> torch.Tensor:
        return 1.0 + self.weight.float() if self.unit_offset else self.weight.float()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        mean = hidden_states.mean(-1, keepdim=True)
        variance = (hidden_states - mean).pow(2).mean(-1, keepdim=True)
        hidden_states = (hidden_states - mean) * torch.rsqrt(variance + self.eps)
        return (self._applied_weight() * hidden_states).to(dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class WeightlessFloat32LayerNorm(nn.Module):
    """LayerNorm without learned parameters, through torch's kernel in float32 (OLMo)."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.dim = dim
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = hidden_states.dtype
        return F.layer_norm(hidden_states.to(torch.float32), (self.dim,), eps=self.eps).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


class PerHeadLayerNorm(nn.Module):
    """
    A LayerNorm with own weights for every head (StableLM 2), each through torch's kernel.

    Shape: (..., heads, head_dim) -> (..., heads, head_dim).
    """

    def __init__(self, shape: tuple[int, int], eps: float = 1e-5, unit_offset: bool = False):
        super().__init__()
        self.eps = eps
        self.unit_offset = unit_offset
        self.weight = nn.Parameter(torch.zeros(shape) if unit_offset else torch.ones(shape))

    def reset_weights(self) -> None:
        init.constant_(self.weight, 0.0 if self.unit_offset else 1.0)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight + 1.0 if self.unit_offset else self.weight
        heads = [
            F.layer_norm(head, head.shape[-1:], weight[index], None, self.eps)
            for index, head in enumerate(hidden_states.unbind(-2))
        ]
        return torch.stack(heads, dim=-2)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class DynamicTanh(nn.Module):
    """
    weight * tanh(alpha * x) + bias with one learned alpha, which squashes as a norm does and takes no statistics
    (https://arxiv.org/abs/2503.10622).

    Args:
        shape (`int` or `tuple[int, int]`): size of the last dimension, or (heads, head_dim) for own weights per head.
        alpha (`float`): where the learned scalar starts.
        bias (`bool`): learn a bias.

    Shape: (..., *shape) -> (..., *shape), in the input's dtype.
    """

    def __init__(self, shape: int | tuple[int, int], alpha: float = 0.5, bias: bool = True):
        super().__init__()
        self.initial_alpha = float(alpha)
        # Of one dimension, since FSDP shards no scalars.
        self.alpha = nn.Parameter(torch.full((1,), self.initial_alpha))
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None

    def reset_weights(self) -> None:
        init.constant_(self.alpha, self.initial_alpha)
        init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        squashed = torch.tanh(self.alpha * hidden_states) * self.weight
        return squashed if self.bias is None else squashed + self.bias

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, alpha={self.initial_alpha}, bias={self.bias is not None}"


class BatchNorm(nn.Module):
    """
    Every channel by its mean and variance over the real tokens of a batch, or in evaluation by running ones
    (https://arxiv.org/abs/1502.03167). All in float32 or wider, cast once; the running statistics stay in float32 where
    the model is narrower.

    The stack says which tokens are real and has the running statistics updated (`BatchStatistics`): a forward alone
    leaves them, so that gradient checkpointing, which repeats it, counts no batch twice. Frozen by `eval()`, as torch's.
    As there, each process of several goes by its own tokens, and `DistributedDataParallel` hands out rank 0's running
    statistics.

    Args:
        dim (`int`): number of channels.
        eps (`float`): added to the variance.
        momentum (`float`): weight of a batch in the running statistics; `None` for the mean of all batches.
        affine, bias (`bool`): learn a weight; learn a bias.

    Shape: (batch, length, dim) -> (batch, length, dim), in the input's dtype.

    Raises:
        ValueError: in training, of one token, which has no variance.
    """

    def __init__(
        self, dim: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True, bias: bool = True
    ):
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.register_buffer("running_mean", torch.zeros(dim, dtype=torch.float32))
        self.register_buffer("running_var", torch.ones(dim, dtype=torch.float32))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        # (batch, length), `None` for all; and mean, variance and number of tokens of the last batch.
        self.real_tokens: torch.Tensor | None = None
        self.batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def reset_weights(self) -> None:
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)
        init.zeros_(self.running_mean)
        init.ones_(self.running_var)
        init.zeros_(self.num_batches_tracked)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        before = {name: self._buffers[name] for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)
        for name, statistic in before.items():
            if self._buffers[name].dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = statistic.to(self._buffers[name].device)
        return self

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        weight, bias = (None if tensor is None else tensor.to(wide.dtype) for tensor in (self.weight, self.bias))
        if not self.training:
            mean, variance = self.running_mean.to(wide.dtype), self.running_var.to(wide.dtype)
            # (batch, length, dim) -> (batch * length, dim) and back
            normed = F.batch_norm(wide.flatten(0, -2), mean, variance, weight, bias, eps=self.eps)
            return normed.view(hidden_states.shape).to(hidden_states.dtype)
        mean, variance = self.statistics_of(wide)
        normed = (wide - mean) * torch.rsqrt(variance + self.eps)
        normed = normed if weight is None else normed * weight
        return (normed if bias is None else normed + bias).to(hidden_states.dtype)

    def statistics_of(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance (dim,) of the real tokens, which are kept for `update`."""
        if hidden_states[..., 0].numel() == 1:
            raise ValueError(
                "BatchNorm (`norm_type`) is in training and given one token, which has no variance. Give more, or call "
                "`eval()`."
            )
        if self.real_tokens is None:
            padding = torch.zeros_like(hidden_states[..., :1], dtype=torch.bool)
        else:
            # (batch or 1, length) -> (batch, length, 1)
            padding = ~self.real_tokens.expand(hidden_states.shape[0], -1).unsqueeze(-1)
        # At least one, so that a batch of padding alone stays finite.
        count = (~padding).sum().clamp(min=1)
        mean = hidden_states.masked_fill(padding, 0.0).sum((0, 1)) / count
        variance = (hidden_states - mean).square().masked_fill(padding, 0.0).sum((0, 1)) / count
        self.batch = mean.detach(), variance.detach(), count
        return mean, variance

    @torch.no_grad()
    def update(self) -> None:
        """Let the last batch into the running statistics, with the unbiased variance, unless it is of one token."""
        mean, variance, count = self.batch
        counts = (count > 1).to(self.running_mean.dtype)
        self.num_batches_tracked += count > 1
        share = counts * self.momentum if self.momentum else counts / self.num_batches_tracked.clamp(min=1)
        for running, new in (
            (self.running_mean, mean),
            (self.running_var, variance * count / (count - 1).clamp(min=1)),
        ):
            running.copy_(running * (1 - share) + new * share)

    def extra_repr(self) -> str:
        shape = tuple(self.weight.shape) if self.weight is not None else None
        return f"{shape}, eps={self.eps}, momentum={self.momentum}, bias={self.bias is not None}"


def warn_of_lost_statistics(norm: BatchNorm) -> None:
    """Say that statistics go on where the weights are frozen, as adapters leave them, whose files hold neither."""
    if norm.weight is not None and not norm.weight.requires_grad and not is_tracing(norm.weight):
        logger.warning_once(
            "The running statistics of BatchNorm (`norm_type`) change in training, also where its weights are frozen, and "
            "an adapter's file does not hold them. Call `eval()` on the norms after `train()`, or name them in PEFT's "
            "`modules_to_save`."
        )


def tell_norms(module: nn.Module, real_tokens: torch.Tensor | None) -> None:
    """Let the BatchNorms in a module know which tokens are real; `None` for all."""
    for norm in module.modules():
        if isinstance(norm, BatchNorm):
            norm.real_tokens = real_tokens


class BatchStatistics:
    """
    What a stack with BatchNorm does around its layers.

    Args:
        padding_idx (`int`): id of padding where there is no mask; `None`: all tokens are real then.
    """

    def __init__(self, padding_idx: int | None):
        self.padding_idx = padding_idx

    def begin(
        self,
        stack: nn.Module,
        attention_mask: torch.Tensor | dict | None,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """
        What the layers get beside their other arguments, in training.

        Raises:
            ValueError: in training, if a mask does not say which tokens are real.
        """
        norms = [module for module in stack.modules() if isinstance(module, BatchNorm)]
        if not any(norm.training for norm in norms):
            return {}
        for norm in norms:
            # Of a batch that checkpointing repeated.
            norm.batch = None
        real_tokens = self.real_tokens(attention_mask, input_ids, inputs_embeds)
        tell_norms(stack, real_tokens)
        return {"real_tokens": real_tokens}

    def real_tokens(
        self, attention_mask: torch.Tensor | dict | None, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor
    ) -> torch.Tensor:
        """bool (batch or 1, length)."""
        if isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.ndim != 2):
            raise ValueError(
                "`norm_type` batchnorm takes its statistics over real tokens in training, and a mask that is not of shape "
                "(batch, length) does not say which they are. Pass a 2D `attention_mask`, or train without one."
            )
        batch, length = inputs_embeds.shape[:2]
        if attention_mask is not None:
            # The last ones, behind a cache's.
            return attention_mask[:, -length:].bool()
        if self.padding_idx is None or input_ids is None:
            return torch.ones((batch, length), dtype=torch.bool, device=inputs_embeds.device)
        # The first token of a decoder often has the id of padding.
        return F.pad(input_ids[:, 1:] != self.padding_idx, (1, 0), value=True)

    def end(self, stack: nn.Module) -> None:
        """Let the batch into the running statistics."""
        for module in stack.modules():
            if isinstance(module, BatchNorm):
                if module.batch is not None:
                    warn_of_lost_statistics(module)
                    module.update()
                module.real_tokens = module.batch = None


class NoBatchStatistics:
    """The same of a stack whose norms look at each token by itself: nothing."""

    def begin(self, *args: Any) -> dict[str, torch.Tensor]:
        return {}

    def end(self, stack: nn.Module) -> None:
        pass


@states(SHAPES, nn.LayerNorm)
def layer_norm_shapes(
    normalized_shape: int, eps: float, bias: bool = True, elementwise_affine: bool = True
) -> dict[str, tuple[int, ...]]:
    return affine_shapes(normalized_shape, elementwise_affine, elementwise_affine and bias)


@states(SHAPES, RMSNorm, StatisticsCastRMSNorm, Float32LayerNorm, PerHeadLayerNorm)
def weight_shapes(shape: int | tuple[int, int], **_: Any) -> dict[str, tuple[int, ...]]:
    return affine_shapes(shape, weight=True, bias=False)


@states(SHAPES, WeightlessRMSNorm)
def no_shapes(**_: Any) -> dict[str, tuple[int, ...]]:
    return {}


@states(SHAPES, DynamicTanh)
def dynamic_tanh_shapes(shape: int | tuple[int, int], alpha: float, bias: bool) -> dict[str, tuple[int, ...]]:
    return {"alpha": (1,), **affine_shapes(shape, weight=True, bias=bias)}


@states(SHAPES, BatchNorm)
def batch_norm_shapes(dim: int, affine: bool, bias: bool, **_: Any) -> dict[str, tuple[int, ...]]:
    return affine_shapes(dim, weight=affine, bias=bias)


def affine_shapes(shape: int | tuple[int, int], weight: bool, bias: bool) -> dict[str, tuple[int, ...]]:
    whole = shape if isinstance(shape, tuple) else (shape,)
    return {name: whole for name, is_there in (("weight", weight), ("bias", bias)) if is_there}


def choose_norm(
    shape: int | tuple[int, int],
    *,
    norm_type: str,
    eps: float,
    affine: bool,
    bias: bool,
    unit_offset: bool,
    casting_mode: str,
    alpha: float = 0.5,
    momentum: float | None = 0.1,
) -> Part:
    """
    The norm of this kind over the last dimension.

    Args:
        shape (`int` or `tuple[int, int]`): size of the last dimension, or (heads, head_dim) for own weights per head.
        norm_type, eps, affine, bias, unit_offset, casting_mode, alpha, momentum: see `VariantConfig`'s `norm_*` fields.
    """
    if norm_type == "batchnorm":
        return Part(BatchNorm, dim=shape, eps=eps, momentum=momentum, affine=affine, bias=bias)
    if norm_type == "dynamic_tanh":
        return Part(DynamicTanh, shape=shape, alpha=alpha, bias=bias)
    if norm_type == "rmsnorm":
        if not affine:
            return Part(WeightlessRMSNorm, shape=shape, eps=eps, casting_mode=casting_mode)
        if casting_mode == "weight" and not unit_offset:
            return Part(StatisticsCastRMSNorm, shape=shape, eps=eps)
        return Part(ZeroCenteredRMSNorm if unit_offset else RMSNorm, shape=shape, eps=eps, casting_mode=casting_mode)
    if isinstance(shape, tuple) and not affine:
        shape = shape[-1]
    if casting_mode == "gemma" and not affine:
        return Part(WeightlessFloat32LayerNorm, dim=shape, eps=eps)
    if casting_mode == "gemma" or isinstance(shape, tuple):
        norm_class = Float32LayerNorm if casting_mode == "gemma" else PerHeadLayerNorm
        return Part(norm_class, shape=shape, eps=eps, unit_offset=unit_offset)
    if unit_offset:
        return Part(ZeroCenteredLayerNorm, normalized_shape=shape, eps=eps, bias=bias)
    return Part(nn.LayerNorm, normalized_shape=shape, eps=eps, elementwise_affine=affine, bias=bias)
