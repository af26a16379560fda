"""Feed-forward widths, fused norms and positions: against what is defined, and stock models edited by hand."""

import copy
import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_variants import VariantConfig, VariantForCausalLM, VariantForMaskedLM
from hf_variants.conversion import from_native, to_native
from hf_variants.surgery import (
    ContextLength,
    DropRotation,
    FeedForwardWidth,
    FuseNorms,
    Subject,
    SurgeryError,
    ToRMSNorm,
    edit_model,
)
from hf_variants.surgery.positions import SCALINGS
from hf_variants_cli import main
from tests.parity import hostile_, inputs_of, logits_of, random_native, relative_error
from tests.surgery_models import IDS, NAMED, ROWS, SIZES
from tests.test_surgery_sizes import in_float64


@pytest.mark.parametrize("model_type", NAMED)
def test_fused_norms_keep_the_function_of_stock_models_or_are_refused_by_name(model_type):
    row = ROWS[model_type]
    native = random_native(row, 0)
    ours = in_float64(from_native(native))
    stacks = Subject.of_model(ours).stacks.values()
    if any(stack.norm_placement == "post" or stack.residual_from_norm for stack in stacks):
        with pytest.raises(SurgeryError, match="norm_placement"):
            edit_model(ours, [FuseNorms()])
        return
    batch = inputs_of(native, row.length)["long"]
    fused = edit_model(ours, [FuseNorms()])
    assert relative_error(logits_of(fused, batch), logits_of(ours, batch)) < 1e-9
    # Nothing is left to be fused.
    weights = [n for n in fused.state_dict() if n.endswith(("_pre_norm.weight", "_pre_norm.bias"))]
    assert all(fused.state_dict()[name].unique().numel() == 1 for name in weights)


def test_a_bias_of_a_norm_that_has_nowhere_to_go_is_refused():
    fields = {"norm_type": "layernorm", "per_layer_config": {1: {"mlp_bias": False}}, "mlp_bias": True}
    model = VariantForCausalLM(VariantConfig(**SIZES, **fields))
    for operation in (FuseNorms(), ToRMSNorm()):
        with pytest.raises(SurgeryError, match="nowhere to go"):
            edit_model(model, [operation])


@pytest.mark.parametrize("model_type", NAMED)
def test_new_channels_keep_the_function_and_go_first(model_type):
    row = ROWS[model_type]
    native = random_native(row, 0)
    ours = from_native(native)
    stacks = Subject.of_model(ours).stacks
    wide = edit_model(ours, [FeedForwardWidth(stack.intermediate_size + 8, name) for name, stack in stacks.items()])
    batch = inputs_of(native, row.length)["long"]
    assert relative_error(logits_of(wide, batch), logits_of(ours, batch)) < 1e-4
    back = edit_model(wide, [FeedForwardWidth(stack.intermediate_size, name) for name, stack in stacks.items()])
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), ours.state_dict().values()))


