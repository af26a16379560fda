"""With which settings a model generates, as its checkpoint says."""

import copy
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from .companions import belongs
from .errors import reading


def copy_generation_config(model: PreTrainedModel, source: PreTrainedModel) -> None:
    if model.can_generate() and source.can_generate():
        model.generation_config = copy.deepcopy(source.generation_config)


def stored_generation_config(folder: Path) -> GenerationConfig:
    """
    What stock classes that generate have after loading from a folder; before transformers 4.25, config.json held it.
    """
    path = folder / GENERATION_CONFIG_NAME
    if path.is_file():
        with reading(path):
            return GenerationConfig.from_pretrained(folder)
    with reading(folder / CONFIG_NAME):
        return GenerationConfig.from_pretrained(folder, config_file_name=CONFIG_NAME, _from_model_config=True)


def write_generation_config(folder: Path, native: PreTrainedModel, source: Path) -> None:
    """Beside a variant, whose config.json does not hold what generation reads, the settings of its source."""
    path = folder / GENERATION_CONFIG_NAME
    theirs = source / GENERATION_CONFIG_NAME
    if path.is_file() or not native.can_generate() or (theirs.is_file() and not belongs(theirs, source)):
        return
    # Not `save_pretrained`, which refuses settings that have no effect together; they were published so.
    path.write_text(stored_generation_config(source).to_json_string(), encoding="utf-8")
