"""torch.nn's own Transformer modules in and out: the 2017 architecture with the norm before or after, biases or not.

`torch.nn.TransformerEncoder`, `TransformerDecoder` and `Transformer` have no embeddings and no head; the variants that
`from_torch` gives are bare stacks too, to be called with `inputs_embeds`.
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_variants.model.configuration_variant import VariantConfig
from hf_variants.model.configuration_variant_seq2seq import VariantSeq2SeqConfig
from hf_variants.model.modeling_variant import VariantModel
from hf_variants.model.modeling_variant_seq2seq import VariantForConditionalGeneration, VariantSeq2SeqModel
from hf_variants.model.positions import sinusoidal_table

from .errors import ConversionError, NotRepresentable
from .rules import Rule, Split, plan, run
from .skeleton import empty_model


# The variant has a token embedding that the torch module lacks; it is a single row, never read.
NO_VOCABULARY = 1

ACTIVATIONS = {F.relu: "relu", F.gelu: "gelu"}


def _qkv(native: str, ours: str) -> tuple[Rule, ...]:
    """torch's packed q, k and v against three projections."""
    targets = tuple(f"{ours}.{name}_proj" for name in "qkv")
    return (
        *(
            Rule(
                f"{native}.in_proj_{leaf}",
                tuple(f"{target}.{leaf}" for target in targets),
                Split(lambda config: [config.hidden_size] * 3),
            )
            for leaf in ("weight", "bias")
        ),
        Rule(f"{native}.out_proj.{{leaf}}", f"{ours}.o_proj.{{leaf}}"),
    )


def _stack_rules(native: str, ours: str, cross: bool, slot: str) -> tuple[Rule, ...]:
    """The rules of one stack; `slot` is where its norms are."""
    layer, target = f"{native}layers.{{layer}}", f"{ours}layers.{{layer}}"
    sublayers = ("self_attn", "cross_attn", "mlp") if cross else ("self_attn", "mlp")
    rules = [
        *_qkv(f"{layer}.self_attn", f"{target}.self_attn"),
        Rule(f"{layer}.linear1.{{leaf}}", f"{target}.mlp.up_proj.{{leaf}}"),
        Rule(f"{layer}.linear2.{{leaf}}", f"{target}.mlp.down_proj.{{leaf}}"),
        Rule(f"{native}norm.{{leaf}}", f"{ours}norm.{{leaf}}"),
        *(
            Rule(f"{layer}.norm{number}.{{leaf}}", f"{target}.{sublayer}_{slot}.{{leaf}}")
            for number, sublayer in enumerate(sublayers, start=1)
        ),
    ]
    if cross:
        rules += _qkv(f"{layer}.multihead_attn", f"{target}.cross_attn")
    return tuple(rules)


def _rules(config: VariantConfig | VariantSeq2SeqConfig) -> tuple[Rule, ...]:
    if isinstance(config, VariantConfig):
        slot = "pre_norm" if config.norm_placement == "pre" else "post_norm"
        return _stack_rules("", "", cross=config.add_cross_attention, slot=slot)
    rules = []
    for stack in ("encoder", "decoder"):
        own = getattr(config, stack)
        slot = "pre_norm" if own.norm_placement == "pre" else "post_norm"
        rules += _stack_rules(f"{stack}.", f"{stack}.", cross=stack == "decoder", slot=slot)
    return tuple(rules)


def _layer_fields(state: Mapping[str, torch.Tensor], prefix: str) -> dict:
    """Sizes of a stack, read off its tensors."""
    layers = {int(name[len(prefix) :].split(".")[1]) for name in state if name.startswith(f"{prefix}layers.")}
    first = f"{prefix}layers.0."
    if not layers or f"{first}self_attn.in_proj_weight" not in state:
        raise ConversionError(
            f"The state dict has no {first}self_attn.in_proj_weight, so it is no torch.nn Transformer. "
            "Give the module itself, or the state dict of a TransformerEncoder, TransformerDecoder or Transformer."
        )
    up = state[f"{first}linear1.weight"]
    return {
        "hidden_size": up.shape[1],
        "intermediate_size": up.shape[0],
        "num_hidden_layers": max(layers) + 1,
        "attention_bias": f"{first}self_attn.in_proj_bias" in state,
        "mlp_bias": f"{first}linear1.bias" in state,
        "norm_bias": f"{first}norm1.bias" in state,
        "final_norm": f"{prefix}norm.weight" in state,
        "add_cross_attention": f"{first}multihead_attn.in_proj_weight" in state,
    }


