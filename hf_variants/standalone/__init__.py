"""A variant as one model file that a person can read, review and edit, with nothing in it that it does not use."""

import importlib
from pathlib import Path

from .. import card
from ..conversion import checkpoint, output_folder, tensor_writer
from ..conversion.companions import copy_files, refuse_broken_files
from ..conversion.family import read_config
from ..conversion.layout import checked_names
from ..hub import model_of
from .axes import NotStandalone
from .proof import loaded, refuse_differences
from .writing import Source, features, write_files, write_source


def standalone(
    source: str | Path,
    destination: str | Path,
    *,
    name: str | None = None,
    max_shard_bytes: int = tensor_writer.MAX_SHARD_BYTES,
) -> None:
    """
    Write a variant as one model file and its config file, every axis resolved, with the weights under the same names. It
    loads with `trust_remote_code=True` where transformers alone is installed. Before anything is written, the file is
    compared with the variant on random weights: logits, gradients and cached generation, in float32 and bfloat16, with
    eager attention and sdpa, have to be equal.

    Args:
        source: a folder or Hub id of one of our checkpoints.
        destination: a folder that does not exist yet.
        name: what classes, files and model type are called after (default: the destination's name).
        max_shard_bytes: largest size of one file of weights.

    Raises:
        NotStandalone: if a field asks for what one file does not cover; `bundle` writes any variant.
        ConversionError: if the source is no variant, is quantized, or its weights are not those of its config.
        FileNotFoundError: if there is no such source; FileExistsError: if the destination is not empty.
    """
    output_folder.refuse_occupied(destination)
    folder = checkpoint.resolve_folder(source)
    config = read_config(folder)
    model = model_of(source, folder, config)
    reader = checkpoint.Weights(folder)
    names = checked_names(model, reader)
    refuse_broken_files(folder)
    head = type(model).__name__.removeprefix("Variant").removeprefix("Seq2Seq")
    written = write_source(config, name or Path(destination).expanduser().resolve().name, head)
    refuse_differences(written, config)
    with output_folder.new_folder(destination) as temporary:
        write_files(written, temporary)
        tensors = ((key, reader.stored(key)) for key in names)
        tensor_writer.write_safetensors(
            tensors, {key: reader.header(key) for key in names}, temporary, max_shard_bytes
        )
        with loaded(written) as module:
            configuration = importlib.import_module(f"{module.__package__}.configuration_{written.stem}")
            own = getattr(configuration, f"{written.name}Config")(
                **written.values(config),
                architectures=[written.name + head],
                dtype=config.dtype,
                id2label=config.id2label,
                label2id=config.label2id,
            )
            own.auto_map = written.auto_map
            own.save_pretrained(temporary)
        copy_files(folder, temporary)
        (temporary / card.CARD).write_text(_readme(written), encoding="utf-8")


def _readme(source: Source) -> str:
    auto = list(source.auto_map)[2]
    stacks = source.stacks.items()
    lines = "\n".join(
        f"- {f'{name}: ' if len(stacks) > 1 else ''}{line}" for name, stack in stacks for line in features(stack)
    )
    return (
        f"---\nlibrary_name: transformers\n---\n\n# {source.name}\n\n{lines}\n\nThe model is one file, "
        f"[modeling_{source.stem}.py](modeling_{source.stem}.py), written by hf-variants.\n\n```python\n"
        f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("FOLDER", trust_remote_code=True)\n```\n'
    )


__all__ = ["NotStandalone", "standalone", "write_source"]
