"""Rewrites of a variant that keep its function and bring fields of its config to what a native type has.

`to_native` and `export` use them only when a native type is asked for by name and the plain translation is not possible,
and they say which they used. Each works on our own config and tensors, in float64 and on copies; the family's ordinary
rules then do the rest. What a fold does to values is one of three classes:

    bit-exact    stored values are moved, repeated, doubled or halved; neutral ones are added
    fp32-exact   stored values are computed and rounded once to float32: outputs agree as far as float32 does
    bf16-close   the same, rounded to half precision: outputs agree as far as that does
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_variants.model.configuration_variant import VariantConfig
from hf_variants.model.normalization import ZeroCenteredLayerNorm, ZeroCenteredRMSNorm

from .errors import ConversionError, NotRepresentable
from .family import Family, family_for
from .skeleton import empty_model, stored_tensors


Load = Callable[[str], torch.Tensor]
# Field -> its value here and the only one that the native type has.
Differences = dict[str, tuple]

EXACTNESS = ("bit-exact", "fp32-exact", "bf16-close")


def worst(classes: Iterable[str]) -> str:
    """The weakest of some exactness classes; bit-exact for none."""
    return max(classes, key=EXACTNESS.index, default="bit-exact")


def _rounded(dtype: torch.dtype) -> str:
    return "fp32-exact" if torch.finfo(dtype).bits >= 32 else "bf16-close"


def is_zero_centered(module: nn.Module) -> bool:
    return isinstance(module, (ZeroCenteredRMSNorm, ZeroCenteredLayerNorm)) or getattr(module, "unit_offset", False)


@dataclass
class Rewrite:
    """A fold applied to one model; both models are skeletons without weights."""

    fold: "Fold"
    before: PreTrainedModel
    after: PreTrainedModel

    @cached_property
    def sources(self) -> dict[str, torch.Tensor]:
        return stored_tensors(self.before)

    @cached_property
    def targets(self) -> dict[str, torch.Tensor]:
        return stored_tensors(self.after)

    def value(self, field_name: str) -> tuple[Any, Any]:
        """A field before and after."""
        return getattr(self.before.config, field_name), getattr(self.after.config, field_name)

    def ratio(self, field_name: str) -> float:
        """What weights must be multiplied by so that this multiplier can change."""
        before, after = self.value(field_name)
        return before / after

    def __call__(self, load: Load) -> Load:
        """The same source of tensors, rewritten."""
        return lambda name: self.fold.tensor(self, name, load).reshape(self.targets[name].shape)


class Fold:
    """
    One kind of rewrite.

    Attributes:
        name: what it does, as reports say it.
        fields: what it can bring to the native type's values.
    """

    name: str
    fields: tuple[str, ...]

    def applies(self, model: PreTrainedModel, wanted: Differences) -> dict[str, Any] | None:
        """The changes to `model.config` towards `wanted`, or `None` if this fold does not help."""
        raise NotImplementedError

    def tensor(self, rewrite: Rewrite, name: str, load: Load) -> torch.Tensor:
        """The tensor `name` of `rewrite.after`, from those of `rewrite.before`."""
        raise NotImplementedError

    def exactness(self, rewrite: Rewrite, dtype: torch.dtype) -> str:
        """Its class for weights that are stored in `dtype`."""
        return "bit-exact"


def _scaled(tensor: torch.Tensor, factor: float | torch.Tensor, zero_centered: bool = False) -> torch.Tensor:
    """The product in float64, rounded once; of `1 + w` where `w` is what is stored."""
    offset = 1.0 if zero_centered else 0.0
    return ((tensor.double() + offset) * factor - offset).to(tensor.dtype)


def _scaled_leaf(rewrite: Rewrite, name: str, tensor: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """A weight or bias times a number, or times one number per row."""
    if isinstance(factor, torch.Tensor) and factor.ndim == 1 and tensor.ndim == 2:
        factor = factor[:, None]
    module_name, _, leaf = name.rpartition(".")
    centered = leaf == "weight" and is_zero_centered(rewrite.before.get_submodule(module_name))
    return _scaled(tensor, factor, centered)


def _scale_exactness(ratio: float, dtype: torch.dtype) -> str:
    # A power of two changes the exponent alone.
    return "bit-exact" if math.frexp(ratio)[0] == 0.5 else _rounded(dtype)


def _untied(model: PreTrainedModel) -> dict[str, Any]:
    """The change that frees the head from the embeddings, where the model has both and ties them."""
    return {"tie_word_embeddings": False} if model.config.tie_word_embeddings and hasattr(model, "lm_head") else {}


def _embedding_of(rewrite: Rewrite) -> str:
    return next(name for name in rewrite.sources if name.endswith("embed_tokens.weight"))


def _load_head(rewrite: Rewrite, name: str, load: Load) -> torch.Tensor:
    """A tensor of the model before, where a tied head is the embedding."""
    return load(name if name in rewrite.sources else _embedding_of(rewrite))


class RoundingOrder(Fold):
    """The same formula with casts or additions in another order."""

    name = "casts and sums are made in the native order"
    fields = (
        "norm_casting_mode", "heads_first_from", "unfused_bias", "broadcast_key_value", "fused_gate_up",
        "parallel_sum_order", "scale_query", "attention_score_form", "attention_scores_in_float32",
        "attention_softmax_in_float32", "rope_in_float32",
        "rope_table_in_float32", "rope_table_stored", "rope_frequencies_in_float32",
        "alibi_slopes_in_float64", "rope_result_in_float32", "alibi_form", "alibi_in_float32",
        "embedding_multiplier_in_weight_dtype", "logit_scale_by_division",
    )  # fmt: skip

    def applies(self, model, wanted):
        # None: the native config has no use for the field until other folds have changed what it belongs to.
        return {name: wanted[name][1] for name in self.fields if wanted.get(name, (None, None))[1] is not None} or None

    def tensor(self, rewrite, name, load):
        return load(name)

    def exactness(self, rewrite, dtype):
        return _rounded(dtype)


class NeutralParameters(Fold):
    """Zero biases and norm weights of one, where the native type has a parameter that is missing here."""

    name = "missing biases are added as zeros and missing norm weights as ones"
    fields = (
        "attention_bias", "attention_output_bias", "mlp_bias", "mlp_output_bias", "lm_head_bias", "norm_bias",
        "norm_affine", "qk_norm_bias", "qk_norm_affine",
    )  # fmt: skip

    def applies(self, model, wanted):
        return {name: True for name in self.fields if wanted.get(name) == (False, True)} or None

    def tensor(self, rewrite, name, load):
        if name in rewrite.sources:
            return load(name)
        module_name, _, leaf = name.rpartition(".")
        zero = leaf == "bias" or is_zero_centered(rewrite.after.get_submodule(module_name))
        like = load(next(iter(rewrite.sources)))
        return like.new_full(rewrite.targets[name].shape, 0.0 if zero else 1.0)


class UnitOffset(Fold):
    """Norm weights `w` that are applied as `1 + w`, stored as `1 + w`; and the other way."""

    name = "the norms' offset of 1 moves between weight and formula"
    fields = ("norm_unit_offset",)

    def applies(self, model, wanted):
        return {"norm_unit_offset": wanted["norm_unit_offset"][1]} if "norm_unit_offset" in wanted else None

    def tensor(self, rewrite, name, load):
        tensor = load(name)
        module_name, _, leaf = name.rpartition(".")
        before, after = (
            is_zero_centered(model.get_submodule(module_name)) for model in (rewrite.before, rewrite.after)
        )
        if leaf != "weight" or before == after:
            return tensor
        return (tensor.double() + (1.0 if before else -1.0)).to(tensor.dtype)

    def exactness(self, rewrite, dtype):
        return _rounded(dtype)


class RotaryOrder(Fold):
    """
    Rows of queries and keys reordered for another arrangement of the rotated pairs.

    Scores are sums over channels, so that queries and keys may be permuted alike; partial RoPE has its other channels
    behind the rotated ones, which stay.
    """

    def __init__(self, field_name: str, name: str):
        self.fields = (field_name,)
        self.name = name

    def applies(self, model, wanted):
        (field_name,) = self.fields
        return {field_name: wanted[field_name][1]} if field_name in wanted else None

    def order(self, rewrite: Rewrite, width: int) -> torch.Tensor:
        """The old place of every rotated channel."""
        raise NotImplementedError

    def tensor(self, rewrite, name, load):
        tensor = load(name)
        match = re.search(r"layers\.(\d+)\.self_attn\.[qk]_(proj|norm)\.(weight|bias)$", name)
        if match is None:
            return tensor
        config = rewrite.before.config
        parameters = config.rope_parameters_of(int(match.group(1)))
        if parameters is None:
            return tensor
        # "proportional" has pairs over the whole head, of which some stand still.
        partial = (parameters["rope_type"] != "proportional" and parameters.get("partial_rotary_factor")) or 1.0
        width = int(config.head_dim * partial)
        order = torch.cat([self.order(rewrite, width), torch.arange(width, config.head_dim)])
        columns = tensor.shape[1:] if match.group(2) == "proj" else ()
        return tensor.reshape(-1, config.head_dim, *columns)[:, order].reshape(tensor.shape)


class InterleavedRope(RotaryOrder):
    def order(self, rewrite, width):
        half, interleaved = torch.arange(width).view(2, -1), torch.arange(width).view(-1, 2)
        from_interleaved = rewrite.before.config.rope_interleaved
        return interleaved.T.flatten() if from_interleaved else half.T.flatten()


class ReversedRope(RotaryOrder):
    def order(self, rewrite, width):
        # Rotating (a, b) backwards is rotating (b, a) forwards.
        if rewrite.before.config.rope_interleaved:
            return torch.arange(width).view(-1, 2).flip(1).flatten()
        return torch.arange(width).view(2, -1).flip(0).flatten()


class KeyValueHeads(Fold):
    """Key/value heads repeated, up to one per query head."""

    name = "key and value heads are repeated"
    fields = ("num_key_value_heads",)

    def applies(self, model, wanted):
        ours, native = wanted.get("num_key_value_heads", (None, None))
        if not isinstance(native, int) or native < ours or native % ours:
            return None
        return {"num_key_value_heads": native}

    def tensor(self, rewrite, name, load):
        tensor = load(name)
        if not re.search(r"_attn\.([kv]_proj|k_norm)\.(weight|bias)$", name):
            return tensor
        if tensor.shape == rewrite.targets[name].shape:
            return tensor
        before, after = rewrite.value("num_key_value_heads")
        return tensor.reshape(before, -1).repeat_interleave(after // before, dim=0)


class AttentionScale(Fold):
    """The multiplier of the scores, put into the query projection, or into the queries' norm where they have one."""

    name = "the attention's scale goes into the queries"
    fields = ("attention_scaling",)

    def applies(self, model, wanted):
        ours, native = wanted.get("attention_scaling", (None, None))
        config = model.config
        if not isinstance(native, (int, float)) or native <= 0 or not ours:
            return None
        if config.qk_norm == "none" and config.clip_qkv is not None:
            return None
        if config.qk_norm != "none" and not config.qk_norm_affine:
            return None
        return {"attention_scaling": native}

    def _ratio(self, rewrite: Rewrite) -> float:
        before, after = rewrite.value("attention_scaling")
        return (rewrite.before.config.head_dim**-0.5 if before is None else before) / after

    def tensor(self, rewrite, name, load):
        target = "q_proj" if rewrite.before.config.qk_norm == "none" else "q_norm"
        tensor = load(name)
        if not re.search(rf"_attn\.{target}\.(weight|bias)$", name):
            return tensor
        return _scaled_leaf(rewrite, name, tensor, self._ratio(rewrite))

    def exactness(self, rewrite, dtype):
        if rewrite.before.config.qk_norm != "none" and rewrite.before.config.norm_unit_offset:
            return _rounded(dtype)
        return _scale_exactness(self._ratio(rewrite), dtype)


