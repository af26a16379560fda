"""Baichuan 2, which brings its own code: Llama with one QKV projection, a normalised head, and ALiBi in the 13B."""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..config_map import Computed, Irrelevant, Renamed, Required, Same
from ..errors import ConversionError
from ..family import Family
from ..rules import Rule
from ._common import (
    EMBEDDINGS_AND_HEAD,
    FUSED_GRADIENT,
    FUSED_PRODUCT,
    GATED_FFN,
    LLAMA_BLOCK,
    PRE_NORMS,
    QKV_IN_BLOCKS,
    RMS_EPS,
    fused_qkv,
)


@strict
class BaichuanConfig(PreTrainedConfig):
    """The published keys. The 7B models have `max_position_embeddings` and RoPE, the 13B models neither but ALiBi."""

    model_type = "baichuan"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 125696
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int | None = None
    model_max_length: int | None = None
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    z_loss_weight: int | float = 0

    def to_dict(self) -> dict[str, Any]:
        # The presence of a key tells the two kinds apart.
        lengths = ("max_position_embeddings", "model_max_length")
        return {key: value for key, value in super().to_dict().items() if key not in lengths or value is not None}


class BaichuanForCausalLM(PreTrainedModel):
    """The tensors of a Baichuan checkpoint under their names."""

    config: BaichuanConfig
    config_class = BaichuanConfig
    base_model_prefix = "model"

    def __init__(self, config: BaichuanConfig):
        super().__init__(config)
        width, inner = config.hidden_size, config.intermediate_size
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        self.model.layers = nn.ModuleList()
        for _ in range(config.num_hidden_layers):
            layer = nn.Module()
            layer.self_attn = nn.ModuleDict(
                {"W_pack": nn.Linear(width, 3 * width, bias=False), "o_proj": nn.Linear(width, width, bias=False)}
            )
            layer.mlp = nn.ModuleDict(
                {
                    "gate_proj": nn.Linear(width, inner, bias=False),
                    "up_proj": nn.Linear(width, inner, bias=False),
                    "down_proj": nn.Linear(inner, width, bias=False),
                }
            )
            layer.input_layernorm = nn.RMSNorm(width)
            layer.post_attention_layernorm = nn.RMSNorm(width)
            self.model.layers.append(layer)
        self.model.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, *args, **kwargs):
        raise NotImplementedError(
            "This class holds a Baichuan checkpoint's weights for conversion. Convert it with `from_native` to run it "
            "or save it and load it with the code that belongs to the checkpoint."
        )


# Nothing else in a config tells it from Baichuan 2.
BAICHUAN_1_VOCABULARY = 64000

# What the two kinds have beside their positions' type: dtypes and orders as the published code has them.
ROPE = {
    "position_embedding_type": "rope", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rope_in_float32": True, "rope_table_in_float32": True, "rope_frequencies_in_float32": True,
}  # fmt: skip
ALIBI = {
    "position_embedding_type": "alibi", "alibi_form": "key_index", "alibi_slopes_in_float64": True,
    "attention_score_form": "divided", "attention_softmax_in_float32": False,
}  # fmt: skip


def _positions(native):
    length = native.get("max_position_embeddings")
    if length is not None and native["vocab_size"] == BAICHUAN_1_VOCABULARY:
        raise ConversionError(
            "This is Baichuan 1 with RoPE (a vocabulary of 64000 and `max_position_embeddings`), whose rotation "
            "rounds differently and is not supported. Use Baichuan 2."
        )
    if length is not None:
        return {"max_position_embeddings": length, **ROPE}
    return {"max_position_embeddings": native["model_max_length"], **ALIBI}


def _positions_back(fields):
    name = "max_position_embeddings" if fields["position_embedding_type"] == "rope" else "model_max_length"
    return {name: fields["max_position_embeddings"]}


FAMILIES = (
    Family(
        model_type="baichuan",
        config=(
            Same(
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "hidden_act",
            ),
            RMS_EPS, *LLAMA_BLOCK,
            Computed(
                ("max_position_embeddings", "model_max_length"), _positions, _positions_back,
                # Beside `max_position_embeddings` it tells the tokenizer how much to read.
                kept=("model_max_length",),
            ),
            # Baichuan 1 has a plain head.
            Computed(
                (),
                lambda native: {"lm_head_normalized": native["vocab_size"] != BAICHUAN_1_VOCABULARY},
                lambda fields: {},
            ),
            # The published loss takes the square of the largest logit where the paper and ours take log(Z)'s.
            Renamed("z_loss_weight", "z_loss_coefficient"),
            Required("tie_word_embeddings", False, reason="the published head would normalise the embeddings with it"),
            Irrelevant("_from_model_config", "a note of transformers"),
        ),
        weights=(
            *EMBEDDINGS_AND_HEAD, *GATED_FFN, *PRE_NORMS,
            fused_qkv("model.layers.{layer}.self_attn.W_pack", QKV_IN_BLOCKS),
            Rule("model.layers.{layer}.self_attn.o_proj.weight", "model.layers.{layer}.self_attn.o_proj.weight"),
        ),
        deviations=(FUSED_PRODUCT, FUSED_GRADIENT),
        own_config=BaichuanConfig,
        own_models={"causal_lm": BaichuanForCausalLM},
    ),
)  # fmt: skip