def test_strongest_channels_are_kept():
    native = hostile_(LlamaForCausalLM(LlamaConfig(**SIZES))).eval()
    config = copy.deepcopy(native.config)
    config.intermediate_size = 10
    by_hand = LlamaForCausalLM(config).eval()
    state = native.state_dict()
    for layer in range(2):
        gate, up, down = (f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
        score = state[gate].norm(dim=1) * state[up].norm(dim=1) * state[down].norm(dim=0)
        best = score.argsort(descending=True)[:10].sort().values
        state |= {gate: state[gate][best], up: state[up][best], down: state[down][:, best]}
    by_hand.load_state_dict(state)
    made = to_native(edit_model(from_native(native), [FeedForwardWidth(10)]), "llama")
    assert torch.equal(made(IDS).logits, by_hand(IDS).logits)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": True},
        {"norm_placement": "sandwich", "norm_unit_offset": True, "attention_gate": "headwise"},
        {"parallel_block": "shared_norm", "attention_bias": True},
        {"parallel_block": "two_norms"},
        {"norm_type": "layernorm", "norm_bias": False, "qk_norm": "head"},
        {"first_layer_pre_norm": False},
        {"per_layer_config": {1: {"skip": ["attention"]}}},
        {"norm_type": "layernorm"},
        {"norm_type": "layernorm", "tie_word_embeddings": True, "parallel_block": "shared_norm", "mlp_bias": True},
        {"norm_type": "dynamic_tanh"},
        {"norm_placement": "branch"},
    ],
)
def test_fused_norms_keep_the_function(fields):
    model = hostile_(VariantForCausalLM(VariantConfig(**SIZES, **fields))).eval()
    fused = edit_model(model, [FuseNorms()])
    assert relative_error(fused(IDS).logits, model(IDS).logits) < 1e-4
    neutral = 0.0 if model.config.norm_unit_offset else 1.0
    assert (fused.model.norm.weight == neutral).all()
    norms = [tensor for name, tensor in fused.state_dict().items() if name.endswith("_pre_norm.weight")]
    assert bool(norms) == (model.config.norm_placement != "branch")
    assert all((tensor == neutral).all() for tensor in norms)
    assert not fused.config.tie_word_embeddings


FACTORS = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}


def scaled(scaling, factor):
    """The parameters of a rotation that has been scaled by a factor, from a context of 16 tokens."""
    rope = {"rope_type": scaling, "rope_theta": 10000.0}
    if scaling != "default":
        rope["factor"] = factor
    if scaling in ("yarn", "llama3", "longrope"):
        rope["original_max_position_embeddings"] = 16
    if scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return rope | (FACTORS if scaling == "longrope" else {})


def length_of(scaling, factor):
    return int(16 * factor) if scaling != "dynamic" else 16


@pytest.mark.parametrize("scaling", SCALINGS[1:])
@pytest.mark.parametrize("before", ["default", "dynamic", "yarn", "longrope", "llama3", "linear"])
def test_rotations_are_scaled_as_in_the_stock_class(before, scaling):
    stated = length_of(before, 2.0) if before != "default" else 16
    config = LlamaConfig(**SIZES, max_position_embeddings=stated, rope_parameters=scaled(before, 2.0))
    native = hostile_(LlamaForCausalLM(config)).eval()
    operation = ContextLength(64, scaling, factors=FACTORS if scaling == "longrope" else None)
    if before == "linear" != scaling:
        with pytest.raises(SurgeryError, match="rope_type` linear"):
            edit_model(from_native(native), [operation])
        return
    made = to_native(edit_model(from_native(native), [operation]), "llama")
    rope, length = scaled(scaling, 4.0), length_of(scaling, 4.0)
    stock = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=length, rope_parameters=rope)).eval()
    stock.load_state_dict(native.state_dict())
    ids = torch.arange(40)[None] % 40
    assert torch.equal(made(ids).logits, stock(ids).logits)
    assert not torch.equal(made(ids).logits, native(ids).logits)


@pytest.mark.parametrize("before", SCALINGS[1:])
def test_a_rotation_is_no_longer_scaled(before):
    config = LlamaConfig(**SIZES, max_position_embeddings=length_of(before, 2.0), rope_parameters=scaled(before, 2.0))
    native = hostile_(LlamaForCausalLM(config)).eval()
    stock = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=16)).eval()
    stock.load_state_dict(native.state_dict())
    made = edit_model(from_native(native), [ContextLength(16, "default")])
    assert torch.equal(made(IDS).logits, stock(IDS).logits)


