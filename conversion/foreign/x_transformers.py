"""x-transformers' TransformerWrapper and XTransformer (https://github.com/lucidrains/x-transformers), of late releases.

Neither a module nor its state dict says what it was made with, so the arguments are given beside them: in Python, or as
x_transformers.json beside a state dict that torch saved as model.pt, a convention of ours.
"""

import re
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_variants.model.configuration_variant import VariantConfig
from hf_variants.model.configuration_variant_seq2seq import VariantSeq2SeqConfig

from ..errors import ConversionError
from ..json_files import read_object
from ..pickles import load_state_dict
from ..rules import Rule, Split
from .source import ForeignCheckpoint, Settings, without_prefix


# Compared with; of others the same arguments mean other models.
FIRST, END = (2, 30, 5), (2, 32)
WEIGHTS, ARGUMENTS = "model.pt", "x_transformers.json"

# Mechanisms that no field expresses, and the values at which they are not there.
REFUSED_OF_LAYERS: dict[str, Any] = {
    "only_cross": False, "only_attn": False, "use_scalenorm": False, "use_derf": False, "use_adaptive_layernorm": False,
    "use_adaptive_rmsnorm": False, "use_adaptive_layerscale": False, "rel_pos_bias": False, "dynamic_pos_bias": False,
    "rotary_xpos": False, "rotate_num_heads": None, "polar_pos_emb": False, "weight_tie_layers": False,
    "custom_layers": None, "layers_execute_order": None, "sandwich_coef": None, "par_ratio": None, "residual_attn": False,
    "cross_residual_attn": False, "macaron": False, "pre_and_post_norm": False, "attn_aggregated_residuals": False,
    "gate_residual": False, "orthog_residual": False, "mv_split_residual": False, "gated_multi_residual": False,
    "scale_residual": False, "scale_residual_constant": 1, "shift_tokens": 0, "softclamp_output": False,
    "unet_skips": False, "integrate_layers": False, "num_residual_streams": 1, "qkv_receive_diff_residuals": False,
    "reinject_input": False, "learned_reinject_input_gate": False, "add_value_residual": False, "rel_pos_kwargs": {},
    "residual_fn_kwargs": {},
    "ff_dim_out": None, "ff_glu_mult_bias": False, "ff_solu": False, "ff_custom_activation": None,
    "ff_softclamp_value": None, "ff_glu_softclamp": False,
    "attn_dim_context": None, "attn_pre_talking_heads": False, "attn_post_talking_heads": False,
    "attn_pre_scale_post_talking_heads": False, "attn_head_scale": False, "attn_sparse_topk": None, "attn_num_mem_kv": 0,
    "attn_on_attn": False, "attn_gate_value_heads": False, "attn_swiglu_values": False, "attn_gate_values": False,
    "attn_output_gate": False, "attn_hard": False, "attn_qk_norm_groups": 1, "attn_qk_norm_dim_scale": False,
    "attn_k_rmsnorm": False, "attn_value_rmsnorm": False, "attn_l2_distance": False, "attn_sigmoid": False,
    "attn_gumbel_softmax": False, "attn_selective": False, "attn_cog_signed": False, "attn_custom_attn_fn": None,
    "attn_hybrid_module": None, "attn_value_dim_head": None, "attn_dim_out": None, "attn_add_zero_kv": False,
    "attn_rotate_num_heads": None, "attn_data_dependent_alibi": False, "attn_use_rel_proj_pos_bias": False,
    "attn_use_cope": False, "attn_learned_value_residual_mix": False, "attn_orthog_projected_values": False,
    "attn_orthog_projected_values_per_head": False, "attn_laser": False, "attn_qkv_receive_diff_residuals": False,
    "attn_project_out": None, "attn_use_latent_q": False, "attn_use_latent_kv": False, "attn_latent_rope_subheads": None,
    "attn_inverted_attention": False, "attn_flash_pack_seq": False,
}  # fmt: skip
# Of initialisation and training, of speed, and of mechanisms that are refused.
UNREAD_OF_LAYERS = (
    "dynamic_tanh_init_alpha", "dim_condition", "adaptive_condition_mlp", "adaptive_condition_mlp_expansion",
    "rel_pos_num_buckets", "rel_pos_max_distance", "dynamic_pos_bias_log_distance", "dynamic_pos_bias_mlp_depth",
    "dynamic_pos_bias_norm", "rotary_xpos_scale_base", "polar_bias_uniform_init", "attn_aggregated_residual_kwargs",
    "softclamp_output_value", "zero_init_branch_output", "layer_dropout", "cross_attn_tokens_dropout",
    "layerscale_init_value", "layer_integrate_use_softmax", "learned_value_residual_mix", "hyper_conn_sinkhorn_iters",
    "verbose", "ff_zero_init_output", "ff_glu_gate_softclamp_value", "ff_glu_up_softclamp_value", "attn_flash",
    "attn_sparse_topk_straight_through", "attn_gate_values_rank", "attn_gate_values_headwise", "attn_output_gate_rank",
    "attn_output_gate_headwise", "attn_low_rank_silu_gates", "attn_zero_init_output", "attn_gumbel_softmax_temp",
    "attn_gumbel_softmax_hard", "attn_hybrid_mask_kwarg", "attn_hybrid_fold_axial_dim", "attn_hybrid_learned_mix",
    "attn_data_dependent_alibi_per_row", "attn_data_dependent_alibi_per_row_dim_head",
    "attn_data_dependent_alibi_kwargs", "attn_rel_proj_num_distance_basis", "attn_rel_proj_max_dist", "attn_cope_max_pos",
    "attn_cope_soft_onehot_pos", "attn_cope_talking_heads", "attn_laser_softclamp_value", "attn_dim_latent_q",
    "attn_dim_latent_kv", "attn_onnxable", "attn_attend_sdp_kwargs",
)  # fmt: skip
REFUSED_OF_WRAPPER: dict[str, Any] = {
    "embed_num_tokens": {}, "num_memory_tokens": 0, "scaled_sinu_pos_emb": False, "l2norm_embed": False,
    "num_output_heads": 1, "recycling": False, "looped": False, "average_pool_embed": False, "use_cls_token": False,
    "attn_pool": False, "token_emb": None, "mixture_of_softmax": False, "sigsoftmax_logits": False,
    "ff_deep_embed": False, "to_logits": None, "add_continuous_pred_head": False, "squeeze_out_last_dim": False,
}  # fmt: skip
# Memories of earlier segments are given in a call, or not.
UNREAD_OF_WRAPPER = (
    "max_mem_len", "shift_mem_down", "memory_tokens_interspersed_every", "train_max_recycle_steps", "max_looped_steps",
    "emb_frac_gradient", "attn_z_loss_weight", "num_cls_tokens", "num_pooled_tokens", "attn_pool_depth",
    "dim_pooled_tokens", "mixture_of_softmax_k", "input_not_include_cache",
)  # fmt: skip
# What XTransformer gives to its wrappers; the rest goes to the layers.
OF_WRAPPER = (
    "num_tokens",
    "max_seq_len",
    "emb_dropout",
    "num_memory_tokens",
    "scaled_sinu_pos_emb",
    "use_abs_pos_emb",
)


