"""An adapter for the other model of a pair."""

from collections.abc import Iterable, Mapping

import torch
from peft import PeftConfig, PeftType
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .. import rules
from ..errors import ConversionError
from .config import translated_config
from .files import WAY_OUT, Adapter
from .pair import Pair
from .parameters import ParameterTranslator
from .parts import Parts, check, sorted_parts
from .places import places_of


logger = logging.get_logger(__name__)


def translate_adapter(adapter: Adapter, pair: Pair, to_native: bool) -> tuple[Adapter, list[str]]:
    """
    The adapter for the other model of the pair.

    Returns:
        the adapter, and the modules whose part is made of several modules'.

    Raises:
        ConversionError: if its tensors are not those of the model that it comes from, or a method cannot be carried over.
    """
    config = adapter.config
    source, target = (pair.variant, pair.native) if to_native else (pair.native, pair.variant)
    for name in ("layer_replication", "target_parameters"):
        if getattr(config, name, None):
            raise ConversionError(f"`{name}` of an adapter cannot be translated. {WAY_OUT}")
    if _is_given_other_words(config, pair):
        raise ConversionError(
            f"{adapter.method} has PEFT look words up, and of {type(pair.native).__name__} it gets them without "
            f"`embedding_multiplier`, of {type(pair.variant).__name__} with it: the adapter's prompt would stand beside "
            "other words than in training. Train it on the model that it is for."
        )
    parts = sorted_parts(adapter, source, check(adapter, source, "The adapter"))
    twice = sorted(parts.saved_modules & parts.modules.keys())
    if twice:
        # "all-linear" on a classifier's dense layer: PEFT takes `pre_classifier` for a `classifier` to be saved as well.
        raise ConversionError(
            f"The {adapter.method} adapter is on {twice[0]}, which it stores whole as well. Leave one of the two out "
            f"(`exclude_modules`) in training. {WAY_OUT}"
        )
    if not to_native:
        _leave_out_what_never_runs(adapter, source, parts)
    steps = pair.steps(to_native)
    places = places_of(pair, steps, to_native, set(parts.modules))
    adapted = {module: place for module, place in places.items() if not parts.modules.keys().isdisjoint(place.sources)}
    lost = parts.modules.keys() - {name for place in adapted.values() for name in place.sources}
    if lost:
        raise ConversionError(
            f"The {adapter.method} adapter is on {rules.some(sorted(lost))}, for which the other model has no module. "
            f"{WAY_OUT}"
        )
    tied_to_all = [key for key in parts.shared if not config.is_prompt_learning]
    moved = sorted(module for module, place in adapted.items() if not place.is_rename)
    if tied_to_all and moved:
        raise ConversionError(
            f"{adapter.method} shares {tied_to_all[0]} between modules, and {moved[0]} is not one of the source's. "
            f"{WAY_OUT}"
        )
    translator = ParameterTranslator(adapter, source, target)
    tensors = dict(parts.shared)
    prefix = adapter.prefix
    modules = {}
    for module, place in adapted.items():
        modules[module] = translator.translated(module, place, parts.modules)
        tensors |= {f"{prefix}{module}.{name}": tensor for name, tensor in modules[module].items()}
    whole = _whole_tensors(pair, steps, parts.whole, to_native)
    for name, (infix, tensor) in whole.items():
        module, _, leaf = name.rpartition(".")
        tensors[f"{prefix}{module}.{infix}{leaf}"] = tensor
    saved = {
        name
        for step in steps
        if any(_is_inside(source_name, parts.saved_modules) for source_name in step.sources)
        for name in step.targets
        if name in whole
    }
    made = Adapter(
        translated_config(adapter, source, target, adapted, modules, saved, translator.joined),
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
    )
    check(made, target, "The translated adapter")
    return made, sorted(translator.joined)


def _is_given_other_words(config: PeftConfig, pair: Pair) -> bool:
    """Whether prompts stand beside words that one model's table multiplies, and the other's does not (Marian)."""
    if not config.is_prompt_learning or config.peft_type in (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE):
        return False
    native, variant = (type(model.get_input_embeddings()).forward for model in (pair.native, pair.variant))
    return native is nn.Embedding.forward and variant is not nn.Embedding.forward


def _leave_out_what_never_runs(adapter: Adapter, native: PreTrainedModel, parts: Parts) -> None:
    """
    Take an adapter off a table that both stacks of an encoder-decoder have copies of: its class holds it for its weight
    alone (`shared` of T5 and BART), so that an adapter has no effect there, and would have one here.
    """
    if not native.config.is_encoder_decoder:
        return
    run = {id(module) for stack in (native.get_encoder(), native.get_decoder()) for module in stack.modules()}
    for name, values in list(parts.modules.items()):
        module = native.get_submodule(name)
        # Trained tokens are on every copy: PEFT ties them as the table is tied.
        of_tokens = all(key.startswith("token_adapter.") for key in values)
        if of_tokens or not isinstance(module, nn.Embedding) or id(module) in run:
            continue
        del parts.modules[name]
        what = f"on {name}, which {type(native).__name__} holds for its weight and never runs, where it has no effect"
        if not parts.modules and not parts.whole:
            raise ConversionError(f"The {adapter.method} adapter is {what}. There is nothing to convert.")
        logger.warning(f"The {adapter.method} adapter is {what}. That part is left out.")


def _is_inside(name: str, modules: set[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _whole_tensors(
    pair: Pair, steps: Iterable[rules.Step], whole: Mapping[str, tuple[str, torch.Tensor]], to_native: bool
) -> dict[str, tuple[str, torch.Tensor]]:
    """Tensors that an adapter stores whole: the target's name for each, with what PEFT puts inside it, and its value."""
    made: dict[str, tuple[str, torch.Tensor]] = {}
    left = set(whole)
    for step in steps:
        if left.isdisjoint(step.sources):
            continue
        missing = [name for name in step.sources if name not in whole]
        if missing:
            raise ConversionError(
                f"The adapter stores {step.sources[0]} and not {', '.join(missing)}, which is one tensor with it "
                f"there. {WAY_OUT}"
            )
        config = rules.resolved(pair.config, step, to_native)
        tensors = [whole[name][1] for name in step.sources]
        op = step.rule.op
        infix = _infix(*whole[step.sources[0]][:1], step.sources[0])
        for name, tensor in zip(
            step.targets, op.backward(tensors, config) if to_native else op.forward(tensors, config)
        ):
            made[name] = (infix, tensor.contiguous())
        left -= set(step.sources)
    if left:
        raise ConversionError(
            f"The adapter stores {rules.some(sorted(left))}, for which the other model has no place. {WAY_OUT}"
        )
    return made


def _infix(name: str, plain: str) -> str:
    """What stands between module and leaf: nothing, `base_layer.` or `token_adapter.base_layer.`."""
    module, _, leaf = plain.rpartition(".")
    return name.removeprefix(f"{module}.").removesuffix(leaf)
