"""The loss of a language model in chunks: the switch."""

from torch import nn

from ..model.modeling_variant import VariantForCausalLM, VariantForMaskedLM
from ..model.modeling_variant_seq2seq import VariantForConditionalGeneration


LANGUAGE_MODELS = (VariantForCausalLM, VariantForMaskedLM, VariantForConditionalGeneration)


def chunk_loss(model: nn.Module, positions: int | None = 512) -> None:
    """
    Have a language model in training compute its loss with the logits of a few positions at a time in memory.

    Value and gradients are those of the plain loss up to rounding, with z-loss, smoothing, scale, soft-cap, biases and
    adapters in it. The output then has a loss and no logits; in evaluation (`model.eval()`, or without gradients) and
    under `torch.compile` everything is computed as before. Nothing of it is saved.

    Args:
        model: a model of ours with a language-modelling head, or a PEFT model of one.
        positions: at a time; `None` takes the chunks back.

    Raises:
        ValueError: if the model has no such head, or if `positions` is below 1.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, LANGUAGE_MODELS):
        raise ValueError(
            f"{type(model).__name__} has no language-modelling head whose loss could be computed in chunks. Pass one of "
            f"{', '.join(kind.__name__ for kind in LANGUAGE_MODELS)}."
        )
    if positions is not None and (not isinstance(positions, int) or positions < 1):
        raise ValueError(f"`positions` is {positions!r}. Give a whole number of at least 1, or None for all at once.")
    model.loss_chunk = positions
