"""RoFormer: BERT with rotated pairs by a table that its checkpoints hold, and ELECTRA's narrow embeddings."""

from hf_variants.model.positions import sinusoidal_table

from ..config_map import Computed, Fixed, Renamed, Same
from ..family import Family
from ..rules import Rule
from .bert import (
    BERT_LM_HEAD,
    CLASSIFIERS,
    DENSE_CLASSIFIER,
    ENCODER,
    LEARNED_POSITIONS,
    POST_NORM,
    TIED_BIAS,
    attention,
    post_norms,
    with_decoder,
)


def _table(config):
    return sinusoidal_table(config.max_position_embeddings, config.head_dim, "half")


def _heads(native):
    """What the class takes for its classifiers from keys of the stack."""
    dropout = native["hidden_dropout_prob"]
    return {
        "classifier_dropout": dropout, "token_classifier_dropout": dropout, "qa_dropout": 0.0,
        "classifier_transform_act": native["hidden_act"],
    }  # fmt: skip


ROTATION = Fixed(
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rope_interleaved=True,
    rope_table_in_checkpoint=True, generation_counts_padding=True,
)  # fmt: skip

FAMILIES = (
    with_decoder(Family(
        model_type="roformer",
        primary="masked_lm",
        config=(
            *(entry for entry in ENCODER if entry is not LEARNED_POSITIONS),
            POST_NORM, TIED_BIAS, ROTATION, Same("embedding_size"), Renamed("rotary_value", "rope_turns_values"),
            Computed((), _heads, lambda fields: {}),
            # As transformers' summary of a sequence is where the config says nothing of it.
            Fixed(choice_pooling="last_position", choice_transform=False, choice_dropout=0.0),
            Fixed(
                embedding_projection_bias=True, embedding_projection_position="after_norm", classifier_transform=True,
                attention_score_form="divided",
            ),
        ),
        weights=(
            Rule("roformer.embeddings.word_embeddings.weight", "model.embed_tokens.weight"),
            Rule("roformer.embeddings.token_type_embeddings.weight", "model.token_types.weight"),
            Rule("roformer.embeddings_project.{leaf}", "model.embedding_projection.{leaf}"),
            # Checkpoints may lack it, and the native class computes it then.
            Rule("roformer.encoder.embed_positions.weight", "model.rotary_emb.table_0.weight", absent=_table),
            *attention("roformer"),
            *post_norms("roformer"),
            *BERT_LM_HEAD,
        ),
        head_weights={**CLASSIFIERS, "sequence_classification": DENSE_CLASSIFIER},
    )),
)  # fmt: skip
