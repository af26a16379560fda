"""DistilBERT: BERT without token types and pooler, under names of its own."""

from ..config_map import Computed, Fixed, Mapped, Renamed, Same
from ..family import Deviation, Family
from ..rules import Rule
from ._common import ALL_BIASES
from .bert import CHUNKED_FFN, CLASSIFIER, CLASSIFIERS, DENSE_LM_HEAD, ENCODER_BLOCK, LEARNED_POSITIONS, POST_NORM


CHUNKED_GRADIENTS = Deviation(
    "with `chunk_size_feed_forward`, the norm behind the FFN takes all tokens natively and a chunk at a time here, so "
    "that the gradients of its weights sum in another order",
    gradients_only=True,
    applies=lambda config: any(layer.ffn_chunk_size for layer in config.per_layer_config),
)

LAYER, OURS = "distilbert.transformer.layer.{layer}.", "model.layers.{layer}."


FAMILIES = (
    Family(
        model_type="distilbert",
        primary="masked_lm",
        deviations=(CHUNKED_GRADIENTS,),
        config=(
            Same("vocab_size", "max_position_embeddings", "attention_dropout"),
            Renamed("dim", "hidden_size"),
            Renamed("hidden_dim", "intermediate_size"),
            Renamed("n_layers", "num_hidden_layers"),
            Renamed("n_heads", "num_attention_heads"),
            Renamed("activation", "hidden_act"),
            Computed(
                ("dropout",),
                lambda native: dict.fromkeys(
                    ("residual_dropout", "embedding_dropout", "token_classifier_dropout"), native["dropout"]
                ),
                lambda fields: {"dropout": fields["residual_dropout"]},
            ),
            Renamed("seq_classif_dropout", "classifier_dropout"),
            Same("qa_dropout"),
            LEARNED_POSITIONS, CHUNKED_FFN, ENCODER_BLOCK, DENSE_LM_HEAD, POST_NORM, ALL_BIASES,
            Fixed(norm_eps=1e-12, attention_residual_dropout=False, classifier_transform_dropout=False),
            Fixed(classifier_transform=True, classifier_transform_act="relu"),
            Mapped("sinusoidal_pos_embds", "initializer_positions", {False: "normal", True: "sinusoidal"}),
        ),
        weights=(
            Rule("distilbert.embeddings.word_embeddings.weight", "model.embed_tokens.weight"),
            Rule("distilbert.embeddings.position_embeddings.weight", "model.embed_positions.weight"),
            Rule("distilbert.embeddings.LayerNorm.{leaf}", "model.embedding_norm.{leaf}"),
            *(
                Rule(f"{LAYER}attention.{name}_lin.{{leaf}}", f"{OURS}self_attn.{name[0]}_proj.{{leaf}}")
                for name in ("q", "k", "v", "out")
            ),
            Rule(LAYER + "sa_layer_norm.{leaf}", OURS + "self_attn_post_norm.{leaf}"),
            Rule(LAYER + "ffn.lin1.{leaf}", OURS + "mlp.up_proj.{leaf}"),
            Rule(LAYER + "ffn.lin2.{leaf}", OURS + "mlp.down_proj.{leaf}"),
            Rule(LAYER + "output_layer_norm.{leaf}", OURS + "mlp_post_norm.{leaf}"),
            Rule("vocab_transform.{leaf}", "lm_head_transform.dense.{leaf}"),
            Rule("vocab_layer_norm.{leaf}", "lm_head_transform.norm.{leaf}"),
            Rule("vocab_projector.{leaf}", "lm_head.{leaf}"),
        ),
        head_weights={
            **CLASSIFIERS,
            **dict.fromkeys(
                ("sequence_classification", "multiple_choice"),
                (Rule("pre_classifier.{leaf}", "pre_classifier.dense.{leaf}"), *CLASSIFIER),
            ),
        },
    ),
)  # fmt: skip