def _cannot(settings: Settings, what: str) -> ConversionError:
    return ConversionError(f"{what}, in {settings.where}, is expressed by no field. This model cannot be converted.")


def _norm(layers: Settings, width: int) -> dict:
    kinds = {
        "rmsnorm": layers.take("use_rmsnorm", bool, False), "simple": layers.take("use_simple_rmsnorm", bool, False),
        "dynamic_tanh": layers.take("use_dynamic_tanh", bool, False),
    }  # fmt: skip
    kind = next((name for name, chosen in kinds.items() if chosen), "layernorm")
    offset = layers.take("norm_add_unit_offset", bool, True)
    if kind == "dynamic_tanh" and offset:
        raise _cannot(layers, "`use_dynamic_tanh` with `norm_add_unit_offset`, whose stored weights lack 1")
    placement = "sandwich" if layers.take("sandwich_norm", bool, False) else "pre"
    if not layers.take("pre_norm", bool, True):
        placement = "post"
    return {
        "norm_type": "rmsnorm" if kind == "simple" else kind, "norm_affine": kind != "simple",
        "norm_bias": kind == "dynamic_tanh", "norm_unit_offset": offset and kind != "simple",
        # x / max(|x|, 1e-12): this is that for all but vectors of zeros, which stay so.
        "norm_eps": 1e-5 if kind == "layernorm" else 1e-24 / width,
        "norm_casting_mode": "none" if kind != "rmsnorm" and kind != "simple" else "gemma", "norm_placement": placement,
        "final_norm": placement != "post" and layers.take("pre_norm_has_final_norm", bool, True),
    }  # fmt: skip


