"""What stands where in a variant, as a drawing shows it: boxes for the modules that its config has built."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .model.builder import language_head_parts, stack_parts
from .model.normalization import NORM_KINDS
from .model.part import Part


# The usual names of gated networks, by their activation (https://arxiv.org/abs/2002.05202).
GATED_NAMES = {"silu": "SwiGLU", "swish": "SwiGLU", "gelu": "GeGLU", "relu": "ReGLU", "sigmoid": "GLU"}
SUBLAYER_NAMES = {"self_attn": "self-attention", "cross_attn": "cross-attention", "mlp": "feed-forward"}
SLOTS = ("pre_norm", "branch_norm", "post_norm")


@dataclass(frozen=True)
class Box:
    """
    One module.

    Attributes:
        kind: `"embedding"`, `"added"` (to the embeddings), `"norm"`, `"attention"`, `"feed_forward"`, `"projection"`,
            `"scale"` or `"head"`.
        path: its name in the layer, the stack or the model.
        lines: what is written in it, the name first.
    """

    kind: str
    path: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Branch:
    """
    A sublayer with what surrounds it.

    Attributes:
        name: `"self_attn"`, `"cross_attn"` or `"mlp"`.
        sublayer: itself.
        pre_norm, branch_norm, post_norm: the norms in its slots, as in `model.block`, or `None`.
        scale: what multiplies the branch before it is added, or `None`.
        residual_scale: what multiplies the residual, or `None`.
    """

    name: str
    sublayer: Box
    pre_norm: Box | None
    branch_norm: Box | None
    post_norm: Box | None
    scale: Box | None
    residual_scale: str | None


@dataclass(frozen=True)
class Layer:
    """
    One block.

    Attributes:
        branches: in the order in which they run.
        parallel: they read one input, and their outputs are added together; or each reads what the one before left.
        shared_norm: of parallel branches, that the first one's `pre_norm` serves all.
        residual_from_norm: the residual starts behind the `pre_norm`.
    """

    branches: tuple[Branch, ...]
    parallel: bool
    shared_norm: bool
    residual_from_norm: bool


@dataclass(frozen=True)
class Stack:
    """
    An encoder or a decoder.

    Attributes:
        name: `"encoder"`, `"decoder"`, or empty where there is one stack.
        below: boxes from the token ids to the first layer.
        layers: all of them.
        above: boxes behind the last layer, a head's included.
        output: what leaves the last box; empty where another stack reads it.
    """

    name: str
    below: tuple[Box, ...]
    layers: tuple[Layer, ...]
    above: tuple[Box, ...]
    output: str

    @property
    def usual(self) -> Layer:
        """The block that most layers are, or the first of equally many."""
        return Counter(self.layers).most_common(1)[0][0]

    @property
    def exceptions(self) -> list[str]:
        """A sentence for every other kind of layer."""
        groups: dict[str, list[int]] = {}
        for index, layer in enumerate(self.layers):
            if layer != self.usual:
                groups.setdefault(_difference(layer, self.usual), []).append(index)
        return [f"{_enumerated(indices)}: {difference}." for difference, indices in groups.items()]


def stacks_of(config: Any, class_name: str | None = None) -> list[Stack]:
    """
    The stacks of a config: one, or an encoder and the decoder that reads it.

    Args:
        config: a `VariantConfig` or `VariantSeq2SeqConfig`.
        class_name: of the model; by default the one with a language-modelling head.
    """
    if config.is_encoder_decoder:
        head = _head(config.decoder, class_name or "VariantForConditionalGeneration", config)
        return [_stack("encoder", config.encoder, (), ""), _stack("decoder", config.decoder, *head)]
    default = "VariantForCausalLM" if config.is_causal else "VariantForMaskedLM"
    return [_stack("", config, *_head(config, class_name or default, config))]


def layer_of(config: Any, layer_idx: int, block: Part, of_all: tuple[str, ...]) -> Layer:
    """One layer, whose structure is `block`; `of_all` is said of the self-attention of every layer."""
    layer = config.per_layer_config[layer_idx]
    modules = block.children()
    lines: dict[str, Callable] = {
        "self_attn": lambda: (*_self_attention(config, layer), *of_all),
        "cross_attn": lambda: ("Cross-attention", *_attention(layer, is_rotated=False)),
        "mlp": lambda: _feed_forward(layer),
    }
    branches = []
    for name in (name for name in SUBLAYER_NAMES if name in modules):
        paths = {slot: f"{name}_{slot}" for slot in SLOTS}
        norms = {
            slot: Box("norm", path, (norm_name(layer),)) if path in modules else None for slot, path in paths.items()
        }
        branches.append(
            Branch(
                name,
                Box("feed_forward" if name == "mlp" else "attention", name, lines[name]()),
                **norms,
                scale=_branch_scale(f"{name}_residual", modules[f"{name}_residual"]),
                residual_scale=_residual_scale(modules[f"{name}_residual"]),
            )
        )
    return Layer(
        tuple(branches),
        parallel="shared_norm" in block.arguments,
        shared_norm=block.arguments.get("shared_norm", False),
        residual_from_norm=block.arguments.get("residual_from_norm", False),
    )


def norm_name(config: Any) -> str:
    """What norms of a config are called."""
    name = NORM_KINDS[config.norm_type].name
    if not config.norm_affine:
        return f"{name} without weight"
    if NORM_KINDS[config.norm_type].has_bias and not config.norm_bias:
        name += " without bias"
    return f"{name} (1 + w)" if config.norm_unit_offset else name


def _branch_scale(path: str, residual: Part) -> Box | None:
    if "shape" in residual.arguments:
        return Box("scale", path, ("LayerScale" if residual.arguments["shape"] else "learned scale",))
    multiplier = residual.arguments["branch_multiplier"]
    return None if multiplier == 1.0 else Box("scale", path, (_times(multiplier),))


def _residual_scale(residual: Part) -> str | None:
    scale = residual.arguments.get("residual_scale", 1.0)
    return None if scale == 1.0 else _times(scale)


def _self_attention(config: Any, layer: Any) -> tuple[str, ...]:
    kind = "Causal self-attention" if config.is_causal else "Bidirectional self-attention"
    return (kind, *_attention(layer))


def _attention(layer: Any, is_rotated: bool = True) -> tuple[str, ...]:
    """What self- and cross-attention have in common, one thing a line."""
    heads = f"{layer.num_attention_heads} heads × {layer.head_dim}"
    if layer.num_key_value_heads != layer.num_attention_heads:
        heads += f", {layer.num_key_value_heads} key/value head{'s' if layer.num_key_value_heads > 1 else ''}"
    lines = [heads]
    if layer.qk_norm != "none":
        where = {"head": "in each head", "per_head": "of each head's own", "full": "over all heads"}[layer.qk_norm]
        after = ", after RoPE" if layer.qk_norm_after_rope and is_rotated else ""
        lines.append(f"q/k {NORM_KINDS[layer.qk_norm_type].name} {where}{after}")
    if layer.attention_scaling is not None and layer.attention_scaling != layer.head_dim**-0.5:
        lines.append(f"scores {_times(layer.attention_scaling)}")
    if layer.scale_attn_by_inverse_layer_idx:
        lines.append("scores / number of the layer")
    if layer.attn_logit_softcapping is not None:
        lines.append(f"scores capped at {_number(layer.attn_logit_softcapping)}")
    if layer.attention_sinks:
        lines.append("a sink per head")
    if layer.clip_qkv is not None:
        lines.append(f"q, k, v clipped at {_number(layer.clip_qkv)}")
    if layer.attention_gate != "none":
        lines.append(f"{layer.attention_gate} gate")
    if layer.attention_sub_norm:
        lines.append(f"{NORM_KINDS[layer.norm_type].name} before the output")
    biased = [*("q, k, v",) * layer.attention_bias, *("output",) * layer.attention_output_bias]
    if biased:
        lines.append(f"biases: {', '.join(biased)}")
    return tuple(lines)


def _positions(config: Any) -> list[str]:
    """How self-attention knows positions, of the stack as a whole."""
    kind = config.position_embedding_type
    if kind == "alibi":
        return ["ALiBi"]
    if kind == "relative_bias":
        shared = " in every layer" if config.relative_attention_per_layer else ""
        return [f"relative position bias{shared}"]
    if kind != "rope":
        return []
    entries = [config.rope_parameters_of(index) for index in range(config.num_hidden_layers)]
    rotated = [entry for entry in entries if entry is not None]
    if not rotated:
        return []
    bases = dict.fromkeys(_number(entry["rope_theta"]) for entry in rotated)
    lines = [f"RoPE, base {' or '.join(bases)}"]
    kinds = [kind for kind in dict.fromkeys(entry["rope_type"] for entry in rotated) if kind != "default"]
    parts = dict.fromkeys(entry.get("partial_rotary_factor") or 1.0 for entry in rotated)
    details = [*kinds, *(f"{part:.0%} of the channels" for part in parts if part != 1.0)]
    if config.rope_interleaved:
        details.append("interleaved")
    if len(rotated) < len(entries):
        details.append(f"in {len(rotated)} of {len(entries)} layers")
    if details:
        lines.append(", ".join(details))
    return lines


def _windows(config: Any) -> list[str]:
    sliding = config.layer_types.count("sliding_attention")
    if not sliding:
        return []
    some = "" if sliding == len(config.layer_types) else f" in {sliding} of {len(config.layer_types)} layers"
    return [f"sliding window {config.sliding_window:,}{some}"]


def _feed_forward(layer: Any) -> tuple[str, ...]:
    act = layer.hidden_act
    if layer.ffn_type == "glu":
        usual = next((name for key, name in GATED_NAMES.items() if act == key or act.startswith(f"{key}_")), None)
        kind = f"gated, {act}" if usual is None else f"{usual} ({act})"
    else:
        kind = act
    lines = ["Feed-forward", kind, f"{layer.hidden_size:,} → {layer.intermediate_size:,} → {layer.hidden_size:,}"]
    if layer.ffn_sub_norm:
        lines.append(f"{NORM_KINDS[layer.norm_type].name} before the output")
    biased = [*("inner",) * layer.mlp_bias, *("output",) * layer.mlp_output_bias]
    if biased:
        lines.append(f"biases: {', '.join(biased)}")
    return tuple(lines)


def _stack(name: str, config: Any, head: tuple[Box, ...], output: str) -> Stack:
    parts = stack_parts(config)
    blocks = parts["layers"].arguments["modules"]
    of_all = (*_positions(config), *_windows(config))
    return Stack(
        name,
        below=tuple(_embeddings(config, parts)),
        layers=tuple(layer_of(config, index, block, of_all) for index, block in enumerate(blocks)),
        above=(*_boxes(parts, config, ("norm", "output_projection")), *head),
        output=output,
    )


def _embeddings(config: Any, parts: dict[str, Any]) -> list[Box]:
    """In the order of `VariantModel.forward`."""
    boxes = []
    lines = ["Token embedding", f"{config.vocab_size:,} × {config.embedding_size:,}"]
    in_stack = config.embedding_multiplier_position == "stack"
    is_multiplied = config.embedding_multiplier != 1.0
    if is_multiplied and not in_stack:
        lines.append(_times(config.embedding_multiplier))
    boxes.append(Box("embedding", "embed_tokens", tuple(lines)))
    if is_multiplied and in_stack:
        boxes.append(Box("scale", "multiply_embeddings", (_times(config.embedding_multiplier),)))
    names = ("token_projection", "token_norm", "token_types", "embed_positions", "task_types", "embedding_norm",
             "embedding_projection")  # fmt: skip
    return boxes + _boxes(parts, config, names)


def _boxes(parts: dict[str, Any], config: Any, names: tuple[str, ...]) -> list[Box]:
    """Of what a stack has of these names, beside its layers."""
    boxes = []
    for name in names:
        part = parts[name]
        # What adds nothing has no arguments, and what is no part is a function that changes nothing.
        if not isinstance(part, Part) or not part.arguments:
            continue
        given = part.arguments
        if "norm" in name:
            boxes.append(Box("norm", name, (norm_name(config),)))
        elif "projection" in name:
            line = f"Projection {given['in_features']:,} → {given['out_features']:,}"
            boxes.append(Box("projection", name, (line,)))
        elif name == "embed_positions":
            kind = config.position_embedding_type.capitalize()
            boxes.append(Box("added", name, (f"{kind} positions", f"{given['num_positions']:,}")))
        else:
            boxes.append(Box("added", name, (f"{given['num_embeddings']} {name.replace('_', ' ')}",)))
    return boxes


def _head(stack: Any, class_name: str, config: Any) -> tuple[tuple[Box, ...], str]:
    """The boxes of a model's head and what it gives; `stack` is the one it stands on, `config` the whole."""
    heads: dict[str, Callable] = {
        "VariantForSequenceClassification": _sequence_classifier,
        "VariantForMultipleChoice": _choice_classifier,
        "VariantForNextSentencePrediction": _next_sentence,
        "VariantForTokenClassification": _token_classifier,
        "VariantForQuestionAnswering": _span_classifier,
    }
    heads |= {name.replace("Variant", "VariantSeq2Seq"): boxes for name, boxes in heads.items()}
    if class_name in ("VariantForCausalLM", "VariantForMaskedLM", "VariantForConditionalGeneration"):
        return tuple(_language_model(stack, config)), "logits"
    if class_name in heads:
        return heads[class_name](stack), "logits"
    pooler = (Box("head", "pooler", ("Pooler", "first token, tanh")),) if stack.has_pooler("base") else ()
    return pooler, "hidden states"


