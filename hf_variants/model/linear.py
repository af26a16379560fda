"""Linear layers that round otherwise than `nn.Linear`, or have a dtype of their own."""

import torch
import torch.nn.functional as F
from torch import nn


class UnfusedBiasLinear(nn.Linear):
    """Rounds the product before the bias is added (Falcon), instead of once for both."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        product = F.linear(hidden_states, self.weight)
        return product if self.bias is None else product + self.bias


class OwnDtypeLinear(nn.Linear):
    """Computes in its weight's dtype, whatever the input's (T5, which keeps some layers in float32)."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.to(self.weight.dtype))
