"""What is looked at in a model beside its loss: gradients by depth, the largest attention logit, and log Z."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..model.attention import Attention, repeat_heads
from .data import Batch
from .tasks import IGNORED


@dataclass
class Probe:
    """
    A look at a model on one held-out batch, without dropout.

    Attributes:
        step: of training.
        gradients: norm of the loss's gradient in every layer, from the first to the last.
        max_logit: the largest score that attention's softmax sees in any layer, before a soft cap.
        log_z: mean of the logarithm of the output softmax's denominator.
        log_z_squared: mean of its square, which z-loss holds down.
    """

    step: int
    gradients: list[float]
    max_logit: float
    log_z: float
    log_z_squared: float


def probe(model: Any, batch: Batch, step: int) -> Probe:
    """Look at a model; it is in training, and without gradients, afterwards."""
    batch = to_device(batch, model)
    model.eval()
    with written_out(model) as largest:
        logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
        cross_entropy(logits, batch["labels"], model.config.is_causal)[0].backward()
    gradients = [
        torch.stack([p.grad.float().norm() for p in layer.parameters() if p.grad is not None]).norm().item()
        for layer in model.base_model.layers
    ]
    model.zero_grad(set_to_none=True)
    model.train()
    log_z = logits.detach().float().logsumexp(-1)[batch["attention_mask"].bool()]
    return Probe(step, gradients, max(largest, default=0.0), log_z.mean().item(), log_z.square().mean().item())


@contextmanager
def written_out(model: Any) -> Iterator[list[float]]:
    """Attention in eager mode, which notes the largest logit of every layer."""
    found: list[float] = []
    before = model.config._attn_implementation
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Attention)]
    model.set_attn_implementation("eager")
    try:
        for module in layers:
            module.eager_attention = _Noting(module.eager_attention, found)
        yield found
    finally:
        for module in layers:
            module.eager_attention = module.eager_attention.inner
        model.set_attn_implementation(before)


class _Noting:
    """An attention function that also notes its largest score."""

    def __init__(self, inner: Any, found: list[float]):
        self.inner, self.found = inner, found

    def __call__(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        with torch.no_grad():
            keys = repeat_heads(key, module.num_key_value_groups)
            # (batch, heads, q, k)
            scores = (query @ keys.transpose(2, 3)).float() * kwargs["scaling"]
            if kwargs.get("position_bias") is not None:
                scores = scores + kwargs["position_bias"]
            if mask is not None:
                scores = scores + mask
            self.found.append(scores.max().item())
        return self.inner(module, query, key, value, mask, **kwargs)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, is_causal: bool) -> tuple[torch.Tensor, int, int]:
    """
    The loss that runs are compared by: without z-loss, smoothing or anything else that a config trains with.

    Args:
        logits: (batch, length, vocabulary).
        labels: (batch, length), the tokens where they are asked for.
        is_causal: whether a token is predicted from the position before it.

    Returns:
        the mean in nats, how many were asked for, and how many were right.
    """
    if is_causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    asked = labels != IGNORED
    logits, labels = logits[asked].float(), labels[asked]
    return F.cross_entropy(logits, labels), len(labels), int((logits.argmax(-1) == labels).sum())


def to_device(batch: Batch, model: Any) -> Batch:
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


@torch.no_grad()
def score(model: Any, batches: list[Batch]) -> dict[str, float]:
    """Loss, and the share of answers that are right, over all that is asked for."""
    model.eval()
    total, asked, right = 0.0, 0, 0
    for batch in batches:
        batch = to_device(batch, model)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss, count, correct = cross_entropy(logits, batch["labels"], model.config.is_causal)
        total, asked, right = total + loss.item() * count, asked + count, right + correct
    model.train()
    return {"loss": total / asked, "accuracy": right / asked}
