"""The package `ctranslate2`, and which of its kernels compute what a config asks for."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from ....model.feed_forward import LEARNED_ACTIVATIONS, make_activation
from ...errors import ConversionError


# As its enumeration calls them.
ACTIVATIONS = {
    "RELU": F.relu,
    "GELU": F.gelu,
    "GELUTanh": lambda x: F.gelu(x, approximate="tanh"),
    "GELUSigmoid": lambda x: x * torch.sigmoid(1.702 * x),
    "SWISH": F.silu,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
}


def ctranslate2_package() -> Any:
    """The package."""
    try:
        import ctranslate2
    except ImportError as error:
        raise ConversionError(
            "CTranslate2 models are written and run with the package `ctranslate2`, which is not installed. Install "
            "hf-variants with the extra `ctranslate2`."
        ) from error
    return ctranslate2


@cache
def activation_of(name: str) -> str | None:
    """The kernel that computes an activation of transformers, found by its values, or `None`."""
    if name in LEARNED_ACTIVATIONS:
        return None
    inputs = torch.linspace(-6, 6, 241, dtype=torch.float32)
    ours = make_activation(name)(inputs)
    same = (kind for kind, kernel in ACTIVATIONS.items() if torch.allclose(ours, kernel(inputs), rtol=0, atol=2e-6))
    return next(same, None)
