"""LitGPT's lit_model.pth with model_config.yaml (https://github.com/Lightning-AI/litgpt), of old releases too."""

from pathlib import Path

import yaml

from hf_variants.model.configuration_variant import VariantConfig

from ..errors import ConversionError
from ..families._common import QKV_BY_HEAD, QKV_IN_BLOCKS
from ..json_files import read_object, read_text
from ..pickles import load_state_dict
from ..rules import Rule
from .source import ForeignCheckpoint, Settings


WEIGHTS, CONFIG = "lit_model.pth", "model_config.yaml"
# What stood in its place before March 2024, and two of its keys.
OLD_CONFIG = "lit_config.json"
OLD_KEYS = {"_norm_class": "norm_class_name", "_mlp_class": "mlp_class_name"}
LAYER, OURS = "transformer.h.{layer}.", "model.layers.{layer}."
RULES = (
    Rule("transformer.wte.weight", "model.embed_tokens.weight"),
    Rule("transformer.ln_f.{leaf}", "model.norm.{leaf}"),
    Rule("lm_head.{leaf}", "lm_head.{leaf}"),
    *(
        Rule(f"{LAYER}{theirs}.{{leaf}}", f"{OURS}{ours}.{{leaf}}")
        for theirs, ours in {
            "attn.proj": "self_attn.o_proj", "attn.norm_q": "self_attn.q_norm", "attn.norm_k": "self_attn.k_norm",
            "norm_1": "self_attn_pre_norm", "post_attention_norm": "self_attn_branch_norm", "norm_2": "mlp_pre_norm",
            "post_mlp_norm": "mlp_branch_norm", "mlp.fc": "mlp.up_proj", "mlp.fc_1": "mlp.gate_proj",
            "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
        }.items()
    ),
)  # fmt: skip
QKV = tuple(OURS + f"self_attn.{name}_proj.{{leaf}}" for name in "qkv")
FUSED = Rule(LAYER + "attn.qkv.{leaf}", QKV, QKV_IN_BLOCKS)
# Until 0.5.4.
OLD_FUSED = Rule(LAYER + "attn.attn.{leaf}", QKV, QKV_BY_HEAD)
# Which layers have a window, of releases that did not list them: the first of so many.
PLACINGS = {None: 1, "all": 1, "interleaved": 2, 1: 1, 2: 2}
# Kind of network -> ours, and its activation where it is no GELU.
NETWORKS = {"GptNeoxMLP": ("mlp", None), "LLaMAMLP": ("glu", "silu"), "GemmaMLP": ("glu", None)}
GELUS = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}
# Norms before and behind the branches -> ours.
PLACEMENTS = {(True, False): "pre", (True, True): "sandwich", (False, True): "branch"}
LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"}


def finds(path: Path) -> bool:
    if path.is_file() and path.name != WEIGHTS:
        return False
    folder = path if path.is_dir() else path.parent
    return (folder / WEIGHTS).is_file() and any((folder / name).is_file() for name in (CONFIG, OLD_CONFIG))


def _one_of(settings: Settings, key: str, known: dict, value: object) -> object:
    if value not in known:
        raise ConversionError(
            f"`{key}` in {settings.where} is {value!r}, and only {', '.join(map(repr, known))} can be expressed here. "
            "This checkpoint cannot be converted."
        )
    return known[value]


def _indices(settings: Settings, key: str, layers: int) -> list[int] | None:
    """For each layer 1 or 0; more than there are layers are not read."""
    values = settings.take(key, list, None)
    if values is not None and (len(values) < layers or any(value not in (0, 1) for value in values)):
        raise ConversionError(
            f"`{key}` in {settings.where} is {values!r}, and must be 0 or 1 for each of {layers} layers. Correct it."
        )
    return None if values is None else values[:layers]


