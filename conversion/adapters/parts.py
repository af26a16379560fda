"""Does an adapter belong to a model, and on which of its modules is each tensor?"""

import copy
import warnings
from dataclasses import dataclass

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from transformers import PreTrainedModel

from .. import rules
from ..errors import ConversionError
from .files import Adapter
from .settings import is_initialised_from_base


def _wrapped(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """What PEFT makes of a model without memory: every module that the config means is found by PEFT itself."""
    config = copy.deepcopy(config)
    if is_initialised_from_base(config):
        config.init_lora_weights = True
    for name in ("num_layers", "token_dim", "num_attention_heads") if config.is_prompt_learning else ():
        # Of the model, and not what the adapter says of it.
        setattr(config, name, None)
    model_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model_class(copy.deepcopy(model), config, low_cpu_mem_usage=True)


def _saved_shapes(wrapped: PeftModel) -> dict[str, torch.Size]:
    if wrapped.active_peft_config.is_prompt_learning:
        # Their modules compute what is saved, which they cannot without memory.
        whole = [
            f"base_model.{module}.{name}"
            for module, layer in wrapped.base_model.named_modules()
            if isinstance(layer, ModulesToSaveWrapper)
            for name in layer.original_module.state_dict()
        ]
        own = {f"base_model.{name}": tensor.shape for name, tensor in wrapped.get_base_model().state_dict().items()}
        own = {name.replace(".original_module.", "."): shape for name, shape in own.items()}
        prompts = wrapped.prompt_encoder[wrapped.active_adapter].embedding.weight.shape
        return {"prompt_embeddings": prompts} | {name: own[name] for name in whole}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return {name: tensor.shape for name, tensor in state.items()}


def plain_name(name: str) -> str:
    """The model's own name for a tensor, without the layers that PEFT puts around a module."""
    return name.replace(".token_adapter.", ".").replace(".base_layer.", ".")


def check(adapter: Adapter, model: PreTrainedModel, what: str) -> PeftModel:
    """
    That an adapter's tensors are those that its config makes on this model.

    Args:
        model: without memory; its vocabulary is the adapter's.
        what: of the adapter, for messages.

    Returns:
        the model with the adapter's modules, without memory.

    Raises:
        ConversionError: naming tensors that are missing, unknown, or of another shape.
    """
    try:
        wrapped = _wrapped(model, adapter.config)
    except (ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        raise ConversionError(
            f"{what} ({adapter.method}) does not fit {type(model).__name__}: {error}. Check that "
            "`base_model_name_or_path` names the model that it was trained on."
        ) from error
    shapes, own = _saved_shapes(wrapped), model.state_dict()
    extra = {
        name: own[plain].shape
        for name in adapter.tensors
        if name not in shapes and (plain := plain_name(name.removeprefix(adapter.prefix))) in own
    }
    expected = shapes | extra
    if adapter.config.is_prompt_learning:
        expected |= {name: t.shape for name, t in adapter.tensors.items() if not name.startswith(adapter.prefix)
                     and name not in expected}  # fmt: skip
    # A pruned AdaLoRA has smaller tensors, as its config says.
    pruned = adapter.config.peft_type == PeftType.ADALORA and getattr(adapter.config, "rank_pattern", None)
    for kind, names in (
        ("lacks", sorted(shapes.keys() - adapter.tensors.keys())),
        ("has no module for", sorted(adapter.tensors.keys() - expected.keys())),
        (
            "has another shape for",
            [] if pruned else sorted(n for n in expected.keys() & adapter.tensors.keys()
                                     if adapter.tensors[n].shape != expected[n]),
        ),
    ):  # fmt: skip
        if names:
            subject = f"{type(model).__name__}" if kind != "lacks" else what
            raise ConversionError(
                f"{what} does not belong to this model: {subject} {kind} {rules.some(names, 3)}. Check that "
                "`base_model_name_or_path` names the model that it was trained on."
            )
    return wrapped


@dataclass
class Parts:
    """An adapter sorted: parameters by the module they are on, tensors stored whole, and what is no module's."""

    modules: dict[str, dict[str, torch.Tensor]]
    whole: dict[str, tuple[str, torch.Tensor]]
    shared: dict[str, torch.Tensor]
    saved_modules: set[str]


def sorted_parts(adapter: Adapter, model: PreTrainedModel, wrapped: PeftModel) -> Parts:
    inner = wrapped.base_model if adapter.config.is_prompt_learning else wrapped.base_model.model
    layers = {n for n, m in inner.named_modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))}
    saved = {name for name, module in inner.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    own, own_modules = model.state_dict(), dict(model.named_modules())
    parts = Parts({}, {}, {}, saved)
    for key, tensor in adapter.tensors.items():
        name = key.removeprefix(adapter.prefix)
        if name == key:
            parts.shared[key] = tensor
        elif (plain := plain_name(name)) in own:
            parts.whole[plain] = (name, tensor)
        else:
            module, suffix = name, ""
            while module and module not in layers:
                module, _, last = module.rpartition(".")
                suffix = f"{last}.{suffix}" if suffix else last
            while module and module not in own_modules:
                # Of nested layers the inner ones are PEFT's.
                module, _, last = module.rpartition(".")
                suffix = f"{last}.{suffix}"
            if not module:
                parts.shared[key] = tensor
            else:
                parts.modules.setdefault(module, {})[suffix] = tensor
    return parts
