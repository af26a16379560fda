"""Folders that load with this package and without it, and their way to the Hub."""

import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, logging

import hf_variants

from . import card
from .conversion import checkpoint, output_folder, tensor_writer
from .conversion.companions import belongs, copy_files, refuse_broken_files
from .conversion.errors import ConversionError
from .conversion.family import is_variant, read_config
from .conversion.json_files import read_config_values, read_object
from .conversion.layout import checked_names
from .conversion.record import RECORD
from .conversion.report import warn_of_non_finite
from .conversion.skeleton import empty_model
from .model.config_overrides import FRAMEWORK_KEYS
from .model.custom_code import auto_map_of, write_code
from .model.upload import Upload, written_since


logger = logging.get_logger(__name__)

# Where a tokenizer was saved from, which says something about a machine and nothing to another.
TOKENIZER_PATHS = ("name_or_path", "tokenizer_file", "special_tokens_map_file", "vocab_file", "merges_file")


def bundle(
    source: str | Path,
    destination: str | Path,
    *,
    max_shard_bytes: int = tensor_writer.MAX_SHARD_BYTES,
    push_to: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo | None:
    """
    Make a folder that is all a saved variant needs, with the code of this version: it loads where the package is
    installed, and elsewhere with `trust_remote_code=True`. Weights are copied a shard at a time, and checked by name and
    shape; tokenizer, generation config, licence and a README.md by hand come along, and nothing else.

    Args:
        source: a folder or Hub id of one of our checkpoints, with or without code, whatever version wrote it.
        destination: a folder that does not exist yet; it appears when everything is written.
        max_shard_bytes: largest size of one file of weights.
        push_to: `owner/name` of a repository to upload it to; made if it does not exist, and the options that follow are
            as in `push_to_hub`.

    Returns:
        what the Hub says of the commit, if there was one.

    Raises:
        ConversionError: if the source is no variant, is quantized, or its weights are not those of its config.
        FileNotFoundError: if there is no such source; FileExistsError: if the destination is not empty.
    """
    output_folder.refuse_occupied(destination)
    folder = checkpoint.resolve_folder(source)
    if (folder / "adapter_config.json").is_file() and not (folder / CONFIG_NAME).is_file():
        raise ConversionError(
            f"{source} holds an adapter without its model. Push the adapter as it is, or merge it and bundle the result."
        )
    config = read_config(folder)
    model = model_of(source, folder, config)
    reader = checkpoint.Weights(folder)
    names = checked_names(model, reader)
    refuse_broken_files(folder)
    upload = None
    if push_to is not None:
        upload = Upload(
            push_to,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            token=token,
        )
        # Before the work, which a missing token or permission would make useless.
        upload.prepare()
    elif (given := [name for name, value in (("private", private), ("revision", revision)) if value]) or create_pr:
        raise ValueError(
            f"`{(given or ['create_pr'])[0]}` is about an upload, and there is none. Give `push_to` as well."
        )
    with output_folder.new_folder(destination) as temporary:
        config.architectures = [type(model).__name__]
        config.auto_map = auto_map_of(config, type(model).__name__)
        write_code(temporary)
        tensors = ((name, reader.stored(name)) for name in names)
        headers = {name: reader.header(name) for name in names}
        warn_of_non_finite(tensor_writer.write_safetensors(tensors, headers, temporary, max_shard_bytes))
        config.save_pretrained(temporary)
        _copy_the_rest(folder, temporary)
        card.write_card(
            temporary, repo_id=upload and upload.repo_id, name=Path(destination).expanduser().resolve().name,
            lineage=card.lineage_of(folder),
        )  # fmt: skip
    if upload is None:
        return None
    keep_remote_card = upload.remote_card is not None and card.is_by_hand(upload.remote_card)
    folder = Path(destination).expanduser()
    return upload.send(folder, written_since(folder, 0), keep_remote_card)


def model_of(source: str | Path, folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config, without memory for its weights."""
    if not is_variant(config):
        raise ConversionError(
            f"{source} is a {config.model_type} checkpoint, not a variant. Convert it (`hf-variants convert`), which "
            "makes a folder of the same kind."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ConversionError(
            f"{source} is quantized (`quantization_config`). Bundle it as it was before, or call `push_to_hub` on the "
            "quantized model, which brings its code as well."
        )
    names = config.architectures or []
    if len(names) != 1 or names[0] not in card.TASKS:
        raise ConversionError(
            f"`architectures` of {folder / CONFIG_NAME} is {names or None}, so it is unknown which class the weights are "
            f"of. Write one of {', '.join(card.TASKS)} there."
        )
    values = read_config_values(folder / CONFIG_NAME)
    if unknown := _unknown_keys(config, values):
        logger.warning(
            f"{', '.join(f'`{key}`' for key in unknown)} of {folder / CONFIG_NAME} means nothing to this version of "
            "hf-variants. If a newer one wrote it, upgrade before you bundle it."
        )
    return empty_model(getattr(hf_variants, names[0]), config)


def _unknown_keys(config: PreTrainedConfig, values: dict[str, Any]) -> list[str]:
    """Keys of a config.json, also of its stacks, that became attributes which no field stands for and no tool reads."""
    known = {*type(config).__dataclass_fields__, *FRAMEWORK_KEYS}
    unknown = [key for key in values if key in vars(config) and key not in known and not key.startswith("_")]
    for stack in ("encoder", "decoder"):
        if isinstance(values.get(stack), dict):
            unknown += [f"{stack}.{key}" for key in _unknown_keys(getattr(config, stack), values[stack])]
    return unknown


def _copy_the_rest(folder: Path, destination: Path) -> None:
    """Tokenizer, generation config, licence, the card and the record of a conversion."""
    copy_files(folder, destination)
    for name in (card.CARD, RECORD):
        if (folder / name).is_file() and belongs(folder / name, folder):
            shutil.copyfile(folder / name, destination / name)
    path = destination / "tokenizer_config.json"
    if not path.is_file():
        return
    settings = read_object(path)
    kept = {
        key: value
        for key, value in settings.items()
        if not (key in TOKENIZER_PATHS and isinstance(value, str) and Path(value).is_absolute())
    }
    if kept != settings:
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    original = read_object(folder / path.name)
    if original.get("auto_map"):
        logger.warning(
            f"The tokenizer of {folder} has code of its own ({original['auto_map']}), which is not bundled. Save it as a "
            "fast tokenizer of transformers, which needs none."
        )
