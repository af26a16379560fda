"""The size of heads: whole pairs of a rotation, with the frequencies that they had."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_variants import VariantConfig, VariantForCausalLM
from hf_variants.conversion import from_native, to_native
from hf_variants.surgery import HeadSize, Subject, SurgeryError, edit_model
from tests.parity import hostile_, inputs_of, logits_of, random_native, relative_error
from tests.surgery_models import IDS, NAMED, ROWS
from tests.test_surgery_sizes import in_float64


SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
}


@pytest.mark.parametrize("model_type", NAMED)
def test_larger_heads_keep_the_function(model_type):
    row = ROWS[model_type]
    native = random_native(row, 0)
    ours = in_float64(from_native(native))
    stacks = Subject.of_model(ours).stacks
    grow = [HeadSize(2 * config.head_dim, name) for name, config in stacks.items()]
    kinds = {
        (config.rope_parameters_of(layer) or {}).get("rope_type", "default")
        for config in stacks.values()
        for layer in range(config.num_hidden_layers)
    }
    if kinds - {"default", "linear", "llama3"}:
        with pytest.raises(SurgeryError, match="rope_type"):
            edit_model(ours, grow)
        return
    wide = edit_model(ours, grow)
    batch = inputs_of(native, row.length)["long"]
    # Tables of angles are in float32.
    assert relative_error(logits_of(wide, batch), logits_of(ours, batch)) < 1e-4


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_interleaved": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"qk_norm": "head", "norm_unit_offset": True},
        {"qk_norm": "full"},
        {"attention_gate": "elementwise", "attention_bias": True, "attention_scaling": 0.3},
        {"position_embedding_type": "learned"},
        {"per_layer_config": {1: {"num_key_value_heads": 4}}},
    ],
)
def test_heads_grow_under_other_fields_and_come_back(fields):
    model = in_float64(hostile_(VariantForCausalLM(VariantConfig(**SIZES, **fields))))
    wide = edit_model(model, [HeadSize(24)])
    assert relative_error(wide(IDS).logits, model(IDS).logits) < 1e-5
    back = edit_model(wide, [HeadSize(8)])
    if model.config.qk_norm == "none":
        # Otherwise the norm divides by another mean.
        assert relative_error(back(IDS).logits, model(IDS).logits) < 1e-5


def test_every_second_pair_is_left():
    native = hostile_(LlamaForCausalLM(LlamaConfig(**SIZES))).eval()
    config = copy.deepcopy(native.config)
    config.head_dim = 4
    by_hand = LlamaForCausalLM(config).eval()
    state = native.state_dict()
    # Of four pairs (0, 4), (1, 5), (2, 6), (3, 7) the first and the third, with the frequencies of a head of four.
    pairs = torch.tensor([0, 2, 4, 6])
    for layer in range(2):
        q, k, v, o = (f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "qkvo")
        state[q] = state[q].view(4, 8, 32)[:, pairs].reshape(16, 32) * 0.5**0.5
        state[k] = state[k].view(2, 8, 32)[:, pairs].reshape(8, 32)
        score = state[v].view(2, 8, 32).square().sum(2) * state[o].square().sum(0).view(2, 2, 8).sum(1)
        best = score.argsort(dim=1, descending=True)[:, :4].sort(dim=1).values
        state[v] = torch.cat([state[v].view(2, 8, 32)[head, best[head]] for head in range(2)])
        state[o] = torch.cat([state[o].view(32, 4, 8)[:, head, best[head // 2]] for head in range(4)], dim=1)
    by_hand.load_state_dict(state)
    made = to_native(edit_model(from_native(native), [HeadSize(4)]), "llama")
    assert relative_error(made(IDS).logits, by_hand(IDS).logits) < 1e-5


def test_refusals():
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 1024}
    for operation, fields, words in (
        (HeadSize(0), {}, "0 channels"),
        (HeadSize(12), {}, "rope_parameters"),
        (HeadSize(16), {"rope_parameters": yarn}, "rope_type"),
        (HeadSize(16), {"attention_sub_norm": True}, "attention_sub_norm"),
        (HeadSize(16), {"qk_norm": "head", "norm_type": "layernorm"}, "qk_norm_type"),
    ):
        model = VariantForCausalLM(VariantConfig(**SIZES, **fields))
        with pytest.raises(SurgeryError, match=words):
            edit_model(model, [operation])
