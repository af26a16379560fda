"""How logits are scored beyond transformers' own losses: z-loss and label smoothing."""

import torch
import torch.nn.functional as F


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
        logits: float32 (tokens, vocab_size).
        labels: int64 (tokens,); positions with `ignore_index` count for neither term.
        num_items_in_batch: divisor of the sums, where the Trainer accumulates over several batches; by default the
            number of labels that count.

    Returns:
        a scalar, float32.
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
    **kwargs,
) -> torch.Tensor:
    """
    Next-token loss with transformers' calling convention: token n is scored against label n + 1.

    Args:
        logits: (batch, length, vocab_size), any float dtype; labels: int64 (batch, length).
        shift_labels: labels that are shifted already.
        z_loss_coefficient, label_smoothing, num_items_in_batch: see `regularised_cross_entropy`.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return token_loss(
        logits, shift_labels, vocab_size, num_items_in_batch, ignore_index, z_loss_coefficient, label_smoothing
    )


def token_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    z_loss_coefficient: float = 0.0,
    label_smoothing: float = 0.0,
    **kwargs,
) -> torch.Tensor:
    """As `causal_lm_loss`, for labels that stand at the position they are predicted from (masked LM, seq2seq)."""
    return regularised_cross_entropy(
        logits.float().reshape(-1, vocab_size),
        labels.contiguous().view(-1).to(logits.device),
        z_loss_coefficient=z_loss_coefficient,
        label_smoothing=label_smoothing,
        num_items_in_batch=num_items_in_batch,
        ignore_index=ignore_index,
    )
