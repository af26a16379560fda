"""Which config is asked about: ours, a preset's, or what a native config says, wherever it lies."""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from transformers.utils import CONFIG_NAME

import hf_variants

from ..conversion.family import is_variant, read_config
from ..conversion.foreign import is_foreign, open_foreign
from ..conversion.gguf_source import config_of_gguf, is_gguf
from ..conversion.native_source import native_family_and_head


def read_subject(name: str) -> tuple[Any, str | None]:
    """
    A config and the class of its model (`None`: the one with a language-modelling head).

    Args:
        name: a config.json, a folder with one, a .gguf file, a preset, a checkpoint of another code base, or a Hub id, of
            which the config.json alone is fetched.

    Raises:
        ValueError: if there is no such thing, or no variant computes it; `OSError` if it cannot be read.
    """
    path = Path(name).expanduser()
    if is_gguf(name):
        return config_of_gguf(path), None
    if is_foreign(path):
        opened = open_foreign(path)
        return opened.config, opened.class_name
    if path.exists():
        return subject_of(read_config(path))
    if name in hf_variants.presets():
        return hf_variants.VariantConfig.from_preset(name), None
    if name.count("/") != 1:
        raise ValueError(
            f"{name} is neither a file, nor a folder, nor a preset. Give the path of a config.json, a Hub id, or one of: "
            f"{', '.join(sorted(hf_variants.presets()))}."
        )
    try:
        file = Path(hf_hub_download(name, CONFIG_NAME))
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{name} is no folder here and its config could not be fetched from the Hub. Check the name and the connection."
        ) from error
    return subject_of(read_config(file))


def subject_of(config: Any) -> tuple[Any, str | None]:
    """The variant's config, and the class, of a config of ours or of a native one."""
    if is_variant(config):
        class_name = next(iter(config.architectures or ()), None)
        return config, class_name if class_name is not None and hasattr(hf_variants, class_name) else None
    family, head = native_family_and_head(config)
    variant = family.config_map.to_variant(config, (), head)
    variant.name_or_path = config.name_or_path
    return variant, family.variant_class(head).__name__