def _positions(wrapper: Settings, layers: Settings, head_dim: int, length: int) -> dict:
    rotary, alibi = layers.take("rotary_pos_emb", bool, False), layers.take("alibi_pos_bias", bool, False)
    without = layers.take("disable_abs_pos_emb", bool, None)
    without = rotary if without is None else without
    learned = wrapper.take("use_abs_pos_emb", bool, True) and not without and length > 0
    if learned + rotary + alibi > 1:
        raise _cannot(layers, "More than one of `use_abs_pos_emb`, `rotary_pos_emb` and `alibi_pos_bias`")
    if layers.take("alibi_num_heads", int, None) not in (None, layers.heads) and alibi:
        raise _cannot(layers, "`alibi_num_heads` below the number of heads")
    rotated = layers.count("rotary_emb_dim", None) or head_dim // 2
    factor = layers.take("rotary_interpolation_factor", (int, float), 1.0)
    rescaled = layers.take("rotary_base_rescale_factor", (int, float), 1.0)
    if not rotary:
        kind = "learned" if learned else "alibi" if alibi else "none"
        return {"position_embedding_type": kind}
    if rotated % 2 or rotated > head_dim or (rotated == 2 and rescaled != 1):
        raise _cannot(layers, f"`rotary_emb_dim` {rotated} of {head_dim} channels")
    theta = 10000 * rescaled ** (rotated / (rotated - 2)) if rescaled != 1 else 10000.0
    rope = {"rope_type": "default", "rope_theta": float(theta)}
    if rotated < head_dim:
        rope["partial_rotary_factor"] = rotated / head_dim
    if factor != 1:
        rope |= {"rope_type": "linear", "factor": float(factor)}
    return {"rope_parameters": rope, "rope_interleaved": True, "rope_in_float32": True, "rope_table_in_float32": True}


def _feed_forward(layers: Settings, width: int, norm: dict) -> dict:
    gated, bias = layers.take("ff_glu", bool, False), not layers.take("ff_no_bias", bool, False)
    swish, squared = layers.take("ff_swish", bool, False), layers.take("ff_relu_squared", bool, False)
    sub_norm = layers.take("ff_post_act_ln", bool, False)
    if sub_norm and (norm["norm_type"] != "layernorm" or norm["norm_unit_offset"]):
        raise _cannot(layers, "`ff_post_act_ln`, a LayerNorm without offset, beside other norms")
    return {
        "ffn_type": "glu" if gated else "mlp", "hidden_act": "relu2" if squared else "silu" if swish else "gelu",
        "intermediate_size": int(width * layers.take("ff_mult", (int, float), 4)), "mlp_bias": bias or gated,
        "mlp_output_bias": bias, "ffn_sub_norm": sub_norm,
        "activation_dropout": float(layers.take("ff_dropout", (int, float), 0.0)),
    }  # fmt: skip


