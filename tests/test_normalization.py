"""Norms against torch's own and against the transformers modules that have the same order of casts."""

import itertools

import pytest
import torch
from torch import nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.helium.modeling_helium import HeliumRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nanochat.modeling_nanochat import NanoChatRMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.stablelm.modeling_stablelm import StableLmLayerNormPerHead
from transformers.models.t5.modeling_t5 import T5LayerNorm

from hf_variants.model.normalization import (
    Float32LayerNorm,
    PerHeadLayerNorm,
    RMSNorm,
    WeightlessFloat32LayerNorm,
    WeightlessRMSNorm,
    ZeroCenteredLayerNorm,
    ZeroCenteredRMSNorm,
    choose_norm,
)


DIM = 48
EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16)


class PaperDynamicTanh(nn.Module):
    """Algorithm 1 of https://arxiv.org/abs/2503.10622."""

    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1) * 0.5)
        self.weight, self.bias = nn.Parameter(torch.ones(DIM)), nn.Parameter(torch.zeros(DIM))

    def forward(self, x):
        return self.weight * torch.tanh(self.alpha * x) + self.bias


# choose_norm's arguments and the transformers module that computes the same, bit for bit.
TWINS = {
    "llama": ({"norm_type": "rmsnorm"}, lambda: LlamaRMSNorm(DIM, EPS)),
    "t5": ({"norm_type": "rmsnorm", "casting_mode": "weight"}, lambda: T5LayerNorm(DIM, EPS)),
    "olmo2": ({"norm_type": "rmsnorm", "casting_mode": "gemma"}, lambda: Olmo2RMSNorm(DIM, EPS)),
    "helium": ({"norm_type": "rmsnorm", "casting_mode": "gemma"}, lambda: HeliumRMSNorm(DIM, EPS)),
    "gemma2": (
        {"norm_type": "rmsnorm", "casting_mode": "gemma", "unit_offset": True},
        lambda: Gemma2RMSNorm(DIM, EPS),
    ),
    "nanochat": ({"norm_type": "rmsnorm", "affine": False}, lambda: NanoChatRMSNorm(EPS)),
    "cohere": ({"norm_type": "layernorm", "casting_mode": "gemma"}, lambda: CohereLayerNorm(DIM, EPS)),
    "nemotron": (
        {"norm_type": "layernorm", "casting_mode": "none", "unit_offset": True, "bias": True},
        lambda: NemotronLayerNorm1P(DIM, eps=EPS),
    ),
    "olmo": ({"norm_type": "layernorm", "casting_mode": "gemma", "affine": False}, lambda: OlmoLayerNorm(DIM)),
    "torch layernorm": (
        {"norm_type": "layernorm", "casting_mode": "none", "bias": True},
        lambda: nn.LayerNorm(DIM, eps=EPS),
    ),
    "torch layernorm without bias": (
        {"norm_type": "layernorm", "casting_mode": "none"},
        lambda: nn.LayerNorm(DIM, eps=EPS, bias=False),
    ),
    "dynamic tanh": ({"norm_type": "dynamic_tanh", "casting_mode": "none", "bias": True}, lambda: PaperDynamicTanh()),
}


def build(shape=DIM, **arguments):
    defaults = {"eps": EPS, "affine": True, "bias": False, "unit_offset": False, "casting_mode": "llama"}
    return choose_norm(shape=shape, **{**defaults, **arguments}).build()


def make_hostile(module):
    """Weights far from the initialisation, so that none of them can be lost unnoticed."""
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 2 - 0.7)
    return module


def hostile_input(*shape, dtype=torch.float32):
    """A large mean, and rows whose sizes differ by orders of magnitude, some as small as the epsilon."""
    generator = torch.Generator().manual_seed(7)
    scales = torch.logspace(-3, 2, shape[-2])[:, None]
    return ((torch.randn(shape, generator=generator) + 1.5) * scales).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TWINS)
