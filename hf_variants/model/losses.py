"""How logits are scored beyond transformers' own losses: z-loss and label smoothing, and that neither gets lost."""

import functools
import inspect
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss
from transformers.utils import logging

from .axis import ROUNDING, TRAINING, Axis, Check, axis, quote, setting


@axis
class LossAxis(Axis):
    """
    z_loss_coefficient (`float`): weight of the z-loss (PaLM, https://arxiv.org/abs/2204.02311: 1e-4).
    label_smoothing (`float`): share of the target that is spread over the vocabulary.
    shift_labels (`bool`): a decoder's labels are its input tokens, and the loss shifts them; otherwise they stand at the
        position that they are predicted from (BART's decoder alone).

    Rounding:
    loss_in_float32, token_classifier_loss_in_float32 (`bool`): logits are cast before the softmax of the language
        model's loss; before that of the classifier of tokens (BERT: neither; GPT-2: the first; Llama: both).
    """

    title = "loss"

    z_loss_coefficient: int | float = setting(0.0, TRAINING)
    label_smoothing: int | float = setting(0.0, TRAINING)
    shift_labels: bool = setting(True, TRAINING)

    loss_in_float32: bool = setting(True, TRAINING, ROUNDING)
    token_classifier_loss_in_float32: bool = setting(True, TRAINING, ROUNDING)

    def checks(self) -> list[Check]:
        return [
            Check(
                self.z_loss_coefficient < 0,
                f"`z_loss_coefficient` is {self.z_loss_coefficient}.",
                "Set it to at least 0; PaLM used 1e-4.",
            ),
            Check(
                not 0 <= self.label_smoothing < 1,
                f"`label_smoothing` is {self.label_smoothing}.",
                "Set it to at least 0 and below 1.",
            ),
        ]

    @property
    def fields_outside_a_fused_head(self) -> tuple[list[str], list[str]]:
        """
        What a fused LM head ignores, which knows the head's weight and bias, `logit_scale` and
        `final_logit_softcapping` (TRL): the fields that change logits, and those that add to the loss.
        """
        logits = {
            "lm_head_transform": self.lm_head_transform,
            "lm_head_input_scale": self.lm_head_input_scale != 1.0,
            "lm_head_normalized": self.lm_head_normalized,
        }
        loss = {
            "z_loss_coefficient": self.z_loss_coefficient,
            "label_smoothing": self.label_smoothing,
            "shift_labels": not self.shift_labels,
        }
        return [field for field, active in logits.items() if active], [
            field for field, active in loss.items() if active
        ]


logger = logging.get_logger(__name__)


