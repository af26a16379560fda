"""OPT, BioGPT and XGLM: fairseq's decoder, with LayerNorm, two-matrix FFN and positions added to the embeddings."""

from ..config_map import Computed, Fixed, Renamed, Required, Same
from ..family import Family
from ..rules import Rule
from ._common import ALL_BIASES, LAYERNORM_BLOCK


# None of the three has a key for it.
NORM_EPS = Fixed(norm_eps=1e-5)


def scaled_embeddings(width: str) -> Computed:
    """`scale_embedding`: times the root of the native key `width`."""
    return Computed(
        ("scale_embedding",),
        lambda native: {"embedding_multiplier": native[width] ** 0.5 if native["scale_embedding"] else 1.0},
        lambda fields: {"scale_embedding": fields["embedding_multiplier"] != 1.0},
    )


def decoder_weights(decoder: str, final_norm: str, head: str = "lm_head") -> tuple[Rule, ...]:
    """Rules for the decoder of the given name; its norms take the slots that the config's placement builds."""
    layer, ours = decoder + "layers.{layer}.", "model.layers.{layer}."
    attention = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"}
    return (
        Rule(decoder + "embed_tokens.weight", "model.embed_tokens.weight"),
        Rule(decoder + "embed_positions.weight", "model.embed_positions.weight"),
        Rule(decoder + final_norm + ".{leaf}", "model.norm.{leaf}"),
        *(Rule(f"{layer}self_attn.{a}.{{leaf}}", f"{ours}self_attn.{b}.{{leaf}}") for a, b in attention.items()),
        Rule(layer + "fc1.{leaf}", ours + "mlp.up_proj.{leaf}"),
        Rule(layer + "activation_fn.{leaf}", ours + "mlp.act_fn.{leaf}"),
        Rule(layer + "fc2.{leaf}", ours + "mlp.down_proj.{leaf}"),
        Rule(layer + "self_attn_layer_norm.{leaf}", ours + "self_attn_pre_norm.{leaf}"),
        Rule(layer + "final_layer_norm.{leaf}", ours + "mlp_pre_norm.{leaf}"),
        Rule(head + ".weight", "lm_head.weight"),
    )


# Where the norms of every layer stand in the 350m model.
POST_NORMS = {"self_attn_layer_norm": "self_attn_post_norm", "final_layer_norm": "mlp_post_norm"}

FAMILIES = (
    Family(
        model_type="opt",
        config=(
            Same(
                "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
                "attention_dropout", "layerdrop",
            ),
            Renamed("ffn_dim", "intermediate_size"),
            Renamed("activation_function", "hidden_act"),
            Renamed("dropout", "residual_dropout"),
            Renamed("init_std", "initializer_range"),
            LAYERNORM_BLOCK, NORM_EPS,
            Fixed(
                scale_query=True, position_embedding_type="learned", position_offset=2,
                position_ids_source="attention_mask",
            ),
            # After the block's, because the 350m model has its norms behind the branches.
            Computed(
                ("do_layer_norm_before", "_remove_final_layer_norm"),
                lambda native: {
                    "norm_placement": "pre" if native["do_layer_norm_before"] else "post",
                    "final_norm": native["do_layer_norm_before"] and not native["_remove_final_layer_norm"],
                },
                lambda fields: {
                    "do_layer_norm_before": fields["norm_placement"] == "pre",
                    "_remove_final_layer_norm": fields["norm_placement"] == "pre" and not fields["final_norm"],
                },
                kept=("_remove_final_layer_norm",),
            ),
            Computed(
                ("layer_norm_elementwise_affine",),
                lambda native: {
                    "norm_affine": native["layer_norm_elementwise_affine"],
                    "norm_bias": native["layer_norm_elementwise_affine"],
                },
                lambda fields: {"layer_norm_elementwise_affine": fields["norm_affine"]},
            ),
            Computed(
                ("enable_bias",),
                lambda native: dict.fromkeys(ALL_BIASES.fields, native["enable_bias"]),
                lambda fields: {"enable_bias": fields["attention_bias"]},
            ),
            Computed(
                ("word_embed_proj_dim",),
                lambda native: {
                    "embedding_size": native["word_embed_proj_dim"],
                    "output_projection": native["word_embed_proj_dim"] != native["hidden_size"],
                },
                lambda fields: {"word_embed_proj_dim": fields["embedding_size"]},
            ),
        ),
        weights=(
            *decoder_weights("model.decoder.", "final_layer_norm"),
            *(
                Rule(f"model.decoder.layers.{{layer}}.{native}.{{leaf}}", f"model.layers.{{layer}}.{ours}.{{leaf}}")
                for native, ours in POST_NORMS.items()
            ),
            Rule("model.decoder.project_in.weight", "model.token_projection.weight"),
            Rule("model.decoder.project_out.weight", "model.output_projection.weight"),
        ),
    ),
    Family(
        model_type="biogpt",
        config=(
            Same(
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "max_position_embeddings", "hidden_act", "activation_dropout", "layerdrop",
            ),
            Computed(
                ("hidden_dropout_prob",),
                lambda native: dict.fromkeys(
                    ("residual_dropout", "embedding_dropout", "token_classifier_dropout"),
                    native["hidden_dropout_prob"],
                ),
                lambda fields: {"hidden_dropout_prob": fields["residual_dropout"]},
            ),
            Renamed("attention_probs_dropout_prob", "attention_dropout"),
            scaled_embeddings("hidden_size"), LAYERNORM_BLOCK, NORM_EPS, ALL_BIASES,
            Fixed(position_embedding_type="learned", position_offset=2, attention_softmax_in_float32=False),
        ),
        weights=decoder_weights("biogpt.", "layer_norm", head="output_projection"),
        head_weights={"token_classification": (Rule("classifier.{leaf}", "score.{leaf}"),)},
    ),
    Family(
        model_type="xglm",
        config=(
            Same("vocab_size", "max_position_embeddings", "attention_dropout", "activation_dropout", "layerdrop"),
            Renamed("d_model", "hidden_size"),
            Renamed("ffn_dim", "intermediate_size"),
            Renamed("num_layers", "num_hidden_layers"),
            Renamed("attention_heads", "num_attention_heads"),
            Renamed("activation_function", "hidden_act"),
            Renamed("init_std", "initializer_range"),
            Computed(
                ("dropout",),
                lambda native: dict.fromkeys(("residual_dropout", "embedding_dropout"), native["dropout"]),
                lambda fields: {"dropout": fields["residual_dropout"]},
            ),
            scaled_embeddings("d_model"), LAYERNORM_BLOCK, NORM_EPS, ALL_BIASES,
            Fixed(
                scale_query=True, attention_score_form="batched", attention_softmax_in_float32=False,
                position_embedding_type="sinusoidal", sinusoidal_layout="tensor2tensor", position_offset=2,
                sinusoidal_table_grows=True,
            ),
            Computed(
                (),
                lambda native: {"sinusoidal_padding_zero": native["pad_token_id"] is not None},
                lambda fields: {},
            ),
            Required("add_cross_attention", False, reason="a decoder inside an encoder-decoder does not stand alone"),
        ),
        weights=(
            *decoder_weights("model.", "layer_norm"),
        ),
    ),
)  # fmt: skip
