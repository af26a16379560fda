"""Linear layers that round otherwise than `nn.Linear`."""

import torch
import torch.nn.functional as F
from torch import nn


class UnfusedBiasLinear(nn.Linear):
    """Rounds the product before the bias is added (Falcon), instead of once for both."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        product = F.linear(hidden_states, self.weight)
        return product if self.bias is None else product + self.bias
