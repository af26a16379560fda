"""How logits are scored beyond transformers' own losses: z-loss and label smoothing, and that neither gets lost."""

import functools
import inspect
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
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