class Untie(Fold):
    """An own copy of the embeddings for the head."""

    name = "the head gets its own copy of the tied embeddings"
    fields = ("tie_word_embeddings",)

    def applies(self, model, wanted):
        if wanted.get("tie_word_embeddings") != (True, False):
            return None
        return {"tie_word_embeddings": False}

    def tensor(self, rewrite, name, load):
        return _load_head(rewrite, name, load)


class EmbeddingMultiplier(Fold):
    """The embeddings' multiplier, put into their weights; a tied head is freed first, since it must not change."""

    name = "the embedding multiplier goes into the embeddings"
    fields = ("embedding_multiplier",)

    def applies(self, model, wanted):
        ours, native = wanted.get("embedding_multiplier", (None, None))
        return {"embedding_multiplier": native, **_untied(model)} if ours and native else None

    def tensor(self, rewrite, name, load):
        tensor = _load_head(rewrite, name, load)
        return _scaled(tensor, rewrite.ratio(self.fields[0])) if name == _embedding_of(rewrite) else tensor

    def exactness(self, rewrite, dtype):
        return _scale_exactness(rewrite.ratio(self.fields[0]), dtype)


class HeadScale(Fold):
    """A multiplier around the head, put into its weights; it is freed from the embeddings first."""

    def __init__(self, field_name: str, scaled: tuple[str, ...], name: str):
        self.fields = (field_name,)
        self.scaled = scaled
        self.name = name

    def applies(self, model, wanted):
        (field_name,) = self.fields
        ours, native = wanted.get(field_name, (None, None))
        # Normalised rows forget what they are multiplied by.
        if not ours or not native or model.config.lm_head_normalized:
            return None
        return {field_name: native, **_untied(model)}

    def tensor(self, rewrite, name, load):
        tensor = _load_head(rewrite, name, load)
        return _scaled(tensor, rewrite.ratio(self.fields[0])) if name in self.scaled else tensor

    def exactness(self, rewrite, dtype):
        return _scale_exactness(rewrite.ratio(self.fields[0]), dtype)


