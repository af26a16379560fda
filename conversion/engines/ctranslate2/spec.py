"""From a model of ours to CTranslate2's specification of it: every argument from the config, every weight in its place."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ....model.configuration_variant import VariantConfig
from ..frequencies import frequency_factors
from .kernels import activation_of, ctranslate2_package
from .lacks import divides_alibi_as_scores


def build_spec(model: PreTrainedModel) -> Any:
    """
    CTranslate2's specification of a decoder, an encoder or an encoder-decoder, without a vocabulary.

    Args:
        model: one of ours, whose config nothing stands in the way of (`lacks`). Of an encoder's head nothing is taken.
    """
    specs = ctranslate2_package().specs
    if model.config.is_encoder_decoder:
        stacks = model.model
        encoder = _stack(stacks.encoder)
        decoder = _stack(stacks.decoder)
        _set_head(decoder, model, model.config.decoder)
        spec = specs.TransformerSpec(encoder, decoder)
        epsilon = model.config.decoder.norm_eps
    elif model.config.is_causal:
        decoder = _stack(model.base_model)
        _set_head(decoder, model, model.config)
        spec = specs.TransformerDecoderModelSpec(decoder)
        epsilon = model.config.norm_eps
    else:
        pooler = model.base_model.pooler
        spec = specs.TransformerEncoderModelSpec(_stack(model.base_model), pooling_layer=pooler is not None)
        if pooler is not None:
            _set_linear(spec.pooler_dense, [pooler.dense])
        epsilon = model.config.norm_eps
    spec.config.layer_norm_epsilon = epsilon
    return spec


def _stack(stack: PreTrainedModel) -> Any:
    """The specification of one stack, with its weights."""
    specs, config = ctranslate2_package().specs.transformer_spec, stack.config
    first = config.per_layer_config[0]
    is_pre = first.norm_placement in ("pre", "sandwich")
    arguments = {
        "num_layers": config.num_hidden_layers,
        "num_heads": first.num_attention_heads,
        # A final norm is part of the specification of pre-norm layers alone; the engine takes it with any.
        "pre_norm": True,
        "no_final_norm": not config.final_norm,
        "activation": _activation(first.hidden_act),
        "layernorm_embedding": config.embedding_norm,
        "rms_norm": config.norm_type == "rmsnorm",
    }
    if config.is_causal:
        spec = specs.TransformerDecoderSpec(
            **arguments,
            with_encoder_attention=False,
            project_in_out=config.embedding_size != config.hidden_size,
            alibi=config.position_embedding_type == "alibi",
            alibi_use_positive_positions=False,
            scale_alibi=divides_alibi_as_scores(config) and config.alibi_divisor != 1,
        )
    else:
        spec = specs.TransformerEncoderSpec(
            **arguments,
            num_source_embeddings=2 if config.type_vocab_size else 1,
            embeddings_merge=ctranslate2_package().specs.common_spec.EmbeddingsMerge.ADD,
        )
    spec.pre_norm = is_pre
    spec.layer = [_layer(stack, layer_idx) for layer_idx in range(config.num_hidden_layers)]
    if config.position_embedding_type == "relative_bias":
        _set_relative_bias(spec, stack)
    _set_embeddings(spec, stack)
    if config.embedding_norm:
        _set_norm(spec.layernorm_embedding, stack.embedding_norm, config)
    if config.final_norm:
        _set_norm(spec.layer_norm, stack.norm, config)
    return spec


def _activation(name: str) -> Any:
    return getattr(ctranslate2_package().specs.common_spec.Activation, activation_of(name) or "")


# Embeddings


def _set_embeddings(spec: Any, stack: PreTrainedModel) -> None:
    config, multiplier = stack.config, stack.config.embedding_multiplier
    weight = stack.embed_tokens.weight
    is_projected = config.embedding_size != config.hidden_size
    if config.is_causal:
        spec.embeddings.weight = weight
        if is_projected:
            _set_linear(spec.project_in, [stack.token_projection])
            if config.output_projection:
                _set_linear(spec.project_out, [stack.output_projection])
            else:
                del spec.project_out
    else:
        if is_projected:
            # The engine's encoders have no projection: the table has its outcome.
            projection = stack.token_projection
            bias = None if projection.bias is None else projection.bias.float()
            weight = F.linear(weight.float() * multiplier, projection.weight.float(), bias)
            multiplier = 1.0
        spec.embeddings[0].weight = weight
        if config.type_vocab_size:
            # The engine scales the sum.
            types = stack.token_types.weight
            spec.embeddings[1].weight = types if multiplier == 1.0 else types.float() / multiplier
    spec.scale_embeddings = False if multiplier == 1.0 else np.float32(multiplier)
    if config.position_embedding_type in ("learned", "sinusoidal"):
        spec.position_encodings.encodings = position_table(stack)


def position_table(stack: PreTrainedModel) -> torch.Tensor:
    """What is added at each position that a text can reach: (positions, width), in the table's dtype."""
    first, table = stack.first_position, stack.embed_positions.weight
    positions = torch.arange(first, stack.config.max_position_embeddings, device=table.device)
    nothing = table.new_zeros(1, len(positions), table.shape[1])
    return stack.embed_positions(nothing, positions[None])[0]


