"""What every room of this folder makes of a checkpoint: settings of which each is consumed, and tensors by name."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from hf_variants.model.configuration_variant import VariantConfig
from hf_variants.model.configuration_variant_seq2seq import VariantSeq2SeqConfig

from ..companions import TOKENIZER_CONFIG, TOKENIZER_FILE, copy_companions
from ..errors import ConversionError
from ..family import variant_class
from ..rules import Rule, Step, plan, run, some
from ..skeleton import empty_model, stored_tensors
from ..tensor_files import FLOATS, StoredSource, TensorSource


# Ten times the deepest that was trained (DeepNet, https://arxiv.org/abs/2203.00555).
MOST_LAYERS = 10_000


class Settings:
    """
    The settings of a checkpoint, each of which is taken, known to change nothing, or refused.

    Args:
        where: what they stand in, for messages.
    """

    def __init__(self, values: Any, where: str | Path):
        if not isinstance(values, Mapping):
            raise ConversionError(f"{where} holds no map of settings. The checkpoint is damaged; fetch it again.")
        self._left, self.where = dict(values), where

    def take(self, key: str, kind: type | tuple[type, ...], *default: Any) -> Any:
        """The value of a key, of this kind; without a default, it must be there."""
        value = self._left.pop(key, *default) if default or key in self._left else None
        if default and value == default[0]:
            return value
        # A truth value is no number.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConversionError(f"`{key}` in {self.where} is {value!r}, which means nothing. Correct it.")
        return value

    def count(self, key: str, *default: Any) -> Any:
        """The same, a whole number above zero."""
        value = self.take(key, int, *default)
        if isinstance(value, int) and value < 1:
            raise ConversionError(f"`{key}` in {self.where} is {value}, and must be above 0. Correct it.")
        return value

    def layers(self, key: str, *default: Any) -> int:
        """The same, a number of layers: what is made of an absurd one fills the memory before any tensor is missed."""
        value = self.count(key, *default)
        if value > MOST_LAYERS:
            raise ConversionError(f"`{key}` in {self.where} is {value}, and no checkpoint has so many. Correct it.")
        return value

    def pass_over(self, *keys: str) -> None:
        """Keys that change nothing of what the model computes."""
        for key in keys:
            self._left.pop(key, None)

    def peek(self, key: str, default: Any) -> Any:
        """The value of a key that is taken later."""
        return self._left.get(key, default)

    def with_prefix(self, prefix: str) -> dict[str, Any]:
        """Take all keys that begin so, by what follows."""
        found = {key: value for key, value in self._left.items() if str(key).startswith(prefix)}
        self._left = {key: value for key, value in self._left.items() if key not in found}
        return {key.removeprefix(prefix): value for key, value in found.items()}

    def drop(self, prefix: str) -> None:
        """All keys that begin so: of a part that this model does not have."""
        self._left = {key: value for key, value in self._left.items() if not str(key).startswith(prefix)}

    def refuse_but(self, **expected: Any) -> None:
        """Keys of mechanisms that no field expresses, unless they have the values that mean that there is none."""
        for key, value in expected.items():
            found = self._left.pop(key, value)
            if found != value and found is not None:
                raise ConversionError(
                    f"`{key}` in {self.where} is {found!r}, and only {value!r} can be expressed here. This checkpoint "
                    "cannot be converted."
                )

    def finish(self) -> None:
        """`ConversionError` for keys that nobody asked for."""
        if self._left:
            raise ConversionError(
                f"{self.where} has keys that are not understood: {some(sorted(map(str, self._left)))}. A newer "
                "release of its code base may have written them; remove those that are known to change nothing."
            )


@dataclass
class ForeignCheckpoint:
    """
    Attributes:
        code_base: what wrote it.
        path: the folder.
        files: those of its weights.
        config: ours.
        rules: where its tensors go; `native` are its names.
        weights: name -> shape and dtype, as tensors without values.
        load, stored: a tensor by name; and for whoever copies it as it is.
        ties: names of copies -> of what they are copies of.
        computed: names of tensors that the model computes -> whether one has the values that it should.
        notes: what is to be known about the translation.
        no_tokenizer: why none is converted, unless the folder has one that transformers reads.
        class_name: of the variant.
    """

    code_base: str
    path: Path
    files: list[Path]
    config: VariantConfig | VariantSeq2SeqConfig
    rules: tuple[Rule, ...]
    weights: dict[str, torch.Tensor]
    load: TensorSource
    stored: StoredSource
    ties: dict[str, str] = field(default_factory=dict)
    computed: dict[str, Callable[[torch.Tensor], bool]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    no_tokenizer: str = ""
    class_name: str = "VariantForCausalLM"

    @classmethod
    def of_state(
        cls,
        code_base: str,
        file: Path,
        config: VariantConfig | VariantSeq2SeqConfig,
        rules: tuple[Rule, ...],
        state: Mapping[str, torch.Tensor],
        **more: Any,
    ) -> "ForeignCheckpoint":
        """Of one file, which holds the whole of a state dict."""
        weights = {name: tensor.to("meta") for name, tensor in state.items()}
        load = state.__getitem__
        return cls(code_base, file.parent, [file], config, rules, weights, load, load, **more)

    def __post_init__(self) -> None:
        if not self.weights.keys() - self.computed.keys():
            names = ", ".join(str(file) for file in self.files) or "The state dict"
            raise ConversionError(f"{names} has no tensors. The checkpoint is empty; fetch it again.")
        if strange := [name for name, header in self.weights.items() if header.dtype not in FLOATS]:
            dtype = self.weights[strange[0]].dtype
            raise ConversionError(
                f"{strange[0]} is {str(dtype).removeprefix('torch.')}, and weights are floating-point numbers. Convert "
                "the model as it was before it was packed."
            )
        dtypes = {header.dtype for name, header in self.weights.items() if name not in self.computed}
        # Of several, the one that holds the values of all, in which no value changes.
        dtype = reduce(torch.promote_types, dtypes)
        if len(dtypes) > 1:
            load = self.load
            self.load = self.stored = lambda name: load(name).to(dtype)
            self.weights = {name: header.to(dtype) for name, header in self.weights.items()}
            names = ", ".join(sorted(str(other).removeprefix("torch.") for other in dtypes - {dtype}))
            self.notes.append(
                f"Tensors in {names} are written in {str(dtype).removeprefix('torch.')}, as the others are"
            )
        self.config.dtype = dtype

    def target(self) -> tuple[PreTrainedModel, dict[str, torch.Size]]:
        """The model to fill, without values, and the shapes of its tensors."""
        target = empty_model(variant_class(self.class_name), self.config)
        return target, {name: tensor.shape for name, tensor in stored_tensors(target).items()}

    def generation_config(self) -> GenerationConfig:
        """That of transformers where one lies there, as LitGPT keeps it; else the tokens that the code base names."""
        if (self.path / GENERATION_CONFIG_NAME).is_file():
            return GenerationConfig.from_pretrained(self.path)
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        return GenerationConfig(**{name: getattr(self.config, name, None) for name in names})

    def write_companions(self, folder: Path) -> list[str]:
        """
        What travels beside weights and config into a folder whose config.json has been written: settings of generation,
        and the files of a tokenizer of transformers.

        Returns:
            notes on the tokenizer.
        """
        self.generation_config().save_pretrained(folder)
        # Files of vocabularies alone, such as Meta's, do not say which class reads them.
        if any((self.path / name).is_file() for name in (TOKENIZER_FILE, TOKENIZER_CONFIG)):
            return copy_companions(self.path, folder)
        return [self.no_tokenizer] if self.no_tokenizer else []

    def plan(self, targets: Iterable[str]) -> list[Step]:
        """
        Steps that use every tensor once.

        Raises:
            ConversionError: naming tensors that are missing, left over, or not what they must be.
        """
        names = []
        for name in self.weights:
            if name in self.computed:
                if not self.computed[name](self.load(name)):
                    raise ConversionError(
                        f"{name} does not hold the values that the model computes for it. It is another model."
                    )
            elif name in self.ties and self.ties[name] in self.weights:
                if not torch.equal(self.load(name), self.load(self.ties[name])):
                    raise ConversionError(f"{name} and {self.ties[name]} are one tensor to this model, and differ.")
            else:
                names.append(name)
        return plan(self.rules, names, targets)

    def tensors(
        self, steps: Iterable[Step], shapes: Mapping[str, torch.Size], load: StoredSource | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Ours, one by one; those that only change names as `load` or `stored` gives them."""
        return run(steps, load or self.load, self.config, shapes, unread=load or self.stored)


# What torch.compile puts before every name.
COMPILED = "_orig_mod."


def without_prefix(state: Mapping[str, Any], where: str | Path) -> dict[str, torch.Tensor]:
    """A state dict with the names of the model that was compiled; `ConversionError` for what is no tensor."""
    if strange := [
        name for name, tensor in state.items() if not (isinstance(name, str) and isinstance(tensor, torch.Tensor))
    ]:
        raise ConversionError(f"{where} has {strange[0]!r}, which is no tensor of a name. The file is damaged.")
    return {name.removeprefix(COMPILED): tensor for name, tensor in state.items()}


def leaf(names: Iterable[str], value: Mapping[str, torch.Tensor], ending: str) -> torch.Tensor:
    """The first tensor whose name ends so."""
    found = next((name for name in names if name.endswith(ending)), None)
    if found is None:
        raise ConversionError(f"The checkpoint has no tensor {ending.lstrip('.')}. It is incomplete.")
    return value[found]