def _branch_of(rewrite: Rewrite, name: str) -> str | None:
    """`layers.3.mlp` where `name` is of the last affine module of that branch: what scales its output."""
    has_norm = rewrite.before.config.norm_placement in ("branch", "sandwich")
    last = r"_branch_norm" if has_norm else r"\.(?:o_proj|down_proj)"
    match = re.fullmatch(rf"(.*layers\.\d+\.(?:self_attn|cross_attn|mlp)){last}\.(?:weight|bias)", name)
    return match and match.group(1)


def _scales_branches(config: VariantConfig) -> bool:
    return config.norm_placement not in ("branch", "sandwich") or config.norm_affine


class ResidualMultiplier(Fold):
    """The branches' multiplier, put into what each branch ends with."""

    name = "the residual multiplier goes into the branches' output"
    fields = ("residual_multiplier",)

    def applies(self, model, wanted):
        ours, native = wanted.get("residual_multiplier", (None, None))
        return {"residual_multiplier": native} if ours and native and _scales_branches(model.config) else None

    def tensor(self, rewrite, name, load):
        tensor = load(name)
        if _branch_of(rewrite, name) is None:
            return tensor
        return _scaled_leaf(rewrite, name, tensor, rewrite.ratio(self.fields[0]))

    def exactness(self, rewrite, dtype):
        config = rewrite.before.config
        if config.norm_placement in ("branch", "sandwich") and config.norm_unit_offset:
            return _rounded(dtype)
        return _scale_exactness(rewrite.ratio(self.fields[0]), dtype)