def regularised_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    z_loss_coefficient: float = 0.0,
    label_smoothing: float = 0.0,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """
    Cross-entropy with label smoothing, plus z-loss: coefficient * log(Z)^2, with Z the softmax's denominator
    (PaLM, https://arxiv.org/abs/2204.02311, section 5).

    Args:
        logits: (tokens, vocab_size).
        labels: int64 (tokens,); positions with `ignore_index` count for neither term.
        num_items_in_batch: divisor of the sums, where the Trainer accumulates over several batches; by default the
            number of labels that count.

    Returns:
        a scalar, in the dtype of the logits.
    """
    reduction = "sum" if num_items_in_batch is not None else "mean"
    loss = F.cross_entropy(
        logits, labels, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    if z_loss_coefficient:
        counted = labels.ne(ignore_index)
        log_z_squared = torch.logsumexp(logits, dim=-1).square() * counted
        divisor = 1 if num_items_in_batch is not None else counted.sum()
        loss = loss + z_loss_coefficient * log_z_squared.sum() / divisor
    if num_items_in_batch is not None:
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        loss = loss / num_items_in_batch
    return loss


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    z_loss_coefficient: float = 0.0,
    label_smoothing: float = 0.0,
    in_float32: bool = True,
    **kwargs,
) -> torch.Tensor:
    """
    Next-token loss with transformers' calling convention: token n is scored against label n + 1.

    Args:
        logits: (batch, length, vocab_size), any float dtype; labels: int64 (batch, length).
        shift_labels: labels that are shifted already.
        z_loss_coefficient, label_smoothing, num_items_in_batch: see `regularised_cross_entropy`.
        in_float32: see `token_loss`.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return token_loss(
        logits,
        shift_labels,
        vocab_size,
        num_items_in_batch,
        ignore_index,
        z_loss_coefficient,
        label_smoothing,
        in_float32,
    )


def token_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    z_loss_coefficient: float = 0.0,
    label_smoothing: float = 0.0,
    in_float32: bool = True,
    **kwargs,
) -> torch.Tensor:
    """
    As `causal_lm_loss`, for labels that stand at the position they are predicted from (masked LM, seq2seq).

    Args:
        in_float32: cast the logits first; done in any case where a sum is divided by `num_items_in_batch`.
    """
    if in_float32 or num_items_in_batch is not None:
        logits = logits.float()
    return regularised_cross_entropy(
        logits.reshape(-1, vocab_size),
        labels.contiguous().view(-1).to(logits.device),
        z_loss_coefficient=z_loss_coefficient,
        label_smoothing=label_smoothing,
        num_items_in_batch=num_items_in_batch,
        ignore_index=ignore_index,
    )


class WithGradients(torch.autograd.Function):
    """A loss whose gradients are known already: (loss, number of inputs, *inputs, *gradients) -> loss."""

    @staticmethod
    def forward(ctx, loss: torch.Tensor, count: int, *inputs_and_gradients: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inputs_and_gradients[count:])
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: torch.Tensor) -> tuple:
        gradients = [(gradient * grad_output).to(gradient.dtype) for gradient in ctx.saved_tensors]
        return None, None, *gradients, *([None] * len(gradients))


def leaves_of(output: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that gradients of `output` are accumulated in, in the order in which its graph names them."""
    leaves, seen, nodes = [], set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        nodes.extend(following for following, _ in node.next_functions)
    return leaves


def chunked_loss(
    score: Callable,
    loss_function: Callable,
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    chunk: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """
    The loss and its gradients with logits of `chunk` positions at a time in memory, instead of all of them; where nothing
    is scored, none are computed. As in Liger (https://arxiv.org/abs/2410.10989, section 3.2), a chunk's gradients are
    computed with its loss, so that no logits are computed twice.

    Args:
        score: hidden states (1, positions, width) -> logits (1, positions, vocab_size); any modules.
        loss_function: the model's, which is told labels of both kinds.
        hidden_states: (batch, length, width).
        labels: int64 (batch, length), at the positions they are predicted from.
        num_items_in_batch: divisor of the sum; by default the number of labels that count.

    Returns:
        a scalar in float32, differentiable once.

    Raises:
        ValueError: if a weight of `score` is spread over several devices, or if the loss function is none of those that
            the models here have, and may not be a sum over positions.
    """
    if getattr(loss_function, "func", loss_function) not in SUMS_OVER_POSITIONS:
        raise ValueError(
            "`loss_function` of this model was replaced, and may not be a sum over positions, which the loss in chunks adds "
            "up. Leave one of the two out: `chunk_loss(model, None)` takes the chunks back."
        )
    labels = labels.to(hidden_states.device)
    counted = labels.ne(ignore_index)
    # Gradients of what is selected flow back by autograd as ever.
    selected, targets = hidden_states[counted], labels[counted]
    divisor = counted.sum() if num_items_in_batch is None else num_items_in_batch
    total = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
    state_gradients = torch.zeros_like(selected)
    weights: list[torch.Tensor] = []
    sums: list[torch.Tensor] = []
    for start in range(0, len(targets), chunk):
        piece = selected[start : start + chunk].detach().requires_grad_()
        logits = score(piece.unsqueeze(0))
        scored = targets[start : start + chunk].unsqueeze(0)
        loss = loss_function(
            logits=logits, labels=scored, shift_labels=scored, vocab_size=logits.shape[-1], num_items_in_batch=1
        )
        if start == 0:
            weights = [leaf for leaf in leaves_of(loss) if leaf is not piece]
            refuse_spread(weights)
        gradients = torch.autograd.grad(loss, [piece, *weights])
        total += loss.detach()
        state_gradients[start : start + chunk] = gradients[0]
        if start == 0:
            # Sums of many in half precision would lose the small ones.
            sums = [gradient.float() for gradient in gradients[1:]]
        else:
            for sum_, gradient in zip(sums, gradients[1:], strict=True):
                sum_ += gradient
    inputs = [selected, *weights] if selected.requires_grad else weights
    gradients = [state_gradients, *sums] if selected.requires_grad else sums
    # The divisor is none of the function's business: gradients of a sum do not underflow in half precision.
    return WithGradients.apply(total, len(inputs), *inputs, *gradients) / divisor


def refuse_spread(weights: list[torch.Tensor]) -> None:
    """`ValueError` where gradients of a head's weights cannot be added up on one device."""
    # As ZeRO-3 and DTensor mark theirs.
    if any(hasattr(weight, "ds_id") or hasattr(weight, "device_mesh") for weight in weights):
        raise ValueError(
            "The loss in chunks adds up the gradients of the head on one device, and the head is spread over several "
            "(ZeRO-3, FSDP, tensor parallel). Take it back with `chunk_loss(model, None)`, or use DDP."
        )


# Losses that are a sum over positions, divided by `num_items_in_batch` where that is given.
SUMS_OVER_POSITIONS = (causal_lm_loss, token_loss, ForCausalLMLoss, ForMaskedLMLoss)


def token_classifier_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    config: PreTrainedConfig,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs,
) -> torch.Tensor:
    """
    transformers' own loss of a classifier of tokens, without the cast to float32.

    Args:
        logits: (batch, length, num_labels); labels: int64 (batch, length), -100 where nothing is scored.
    """
    return token_loss(logits, labels, config.num_labels, num_items_in_batch, in_float32=False)


