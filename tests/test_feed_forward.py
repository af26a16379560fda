"""The feed-forward network against its formula and against stock modules."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_variants import VariantConfig
from hf_variants.model.builder import feed_forward_part
from hf_variants.model.feed_forward import FeedForward, GatedFeedForward


SIZES = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 32}


def build(**fields):
    torch.manual_seed(0)
    module = feed_forward_part(VariantConfig(**SIZES, **fields)).build()
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.5)
    return module


def hidden_states(dtype=torch.float32):
    return (torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_gated_equals_llama(bias, dtype):
    module = build(intermediate_size=40, mlp_bias=bias).to(dtype)
    twin = LlamaMLP(LlamaConfig(hidden_size=24, num_attention_heads=4, intermediate_size=40, mlp_bias=bias)).to(dtype)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(module(hidden_states(dtype)), twin(hidden_states(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ungated_equals_gpt2(dtype):
    module = build(ffn_type="mlp", hidden_act="gelu_new", mlp_bias=True, intermediate_size=96).to(dtype)
    twin = GPT2MLP(96, GPT2Config(n_embd=24, resid_pdrop=0.0)).to(dtype)
    twin.c_fc.weight.data.copy_(module.up_proj.weight.T)
    twin.c_fc.bias.data.copy_(module.up_proj.bias)
    twin.c_proj.weight.data.copy_(module.down_proj.weight.T)
    twin.c_proj.bias.data.copy_(module.down_proj.bias)
    expected = twin(hidden_states(dtype))
    # GPT-2's Conv1D multiplies with the transposed weight, which the matrix product may sum in another order.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    assert (module(hidden_states(dtype)) - expected).abs().max() <= tolerance * expected.std()


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "sigmoid", "linear"])
@pytest.mark.parametrize("ffn_type", ["mlp", "glu"])
def test_formula(ffn_type, act):
    module = build(ffn_type=ffn_type, hidden_act=act, mlp_bias=True, mlp_output_bias=False)
    x = hidden_states()
    inner = ACT2FN[act](
        x @ (module.gate_proj if ffn_type == "glu" else module.up_proj).weight.T
        + (module.gate_proj if ffn_type == "glu" else module.up_proj).bias
    )
    if ffn_type == "glu":
        inner = inner * (x @ module.up_proj.weight.T + module.up_proj.bias)
    expected = inner @ module.down_proj.weight.T
    assert module.down_proj.bias is None
    assert (module(x) - expected).abs().max() <= 1e-5 * expected.std()


@pytest.mark.parametrize("ffn_type", ["mlp", "glu"])
def test_sub_norm_stands_before_the_output_projection(ffn_type):
    module = build(ffn_type=ffn_type, ffn_sub_norm=True, norm_eps=1e-3)
    x = hidden_states()
    inner = module.up_proj(x)
    inner = module.act_fn(module.gate_proj(x)) * inner if ffn_type == "glu" else module.act_fn(inner)
    normed = inner / torch.sqrt(inner.square().mean(-1, keepdim=True) + 1e-3) * module.sub_norm.weight
    expected = module.down_proj(normed)
    assert (module(x) - expected).abs().max() <= 1e-5 * expected.std()


@pytest.mark.parametrize("ffn_type", ["mlp", "glu"])
def test_activation_dropout_acts_on_the_inner_activations_in_training_only(ffn_type):
    module = build(ffn_type=ffn_type, activation_dropout=0.5)
    seen = {}
    module.down_proj.register_forward_pre_hook(lambda _, args: seen.update(inner=args[0]))
    x = hidden_states()
    module.eval()(x)
    kept = seen["inner"]
    assert (kept != 0).all()
    module.train()(x)
    dropped = seen["inner"] == 0
    assert 0.3 < dropped.float().mean() < 0.7
    assert torch.equal(seen["inner"][~dropped], 2 * kept[~dropped])


def test_default_width():
    assert VariantConfig(**SIZES, ffn_type="mlp").intermediate_size == 128  # 96 rounded up
    assert VariantConfig(**SIZES, ffn_type="glu").intermediate_size == 64
    assert VariantConfig(**{**SIZES, "hidden_size": 768, "num_attention_heads": 12}).intermediate_size == 2048
    assert type(build(ffn_type="mlp")) is FeedForward
    assert type(build(ffn_type="glu")) is GatedFeedForward