def _language_model(stack: Any, config: Any) -> list[Box]:
    parts = language_head_parts(stack)
    boxes = []
    if stack.lm_head_transform:
        dense = parts["lm_head_transform"].arguments["dense"].arguments
        widths = f"{dense['in_features']:,} → {dense['out_features']:,}, {stack.lm_head_transform_act}"
        boxes.append(Box("head", "lm_head_transform", ("Dense", widths, norm_name(stack))))
    elif stack.lm_head_input_scale != 1.0:
        boxes.append(Box("scale", "lm_head_transform", (_times(stack.lm_head_input_scale),)))
    head = parts["lm_head"].arguments
    lines = ["LM head", f"{head['in_features']:,} → {head['out_features']:,}"]
    if config.tie_word_embeddings:
        lines.append("tied to the token embedding")
    if stack.lm_head_normalized:
        lines.append("rows of length 1")
    if stack.lm_head_bias:
        lines.append("bias")
    boxes.append(Box("head", "lm_head", tuple(lines)))
    scaling = [_times(stack.logit_scale)] if stack.logit_scale != 1.0 else []
    if stack.final_logit_softcapping is not None:
        scaling.append(f"capped at {_number(stack.final_logit_softcapping)}")
    if scaling:
        boxes.append(Box("scale", "logit_scaling", (", ".join(scaling),)))
    return boxes