def _rope(settings: Settings, head_size: int) -> tuple[dict, list[str]]:
    """The parameters of full attention, and notes."""
    theta, condense = settings.count("rope_base", 10000), settings.take("rope_condense_ratio", (int, float), 1)
    rotated = int(settings.take("rotary_percentage", (int, float), 0.25) * head_size)
    adjustments = settings.take("rope_adjustments", dict, None) or {}
    if rotated < 2 or rotated % 2:
        raise ConversionError(
            f"`rotary_percentage` in {settings.where} rotates {rotated} of {head_size} channels, and pairs are rotated "
            "here. This checkpoint cannot be converted."
        )
    rope = {"rope_type": "default", "rope_theta": float(theta)}
    if rotated < head_size:
        rope["partial_rotary_factor"] = rotated / head_size
    if adjustments.keys() == LLAMA3:
        rope |= {"rope_type": "llama3"} | {
            name: float(adjustments[name]) for name in LLAMA3 - {"original_max_seq_len"}
        }
        rope["original_max_position_embeddings"] = int(adjustments["original_max_seq_len"])
    elif adjustments.keys() == {"factor"}:
        rope |= {"rope_type": "linear", "factor": float(adjustments["factor"])}
    elif adjustments:
        raise ConversionError(
            f"`rope_adjustments` in {settings.where} has {', '.join(map(str, adjustments))}, which is neither Llama 3's nor "
            "linear scaling. This checkpoint cannot be converted."
        )
    if condense == 1:
        return rope, []
    if rope["rope_type"] != "default":
        raise ConversionError(
            f"`rope_condense_ratio` and `rope_adjustments` in {settings.where} both scale the positions, which nothing "
            "here does. This checkpoint cannot be converted."
        )
    return {**rope, "rope_type": "linear", "factor": float(condense)}, [
        "Positions are divided by `rope_condense_ratio` there, and frequencies here, which rounds differently"
    ]


