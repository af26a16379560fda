"""How a layer knows position: rotary, learned, sinusoidal, ALiBi and relative biases, and position ids themselves."""

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.utils import is_tracing

from .axis import LIST_OF_LAYERS, ROUNDING, Axis, Check, Idle, VariantConfigError, axis, setting
from .part import SHAPES, states
from .stack import LAYER_TYPE_LETTERS


ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")

# Of RoPE parameters, what is divided by or raised to a power; others may be 0 (`mscale_all_dim`).
POSITIVE_ROPE_KEYS = (
    "rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings", "low_freq_factor",
    "high_freq_factor", "beta_fast", "beta_slow",
)  # fmt: skip
POSITIVE_ROPE_LISTS = ("short_factor", "long_factor")
# What transformers' RoPE functions read without a default, beside `rope_theta`.
ROPE_KEYS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@axis
class PositionsAxis(Axis):
    """
    position_embedding_type (`str`): `"rope"`, `"learned"`, `"sinusoidal"`, `"alibi"`, `"relative_bias"` (T5) or
        `"none"`.
    rope_parameters (`dict`): transformers' standard dictionary, flat or per layer type (`None`: no rotation).
    rope_interleaved (`bool`): rotate pairs (0, 1), (2, 3) (GPT-J, Cohere) instead of halves (Llama).
    rope_reversed (`bool`): rotate by the negative angle (nanochat).
    rope_turns_values (`bool`): values are rotated as keys are (RoFormer's `rotary_value`).
    rope_table_in_checkpoint (`bool`): sin and cos of `max_position_embeddings` positions are a frozen parameter, so that a
        checkpoint decides how far a position turns (RoFormer).
    longrope_recomputes_cache (`bool`): generation drops the cache where the length passes the original context of
        rope type `"longrope"`, so that all keys get the long factors (Phi-3).
    no_rope_layers (`list[int]`): as in SmolLM3: per layer, 1 where the rotation is applied and 0 where not.
    layer_rope_theta (`list[float]`): per layer, the base that replaces `rope_theta`; 0 where nothing is rotated
        (Granite SWA).
    position_offset (`int`): added to the index into a learned or sinusoidal table (OPT, BART: 2).
    position_ids_source (`str`): where absent `position_ids` come from: `"sequence"` (0, 1, 2, ...),
        `"attention_mask"` (count of real tokens so far, OPT) or `"input_ids"` (count of non-padding tokens, with
        padding at index `pad_token_id`, RoBERTa; that row of a learned table is frozen as the embedding's).
    generation_counts_padding (`bool`): in `generate`, padding has positions as tokens have (the decoders alone of BART
        and its relatives); otherwise the tokens that the mask shows are counted.
    padding_mask_source (`str`): what stands for an absent `attention_mask`: `"none"` (every token is real) or
        `"input_ids"` (tokens other than `pad_token_id` are; a pass of a decoder that has a cache, or makes one in
        evaluation, takes every token as real all the same, T5Gemma).
    sinusoidal_layout (`str`): `"interleaved"` sin/cos pairs (2017), `"half"` sin | cos (Marian), `"half_in_float32"` (the
        same, computed in float32; CTRL) or `"tensor2tensor"` (sin | cos with the exponent's divisor d/2 - 1; XGLM,
        M2M-100).
    sinusoidal_padding_zero (`bool`): the table's row `pad_token_id` is zero.
    sinusoidal_table_stored (`bool`): the table is a frozen parameter and part of a checkpoint (Marian, Pegasus).
    sinusoidal_table_grows (`bool`): a longer input makes a longer table (M2M-100), instead of failing.
    alibi_bias_max (`int`): the largest exponent of a slope (https://arxiv.org/abs/2108.12409: 8).
    alibi_slope_order (`str`): order of slopes when the number of heads is no power of two: `"paper"` or `"mpt"`.
    alibi_divisor (`float`): divides the bias (Falcon: the square root of `head_dim`, as the scores).
    relative_attention_num_buckets, relative_attention_max_distance (`int`): T5's buckets.
    relative_attention_per_layer (`bool`): a table in every layer (UMT5) instead of one for the stack (T5).

    Rounding:
    rope_in_float32 (`bool`): rotate in float32 (Cohere); rope_table_in_float32 (`bool`): keep cos and sin in
        float32 (OLMo 2, ERNIE 4.5).
    rope_result_in_float32 (`bool`): leave rotated queries and keys in float32 up to the scores of eager attention;
        a cache rounds the keys (CodeGen).
    rope_table_stored (`bool`): read cos and sin from a table of `max_position_embeddings` positions that is cast
        with the weights, and to the queries' dtype where it is used (GPT-J), instead of computing them for the
        positions at hand.
    rope_frequencies_in_float32 (`bool`): the frequencies stay in float32 when the weights are cast (Baichuan).
    alibi_form (`str`): `"distance"` (paper), `"key_position"` (BLOOM: slope times the key's position counted over
        real tokens), `"key_index"` (Baichuan: slope times the key's index) or `"key_offset"` (MPT: slope times the
        key's index minus the last one). Equal after the softmax in exact arithmetic, not in floating point.
    alibi_slopes_in_bfloat16 (`bool`): slopes and products are rounded to bfloat16 (Falcon).
    alibi_slopes_in_float64 (`bool`): slopes of the paper's order are rounded to float32 once, at the end (Baichuan).
    alibi_in_float32 (`bool`): eager attention adds the bias in float32 instead of the activations' dtype (MPT).
    """

    title = "positions"

    position_embedding_type: Literal["rope", "learned", "sinusoidal", "alibi", "relative_bias", "none"] = "rope"
    rope_parameters: dict | None = None
    rope_interleaved: bool = False
    rope_reversed: bool = False
    rope_turns_values: bool = False
    rope_table_in_checkpoint: bool = False
    longrope_recomputes_cache: bool = False
    no_rope_layers: list[int] | None = setting(None, LIST_OF_LAYERS)
    layer_rope_theta: list[int | float] | None = setting(None, LIST_OF_LAYERS)
    position_offset: int = 0
    position_ids_source: Literal["sequence", "attention_mask", "input_ids"] = "sequence"
    generation_counts_padding: bool = False
    padding_mask_source: Literal["none", "input_ids"] = "none"
    sinusoidal_layout: Literal["interleaved", "half", "half_in_float32", "tensor2tensor"] = "interleaved"
    sinusoidal_padding_zero: bool = False
    sinusoidal_table_stored: bool = False
    sinusoidal_table_grows: bool = False
    alibi_bias_max: int = 8
    alibi_slope_order: Literal["paper", "mpt"] = "paper"
    alibi_divisor: int | float = 1.0
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    relative_attention_per_layer: bool = False

    rope_in_float32: bool = setting(False, ROUNDING)
    rope_table_in_float32: bool = setting(False, ROUNDING)
    rope_result_in_float32: bool = setting(False, ROUNDING)
    rope_table_stored: bool = setting(False, ROUNDING)
    rope_frequencies_in_float32: bool = setting(False, ROUNDING)
    alibi_form: Literal["distance", "key_position", "key_index", "key_offset"] = setting("distance", ROUNDING)
    alibi_slopes_in_bfloat16: bool = setting(False, ROUNDING)
    alibi_slopes_in_float64: bool = setting(False, ROUNDING)
    alibi_in_float32: bool = setting(False, ROUNDING)

    def derive(self) -> None:
        # A copy, because transformers completes the dictionary in place, with this config's context length.
        self.rope_parameters = copy.deepcopy(self.rope_parameters)
        if self.no_rope_layers is None:
            self.no_rope_layers = [1] * self.num_hidden_layers

    def checks(self) -> list[Check]:
        rope = self.position_embedding_type == "rope"
        table_positions = self.position_embedding_type in ("learned", "sinusoidal")
        return [
            Check(
                len(self.no_rope_layers) != self.num_hidden_layers,
                f"`no_rope_layers` has {len(self.no_rope_layers)} entries for {self.num_hidden_layers} layers.",
                "Give one per layer: 1 where the rotation is applied, 0 where not.",
            ),
            Check(
                bool(set(self.no_rope_layers) - {0, 1}),
                "`no_rope_layers` has entries other than 0 and 1.",
                "Write 1 where the rotation is applied and 0 where not.",
            ),
            Check(
                self.layer_rope_theta is not None
                and (
                    len(self.layer_rope_theta) != self.num_hidden_layers or min(self.layer_rope_theta, default=0) < 0
                ),
                f"`layer_rope_theta` is {self.layer_rope_theta} for {self.num_hidden_layers} layers.",
                "Give one base per layer, and 0 for layers without a rotation.",
            ),
            Check(
                not rope and 0 in self.no_rope_layers,
                f"`no_rope_layers` switches the rotation off in some layers, but `position_embedding_type` is "
                f"{self.position_embedding_type}.",
                "Set `position_embedding_type='rope'` or leave `no_rope_layers` unset.",
            ),
            Check(
                not rope
                and any(
                    (
                        self.rope_interleaved,
                        self.rope_in_float32,
                        self.rope_table_in_float32,
                        self.rope_reversed,
                        self.rope_turns_values,
                        self.rope_table_in_checkpoint,
                        self.rope_result_in_float32,
                        self.rope_table_stored,
                        self.rope_frequencies_in_float32,
                        self.layer_rope_theta is not None,
                    )
                ),
                f"A `rope_*` field or `layer_rope_theta` is set, but `position_embedding_type` is "
                f"{self.position_embedding_type}.",
                "Set `position_embedding_type='rope'` or leave those fields unset.",
            ),
            Check(
                self.longrope_recomputes_cache
                and (not rope or all(entry["rope_type"] != "longrope" for entry in self._flat_rope_parameters())),
                "`longrope_recomputes_cache` is set, but `rope_parameters` has no longrope.",
                "Set `longrope_recomputes_cache=False`, or `rope_type` to 'longrope'.",
            ),
            Check(
                self.rope_table_in_float32 and not self.rope_in_float32,
                "`rope_table_in_float32` is set without `rope_in_float32`, so the rotation would change q's dtype.",
                "Set both, or neither.",
            ),
            Check(
                self.rope_result_in_float32 and not (self.rope_in_float32 and self.attention_scores_in_float32),
                "`rope_result_in_float32` is set without `rope_in_float32` and `attention_scores_in_float32`, so there "
                "is no result in float32, or nothing that takes it.",
                "Set all three, or leave `rope_result_in_float32` unset.",
            ),
            Check(
                rope
                and self.rope_table_stored
                and any(
                    entry["rope_type"] in ("dynamic", "longrope") or "llama_4_scaling_beta" in entry
                    for entry in self._flat_rope_parameters()
                ),
                "`rope_table_stored` is set, but the `rope_type` depends on the length of the input, or "
                "`llama_4_scaling_beta` asks for more than a table.",
                "Set `rope_table_stored=False`, or other `rope_parameters`.",
            ),
            Check(
                rope
                and self.rope_frequencies_in_float32
                and (
                    self.rope_table_stored
                    or any("llama_4_scaling_beta" in entry for entry in self._flat_rope_parameters())
                ),
                "`rope_frequencies_in_float32` is set with `rope_table_stored` or `llama_4_scaling_beta`.",
                "Set `rope_frequencies_in_float32=False`.",
            ),
            Check(
                rope
                and self.rope_table_in_checkpoint
                and any(
                    entry.get("rope_type", "default") != "default" or "llama_4_scaling_beta" in entry
                    for entry in self._flat_rope_parameters()
                ),
                "`rope_table_in_checkpoint` is set, but `rope_parameters` asks for more than the plain angles that such a "
                "table begins with.",
                "Set `rope_table_in_checkpoint=False`, or `rope_type` to 'default'.",
            ),
            Check(
                rope
                and self.rope_table_in_checkpoint
                and (self.rope_table_stored or self.rope_frequencies_in_float32 or self.rope_table_in_float32),
                "`rope_table_in_checkpoint` is set with `rope_table_stored`, `rope_frequencies_in_float32` or "
                "`rope_table_in_float32`, which describe other tables.",
                "Leave the others unset: a parameter has the dtype of the weights.",
            ),
            Check(
                rope and self.rope_turns_values and (self.qk_norm != "none" or self.heads_first_from != "rotation"),
                "`rope_turns_values` is set with `qk_norm` or `heads_first_from`.",
                "Leave those unset, or set `rope_turns_values=False`.",
            ),
            Check(
                rope and bool(self.head_dim) and self._rotary_dims_are_misfits(),
                "The rotated part of `head_dim` is odd or empty, and RoPE rotates pairs.",
                "Choose an even `head_dim`, or a `partial_rotary_factor` that leaves room for pairs.",
            ),
            Check(
                rope and bool(self._unknown_rope_types()),
                f"`rope_parameters` has the unknown rope_type {', '.join(self._unknown_rope_types())}.",
                f"Use one of {', '.join(ROPE_TYPES)}.",
            ),
            Check(
                rope and bool(self._rope_values_without_meaning()),
                f"`rope_parameters` has {' and '.join(self._rope_values_without_meaning())}, and a rotation is made of "
                "positive numbers.",
                "Correct it; `rope_theta` is 10000 in most models.",
            ),
            Check(
                rope and bool(self._missing_rope_keys()),
                f"`rope_parameters` has no {' and '.join(self._missing_rope_keys())}, which its `rope_type` reads.",
                "Add what is missing, or choose another `rope_type`.",
            ),
            Check(
                rope and bool(self.head_dim) and self._dynamic_rope_is_too_narrow(),
                "`rope_parameters` of type dynamic rotates two channels, and its formula divides by two less.",
                "Rotate at least four channels, or choose another `rope_type`.",
            ),
            Check(
                rope and bool(self.head_dim) and self._yarn_rotates_half_a_pair(),
                "`rope_parameters` of type yarn rotates an odd number of channels, and its formula has whole pairs.",
                "Choose another `partial_rotary_factor`, or another `rope_type`.",
            ),
            Check(
                rope and bool(self.head_dim) and self._longrope_factors_are_misfits(),
                "`rope_parameters` of type longrope has not one factor for every pair of rotated channels.",
                "Give `short_factor` and `long_factor` half as many entries as rotated channels.",
            ),
            Check(
                not table_positions and self.position_offset != 0,
                f"`position_offset` is set, but `position_embedding_type` {self.position_embedding_type} has no "
                "table.",
                "Set it to 0, or use learned or sinusoidal positions.",
            ),
            Check(self.position_offset < 0, f"`position_offset` is {self.position_offset}.", "Set it to at least 0."),
            Check(
                self.position_embedding_type == "sinusoidal" and self._position_width() % 2 != 0,
                f"Sinusoidal positions need an even width, not {self._position_width()}.",
                "Choose an even `hidden_size` (or `embedding_size`), or learned positions.",
            ),
            Check(
                self.position_ids_source == "input_ids" and self.pad_token_id is None,
                "`position_ids_source` input_ids counts non-padding tokens, but `pad_token_id` is not set.",
                "Set `pad_token_id`, or another `position_ids_source`.",
            ),
            Check(
                self.padding_mask_source == "input_ids" and self.pad_token_id is None,
                "`padding_mask_source` input_ids masks padding tokens, but `pad_token_id` is not set.",
                "Set `pad_token_id`, or `padding_mask_source='none'`.",
            ),
            Check(
                self.position_ids_source == "attention_mask" and table_positions and self.position_offset == 0,
                "`position_ids_source` attention_mask gives padding the position -1, and the table has no row for it.",
                "Set `position_offset` to at least 1 (OPT: 2), or another `position_ids_source`.",
            ),
            Check(
                self.position_ids_source == "attention_mask"
                and rope
                and (self.rope_table_stored or self.rope_table_in_checkpoint),
                "`position_ids_source` attention_mask gives padding the position -1, which the table of "
                "`rope_table_stored` or `rope_table_in_checkpoint` lacks.",
                "Unset them, or choose another `position_ids_source`.",
            ),
            Check(
                self.sinusoidal_padding_zero and self.pad_token_id is None,
                "`sinusoidal_padding_zero` is set, but `pad_token_id` is not.",
                "Set `pad_token_id`, or `sinusoidal_padding_zero=False`.",
            ),
            Check(
                self.sinusoidal_table_stored and self.sinusoidal_table_grows,
                "`sinusoidal_table_stored` and `sinusoidal_table_grows` are both set, and a stored table has one "
                "length.",
                "Use one of the two.",
            ),
            Check(
                self.relative_attention_num_buckets < 4
                or self.relative_attention_max_distance
                <= self.relative_attention_num_buckets // (2 if self.is_causal else 4),
                "`relative_attention_num_buckets` must be at least 4 and `relative_attention_max_distance` larger "
                "than the buckets that hold one distance each.",
                "T5 uses 32 and 128.",
            ),
            Check(
                not self.is_causal and self.alibi_form != "distance",
                f"`alibi_form` {self.alibi_form} depends on the key alone, which only a causal stack can use.",
                "Set `alibi_form='distance'`.",
            ),
            Check(
                self.position_embedding_type == "alibi" and self.alibi_form != "distance" and self.attention_sinks,
                f"`alibi_form` {self.alibi_form} shifts all scores of a query, which `attention_sinks` do not cancel.",
                "Set `alibi_form='distance'` or `attention_sinks=False`.",
            ),
            Check(
                self.alibi_bias_max < 1,
                f"`alibi_bias_max` is {self.alibi_bias_max}.",
                "Set it to at least 1; the paper uses 8.",
            ),
            Check(
                self.alibi_divisor <= 0,
                f"`alibi_divisor` is {self.alibi_divisor}.",
                "Set it above 0; 1 leaves the bias as it is.",
            ),
        ]

    def idle(self) -> list[Idle]:
        kind = self.position_embedding_type
        because = f"`position_embedding_type` is {kind}"
        of_rope = [name for name in self.named("rope_") if name != "rope_parameters"]
        tables = ["position_offset", "position_ids_source", "generation_counts_padding"]
        absolute = self.rope_turns_values or self.rope_table_in_checkpoint
        return [
            Idle(kind != "rope", of_rope + ["rope_parameters"] * self._rope_is_told(), because),
            Idle(kind != "alibi", self.named("alibi_"), because),
            Idle(kind != "relative_bias", self.named("relative_attention_"), because),
            Idle(kind != "sinusoidal", self.named("sinusoidal_"), because),
            # A rotation by other position ids turns queries and keys alike, which only rounds differently.
            Idle(kind not in ("learned", "sinusoidal") and not absolute, tables, because),
        ]

    def _rope_is_told(self) -> bool:
        """Whether `rope_parameters` are other than those that transformers fills in everywhere."""
        return self.rope_parameters not in (None, {"rope_type": "default", "rope_theta": self.default_theta})

    def to_dict(self) -> dict:
        """As in transformers, without parameters of a rotation that is not there: its check refuses odd heads for them."""
        saved = super().to_dict()
        if self.position_embedding_type != "rope" and not self._rope_is_told():
            saved.pop("rope_parameters", None)
        return saved

    @property
    def has_sequence_bias(self) -> bool:
        """Whether an additive position bias (ALiBi, relative) enters the attention scores."""
        return self.position_embedding_type in ("alibi", "relative_bias")

    def rope_parameters_of(self, layer_idx: int) -> dict | None:
        """The flat RoPE parameters of one layer, or `None` where the layer does not rotate."""
        if self.position_embedding_type != "rope" or not self.no_rope_layers[layer_idx]:
            return None
        parameters = self.per_layer_config[layer_idx].rope_parameters
        if self._nested_rope_keys(parameters):
            parameters = parameters.get(self.layer_types[layer_idx])
        if self.layer_rope_theta is None or parameters is None:
            return parameters
        theta = self.layer_rope_theta[layer_idx]
        return {**parameters, "rope_theta": theta} if theta else None

    def convert_rope_params_to_dict(self, **kwargs):
        base = kwargs.get("rope_theta", self.default_theta)
        kwargs = super().convert_rope_params_to_dict(**kwargs)
        if self._nested_rope_keys(self.rope_parameters):
            # transformers 5.17 writes the default base beside the entries instead of into them. What a layer type has
            # that no layer is of stays for the way back to a native config.
            kinds = {*self.layer_types, *LAYER_TYPE_LETTERS.values()}
            self.rope_parameters = {key: self.rope_parameters[key] for key in self.rope_parameters if key in kinds}
            for entry in filter(None, self.rope_parameters.values()):
                entry["rope_theta"] = base if entry.get("rope_theta") is None else entry["rope_theta"]
        return kwargs

    def validate_rope(self):
        """transformers' check, where there is a rotation: the parameters are filled in everywhere."""
        if self.position_embedding_type == "rope":
            # Of one layer's config: it reads sizes that layers may differ in; `validate_architecture` checks those.
            PreTrainedConfig.validate_rope(self.per_layer_config[0])

    def _refuse_missing_rope_entries(self) -> None:
        """Refuse nested `rope_parameters` that leave a layer type out: transformers would read it as flat, or fail."""
        named = set(self.rope_parameters or ()) & set(LAYER_TYPE_LETTERS.values())
        missing = sorted(set(self.layer_types) - named) if named else []
        if self.position_embedding_type == "rope" and missing:
            raise VariantConfigError(
                f"`rope_parameters` has entries per layer type, but none for {' and '.join(missing)}. Add one, or "
                "write None there for layers without a rotation."
            )

    def _position_width(self) -> int:
        """Width of the position table: that of the vectors it is added to."""
        projected = self.embedding_projection_position == "before_positions"
        return self.hidden_size if projected else self.embedding_size

    def _nested_rope_keys(self, parameters: dict) -> list[str]:
        """The layer types that RoPE parameters have an entry for; none where they are flat."""
        return [key for key in parameters if key in LAYER_TYPE_LETTERS.values()]

    def _flat_rope_parameters(self) -> list[dict]:
        parameters = self.rope_parameters or {}
        nested = self._nested_rope_keys(parameters)
        flat = [parameters[key] for key in nested] if nested else [parameters]
        return [entry for entry in flat if entry]

    def _rope_values_without_meaning(self) -> list[str]:
        found = []
        for entry in self._flat_rope_parameters():
            for key in (*POSITIVE_ROPE_KEYS, *POSITIVE_ROPE_LISTS):
                value = entry.get(key)
                values = value if key in POSITIVE_ROPE_LISTS and isinstance(value, (list, tuple)) else [value]
                # Below float32's normal numbers, rotations overflow.
                if value is not None and not all(type(v) in (int, float) and 2**-126 <= v < math.inf for v in values):
                    found.append(f"`{key}` {value!r:.80}")
        return found

    def _missing_rope_keys(self) -> list[str]:
        missing = []
        for entry in self._flat_rope_parameters():
            needed = ROPE_KEYS.get(entry["rope_type"], ())
            if "llama_4_scaling_beta" in entry:
                needed = (*needed, "original_max_position_embeddings")
            missing += [key for key in needed if entry.get(key) is None]
        return sorted(set(missing))

    def _rotary_dim(self, entry: dict) -> int:
        return int(self.head_dim * (entry.get("partial_rotary_factor") or 1.0))

    def _dynamic_rope_is_too_narrow(self) -> bool:
        entries = self._flat_rope_parameters()
        return any(entry["rope_type"] == "dynamic" and self._rotary_dim(entry) <= 2 for entry in entries)

    def _yarn_rotates_half_a_pair(self) -> bool:
        entries = self._flat_rope_parameters()
        return any(entry["rope_type"] == "yarn" and self._rotary_dim(entry) % 2 == 1 for entry in entries)

    def _longrope_factors_are_misfits(self) -> bool:
        lists = [
            (entry.get(name) or (), (self._rotary_dim(entry) + 1) // 2)
            for entry in self._flat_rope_parameters()
            if entry["rope_type"] == "longrope"
            for name in ("short_factor", "long_factor")
        ]
        return any(factors and len(factors) != pairs for factors, pairs in lists)

    def _rotary_dims_are_misfits(self) -> bool:
        """An odd part is rounded up to whole pairs, as in transformers' tables, where the head has room for that."""
        widths = [self._rotary_dim(entry) for entry in self._flat_rope_parameters()]
        return any(width < 1 or width + width % 2 > self.head_dim for width in widths)

    def _unknown_rope_types(self) -> list[str]:
        types = {entry.get("rope_type", "default") for entry in self._flat_rope_parameters()}
        return sorted(map(str, types - set(ROPE_TYPES)))


# Rotary positions (https://arxiv.org/abs/2104.09864)


class RotaryEmbedding(nn.Module):
    """
    Cosines and sines of the rotation angles, for all of transformers' RoPE scalings.

    Args:
        config (`PreTrainedConfig`): the layer's config; transformers' RoPE functions read `head_dim`,
            `max_position_embeddings` and the parameters from it.
        rope_parameters (`dict`): flat parameters of this table, in transformers' standard form; by default the
            config's. `alpha` with type `"dynamic"` stretches the base once (HunYuan); `llama_4_scaling_beta` adds a
            query scale (Ministral 3).
        interleaved (`bool`): angle of pair i at channels 2i and 2i + 1, instead of at i and i + d/2.
        table_in_float32 (`bool`): return float32 instead of the activations' dtype.
        reversed (`bool`): rotate by the negative angle.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        rope_parameters: dict | None = None,
        interleaved: bool = False,
        table_in_float32: bool = False,
        reversed: bool = False,
    ):
        super().__init__()
        # transformers' functions read a flat `config.rope_parameters`, also where layers differ.
        self.config = copy.copy(config)
        rope_parameters = dict(config.rope_parameters if rope_parameters is None else rope_parameters)
        self.config.rope_parameters = rope_parameters
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = rope_parameters["rope_type"]
        if self.rope_type == "dynamic" and rope_parameters.get("alpha"):
            self.rope_type = "ntk_alpha"
        self.interleaved = interleaved
        self.table_in_float32 = table_in_float32
        self.sign = -1.0 if reversed else 1.0
        inv_freq, self.attention_scaling = self.compute_inverse_frequencies()
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    def compute_inverse_frequencies(self) -> tuple[torch.Tensor, float]:
        """Inverse frequencies, float32 (rotary_dim / 2,), and the factor on cosines and sines."""
        own = {
            "default": self.compute_default_rope_parameters,
            "ntk_alpha": self.compute_ntk_alpha_rope_parameters,
        }
        return {**ROPE_INIT_FUNCTIONS, **own}[self.rope_type](self.config)

    @staticmethod
    def _inverse_frequencies(base: float, dim: int) -> torch.Tensor:
        return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))

    @staticmethod
    def compute_default_rope_parameters(config: PreTrainedConfig, **kwargs) -> tuple[torch.Tensor, float]:
        parameters = config.rope_parameters
        dim = int(config.head_dim * (parameters.get("partial_rotary_factor") or 1.0))
        return RotaryEmbedding._inverse_frequencies(parameters["rope_theta"], dim), 1.0

    @staticmethod
    def compute_ntk_alpha_rope_parameters(config: PreTrainedConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """NTK-aware scaling with a fixed alpha: the base is multiplied by alpha^(d / (d - 2)) (HunYuan)."""
        parameters, dim = config.rope_parameters, config.head_dim
        base = parameters["rope_theta"] * parameters["alpha"] ** (dim / (dim - 2))
        return RotaryEmbedding._inverse_frequencies(base, dim), 1.0

    def reset_buffers(self) -> None:
        """Recompute what `from_pretrained` leaves uninitialised: buffers that are not in a checkpoint."""
        inv_freq, self.attention_scaling = self.compute_inverse_frequencies()
        init.copy_(self.inv_freq, inv_freq)
        init.copy_(self.original_inv_freq, inv_freq)

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            x: any tensor of the activations' dtype and device.
            position_ids: (batch or 1, length).

        Returns:
            cos, sin: (batch or 1, length, rotary_dim).
        """
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = freqs.repeat_interleave(2, dim=-1) if self.interleaved else torch.cat((freqs, freqs), dim=-1)
        cos = angles.cos() * self.attention_scaling
        sin = angles.sin() * (self.sign * self.attention_scaling)
        dtype = torch.float32 if self.table_in_float32 else x.dtype
        return cos.to(dtype), sin.to(dtype)


class Float32RotaryEmbedding(RotaryEmbedding):
    """Frequencies that stay in float32 when the weights are cast (Baichuan)."""

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32:
            inv_freq, _ = self.compute_inverse_frequencies()
            self.inv_freq = inv_freq.to(self.inv_freq.device)
            self.original_inv_freq = self.inv_freq.clone()
        return self


class StoredRotaryEmbedding(RotaryEmbedding):
    """
    Cosines and sines from a table of `max_position_embeddings` rows, made once and cast with the weights (GPT-J).

    `forward` returns its rows as they are; the rotation casts them, where it does (`Rotation`).
    """

    def __init__(self, config: PreTrainedConfig, rope_parameters: dict | None = None, **options):
        super().__init__(config, rope_parameters, **options)
        cos, sin = self.compute_table()
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def compute_table(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of every position, float32 (max_position_embeddings, rotary_dim / 2)."""
        inv_freq, scaling = self.compute_inverse_frequencies()
        freqs = torch.arange(self.original_max_seq_len, dtype=torch.int64).float()[:, None] * inv_freq
        return freqs.cos() * scaling, freqs.sin() * (self.sign * scaling)

    def reset_buffers(self) -> None:
        super().reset_buffers()
        cos, sin = self.compute_table()
        init.copy_(self.cos, cos)
        init.copy_(self.sin, sin)

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        spread = repeat_pairs if self.interleaved else repeat_halves
        return spread(look_up(self.cos, position_ids)), spread(look_up(self.sin, position_ids))


class CheckpointRotaryEmbedding(nn.Module):
    """
    Cosines and sines from a frozen parameter (max_position_embeddings, rotary_dim): sines, then cosines (RoFormer).

    Args: see `RotaryEmbedding`; the parameters' type is `"default"`.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        rope_parameters: dict,
        interleaved: bool = False,
        table_in_float32: bool = False,
        reversed: bool = False,
    ):
        super().__init__()
        self.num_positions = config.max_position_embeddings
        self.rope_theta = rope_parameters["rope_theta"]
        self.dim = rotary_width(config, rope_parameters)
        self.interleaved = interleaved
        self.sign = -1.0 if reversed else 1.0
        # In the dtype that the model is loaded in: transformers keeps a parameter's own otherwise.
        self.weight = nn.Parameter(self.compute_table().to(torch.get_default_dtype()))

    def compute_table(self) -> torch.Tensor:
        return sinusoidal_table(self.num_positions, self.dim, "half", base=self.rope_theta)

    def register_parameter(self, name: str, param: nn.Parameter) -> None:
        # Here, because `from_pretrained` makes all that it loads trainable.
        super().register_parameter(name, param.requires_grad_(False))

    def reset_weights(self) -> None:
        init.copy_(self.weight, self.compute_table())

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            x: any tensor of the activations' dtype and device.
            position_ids: (batch or 1, length).

        Returns:
            cos, sin: (batch or 1, length, rotary_dim).
        """
        sin, cos = look_up(self.weight, position_ids).to(x.device).chunk(2, dim=-1)
        if self.sign < 0:
            sin = -sin
        spread = repeat_pairs if self.interleaved else repeat_halves
        return spread(cos), spread(sin)


def rotary_width(config: PreTrainedConfig, rope_parameters: dict) -> int:
    """How many channels of a head are rotated; a table has whole pairs."""
    dim = int(config.head_dim * (rope_parameters.get("partial_rotary_factor") or 1.0))
    return dim + dim % 2


def repeat_pairs(angles: torch.Tensor) -> torch.Tensor:
    """(..., pairs) -> (..., 2 * pairs), for rotations of pairs."""
    return angles.repeat_interleave(2, dim=-1)


def repeat_halves(angles: torch.Tensor) -> torch.Tensor:
    """(..., pairs) -> (..., 2 * pairs), for rotations of halves."""
    return torch.cat((angles, angles), dim=-1)


@states(SHAPES, CheckpointRotaryEmbedding)
def rotary_table_shapes(config: PreTrainedConfig, rope_parameters: dict, **_: Any) -> dict[str, tuple[int, ...]]:
    return {"weight": (config.max_position_embeddings, rotary_width(config, rope_parameters))}


class QueryScalingRotaryEmbedding(RotaryEmbedding):
    """Adds the scale of the queries that grows with the logarithm of the position (Llama 4, Ministral 3)."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns cos, sin and the query scale (batch or 1, 1, length, 1) in the activations' dtype."""
        cos, sin = super().forward(x, position_ids)
        parameters = self.config.rope_parameters
        blocks = torch.floor(position_ids / parameters["original_max_position_embeddings"])
        scale = 1 + parameters["llama_4_scaling_beta"] * torch.log(1 + blocks)
        return cos, sin, scale[:, None, :, None].to(x.dtype)


def rotate_halves(x: torch.Tensor) -> torch.Tensor:
    """(x1, x2) -> (-x2, x1), with x1 and x2 the halves of the last dimension."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def rotate_pairs(x: torch.Tensor) -> torch.Tensor:
    """(x0, x1, x2, x3, ...) -> (-x1, x0, -x3, x2, ...)."""
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


class NoRotation:
    """Queries and keys as they are: layers without rotary positions."""

    def __call__(self, query: torch.Tensor, key: torch.Tensor, position_embeddings: tuple | None):
        return query, key


class Rotation:
    """
    Rotates queries and keys.

    Args:
        interleaved (`bool`): pairs (0, 1), (2, 3), ... instead of (0, d/2), (1, d/2 + 1), ...
        in_float32 (`bool`): upcast, rotate in float32 and round once; tables in float32 need no upcast.
        round_result (`bool`): return the input's dtype; else that of the products.
        cast_tables (`bool`): to the input's dtype, which under autocast is not that of the hidden states (GPT-J).

    Shape: query (batch, heads, length, head_dim) and key alike; cos, sin (batch or 1, length, head_dim).
    """

    def __init__(
        self,
        interleaved: bool = False,
        in_float32: bool = False,
        round_result: bool = True,
        cast_tables: bool = False,
    ):
        self.rotate = rotate_pairs if interleaved else rotate_halves
        self.in_float32 = in_float32
        self.round_result = round_result
        self.cast_tables = cast_tables

    def turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype
        if self.cast_tables:
            cos, sin = cos.to(dtype), sin.to(dtype)
        if self.in_float32:
            x = x.float()
        turned = (x * cos) + (self.rotate(x) * sin)
        return turned.to(dtype) if self.round_result else turned

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, position_embeddings: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = (table.unsqueeze(1) for table in position_embeddings[:2])
        return self.turn(query, cos, sin), self.turn(key, cos, sin)


class PartialRotation(Rotation):
    """Rotates the first channels of every head, as many as the table has, and passes the others through."""

    def turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        rotary_dim = cos.shape[-1]
        return torch.cat((super().turn(x[..., :rotary_dim], cos, sin), x[..., rotary_dim:]), dim=-1)


class PositionsFirstRotation:
    """A rotation with positions before heads in memory (GPT-J)."""

    def __init__(self, rotation: Rotation):
        self.rotation = rotation

    def __call__(self, query: torch.Tensor, key: torch.Tensor, position_embeddings: tuple[torch.Tensor, ...]):
        cos, sin = (table.unsqueeze(2) for table in position_embeddings)
        query, key = (self.rotation.turn(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in (query, key))
        return query, key


class QueryScalingRotation:
    """A rotation followed by the position-dependent query scale of `QueryScalingRotaryEmbedding`."""

    def __init__(self, rotation: Rotation):
        self.rotation = rotation

    def __call__(self, query: torch.Tensor, key: torch.Tensor, position_embeddings: tuple[torch.Tensor, ...]):
        query, key = self.rotation(query, key, position_embeddings)
        return query * position_embeddings[2], key


# Absolute positions, added to the embeddings


def look_up(table: torch.Tensor, position_ids: torch.Tensor, padding_idx: int | None = None) -> torch.Tensor:
    """
    Rows of a table of positions: (batch or 1, length) -> (batch or 1, length, width).

    Raises:
        ValueError: if the table has no such row. An accelerator would have to be waited for to know; what is known
            without is checked in `sequence_positions`.
    """
    try:
        return F.embedding(position_ids, table, padding_idx)
    except IndexError as error:
        raise too_long(f"`position_ids` ask for a row that a table of {table.shape[0]} does not have") from error


def too_long(what: str) -> ValueError:
    return ValueError(
        f"{what}: the input is longer than `max_position_embeddings`, or its ids are wrong. Shorten it, or use a model "
        "whose table is longer."
    )


class NoPositions(nn.Module):
    """Nothing is added to the embeddings."""

    def forward(self, embeddings: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return embeddings


class LearnedPositions(nn.Embedding):
    """
    Adds a learned vector per position (GPT-2, BERT, OPT).

    Args:
        num_positions (`int`): trained length; the table has `num_positions + offset` rows.
        dim (`int`): width of the embeddings.
        offset (`int`): added to every position id.
        padding_idx (`int`): id of padding, whose row gets no gradient; `None` for none.
    """

    def __init__(self, num_positions: int, dim: int, offset: int = 0, padding_idx: int | None = None):
        super().__init__(num_positions + offset, dim, None if padding_idx is None else padding_idx + offset)
        self.offset = offset

    def forward(self, embeddings: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """embeddings (batch, length, dim), position_ids (batch or 1, length) -> (batch, length, dim)."""
        return embeddings + look_up(self.weight, position_ids + self.offset, self.padding_idx).to(embeddings.device)


def sinusoidal_table(
    num_positions: int, dim: int, layout: str, padding_idx: int | None = None, base: float = 10000.0
) -> torch.Tensor:
    """
    Table of sinusoids, float32 (num_positions, dim).

    Args:
        layout (`str`): `"interleaved"`: sin and cos of frequency 10000^(-2i/dim) at channels 2i and 2i + 1
            (https://arxiv.org/abs/1706.03762); `"half"`: all sines, then all cosines (Marian); `"half_in_float32"`: the
            same computed in float32 (CTRL), which differs by 1e-5 at position 256; `"tensor2tensor"`: as half, with
            frequencies 10000^(-i/(dim/2 - 1)) computed in float32 (XGLM, M2M-100).
        padding_idx (`int`): a row of zeros.
        base (`float`): in place of 10000.
    """
    half = dim // 2
    if layout == "half_in_float32":
        # Of every channel, as CTRL does: a CPU rounds the last ones, which fill no vector, otherwise.
        channels = torch.arange(dim, dtype=torch.int64).float()
        frequencies = 1 / torch.pow(base, 2 * (channels // 2) / dim)
        angles = torch.arange(num_positions, dtype=torch.int64).float().unsqueeze(1) * frequencies.unsqueeze(0)
        parts = (angles[:, 0::2].sin(), angles[:, 1::2].cos())
    else:
        if layout == "tensor2tensor":
            steps = torch.arange(half, dtype=torch.int64).float()
            frequencies = torch.exp(steps * -(math.log(base) / (half - 1)))
            angles = torch.arange(num_positions, dtype=torch.int64).float().unsqueeze(1) * frequencies.unsqueeze(0)
        else:
            exponents = 2 * torch.arange(half, dtype=torch.float64) / dim
            angles = torch.arange(num_positions, dtype=torch.float64).unsqueeze(1) / torch.pow(base, exponents)
        parts = (angles.sin().float(), angles.cos().float())
    table = torch.stack(parts, dim=-1).flatten(1) if layout == "interleaved" else torch.cat(parts, dim=-1)
    if padding_idx is not None:
        table[padding_idx] = 0.0
    return table


class LearnedFromSinusoids(LearnedPositions):
    """Learned vectors that start as sinusoids (DistilBERT)."""

    def reset_weights(self) -> None:
        init.copy_(self.weight, sinusoidal_table(*self.weight.shape, layout="interleaved"))


@states(SHAPES, LearnedPositions)
def learned_positions_shapes(num_positions: int, dim: int, offset: int, **_: Any) -> dict[str, tuple[int, ...]]:
    return {"weight": (num_positions + offset, dim)}


class SinusoidalPositions(nn.Module):
    """
    Adds fixed sinusoids (2017 Transformer, Marian, XGLM). The table is not part of a checkpoint.

    Args:
        num_positions, dim, layout: see `sinusoidal_table`; the table has `num_positions + offset` rows.
        offset (`int`): added to every position id.
        padding_idx (`int`): a row of zeros.
    """

    def __init__(self, num_positions: int, dim: int, layout: str, offset: int = 0, padding_idx: int | None = None):
        super().__init__()
        self.num_positions = num_positions
        self.dim = dim
        self.layout = layout
        self.offset = offset
        self.padding_idx = padding_idx
        self.register_buffer("weight", self.compute_table(), persistent=False)

    def compute_table(self) -> torch.Tensor:
        return sinusoidal_table(self.num_positions + self.offset, self.dim, self.layout, self.padding_idx)

    def reset_buffers(self) -> None:
        init.copy_(self.weight, self.compute_table())

    def forward(self, embeddings: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """embeddings (batch, length, dim), position_ids (batch or 1, length) -> (batch, length, dim)."""
        return embeddings + look_up(self.weight, position_ids + self.offset).to(embeddings)


class StoredSinusoidalPositions(SinusoidalPositions):
    """A table that is a frozen parameter, so that checkpoints have it (Marian, Pegasus)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        table = self.weight
        del self.weight
        # In the dtype that the model is loaded in: transformers keeps a parameter's own otherwise.
        self.weight = nn.Parameter(table.to(torch.get_default_dtype()))

    def register_parameter(self, name: str, param: nn.Parameter) -> None:
        # Here, because `from_pretrained` makes all that it loads trainable.
        super().register_parameter(name, param.requires_grad_(False))


states(SHAPES, StoredSinusoidalPositions)(learned_positions_shapes)


class GrowingSinusoidalPositions(SinusoidalPositions):
    """A table that is made anew, and longer, when an input needs rows past its end (M2M-100)."""

    def forward(self, embeddings: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        # A compiled graph cannot depend on the ids' values.
        if not torch.compiler.is_compiling():
            self.grow(int(position_ids.max()) + 1)
        return super().forward(embeddings, position_ids)

    def grow(self, num_positions: int) -> None:
        """Make room for `num_positions`, in the dtype and on the device of the table."""
        if num_positions > self.num_positions:
            self.num_positions = num_positions
            self.weight = self.compute_table().to(self.weight)


# Position ids


def sequence_positions(
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
    padding_mask: torch.Tensor | None,
    past: int | torch.Tensor,
    limit: int | None = None,
) -> torch.Tensor:
    """
    0, 1, 2, ... after the `past` cached tokens: (1, length).

    Args:
        limit (`int`): number of positions that a table has; `None` without one.

    Raises:
        ValueError: if a table has no room for them. A static cache counts on the device, where the count is not read.
    """
    length = inputs_embeds.shape[1] + (past if isinstance(past, int) else 0)
    if limit is not None and not is_tracing(inputs_embeds) and length > limit:
        raise too_long(f"There are {length} tokens and a table of {limit} positions")
    return (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)


def attention_mask_positions(
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
    padding_mask: torch.Tensor | None,
    past: int | torch.Tensor,
    limit: int | None = None,
) -> torch.Tensor:
    """The number of real tokens before each, -1 at padding (OPT): (batch, length); `limit` as above."""
    if padding_mask is None:
        return sequence_positions(input_ids, inputs_embeds, padding_mask, past, limit)
    mask = padding_mask.long()
    positions = torch.cumsum(mask, dim=1) * mask - 1
    return positions[:, -inputs_embeds.shape[1] :]


class InputIdPositions:
    """Counts the tokens that are not padding, from `padding_idx + 1`; padding has `padding_idx` (RoBERTa)."""

    def __init__(self, padding_idx: int, limit: int | None = None):
        self.padding_idx = padding_idx
        self.limit = None if limit is None else limit - padding_idx - 1

    def __call__(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, padding_mask: torch.Tensor | None, past: int
    ) -> torch.Tensor:
        if input_ids is None:
            first = self.padding_idx + 1
            return sequence_positions(input_ids, inputs_embeds, padding_mask, past, self.limit) + first
        mask = input_ids.ne(self.padding_idx).int()
        positions = (torch.cumsum(mask, dim=1).type_as(mask) + past) * mask
        return positions.long() + self.padding_idx


def restarts(position_ids: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    Whether ids restart, as those of packed documents do: of two neighbours that are both real tokens, the second has
    not the larger id. A boolean scalar. Ids on both sides of padding say nothing: `generate` numbers them as it goes.

    Args:
        position_ids: (batch or 1, length).
        padding_mask: (batch, seen length) with 1 at real tokens, or `None`.
    """
    falls = position_ids.diff(dim=-1) <= 0
    if padding_mask is not None:
        real = padding_mask[:, -position_ids.shape[1] :].bool()
        falls = falls & real[:, 1:] & real[:, :-1]
    return falls.any()


# Padding

# (input_ids or None) -> attention mask or None
PaddingMaskSource = Callable[[torch.Tensor | None], torch.Tensor | None]


def no_padding_mask(input_ids: torch.Tensor | None) -> None:
    """Every token is real."""


class InputIdPaddingMask:
    """Tokens other than `padding_idx` are real (T5Gemma): (batch, length) of 1 and 0, or `None` without token ids."""

    def __init__(self, padding_idx: int):
        self.padding_idx = padding_idx

    def __call__(self, input_ids: torch.Tensor | None) -> torch.Tensor | None:
        return None if input_ids is None else input_ids.ne(self.padding_idx).long()


# Additive biases on the attention scores


def attention_geometry(
    query_length: int, past_key_values: Cache | None, layer_idx: int
) -> tuple[int | torch.Tensor, int, int]:
    """Index of the first query, number of keys, and index of the first key, as the layer's cache will return them."""
    if past_key_values is None:
        return 0, query_length, 0
    query_offset = past_key_values.get_seq_length(layer_idx)
    if isinstance(query_offset, torch.Tensor):
        # A static cache counts in place, after this has been read.
        query_offset = query_offset.clone()
    kv_length, kv_offset = past_key_values.get_mask_sizes(query_length, layer_idx)
    return query_offset, kv_length, kv_offset


class NoPositionBias(nn.Module):
    """No additive bias."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Cache | None,
        padding_mask: torch.Tensor | None,
        layer_types: list[str],
    ) -> list[None]:
        return [None] * len(layer_types)


class PositionBias(nn.Module):
    """Base of the additive biases: one per layer type, or one per layer where layers have tables of their own."""

    per_layer = False
    in_float32 = False
    divisor = 1.0

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Cache | None,
        padding_mask: torch.Tensor | None,
        layer_types: list[str],
    ) -> list[torch.Tensor]:
        """
        Args:
            hidden_states: (batch, query_length, hidden_size).
            padding_mask: (batch, seen length) with 1 at real tokens, or `None`.
            layer_types: attention type of every layer; sliding caches hold fewer keys.

        Returns:
            for every layer (batch or 1, heads, query_length or 1, key_length) in the activations' dtype, or in float32.
        """
        query_length = hidden_states.shape[1]
        computed: dict = {}
        for layer_idx, layer_type in enumerate(layer_types):
            key = layer_idx if self.per_layer else layer_type
            if key in computed:
                continue
            geometry = attention_geometry(query_length, past_key_values, layer_idx)
            bias = self.compute(query_length, *geometry, padding_mask, hidden_states.device, layer_idx)
            dtype = torch.float32 if self.in_float32 else hidden_states.dtype
            bias = bias.to(dtype)
            if self.divisor != 1.0:
                bias = bias / self.divisor
            computed[key] = bias
        return [computed[i if self.per_layer else kind] for i, kind in enumerate(layer_types)]

    def compute(
        self,
        query_length: int,
        query_offset: int | torch.Tensor,
        key_length: int,
        key_offset: int,
        padding_mask: torch.Tensor | None,
        device: torch.device,
        layer_idx: int,
    ) -> torch.Tensor:
        """(batch or 1, heads, query_length or 1, key_length)."""
        raise NotImplementedError

    @staticmethod
    def relative_positions(query_length, query_offset, key_length, key_offset, device) -> torch.Tensor:
        """Index of the key minus index of the query: (query_length, key_length)."""
        queries = torch.arange(query_length, device=device)[:, None] + query_offset
        keys = torch.arange(key_length, device=device)[None, :] + key_offset
        return keys - queries


def alibi_slopes(
    num_heads: int,
    bias_max: int = 8,
    order: str = "paper",
    in_float64: bool = False,
    device: torch.device | None = None,
) -> torch.Tensor:
    """
    Slopes of ALiBi (https://arxiv.org/abs/2108.12409), float32 (num_heads,).

    For a power of two n: 2^(-bias_max/n), 2^(-2 bias_max/n), ... Otherwise `"paper"` takes those of the next lower
    power and fills up with every second one of double that number; `"mpt"` takes the odd and then the even ones of
    the next higher power.

    Args:
        in_float64 (`bool`): round the slopes of the paper's order once, at the end, instead of their base as well.
    """
    if order == "mpt":
        power = 2 ** math.ceil(math.log2(num_heads))
        exponents = torch.arange(1, power + 1, dtype=torch.int64, device=device).float() * (bias_max / power)
        slopes = 1.0 / torch.pow(2, exponents)
        return slopes if power == num_heads else torch.cat([slopes[1::2], slopes[::2]])[:num_heads]
    power = 2 ** math.floor(math.log2(num_heads))
    dtype = torch.float64 if in_float64 else torch.float32
    base = torch.full((), 2.0 ** -(bias_max / power), dtype=dtype, device=device)
    slopes = torch.pow(base, torch.arange(1, power + 1, dtype=torch.int32, device=device))
    # Empty where the number is a power of two.
    extra_base = torch.full((), 2.0 ** -(bias_max / (2 * power)), dtype=dtype, device=device)
    extra = torch.pow(extra_base, torch.arange(1, 2 * (num_heads - power) + 1, 2, dtype=torch.int32, device=device))
    return torch.cat([slopes, extra]).float()


class AlibiBias(PositionBias):
    """
    ALiBi: slope times distance, negative into the past (and, in an encoder, on both sides).

    Args:
        num_heads, bias_max, order: see `alibi_slopes`.
        form (`str`): `"distance"`, `"key_position"` (BLOOM), `"key_index"` (Baichuan) or `"key_offset"` (MPT); see
            `VariantConfig`.
        in_bfloat16 (`bool`): round slopes and products to bfloat16 (Falcon).
        in_float32 (`bool`): return float32 instead of the activations' dtype (MPT).
        in_float64 (`bool`): see `alibi_slopes`.
        divisor (`float`): of the bias in its final dtype (Falcon).
    """

    def __init__(
        self,
        num_heads: int,
        bias_max: int,
        order: str,
        form: str,
        in_bfloat16: bool,
        in_float32: bool = False,
        in_float64: bool = False,
        divisor: float = 1.0,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.bias_max = bias_max
        self.order = order
        self.form = form
        self.in_bfloat16 = in_bfloat16
        self.in_float32 = in_float32
        self.in_float64 = in_float64
        self.divisor = divisor

    def compute(self, query_length, query_offset, key_length, key_offset, padding_mask, device, layer_idx):
        if self.form == "distance":
            distance = self.relative_positions(query_length, query_offset, key_length, key_offset, device)
            positions = -distance.abs()[None, None]
        elif self.form == "key_index":
            positions = (torch.arange(key_length, device=device) + key_offset)[None, None, None]
        elif self.form == "key_position":
            positions = self.key_positions(key_length, key_offset, padding_mask, device)[:, None, None, :]
        else:
            last_query = query_offset + query_length - 1
            positions = (torch.arange(key_length, device=device) + key_offset - last_query)[None, None, None]
        # Not a buffer, which would take on the weights' dtype.
        slopes = alibi_slopes(self.num_heads, self.bias_max, self.order, self.in_float64, device)[:, None, None]
        if self.in_bfloat16:
            slopes = slopes.bfloat16()
        return slopes * positions

    @staticmethod
    def key_positions(key_length, key_offset, padding_mask, device) -> torch.Tensor:
        """Position of every key, counted over real tokens where the padding mask is known: (batch or 1, keys)."""
        if padding_mask is None:
            return (torch.arange(key_length, device=device) + key_offset).unsqueeze(0)
        mask = padding_mask.to(device).long()
        positions = (mask.cumsum(dim=-1) - 1) * mask
        # A static cache has room for keys that the mask does not know yet; they are masked anyway.
        return F.pad(positions[:, key_offset:], (0, max(key_offset + key_length - positions.shape[-1], 0)))[
            :, :key_length
        ]


def relative_position_bucket(
    relative_position: torch.Tensor, bidirectional: bool, num_buckets: int, max_distance: int
) -> torch.Tensor:
    """
    T5's bucket of every distance (https://arxiv.org/abs/1910.10683): half of the buckets hold one distance each, the
    others logarithmic ranges up to `max_distance`; a bidirectional stack has a set for each side.

    Args:
        relative_position: index of the key minus index of the query, int64, any shape.

    Returns:
        int64 in [0, num_buckets), the same shape.
    """
    side = 0
    if bidirectional:
        num_buckets //= 2
        side = (relative_position > 0).long() * num_buckets
        distance = relative_position.abs()
    else:
        distance = -relative_position.clamp(max=0)
    exact = num_buckets // 2
    logarithmic = exact + (
        torch.log(distance.float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    ).to(torch.long)
    logarithmic = logarithmic.clamp(max=num_buckets - 1)
    return side + torch.where(distance < exact, distance, logarithmic)


class RelativeBias(PositionBias):
    """
    A learned bias per head and bucket of distance, one table for the stack (T5) or one per layer (UMT5).

    Args:
        num_heads, num_buckets, max_distance (`int`): see `relative_position_bucket`.
        bidirectional (`bool`): an encoder's buckets.
        num_tables (`int`): number of layers with own tables, or 1.
        init_std (`float`): standard deviation of new tables; `None` for the config's.
    """

    def __init__(
        self,
        num_heads: int,
        num_buckets: int,
        max_distance: int,
        bidirectional: bool,
        num_tables: int,
        init_std: float | None = None,
    ):
        super().__init__()
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.per_layer = num_tables > 1
        self.tables = nn.ModuleDict({str(i): nn.Embedding(num_buckets, num_heads) for i in range(num_tables)})
        if init_std is not None:
            for table in self.tables.values():
                table.init_std = init_std

    def compute(self, query_length, query_offset, key_length, key_offset, padding_mask, device, layer_idx):
        relative = self.relative_positions(query_length, query_offset, key_length, key_offset, device)
        buckets = relative_position_bucket(relative, self.bidirectional, self.num_buckets, self.max_distance)
        table = self.tables[str(layer_idx if self.per_layer else 0)]
        return table(buckets).permute(2, 0, 1).unsqueeze(0)


@states(SHAPES, RelativeBias)
def relative_bias_shapes(num_heads: int, num_buckets: int, num_tables: int, **_: Any) -> dict[str, tuple[int, ...]]:
    return {f"tables.{index}.weight": (num_buckets, num_heads) for index in range(num_tables)}


PositionIdSource = Callable[[torch.Tensor | None, torch.Tensor, torch.Tensor | None, int], torch.Tensor]
