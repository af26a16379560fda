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


def reads_weights_alone(head: nn.Module, states: torch.Tensor) -> bool:
    """Whether a call of a head is `F.linear` and nothing else, in one dtype and on one device."""
    return (
        type(head) is nn.Linear
        and "forward" not in head.__dict__
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)
        and not torch.is_autocast_enabled(states.device.type)
        and all(
            type(weight) is nn.Parameter and (weight.dtype, weight.device) == (states.dtype, states.device)
            for weight in head.parameters()
        )
    )


# Of logits that are scored at a time on a CPU, whose cache holds them.
SCORED_VALUES = 2**20


@torch.no_grad()
def score_in_place(
    logits: torch.Tensor, labels: torch.Tensor, z_loss_coefficient: float = 0.0, label_smoothing: float = 0.0
) -> torch.Tensor:
    """
    The sum that `regularised_cross_entropy` divides, and its gradient in the place of the logits.

    Args:
        logits: float32 (tokens, vocab_size), overwritten.
        labels: int64 (tokens,), of which all count.

    Returns:
        a scalar.
    """
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    spread = label_smoothing / logits.shape[-1]
    rows = max(1, SCORED_VALUES // logits.shape[-1]) if logits.device.type == "cpu" else len(labels)
    for part, targets in zip(logits.split(rows), labels.unsqueeze(-1).split(rows), strict=True):
        log_z = part.logsumexp(-1, keepdim=True) if z_loss_coefficient else None
        log_shares = part.log_softmax(-1)
        total -= (1 - label_smoothing) * log_shares.gather(-1, targets).sum()
        if label_smoothing:
            total -= spread * log_shares.sum()
        torch.exp(log_shares, out=part)
        if z_loss_coefficient:
            total += z_loss_coefficient * log_z.square().sum()
            part *= 1 + 2 * z_loss_coefficient * log_z
        if label_smoothing:
            part -= spread
        part.scatter_add_(-1, targets, part.new_full(targets.shape, label_smoothing - 1))
    return total


def linear_chunk(
    head: nn.Linear, finish: Callable, loss_function: Callable, states: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of one chunk (1, positions, width) through a plain head, and its gradient by the head's output."""
    logits = F.linear(states.detach(), head.weight.detach(), None if head.bias is None else head.bias.detach())
    finished = finish(logits.requires_grad_())
    if finished is logits and logits.dtype == torch.float32:
        terms = getattr(loss_function, "keywords", {})
        logits = logits.detach()
        loss = score_in_place(
            logits[0], labels[0], terms.get("z_loss_coefficient", 0.0), terms.get("label_smoothing", 0.0)
        )
        return loss, logits
    loss = summed_loss(loss_function, finished, labels)
    return loss, *torch.autograd.grad(loss, logits)


def summed_loss(loss_function: Callable, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return loss_function(
        logits=logits, labels=labels, shift_labels=labels, vocab_size=logits.shape[-1], num_items_in_batch=1
    )


def chunked_loss(
    transform: Callable,
    head: nn.Module,
    finish: Callable,
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
    computed with its loss, so that no logits are computed twice. Through a plain linear head the gradient of the weight
    is added up where it lies, and that of the logits takes their place.

    Args:
        transform, head, finish: hidden states (1, positions, width) -> logits (1, positions, vocab_size), one after the
            other: what stands before the head, the head, and what follows it; any modules.
        loss_function: the model's, which is told labels of both kinds.
        hidden_states: (batch, length, width).
        labels: int64 (batch, length), at the positions they are predicted from.
        num_items_in_batch: divisor of the sum; by default the number of labels that count.

    Returns:
        a scalar in float32, differentiable once.

    Raises:
        ValueError: if a weight of the head is spread over several devices, or if the loss function is none of those that
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
    # Of the head, where it is plain, and of whatever else autograd finds.
    own: list[nn.Parameter] = []
    own_sums: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []
    sums: list[torch.Tensor] = []
    for start in range(0, len(targets), chunk):
        piece = selected[start : start + chunk].detach().requires_grad_()
        scored = targets[start : start + chunk].unsqueeze(0)
        states = transform(piece.unsqueeze(0))
        plain = reads_weights_alone(head, states)
        if plain:
            loss, gradient = linear_chunk(head, finish, loss_function, states, scored)
            output, of_output = states, torch.matmul(gradient, head.weight.detach())
        else:
            output, of_output = summed_loss(loss_function, finish(head(states)), scored), None
            loss = output
        if start == 0:
            weights = [leaf for leaf in leaves_of(output) if leaf is not piece]
            read = (head.weight, head.bias) if plain else ()
            own = [weight for weight in read if weight is not None and weight.requires_grad]
            refuse_spread([*own, *weights])
            # Sums of many in half precision would lose the small ones.
            own_sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in own]
            sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        gradients = torch.autograd.grad(output, [piece, *weights], of_output)
        total += loss.detach()
        state_gradients[start : start + chunk] = gradients[0]
        for sum_, each in zip(sums, gradients[1:], strict=True):
            sum_ += each
        for sum_, weight in zip(own_sums, own, strict=True):
            if weight is head.bias:
                sum_ += gradient[0].sum(0)
            elif weight.dtype == sum_.dtype:
                sum_.addmm_(gradient[0].t(), states[0].detach())
            else:
                sum_ += gradient[0].t() @ states[0].detach()
    weights, sums = [*own, *weights], [*own_sums, *sums]
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
    # Of the code: what wraps the model's own `forward` has that one's signature.
    code = getattr(getattr(forward, "__func__", None), "__code__", None)
    if code is None or "fused_lm_head" not in inspect.getargs(code).args:
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