def stack_config(
    state: Mapping[str, torch.Tensor],
    prefix: str = "",
    *,
    num_heads: int,
    norm_first: bool = False,
    activation: str = "relu",
    norm_eps: float = 1e-5,
    dropout: float = 0.0,
    is_causal: bool | None = None,
) -> VariantConfig:
    """
    The config of a stack of torch.nn layers.

    Args:
        state: a state dict; sizes and biases are read off it.
        prefix: of the stack's names, such as `"encoder."`.
        num_heads, norm_first, activation, norm_eps, dropout: what the tensors do not tell.
        is_causal: by default where the stack has cross-attention.
    """
    fields = _layer_fields(state, prefix)
    return VariantConfig(
        vocab_size=NO_VOCABULARY,
        num_attention_heads=num_heads,
        norm_type="layernorm",
        norm_eps=norm_eps,
        norm_placement="pre" if norm_first else "post",
        ffn_type="mlp",
        hidden_act=activation,
        position_embedding_type="none",
        attention_dropout=dropout,
        residual_dropout=dropout,
        activation_dropout=dropout,
        is_causal=fields["add_cross_attention"] if is_causal is None else is_causal,
        bos_token_id=None,
        eos_token_id=None,
        **fields,
    )


def _settings_of(layer: nn.Module) -> dict:
    """What the tensors of a layer do not tell."""
    activation = layer.activation
    name = ACTIVATIONS.get(activation) or {nn.ReLU: "relu", nn.GELU: "gelu"}.get(type(activation))
    if name is None:
        raise ConversionError(f"The activation {activation!r} is not known here. Use relu or gelu.")
    return {
        "num_heads": layer.self_attn.num_heads,
        "norm_first": layer.norm_first,
        "activation": name,
        "norm_eps": layer.norm1.eps,
        "dropout": layer.dropout.p,
    }