class LayerScale(Fold):
    """Learned scales of the branches (LayerScale, ReZero), put into what each branch ends with."""

    name = "learned layer scales go into the branches' output"
    fields = ("learned_scale_type",)

    def applies(self, model, wanted):
        if wanted.get("learned_scale_type", (None, None))[1] != "none" or not _scales_branches(model.config):
            return None
        return {"learned_scale_type": "none", "layer_scale_init": 1.0}

    def tensor(self, rewrite, name, load):
        tensor, branch = load(name), _branch_of(rewrite, name)
        return (
            tensor
            if branch is None
            else _scaled_leaf(rewrite, name, tensor, load(f"{branch}_residual.scale").double())
        )

    def exactness(self, rewrite, dtype):
        return _rounded(dtype)


class TypesAmongTokens(Fold):
    """Token types that a native class has no name for."""

    name = "token types among the tokens are left out, for calls without `token_type_ids`"
    fields = ("token_type_table",)

    def applies(self, model, wanted):
        return {"token_type_table": "own"} if "token_type_table" in wanted else None

    def tensor(self, rewrite, name, load):
        return load(name)


class WhoMultiplies(Fold):
    """The embeddings' multiplier in the stack or in the embedding, which token ids cannot tell apart."""

    name = "`inputs_embeds` are multiplied as the native class does, which makes no difference to token ids"
    fields = ("embedding_multiplier_position",)

    def applies(self, model, wanted):
        position = wanted.get("embedding_multiplier_position", (None, None))[1]
        return position and {"embedding_multiplier_position": position}

    def tensor(self, rewrite, name, load):
        return load(name)


