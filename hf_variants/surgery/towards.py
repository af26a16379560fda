"""transformers' Trainer with a loss that is given."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer


class Towards(Trainer):
    """
    Trains on a difference.

    Args:
        difference: (model, batch) -> loss.
        arguments: of the Trainer.
    """

    def __init__(
        self, difference: Callable[[PreTrainedModel, dict[str, torch.Tensor]], torch.Tensor], **arguments: Any
    ):
        super().__init__(**arguments)
        self.difference = difference
        # The loss is a mean, whatever the model's forward takes.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As the Trainer's, but outputs are not returned."""
        return self.difference(model, inputs)
