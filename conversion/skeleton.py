"""Models without memory for their weights: what a checkpoint of a config has to contain."""

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel


def empty_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def stored_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict as a checkpoint stores it: of tied tensors only the source."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