def _attention(layers: "_Layers", heads: int, head_dim: int, norm: dict, has_alibi: bool, is_cross: bool) -> dict:
    one, kv = layers.take("attn_one_kv_head", bool, False), layers.count("attn_kv_heads", None)
    if heads == 1:
        raise _cannot(layers, "One head alone, which has no output projection")
    fields: dict[str, Any] = {
        "num_attention_heads": heads, "num_key_value_heads": 1 if one else kv or heads, "head_dim": head_dim,
        "attention_dropout": float(layers.take("attn_dropout", (int, float), 0.0)), "attention_bias": False,
        "attention_sinks": layers.take("attn_head_learned_sink", bool, False),
    }  # fmt: skip
    if has_alibi and 1 < fields["num_key_value_heads"] < heads:
        raise _cannot(layers, "`alibi_pos_bias` with `attn_kv_heads`, whose slopes are of heads in another order")
    past = layers.count("attn_max_attend_past", None)
    if past is not None:
        if is_cross or not layers.causal:
            raise _cannot(layers, "`attn_max_attend_past` in an encoder or in cross-attention")
        # Tokens before the one that attends; ours counts it too.
        fields |= {"sliding_window": past + 1, "layer_types": ["sliding_attention"] * layers.depth}
    clamped, clamp = (
        layers.take("attn_softclamp_logits", bool, False),
        layers.take("attn_logit_softclamp_value", (int, float), 50.0),
    )
    if clamped and has_alibi:
        raise _cannot(layers, "`attn_softclamp_logits` around ALiBi's bias")
    fields["attn_logit_softcapping"] = float(clamp) if clamped else None
    cosine, scale = (
        layers.take("attn_qk_norm", bool, False),
        layers.take("attn_qk_norm_scale", (int, float), 10),
    )
    by_head = layers.take("attn_qk_rmsnorm", bool, False)
    if by_head and (cosine or norm["norm_type"] != "rmsnorm" or not norm["norm_unit_offset"]):
        raise _cannot(
            layers, "`attn_qk_rmsnorm` without `use_rmsnorm` and `norm_add_unit_offset`, or with `attn_qk_norm`"
        )
    if cosine or by_head:
        fields |= {
            "qk_norm": "per_head" if by_head else "head", "qk_norm_type": "rmsnorm", "qk_norm_affine": by_head,
            "qk_norm_bias": False, "qk_norm_eps": 1e-24 / head_dim,
        }  # fmt: skip
    if cosine:
        # Unit vectors are normalised ones over the root of their width.
        fields["attention_scaling"] = scale / head_dim
    return fields


class _Layers(Settings):
    """The arguments of Encoder or Decoder, with what the others are read by."""

    def __init__(self, values: Any, where: str, causal: bool):
        super().__init__(values, where)
        self.causal = causal
        if tuples := [key for key, value in self._left.items() if isinstance(value, (tuple, list))]:
            raise _cannot(self, f"`{tuples[0]}` with a value for each layer")
        self.heads, self.depth = self.count("heads", 8), self.layers("depth")


def _stack(wrapper: Settings, layers: _Layers, width: int, is_cross: bool) -> VariantConfig:
    """The config of a stack, all of whose arguments are used."""
    length = wrapper.take("max_seq_len", int)
    norm = _norm(layers, width)
    head_dim = layers.count("attn_dim_head", 64)
    positions = _positions(wrapper, layers, head_dim, length)
    has_alibi = positions.get("position_embedding_type") == "alibi"
    fields = norm | positions | _feed_forward(layers, width, norm)
    fields |= _attention(layers, layers.heads, head_dim, norm, has_alibi, is_cross)
    drops = [float(layers.take(f"{name}_sublayer_dropout", (int, float), 0.0)) for name in ("attn", "ff")]
    if all(drops) and len(set(drops)) > 1:
        raise _cannot(layers, "`attn_sublayer_dropout` beside another `ff_sublayer_dropout`")
    fields |= {
        f"{name}_residual_dropout": bool(drop) or not any(drops)
        for name, drop in zip(("attention", "ffn"), drops, strict=True)
    }
    scale = layers.take("depth_scale_residual", (bool, int, float), False)
    fields["residual_multiplier"] = 1.0 if isinstance(scale, bool) else float(scale)
    if layers.take("use_layerscale", bool, False):
        if norm["norm_unit_offset"] or norm["norm_affine"] is False:
            raise _cannot(layers, "`use_layerscale` with `norm_add_unit_offset`, whose stored scales lack 1")
        fields["learned_scale_type"] = "channel"
    tied = wrapper.take("tie_embedding", bool, False)
    if wrapper.take("post_emb_norm", bool, False):
        if norm["norm_type"] != "layernorm" or norm["norm_unit_offset"]:
            raise _cannot(wrapper, "`post_emb_norm`, a LayerNorm without offset, beside other norms")
        fields["embedding_norm"] = True
    tokens = wrapper.count("num_tokens")
    for key, same in {"emb_dim": width, "logits_dim": tokens}.items():
        if wrapper.take(key, int, None) not in (None, same):
            raise _cannot(wrapper, f"`{key}` other than {same}")
    logits = wrapper.take("tie_embedding_scale", (int, float), None)
    logits = width**-0.5 if logits is None else float(logits)
    layers.refuse_but(**REFUSED_OF_LAYERS)
    layers.pass_over(*UNREAD_OF_LAYERS)
    layers.finish()
    wrapper.refuse_but(**REFUSED_OF_WRAPPER)
    wrapper.pass_over(*UNREAD_OF_WRAPPER)
    return VariantConfig(
        vocab_size=tokens, hidden_size=width, num_hidden_layers=layers.depth, max_position_embeddings=max(length, 1),
        is_causal=layers.causal, residual_dropout=max(drops), tie_word_embeddings=tied,
        logit_scale=logits if tied else 1.0,
        embedding_dropout=float(wrapper.take("emb_dropout", (int, float), 0.0)), bos_token_id=None, eos_token_id=None,
        **fields,
    )  # fmt: skip


