"""Which layers matter least on a text."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from transformers import PreTrainedModel

from .layers import DropLayers
from .observed import observe
from .operation import Operation
from .subject import Subject, SurgeryError


@dataclass(frozen=True)
class DropLeastInfluential(Operation):
    """
    A stack without the layers that turn their input least on a text (block influence, https://arxiv.org/abs/2403.03853):
    one minus the cosine of a layer's input and output, averaged over tokens. The whole model is in memory for it.

    Args:
        count: of layers to drop.
        text: the text, or the path of a file with it.
        stack: `"encoder"` or `"decoder"` of an encoder-decoder.
    """

    count: int
    text: str | Path | None
    stack: str = ""

    def apply(self, subject: Subject) -> Subject:
        name = subject.stack(self.stack)
        if self.text is None:
            raise SurgeryError("Influence is measured on a text. Give one with `--text`.")
        depth = subject.stacks[name].num_hidden_layers
        if not 0 < self.count < depth:
            some = f"Give 1 to {depth - 1}." if depth > 1 else "Leave it as it is."
            raise SurgeryError(f"`num_hidden_layers` is {depth}, so {self.count} of them cannot be dropped. {some}")
        scores = influence(subject, self.text, name)
        least = sorted(sorted(range(depth), key=lambda layer: scores[layer])[: self.count])
        return DropLayers(least, name).apply(subject)


def influence(subject: Subject, text: str | Path, stack: str = "") -> list[float]:
    """
    The influence of every layer of a stack on a text.

    Raises:
        SurgeryError: if there is no tokenizer, or the text is empty.
    """
    totals: dict[int, float] = {}

    def hook_of(number: int) -> Callable:
        def hook(module, args, kwargs, output):
            states = args[0] if args else kwargs["hidden_states"]
            change = (1 - F.cosine_similarity(states.double(), output.double(), dim=-1)).sum().item()
            totals[number] = totals.get(number, 0.0) + change

        return hook

    def watch(body: PreTrainedModel) -> None:
        for number, layer in enumerate((getattr(body, stack) if stack else body).layers):
            layer.register_forward_hook(hook_of(number), with_kwargs=True)

    count = observe(subject, text, watch)
    return [totals[number] / count for number in sorted(totals)]