def _sequence_classifier(stack: Any) -> tuple[Box, ...]:
    return (
        _pooled(stack, "classifier", stack.classifier_pooling),
        *_classifier_transform(stack, stack.classifier_transform),
        _classifier(stack, "score"),
    )


def _choice_classifier(stack: Any) -> tuple[Box, ...]:
    return (
        _pooled(stack, "choices", stack.choice_pooling),
        *_classifier_transform(stack, stack.choice_transform, stack.choice_transform_act),
        _classifier(stack, "score", "1"),
    )


def _next_sentence(stack: Any) -> tuple[Box, ...]:
    return _pooled(stack, "classifier", stack.classifier_pooling), _classifier(stack, "score", "2")


def _pooled(stack: Any, role: str, pooling: str) -> Box:
    if stack.has_pooler(role):
        return Box("head", "pooler", ("Pooler", "first token, tanh"))
    return Box("head", "pool", (f"Pooling: {pooling.replace('_', ' ')}",))


def _token_classifier(stack: Any) -> tuple[Box, ...]:
    has_transform = stack.classifier_transform and stack.classifier_transform_on_tokens
    return (*_classifier_transform(stack, has_transform), _classifier(stack, "score"))


def _span_classifier(stack: Any) -> tuple[Box, ...]:
    has_transform = stack.classifier_transform and stack.classifier_transform_on_tokens
    return (*_classifier_transform(stack, has_transform), _classifier(stack, "qa_outputs"))