def warn_of_lost_terms(config: PreTrainedConfig) -> None:
    """
    Say that the config's terms are lost where a trainer computes the loss itself, as transformers' does with
    `label_smoothing_factor` or `compute_loss_func`: it withholds the labels, but not the number of them.
    """
    _, fields = config.fields_outside_a_fused_head
    if fields:
        logger.warning_once(
            f"The trainer computes the loss itself, without {quote(fields)} of the config. Set `label_smoothing` in "
            "the config instead of `label_smoothing_factor`, and leave `compute_loss_func` out, to train with them."
        )


def guard_fused_head(model: nn.Module, forward: Callable) -> Callable:
    """
    What a model's `forward` may be replaced by: `forward` itself, or, if that has a fused LM head (TRL's trainers), one
    that refuses to compute other logits than the model does, or a loss without all its terms.

    Such a head takes the last hidden states and the head's weight, and never calls the model's own head and loss. It is
    used where the call says `fused_lm_head=True`.

    Args:
        model: one with `config.fields_outside_a_fused_head`.
        forward: what is to become its `forward`; a fused head is a bound method.
    """
    if (
        not isinstance(forward, types.MethodType)
        or "fused_lm_head" not in inspect.signature(forward, follow_wrapped=False).parameters
    ):
        return forward
    of_logits, of_loss = model.config.fields_outside_a_fused_head
    if not of_logits and not of_loss:
        return forward
    remedy = (
        "Use a trainer that calls the model's own loss, such as transformers' `Trainer` or `class OwnLossTrainer("
        "SFTTrainer): compute_loss = transformers.Trainer.compute_loss`"
    )

    fused_forward = forward.__func__

    # `generate` looks at the signature.
    @functools.wraps(fused_forward)
    def guarded(self, *args, fused_lm_head=False, **kwargs):
        if fused_lm_head and of_logits:
            raise ValueError(f"A fused LM head computes other logits, without {quote(of_logits)}. {remedy}.")
        if fused_lm_head and of_loss and torch.is_grad_enabled():
            raise ValueError(
                f"A fused LM head computes the loss without {quote(of_loss)} of the config. {remedy}; or, for a "
                "loss that is not the model's (DPO, GRPO), load the model with these fields set to 0."
            )
        if fused_lm_head and of_loss:
            logger.warning_once(f"The loss of a fused LM head is without {quote(of_loss)} of the config. {remedy}.")
        return fused_forward(self, *args, fused_lm_head=fused_lm_head, **kwargs)

    return types.MethodType(guarded, model)