FOLDS: tuple[Fold, ...] = (
    RoundingOrder(),
    TypesAmongTokens(),
    WhoMultiplies(),
    NeutralParameters(),
    UnitOffset(),
    InterleavedRope("rope_interleaved", "rotary channels are reordered between pairs and halves"),
    ReversedRope("rope_reversed", "rotary channels change places for the other sense of rotation"),
    KeyValueHeads(),
    AttentionScale(),
    EmbeddingMultiplier(),
    HeadScale("logit_scale", ("lm_head.weight", "lm_head.bias"), "the logit scale goes into the head"),
    HeadScale("lm_head_input_scale", ("lm_head.weight",), "the scale of the head's input goes into the head"),
    Untie(),
    ResidualMultiplier(),
    LayerScale(),
)


@dataclass
class Folding:
    """
    The rewrites that make a variant expressible in a native type, in order; none where it is expressible as it is.

    Attributes:
        config: of the rewritten variant.
        rewrites: see `Rewrite`.
    """

    config: VariantConfig
    rewrites: list[Rewrite] = field(default_factory=list)

    def exactness(self, dtype: torch.dtype) -> str:
        return worst(rewrite.fold.exactness(rewrite, dtype) for rewrite in self.rewrites)

    def sentences(self, dtype: torch.dtype) -> list[str]:
        """Every rewrite with its class, for people."""
        return [f"{rewrite.fold.name} ({rewrite.fold.exactness(rewrite, dtype)})" for rewrite in self.rewrites]

    def apply(self, names: Iterable[str], load: Load) -> tuple[list[str], Load]:
        """
        The names of the rewritten variant's tensors and their source.

        Raises:
            ConversionError: if the tensors are not those of the variant.
        """
        names = list(names)
        if not self.rewrites:
            return names, load
        expected = self.rewrites[0].sources
        if strange := sorted(set(names) ^ set(expected)):
            raise ConversionError(
                f"Tensors of the checkpoint and of its config differ in {strange[:6]}. "
                "Check that the config belongs to these weights."
            )
        load = _checked(load, expected)
        for rewrite in self.rewrites:
            load = rewrite(load)
        return list(self.rewrites[-1].targets), load


def _checked(load: Load, expected: dict[str, torch.Tensor]) -> Load:
    def checked(name: str) -> torch.Tensor:
        tensor = load(name)
        if tensor.shape != expected[name].shape:
            raise ConversionError(
                f"{name} has shape {tuple(tensor.shape)} where the config wants {tuple(expected[name].shape)}. "
                "The config does not belong to these weights."
            )
        return tensor

    return checked


def plan(config: VariantConfig, model_type: str, head: str) -> tuple[Family, PreTrainedConfig, Folding]:
    """
    The native config of a variant, after as few folds as it takes.

    Args:
        config: the variant's.
        model_type: the native type.
        head: of the model, as `"causal_lm"`.

    Raises:
        NotRepresentable: naming every field that no fold brings to the native type's value.
    """
    family = family_for(model_type, config)
    if head not in family.heads:
        raise NotRepresentable(
            model_type, {"model_type": (config.model_type, family.config_map.config_class.model_type)}
        )
    folding = Folding(config)
    unused = list(FOLDS)
    model: PreTrainedModel | None = None
    while True:
        try:
            return family, family.config_map.to_native(folding.config, head), folding
        except NotRepresentable as error:
            # Folds know one stack, whose layers are alike.
            if not isinstance(config, VariantConfig) or config.is_heterogeneous:
                raise
            model = model or empty_model(family.variant_class(head), folding.config)
            rewrite = _next_rewrite(model, error.fields, unused)
            if rewrite is None:
                raise
            unused.remove(rewrite.fold)
            folding.rewrites.append(rewrite)
            model, folding.config = rewrite.after, rewrite.after.config


def _next_rewrite(model: PreTrainedModel, wanted: Differences, folds: list[Fold]) -> Rewrite | None:
    for fold in folds:
        changes = fold.applies(model, wanted)
        if changes is None:
            continue
        try:
            config = VariantConfig.from_dict({**model.config.to_dict(), **changes})
        except (ValueError, StrictDataclassError):
            # A value that the native type has only together with others, which differ here as well.
            continue
        return Rewrite(fold, model, empty_model(type(model), config))
    return None
