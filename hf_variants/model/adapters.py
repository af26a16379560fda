"""What a model changes or refuses when an adapter (PEFT's, known by its interface) replaces one of its modules.

PEFT merges an adapter into the weight of the module that it wraps. Where embeddings are tied, that weight is another
module's too, which would change with it or be changed twice. So a module that is wrapped gets a weight of its own.
"""

import torch
from torch import nn
from transformers.utils import logging

from .heads import NormalizedLinear


logger = logging.get_logger(__name__)


def saved_copies(module: nn.Module) -> list[nn.Module]:
    """What PEFT trains in a module's place (`modules_to_save`), one per adapter."""
    return list(getattr(module, "modules_to_save", {}).values())


def adapters_are_tied(first: nn.Module, second: nn.Module, tied: nn.Parameter) -> bool:
    """
    Whether two modules around one tied weight have another parameter in common, or views of it.

    Storages are compared, which parameters have on the meta device, too.
    """
    tied_storage = tied.untyped_storage()._cdata
    first_storages, second_storages = (
        {parameter.untyped_storage()._cdata for parameter in module.parameters()} - {tied_storage}
        for module in (first, second)
    )
    return not first_storages.isdisjoint(second_storages)


class NormGuard:
    """Mixed into what holds norms, before `nn.Module`: LN-tuning on a norm without parameters fails somewhere else."""

    def __setattr__(self, name: str, value) -> None:
        # Only of modules: other values may answer to every name.
        tunes_norm = isinstance(value, nn.Module) and hasattr(value, "ln_tuning_layers")
        if tunes_norm and not any(True for _ in value.parameters()):
            raise ValueError(
                f"LN-tuning finds nothing to train in `{name}`, a norm without parameters (`norm_affine` or "
                "`qk_norm_affine` is False). Name norms with parameters in `target_modules`, or use another method."
            )
        super().__setattr__(name, value)


class AdapterGuard(NormGuard):
    """Mixed into the models, before `PreTrainedModel`."""

    def __setattr__(self, name: str, value) -> None:
        if isinstance(value, nn.Module):
            if name in ("embed_tokens", "lm_head"):
                self._check_wrapper(name, value)
            elif name == "qa_outputs" and saved_copies(value):
                self._check_fresh_layer()
        super().__setattr__(name, value)

    def tie_weights(self, *args, **kwargs) -> None:
        """As in transformers; notes in each module how many share its weight, which the module cannot know."""
        names = {name for pair in self.all_tied_weights_keys.items() for name in pair}
        modules = [self.get_submodule(name.rpartition(".")[0]) for name in sorted(names)]
        if any(hasattr(module, "base_layer") for module in modules):
            raise ValueError(
                "Embeddings or LM head carry an adapter, and what is inside it cannot be tied again. "
                "Call `unload()` or `merge_and_unload()` first."
            )
        super().tie_weights(*args, **kwargs)
        weights = [getattr(module, "weight", None) for module in modules]
        for module, weight in zip(modules, weights, strict=True):
            module.weight_sharers = sum(other is weight for other in weights)

    def correct_ties(self) -> None:
        """Make the config say of each tie what the weights say, which merged adapters may have changed."""
        pairs = [
            (model.get_submodule(target.removesuffix(".weight")), model.get_submodule(source.removesuffix(".weight")))
            for model in self.modules()
            for target, source in (getattr(model, "_tied_weights_keys", None) or {}).items()
        ]
        weights = {module: module._parameters.get("weight") for pair in pairs for module in pair}
        if any(weight is None or weight.is_meta for weight in weights.values()):
            return
        for target, source in pairs:
            first, second = weights[target], weights[source]
            field = "share_embeddings" if isinstance(target, nn.Embedding) else "tie_word_embeddings"
            if getattr(self.config, field):
                agree = first is second or torch.equal(first, second.to(first.device))
            else:
                agree = first is not second
            if not agree:
                setattr(self.config, field, not getattr(self.config, field))
                logger.warning(f"`{field}` is saved as {getattr(self.config, field)}, which is what the weights are.")
            # What is not tied to its source must not be taken for a duplicate of a third weight when it is saved.
            if first is not second and sum(first is other for other in weights.values()) > 1:
                target.weight = weights[target] = nn.Parameter(first.detach().clone(), first.requires_grad)

    def _check_wrapper(self, name: str, wrapper: nn.Module) -> None:
        if saved := saved_copies(wrapper):
            original = wrapper.original_module
            is_tied = name == "lm_head" and any(
                copy.weight is embedding.weight
                for copy in saved
                for embedding in saved_copies(self.get_input_embeddings())
            )
            # `ensure_weight_tying` puts a plain layer in the head's place, and knows of one embedding.
            if is_tied and (
                isinstance(original, NormalizedLinear)
                or len(list(original.parameters())) > 1
                or getattr(original, "weight_sharers", 2) > 2
            ):
                raise ValueError(
                    "`ensure_weight_tying` would lose the bias or the normalisation of `lm_head`, or its tie to a "
                    'second embedding. Use `modules_to_save=["embed_tokens", "lm_head"]` without it.'
                )
            return
        token_layer = getattr(wrapper, "token_adapter", wrapper)
        trains_tokens = hasattr(token_layer, "trainable_tokens_delta")
        layer = token_layer
        while hasattr(layer, "base_layer"):
            layer = layer.base_layer
        if layer is wrapper:
            return
        if isinstance(layer, NormalizedLinear) or (trains_tokens and name == "lm_head" and layer.bias is not None):
            raise ValueError(
                f"PEFT leaves the bias or the normalisation of `{name}` out of what this adapter computes or merges. "
                'Use `modules_to_save=["embed_tokens", "lm_head"]` instead.'
            )
        sharers = getattr(layer, "weight_sharers", 1)
        if trains_tokens:
            # PEFT ties the trained tokens of an embedding and a head itself.
            if sharers > 2:
                raise ValueError(
                    "PEFT would train tokens apart in the stacks that share one embedding (`share_embeddings`). "
                    'Use `modules_to_save=["embed_tokens", "lm_head"]` instead.'
                )
        elif sharers > 1:
            # Whether the other stack's embedding gets one depends on the order of a set, which each process draws.
            if sharers > 2 and adapters_are_tied(self.get_input_embeddings(), wrapper, layer.weight):
                raise ValueError(
                    "`ensure_weight_tying` ties the adapters of `lm_head` and of one stack's embedding, and the other "
                    "stack shares that weight as well (`share_embeddings`). Leave `ensure_weight_tying` out, or use "
                    '`modules_to_save=["embed_tokens", "lm_head"]` without it.'
                )
            layer.weight = nn.Parameter(layer.weight.detach().clone(), layer.weight.requires_grad)
            layer.weight_sharers = 1
            logger.warning(
                f"An adapter is on `{name}`, whose weight is tied. It gets a copy of its own, so that merging is "
                "right, and a merged model is saved untied. To train tied embeddings and keep them tied, use "
                '`modules_to_save=["embed_tokens"]` and `ensure_weight_tying=True`; to tie again after `unload()`, '
                "call `tie_weights()`."
            )

    def _check_fresh_layer(self) -> None:
        transform = getattr(self, "pre_classifier", None)
        if isinstance(transform, nn.Module) and not saved_copies(transform):
            logger.warning(
                "PEFT trains and saves `qa_outputs`, not the layer in front of it (`classifier_transform_on_tokens`). "
                'If that is new, too, pass `modules_to_save=["pre_classifier"]`.'
            )