# Layers


def _layer(stack: PreTrainedModel, layer_idx: int) -> Any:
    """One layer with its weights."""
    specs, config = ctranslate2_package().specs.transformer_spec, stack.config
    layer, block = config.per_layer_config[layer_idx], stack.layers[layer_idx]
    is_sandwich, is_rms = layer.norm_placement == "sandwich", layer.norm_type == "rmsnorm"
    arguments = {
        "ffn_glu": layer.ffn_type == "glu",
        "rms_norm": is_rms,
        "num_heads_kv": None if layer.num_key_value_heads == layer.num_attention_heads else layer.num_key_value_heads,
        "head_dim": layer.head_dim,
        "qk_norm": layer.qk_norm != "none",
        "pre_post_layer_norm": is_sandwich,
        "relative_attention_bias": config.position_embedding_type == "relative_bias",
        **_rotation(stack, layer_idx),
    }
    if not config.is_causal:
        spec = specs.TransformerEncoderLayerSpec(**arguments)
    else:
        spec = specs.TransformerDecoderLayerSpec(
            **arguments,
            with_encoder_attention=config.add_cross_attention,
            external_pre_post_encoder_layers=is_sandwich,
            parallel_residual=layer.parallel_block != "none",
            shared_layer_norm=layer.parallel_block == "shared_norm",
        )
    _set_rotation(spec.self_attention, stack, layer_idx)
    _set_attention(spec.self_attention, block.self_attn, _scaling(stack, layer_idx), block, "self_attn", layer)
    if config.add_cross_attention:
        _set_attention(
            spec.attention, block.cross_attn, _scaling(stack, layer_idx, of_self=False), block, "cross_attn", layer
        )
    _set_feed_forward(spec.ffn, block, layer)
    if layer.parallel_block == "shared_norm":
        spec.shared_layer_norm = _norm(block.self_attn_pre_norm, layer)
    elif layer.parallel_block == "two_norms":
        spec.input_layer_norm = _norm(block.self_attn_pre_norm, layer)
        spec.post_attention_layer_norm = _norm(block.mlp_pre_norm, layer)
    elif is_sandwich:
        _set_norm(spec.input_layer_norm, block.self_attn_pre_norm, layer)
        _set_norm(
            spec.post_attention_layer_norm, block.self_attn_branch_norm, layer, _branch_scale(block, "self_attn")
        )
        _set_norm(spec.pre_feedforward_layer_norm, block.mlp_pre_norm, layer)
        _set_norm(spec.post_feedforward_layer_norm, block.mlp_branch_norm, layer, _branch_scale(block, "mlp"))
        if config.add_cross_attention:
            scale = _branch_scale(block, "cross_attn")
            _set_norm(spec.external_pre_encoder_attention_layer_norm, block.cross_attn_pre_norm, layer)
            _set_norm(spec.external_post_encoder_attention_layer_norm, block.cross_attn_branch_norm, layer, scale)
    else:
        slot = "pre_norm" if layer.norm_placement == "pre" else "post_norm"
        _set_norm(spec.self_attention.layer_norm, getattr(block, f"self_attn_{slot}"), layer)
        _set_norm(spec.ffn.layer_norm, getattr(block, f"mlp_{slot}"), layer)
        if config.add_cross_attention:
            _set_norm(spec.attention.layer_norm, getattr(block, f"cross_attn_{slot}"), layer)
    return spec


