"""T5, mT5 and UMT5: pre-RMSNorm, unscaled attention, a learned bias per bucket of distance."""

from functools import cache

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..config_map import Computed, Entry, Fixed, Irrelevant, OnBothStacks, OnStack, Renamed, Same
from ..family import Family
from ..rules import Rule
from .bart import CLASSIFIER_DROPOUT, CLASSIFIER_WEIGHTS, DENSE_CLASSIFIER


def _activation(native):
    return {"ffn_type": "glu" if native["is_gated_act"] else "mlp", "hidden_act": native["dense_act_fn"]}


def _projection(fields):
    gated = fields["ffn_type"] == "glu"
    act = "gelu" if gated and fields["hidden_act"] == "gelu_new" else fields["hidden_act"]
    return {"feed_forward_proj": f"gated-{act}" if gated else act}


def _dropout(native):
    names = ("attention_dropout", "residual_dropout", "embedding_dropout", "activation_dropout", "final_dropout")
    return dict.fromkeys(names, native["dropout_rate"])


def stack(bias_per_layer: bool) -> tuple[Entry, ...]:
    """The entries of one stack."""
    return (
        Same("vocab_size", "pad_token_id", "relative_attention_num_buckets", "relative_attention_max_distance"),
        Renamed("d_model", "hidden_size"),
        Renamed("d_kv", "head_dim"),
        Renamed("d_ff", "intermediate_size"),
        Renamed("num_heads", "num_attention_heads"),
        Renamed("layer_norm_epsilon", "norm_eps"),
        Renamed("initializer_factor", "initializer_range"),
        Computed(("dropout_rate",), _dropout, lambda fields: {"dropout_rate": fields["residual_dropout"]}),
        Computed(("feed_forward_proj", "is_gated_act", "dense_act_fn"), _activation, _projection),
        Fixed(
            norm_type="rmsnorm",
            norm_casting_mode="llama",
            attention_scaling=1.0,
            position_embedding_type="relative_bias",
            relative_attention_per_layer=bias_per_layer,
            padding_embedding_frozen=False,
            ffn_output_in_float32=True,
            initializer_scheme="fan_in",
            clamp_in_float16="sublayers",
        ),
    )


UNREAD = (Irrelevant("is_decoder", "set on the stacks by the class"),)


def config(bias_per_layer: bool, *more: Entry) -> tuple[Entry, ...]:
    """The entries of all three types, which differ in where the relative bias is."""
    return (
        OnBothStacks(*stack(bias_per_layer)),
        OnStack("encoder", Renamed("num_layers", "num_hidden_layers")),
        OnStack("decoder", Renamed("num_decoder_layers", "num_hidden_layers"), CLASSIFIER_DROPOUT, DENSE_CLASSIFIER),
        # Both stacks' and the whole's.
        Same("pad_token_id"),
        # True in any case; the weights say whether the head is the embedding.
        Fixed(share_embeddings=True),
        Same("tie_word_embeddings"),
        *UNREAD,
        *more,
    )


def weights(bias_per_layer: bool) -> tuple[Rule, ...]:
    """The rules of all three types."""
    rules = [
        Rule("shared.weight", "model.decoder.embed_tokens.weight"),
        Rule("lm_head.weight", "lm_head.weight"),
    ]
    for stack, sublayers in (
        ("encoder", (("SelfAttention", "self_attn"), ("DenseReluDense", "mlp"))),
        ("decoder", (("SelfAttention", "self_attn"), ("EncDecAttention", "cross_attn"), ("DenseReluDense", "mlp"))),
    ):
        block, layer = f"{stack}.block.{{layer}}.layer", f"model.{stack}.layers.{{layer}}"
        rules.append(Rule(f"{stack}.final_layer_norm.weight", f"model.{stack}.norm.weight"))
        first = "{layer}" if bias_per_layer else "0"
        rules.append(
            Rule(
                f"{stack}.block.{first}.layer.0.SelfAttention.relative_attention_bias.weight",
                f"model.{stack}.position_bias.tables.{first}.weight",
            )
        )
        for index, (native, ours) in enumerate(sublayers):
            rules.append(Rule(f"{block}.{index}.layer_norm.weight", f"{layer}.{ours}_pre_norm.weight"))
            if ours == "mlp":
                names = (("wi", "up_proj"), ("wi_0", "gate_proj"), ("wi_1", "up_proj"), ("wo", "down_proj"))
            else:
                names = (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "o_proj"))
            rules += [
                Rule(f"{block}.{index}.{native}.{theirs}.weight", f"{layer}.{ours}.{own}.weight")
                for theirs, own in names
            ]
    return tuple(rules)


