"""RoBERTa with norms before the sublayers and one more at the end: RoBERTa-PreLayerNorm and XLM-RoBERTa-XL."""

from ..config_map import Fixed
from ..family import Family
from ..rules import Rule
from .bert import attention, embeddings, pooler, with_decoder
from .roberta import ROBERTA, ROBERTA_HEADS, ROBERTA_LM_HEAD


def _weights(prefix: str, attention_norm: str, ffn_norm: str, final_norm: str) -> tuple[Rule, ...]:
    """The tensors; the model inside a head is called `prefix`, the others are the names of its norms."""
    layer, ours = f"{prefix}.encoder.layer.{{layer}}.", "model.layers.{layer}."
    return (
        *embeddings(prefix),
        *attention(prefix),
        Rule(f"{layer}{attention_norm}.{{leaf}}", ours + "self_attn_pre_norm.{leaf}"),
        Rule(f"{layer}{ffn_norm}.{{leaf}}", ours + "mlp_pre_norm.{leaf}"),
        Rule(f"{prefix}.{final_norm}.{{leaf}}", "model.norm.{leaf}"),
        *ROBERTA_LM_HEAD,
    )


FAMILIES = tuple(map(with_decoder, (
    Family(
        model_type="roberta-prelayernorm",
        primary="masked_lm",
        config=(*ROBERTA, Fixed(norm_placement="pre", embedding_norm=True)),
        weights=(
            *_weights("roberta_prelayernorm", "attention.LayerNorm", "intermediate.LayerNorm", "LayerNorm"),
            Rule("roberta_prelayernorm.embeddings.LayerNorm.{leaf}", "model.embedding_norm.{leaf}"),
        ),
        base_weights=pooler("roberta_prelayernorm"),
        head_weights=ROBERTA_HEADS,
    ),
    Family(
        model_type="xlm-roberta-xl",
        primary="masked_lm",
        config=(*ROBERTA, Fixed(norm_placement="pre", embedding_norm=False, ffn_residual_dropout=False)),
        weights=_weights("roberta", "attention.self_attn_layer_norm", "LayerNorm", "encoder.LayerNorm"),
        base_weights=pooler("roberta"),
        head_weights=ROBERTA_HEADS,
    ),
)))  # fmt: skip