def test_factors_of_longrope_stand_in_a_file(tmp_path):
    hostile_(LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=16))).save_pretrained(tmp_path / "a")
    (tmp_path / "factors.json").write_text(json.dumps(FACTORS), encoding="utf-8")
    command = ["edit", str(tmp_path / "a"), str(tmp_path / "b"), "--context", "64", "--rope-scaling", "longrope"]
    assert main([*command, "--rope-factors", str(tmp_path / "factors.json")]) == 0
    assert VariantConfig.from_pretrained(tmp_path / "b").rope_parameters == scaled("longrope", 4.0)
    # Once they are there, another context keeps them.
    command = ["edit", str(tmp_path / "b"), str(tmp_path / "c"), "--context", "128", "--rope-scaling", "longrope"]
    assert main(command) == 0
    assert VariantConfig.from_pretrained(tmp_path / "c").rope_parameters == scaled("longrope", 8.0)


def test_tables_are_cut_and_grown():
    native = hostile_(
        GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_head=4, n_layer=2, n_positions=32))
    ).eval()
    ours = from_native(native)
    short, long = (edit_model(ours, [ContextLength(length)]) for length in (20, 80))
    assert torch.equal(short(IDS).logits, native(IDS).logits)
    assert torch.equal(long(IDS).logits, native(IDS).logits)
    table = long.model.embed_positions.weight
    assert torch.equal(table[32:64], native.transformer.wpe.weight)
    assert to_native(long, "gpt2").config.n_positions == 80


def test_tables_counted_from_the_padding_token_grow_behind_it():
    config = VariantConfig(
        **SIZES, is_causal=False, position_embedding_type="learned", position_ids_source="input_ids", pad_token_id=1,
        max_position_embeddings=34,
    )  # fmt: skip
    model = hostile_(VariantForMaskedLM(config)).eval()
    grown = edit_model(model, [ContextLength(66)])
    assert torch.equal(grown(IDS + 2).logits, model(IDS + 2).logits)
    assert torch.equal(grown.model.embed_positions.weight[34:66], model.model.embed_positions.weight[2:34])


def test_layers_lose_their_rotation(tmp_path):
    ours = from_native(random_native(ROWS["smollm3"], 0))
    layers = ours.config.num_hidden_layers
    ours.save_pretrained(tmp_path / "ours")
    assert main(["edit", str(tmp_path / "ours"), str(tmp_path / "new"), "--drop-rotation", f"0-{layers - 1}"]) == 0
    made = VariantForCausalLM.from_pretrained(tmp_path / "new").eval()
    assert made.config.no_rope_layers == [0] * layers
    moved = made(IDS, position_ids=torch.arange(5, 25)[None] * 3).logits
    assert torch.equal(moved, made(IDS, position_ids=torch.arange(20)[None] * 3).logits)


def test_skipped_attention_under_the_name_of_the_documentation():
    config = VariantConfig(**SIZES, per_layer_config={1: {"skip": ["attention"]}})
    assert config.to_dict()["per_layer_config"] == {"1": {"skip": ["self_attn"]}}


def test_refusals():
    short = {"max_position_embeddings": 16}
    cases = [
        (FeedForwardWidth(0), {}, "cannot be 0 wide"),
        (FeedForwardWidth(32), {"ffn_sub_norm": True}, "ffn_sub_norm"),
        (FuseNorms(), {"norm_placement": "post"}, "norm_placement"),
        (FuseNorms(), {"norm_affine": False}, "norm_affine"),
        (ContextLength(64, "yarn"), {"position_embedding_type": "alibi"}, "no rotation to scale"),
        (ContextLength(64, "longrope"), short, "short_factor"),
        (ContextLength(64, "longrope", factors={"short_factor": [1.0, 1.0]}), short, "long_factor"),
        (ContextLength(64, "ntk"), {}, "rope_type"),
        (ContextLength(8, "yarn"), short, "max_position_embeddings"),
        (ContextLength(64), {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        (
            ContextLength(64, "yarn"),
            short | {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rope_type` linear",
        ),
        (DropRotation("2"), {}, "no layer 2"),
        (DropRotation("1"), {"position_embedding_type": "alibi"}, "no rotation to drop"),
    ]
    for operation, fields, words in cases:
        model = VariantForCausalLM(VariantConfig(**SIZES, **fields))
        with pytest.raises(SurgeryError, match=words):
            edit_model(model, [operation])
