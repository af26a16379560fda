"""Layers with random weights, on which PEFT's own forward proves what parameters may become."""

import copy
import warnings
from collections.abc import Mapping

import peft
import torch
from peft import PeftConfig
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

from .places import Place, gathered


# Between two ways to the same product in float32; what is wrong differs by about one.
PROOF_TOLERANCE = 1e-4


class _Workbench(nn.Module):
    """Layers of a model's shapes with random weights, on which PEFT puts the adapter of one module."""

    def __init__(self, layers: Mapping[str, nn.Module]):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def layer_like(layer: nn.Module, weight: torch.Tensor) -> nn.Module:
    """A layer of this kind and shape, without bias, whose weight (out, in) is given."""
    outs, ins = weight.shape
    if isinstance(layer, Conv1D):
        made = Conv1D(outs, ins)
        made.bias.data.zero_()
        made.weight = nn.Parameter(weight.T.contiguous())
        return made
    made = nn.Linear(ins, outs, bias=False)
    made.weight = nn.Parameter(weight.contiguous())
    return made


def with_adapter(layers: Mapping[str, nn.Module], config: PeftConfig, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    bench = _Workbench(layers)
    conv1d = any(isinstance(layer, Conv1D) for layer in layers.values())
    config = copy.deepcopy(config)
    for name, value in (
        ("target_modules", list(layers)), ("exclude_modules", None), ("layers_to_transform", None),
        ("layers_pattern", None), ("modules_to_save", None), ("trainable_token_indices", None), ("bias", "none"),
        ("fan_in_fan_out", conv1d), ("init_lora_weights", True),
    ):  # fmt: skip
        if hasattr(config, name):
            setattr(config, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(config, bench)
    for parameter in bench.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return bench.eval()


def parameters_of(bench: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The parameters that PEFT would save of one of the layers."""
    state = get_peft_model_state_dict(bench, save_embedding_layers=False)
    return {key.removeprefix(f"{name}."): t for key, t in state.items() if key.startswith(f"{name}.")}


def agree(bench: nn.Module, made: nn.Module, place: Place) -> bool:
    """Whether the target's outputs are the sources', moved, for random inputs."""
    first = bench.get_submodule("source0")
    inputs = torch.randn((4, first.in_features), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        outputs = [bench.get_submodule(f"source{i}")(inputs) for i in range(len(place.sources))]
        expected = gathered(outputs, place, 1)
        got = made.get_submodule("target")(inputs if place.columns is None else inputs[:, place.columns])
    return bool((got - expected).abs().max() <= PROOF_TOLERANCE * expected.std())
