"""The configuration of one Transformer stack: every architectural axis is a field, none is keyed on a model's name."""

# First, so that a transformers too old for what follows is refused in words.
from .versions import MINIMUM  # noqa: F401


# isort: split
import copy
import difflib
import importlib
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig


LAYER_TYPE_LETTERS = {"F": "full_attention", "S": "sliding_attention"}

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")

# What transformers' RoPE functions read without a default, beside `rope_theta`.
ROPE_KEYS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}

# Fields of older config.json files -> what they are called now.
RENAMED_FIELDS = {"layer_scale_type": "learned_scale_type"}

# The activations of transformers' `ACT2FN` that have parameters.
LEARNED_ACTIVATIONS = ("prelu", "xielu")

# Fields that `per_layer_config` may change: what the builder reads from a layer's own config. All others are read for
# the stack as a whole (masks, caches, embeddings, final norm), where a layer's value would be ignored or mixed up.
PER_LAYER_FIELDS = frozenset(
    {
        "activation_dropout", "attention_bias", "attention_dropout", "attention_gate", "attention_output_bias",
        "attention_residual_dropout", "attention_scaling", "attention_score_form", "attention_scores_in_float32",
        "attention_sinks", "attention_softmax_in_float32", "attention_sub_norm", "attn_logit_softcapping",
        "broadcast_key_value", "clip_qkv", "deepnorm_alpha", "deepnorm_beta", "dropout_after_sum", "ffn_chunk_size",
        "ffn_residual_dropout", "ffn_sub_norm", "ffn_type", "fused_gate_up", "head_dim", "hidden_act",
        "intermediate_size", "layer_scale_init", "learned_scale_type", "mlp_bias", "mlp_output_bias", "norm_placement",
        "num_attention_heads", "num_key_value_heads", "parallel_block", "parallel_sum_order", "qk_norm",
        "qk_norm_affine", "qk_norm_after_rope", "qk_norm_bias", "qk_norm_eps", "qk_norm_type",
        "residual_dropout", "residual_from_norm", "residual_multiplier", "scale_query", "unfused_bias",
    }
)  # fmt: skip

# Sublayers that `per_layer_config` may leave out with `skip`.
SKIPPABLE = ("self_attn", "mlp")

# Keys that transformers and its tools put into a config.json next to a model's own fields.
FRAMEWORK_KEYS = frozenset(
    {
        "architectures", "attn_implementation", "auto_map", "dtype", "finetuning_task", "head_dim", "label2id",
        "model_type", "name_or_path", "num_labels", "output_attentions", "partial_rotary_factor", "per_layer_config",
        "quantization_config", "rope_scaling", "rope_theta", "task_specific_params", "torch_dtype",
        "transformers_version", "use_return_dict",
    }
)  # fmt: skip


class VariantConfigError(StrictDataclassClassValidationError, ValueError):
    """A config that cannot be built; the message has every problem with its remedy."""

    def __init__(self, message: str):
        Exception.__init__(self, message)


