"""A GGUF file as a native checkpoint: what variant it is, and the stock model in it."""

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_variants.model.configuration_variant import VariantConfig

from . import block_configs, gguf_files
from .errors import ConversionError
from .family import stacks
from .layout import as_transformers_reads
from .native_source import NativeSource, follow_attention, untie
from .tokenization import load_tokenizer


logger = logging.get_logger(__name__)


def is_gguf(source: str | Path) -> bool:
    """Whether a source is one GGUF file."""
    return str(source).endswith(".gguf")


def config_of_gguf(path: Path) -> VariantConfig:
    """The config of the variant that a GGUF file converts to."""
    return variant_of_gguf(gguf_files.open_checkpoint(path))


def variant_of_gguf(opened: gguf_files.GGUFCheckpoint) -> VariantConfig:
    """
    The config of the variant that an understood GGUF file converts to.

    Raises:
        ConversionError: also if the file says another number of key/value heads than the native class has.
    """
    config = opened.family.config_map.to_variant(opened.config, (), opened.head)
    for stack in stacks(config):
        for number, layer in enumerate(stack.per_layer_config):
            keys = opened.heads.own.get(number, opened.heads).keys
            if layer.num_key_value_heads != keys and "self_attn" not in getattr(layer, "skip", ()):
                raise ConversionError(
                    f"`{opened.metadata.name('attention.head_count_kv')}` is {keys} in {opened.file.path}, and "
                    f"{opened.family.model_type} has {layer.num_key_value_heads}. The file is damaged."
                )
    if not opened.has_pooler:
        config.pooler = False
    config.dtype = opened.dtype
    return config


def open_gguf(path: Path, ignore_keys: Iterable[str]) -> tuple[gguf_files.GGUFCheckpoint, NativeSource]:
    """A GGUF file as a native checkpoint, some tensors of which have the names that transformers stores."""
    file = gguf_files.open_checkpoint(path, ignore_keys)
    for note in file.notes:
        logger.warning(f"{file.file.path}: {note}.")
    layout = as_transformers_reads(file.native, _GGUFWeights(file))
    opened = NativeSource(
        file.family, file.head, file.native, variant_of_gguf(file), layout, file.dtype, path.parent, list(file.notes)
    )
    untie(opened, file.config, ignore_keys)
    follow_attention(opened)
    return file, opened


class _GGUFWeights:
    """The tensors of a GGUF file as those of other files are read."""

    def __init__(self, file: gguf_files.GGUFCheckpoint):
        self._file = file

    def names(self) -> list[str]:
        return list(self._file.names())

    def __call__(self, name: str) -> torch.Tensor:
        return self._file.load(name)

    stored = __call__

    def header(self, name: str) -> torch.Tensor:
        return self._file.header(name)


def load_gguf(path: Path, ignore_keys: Iterable[str] = ()) -> PreTrainedModel | None:
    """The stock model in a GGUF file; `None` for layers that differ, where the stock class has layers that are alike."""
    opened = gguf_files.open_checkpoint(path, ignore_keys)
    if block_configs.overrides(opened.config):
        return None
    arguments = {} if opened.has_pooler else {"add_pooling_layer": False}
    model = opened.family.native_class(opened.head).from_pretrained(
        None, config=opened.config, state_dict={name: opened.load(name) for name in opened.names()},
        dtype=opened.dtype, **arguments,
    )  # fmt: skip
    if model.can_generate():
        model.generation_config = opened.generation_config()
    return model.eval()


def write_gguf_companions(path: Path, file: gguf_files.GGUFCheckpoint, folder: Path) -> list[str]:
    """Tokenizer and generation settings of a GGUF file; returns notes on the tokenizer."""
    notes = []
    tokenizer = load_tokenizer(path)
    if isinstance(tokenizer, str):
        notes.append(tokenizer)
        logger.warning(f"No tokenizer is written: {tokenizer}")
    else:
        tokenizer.save_pretrained(folder)
    if file.native.can_generate():
        file.generation_config().save_pretrained(folder)
    return notes
