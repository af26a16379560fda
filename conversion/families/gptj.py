"""GPT-J and CodeGen: attention and feed-forward side by side under one LayerNorm, partial rotation of pairs."""

import math
from functools import cache
from importlib import import_module

import torch

from ..config_map import Computed, Fixed, Irrelevant
from ..errors import ConversionError
from ..family import Deviation, Family
from ..rules import Chain, Permute, Rule, Split
from ._common import (
    FUSED_GRADIENT,
    FUSED_PRODUCT,
    GPT2_FFN,
    GPT2_NAMES,
    LAYERNORM_BLOCK,
    NO_PADDING_ROW,
    fused_qkv,
    qkv_sizes,
)


def _rope_parameters(native):
    """The part of the head that comes out as `rotary_dim` channels when it is multiplied and cut."""
    head_dim = native["n_embd"] // native["n_head"]
    part = native["rotary_dim"] / head_dim
    if int(head_dim * part) < native["rotary_dim"]:
        part = math.nextafter(part, 1.0)
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": part}}


def _rotary_dim(fields):
    return {"rotary_dim": int(fields["head_dim"] * (fields["rope_parameters"].get("partial_rotary_factor") or 1.0))}


CONFIG = (
    *GPT2_NAMES,
    *GPT2_FFN,
    Computed(("rotary_dim",), _rope_parameters, _rotary_dim),
    LAYERNORM_BLOCK,
    NO_PADDING_ROW,
    Fixed(
        parallel_block="shared_norm", mlp_bias=True, mlp_output_bias=True, lm_head_bias=True, rope_interleaved=True,
        rope_table_stored=True, attention_score_form="divided", attention_scores_in_float32=True,
        heads_first_from="scores",
    ),
)  # fmt: skip


@cache
def _classes_multiply() -> bool:
    """Since transformers 5.24 attention is a function beside the classes, which takes a factor."""
    return hasattr(import_module("transformers.models.gptj.modeling_gptj"), "eager_attention_forward")


SCALED_SCORES = Deviation(
    "scores are divided, as the stock classes did before transformers 5.24, which multiply them",
    applies=lambda config: _classes_multiply(),
)

LAYER = "transformer.h.{layer}."
WEIGHTS = (
    Rule("transformer.wte.weight", "model.embed_tokens.weight"),
    Rule(LAYER + "ln_1.{leaf}", "model.layers.{layer}.self_attn_pre_norm.{leaf}"),
    Rule(LAYER + "attn.out_proj.{leaf}", "model.layers.{layer}.self_attn.o_proj.{leaf}"),
    Rule(LAYER + "mlp.fc_in.{leaf}", "model.layers.{layer}.mlp.up_proj.{leaf}"),
    Rule(LAYER + "mlp.fc_out.{leaf}", "model.layers.{layer}.mlp.down_proj.{leaf}"),
    Rule("transformer.ln_f.{leaf}", "model.norm.{leaf}"),
    Rule("lm_head.{leaf}", "lm_head.{leaf}"),
)

# CodeGen's projection was cut for this number of devices: each part holds the queries, values and keys of its heads.
PARTS = 4


def _check_heads(native):
    if native["n_head"] % PARTS:
        raise ConversionError(f"`n_head` is {native['n_head']}, and CodeGen's class takes multiples of {PARTS} only.")
    return {}


def _rows_by_part(config) -> torch.Tensor:
    """Rows of [queries, values, keys] in every part -> all queries, all keys, all values."""
    queries, values, keys = torch.arange(sum(qkv_sizes(config))).view(PARTS, 3, -1).unbind(1)
    return torch.cat([queries.flatten(), keys.flatten(), values.flatten()])


FAMILIES = (
    Family(
        model_type="gptj",
        config=CONFIG,
        deviations=(SCALED_SCORES,),
        weights=(
            *WEIGHTS,
            *(
                Rule(LAYER + f"attn.{name}.weight", f"model.layers.{{layer}}.self_attn.{name}.weight")
                for name in ("q_proj", "k_proj", "v_proj")
            ),
        ),
    ),
    Family(
        model_type="codegen",
        config=(
            *CONFIG,
            Fixed(
                rope_in_float32=True,
                rope_table_in_float32=True,
                rope_result_in_float32=True,
                attention_score_form="divided_in_float32",
            ),
            Computed((), _check_heads, lambda fields: {}),
            Irrelevant("n_ctx", "gives the class an attribute that nothing reads"),
            # A key that the class does not declare.
            Computed(
                ("pad_token_id",),
                lambda native: {"pad_token_id": native.get("pad_token_id")},
                lambda fields: {} if fields["pad_token_id"] is None else {"pad_token_id": fields["pad_token_id"]},
            ),
        ),
        weights=(*WEIGHTS, fused_qkv(LAYER + "attn.qkv_proj", Chain(Permute(_rows_by_part), Split(qkv_sizes)))),
        deviations=(FUSED_PRODUCT, FUSED_GRADIENT, SCALED_SCORES),
    ),
)
