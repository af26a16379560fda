"""Models without memory for their weights: what a checkpoint of a config has to contain."""

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel


def empty_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights; its attention backend need not be installed here."""
    config = copy.deepcopy(config)
    backend = config._attn_implementation
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = model_class(config)
    model.config._attn_implementation = backend
    return model


def stored_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict as a checkpoint stores it: of tied tensors only the source."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
