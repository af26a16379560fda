"""An adapter in memory, and in a folder."""

from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peft import PeftConfig
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import load_file, save_file

from ..errors import ConversionError
from ..pickles import load_state_dict


WAY_OUT = "Merge it into its model (`merge_and_unload`), save that, and convert the result."


@dataclass
class Adapter:
    """An adapter in memory: its config, and its tensors by the names of PEFT's file."""

    config: PeftConfig
    tensors: dict[str, torch.Tensor]

    def __post_init__(self):
        # PEFT writes a resized embedding that is trained whole three times, and reads what bears the model's own name.
        copies = {
            name
            for part in (".modules_to_save.", ".original_module.")
            for name in self.tensors
            if name.replace(part, ".") != name and name.replace(part, ".") in self.tensors
        }
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name not in copies}

    @property
    def method(self) -> str:
        return str(getattr(self.config.peft_type, "value", self.config.peft_type))

    @property
    def prefix(self) -> str:
        """What stands before a module's name in the file: a tuner is between PEFT's model and ours, but for prompts."""
        return "base_model." if self.config.is_prompt_learning else "base_model.model."


def is_adapter(source: str | Path) -> bool:
    """Whether a folder holds an adapter, beside a model or alone."""
    return (Path(source).expanduser() / CONFIG_NAME).is_file()


def read_adapter(folder: str | Path) -> Adapter:
    """
    An adapter's config and tensors.

    Raises:
        FileNotFoundError: if one of the two files is missing; ConversionError if PEFT does not know the method.
    """
    folder = Path(folder).expanduser()
    if not is_adapter(folder):
        raise FileNotFoundError(f"{folder} has no {CONFIG_NAME}. Give the folder of an adapter.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise ConversionError(
            f"{folder / CONFIG_NAME} is not a config that peft {peft.__version__} understands ({error}). Install the "
            "version that the adapter was saved with."
        ) from error
    if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    elif (folder / WEIGHTS_NAME).is_file():
        tensors = load_state_dict(folder / WEIGHTS_NAME)
    else:
        raise FileNotFoundError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}. The adapter is incomplete.")
    return Adapter(config, tensors)


def save_adapter(adapter: Adapter, folder: Path) -> None:
    save_file(adapter.tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    adapter.config.inference_mode = True
    adapter.config.save_pretrained(str(folder))