def _classifier_transform(stack: Any, is_present: bool, act: str | None = None) -> list[Box]:
    if not is_present:
        return []
    lines = ["Dense", act or stack.classifier_transform_act]
    if stack.classifier_transform_norm:
        lines.append(norm_name(stack))
    return [Box("head", "pre_classifier", tuple(lines))]


def _classifier(stack: Any, path: str, outputs: str = "") -> Box:
    width = stack.embedding_size if stack.output_projection else stack.hidden_size
    outputs = outputs or ("start and end" if path == "qa_outputs" else f"{stack.num_labels}")
    return Box("head", path, ("Classifier", f"{width:,} → {outputs}"))


def _difference(layer: Layer, usual: Layer) -> str:
    """What one layer has otherwise than most, in words."""
    ours, theirs = ({branch.name: branch for branch in each.branches} for each in (layer, usual))
    phrases = [f"no {SUBLAYER_NAMES[name]}" for name in theirs if name not in ours]
    phrases += [f"{SUBLAYER_NAMES[name]} as well" for name in ours if name not in theirs]
    if layer.parallel != usual.parallel:
        phrases.append("sublayers side by side" if layer.parallel else "sublayers one after the other")
    elif layer.shared_norm != usual.shared_norm:
        phrases.append("one norm for all sublayers" if layer.shared_norm else "a norm for each sublayer")
    if layer.residual_from_norm != usual.residual_from_norm:
        phrases.append(f"the residual starts {'behind' if layer.residual_from_norm else 'before'} the norm")
    for name in (name for name in ours if name in theirs):
        mine, other = ours[name], theirs[name]
        for slot, where in zip(SLOTS, ("before", "behind", "behind the sum of")):
            if (getattr(mine, slot) is None) != (getattr(other, slot) is None):
                phrases.append(f"{'no' if getattr(mine, slot) is None else 'a'} norm {where} {SUBLAYER_NAMES[name]}")
        if mine.sublayer != other.sublayer:
            added = [line for line in mine.sublayer.lines if line not in other.sublayer.lines]
            removed = [f"not {line}" for line in other.sublayer.lines if line not in mine.sublayer.lines]
            phrases.append(f"{SUBLAYER_NAMES[name]}: {', '.join(added or removed)}")
        if mine.scale != other.scale or mine.residual_scale != other.residual_scale:
            scales = [scale.lines[0] for scale in (mine.scale,) if scale is not None]
            scales += [f"residual {mine.residual_scale}"] if mine.residual_scale else []
            phrases.append(f"{SUBLAYER_NAMES[name]} is added {' and '.join(scales) or 'as it is'}")
    return "; ".join(phrases) or "arranged otherwise"


def _enumerated(indices: list[int]) -> str:
    """Layer 3; layers 0, 4 to 7."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    parts = [", ".join(map(str, run)) if len(run) < 3 else f"{run[0]} to {run[-1]}" for run in runs]
    return f"Layer{'s' if len(indices) > 1 else ''} {', '.join(parts)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def _times(value: float) -> str:
    return f"× {_number(value)}"
