"""Adapters in folders: one that was trained on a native model for its variant, and back."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import TaskType
from peft.utils.constants import CONFIG_NAME
from transformers import PreTrainedConfig

from .. import checkpoint, output_folder
from ..companions import copy_files
from ..errors import ConversionError
from ..family import family_and_head, family_with_head, head_of_variant, is_variant, read_config
from .files import Adapter, read_adapter, save_adapter
from .pair import Pair, classes_of
from .parts import plain_name
from .translation import translate_adapter


# What a task of PEFT's needs of the base; where it names none, the adapter names the class, or the base has its own.
TASK_HEADS = {
    TaskType.SEQ_CLS: "sequence_classification",
    TaskType.TOKEN_CLS: "token_classification",
    TaskType.QUESTION_ANS: "question_answering",
    TaskType.CAUSAL_LM: "causal_lm",
    TaskType.SEQ_2_SEQ_LM: "seq2seq_lm",
    TaskType.FEATURE_EXTRACTION: "base",
}


@dataclass
class AdapterReport:
    """
    What a translation did.

    Attributes:
        source, destination: folders.
        direction: `"convert"` (native to variant) or `"export"` (variant to native).
        model_type: the native type.
        method: of PEFT, such as `"LORA"`.
        modules: how many modules have a part of the adapter.
        whole: tensors that are stored whole (`modules_to_save`, biases, embeddings).
        joined: modules whose adapter is made of several, with a larger rank.
        base: what the result names as its base, or `None`.
    """

    source: str
    destination: str
    direction: str
    model_type: str
    method: str
    modules: int
    whole: int
    joined: list[str] = field(default_factory=list)
    base: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_markdown(self) -> str:
        what = f"{self.model_type} -> variant" if self.direction == "convert" else f"variant -> {self.model_type}"
        lines = [f"**{what}** ({self.method} adapter): {self.modules} modules, {self.whole} whole tensors."]
        if self.joined:
            lines.append(f"- {len(self.joined)} modules hold what several had, with the sum of their ranks")
        if self.base is None:
            lines.append("- It names no base: load that and put the adapter on with `PeftModel.from_pretrained`.")
        return "\n".join(lines)


def head_of_adapter(adapter: Adapter, base: PreTrainedConfig) -> str:
    """The head that the adapter's base has: of its task, of the class that it names, or of the base's checkpoint."""
    mapping = adapter.config.auto_mapping or {}
    stored = next(iter(base.architectures or ()), None)
    if adapter.config.task_type in TASK_HEADS:
        head = TASK_HEADS[adapter.config.task_type]
        # PEFT has no task of its own for what chooses among sequences, and takes it as a classifier of them.
        if head == "sequence_classification" and stored is not None and _chooses(adapter, base, stored):
            return "multiple_choice"
        return head
    return _head_of_class(base, mapping.get("base_model_class") or stored)


def _head_of_class(base: PreTrainedConfig, class_name: str | None) -> str:
    if is_variant(base):
        return "causal_lm" if class_name is None else head_of_variant(class_name)
    return family_and_head(base, class_name)[1]


def _chooses(adapter: Adapter, base: PreTrainedConfig, stored: str) -> bool:
    """Whether the base's checkpoint chooses, and the adapter comes with its classifier, which has one row."""
    head = "multiple_choice"
    if _head_of_class(base, stored) != head:
        return False
    return classes_of(adapter, None if is_variant(base) else family_with_head(base, head), head) == 1


def _config_of_base(adapter: Adapter, folder: Path, base: str | Path | None) -> PreTrainedConfig:
    name = base or adapter.config.base_model_name_or_path
    if not name:
        raise ConversionError(
            f"`base_model_name_or_path` in {folder / CONFIG_NAME} is empty. Name the checkpoint that the adapter was "
            "trained on there, or as the base."
        )
    return read_config(checkpoint.resolve_folder(name))


def convert_adapter(
    source: str | Path,
    destination: str | Path,
    *,
    base: str | Path | None = None,
    onto: str | Path | None = None,
    ignore_keys: Iterable[str] = (),
) -> AdapterReport:
    """
    Write an adapter that was trained on a native model as one of its variant, in a new folder.

    Args:
        source: the adapter's folder.
        destination: a folder that does not exist yet.
        base: the native checkpoint it was trained on (of which the config is read); by default the one that it names.
        onto: the variant's checkpoint, which the result names as its base.
        ignore_keys: as in `convert`.

    Raises:
        ConversionError: if its tensors do not belong to the base, or a method cannot be carried over exactly, naming
            method and module.
    """
    adapter = read_adapter(source)
    config = _config_of_base(adapter, Path(source), base)
    if is_variant(config):
        raise ConversionError(f"The base of {source} is a variant already. Export the adapter, or name another base.")
    pair = Pair.of_native(config, head_of_adapter(adapter, config), ignore_keys)
    return _written(adapter, pair, source, destination, onto, to_native=False)


def export_adapter(
    source: str | Path,
    destination: str | Path,
    *,
    base: str | Path | None = None,
    onto: str | Path | None = None,
    model_type: str | None = None,
) -> AdapterReport:
    """
    Write an adapter of a variant as one of the native model that it exports to, in a new folder.

    Args:
        source, destination, base: as in `convert_adapter`; the base is a variant.
        onto: the native checkpoint, which the result names as its base.
        model_type: the native type; by default the one that the variant came from.

    Raises:
        NotRepresentable: if the base is no model of that type as it is; ConversionError as `convert_adapter`.
    """
    adapter = read_adapter(source)
    config = _config_of_base(adapter, Path(source), base)
    if not is_variant(config):
        raise ConversionError(
            f"The base of {source} is a {config.model_type} model, not a variant. Convert it instead."
        )
    pair = Pair.of_variant(config, head_of_adapter(adapter, config), model_type)
    return _written(adapter, pair, source, destination, onto, to_native=True)


def _written(
    adapter: Adapter, pair: Pair, source: str | Path, destination: str | Path, onto: str | Path | None, to_native: bool
) -> AdapterReport:
    output_folder.refuse_occupied(destination)
    pair.fit(adapter, to_native)
    made, joined = translate_adapter(adapter, pair, to_native)
    made.config.base_model_name_or_path = None if onto is None else str(onto)
    with output_folder.new_folder(destination) as temporary:
        save_adapter(made, temporary)
        copy_files(Path(source).expanduser(), temporary)
    whole = sum(plain_name(key.removeprefix(made.prefix)) in _state(pair, to_native) for key in made.tensors)
    modules = {key.rpartition(".")[0] for key in made.tensors}
    return AdapterReport(
        source=str(source),
        destination=str(destination),
        direction="export" if to_native else "convert",
        model_type=pair.family.model_type,
        method=adapter.method,
        modules=len(modules) - whole,
        whole=whole,
        joined=joined,
        base=made.config.base_model_name_or_path,
    )


def _state(pair: Pair, to_native: bool) -> Mapping[str, torch.Tensor]:
    return (pair.native if to_native else pair.variant).state_dict()