def config_of(values: object, where: str | Path) -> tuple[VariantConfig, list[str]]:
    """The config for the content of a model_config.yaml, and notes."""
    settings = Settings(values, where)
    name = settings.take("name", str, "")
    width, layers, heads = settings.count("n_embd", 4096), settings.layers("n_layer", 16), settings.count("n_head", 32)
    head_size = settings.count("head_size", None) or width // heads
    bias, attention_bias = settings.take("bias", bool, True), settings.take("attn_bias", bool, False)
    norm, is_affine = settings.take("norm_class_name", str, "LayerNorm"), True
    norm_type = _one_of(settings, "norm_class_name", {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}, norm)
    # LitGPT decides these two by the name.
    if norm_type == "layernorm" and "OLMo" in name:
        is_affine = False
    has_offset = norm_type == "rmsnorm" and "Gemma" in name
    before = [settings.take(key, bool, True) for key in ("norm_1", "norm_2")]
    behind = [settings.take(key, bool, False) for key in ("post_attention_norm", "post_mlp_norm")]
    if len(set(before)) > 1 or len(set(behind)) > 1:
        raise ConversionError(
            f"The norms in {where} stand at attention and network in different places, which no field says. This "
            "checkpoint cannot be converted."
        )
    placement = _one_of(settings, "norm_1, post_attention_norm", PLACEMENTS, (before[0], behind[0]))
    parallel, shared = (
        settings.take("parallel_residual", bool, True),
        settings.take("shared_attention_norm", bool, False),
    )
    network = settings.take("mlp_class_name", str, "GptNeoxMLP")
    ffn_type, activation = _one_of(settings, "mlp_class_name", NETWORKS, network)
    gelu = _one_of(settings, "gelu_approximate", GELUS, settings.take("gelu_approximate", str, "none"))
    qk_norm, qk_kind = settings.take("norm_qk", bool, False), settings.take("norm_qk_type", str, "default")
    eps = settings.take("norm_eps", (int, float), 1e-5)
    scores = settings.take("attention_scores_scalar", (int, float), None)
    window, in_window = (
        settings.count("sliding_window_size", None),
        _indices(settings, "sliding_window_indices", layers),
    )
    every = _one_of(
        settings,
        "sliding_window_layer_placing",
        PLACINGS,
        settings.take("sliding_window_layer_placing", (int, str), None),
    )
    rope, notes = _rope(settings, head_size)
    local, is_local = settings.count("rope_local_base_freq", None), _indices(settings, "rope_indices", layers)
    fields: dict = {}
    if window is not None:
        in_window = in_window or [layer % every == 0 for layer in range(layers)]
        fields["sliding_window"] = window
        fields["layer_types"] = ["sliding_attention" if inside else "full_attention" for inside in in_window]
    if local is not None:
        if window is None or (is_local or [1] * layers) != in_window:
            raise ConversionError(
                f"`rope_indices` in {where} are others than `sliding_window_indices`, which no field says. This checkpoint "
                "cannot be converted."
            )
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": float(local)}}
    if settings.take("scale_embeddings", bool, False):
        fields |= {"embedding_multiplier": width**0.5, "embedding_multiplier_in_weight_dtype": True}
    if qk_norm:
        kind = _one_of(settings, "norm_qk_type", {"default": "head", "olmo2": "full"}, qk_kind)
        fields |= {"qk_norm": kind, "qk_norm_type": norm_type, "qk_norm_eps": eps}
        fields |= {"qk_norm_affine": is_affine, "qk_norm_bias": is_affine and norm_type == "layernorm"}
    if parallel:
        fields |= {"parallel_block": "shared_norm" if shared else "two_norms", "parallel_sum_order": "residual_first"}
    vocabulary, multiple = settings.count("vocab_size", 50254), settings.count("padding_multiple", 512)
    config = VariantConfig(
        vocab_size=settings.count("padded_vocab_size", None) or -(-vocabulary // multiple) * multiple,
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, head_dim=head_size,
        intermediate_size=settings.count("intermediate_size", None) or 4 * width,
        num_key_value_heads=settings.count("n_query_groups", None) or heads,
        max_position_embeddings=settings.count("block_size", 4096), norm_type=norm_type,
        norm_eps=eps, norm_affine=is_affine,
        norm_bias=is_affine and norm_type == "layernorm", norm_unit_offset=has_offset,
        norm_casting_mode="gemma" if norm_type == "rmsnorm" else "none", norm_placement=placement, ffn_type=ffn_type,
        hidden_act=activation or gelu, mlp_bias=bias, mlp_output_bias=bias, attention_bias=bias or attention_bias,
        attention_output_bias=bias, attention_scaling=None if scores is None else scores**-0.5,
        attn_logit_softcapping=settings.take("attention_logit_softcapping", (int, float), None),
        final_logit_softcapping=settings.take("final_logit_softcapping", (int, float), None),
        lm_head_bias=settings.take("lm_head_bias", bool, False), rope_parameters=rope,
        rope_interleaved=settings.take("rope_interleave", bool, False), rope_in_float32=True, rope_table_in_float32=True,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, **fields,
    )  # fmt: skip
    settings.pass_over("hf_config", "org")
    # Mixtures of experts and latent attention.
    settings.refuse_but(n_expert=0, latent_attention=None, first_k_dense_replace=None, n_shared_expert=None)
    settings.pass_over(
        "moe_intermediate_size", "n_expert_groups", "n_topk_groups", "n_topk_scores_per_group", "n_expert_per_token",
        "routed_scaling_factor", "norm_topk_prob",
    )  # fmt: skip
    settings.finish()
    return config, notes


def open_checkpoint(path: Path) -> ForeignCheckpoint:
    folder = path if path.is_dir() else path.parent
    file = folder / CONFIG if (folder / CONFIG).is_file() else folder / OLD_CONFIG
    config, notes = config_of(_read(file), file)
    state = load_state_dict(folder / WEIGHTS)
    is_old = any(".attn.attn." in name for name in state)
    rules = (*RULES, OLD_FUSED if is_old else FUSED)
    return ForeignCheckpoint.of_state("LitGPT", folder / WEIGHTS, config, rules, state, notes=notes)


def _read(file: Path) -> object:
    if file.suffix == ".json":
        return {OLD_KEYS.get(key, key): value for key, value in read_object(file).items()}
    try:
        return yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        raise ConversionError(f"{file} is no YAML ({error}). The file is damaged; fetch it again.") from error
