"""The drawing shows what is built, module by module; and it is a well-formed picture in which nothing overlaps."""

import itertools
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given

from hf_variants import (
    VariantConfig,
    VariantForCausalLM,
    VariantForConditionalGeneration,
    VariantForMaskedLM,
    VariantForMultipleChoice,
    VariantForNextSentencePrediction,
    VariantForQuestionAnswering,
    VariantForSequenceClassification,
    VariantForTokenClassification,
    VariantModel,
    VariantSeq2SeqConfig,
    VariantSeq2SeqModel,
)
from hf_variants.diagram import SLOTS, Box, Branch, Stack, stacks_of
from hf_variants.drawing import FRAME, _Canvas, block_svg
from hf_variants.model.block import LearnedScaleResidual, ParallelBlock
from hf_variants.model.embedding import NoTokenTypes
from hf_variants.model.normalization import unchanged
from hf_variants.model.positions import NoPositions
from hf_variants.presets import PRESETS
from tests.strategies import variant_fields


SVG = "{http://www.w3.org/2000/svg}"
SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0}
SUBLAYERS = ("self_attn", "cross_attn", "mlp")
# Modules of a stack that a config may leave out, and of the models around it.
STACK_PATHS = (
    "multiply_embeddings", "token_projection", "token_norm", "token_types", "embed_positions", "task_types",
    "embedding_norm", "embedding_projection", "norm", "output_projection",
)  # fmt: skip


def build(model_class, config):
    with torch.device("meta"):
        return model_class(config)


def is_there(module) -> bool:
    """Whether a slot holds anything."""
    return module is not None and module is not unchanged and not isinstance(module, (NoTokenTypes, NoPositions))


def is_norm_of(module, box: Box) -> bool:
    return box.kind == "norm" and box.lines[0].split()[0] in type(module).__name__


def check_branch(branch: Branch, layer) -> None:
    for slot in SLOTS:
        # A block with a shared norm has no slot of that name at all.
        module, box = getattr(layer, f"{branch.name}_{slot}", unchanged), getattr(branch, slot)
        assert is_there(module) == (box is not None), f"{branch.name}_{slot}"
        if box is not None:
            assert box.path == f"{branch.name}_{slot}"
            assert is_norm_of(module, box)
            weight = getattr(module, "weight", None)
            assert ("without weight" in box.lines[0]) == (weight is None)
    residual = getattr(layer, f"{branch.name}_residual")
    is_scaled = isinstance(residual, LearnedScaleResidual) or residual.multiply_branch is not unchanged
    assert is_scaled == (branch.scale is not None)
    assert (residual.scale_residual is not unchanged) == (branch.residual_scale is not None)
    if residual.scale_residual is not unchanged:
        assert f"{residual.scale_residual.keywords['factor']:.4g}" in branch.residual_scale
    sublayer = getattr(layer, branch.name)
    lines = branch.sublayer.lines
    if branch.name == "mlp":
        inner, outer = sublayer.up_proj.weight.shape
        assert f"{outer:,} → {inner:,} → {outer:,}" in lines
        assert ("inner" in lines[-1]) == (sublayer.up_proj.bias is not None)
    else:
        heads, kv_heads = (
            projection.out_features // sublayer.head_dim for projection in (sublayer.q_proj, sublayer.k_proj)
        )
        assert lines[1].startswith(f"{heads} heads × {sublayer.head_dim}")
        assert ("key/value" in lines[1]) == (heads != kv_heads)
        assert lines[0].startswith("Causal") == sublayer.is_causal
        assert any("q/k" in line for line in lines) == is_there(sublayer.q_norm)
        assert any("capped" in line for line in lines) == ("softcap" in sublayer.score_options)
        assert any("sink" in line for line in lines) == sublayer.has_sinks
        assert any("gate" in line for line in lines) == hasattr(sublayer, "g_proj")
    assert any("before the output" in line for line in lines) == is_there(sublayer.sub_norm)