@strict
class VariantConfig(PreTrainedConfig):
    r"""
    Configuration of one dense Transformer stack: a decoder (`is_causal=True`) or an encoder (`is_causal=False`).

    The defaults describe a small Llama-like decoder. Fields left at `None` are derived on construction and written
    out explicitly, so that a saved `config.json` is complete. All inconsistencies are reported together, each with its
    remedy, as a `ValueError`.

    Size:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads (`int`): as everywhere in transformers.
        intermediate_size (`int`): width of the feed-forward network; derived as 4 d, or 8/3 d when gated, rounded up
            to a multiple of 64.
        num_key_value_heads (`int`): key/value heads: all (MHA), some (GQA, https://arxiv.org/abs/2305.13245), or one
            (MQA, https://arxiv.org/abs/1911.02150).
        head_dim (`int`): width of one head; need not be `hidden_size / num_attention_heads`.
        max_position_embeddings (`int`): trained context length; the size of a learned or sinusoidal table.
        embedding_size (`int`): width of the token embedding when factorised (ALBERT, ELECTRA, OPT-350m).
        embedding_projection_bias (`bool`): bias of the projection from `embedding_size` to `hidden_size`.
        embedding_projection_position (`str`): project the token embedding alone, `"before_positions"` (OPT), or the
            normalised sum, `"after_norm"` (ELECTRA).
        output_projection (`bool`): project back to `embedding_size` before the LM head (OPT-350m).

    Normalisation:
        norm_type (`str`): `"layernorm"` or `"rmsnorm"` (https://arxiv.org/abs/1910.07467).
        norm_eps (`float`): added to the variance or mean square.
        norm_affine, norm_bias (`bool`): learned weight; learned bias (layernorm only).
        norm_unit_offset (`bool`): the stored weight is `w` and the applied one `1 + w` (Gemma, Nemotron).
        norm_casting_mode (`str`): order of casts below float32. `"llama"`: normalise in float32, cast, then multiply;
            `"gemma"`: everything in float32, cast once; `"none"`: in the input's dtype (LayerNorm: torch's kernel).
        norm_placement (`str`): `"pre"` (Llama, GPT-2), `"post"` (2017, BERT), `"branch"` (OLMo 2), `"sandwich"`
            (Gemma 2), `"deepnorm"` (https://arxiv.org/abs/2203.00555).
        parallel_block (`str`): `"none"`, `"shared_norm"` (GPT-J, PaLM, Cohere) or `"two_norms"` (GPT-NeoX).
        parallel_sum_order (`str`): `"branches_first"`: (attention + FFN) + residual; `"residual_first"`: (residual +
            attention) + FFN. The same sum, rounded differently.
        final_norm (`bool`): norm after the last block; default: yes unless the blocks end in one (post, deepnorm).
        embedding_norm (`bool`): norm right after the embeddings (BERT, BLOOM, BART).
        embedding_norm_position (`str`): norm the whole sum, `"after_positions"`, or the token embedding before
            anything is added to it, `"before_positions"` (the decoder of BlenderBot small).
        first_layer_pre_norm (`bool`): whether layer 0's attention has its pre-norm (ModernBERT: no).
        residual_from_norm (`bool`): the residual branch starts after the pre-norm (BLOOM's option).
        residual_multiplier (`float`): every branch is multiplied by it before the addition (Granite).
        learned_scale_type (`str`): `"none"`, `"channel"` (LayerScale, https://arxiv.org/abs/2103.17239) or `"scalar"`
            (ReZero, https://arxiv.org/abs/2003.04887); `layer_scale_init` (`float`) is the learned scale's start.
        deepnorm_alpha, deepnorm_beta (`float`): residual multiplier and initialisation gain; derived from the depth.

    Feed-forward:
        ffn_type (`str`): `"mlp"` or `"glu"` (https://arxiv.org/abs/2002.05202); hidden_act (`str`): a key of
            transformers' `ACT2FN` (silu + glu is SwiGLU).
        mlp_bias, mlp_output_bias (`bool`): biases of the inner and the output projection.
        unfused_bias (`bool`): here and in attention, round the product before a bias is added (Falcon).
        ffn_sub_norm (`bool`): norm before the output projection (sub-LN, NormFormer, BitNet).
        fused_gate_up (`bool`): the activation reads one half of a tensor with gate and up side by side, as one product
            for both leaves it (GLM, Phi-3), which CPU kernels round differently.
        ffn_output_in_float32 (`bool`): the output projection stays in float32 where a model is loaded in float16, and so
            does the residual stream behind it; norms give their weights' dtype (T5).
        clamp_in_float16 (`str`): of float16 only, to keep values finite: `"none"`; `"sublayers"`: after every sublayer,
            1000 below the largest number where one is infinite (T5); `"blocks"`: so after every block (mBART); or
            `"infinite_blocks"`: where one is not finite (BART).
        ffn_chunk_size (`int`): tokens that the network, with the norms and the residual around it, takes at a time, to
            save memory (BERT's `chunk_size_feed_forward`); 0: all.

    Attention:
        attention_bias, attention_output_bias (`bool`): biases of q/k/v and of the output projection.
        qk_norm (`str`): `"none"`, `"head"` (one weight per head channel, Qwen 3), `"full"` (over all heads, OLMo 2) or
            `"per_head"` (own weights for every head, StableLM, Cohere).
        qk_norm_type, qk_norm_eps, qk_norm_affine, qk_norm_bias: as the `norm_*` fields, which they default to.
        qk_norm_after_rope (`bool`): normalise after the rotation (HunYuan, nanochat).
        heads_first_from (`str`): the step from which on heads stand before positions in memory: `"norm"` on heads
            (Phi), `"rotation"` (Llama, Qwen 3) or `"scores"` (GPT-J): the same values, but some gradients sum in another
            order.
        broadcast_key_value (`bool`): leave it to the attention function to give the one key/value head to every query
            head (Falcon); torch's sdpa then takes another kernel.
        attention_scaling (`float`): multiplier of the scores; default `head_dim ** -0.5`.
        scale_query (`bool`): multiply the queries instead of the scores (OPT): the same product, rounded differently.
        scale_attn_by_inverse_layer_idx (`bool`): also divide the scores by the layer's number, from 1 (GPT-2's option).
        attention_score_form (`str`): how eager attention rounds the scores: `"multiplied"`, product times scaling,
            plus the position bias; `"batched"`, the same with another layout of the keys, and so another gradient
            (XGLM); `"divided"`, product divided by the scaling's inverse (GPT-J); `"fused"`, product and scaling in
            one operation (GPT-2's option); `"biased"`, product, scaling and position bias in one operation (BLOOM).
        attention_scores_in_float32 (`bool`): eager attention upcasts queries and keys first (GPT-J, GPT-Neo).
        attention_softmax_in_float32 (`bool`): eager attention computes the softmax in float32, or else in the scores'
            dtype (GPT-2).
        attn_logit_softcapping (`float`): scores become `c * tanh(scores / c)` (Gemma 2).
        attention_sinks (`bool`): one learned extra logit per head in the softmax's denominator (gpt-oss).
        attention_gate (`str`): `"none"`, `"headwise"` or `"elementwise"` sigmoid gate on the attention's output, from
            its input (https://arxiv.org/abs/2505.06708).
        attention_sub_norm (`bool`): norm before the output projection (sub-LN, BitNet).
        clip_qkv (`float`): clamp q, k and v to [-c, c] (MPT, OLMo).
        is_causal (`bool`): decoder or bidirectional encoder.
        add_cross_attention (`bool`): attend to encoder states of width `cross_attention_hidden_size`.

    Layers:
        layer_types (`list[str]` or `str`): `"full_attention"` / `"sliding_attention"` for every layer, or a pattern of
            the letters F and S that is repeated over the depth, such as `"SSSF"`.
        sliding_window (`int`): keys a sliding layer sees, the current one included; in an encoder, keys up to
            `sliding_window` positions away on either side.
        per_layer_config (`dict`): transformers' own per-layer overrides, of the fields in `PER_LAYER_FIELDS`, such as
            `{1: {"num_key_value_heads": 1}, 3: {"skip": ["mlp"]}}`.

    Positions:
        position_embedding_type (`str`): `"rope"`, `"learned"`, `"sinusoidal"`, `"alibi"`, `"relative_bias"` (T5) or
            `"none"`.
        rope_parameters (`dict`): transformers' standard dictionary, flat or per layer type (`None`: no rotation).
        rope_interleaved (`bool`): rotate pairs (0, 1), (2, 3) (GPT-J, Cohere) instead of halves (Llama).
        rope_in_float32 (`bool`): rotate in float32 (Cohere); rope_table_in_float32 (`bool`): keep cos and sin in
            float32 (OLMo 2, ERNIE 4.5); rope_reversed (`bool`): rotate by the negative angle (nanochat).
        rope_result_in_float32 (`bool`): leave rotated queries and keys in float32 up to the scores of eager attention;
            a cache rounds the keys (CodeGen).
        rope_table_stored (`bool`): read cos and sin from a table of `max_position_embeddings` positions that is cast
            with the weights (GPT-J), instead of computing them for the positions at hand.
        rope_frequencies_in_float32 (`bool`): the frequencies stay in float32 when the weights are cast (Baichuan).
        longrope_recomputes_cache (`bool`): generation drops the cache where the length passes the original context of
            rope type `"longrope"`, so that all keys get the long factors (Phi-3).
        no_rope_layers (`list[int]`): as in SmolLM3: per layer, 1 where the rotation is applied and 0 where not.
        layer_rope_theta (`list[float]`): per layer, the base that replaces `rope_theta`; 0 where nothing is rotated
            (Granite SWA).
        position_offset (`int`): added to the index into a learned or sinusoidal table (OPT, BART: 2).
        position_ids_source (`str`): where absent `position_ids` come from: `"sequence"` (0, 1, 2, ...),
            `"attention_mask"` (count of real tokens so far, OPT) or `"input_ids"` (count of non-padding tokens, with
            padding at index `pad_token_id`, RoBERTa; that row of a learned table is frozen as the embedding's).
        padding_mask_source (`str`): what stands for an absent `attention_mask`: `"none"` (every token is real) or
            `"input_ids"` (tokens other than `pad_token_id` are; a pass of a decoder that has a cache, or makes one in
            evaluation, takes every token as real all the same, T5Gemma).
        sinusoidal_layout (`str`): `"interleaved"` sin/cos pairs (2017), `"half"` sin | cos (Marian) or
            `"tensor2tensor"` (sin | cos with the exponent's divisor d/2 - 1; XGLM, M2M-100).
        sinusoidal_padding_zero (`bool`): the table's row `pad_token_id` is zero.
        sinusoidal_table_stored (`bool`): the table is a frozen parameter and part of a checkpoint (Marian, Pegasus).
        sinusoidal_table_grows (`bool`): a longer input makes a longer table (M2M-100), instead of failing.
        alibi_bias_max (`int`): the largest exponent of a slope (https://arxiv.org/abs/2108.12409: 8).
        alibi_slope_order (`str`): order of slopes when the number of heads is no power of two: `"paper"` or `"mpt"`.
        alibi_form (`str`): `"distance"` (paper), `"key_position"` (BLOOM: slope times the key's position counted over
            real tokens), `"key_index"` (Baichuan: slope times the key's index) or `"key_offset"` (MPT: slope times the
            key's index minus the last one). Equal after the softmax in exact arithmetic, not in floating point.
        alibi_slopes_in_bfloat16 (`bool`): slopes and products are rounded to bfloat16 (Falcon).
        alibi_slopes_in_float64 (`bool`): slopes of the paper's order are rounded to float32 once, at the end (Baichuan).
        alibi_divisor (`float`): divides the bias (Falcon: the square root of `head_dim`, as the scores).
        alibi_in_float32 (`bool`): eager attention adds the bias in float32 instead of the activations' dtype (MPT).
        relative_attention_num_buckets, relative_attention_max_distance (`int`): T5's buckets.
        relative_attention_per_layer (`bool`): a table in every layer (UMT5) instead of one for the stack (T5).

    Embedding and head:
        tie_word_embeddings (`bool`), embedding_multiplier (`float`), logit_scale (`float`, multiplies the logits),
        final_logit_softcapping (`float`), lm_head_bias (`bool`), type_vocab_size (`int`, token types; 0: none).
        lm_head_normalized (`bool`): the rows of the LM head's weight are scaled to length 1 (Baichuan 2).
        logit_scale_by_division (`bool`): divide the logits by `1 / logit_scale` (Granite): the same product, rounded
            differently.
        embedding_multiplier_in_weight_dtype (`bool`): round the multiplier to the weights' dtype first (Gemma).
        embedding_multiplier_position (`str`): who multiplies: the token embedding (`"embedding"`), or the stack, which
            multiplies `inputs_embeds` as well (`"stack"`, T5Gemma).
        padding_embedding_frozen (`bool`): the embedding of `pad_token_id` starts at zero and gets no gradient.
        lm_head_transform (`bool`): dense + activation + norm before the LM head (BERT), with
            `lm_head_transform_bias` and `lm_head_transform_act`.
        lm_head_unread_bias (`bool`): a second bias that is stored with the LM head and enters nothing (untied BERT).
        task_type_vocab_size (`int`): task types, whose learned vectors are added last (ERNIE; 0: none).
        lm_head_input_scale (`float`): multiplies what enters the LM head (T5 with tied embeddings).
        pooler (`bool`): dense + tanh on the first token, as an encoder's `pooler_output` (BERT).
        classifier_pooling (`str`): the vector a sequence classifier reads where there is no pooler: `"first"` (default
            of encoders), `"last"` real token (default of decoders), `"mean"` of the tokens that the mask shows,
            `"mean_in_float32"` (the same, rounded once where there is no mask; EuroBERT), or `"mean_of_logits"` (every
            token is classified, and their logits are averaged in that way; EuroBERT's "late").
        classifier_bias (`bool`): bias of the sequence classifier; default: in encoders only.
        classifier_transform (`bool`): dense + activation before the classifier (RoBERTa), with
            `classifier_transform_bias`, `classifier_transform_act`, `classifier_transform_norm` (a norm after them,
            ModernBERT) and `classifier_transform_on_tokens` (also in token classification and question answering).
        classifier_transform_dropout (`bool`): `classifier_dropout` applies before the transform, too (RoBERTa: yes,
            DistilBERT: no).

    Regularisation: attention_dropout, residual_dropout, embedding_dropout, activation_dropout, final_dropout (after the
        final norm, T5), layerdrop, classifier_dropout (`float`, probabilities). token_classifier_dropout, qa_dropout:
        before the heads on every token; default: `classifier_dropout`. attention_residual_dropout, ffn_residual_dropout
        (`bool`): `residual_dropout` applies to the attention's branch (DistilBERT: no; `float`: with a probability of
        its own, Falcon); to the FFN's (XLM-RoBERTa-XL: no). dropout_after_sum (`bool`): in a parallel block, to the sum
        of the branches (Falcon) instead of each.

    native_leftovers (`dict`): where the model was converted from: its `model_type`, and keys of that config which do
        not change what the model computes, kept for the way back.

    Loss: z_loss_coefficient (`float`; PaLM, https://arxiv.org/abs/2204.02311: 1e-4), label_smoothing (`float`).
    """

    model_type = "hf_variant"
    keys_to_ignore_at_inference = ["past_key_values"]
    ignore_keys_at_rope_validation = {"llama_4_scaling_beta", "alpha"}

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    embedding_size: int | None = None
    embedding_projection_bias: bool = False
    embedding_projection_position: Literal["before_positions", "after_norm"] = "before_positions"
    output_projection: bool = False

    norm_type: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_eps: float = 1e-6
    norm_affine: bool = True
    norm_bias: bool | None = None
    norm_unit_offset: bool = False
    norm_casting_mode: Literal["llama", "gemma", "none"] | None = None

    norm_placement: Literal["pre", "post", "branch", "sandwich", "deepnorm"] = "pre"
    parallel_block: Literal["none", "shared_norm", "two_norms"] = "none"
    parallel_sum_order: Literal["branches_first", "residual_first"] = "branches_first"
    final_norm: bool | None = None
    embedding_norm: bool = False
    embedding_norm_position: Literal["after_positions", "before_positions"] = "after_positions"
    first_layer_pre_norm: bool = True
    residual_from_norm: bool = False
    residual_multiplier: int | float = 1.0
    learned_scale_type: Literal["none", "channel", "scalar"] = "none"
    layer_scale_init: int | float | None = None
    deepnorm_alpha: int | float | None = None
    deepnorm_beta: int | float | None = None

    ffn_type: Literal["mlp", "glu"] = "glu"
    hidden_act: str = "silu"
    mlp_bias: bool = False
    mlp_output_bias: bool | None = None
    unfused_bias: bool = False
    ffn_sub_norm: bool = False
    fused_gate_up: bool = False
    ffn_output_in_float32: bool = False
    clamp_in_float16: Literal["none", "sublayers", "blocks", "infinite_blocks"] = "none"
    ffn_chunk_size: int = 0

    attention_bias: bool = False
    attention_output_bias: bool | None = None
    qk_norm: Literal["none", "head", "full", "per_head"] = "none"
    qk_norm_type: Literal["layernorm", "rmsnorm"] | None = None
    qk_norm_eps: float | None = None
    qk_norm_affine: bool | None = None
    qk_norm_bias: bool | None = None
    qk_norm_after_rope: bool = False
    heads_first_from: Literal["norm", "rotation", "scores"] = "rotation"
    broadcast_key_value: bool = False
    attention_scaling: int | float | None = None
    scale_query: bool = False
    scale_attn_by_inverse_layer_idx: bool = False
    attention_score_form: Literal["multiplied", "batched", "divided", "fused", "biased"] = "multiplied"
    attention_scores_in_float32: bool = False
    attention_softmax_in_float32: bool = True
    attn_logit_softcapping: int | float | None = None
    attention_sinks: bool = False
    attention_gate: Literal["none", "headwise", "elementwise"] = "none"
    attention_sub_norm: bool = False
    clip_qkv: int | float | None = None
    is_causal: bool = True
    add_cross_attention: bool = False
    cross_attention_hidden_size: int | None = None

    layer_types: list[str] | str | None = None
    sliding_window: int | None = None

    position_embedding_type: Literal["rope", "learned", "sinusoidal", "alibi", "relative_bias", "none"] = "rope"
    rope_parameters: dict | None = None
    rope_interleaved: bool = False
    rope_in_float32: bool = False
    rope_table_in_float32: bool = False
    rope_reversed: bool = False
    longrope_recomputes_cache: bool = False
    rope_result_in_float32: bool = False
    rope_table_stored: bool = False
    rope_frequencies_in_float32: bool = False
    no_rope_layers: list[int] | None = None
    layer_rope_theta: list[int | float] | None = None
    position_offset: int = 0
    position_ids_source: Literal["sequence", "attention_mask", "input_ids"] = "sequence"
    padding_mask_source: Literal["none", "input_ids"] = "none"
    sinusoidal_layout: Literal["interleaved", "half", "tensor2tensor"] = "interleaved"
    sinusoidal_padding_zero: bool = False
    sinusoidal_table_stored: bool = False
    sinusoidal_table_grows: bool = False
    alibi_bias_max: int = 8
    alibi_slope_order: Literal["paper", "mpt"] = "paper"
    alibi_form: Literal["distance", "key_position", "key_index", "key_offset"] = "distance"
    alibi_slopes_in_bfloat16: bool = False
    alibi_slopes_in_float64: bool = False
    alibi_divisor: int | float = 1.0
    alibi_in_float32: bool = False
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    relative_attention_per_layer: bool = False

    tie_word_embeddings: bool = False
    embedding_multiplier: int | float = 1.0
    embedding_multiplier_in_weight_dtype: bool = False
    embedding_multiplier_position: Literal["embedding", "stack"] = "embedding"
    padding_embedding_frozen: bool = True
    logit_scale: int | float = 1.0
    logit_scale_by_division: bool = False
    final_logit_softcapping: int | float | None = None
    lm_head_bias: bool = False
    lm_head_normalized: bool = False
    lm_head_transform: bool = False
    lm_head_transform_bias: bool = True
    lm_head_transform_act: str | None = None
    lm_head_unread_bias: bool = False
    type_vocab_size: int = 0
    task_type_vocab_size: int = 0
    lm_head_input_scale: int | float = 1.0
    pooler: bool = False
    classifier_pooling: Literal["first", "last", "mean", "mean_in_float32", "mean_of_logits"] | None = None
    classifier_bias: bool | None = None
    classifier_transform: bool = False
    classifier_transform_bias: bool = True
    classifier_transform_act: str = "tanh"
    classifier_transform_norm: bool = False
    classifier_transform_on_tokens: bool = False
    classifier_transform_dropout: bool = True

    attention_dropout: int | float = 0.0
    residual_dropout: int | float = 0.0
    attention_residual_dropout: bool | float = True
    ffn_residual_dropout: bool = True
    dropout_after_sum: bool = False
    embedding_dropout: int | float = 0.0
    activation_dropout: int | float = 0.0
    final_dropout: int | float = 0.0
    layerdrop: int | float = 0.0
    classifier_dropout: int | float = 0.0
    token_classifier_dropout: int | float | None = None
    qa_dropout: int | float | None = None

    z_loss_coefficient: int | float = 0.0
    label_smoothing: int | float = 0.0

    initializer_range: int | float = 0.02
    native_leftovers: dict | None = None
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        per_layer_config = kwargs.get("per_layer_config") or {}
        for fields in (kwargs, *per_layer_config.values()):
            for old in RENAMED_FIELDS.keys() & fields.keys():
                fields[RENAMED_FIELDS[old]] = fields.pop(old)
        for new in RENAMED_FIELDS.values() & kwargs.keys():
            setattr(self, new, kwargs.pop(new))
        self._refuse_near_misses(kwargs)
        self._refuse_shared_fields(kwargs.get("per_layer_config"))
        self._derive_defaults()
        self._refuse_missing_rope_entries()
        super().__post_init__(**kwargs)
        if self.no_rope_layers is None:
            self.no_rope_layers = [1] * self.num_hidden_layers
        # Before `@strict` runs it again, so that the error is a `ValueError` as everywhere in transformers.
        self.validate_architecture()
        self.base_model_tp_plan = self.tensor_parallel_plan()
        self.base_model_pp_plan = self._pipeline_plan()
        if not self.final_norm:
            self.base_model_fsdp_plan = {k: v for k, v in type(self).base_model_fsdp_plan.items() if k != "norm"}

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "VariantConfig":
        """
        The axes of a published architecture (`hf_variants.presets()` lists them) with your sizes.

        Args:
            name (`str`): preset, such as `"gemma2"`.
            overrides: any field of this config; they win over the preset's.

        Raises:
            ValueError: if there is no such preset.
        """
        # By name, so that this file also works alone, as custom code in a Hub repository.
        presets = importlib.import_module("hf_variants.presets")
        return cls(**presets.resolve_preset(name, overrides))

    def _refuse_near_misses(self, unknown: dict[str, Any]) -> None:
        """Refuse an unknown key that looks like a field: it would otherwise be stored and never read."""
        field_names = [name for name in type(self).__dataclass_fields__ if not name.startswith("_")]
        sentences = []
        for key in unknown:
            if key in FRAMEWORK_KEYS or key.startswith("_"):
                continue
            match = difflib.get_close_matches(key, field_names, n=1, cutoff=0.84)
            if match:
                sentences.append(f"`{key}` is not a field; did you mean `{match[0]}`?")
        if sentences:
            raise VariantConfigError(" ".join(sentences))

    @staticmethod
    def _refuse_shared_fields(per_layer_config: dict[int | str, dict[str, Any]] | None) -> None:
        """Refuse per-layer values of fields that are read for the whole stack: transformers would fail on the read."""
        fields = {field for overrides in (per_layer_config or {}).values() for field in overrides}
        if shared := sorted(fields - PER_LAYER_FIELDS - {"skip"}):
            raise VariantConfigError(
                f"`per_layer_config` changes {', '.join(f'`{field}`' for field in shared)}, which all layers share. "
                "Set it for the whole stack; layers may differ in "
                f"{', '.join(f'`{field}`' for field in sorted(PER_LAYER_FIELDS))}."
            )

    def _refuse_missing_rope_entries(self) -> None:
        """Refuse nested `rope_parameters` that leave a layer type out: transformers would read it as flat, or fail."""
        named = set(self.rope_parameters or ()) & set(LAYER_TYPE_LETTERS.values())
        missing = sorted(set(self.layer_types) - named) if named else []
        if self.position_embedding_type == "rope" and missing:
            raise VariantConfigError(
                f"`rope_parameters` has entries per layer type, but none for {' and '.join(missing)}. Add one, or "
                "write None there for layers without a rotation."
            )

    def _derive_defaults(self) -> None:
        # A copy, because transformers completes the dictionary in place, with this config's context length.
        self.rope_parameters = copy.deepcopy(self.rope_parameters)
        # Left unset where the division leaves a remainder, which validation reports.
        if self.head_dim is None and self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads == 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            width = 8 * self.hidden_size / 3 if self.ffn_type == "glu" else 4 * self.hidden_size
            self.intermediate_size = -(-int(width) // 64) * 64
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        if self.cross_attention_hidden_size is None:
            self.cross_attention_hidden_size = self.hidden_size
        if self.norm_bias is None:
            self.norm_bias = self.norm_type == "layernorm" and self.norm_affine
        if self.norm_casting_mode is None:
            self.norm_casting_mode = "llama" if self.norm_type == "rmsnorm" else "none"
        if self.final_norm is None:
            self.final_norm = self.norm_placement not in ("post", "deepnorm")
        if self.mlp_output_bias is None:
            self.mlp_output_bias = self.mlp_bias
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        if self.qk_norm_type is None:
            self.qk_norm_type = self.norm_type
        if self.qk_norm_eps is None:
            self.qk_norm_eps = self.norm_eps
        if self.qk_norm_affine is None:
            self.qk_norm_affine = self.norm_affine
        if self.qk_norm_bias is None:
            self.qk_norm_bias = (
                self.qk_norm_type == "layernorm"
                and self.qk_norm_affine
                and self.norm_bias
                and self.qk_norm != "per_head"
            )
        if self.layer_scale_init is None:
            self.layer_scale_init = {"none": 1.0, "channel": 1e-5, "scalar": 0.0}[self.learned_scale_type]
        if self.classifier_pooling is None:
            self.classifier_pooling = "last" if self.is_causal else "first"
        if self.classifier_bias is None:
            self.classifier_bias = not self.is_causal
        if self.token_classifier_dropout is None:
            self.token_classifier_dropout = self.classifier_dropout
        if self.qa_dropout is None:
            self.qa_dropout = self.classifier_dropout
        if self.lm_head_transform_act is None:
            self.lm_head_transform_act = self.hidden_act
        if self.norm_placement == "deepnorm" and self.num_hidden_layers > 0:
            # Section 4 and table 1 of the paper, for a stack of one kind; encoder-decoders set both explicitly.
            if self.deepnorm_alpha is None:
                self.deepnorm_alpha = (2 * self.num_hidden_layers) ** 0.25
            if self.deepnorm_beta is None:
                self.deepnorm_beta = (8 * self.num_hidden_layers) ** -0.25
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        elif isinstance(self.layer_types, str):
            self.layer_types = self._expand_layer_pattern(self.layer_types)

    def _expand_layer_pattern(self, pattern: str) -> list[str]:
        """`"SSSF"` -> three sliding layers and a full one, repeated over the depth."""
        if not pattern or set(pattern.upper()) - set(LAYER_TYPE_LETTERS):
            raise VariantConfigError(
                f"`layer_types` is the pattern {pattern!r}, which is not made of the letters F (full) and S "
                '(sliding). Write for example "SSSF", or a list with one layer type per layer.'
            )
        letters = pattern.upper()
        return [LAYER_TYPE_LETTERS[letters[i % len(letters)]] for i in range(self.num_hidden_layers)]

    # The properties below are questions that several rooms ask of a config.

    @property
    def has_sequence_bias(self) -> bool:
        """Whether an additive position bias (ALiBi, relative) enters the attention scores."""
        return self.position_embedding_type in ("alibi", "relative_bias")

    @property
    def attention_features(self) -> dict[str, bool]:
        """The features of this config that not every attention backend computes, by field name."""
        layers = list(self.per_layer_config)
        return {
            "attn_logit_softcapping": any(layer.attn_logit_softcapping is not None for layer in layers),
            "attention_sinks": any(layer.attention_sinks for layer in layers),
            "position_embedding_type": self.has_sequence_bias,
        }

    def unsupported_attention_features(self, implementation: str) -> list[str]:
        """
        The fields of this config that an attention implementation would ignore or refuse.

        Args:
            implementation (`str`): `"eager"`, `"sdpa"`, `"flex_attention"`, `"flash_attention"` or `"paged"`
                (continuous batching).
        """
        unable = {
            "eager": (),
            "sdpa": ("attn_logit_softcapping", "attention_sinks"),
            "flex_attention": (),
            "flash_attention": ("attention_sinks", "position_embedding_type"),
            "paged": ("attn_logit_softcapping", "position_embedding_type"),
        }[implementation]
        return [field for field, active in self.attention_features.items() if active and field in unable]

    @property
    def fields_outside_a_fused_head(self) -> tuple[list[str], list[str]]:
        """
        What a fused LM head ignores, which knows the head's weight and bias, `logit_scale` and
        `final_logit_softcapping` (TRL): the fields that change logits, and those that add to the loss.
        """
        logits = {
            "lm_head_transform": self.lm_head_transform,
            "lm_head_input_scale": self.lm_head_input_scale != 1.0,
            "lm_head_normalized": self.lm_head_normalized,
        }
        loss = {"z_loss_coefficient": self.z_loss_coefficient, "label_smoothing": self.label_smoothing}
        return [field for field, active in logits.items() if active], [
            field for field, active in loss.items() if active
        ]

    def rope_parameters_of(self, layer_idx: int) -> dict | None:
        """The flat RoPE parameters of one layer, or `None` where the layer does not rotate."""
        if self.position_embedding_type != "rope" or not self.no_rope_layers[layer_idx]:
            return None
        parameters = self.per_layer_config[layer_idx].rope_parameters
        if self._nested_rope_keys(parameters):
            parameters = parameters.get(self.layer_types[layer_idx])
        if self.layer_rope_theta is None or parameters is None:
            return parameters
        theta = self.layer_rope_theta[layer_idx]
        return {**parameters, "rope_theta": theta} if theta else None

    def tensor_parallel_plan(self, ranks: int = 1) -> dict[str, str]:
        """
        Tensor-parallel styles of exactly the modules that this config builds (transformers' `tp_plan`).

        Args:
            ranks (`int`): number of devices that share a layer; heads that it does not divide are gathered.
        """
        layers = list(self.per_layer_config)
        plan = {}
        attending = [layer for layer in layers if "self_attn" not in getattr(layer, "skip", ())]
        # A norm over all heads, and whatever is indexed by the head outside the projections, needs the whole
        # projections on every rank; and so does a head that would be cut in two.
        gather = self.has_sequence_bias or any(
            layer.qk_norm in ("full", "per_head")
            or layer.attention_sinks
            or layer.attention_sub_norm
            or layer.num_key_value_heads % ranks
            for layer in attending
        )
        prefixes = ["layers.*.self_attn"] if attending else []
        if any(layer.add_cross_attention for layer in layers):
            prefixes.append("layers.*.cross_attn")
        projections = ["q_proj", "k_proj", "v_proj"]
        if any(layer.attention_gate != "none" for layer in attending):
            projections.append("g_proj")
        for prefix in prefixes:
            plan |= {f"{prefix}.{name}": "colwise_gather_output" if gather else "colwise" for name in projections}
            plan[f"{prefix}.o_proj"] = "rowwise_split_input" if gather else "rowwise"
            if not gather and any(layer.qk_norm == "head" and layer.qk_norm_affine for layer in attending):
                # One weight for all heads: every rank has the gradient of its own heads only.
                plan |= {f"{prefix}.{name}_norm": "replicated_with_grad_allreduce" for name in "qk"}
        with_mlp = [layer for layer in layers if "mlp" not in getattr(layer, "skip", ())]
        gather = any(layer.ffn_sub_norm for layer in with_mlp)
        inner = ["up_proj"] if with_mlp else []
        if any(layer.ffn_type == "glu" for layer in with_mlp):
            inner.append("gate_proj")
        plan |= {f"layers.*.mlp.{name}": "colwise_gather_output" if gather else "colwise" for name in inner}
        if not gather and any(layer.hidden_act in LEARNED_ACTIVATIONS for layer in with_mlp):
            # One weight for all channels: every rank has the gradient of its own channels only.
            plan["layers.*.mlp.act_fn"] = "replicated_with_grad_allreduce"
        if with_mlp:
            plan["layers.*.mlp.down_proj"] = "rowwise_split_input" if gather else "rowwise"
        return plan

    def _pipeline_plan(self) -> dict[str, tuple[list[str], list[str]]] | None:
        """
        What the first and the last stage of a pipeline have beside layers, with names of inputs and outputs; engines
        pass over the others' (transformers' `pp_plan`). `None` where more than modules stand before the layers.
        """
        if self.embedding_multiplier != 1.0 and self.embedding_multiplier_position == "stack":
            return None
        if "input_ids" in (self.position_ids_source, self.padding_mask_source):
            return None
        projected = self.embedding_size != self.hidden_size and self.embedding_projection_position
        normed = self.embedding_norm and self.embedding_norm_position
        names = {
            "token_projection": projected == "before_positions",
            "token_norm": normed == "before_positions",
            "token_types": self.type_vocab_size,
            "embed_positions": self.position_embedding_type in ("learned", "sinusoidal"),
            "task_types": self.task_type_vocab_size,
            "embedding_norm": normed == "after_positions",
            "embedding_projection": projected == "after_norm",
            "layers": True,
            "norm": self.final_norm,
            "output_projection": self.output_projection,
        }
        plan = {"embed_tokens": (["input_ids"], ["inputs_embeds"])}
        plan |= {name: (["hidden_states"], ["hidden_states"]) for name, built in names.items() if built}
        plan["layers"] = (["hidden_states", "attention_mask"], ["hidden_states"])
        if self.pooler:
            plan["pooler"] = (["hidden_states"], ["pooler_output"])
        return plan

    def convert_rope_params_to_dict(self, **kwargs):
        base = kwargs.get("rope_theta", self.default_theta)
        kwargs = super().convert_rope_params_to_dict(**kwargs)
        if self._nested_rope_keys(self.rope_parameters):
            # transformers 5.17 writes the default base beside the entries instead of into them. What a layer type has
            # that no layer is of stays for the way back to a native config.
            kinds = {*self.layer_types, *LAYER_TYPE_LETTERS.values()}
            self.rope_parameters = {key: self.rope_parameters[key] for key in self.rope_parameters if key in kinds}
            for entry in filter(None, self.rope_parameters.values()):
                entry["rope_theta"] = base if entry.get("rope_theta") is None else entry["rope_theta"]
        return kwargs

    def validate_rope(self):
        """transformers' check, where there is a rotation: the parameters are filled in everywhere."""
        if self.position_embedding_type == "rope":
            # Of one layer's config: it reads sizes that layers may differ in; `validate_architecture` checks those.
            PreTrainedConfig.validate_rope(self.per_layer_config[0])

    def validate_architecture(self):
        """Report every inconsistency at once: what is wrong, and what to do about it."""
        tables = [layer._validation_table() for layer in self.per_layer_config] if self.is_heterogeneous else []
        tables.insert(0, self._per_layer_table() if self.is_heterogeneous else self._validation_table())
        sentences = [f"{wrong} {remedy}" for table in tables for broken, wrong, remedy in table if broken]
        if sentences:
            raise VariantConfigError("This config cannot be built. " + " ".join(dict.fromkeys(sentences)))

    def _per_layer_table(self) -> list[tuple[bool, str, str]]:
        """(is it broken, what is wrong, what to do) for what `per_layer_config` changes."""
        spec = self.__dict__["_heterogeneity_spec"]
        skips = {i: set(overrides.get("skip", ())) for i, overrides in spec.per_layer_overrides.items()}
        unknown = sorted(set().union(*skips.values()) - set(SKIPPABLE))
        empty = [i for i, skip in skips.items() if skip.issuperset(SKIPPABLE)]
        first_layers = {self.layer_types.index(kind) for kind in self.layer_types}
        lengthless = sorted(i for i in first_layers if "self_attn" in skips.get(i, ()))
        return [
            (
                self.has_sequence_bias and self.is_heterogeneous_in("num_attention_heads"),
                f"`per_layer_config` changes `num_attention_heads`, but `position_embedding_type` "
                f"{self.position_embedding_type} has one bias per head, shared by the layers.",
                "Keep the heads equal, or use another `position_embedding_type`.",
            ),
            (
                bool(unknown),
                f"`per_layer_config` skips {', '.join(f'`{name}`' for name in unknown)}.",
                f"A layer can skip {' or '.join(f'`{name}`' for name in SKIPPABLE)}.",
            ),
            (
                bool(empty),
                f"`per_layer_config` skips everything in layer {', '.join(map(str, empty))}.",
                "Keep one of the two, or lower `num_hidden_layers`.",
            ),
            (
                bool(lengthless),
                f"`per_layer_config` skips `self_attn` in layer {', '.join(map(str, lengthless))}, the first of its "
                "layer type, whose cache tells how long the past is.",
                "Skip it in a later layer of that type.",
            ),
        ]

    def _validation_table(self) -> list[tuple[bool, str, str]]:
        """(is it broken, what is wrong, what to do) for one layer's resolved config."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        rope = self.position_embedding_type == "rope"
        table_positions = self.position_embedding_type in ("learned", "sinusoidal")
        parallel = self.parallel_block != "none"
        skip = getattr(self, "skip", ())
        sizes = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "embedding_size",
        )  # fmt: skip
        probabilities = (
            "attention_dropout", "residual_dropout", "attention_residual_dropout", "embedding_dropout",
            "activation_dropout", "final_dropout", "layerdrop", "classifier_dropout", "token_classifier_dropout",
            "qa_dropout",
        )  # fmt: skip
        table = [
            (getattr(self, name) is not None and getattr(self, name) < 1, f"`{name}` is {getattr(self, name)}.",
             f"Set `{name}` to at least 1.")
            for name in sizes
        ]  # fmt: skip
        table += [
            (getattr(self, name) is not True and not 0.0 <= getattr(self, name) < 1.0,
             f"`{name}` is {getattr(self, name)}, not a probability.",
             f"Set `{name}` to at least 0 and below 1.")
            for name in probabilities
        ]  # fmt: skip
        table += [
            (
                self.head_dim is None and heads > 0,
                f"`hidden_size` {self.hidden_size} is not a multiple of `num_attention_heads` {heads}.",
                "Set `head_dim` explicitly, or change one of the two.",
            ),
            (
                bool(kv_heads) and kv_heads > 0 and heads % kv_heads != 0,
                f"`num_attention_heads` {heads} is not a multiple of `num_key_value_heads` {kv_heads}.",
                "Choose a number of key/value heads that divides the heads.",
            ),
            *[
                (
                    # Reported once where one is derived from the other.
                    name not in ACT2FN and (field == "hidden_act" or name != self.hidden_act),
                    f"`{field}` {name} is not an activation that transformers has.",
                    f"Choose a key of its ACT2FN, such as "
                    f"{' or '.join(difflib.get_close_matches(name, ACT2FN) or ('silu', 'gelu'))}.",
                )
                for field, name in (
                    ("hidden_act", self.hidden_act),
                    ("lm_head_transform_act", self.lm_head_transform_act),
                    ("classifier_transform_act", self.classifier_transform_act),
                )
            ],
            (
                self.padding_embedding_frozen
                and self.pad_token_id is not None
                and not -self.vocab_size <= self.pad_token_id < self.vocab_size,
                f"`pad_token_id` {self.pad_token_id} is outside the vocabulary of {self.vocab_size}.",
                "Choose a token of the vocabulary, set it to None, or set `padding_embedding_frozen=False`.",
            ),
            (self.norm_eps <= 0, f"`norm_eps` is {self.norm_eps}.", "Set `norm_eps` above 0, such as 1e-6."),
            (
                self.norm_bias and self.norm_type == "rmsnorm",
                "`norm_bias` is set, but `norm_type` rmsnorm has no bias.",
                "Set `norm_bias=False` or `norm_type='layernorm'`.",
            ),
            (
                self.norm_bias and not self.norm_affine,
                "`norm_bias` is set, but `norm_affine` is not.",
                "Set `norm_bias=False` or `norm_affine=True`.",
            ),
            (
                self.norm_unit_offset and not self.norm_affine,
                "`norm_unit_offset` is set, but without `norm_affine` there is no weight to offset.",
                "Set `norm_unit_offset=False` or `norm_affine=True`.",
            ),
            (
                self.norm_type == "layernorm" and self.norm_casting_mode == "llama",
                "`norm_casting_mode` llama is defined for rmsnorm only.",
                "Set `norm_casting_mode` to 'none' (torch's kernel) or 'gemma' (float32 throughout).",
            ),
            (
                self.norm_casting_mode == "gemma" and self.norm_type == "layernorm" and self.norm_bias,
                "`norm_casting_mode` gemma for layernorm is defined without a bias (Cohere).",
                "Set `norm_bias=False` or `norm_casting_mode='none'`.",
            ),
            (
                self.qk_norm_bias and self.qk_norm_type == "rmsnorm",
                "`qk_norm_bias` is set, but `qk_norm_type` rmsnorm has no bias.",
                "Set `qk_norm_bias=False` or `qk_norm_type='layernorm'`.",
            ),
            (
                self.qk_norm_bias and self.qk_norm == "per_head",
                "`qk_norm_bias` is set, but `qk_norm` per_head has no bias.",
                "Set `qk_norm_bias=False` or another `qk_norm`.",
            ),
            (
                self.qk_norm_bias and not self.qk_norm_affine,
                "`qk_norm_bias` is set, but `qk_norm_affine` is not.",
                "Set `qk_norm_bias=False` or `qk_norm_affine=True`.",
            ),
            (
                self.qk_norm_bias and self.norm_casting_mode == "gemma" and self.norm_type == "layernorm",
                "`qk_norm_bias` is set, but `norm_casting_mode` gemma for layernorm has no bias (Cohere).",
                "Set `qk_norm_bias=False` or `norm_casting_mode='none'`.",
            ),
            (
                self.qk_norm_after_rope and self.qk_norm in ("full", "per_head"),
                f"`qk_norm_after_rope` is set with `qk_norm` {self.qk_norm}.",
                "Use `qk_norm='head'`, or normalise before the rotation.",
            ),
            (
                self.qk_norm_after_rope and self.qk_norm == "none",
                "`qk_norm_after_rope` is set, but `qk_norm` is none.",
                "Set `qk_norm='head'` or `qk_norm_after_rope=False`.",
            ),
            (
                self.heads_first_from == "norm" and (self.qk_norm != "head" or self.qk_norm_after_rope),
                "`heads_first_from` is norm, but there is no norm on heads before the rotation.",
                "Set `qk_norm='head'` and `qk_norm_after_rope=False`, or `heads_first_from='rotation'`.",
            ),
            (
                self.heads_first_from == "scores"
                and (not rope or any("llama_4_scaling_beta" in entry for entry in self._flat_rope_parameters())),
                "`heads_first_from` is scores, but there is no rotation, or one that scales queries by "
                "`llama_4_scaling_beta`.",
                "Set `heads_first_from='rotation'`.",
            ),
            (
                parallel and self.norm_placement not in ("pre", "sandwich"),
                f"`parallel_block` {self.parallel_block} is set with `norm_placement` {self.norm_placement}.",
                "Use `norm_placement` 'pre' or 'sandwich', or `parallel_block='none'`.",
            ),
            (self.ffn_chunk_size < 0, f"`ffn_chunk_size` is {self.ffn_chunk_size}.", "Set it to 0 or more."),
            (
                parallel and self.ffn_chunk_size > 0,
                "`ffn_chunk_size` is set with a `parallel_block`, which runs whole.",
                "Set `ffn_chunk_size=0` or `parallel_block='none'`.",
            ),
            (
                parallel and self.residual_from_norm,
                "`residual_from_norm` is set with a `parallel_block`.",
                "Set `residual_from_norm=False` or `parallel_block='none'`.",
            ),
            (
                self.residual_from_norm and self.norm_placement not in ("pre", "sandwich"),
                f"`residual_from_norm` is set, but `norm_placement` {self.norm_placement} has no pre-norm.",
                "Set `residual_from_norm=False`, or `norm_placement` to 'pre' or 'sandwich'.",
            ),
            (
                not self.first_layer_pre_norm and self.norm_placement not in ("pre", "sandwich"),
                f"`first_layer_pre_norm` is off, but `norm_placement` {self.norm_placement} has no pre-norm.",
                "Leave `first_layer_pre_norm=True`.",
            ),
            (
                not self.first_layer_pre_norm and parallel,
                "`first_layer_pre_norm` is off with a `parallel_block`, whose FFN shares that norm.",
                "Leave `first_layer_pre_norm=True` or set `parallel_block='none'`.",
            ),
            (
                self.norm_placement != "deepnorm" and (self.deepnorm_alpha, self.deepnorm_beta) != (None, None),
                f"`deepnorm_alpha` or `deepnorm_beta` is set, but `norm_placement` is {self.norm_placement}.",
                "Set `norm_placement='deepnorm'` or leave both unset.",
            ),
            (
                self.norm_placement == "deepnorm" and None in (self.deepnorm_alpha, self.deepnorm_beta),
                "`per_layer_config` sets `norm_placement` deepnorm without `deepnorm_alpha` and `deepnorm_beta`.",
                "Set the two beside it: they are derived for a stack of one kind only.",
            ),
            (
                self.norm_placement == "deepnorm" and self.residual_multiplier != 1.0,
                "`residual_multiplier` is set with `norm_placement` deepnorm, which scales the residual itself.",
                "Set `residual_multiplier=1.0` and `deepnorm_alpha` instead.",
            ),
            (
                self.norm_placement == "deepnorm" and self.learned_scale_type != "none",
                "`learned_scale_type` is set with `norm_placement` deepnorm.",
                "Use one of the two.",
            ),
            (
                self.learned_scale_type != "none" and self.residual_multiplier != 1.0,
                "`learned_scale_type` and `residual_multiplier` both scale the branch.",
                "Use one of the two.",
            ),
            (
                self.attn_logit_softcapping is not None and self.attn_logit_softcapping <= 0,
                f"`attn_logit_softcapping` is {self.attn_logit_softcapping}.",
                "Set it above 0, or to None for no cap.",
            ),
            (
                self.final_logit_softcapping is not None and self.final_logit_softcapping <= 0,
                f"`final_logit_softcapping` is {self.final_logit_softcapping}.",
                "Set it above 0, or to None for no cap.",
            ),
            (
                self.attn_logit_softcapping is not None and self.attention_sinks,
                "`attn_logit_softcapping` and `attention_sinks` are both set, which no attention backend combines.",
                "Use one of the two.",
            ),
            (
                self.logit_scale_by_division and self.logit_scale == 0,
                "`logit_scale_by_division` is set, but `logit_scale` is 0.",
                "Set another `logit_scale`, or `logit_scale_by_division=False`.",
            ),
            (
                self.clip_qkv is not None and self.clip_qkv <= 0,
                f"`clip_qkv` is {self.clip_qkv}.",
                "Set it above 0, or to None for no clipping.",
            ),
            (
                "sliding_attention" in self.layer_types and not self.sliding_window,
                "`layer_types` has sliding layers, but `sliding_window` is not set.",
                "Set `sliding_window`, or make every layer full_attention.",
            ),
            (
                self.sliding_window is not None and self.sliding_window < 1,
                f"`sliding_window` is {self.sliding_window}.",
                "Set it to at least 1, or to None.",
            ),
            (
                self.is_causal and self.sliding_window == 1,
                "`sliding_window` is 1, which transformers' caches cannot hold: they keep one key less than that.",
                "Set it to at least 2.",
            ),
            (
                bool(set(self.layer_types) - set(LAYER_TYPE_LETTERS.values())),
                f"`layer_types` has {sorted(set(self.layer_types) - set(LAYER_TYPE_LETTERS.values()))}.",
                "A dense stack has full_attention and sliding_attention layers only.",
            ),
            (
                len(self.layer_types) != self.num_hidden_layers,
                f"`layer_types` has {len(self.layer_types)} entries for {self.num_hidden_layers} layers.",
                "Give one per layer, or a pattern such as 'SSSF'.",
            ),
            (
                len(self.no_rope_layers) != self.num_hidden_layers,
                f"`no_rope_layers` has {len(self.no_rope_layers)} entries for {self.num_hidden_layers} layers.",
                "Give one per layer: 1 where the rotation is applied, 0 where not.",
            ),
            (
                bool(set(self.no_rope_layers) - {0, 1}),
                "`no_rope_layers` has entries other than 0 and 1.",
                "Write 1 where the rotation is applied and 0 where not.",
            ),
            (
                self.layer_rope_theta is not None
                and (len(self.layer_rope_theta) != self.num_hidden_layers or min(self.layer_rope_theta, default=0) < 0),
                f"`layer_rope_theta` is {self.layer_rope_theta} for {self.num_hidden_layers} layers.",
                "Give one base per layer, and 0 for layers without a rotation.",
            ),
            (
                not rope and 0 in self.no_rope_layers,
                f"`no_rope_layers` switches the rotation off in some layers, but `position_embedding_type` is "
                f"{self.position_embedding_type}.",
                "Set `position_embedding_type='rope'` or leave `no_rope_layers` unset.",
            ),
            (
                not rope and any((self.rope_interleaved, self.rope_in_float32, self.rope_table_in_float32,
                                  self.rope_reversed, self.rope_result_in_float32, self.rope_table_stored,
                                  self.rope_frequencies_in_float32,
                                  self.layer_rope_theta is not None)),
                f"A `rope_*` field or `layer_rope_theta` is set, but `position_embedding_type` is "
                f"{self.position_embedding_type}.",
                "Set `position_embedding_type='rope'` or leave those fields unset.",
            ),
            (
                self.longrope_recomputes_cache
                and (not rope or all(entry["rope_type"] != "longrope" for entry in self._flat_rope_parameters())),
                "`longrope_recomputes_cache` is set, but `rope_parameters` has no longrope.",
                "Set `longrope_recomputes_cache=False`, or `rope_type` to 'longrope'.",
            ),
            (
                self.rope_table_in_float32 and not self.rope_in_float32,
                "`rope_table_in_float32` is set without `rope_in_float32`, so the rotation would change q's dtype.",
                "Set both, or neither.",
            ),
            (
                self.rope_result_in_float32 and not (self.rope_in_float32 and self.attention_scores_in_float32),
                "`rope_result_in_float32` is set without `rope_in_float32` and `attention_scores_in_float32`, so there "
                "is no result in float32, or nothing that takes it.",
                "Set all three, or leave `rope_result_in_float32` unset.",
            ),
            (
                rope
                and self.rope_table_stored
                and any(
                    entry["rope_type"] in ("dynamic", "longrope") or "llama_4_scaling_beta" in entry
                    for entry in self._flat_rope_parameters()
                ),
                "`rope_table_stored` is set, but the `rope_type` depends on the length of the input, or "
                "`llama_4_scaling_beta` asks for more than a table.",
                "Set `rope_table_stored=False`, or other `rope_parameters`.",
            ),
            (
                rope
                and self.rope_frequencies_in_float32
                and (
                    self.rope_table_stored
                    or any("llama_4_scaling_beta" in entry for entry in self._flat_rope_parameters())
                ),
                "`rope_frequencies_in_float32` is set with `rope_table_stored` or `llama_4_scaling_beta`.",
                "Set `rope_frequencies_in_float32=False`.",
            ),
            (
                rope and bool(self.head_dim) and self._rotary_dims_are_misfits(),
                "The rotated part of `head_dim` is odd or empty, and RoPE rotates pairs.",
                "Choose an even `head_dim`, or a `partial_rotary_factor` that leaves room for pairs.",
            ),
            (
                rope and bool(self._unknown_rope_types()),
                f"`rope_parameters` has the unknown rope_type {', '.join(self._unknown_rope_types())}.",
                f"Use one of {', '.join(ROPE_TYPES)}.",
            ),
            (
                rope and bool(self._missing_rope_keys()),
                f"`rope_parameters` has no {' and '.join(self._missing_rope_keys())}, which its `rope_type` reads.",
                "Add what is missing, or choose another `rope_type`.",
            ),
            (
                rope and bool(self.head_dim) and self._dynamic_rope_is_too_narrow(),
                "`rope_parameters` of type dynamic rotates two channels, and its formula divides by two less.",
                "Rotate at least four channels, or choose another `rope_type`.",
            ),
            (
                rope and bool(self.head_dim) and self._longrope_factors_are_misfits(),
                "`rope_parameters` of type longrope has not one factor for every pair of rotated channels.",
                "Give `short_factor` and `long_factor` half as many entries as rotated channels.",
            ),
            (
                not table_positions and self.position_offset != 0,
                f"`position_offset` is set, but `position_embedding_type` {self.position_embedding_type} has no "
                "table.",
                "Set it to 0, or use learned or sinusoidal positions.",
            ),
            (self.position_offset < 0, f"`position_offset` is {self.position_offset}.", "Set it to at least 0."),
            (
                self.position_embedding_type == "sinusoidal" and self._position_width() % 2 != 0,
                f"Sinusoidal positions need an even width, not {self._position_width()}.",
                "Choose an even `hidden_size` (or `embedding_size`), or learned positions.",
            ),
            (
                self.position_ids_source == "input_ids" and self.pad_token_id is None,
                "`position_ids_source` input_ids counts non-padding tokens, but `pad_token_id` is not set.",
                "Set `pad_token_id`, or another `position_ids_source`.",
            ),
            (
                self.padding_mask_source == "input_ids" and self.pad_token_id is None,
                "`padding_mask_source` input_ids masks padding tokens, but `pad_token_id` is not set.",
                "Set `pad_token_id`, or `padding_mask_source='none'`.",
            ),
            (
                self.position_ids_source == "attention_mask" and table_positions and self.position_offset == 0,
                "`position_ids_source` attention_mask gives padding the position -1, and the table has no row for it.",
                "Set `position_offset` to at least 1 (OPT: 2), or another `position_ids_source`.",
            ),
            (
                self.position_ids_source == "attention_mask" and rope and self.rope_table_stored,
                "`position_ids_source` attention_mask gives padding the position -1, which `rope_table_stored` lacks.",
                "Set `rope_table_stored=False`, or another `position_ids_source`.",
            ),
            (
                self.sinusoidal_padding_zero and self.pad_token_id is None,
                "`sinusoidal_padding_zero` is set, but `pad_token_id` is not.",
                "Set `pad_token_id`, or `sinusoidal_padding_zero=False`.",
            ),
            (
                self.sinusoidal_table_stored and self.sinusoidal_table_grows,
                "`sinusoidal_table_stored` and `sinusoidal_table_grows` are both set, and a stored table has one "
                "length.",
                "Use one of the two.",
            ),
            (
                self.relative_attention_num_buckets < 4
                or self.relative_attention_max_distance
                <= self.relative_attention_num_buckets // (2 if self.is_causal else 4),
                "`relative_attention_num_buckets` must be at least 4 and `relative_attention_max_distance` larger "
                "than the buckets that hold one distance each.",
                "T5 uses 32 and 128.",
            ),
            (
                not self.is_causal and self.alibi_form != "distance",
                f"`alibi_form` {self.alibi_form} depends on the key alone, which only a causal stack can use.",
                "Set `alibi_form='distance'`.",
            ),
            (
                self.position_embedding_type == "alibi" and self.alibi_form != "distance" and self.attention_sinks,
                f"`alibi_form` {self.alibi_form} shifts all scores of a query, which `attention_sinks` do not cancel.",
                "Set `alibi_form='distance'` or `attention_sinks=False`.",
            ),
            (
                self.embedding_size != self.hidden_size
                and self.tie_word_embeddings
                and not self.output_projection
                and not self.lm_head_transform,
                "`tie_word_embeddings` is set, but `embedding_size` differs from `hidden_size`.",
                "Set `output_projection=True` or `lm_head_transform=True`, untie, or make the two equal.",
            ),
            (
                self.output_projection and self.embedding_size == self.hidden_size,
                "`output_projection` is set, but `embedding_size` equals `hidden_size`.",
                "Set `output_projection=False`, or another `embedding_size`.",
            ),
            (
                self.output_projection and self.lm_head_transform,
                "`output_projection` and `lm_head_transform` both stand before the LM head.",
                "Use one of the two.",
            ),
            (
                bool(skip) and (parallel or self.add_cross_attention),
                "`per_layer_config` skips a sublayer of a layer with `parallel_block` or `add_cross_attention`.",
                "Skip sublayers only where self-attention and the FFN follow each other and nothing else is there.",
            ),
            (
                self.add_cross_attention and not self.is_causal,
                "`add_cross_attention` is set on an encoder (`is_causal=False`).",
                "Only a decoder attends to an encoder; set `is_causal=True` or `add_cross_attention=False`.",
            ),
            (
                self.fused_gate_up and self.ffn_type != "glu",
                f"`fused_gate_up` is set, but `ffn_type` {self.ffn_type} has no gate.",
                "Set `ffn_type='glu'` or `fused_gate_up=False`.",
            ),
            (
                self.clamp_in_float16 != "none" and self.parallel_block != "none",
                "`clamp_in_float16` is set with a `parallel_block`, which has no place for it.",
                "Leave one of the two at 'none'.",
            ),
            (
                self.ffn_output_in_float32
                and (self.norm_type, self.norm_casting_mode, self.norm_affine) != ("rmsnorm", "llama", True),
                "`ffn_output_in_float32` is set with norms that give the dtype of their input.",
                "Set `norm_type='rmsnorm'` with `norm_casting_mode='llama'` and a weight, or leave it unset.",
            ),
            (
                self.lm_head_transform and self.lm_head_input_scale != 1.0,
                "`lm_head_input_scale` and `lm_head_transform` both stand before the LM head.",
                "Use one of the two.",
            ),
            (
                self.lm_head_unread_bias and not self.lm_head_bias,
                "`lm_head_unread_bias` is set without `lm_head_bias`, the one that is read.",
                "Set both, or `lm_head_unread_bias=False`.",
            ),
            (self.pooler and self.is_causal, "`pooler` is set on a decoder, whose first token sees only itself.",
             "Set `pooler=False` or `is_causal=False`."),
            (self.z_loss_coefficient < 0, f"`z_loss_coefficient` is {self.z_loss_coefficient}.",
             "Set it to at least 0; PaLM used 1e-4."),
            (not 0 <= self.label_smoothing < 1, f"`label_smoothing` is {self.label_smoothing}.",
             "Set it to at least 0 and below 1."),
            (
                self.attention_score_form == "biased" and not self.has_sequence_bias,
                f"`attention_score_form` is biased, but `position_embedding_type` {self.position_embedding_type} has no "
                "bias.",
                "Set `attention_score_form='multiplied'`, or use ALiBi or relative biases.",
            ),
            (
                self.attention_score_form == "biased" and self.attn_logit_softcapping is not None,
                "`attention_score_form` biased and `attn_logit_softcapping` are both set, and the cap stands between "
                "the product and the bias.",
                "Set `attention_score_form='multiplied'`, or leave the cap unset.",
            ),
            (
                self.attention_score_form == "divided" and self.scale_query,
                "`attention_score_form` divided and `scale_query` are both set, so nothing is left to divide.",
                "Use one of the two.",
            ),
            (
                self.alibi_bias_max < 1,
                f"`alibi_bias_max` is {self.alibi_bias_max}.",
                "Set it to at least 1; the paper uses 8.",
            ),
            (
                self.alibi_divisor <= 0,
                f"`alibi_divisor` is {self.alibi_divisor}.",
                "Set it above 0; 1 leaves the bias as it is.",
            ),
            (
                self.broadcast_key_value and kv_heads != 1,
                f"`broadcast_key_value` is set with {kv_heads} key/value heads.",
                "Set `num_key_value_heads=1` or `broadcast_key_value=False`.",
            ),
            (
                self.broadcast_key_value and self.attention_score_form not in ("multiplied", "divided"),
                f"`broadcast_key_value` is set with `attention_score_form` {self.attention_score_form}, whose product "
                "cannot broadcast.",
                "Set `attention_score_form` to 'multiplied' or 'divided', or `broadcast_key_value=False`.",
            ),
        ]  # fmt: skip
        return table

    def is_heterogeneous_in(self, field: str) -> bool:
        """Whether `per_layer_config` gives some layer another value of `field`."""
        spec = self.__dict__.get("_heterogeneity_spec")
        return spec is not None and field in spec.per_layer_attributes

    def _position_width(self) -> int:
        """Width of the position table: that of the vectors it is added to."""
        projected = self.embedding_projection_position == "before_positions"
        return self.hidden_size if projected else self.embedding_size

    def _nested_rope_keys(self, parameters: dict) -> list[str]:
        """The layer types that RoPE parameters have an entry for; none where they are flat."""
        return [key for key in parameters if key in LAYER_TYPE_LETTERS.values()]

    def _flat_rope_parameters(self) -> list[dict]:
        parameters = self.rope_parameters or {}
        nested = self._nested_rope_keys(parameters)
        flat = [parameters[key] for key in nested] if nested else [parameters]
        return [entry for entry in flat if entry]

    def _missing_rope_keys(self) -> list[str]:
        missing = []
        for entry in self._flat_rope_parameters():
            needed = ROPE_KEYS.get(entry["rope_type"], ())
            if "llama_4_scaling_beta" in entry:
                needed = (*needed, "original_max_position_embeddings")
            missing += [key for key in needed if entry.get(key) is None]
        return sorted(set(missing))

    def _rotary_dim(self, entry: dict) -> int:
        return int(self.head_dim * (entry.get("partial_rotary_factor") or 1.0))

    def _dynamic_rope_is_too_narrow(self) -> bool:
        entries = self._flat_rope_parameters()
        return any(entry["rope_type"] == "dynamic" and self._rotary_dim(entry) <= 2 for entry in entries)

    def _longrope_factors_are_misfits(self) -> bool:
        lists = [
            (entry.get(name) or (), (self._rotary_dim(entry) + 1) // 2)
            for entry in self._flat_rope_parameters()
            if entry["rope_type"] == "longrope"
            for name in ("short_factor", "long_factor")
        ]
        return any(factors and len(factors) != pairs for factors, pairs in lists)

    def _rotary_dims_are_misfits(self) -> bool:
        """An odd part is rounded up to whole pairs, as in transformers' tables, where the head has room for that."""
        widths = [self._rotary_dim(entry) for entry in self._flat_rope_parameters()]
        return any(width < 1 or width + width % 2 > self.head_dim for width in widths)

    def _unknown_rope_types(self) -> list[str]:
        types = {entry.get("rope_type", "default") for entry in self._flat_rope_parameters()}
        return sorted(types - set(ROPE_TYPES))


__all__ = ["VariantConfig"]