def _rules(ours: str, config: VariantConfig) -> tuple[Rule, ...]:
    """Rules for a stack whose tensors were given their layer's number, and a, c or f for the sublayer."""
    sublayers = {"a": "self_attn", "c": "cross_attn", "f": "mlp"}
    leaves = {"gamma": "weight", "g": "weight", "beta": "bias", "pre_tanh_scale": "alpha"}
    slots = {0: "post_norm" if config.norm_placement == "post" else "pre_norm", 1: "branch_norm", 2: "post_norm"}
    layer, target = "layers.{layer}.", f"{ours}layers.{{layer}}."
    gated = config.ffn_type == "glu"
    last = "3" if config.ffn_sub_norm else "2"
    enter = layer + ("f.1.ff.0.proj." if gated else "f.1.ff.0.0.")
    made = tuple(f"{target}mlp.{name}_proj.{{leaf}}" for name in (("up", "gate") if gated else ("up",)))
    return (
        Rule("token_emb.emb.weight", f"{ours}embed_tokens.weight"),
        Rule("pos_emb.emb.weight", f"{ours}embed_positions.weight"),
        Rule("post_emb_norm.gamma", f"{ours}embedding_norm.weight"),
        *(Rule(f"final_norm.{a}", f"{ours}norm.{b}") for a, b in leaves.items()),
        *(
            Rule(f"{layer}{a}.0.{number}.{x}", f"{target}{b}_{slot}.{y}")
            for a, b in sublayers.items()
            for number, slot in slots.items()
            for x, y in leaves.items()
        ),
        *(
            Rule(f"{layer}{a}.1.to_{x}.weight", f"{target}{b}.{y}_proj.weight")
            for a, b in (("a", "self_attn"), ("c", "cross_attn"))
            for x, y in {"q": "q", "k": "k", "v": "v", "out": "o"}.items()
        ),
        *(
            Rule(f"{layer}{a}.1.{x}_rmsnorm.gamma", f"{target}{b}.{x}_norm.weight")
            for a, b in (("a", "self_attn"), ("c", "cross_attn"))
            for x in "qk"
        ),
        Rule(f"{layer}a.1.attend.head_attn_sink", f"{target}self_attn.sinks"),
        *(Rule(f"{layer}{a}.1.gamma", f"{target}{b}_residual.scale") for a, b in sublayers.items()),
        Rule(enter + "{leaf}", made, Split(lambda config: [config.intermediate_size] * 2))
        if gated
        else Rule(enter + "{leaf}", made[0]),
        Rule(f"{layer}f.1.ff.1.gamma", f"{target}mlp.sub_norm.weight"),
        Rule(f"{layer}f.1.ff.{last}.{{leaf}}", f"{target}mlp.down_proj.{{leaf}}"),
    )  # fmt: skip


def _reordered(name: str, tensor: torch.Tensor, config: VariantConfig) -> torch.Tensor:
    """
    A tensor with query heads in the order that neighbours share a key head; theirs share one in turn. A norm's weights
    are (heads, width) then, without the dimension between.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if name.endswith("_rmsnorm.gamma"):
        tensor = tensor.squeeze(1)
    of_query = name.endswith(("to_q.weight", "q_rmsnorm.gamma", "head_attn_sink"))
    if kv_heads in (1, heads) or not (of_query or name.endswith("to_out.weight")):
        return tensor
    order = torch.arange(heads).view(-1, kv_heads).t().flatten()
    if of_query:
        # (heads * width, ...) -> (heads, width, ...)
        return tensor.unflatten(0, (heads, -1))[order].flatten(0, 1)
    # (hidden, heads * width) -> (hidden, heads, width)
    return tensor.unflatten(1, (heads, -1))[:, order].flatten(1)


def _are_frequencies(config: VariantConfig, stored: torch.Tensor) -> bool:
    """Whether a stored table is the one of the config's rotation, as far as its dtype goes."""
    rope = config.rope_parameters or {}
    theta, count = rope.get("rope_theta", 1.0), int(rope.get("partial_rotary_factor", 1.0) * config.head_dim) // 2
    if config.position_embedding_type != "rope" or stored.shape != (count,):
        return False
    expected = theta ** (-torch.arange(count, dtype=torch.float64) / count)
    return torch.allclose(stored.double(), expected, rtol=2**-7, atol=1e-6)


