"""Which layers matter least on a text: the one thing here that runs the model."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from . import tokenizer_data
from .layers import DropLayers
from .operation import Operation
from .subject import Subject, SurgeryError


# Of a text: tokens at a time, and characters in all.
WINDOW, CHARACTERS = 512, 60_000


@dataclass(frozen=True)
class DropLeastInfluential(Operation):
    """
    A stack without the layers that turn their input least on a text (block influence, https://arxiv.org/abs/2403.03853):
    one minus the cosine of a layer's input and output, averaged over tokens. The whole model is in memory for it.

    Args:
        count: of layers to drop.
        text: the text, or the path of a file with it.
    """

    count: int
    text: str | Path | None

    def apply(self, subject: Subject) -> Subject:
        (name, *others) = subject.stacks
        if others:
            raise SurgeryError(
                "Influence is measured on one stack. Take the encoder alone, or name layers (`--drop-layers`)."
            )
        if self.text is None:
            raise SurgeryError("Influence is measured on a text. Give one with `--text`.")
        depth = subject.stacks[name].num_hidden_layers
        if not 0 < self.count < depth:
            raise SurgeryError(f"{self.count} of {depth} layers cannot be dropped. Give 1 to {depth - 1}.")
        scores = influence(
            subject, self.text.read_text(encoding="utf-8") if isinstance(self.text, Path) else self.text
        )
        least = sorted(sorted(range(depth), key=lambda layer: scores[layer])[: self.count])
        return DropLayers(least).apply(subject)


@torch.no_grad()
def influence(subject: Subject, text: str) -> list[float]:
    """
    The influence of every layer of a model with one stack on a text.

    Raises:
        SurgeryError: if there is no tokenizer, or the text is empty.
    """
    ids = tokenizer_data.load(subject)(text[:CHARACTERS], add_special_tokens=False, verbose=False).input_ids
    if not ids:
        raise SurgeryError("The text is empty. Give one that is like what the model is for.")
    body = subject.to_measure().base_model
    totals = [0.0] * len(body.layers)

    def watch(number: int):
        def hook(module, args, kwargs, output):
            states = args[0] if args else kwargs["hidden_states"]
            totals[number] += (1 - F.cosine_similarity(states.double(), output.double(), dim=-1)).sum().item()

        return hook

    for number, layer in enumerate(body.layers):
        layer.register_forward_hook(watch(number), with_kwargs=True)
    size = min(WINDOW, body.config.max_position_embeddings)
    for start in range(0, len(ids), size):
        body(input_ids=torch.tensor([ids[start : start + size]]))
    return [total / len(ids) for total in totals]