def _output_scale(native):
    scaled = native["scale_decoder_outputs"]
    return {"decoder.lm_head_input_scale": native["d_model"] ** -0.5 if scaled else 1.0}


@cache
def _umt5_says_whether_it_scales() -> bool:
    """As T5 does; before transformers 5.24 it scales in any case."""
    return hasattr(CONFIG_MAPPING["umt5"](), "scale_decoder_outputs")


_SCALED_OUTPUT = Computed(
    ("scale_decoder_outputs",),
    lambda native: _output_scale({"scale_decoder_outputs": True, **native}),
    lambda fields: (
        {"scale_decoder_outputs": fields["decoder.lm_head_input_scale"] != 1.0}
        if _umt5_says_whether_it_scales()
        else {}
    ),
)
_START = Same("decoder_start_token_id")
# A key that the class of T5 reads without declaring it.
_UNDECLARED_START = Computed(
    ("decoder_start_token_id",),
    lambda native: {"decoder_start_token_id": native.get("decoder_start_token_id")},
    lambda fields: {} if (start := fields["decoder_start_token_id"]) is None else {"decoder_start_token_id": start},
)


def encoder(model_type: str, bias_per_layer: bool) -> Family:
    """The encoder alone: as text-to-image models use it, and with a classifier on every token."""
    decoder = ("num_decoder_layers", "decoder_start_token_id", "scale_decoder_outputs")
    return Family(
        model_type=model_type,
        primary="base",
        part="encoder",
        config=(
            *stack(bias_per_layer),
            Renamed("num_layers", "num_hidden_layers"),
            Fixed(is_causal=False),
            Renamed("classifier_dropout", "token_classifier_dropout"),
            *UNREAD,
            *(Irrelevant(key, "describes the decoder") for key in decoder),
        ),
        weights=(
            Rule("shared.weight", "embed_tokens.weight"),
            *(
                rule.without_prefixes("", "model.encoder.")
                for rule in weights(bias_per_layer)
                if rule.is_inside("model.encoder.", "encoder.")
            ),
        ),
        head_weights={"token_classification": (Rule("classifier.{leaf}", "score.{leaf}"),)},
        inside={"token_classification": "transformer."},
    )


# The class for question answering has the stacks beside its head.
HEADS = {"sequence_classification": CLASSIFIER_WEIGHTS}
INSIDE = {"sequence_classification": "transformer.", "question_answering": ""}


FAMILIES = (
    Family(
        model_type="t5",
        primary="seq2seq_lm",
        encoder=encoder("t5", bias_per_layer=False),
        loosely_tied="lm_head.weight",
        config=config(
            False,
            _UNDECLARED_START,
            Computed(
                ("scale_decoder_outputs",),
                _output_scale,
                lambda fields: {"scale_decoder_outputs": fields["decoder.lm_head_input_scale"] != 1.0},
            ),
        ),
        weights=weights(bias_per_layer=False),
        head_weights=HEADS,
        inside=INSIDE,
    ),
    Family(
        model_type="mt5",
        primary="seq2seq_lm",
        encoder=encoder("mt5", bias_per_layer=False),
        loosely_tied="lm_head.weight",
        config=config(False, _START),
        weights=weights(bias_per_layer=False),
        head_weights=HEADS,
        inside=INSIDE,
    ),
    Family(
        model_type="umt5",
        primary="seq2seq_lm",
        encoder=encoder("umt5", bias_per_layer=True),
        loosely_tied="lm_head.weight",
        config=config(True, _START, _SCALED_OUTPUT),
        weights=weights(bias_per_layer=True),
        head_weights=HEADS,
        inside=INSIDE,
    ),
)
