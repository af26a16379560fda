"""MPT: ALiBi in float32, no biases, one QKV projection with an optional clip."""

from transformers.models.mpt.configuration_mpt import MptAttentionConfig

from ..config_map import Computed, Fixed, Renamed, Same
from ..errors import ConversionError
from ..family import Family
from ..rules import Rule
from ._common import (
    FUSED_GRADIENT,
    FUSED_PRODUCT,
    LAYERNORM_BLOCK,
    NO_PADDING_ROW,
    QKV_IN_BLOCKS,
    fourfold_ffn,
    fused_qkv,
)


READ = ("attn_pdrop", "clip_qkv", "softmax_scale")
# The native class is multi-head attention with ALiBi of the paper's range, whatever these say.
UNREAD = ("attn_type", "attn_impl", "prefix_lm", "qk_ln", "attn_uses_sequence_id", "alibi", "alibi_bias_max")
# What every config class of transformers writes.
FRAMEWORK = (
    "_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder", "label2id",
    "model_type", "output_attentions", "output_hidden_states", "problem_type", "return_dict", "torch_dtype",
    "transformers_version",
)  # fmt: skip


def _attention(native):
    attention = native["attn_config"]
    unknown = sorted(set(attention) - {*READ, *UNREAD, *FRAMEWORK})
    if unknown:
        raise ConversionError(f"`attn_config` has the keys {unknown}, whose meaning is not known here. Remove them.")
    scale = attention["softmax_scale"]
    return {
        "attention_dropout": attention["attn_pdrop"],
        "residual_dropout": attention["attn_pdrop"],
        # A limit of 0 means none to the native class.
        "clip_qkv": attention["clip_qkv"] or None,
        "attention_scaling": (native["n_heads"] / native["d_model"]) ** 0.5 if scale is None else scale,
    }


def _attention_back(fields):
    default = (fields["num_attention_heads"] / fields["hidden_size"]) ** 0.5
    scale = default if fields["attention_scaling"] is None else fields["attention_scaling"]
    clip, dropout = fields["clip_qkv"], fields["attention_dropout"]
    attention = MptAttentionConfig(
        attn_pdrop=int(dropout) if dropout == int(dropout) else dropout,
        clip_qkv=None if clip is None else float(clip),
        softmax_scale=None if abs(scale - default) <= 1e-15 * default else float(scale),
    )
    # A nested config is written without it.
    return {"attn_config": {key: value for key, value in attention.to_dict().items() if key != "transformers_version"}}


FAMILIES = (
    Family(
        model_type="mpt",
        config=(
            Same("vocab_size"),
            Renamed("d_model", "hidden_size"),
            Renamed("n_heads", "num_attention_heads"),
            Renamed("n_layers", "num_hidden_layers"),
            Renamed("max_seq_len", "max_position_embeddings"),
            Renamed("layer_norm_epsilon", "norm_eps"),
            LAYERNORM_BLOCK, NO_PADDING_ROW, fourfold_ffn("d_model"),
            Fixed(
                norm_bias=False, hidden_act="gelu", position_embedding_type="alibi", alibi_form="key_offset",
                alibi_slope_order="mpt", alibi_in_float32=True,
            ),
            Computed(("attn_config",), _attention, _attention_back, kept=("attn_config",)),
        ),
        weights=(
            Rule("transformer.wte.weight", "model.embed_tokens.weight"),
            Rule("transformer.blocks.{layer}.norm_1.weight", "model.layers.{layer}.self_attn_pre_norm.weight"),
            fused_qkv("transformer.blocks.{layer}.attn.Wqkv", QKV_IN_BLOCKS),
            Rule("transformer.blocks.{layer}.attn.out_proj.weight", "model.layers.{layer}.self_attn.o_proj.weight"),
            Rule("transformer.blocks.{layer}.norm_2.weight", "model.layers.{layer}.mlp_pre_norm.weight"),
            Rule("transformer.blocks.{layer}.ffn.up_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"),
            Rule("transformer.blocks.{layer}.ffn.down_proj.weight", "model.layers.{layer}.mlp.down_proj.weight"),
            Rule("transformer.norm_f.weight", "model.norm.weight"),
            Rule("lm_head.weight", "lm_head.weight"),
        ),
        head_weights={"token_classification": (Rule("classifier.{leaf}", "score.{leaf}"),)},
        deviations=(FUSED_PRODUCT, FUSED_GRADIENT,),
    ),
)  # fmt: skip
