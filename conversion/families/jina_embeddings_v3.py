"""Jina Embeddings 3: XLM-RoBERTa with rotary positions in place of learned ones."""

from ..config_map import Fixed, Renamed, Same
from ..family import Family
from ..rules import Rule
from ._common import ALL_BIASES, SIZES, UNDECLARED_HEAD_DIM, WHOLE_ROPE
from .bert import CLASSIFIER_DROPOUT, DENSE_LM_HEAD, ENCODER_BLOCK, HIDDEN_DROPOUT, POST_NORM, TIED_BIAS, pooler
from .roberta import ROBERTA_HEADS, ROBERTA_LM_HEAD


LAYER, OURS = "roberta.layers.{layer}.", "model.layers.{layer}."

FAMILIES = (
    Family(
        model_type="jina_embeddings_v3",
        primary="masked_lm",
        config=(
            SIZES, Same("type_vocab_size", "hidden_act"), Renamed("layer_norm_eps", "norm_eps"), HIDDEN_DROPOUT,
            Renamed("attention_probs_dropout_prob", "attention_dropout"), CLASSIFIER_DROPOUT, WHOLE_ROPE, POST_NORM,
            UNDECLARED_HEAD_DIM, ENCODER_BLOCK, DENSE_LM_HEAD, ALL_BIASES, TIED_BIAS,
            Fixed(position_embedding_type="rope", lm_head_transform_act="gelu"),
            Fixed(pooler=True, pooler_scope="base", classifier_transform=True, classifier_transform_act="tanh"),
        ),
        weights=(
            Rule("roberta.embeddings.word_embeddings.weight", "model.embed_tokens.weight"),
            Rule("roberta.embeddings.token_type_embeddings.weight", "model.token_types.weight"),
            Rule("roberta.embeddings.LayerNorm.{leaf}", "model.embedding_norm.{leaf}"),
            *(
                Rule(f"{LAYER}self_attn.{name}_proj.{{leaf}}", f"{OURS}self_attn.{name}_proj.{{leaf}}")
                for name in "qkvo"
            ),
            Rule(LAYER + "mlp.fc1.{leaf}", OURS + "mlp.up_proj.{leaf}"),
            Rule(LAYER + "mlp.fc2.{leaf}", OURS + "mlp.down_proj.{leaf}"),
            Rule(LAYER + "post_attention_layernorm.{leaf}", OURS + "self_attn_post_norm.{leaf}"),
            Rule(LAYER + "post_mlp_layernorm.{leaf}", OURS + "mlp_post_norm.{leaf}"),
            *ROBERTA_LM_HEAD,
        ),
        base_weights=pooler("roberta"),
        head_weights=ROBERTA_HEADS,
    ),
)  # fmt: skip