def _sorted(
    state: Mapping[str, torch.Tensor], config: VariantConfig, sublayers: str, where: str
) -> dict[str, Callable[[], torch.Tensor]]:
    """The tensors of a stack by names with the layer's number in them, as the model computes with them."""
    made: dict[str, Callable[[], torch.Tensor]] = {}
    for name, tensor in state.items():
        if name == "attn_layers.rotary_pos_emb.inv_freq":
            if not _are_frequencies(config, tensor):
                raise ConversionError(
                    f"{name} in {where} is not what the arguments make. They belong to another model."
                )
            continue
        name = name.removeprefix("attn_layers.")
        if match := re.fullmatch(r"layers\.(\d+)\.(.*)", name):
            layer, place = divmod(int(match[1]), len(sublayers))
            rest = re.sub(r"^1\.fn\.", "1.", match[2])
            name = f"layers.{layer}.{sublayers[place]}.{rest}"
        load: Callable[[], torch.Tensor] = lambda tensor=tensor: tensor  # noqa: E731
        if name == "pos_emb.emb.weight":
            # As every call of theirs multiplies it.
            scale = config.hidden_size**-0.5
            load = lambda tensor=tensor, scale=scale: tensor * scale  # noqa: E731
        elif name.endswith("pre_tanh_scale"):
            load = lambda tensor=tensor: tensor.reshape(1)  # noqa: E731
        elif ".1." in name:
            load = lambda name=name, tensor=tensor: _reordered(name, tensor, config)  # noqa: E731
        made[name] = load
    return made


def _release(settings: Settings, source: Any) -> None:
    """
    Refuse what another release wrote: with the same arguments and tensors, some rotate other channels, scale the logits of
    tied embeddings otherwise, or leave out the last norm.
    """
    here = metadata.version("x-transformers") if isinstance(source, nn.Module) else None
    release = settings.take("version", str, here)
    numbers = tuple(int(part) for part in re.findall(r"\d+", release or ""))
    if not FIRST <= numbers < END:
        raise ConversionError(
            f"`version` of x-transformers in {settings.where} is {release}, and models of releases "
            f"{'.'.join(map(str, FIRST))} up to below {'.'.join(map(str, END))} are converted. Name the release that the "
            "model was trained with; if one of these gives the same outputs with these arguments, name that one."
        )


