"""Which config is asked about: ours, a preset's, or what a native config says, wherever it lies."""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError

import hf_variants

from ..conversion.family import all_families, is_variant, read_config
from ..conversion.json_files import read_config_values
from ..conversion.translate import config_of_gguf, is_gguf, native_family_and_head


CONFIG_NAME = "config.json"


def read_subject(name: str) -> tuple[Any, str | None]:
    """
    A config and the class of its model (`None`: the one with a language-modelling head).

    Args:
        name: a config.json, a folder with one, a .gguf file, a preset, a native type's name with its default sizes, or a
            Hub id, of which the config.json alone is fetched.

    Raises:
        ValueError: if there is no such thing, or no variant computes it; `OSError` if it cannot be read.
    """
    path = Path(name).expanduser()
    if is_gguf(name):
        return config_of_gguf(path), None
    if path.exists():
        return _of_folder(path if path.is_dir() else path.parent, path if path.is_file() else path / CONFIG_NAME)
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
    return _of_folder(file.parent, file)


def _of_folder(folder: Path, file: Path) -> tuple[Any, str | None]:
    if file.name != CONFIG_NAME:
        # transformers reads this name alone.
        config = _config_of(read_config_values(file), file)
    else:
        config = read_config(folder)
    return subject_of(config)


def _config_of(values: dict, file: Path) -> Any:
    from transformers import AutoConfig

    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in {*all_families(), "hf_variant", "hf_variant_seq2seq"}:
        raise ValueError(
            f"`model_type` in {file} is {model_type!r}. `hf-variants families` lists what can be computed."
        )
    return AutoConfig.for_model(**values)


def subject_of(config: Any) -> tuple[Any, str | None]:
    """The variant's config, and the class, of a config of ours or of a native one."""
    if is_variant(config):
        class_name = next(iter(config.architectures or ()), None)
        return config, class_name if class_name is not None and hasattr(hf_variants, class_name) else None
    family, head = native_family_and_head(config)
    variant = family.config_map.to_variant(config, (), head)
    variant.name_or_path = config.name_or_path
    return variant, family.variant_class(head).__name__
