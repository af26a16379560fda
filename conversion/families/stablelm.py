"""StableLM: Llama with LayerNorms and partial rotation; optionally parallel branches, or a norm for every head."""

from ..config_map import Fixed, Mapped, PartialRopeParameters, Renamed, Same
from ..family import Family
from ..rules import Rule, Stack
from ._common import DROPOUT, KV_HEADS, LLAMA_WEIGHTS, SIZES


FAMILIES = (
    Family(
        model_type="stablelm",
        config=(
            SIZES, KV_HEADS, DROPOUT, PartialRopeParameters(),
            Same("hidden_act"),
            Renamed("layer_norm_eps", "norm_eps"),
            Renamed("hidden_dropout", "residual_dropout"),
            Renamed("use_qkv_bias", "attention_bias"),
            Mapped("qk_layernorm", "qk_norm", {True: "per_head", False: "none"}),
            Mapped("use_parallel_residual", "parallel_block", {True: "shared_norm", False: "none"}),
            Fixed(
                norm_type="layernorm", norm_casting_mode="none", norm_placement="pre", ffn_type="glu",
                attention_output_bias=False, mlp_bias=False, mlp_output_bias=False, qk_norm_bias=False,
                parallel_sum_order="residual_first", attention_residual_dropout=False,
            ),
        ),
        weights=(
            *LLAMA_WEIGHTS,
            *(
                Rule(
                    f"model.layers.{{layer}}.self_attn.{name}_layernorm.norms.{{head*}}.weight",
                    f"model.layers.{{layer}}.self_attn.{name}_norm.weight",
                    Stack(),
                )
                for name in "qk"
            ),
        ),
    ),
)  # fmt: skip