def open_module(
    source: nn.Module | Mapping[str, torch.Tensor],
    arguments: Mapping[str, Any],
    *,
    path: Path | None = None,
) -> ForeignCheckpoint:
    """
    Args:
        source: a `TransformerWrapper`, an `AutoregressiveWrapper` of one, an `XTransformer`, or its state dict.
        arguments: those that it was made with. Of a `TransformerWrapper`, `attn_layers` is a map as well, of the
            arguments of its layers, among them `causal`: true for a `Decoder`, false for an `Encoder`. They may hold
            `version`, of x-transformers, which beside a state dict they must.

    Raises:
        ConversionError: naming arguments that no field expresses, or tensors that do not belong to them.
    """
    where = str(path / ARGUMENTS) if path else "the arguments"
    state = dict(source.state_dict() if isinstance(source, nn.Module) else source)
    state = without_prefix(state, where)
    top = Settings(arguments, where)
    _release(top, source)
    config: VariantConfig | VariantSeq2SeqConfig
    if top.peek("attn_layers", None) is not None:
        values = dict(top.take("attn_layers", Mapping))
        causal = values.pop("causal", None)
        if not isinstance(causal, bool):
            raise ConversionError(
                f"`attn_layers` in {where} lacks `causal`. Set it: true for a Decoder, false for an Encoder."
            )
        layers = _Layers(values, f"`attn_layers` in {where}", causal)
        if layers.take("cross_attend", bool, False):
            raise _cannot(layers, "`cross_attend` outside of an XTransformer")
        is_bare = top.take("return_only_embed", bool, False)
        config = _stack(top, layers, layers.count("dim"), is_cross=False)
        top.finish()
        state = {name.removeprefix("net."): tensor for name, tensor in state.items()}
        tensors, ours = _sorted(state, config, "af", where), "" if is_bare else "model."
        rules = (*_rules(ours, config), Rule("to_logits.weight", "lm_head.weight"))
        if is_bare:
            class_name = "VariantModel"
        else:
            class_name = "VariantForCausalLM" if causal else "VariantForMaskedLM"
        ties = {}
    else:
        config, tensors, rules, ties = _pair(top, state, where)
        class_name = "VariantForConditionalGeneration"
    stacks = [config] if isinstance(config, VariantConfig) else [config.encoder, config.decoder]
    notes = {
        "Tables of learned positions are divided by the root of their width, as every call of theirs does": any(
            stack.position_embedding_type == "learned" for stack in stacks
        ),
        "Query heads are in another order: ours that share a key head are neighbours": any(
            1 < stack.num_key_value_heads < stack.num_attention_heads for stack in stacks
        ),
    }
    return ForeignCheckpoint(
        code_base="x-transformers",
        path=path or Path(),
        files=[path / WEIGHTS] if path else [],
        config=config,
        class_name=class_name,
        rules=rules,
        weights={name: load().to("meta") for name, load in tensors.items()},
        load=lambda name: tensors[name](),
        stored=lambda name: tensors[name](),
        ties=ties,
        notes=[sentence for sentence, holds in notes.items() if holds],
    )


def _pair(
    top: Settings, state: Mapping[str, torch.Tensor], where: str
) -> tuple[VariantSeq2SeqConfig, dict[str, Callable[[], torch.Tensor]], tuple[Rule, ...], dict[str, str]]:
    """An XTransformer, whose arguments for either stack have a prefix."""
    width, shared = top.count("dim"), top.take("tie_token_emb", bool, False)
    top.pass_over("ignore_index", "pad_value", "cross_attn_tokens_dropout")
    stacks, tensors, rules = {}, {}, []
    for name, prefix in (("encoder", "enc_"), ("decoder", "dec_")):
        values = top.with_prefix(prefix)
        wrapper = Settings({key: values.pop(key) for key in OF_WRAPPER if key in values}, f"`{prefix}*` in {where}")
        layers = _Layers(values, f"`{prefix}*` in {where}", causal=name == "decoder")
        stacks[name] = _stack(wrapper, layers, width, is_cross=name == "decoder")
        wrapper.finish()
        own = "decoder.net." if name == "decoder" else "encoder."
        inside = {key.removeprefix(own): tensor for key, tensor in state.items() if key.startswith(own)}
        found = _sorted(inside, stacks[name], "acf" if name == "decoder" else "af", where)
        tensors |= {f"{name}.{key}": load for key, load in found.items()}
        rules += [rule.with_prefixes(f"{name}.", "") for rule in _rules(f"model.{name}.", stacks[name])]
    top.finish()
    if strange := [name for name in state if not name.startswith(("encoder.", "decoder.net."))]:
        raise ConversionError(f"{strange[0]} is no tensor of an XTransformer's stacks. It belongs to another model.")
    config = VariantSeq2SeqConfig(
        **stacks, share_embeddings=shared, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    ties = {"encoder.token_emb.emb.weight": "decoder.token_emb.emb.weight"} if shared else {}
    return config, tensors, (*rules, Rule("decoder.to_logits.weight", "lm_head.weight")), ties


def finds(path: Path) -> bool:
    folder = path if path.is_dir() else path.parent
    own = path.is_dir() or path.name == WEIGHTS
    return own and (folder / ARGUMENTS).is_file() and (folder / WEIGHTS).is_file()


def open_checkpoint(path: Path) -> ForeignCheckpoint:
    folder = path if path.is_dir() else path.parent
    return open_module(load_state_dict(folder / WEIGHTS), read_object(folder / ARGUMENTS), path=folder)
