"""What a model does on a text: activations, for operations that choose by them. The whole model is in memory for it."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from . import tokenizer_data
from .subject import Subject, SurgeryError


# Of a text: tokens at a time, and characters in all.
WINDOW, CHARACTERS = 512, 60_000


@torch.no_grad()
def observe(subject: Subject, text: str | Path, watch: Callable[[PreTrainedModel], None]) -> int:
    """
    Run a model over the beginning of a text; an encoder-decoder reads it with both stacks.

    Args:
        text: or the path of a file with it.
        watch: registers hooks on the model before it runs.

    Returns:
        how many tokens it read.

    Raises:
        SurgeryError: if there is no tokenizer, or the text is empty.
    """
    text = text.read_text(encoding="utf-8") if isinstance(text, Path) else text
    ids = tokenizer_data.load(subject)(text[:CHARACTERS], add_special_tokens=False, verbose=False).input_ids
    if not ids:
        raise SurgeryError("The text is empty. Give one that is like what the model is for.")
    body = subject.to_measure().base_model
    watch(body)
    size = min(WINDOW, subject.context)
    for start in range(0, len(ids), size):
        window = torch.tensor([ids[start : start + size]])
        body(input_ids=window, **({"decoder_input_ids": window} if subject.config.is_encoder_decoder else {}))
    return len(ids)


def mean_squares(subject: Subject, text: str | Path, modules: dict[str, str]) -> dict[str, torch.Tensor]:
    """
    The mean square of every channel, over the tokens of a text, of what goes into modules or comes out of them.

    Args:
        modules: name inside the model without its head -> `"input"` or `"output"`.

    Returns:
        name -> (channels,), float64.
    """
    totals: dict[str, torch.Tensor] = {}

    def watch(body: PreTrainedModel) -> None:
        for name, side in modules.items():
            body.get_submodule(name).register_forward_hook(_adding(totals, name, side))

    count = observe(subject, text, watch)
    return {name: total / count for name, total in totals.items()}


def _adding(totals: dict[str, torch.Tensor], name: str, side: str) -> Callable:
    def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        seen = (inputs[0] if side == "input" else output).double()
        totals[name] = totals.get(name, 0) + seen.square().flatten(0, -2).sum(0)

    return hook