def from_torch(source: nn.Module | Mapping[str, torch.Tensor], **settings) -> PreTrainedModel:
    """
    A variant with the weights of a torch.nn Transformer module.

    Args:
        source: a `torch.nn.TransformerEncoder`, `TransformerDecoder` or `Transformer`, the state dict of one, or a
            single layer, which becomes a stack of one.
        settings: for a state dict, what it does not tell: `num_heads`, and where they differ from torch's defaults
            `norm_first`, `activation` (`"relu"`, `"gelu"`), `norm_eps` and `dropout`.

    Returns:
        a `VariantModel` (encoder or decoder) or a `VariantSeq2SeqModel`, in evaluation mode, to be called with
        `inputs_embeds` (batch, length, hidden_size).

    Raises:
        ConversionError: if it is another module, or tensors are missing.
    """
    if isinstance(source, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        state = {f"layers.0.{name}": tensor for name, tensor in source.state_dict().items()}
        settings = _settings_of(source)
    elif isinstance(source, nn.Module):
        layers = source.encoder.layers if isinstance(source, nn.Transformer) else getattr(source, "layers", None)
        if not isinstance(source, (nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder)):
            raise ConversionError(
                f"{type(source).__name__} is no torch.nn Transformer. "
                "Give a TransformerEncoder, TransformerDecoder or Transformer."
            )
        state, settings = source.state_dict(), _settings_of(layers[0])
    else:
        state = source
    if "num_heads" not in settings:
        raise ConversionError("A state dict does not tell the number of heads. Pass `num_heads`.")
    if any(name.startswith("encoder.") for name in state):
        config = VariantSeq2SeqConfig(
            encoder=stack_config(state, "encoder.", **settings),
            decoder=stack_config(state, "decoder.", **settings),
            share_embeddings=False,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        model_class: type[PreTrainedModel] = VariantSeq2SeqModel
    else:
        config = stack_config(state, **settings)
        model_class = VariantModel
    shapes = {name: tensor.shape for name, tensor in empty_model(model_class, config).state_dict().items()}
    embeddings = {
        name: torch.zeros(shape, dtype=next(iter(state.values())).dtype)
        for name, shape in shapes.items()
        if name.endswith("embed_tokens.weight")
    }
    wanted = {name: shape for name, shape in shapes.items() if name not in embeddings}
    tensors = dict(run(plan(_rules(config), state, wanted), state.__getitem__, config, wanted))
    dtype = next(iter(state.values())).dtype
    return model_class.from_pretrained(None, config=config, state_dict=tensors | embeddings, dtype=dtype).eval()


def _refuse_unlike(config: VariantConfig) -> None:
    """Name every field that torch's layers have no counterpart of."""
    expected = {
        "norm_type": ("layernorm",),
        "norm_placement": ("pre", "post"),
        "parallel_block": ("none",),
        "ffn_type": ("mlp",),
        "hidden_act": ("relu", "gelu"),
        "position_embedding_type": ("none", "learned", "sinusoidal"),
        "qk_norm": ("none",),
        "num_key_value_heads": (config.num_attention_heads,),
        "head_dim": (config.hidden_size // config.num_attention_heads,),
        "attn_logit_softcapping": (None,),
        "attention_sinks": (False,),
        "attention_gate": ("none",),
        "attention_scaling": (None, config.head_dim**-0.5),
        "clip_qkv": (None,),
        "sliding_window": (None,),
        "residual_multiplier": (1.0,),
        "learned_scale_type": ("none",),
        "norm_unit_offset": (False,),
        "mlp_output_bias": (config.mlp_bias,),
        "attention_output_bias": (config.attention_bias,),
        "ffn_sub_norm": (False,),
        "attention_sub_norm": (False,),
        "mlp_bias": (config.attention_bias,),
        "norm_bias": (config.attention_bias,),
    }
    fields = {
        name: (getattr(config, name), allowed[0])
        for name, allowed in expected.items()
        if getattr(config, name) not in allowed
    }
    if fields:
        raise NotRepresentable("torch.nn.Transformer", fields)


def _torch_stack(config: VariantConfig) -> nn.Module:
    _refuse_unlike(config)
    layer_class = nn.TransformerDecoderLayer if config.add_cross_attention else nn.TransformerEncoderLayer
    layer = layer_class(
        config.hidden_size,
        config.num_attention_heads,
        dim_feedforward=config.intermediate_size,
        dropout=config.residual_dropout,
        activation=config.hidden_act,
        layer_norm_eps=config.norm_eps,
        batch_first=True,
        norm_first=config.norm_placement == "pre",
        bias=config.attention_bias,
    )
    norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias) if config.final_norm else None
    if config.add_cross_attention:
        return nn.TransformerDecoder(layer, config.num_hidden_layers, norm)
    return nn.TransformerEncoder(layer, config.num_hidden_layers, norm, enable_nested_tensor=False)


def to_torch(model: PreTrainedModel) -> nn.Module:
    """
    The torch.nn module with the weights of a variant's stacks; embeddings, positions and heads stay behind.

    Args:
        model: a `VariantModel`, a `VariantSeq2SeqModel`, or one of them inside a head.

    Returns:
        a `TransformerEncoder`, `TransformerDecoder` or `Transformer` with `batch_first=True`, in evaluation mode.

    Raises:
        NotRepresentable: naming every field that torch's layers have no counterpart of.
    """
    inner = model.base_model
    config = inner.config
    if isinstance(config, VariantSeq2SeqConfig):
        encoder, decoder = _torch_stack(config.encoder), _torch_stack(config.decoder)
        module: nn.Module = nn.Transformer(
            config.encoder.hidden_size,
            config.encoder.num_attention_heads,
            custom_encoder=encoder,
            custom_decoder=decoder,
            batch_first=True,
        )
    else:
        module = _torch_stack(config)
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    state = inner.state_dict()
    beside = ("embed_tokens.", "embed_positions.", "embedding_norm.", "token_types.", "pooler.")
    names = [name for name in state if not any(part in name for part in beside)]
    steps = plan(_rules(config), names, shapes, to_native=True)
    module.load_state_dict(dict(run(steps, state.__getitem__, config, shapes, to_native=True)))
    return module.to(inner.dtype).eval()


def from_torch_seq2seq(
    state: Mapping[str, torch.Tensor],
    *,
    num_heads: int,
    transformer: str = "transformer.",
    embedding: str,
    output: str,
    sinusoids: str | None = None,
    embedding_multiplier: float | None = None,
    decoder_start_token_id: int,
    eos_token_id: int,
    pad_token_id: int,
    **settings,
) -> PreTrainedModel:
    """
    An encoder-decoder from the checkpoint of a model that is built around `torch.nn.Transformer`: one token embedding
    for both sides, sinusoidal positions, and an output projection.

    Args:
        state: the state dict.
        transformer: prefix of the `torch.nn.Transformer`'s names.
        embedding, output: name of the embedding's weight, and the output projection's name without its leaf.
        sinusoids: name of a stored table of sinusoids, (..., positions, width), which must hold the formula's values.
        embedding_multiplier: factor on the embeddings; by default sqrt(width), as in the paper.
        num_heads, settings: see `from_torch`.

    Returns:
        a `VariantForConditionalGeneration` in evaluation mode.

    Raises:
        ConversionError: for a tensor that is missing, left over, or not what it should be.
    """
    inner = {name.removeprefix(transformer): tensor for name, tensor in state.items() if name.startswith(transformer)}
    beside = {name for name in state if not name.startswith(transformer)}
    known = {embedding, f"{output}.weight", f"{output}.bias"} | ({sinusoids} if sinusoids else set())
    missing = sorted({embedding, f"{output}.weight"} - beside)
    if missing or beside - known:
        raise ConversionError(
            f"The state dict lacks {missing} and has {sorted(beside - known)} besides the Transformer. "
            "Name the embedding, the output projection and the table of sinusoids as they are called in it."
        )
    vocab_size, width = state[embedding].shape
    length = 2048
    if sinusoids is not None:
        stored = state[sinusoids].reshape(-1, width)
        length = stored.shape[0]
        expected = sinusoidal_table(length, width, "interleaved")
        # Tables are often computed in float32, whose error grows with the angle.
        if not torch.allclose(stored.float(), expected, atol=1e-6 * length):
            raise ConversionError(f"{sinusoids} does not hold the paper's sinusoids, so it cannot be computed anew.")
    fields = {
        "vocab_size": vocab_size,
        "max_position_embeddings": length,
        "position_embedding_type": "sinusoidal",
        "embedding_multiplier": width**0.5 if embedding_multiplier is None else embedding_multiplier,
        "pad_token_id": pad_token_id,
        "eos_token_id": eos_token_id,
        "lm_head_bias": f"{output}.bias" in state,
    }
    stacks = {
        stack: {**stack_config(inner, f"{stack}.", num_heads=num_heads, **settings).to_dict(), **fields}
        for stack in ("encoder", "decoder")
    }
    for stack in stacks.values():
        stack.pop("embedding_size")
    config = VariantSeq2SeqConfig(
        **stacks,
        share_embeddings=True,
        tie_word_embeddings=False,
        bos_token_id=decoder_start_token_id,
        decoder_start_token_id=decoder_start_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    target = empty_model(VariantForConditionalGeneration, config)
    names = [name for name in target.model.state_dict() if not name.endswith("embed_tokens.weight")]
    shapes = {name: tensor.shape for name, tensor in target.model.state_dict().items() if name in names}
    tensors = {
        f"model.{name}": tensor
        for name, tensor in run(plan(_rules(config), inner, shapes), inner.__getitem__, config, shapes)
    }
    tensors["model.decoder.embed_tokens.weight"] = state[embedding].clone()
    tensors |= {
        f"lm_head.{leaf}": state[f"{output}.{leaf}"].clone()
        for leaf in ("weight", "bias")
        if f"{output}.{leaf}" in state
    }
    dtype = state[embedding].dtype
    return VariantForConditionalGeneration.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype).eval()
