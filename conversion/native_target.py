"""Which native type can express a variant, and how its tensors are made."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_variants.model.configuration_variant import VariantConfig

from . import folds, tensor_files
from .config_map import leaves_out_the_pooler
from .errors import NotRepresentable
from .family import Family, all_families_and_parts, family_for
from .folds import Folding
from .skeleton import empty_model
from .translation import Translation, check_ties, translation_between


# What engines and tools support best, tried first where several types fit.
WIDELY_KNOWN = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "gpt2",
    "gpt_neox",
    "t5",
    "bart",
)


def native_config_for(
    config: VariantConfig, model_type: str | None = None, head: str = "causal_lm"
) -> tuple[Family, PreTrainedConfig]:
    """
    The native family that can express a variant as it is, and its config.

    Args:
        model_type: the type to use; by default the one it was converted from, or else the first that fits, of which
            those that most engines know come first.
        head: that the type must have a class for.

    Raises:
        NotRepresentable: naming every field in the way and, without `model_type`, the nearest type.
    """
    if model_type is not None:
        family = family_for(model_type, config)
        return family, family.config_map.to_native(config, head)
    origin = (config.native_leftovers or {}).get("model_type")
    candidates = [family for family in all_families_and_parts() if isinstance(config, family.config_map.config_class)]
    nearest: NotRepresentable | None = None
    order = (origin, *WIDELY_KNOWN)
    ranks = {model_type: rank for rank, model_type in reversed(list(enumerate(order)))}
    for family in sorted(candidates, key=lambda family: ranks.get(family.model_type, len(order))):
        # Importing every native class takes seconds, and the first one usually fits.
        if family.native_class(head) is None:
            continue
        try:
            return family, family.config_map.to_native(config, head)
        except NotRepresentable as error:
            if "config" not in error.fields and (nearest is None or len(error.fields) < len(nearest.fields)):
                nearest = error
    if nearest is None:
        raise NotRepresentable("native", {"config": ("this variant", "no type that comes near")})
    raise NotRepresentable(nearest.model_type, nearest.fields, advice=_advice(config, nearest.model_type, head))


def _advice(config: VariantConfig, nearest: str, head: str) -> str:
    """What to do when no native type can express a variant as it is."""
    try:
        _, _, folding = folds.plan(config, nearest, head)
    except NotRepresentable:
        return (
            "No supported native type can express it; this one comes nearest. Change those fields, or share the model "
            "as a variant."
        )
    ways = "; ".join(folding.sentences(config.dtype or torch.float32))
    return f"Ask for {nearest} by name to have the difference folded into the weights: {ways}."


def target_of(config: VariantConfig, model_type: str | None, head: str) -> tuple[Family, PreTrainedConfig, Folding]:
    """What to export to, with the folds that a type which is asked for by name needs."""
    if model_type is None:
        family, native_config = native_config_for(config, head=head)
        folding = Folding(config)
    else:
        family, native_config, folding = folds.plan(config, model_type, head)
    if family.native_class(head) is None:
        raise NotRepresentable(family.model_type, {"architectures": (family.variant_class(head).__name__, None)})
    return family, native_config, folding


def exported(
    family: Family,
    head: str,
    model: PreTrainedModel,
    names: list[str],
    load: tensor_files.TensorSource,
    native_config: PreTrainedConfig,
    folding: Folding,
) -> tuple[PreTrainedModel, Translation]:
    """An empty native model, and the way to its tensors."""
    native_class = family.native_class(head)
    target = empty_model(native_class, native_config, **without_pooler(model.config, head, native_class))
    if not model.config.tie_word_embeddings:
        target.all_tied_weights_keys.pop(family.loosely_tied, None)
    names = check_ties(model, names, load)
    names, load = folding.apply(names, load)
    source = folding.rewrites[-1].after if folding.rewrites else model
    return target, translation_between(family, head, source, target, names, load, folding.config, to_native=True)


def without_pooler(config: PreTrainedConfig, head: str, native_class: type[PreTrainedModel]) -> dict[str, bool]:
    """The argument with which a stock class makes a bare encoder without a pooler, where ours has none."""
    return {"add_pooling_layer": False} if leaves_out_the_pooler(config, head, (native_class,)) else {}