def check_stack(stack: Stack, module: VariantModel) -> None:
    for drawn, layer in zip(stack.layers, module.layers, strict=True):
        assert [branch.name for branch in drawn.branches] == [name for name in SUBLAYERS if hasattr(layer, name)]
        assert drawn.parallel == isinstance(layer, ParallelBlock)
        assert drawn.shared_norm == (drawn.parallel and layer.shared_norm)
        assert drawn.residual_from_norm == layer.residual_from_norm
        for branch in drawn.branches:
            check_branch(branch, layer)
    boxes = {box.path: box for box in (*stack.below, *stack.above)}
    assert "embed_tokens" in boxes
    for path in STACK_PATHS:
        assert is_there(getattr(module, path)) == (path in boxes), path
        if path in boxes and boxes[path].kind == "norm":
            assert is_norm_of(getattr(module, path), boxes[path])
    # Below, the order of the forward pass; above, that of the model.
    below = [path for path in STACK_PATHS if path in boxes][: len(stack.below) - 1]
    assert [box.path for box in stack.below] == ["embed_tokens", *below]
    has_windows = "sliding_attention" in module.layer_types
    for branch in (branch for layer in stack.layers for branch in layer.branches if branch.name == "self_attn"):
        assert any("sliding window" in line for line in branch.sublayer.lines) == has_windows


def check_head(stack: Stack, model) -> None:
    head = {box.path: box for box in stack.above if box.path not in STACK_PATHS}
    for path in ("lm_head_transform", "lm_head", "pre_classifier", "score", "qa_outputs"):
        assert is_there(getattr(model, path, None)) == (path in head), path
    scaling = getattr(model, "logit_scaling", None)
    has_scaling = scaling is not None and (scaling.is_scaled or scaling.softcap is not None)
    assert has_scaling == ("logit_scaling" in head)
    last = getattr(model, "lm_head", None) or getattr(model, "score", None)
    if last is not None:
        path = "lm_head" if hasattr(model, "lm_head") else "score"
        assert f"{last.in_features:,} → {last.out_features:,}" in head[path].lines
        assert ("bias" in head[path].lines) == (last.bias is not None and path == "lm_head")


