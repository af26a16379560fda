"""GPT-Neo: learned positions, global and local layers in turn, unscaled scores in float32."""

from ..config_map import Computed, Fixed, Renamed, Same
from ..family import Family
from ..rules import Identity, Rule
from ._common import LAYERNORM_BLOCK, NO_PADDING_ROW, TYPES_AMONG_TOKENS, gpt2_weights


PROJECTIONS = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"}
KINDS = {"global": "full_attention", "local": "sliding_attention"}


def _attention_types(fields):
    names = {ours: native for native, ours in KINDS.items()}
    layers = [names[kind] for kind in fields["layer_types"]]
    alternating = layers == ["global", "local"] * (len(layers) // 2)
    return {
        "attention_layers": layers,
        "attention_types": [[["global", "local"], len(layers) // 2]] if alternating else [[layers, 1]],
        "window_size": fields["sliding_window"] or 256,
    }


FAMILIES = (
    Family(
        model_type="gpt_neo",
        config=(
            Same("vocab_size", "hidden_size", "max_position_embeddings", "attention_dropout"),
            Renamed("classifier_dropout", "token_classifier_dropout"),
            Renamed("num_layers", "num_hidden_layers"),
            Renamed("num_heads", "num_attention_heads"),
            Renamed("activation_function", "hidden_act"),
            Renamed("layer_norm_epsilon", "norm_eps"),
            Renamed("resid_dropout", "residual_dropout"),
            Renamed("embed_dropout", "embedding_dropout"),
            Computed(
                ("intermediate_size",),
                lambda native: {"intermediate_size": native["intermediate_size"] or 4 * native["hidden_size"]},
                lambda fields: {"intermediate_size": fields["intermediate_size"]},
                kept=("intermediate_size",),
            ),
            Computed(
                ("attention_types", "attention_layers", "window_size"),
                lambda native: {
                    "layer_types": [KINDS[kind] for kind in native["attention_layers"]],
                    "sliding_window": native["window_size"],
                },
                _attention_types,
                kept=("attention_types", "window_size"),
            ),
            LAYERNORM_BLOCK, NO_PADDING_ROW, TYPES_AMONG_TOKENS,
            Fixed(
                attention_bias=False, attention_output_bias=True, mlp_bias=True, mlp_output_bias=True,
                attention_scaling=1.0, attention_scores_in_float32=True, position_embedding_type="learned",
            ),
        ),
        weights=(
            *gpt2_weights(Identity()),
            *(
                Rule(
                    f"transformer.h.{{layer}}.attn.attention.{native}.{{leaf}}",
                    f"model.layers.{{layer}}.self_attn.{ours}.{{leaf}}",
                )
                for native, ours in PROJECTIONS.items()
            ),
        ),
        head_weights={"token_classification": (Rule("classifier.{leaf}", "score.{leaf}"),)},
    ),
)  # fmt: skip