def _scaling(stack: PreTrainedModel, layer_idx: int, of_self: bool = True) -> float:
    """What multiplies the scores; a factor on cosines and sines enters them through queries and keys."""
    layer = stack.config.per_layer_config[layer_idx]
    scaling = layer.head_dim**-0.5 if layer.attention_scaling is None else layer.attention_scaling
    if stack.config.scale_attn_by_inverse_layer_idx:
        scaling /= layer_idx + 1
    name = stack.rotary_names[layer_idx]
    return scaling * stack.rotary_emb[name].attention_scaling ** 2 if of_self and name is not None else scaling


def _rotation(stack: PreTrainedModel, layer_idx: int) -> dict[str, Any]:
    """The arguments of a layer's rotation; none where nothing is rotated."""
    config, name = stack.config, stack.rotary_names[layer_idx]
    su = ctranslate2_package().specs.attention_spec.RotaryScalingType.Su
    if name is None:
        # Without anything that knows positions in its first layer, the engine would add sinusoids to the embeddings.
        needs_one = layer_idx == 0 and config.position_embedding_type in ("none", "rope")
        return {"rotary_dim": 2, "rotary_scaling_type": su} if needs_one else {}
    table, parameters = stack.rotary_emb[name], config.rope_parameters_of(layer_idx)
    # Any fixed frequencies are those of this scaling, with factors to suit.
    is_scaled = frequency_factors(table.sign * table.inv_freq, parameters["rope_theta"]) is not None
    return {
        "rotary_dim": 2 * len(table.inv_freq),
        "rotary_interleave": config.rope_interleaved,
        "rotary_base": parameters["rope_theta"],
        "rotary_scaling_type": su if is_scaled else None,
    }


def _set_rotation(spec: Any, stack: PreTrainedModel, layer_idx: int) -> None:
    if not hasattr(spec, "rotary_scaling_long_factor"):
        return
    name = stack.rotary_names[layer_idx]
    if name is None:
        # A pair of channels that never turns.
        factors: list[float] | None = [float("inf")]
    else:
        table, parameters = stack.rotary_emb[name], stack.config.rope_parameters_of(layer_idx)
        factors = frequency_factors(table.sign * table.inv_freq, parameters["rope_theta"])
    spec.rotary_scaling_long_factor = spec.rotary_scaling_short_factor = np.array(factors, dtype=np.float32)


def _set_attention(spec: Any, attention: Any, scaling: float, block: Any, sublayer: str, layer: VariantConfig) -> None:
    is_self = sublayer == "self_attn"
    spec.queries_scale = np.float32(scaling)
    if is_self:
        _set_linear(spec.linear[0], [attention.q_proj, attention.k_proj, attention.v_proj])
        if layer.qk_norm != "none":
            spec.q_norm, spec.k_norm = (
                _norm(norm, layer, of_heads=True) for norm in (attention.q_norm, attention.k_norm)
            )
    else:
        _set_linear(spec.linear[0], [attention.q_proj])
        _set_linear(spec.linear[1], [attention.k_proj, attention.v_proj])
    _set_linear(spec.linear[-1], [attention.o_proj], _output_scale(block, sublayer, layer))