def check_picture(config, class_name=None) -> None:
    """Boxes apart from each other and inside the picture, their text inside them, all of the diagram there."""
    root = ElementTree.fromstring(block_svg(config, class_name))
    assert root.tag == f"{SVG}svg"
    assert not any("href" in name for element in root.iter() for name in element.attrib)
    stacks = stacks_of(config, class_name)
    expected = []
    for stack in stacks:
        branches = stack.usual.branches
        boxes = [box for b in branches for box in (b.sublayer, b.scale, *(getattr(b, slot) for slot in SLOTS)) if box]
        expected += [box.path for box in (*stack.below, *boxes, *stack.above)]
    groups = [group for group in root.iter(f"{SVG}g") if "data-path" in group.attrib]
    assert sorted(group.get("data-path") for group in groups) == sorted(expected)
    width, height = (float(root.get(name)) for name in ("width", "height"))
    rectangles = []
    for group in groups:
        rectangle = group.find(f"{SVG}rect")
        x, y, w, h = (float(rectangle.get(name)) for name in ("x", "y", "width", "height"))
        rectangles.append((x, y, x + w, y + h))
        for text in group.iter(f"{SVG}text"):
            assert len(text.text) * 6.5 <= w
            assert y < float(text.get("y")) < y + h
    frames = [frame for frame in root.iter(f"{SVG}rect") if frame.get("class") == "frame"]
    assert len(frames) == len(stacks)
    for left, top, right, bottom in rectangles:
        assert left >= 0
        assert top >= 0
        assert right <= width
        assert bottom <= height
    for one, other in itertools.combinations(rectangles, 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, (one, other)
    for frame in frames:
        x, y, w, h = (float(frame.get(name)) for name in ("x", "y", "width", "height"))
        for left, top, right, bottom in rectangles:
            inside = x < left and right < x + w and y < top and bottom < y + h
            outside = bottom <= y or y + h <= top or right <= x or x + w <= left
            assert inside or outside


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_drawn_as_they_are_built(name):
    config = VariantConfig.from_preset(name, **SIZES)
    model = build(VariantForCausalLM, config)
    (stack,) = stacks_of(config)
    check_stack(stack, model.model)
    check_head(stack, model)
    check_picture(VariantConfig.from_preset(name))


@given(fields=variant_fields())
def test_any_decoder_is_drawn_as_it_is_built(fields):
    config = VariantConfig(**fields)
    model = build(VariantForCausalLM, config)
    (stack,) = stacks_of(config)
    check_stack(stack, model.model)
    check_head(stack, model)
    check_picture(config)


PLACEMENTS = [
    {"norm_placement": placement, "first_layer_pre_norm": first}
    for placement in ("pre", "post", "branch", "sandwich", "deepnorm")
    for first in ((True, False) if placement in ("pre", "sandwich") else (True,))
]


@pytest.mark.parametrize("fields", PLACEMENTS, ids=lambda fields: "-".join(map(str, fields.values())))
@pytest.mark.parametrize(
    "decoder", [{}, {"parallel_block": "two_norms"}, {"parallel_block": "shared_norm", "norm_placement": "sandwich"}]
)
def test_both_stacks_of_an_encoder_decoder(fields, decoder):
    embeddings = {"position_embedding_type": "learned", "type_vocab_size": 2, "embedding_norm": True}
    decoder = {"norm_placement": "pre", **SIZES, **decoder} if decoder else {**SIZES, **fields}
    config = VariantSeq2SeqConfig(encoder={**SIZES, **fields, **embeddings}, decoder=decoder)
    model = build(VariantForConditionalGeneration, config)
    encoder, drawn_decoder = stacks_of(config)
    check_stack(encoder, model.model.encoder)
    check_stack(drawn_decoder, model.model.decoder)
    check_head(drawn_decoder, model)
    check_picture(config)
    root = ElementTree.fromstring(block_svg(config))
    cross = next(group for group in root.iter(f"{SVG}g") if group.get("data-path") == "cross_attn").find(f"{SVG}rect")
    edge = float(cross.get("x"))
    ends = [path.get("d").split(" L")[-1].split() for path in root.iter(f"{SVG}path") if path.get("marker-end")]
    # One arrow, the encoder's states, ends at the side of the cross-attention.
    assert (
        sum(float(x) == edge and 0 < float(y) - float(cross.get("y")) < float(cross.get("height")) for x, y in ends)
        == 1
    )


HEADS = {
    VariantForMaskedLM: {"is_causal": False, "lm_head_transform": True, "type_vocab_size": 2, "norm_type": "layernorm"},
    VariantForSequenceClassification: {"is_causal": False, "pooler": True},
    VariantForTokenClassification: {
        "is_causal": False, "classifier_transform": True, "classifier_transform_on_tokens": True,
    },
    VariantForQuestionAnswering: {"is_causal": False, "classifier_transform": True},
    VariantForMultipleChoice: {"is_causal": False, "choice_transform": True, "choice_transform_act": "gelu"},
    VariantForNextSentencePrediction: {"is_causal": False, "classifier_transform": True},
    VariantModel: {"is_causal": False, "pooler": True},
}  # fmt: skip


@pytest.mark.parametrize("model_class", HEADS, ids=lambda kind: kind.__name__)
def test_heads(model_class):
    config = VariantConfig(**SIZES, **HEADS[model_class])
    model = build(model_class, config)
    (stack,) = stacks_of(config, model_class.__name__)
    check_stack(stack, model if model_class is VariantModel else model.model)
    check_head(stack, model)
    check_picture(config, model_class.__name__)
    paths = [box.path for box in stack.above]
    assert ("pooler" in paths) == (config.pooler and model_class in (VariantModel, VariantForSequenceClassification))


def test_an_encoder_decoder_without_a_head_ends_in_hidden_states():
    config = VariantSeq2SeqConfig(encoder=SIZES, decoder=SIZES)
    _, decoder = stacks_of(config, VariantSeq2SeqModel.__name__)
    assert decoder.output == "hidden states"
    assert [box.path for box in decoder.above] == ["norm"]


def test_layers_that_differ_are_noted():
    layers = {0: {"skip": ["mlp"]}, 3: {"num_key_value_heads": 1}, 4: {"num_key_value_heads": 1}}
    config = VariantConfig(**{**SIZES, "num_hidden_layers": 6}, per_layer_config=layers, norm_placement="sandwich")
    (stack,) = stacks_of(config)
    assert stack.usual == stack.layers[1]
    assert stack.exceptions == [
        "Layer 0: no feed-forward.",
        "Layers 3, 4: self-attention: 4 heads × 8, 1 key/value head.",
    ]
    texts = [text.text for text in ElementTree.fromstring(block_svg(config)).iter(f"{SVG}text")]
    # A long sentence takes several lines.
    assert " ".join(texts).endswith(" ".join(stack.exceptions))
    assert "× 6" in texts


def test_many_kinds_of_layers_are_counted():
    layers = {index: {"intermediate_size": 16 + index} for index in range(12)}
    config = VariantConfig(**{**SIZES, "num_hidden_layers": 12}, per_layer_config=layers)
    texts = [text.text for text in ElementTree.fromstring(block_svg(config)).iter(f"{SVG}text")]
    assert texts[-1] == "6 more kinds of layers."
    assert texts[-2] == "Layer 5: feed-forward: 32 → 21 → 32."


def test_the_first_layer_without_its_norm_is_noted():
    (stack,) = stacks_of(VariantConfig(**SIZES, first_layer_pre_norm=False))
    assert stack.exceptions == ["Layer 0: no norm before self-attention."]


def test_multipliers_and_caps_are_shown():
    config = VariantConfig(
        **SIZES, residual_multiplier=0.22, embedding_multiplier=12.0, logit_scale=0.125, final_logit_softcapping=30.0,
        attn_logit_softcapping=50.0, layer_types="SF", sliding_window=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    text = "\n".join(text.text for text in ElementTree.fromstring(block_svg(config)).iter(f"{SVG}text"))
    for shown in (
        "× 0.22", "× 12", "× 0.125, capped at 30", "scores capped at 50", "sliding window 1,024 in 2 of 3 layers",
        "RoPE, base 500,000", "50% of the channels",
    ):  # fmt: skip
        assert shown in text


def test_deepnorm_writes_alpha_on_the_residual():
    config = VariantConfig(**SIZES, norm_placement="deepnorm", deepnorm_alpha=2.5)
    root = ElementTree.fromstring(block_svg(config))
    assert [text.text for text in root.iter(f"{SVG}text")].count("× 2.5") == 2


def test_text_is_escaped():
    canvas = _Canvas()
    canvas.box(Box("norm", 'a"b', ("<w> & 'x'",)), 0, FRAME)
    root = ElementTree.fromstring(canvas.to_svg("a < b", ["1 < 2 & 3"]))
    assert root.find(f"{SVG}title").text == "a < b"
    assert next(root.iter(f"{SVG}g")).get("data-path") == 'a"b'
    assert [text.text for text in root.iter(f"{SVG}text")] == ["<w> & 'x'", "1 < 2 & 3"]


def test_light_and_dark_differ_in_colours_alone():
    style = next(ElementTree.fromstring(block_svg(VariantConfig(**SIZES))).iter(f"{SVG}style")).text
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    for kind in ("text", ".ground", ".line", ".norm", ".attention", ".feed_forward", ".head"):
        assert kind in light
        assert kind in dark
    assert "font" not in dark