def test_equals_the_module_in_transformers_or_torch(name, dtype):
    arguments, make_twin = TWINS[name]
    norm, twin = build(**arguments).to(dtype), make_hostile(make_twin()).to(dtype)
    norm.load_state_dict(twin.state_dict())
    x = hostile_input(3, 11, DIM, dtype=dtype).requires_grad_()
    y = x.detach().clone().requires_grad_()
    out, expected = norm(x), twin(y)
    assert out.dtype == expected.dtype == dtype
    assert torch.equal(out, expected)
    direction = hostile_input(3, 11, DIM, dtype=dtype)
    out.backward(direction)
    expected.backward(direction)
    assert torch.equal(x.grad, y.grad)
    for ours, theirs in zip(norm.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_rmsnorm_agrees_with_torch_in_float64():
    reference = make_hostile(nn.RMSNorm(DIM, eps=EPS)).double()
    x = hostile_input(3, 11, DIM).double()
    norm = build(norm_type="rmsnorm", casting_mode="none").double()
    norm.load_state_dict(reference.state_dict())
    expected = reference(x)
    assert norm(x).dtype == torch.float64
    assert (norm(x) - expected).abs().max() < 1e-14 * expected.std()
    # In float32 only the statistics' rounding differs from torch's fused kernel.
    error = (norm.float()(x.float()) - expected.float()).abs().max()
    assert error < 1e-5 * expected.std()


def test_casting_modes_differ_below_float32_and_only_there():
    x = hostile_input(5, 16, DIM)
    weight = torch.randn(DIM, generator=torch.Generator().manual_seed(1))
    outputs = {}
    for dtype, mode in itertools.product(DTYPES, ("llama", "gemma", "none")):
        norm = build(norm_type="rmsnorm", casting_mode=mode).to(dtype)
        norm.weight.data.copy_(weight)
        outputs[dtype, mode] = norm(x.to(dtype))
        assert outputs[dtype, mode].dtype == dtype
    float32, bfloat16 = DTYPES
    assert torch.equal(outputs[float32, "llama"], outputs[float32, "gemma"])
    assert torch.equal(outputs[float32, "llama"], outputs[float32, "none"])
    for first, second in itertools.combinations(("llama", "gemma", "none"), 2):
        assert not torch.equal(outputs[bfloat16, first], outputs[bfloat16, second])


@pytest.mark.parametrize(("affine", "unit_offset"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize(
    ("norm_type", "casting_mode"),
    [("rmsnorm", "llama"), ("rmsnorm", "gemma"), ("rmsnorm", "none"), ("layernorm", "gemma"), ("layernorm", "none")],
)
def test_every_combination_computes_the_formula(norm_type, affine, unit_offset, casting_mode):
    norm = make_hostile(
        build(norm_type=norm_type, affine=affine, unit_offset=unit_offset, casting_mode=casting_mode)
    ).double()
    # "llama" and "gemma" take their statistics in float32 on purpose.
    tolerance = 1e-5 if casting_mode != "none" else 1e-13
    x = hostile_input(2, 9, DIM).double()
    centred = x - x.mean(-1, keepdim=True) if norm_type == "layernorm" else x
    expected = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + EPS)
    if affine:
        expected = expected * (norm.weight + float(unit_offset))
    assert (norm(x) - expected).abs().max() < tolerance * expected.std()


@pytest.mark.parametrize("unit_offset", [True, False])
@pytest.mark.parametrize(
    ("norm_type", "casting_mode"),
    [("rmsnorm", "llama"), ("rmsnorm", "gemma"), ("layernorm", "none"), ("layernorm", "gemma")],
)
def test_own_weights_per_head(norm_type, casting_mode, unit_offset):
    heads, head_dim = 3, 16
    arguments = {"norm_type": norm_type, "casting_mode": casting_mode, "unit_offset": unit_offset}
    norm = make_hostile(build(shape=(heads, head_dim), **arguments))
    x = hostile_input(2, 5, heads, head_dim)
    for head in range(heads):
        single = build(shape=head_dim, **arguments)
        single.weight.data.copy_(norm.weight[head])
        assert torch.equal(norm(x)[:, :, head], single(x[:, :, head]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_per_head_layernorm_equals_stablelm(dtype):
    heads, head_dim = 4, 24
    twin = make_hostile(StableLmLayerNormPerHead(head_dim, heads, eps=EPS)).to(dtype)
    norm = PerHeadLayerNorm((heads, head_dim), eps=EPS).to(dtype)
    norm.weight.data.copy_(torch.stack([single.weight for single in twin.norms]))
    x = hostile_input(2, heads, 9, head_dim, dtype=dtype)
    assert torch.equal(norm(x.transpose(1, 2)), twin(x).transpose(1, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_per_head_float32_layernorm_equals_cohere(dtype):
    shape = (4, 24)
    twin = make_hostile(CohereLayerNorm(shape, EPS)).to(dtype)
    norm = Float32LayerNorm(shape, eps=EPS).to(dtype)
    norm.load_state_dict(twin.state_dict())
    x = hostile_input(2, 9, *shape, dtype=dtype)
    assert torch.equal(norm(x), twin(x))


def test_zero_centred_keeps_low_bits_of_the_weight_in_bfloat16():
    norm = ZeroCenteredRMSNorm(DIM).bfloat16()
    norm.weight.data.fill_(2.0**-12)  # 1 + 2^-12 is 1 in bfloat16
    x = torch.ones(1, DIM, dtype=torch.bfloat16) * (1 + 2.0**-7)
    exact = x.double() / torch.sqrt(x.double().square().mean(-1, keepdim=True) + 1e-6) * (1 + 2.0**-12)
    assert torch.equal(norm(x), exact.to(torch.bfloat16))


def test_a_new_norm_is_the_identity_up_to_scale():
    for norm in (RMSNorm(DIM), ZeroCenteredRMSNorm(DIM), ZeroCenteredLayerNorm(DIM), Float32LayerNorm(DIM)):
        out = norm(hostile_input(2, 20, DIM)[:, 10:])
        assert torch.allclose(out.square().mean(-1).sqrt(), torch.ones(out.shape[:-1]), atol=1e-3)


def test_classes_follow_from_the_arguments():
    classes = {
        RMSNorm: {"norm_type": "rmsnorm"},
        ZeroCenteredRMSNorm: {"norm_type": "rmsnorm", "unit_offset": True},
        WeightlessRMSNorm: {"norm_type": "rmsnorm", "affine": False},
        nn.LayerNorm: {"norm_type": "layernorm", "casting_mode": "none"},
        ZeroCenteredLayerNorm: {"norm_type": "layernorm", "casting_mode": "none", "unit_offset": True},
        WeightlessFloat32LayerNorm: {"norm_type": "layernorm", "casting_mode": "gemma", "affine": False},
        Float32LayerNorm: {"norm_type": "layernorm", "casting_mode": "gemma"},
    }
    for expected, arguments in classes.items():
        assert type(build(**arguments)) is expected
    assert not list(WeightlessRMSNorm(DIM).parameters())