def _set_feed_forward(spec: Any, block: Any, layer: VariantConfig) -> None:
    network = block.mlp
    if layer.ffn_type == "glu":
        _set_linear(spec.linear_0, [network.gate_proj])
        _set_linear(spec.linear_0_noact, [network.up_proj])
    else:
        _set_linear(spec.linear_0, [network.up_proj])
    _set_linear(spec.linear_1, [network.down_proj], _output_scale(block, "mlp", layer))


def _branch_scale(block: nn.Module, sublayer: str) -> torch.Tensor | None:
    """What a branch is multiplied by before it is added: a scalar or (width,); `None` for nothing."""
    residual = getattr(block, f"{sublayer}_residual")
    if hasattr(residual, "scale"):
        return residual.scale.float()
    factor = getattr(residual.multiply_branch, "keywords", {}).get("factor")
    return None if factor is None else torch.tensor(factor, dtype=torch.float32)


def _output_scale(block: nn.Module, sublayer: str, layer: VariantConfig) -> torch.Tensor | None:
    """What the output projection takes up of it: all, unless a norm stands in between."""
    return None if layer.norm_placement == "sandwich" else _branch_scale(block, sublayer)


def _set_linear(spec: Any, layers: list[nn.Linear], scale: torch.Tensor | None = None) -> None:
    """Projections of one input, one below the other; their outputs times `scale`, in float32."""
    weight = torch.cat([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers]
    bias = None
    if any(bias is not None for bias in biases):
        bias = torch.cat(
            [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
        )
    if scale is not None:
        weight = weight.float() * scale.reshape(-1, 1)
        bias = None if bias is None else bias.float() * scale
    spec.weight = weight
    if bias is not None:
        spec.bias = bias


def _norm(module: nn.Module, layer: VariantConfig, of_heads: bool = False) -> Any:
    """A norm of the layer's kind, or of its queries and keys, with its weights."""
    kind = layer.qk_norm_type if of_heads else layer.norm_type
    spec = ctranslate2_package().specs.common_spec.LayerNormSpec(rms_norm=kind == "rmsnorm")
    _set_norm(spec, module, layer, of_heads=of_heads)
    return spec


def _set_norm(
    spec: Any, module: nn.Module, layer: VariantConfig, scale: torch.Tensor | None = None, of_heads: bool = False
) -> None:
    arguments = layer.qk_norm_arguments() if of_heads else layer.norm_arguments()
    is_rms = arguments["norm_type"] == "rmsnorm"
    width = layer.head_dim if of_heads else layer.hidden_size
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    weight = torch.ones(width) if weight is None else weight
    if arguments["unit_offset"]:
        if is_rms and scale is None:
            spec.layer_norm_use_residual = True
        else:
            weight = weight.float() + 1
    spec.gamma = weight if scale is None else weight.float() * scale
    if not is_rms:
        bias = torch.zeros_like(spec.gamma) if bias is None else bias
        spec.beta = bias if scale is None else bias.float() * scale


def _set_relative_bias(spec: Any, stack: PreTrainedModel) -> None:
    for layer in spec.layer:
        # (buckets, heads)
        layer.self_attention.relative_attention_bias = stack.position_bias.tables["0"].weight
        layer.self_attention.relative_attention_max_distance = np.int32(stack.config.relative_attention_max_distance)


# Head


def _set_head(spec: Any, model: PreTrainedModel, config: VariantConfig) -> None:
    head = model.get_output_embeddings()
    weight, bias = head.weight, head.bias
    if config.lm_head_normalized:
        weight = F.normalize(weight.float())
    scale = config.logit_scale
    if bias is not None and scale != 1.0:
        bias = bias.float() * scale
    if getattr(model.config, "final_logits_bias", False):
        final = model.final_logits_bias[0].float()
        bias = final if bias is None else bias.float() + final
    spec.projection.weight = weight
    if bias is not None:
        spec.projection.bias = bias
    if (scale := scale * config.lm_head_input_scale) != 1.0:
        spec.scale_outputs = np.float32(scale)
    if config.final_logit_softcapping is not None:
        spec.final_logit_softcapping = np.float32(config.final_logit_softcapping)
