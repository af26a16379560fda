"""Models without memory for their weights: what a checkpoint of a config has to contain."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from .errors import reading
from .json_files import read_config_values


def empty_model(model_class: type[PreTrainedModel], config: PreTrainedConfig, **arguments) -> PreTrainedModel:
    """
    The model without memory for its weights.

    Args:
        arguments: of the class, beside the config.

    Raises:
        ConversionError: if the class makes no model of this config.
    """
    config = copy.deepcopy(config)
    # Names and shapes are the same with every attention, and a machine that only converts may lack some.
    backend = config._attn_implementation
    config._attn_implementation = "eager"
    what = f"{config.name_or_path or 'The config'} makes no {model_class.__name__}"
    with reading(what), torch.device("meta"), no_init_weights():
        model = model_class(config, **arguments)
        # Which the initialisation that is left out would have done.
        model.tie_weights()
    model.config._attn_implementation = backend
    return model


def stored_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict as a checkpoint stores it: of tied tensors only the source."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


@contextmanager
def loading(folder: Path, model_class: type[PreTrainedModel]) -> Iterator[None]:
    """
    Around what builds and loads a model of a checkpoint folder.

    Raises:
        ConversionError: naming the folder, and the keys of its config of which no such model can be made.
    """
    values = read_config_values(folder / CONFIG_NAME)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        # transformers reads it on loading, and its errors do not say so.
        with reading(folder / GENERATION_CONFIG_NAME):
            GenerationConfig.from_pretrained(folder)

    def without(key: str) -> PreTrainedModel:
        left = {name: value for name, value in values.items() if name != key}
        with torch.device("meta"):
            return model_class(model_class.config_class.from_dict(left))

    quantised = ", whose weights are quantised (`quantization_config`)," if "quantization_config" in values else ""
    with reading(f"{folder}{quantised} makes no {model_class.__name__}", values, without):
        yield
