"""Attention against torch's, against the stock modules that have the same features, and against the formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Gemma2Config, GraniteSWAConfig, HunYuanDenseV1Config, LlamaConfig, Olmo2Config, Qwen3Config
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_eager
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_eager
from transformers.models.granite_swa.modeling_granite_swa import eager_attention_forward as granite_swa_eager
from transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense import HunYuanDenseV1Attention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention, Olmo2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from hf_variants import VariantConfig
from hf_variants.model.attention import eager_attention_forward
from hf_variants.model.builder import cross_attention_part, self_attention_part


WIDTH, HEADS, KV_HEADS, HEAD_DIM = 48, 4, 2, 16
SIZES = {
    "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
    "num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 64,
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)
BATCH, LENGTH = 2, 13


def build(dtype=torch.float32, attn_implementation="eager", builder=self_attention_part, **fields):
    """Layer 0's attention with random weights, biases and norms far from their initialisation."""
    config = VariantConfig(**{**SIZES, "position_embedding_type": "none", **fields})
    config._attn_implementation = attn_implementation
    torch.manual_seed(0)
    module = builder(config, 0).build()
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=0.2, std=0.6)
    return module.to(dtype).eval()


def inputs(dtype=torch.float32, length=LENGTH, width=WIDTH, seed=1):
    return torch.randn(BATCH, length, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def causal_mask(dtype=torch.float32, length=LENGTH):
    return torch.full((1, 1, length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)


def split_heads(states, heads):
    return states.view(*states.shape[:2], heads, -1).transpose(1, 2)


def attend_by_hand(query, key, value, mask=None, scaling=HEAD_DIM**-0.5):
    """Attention in float64, from projected heads to (batch, length, heads * head_dim)."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
    weights = (scores if mask is None else scores + mask).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).flatten(2)


def by_hand(module, x, mask, **options):
    query = split_heads(module.q_proj(x), HEADS)
    key, value = (split_heads(projection(x), KV_HEADS) for projection in (module.k_proj, module.v_proj))
    return F.linear(attend_by_hand(query, key, value, mask, **options), module.o_proj.weight.double())


def assert_close(ours, expected, tolerance=1e-5):
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < tolerance * expected.std()


# The eager kernel


def kernel_inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    query = (torch.randn(BATCH, HEADS, LENGTH, HEAD_DIM, generator=generator) * 4).to(dtype)
    key, value = (torch.randn(BATCH, KV_HEADS, LENGTH, HEAD_DIM, generator=generator).to(dtype) for _ in range(2))
    return query, key, value


class Caller(nn.Module):
    """What an attention function may read of the module that calls it."""

    def __init__(self, sinks=None):
        super().__init__()
        self.num_key_value_groups = HEADS // KV_HEADS
        self.sinks = sinks
        self.is_causal = True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_soft_cap_equals_gemma2(dtype):
    caller, states = Caller().eval(), kernel_inputs(dtype)
    options = {"scaling": 0.3, "softcap": 2.0}
    ours = eager_attention_forward(caller, *states, causal_mask(dtype), **options)
    stock = gemma2_eager(caller, *states, causal_mask(dtype), **options)
    assert torch.equal(ours[0], stock[0])
    assert torch.equal(ours[1], stock[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinks_equal_granite_swa_and_gpt_oss(dtype):
    sinks = torch.tensor([3.0, -2.0, 0.5, 8.0]).to(dtype)
    caller, states = Caller(sinks).eval(), kernel_inputs(dtype)
    ours, _ = eager_attention_forward(caller, *states, causal_mask(dtype), scaling=0.3, s_aux=sinks)
    assert torch.equal(ours, granite_swa_eager(caller, *states, causal_mask(dtype), scaling=0.3)[0])
    # gpt-oss adds a column to the scores instead and takes its softmax in the activations' dtype.
    stock, _ = gpt_oss_eager(caller, *states, causal_mask(dtype), scaling=0.3)
    assert_close(ours.float(), stock.float(), 1e-5 if dtype == torch.float32 else 2**-5)


def test_sinks_are_an_extra_column_of_the_softmax():
    sinks = torch.tensor([3.0, -2.0, 0.5, 8.0])
    query, key, value = kernel_inputs()
    ours, _ = eager_attention_forward(Caller(), query, key, value, causal_mask(), scaling=0.3, s_aux=sinks)
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3 + causal_mask()
    column = sinks.view(1, HEADS, 1, 1).expand(BATCH, -1, LENGTH, 1)
    weights = torch.cat((scores, column), -1).double().softmax(-1)[..., :-1]
    assert_close(ours, (weights @ value.double().repeat_interleave(2, 1)).transpose(1, 2))


def test_order_of_cap_mask_and_bias():
    query, key, value = kernel_inputs()
    bias = torch.randn(BATCH, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)) * 3
    ours, weights = eager_attention_forward(
        Caller(), query, key, value, causal_mask(), scaling=0.3, softcap=2.0, position_bias=bias
    )
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    expected = (2 * torch.tanh(scores / 2) + bias + causal_mask()).double().softmax(-1)
    assert_close(weights, expected)
    assert_close(ours, (expected @ value.double().repeat_interleave(2, 1)).transpose(1, 2))
    assert not weights.triu(1).any()


# Whole modules against torch and transformers


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_torch_multihead_attention(causal, implementation):
    module = build(
        attn_implementation=implementation, num_key_value_heads=HEADS, head_dim=WIDTH // HEADS, attention_bias=True,
        is_causal=causal,
    )  # fmt: skip
    torch_module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    projections = [module.q_proj, module.k_proj, module.v_proj]
    torch_module.in_proj_weight.data.copy_(torch.cat([projection.weight for projection in projections]))
    torch_module.in_proj_bias.data.copy_(torch.cat([projection.bias for projection in projections]))
    torch_module.out_proj.load_state_dict(module.o_proj.state_dict())
    x = inputs()
    additive = causal_mask() if causal else None
    blocked = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) if causal else None
    expected, _ = torch_module(x, x, x, attn_mask=blocked)
    assert_close(module(x, attention_mask=additive)[0], expected)


STOCK = {
    "llama": (LlamaAttention, LlamaConfig, LlamaRotaryEmbedding, {}, {}),
    "llama with biases": (
        LlamaAttention, LlamaConfig, LlamaRotaryEmbedding, {"attention_bias": True}, {"attention_bias": True},
    ),
    "qwen3": (Qwen3Attention, Qwen3Config, LlamaRotaryEmbedding, {"qk_norm": "head"}, {}),
    "olmo2": (
        Olmo2Attention, Olmo2Config, Olmo2RotaryEmbedding,
        {"qk_norm": "full", "norm_casting_mode": "gemma", "rope_in_float32": True, "rope_table_in_float32": True}, {},
    ),
    "hunyuan": (
        HunYuanDenseV1Attention, HunYuanDenseV1Config, LlamaRotaryEmbedding,
        {"qk_norm": "head", "qk_norm_after_rope": True}, {},
    ),
}  # fmt: skip
HUNYUAN_NAMES = {"q_norm.weight": "query_layernorm.weight", "k_norm.weight": "key_layernorm.weight"}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STOCK)
def test_equals_the_stock_module(name, dtype, implementation):
    """Bit for bit: outputs and gradients of the weights, with grouped key/value heads."""
    stock_class, config_class, rotary_class, fields, stock_fields = STOCK[name]
    module = build(
        dtype, implementation, position_embedding_type="rope", attention_dropout=0.0, norm_eps=1e-5, **fields
    )
    stock_config = config_class(**SIZES, rms_norm_eps=1e-5, **stock_fields)
    stock_config._attn_implementation = implementation
    stock = stock_class(stock_config, 0).to(dtype).eval()
    names = {key: HUNYUAN_NAMES.get(key, key) if name == "hunyuan" else key for key in module.state_dict()}
    stock.load_state_dict({names[key]: value for key, value in module.state_dict().items()})
    x = inputs(dtype)
    embeddings = rotary_class(stock_config)(x, torch.arange(LENGTH)[None] + 40)
    ours, weights = module(x, embeddings, causal_mask(dtype))
    expected, stock_weights = stock(x, embeddings, causal_mask(dtype))
    assert torch.equal(ours, expected)
    assert (weights is None and stock_weights is None) or torch.equal(weights, stock_weights)
    direction = inputs(dtype, seed=2)
    ours.backward(direction)
    expected.backward(direction)
    stock_parameters = dict(stock.named_parameters())
    for key, parameter in module.named_parameters():
        assert torch.equal(parameter.grad, stock_parameters[names[key]].grad), key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_scaling_and_soft_cap_as_in_gemma2(dtype):
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2RotaryEmbedding

    module = build(
        dtype, position_embedding_type="rope", attention_scaling=20.0**-0.5, attn_logit_softcapping=5.0,
        layer_types="SF", sliding_window=4,
    )  # fmt: skip
    config = Gemma2Config(
        **SIZES, query_pre_attn_scalar=20, attn_logit_softcapping=5.0, sliding_window=4, attention_dropout=0.0
    )
    config._attn_implementation = "eager"
    stock = Gemma2Attention(config, 0).to(dtype).eval()
    stock.load_state_dict(module.state_dict())
    x = inputs(dtype)
    embeddings = Gemma2RotaryEmbedding(config)(x, torch.arange(LENGTH)[None])
    expected, _ = stock(x, embeddings, causal_mask(dtype))
    assert torch.equal(module(x, embeddings, causal_mask(dtype))[0], expected)
    assert module.sliding_window == stock.sliding_window == 4


def test_sinks_as_in_granite_swa():
    from transformers.models.granite_swa.modeling_granite_swa import GraniteSWAAttention

    module = build(attention_sinks=True, attention_scaling=0.3)
    config = GraniteSWAConfig(**SIZES, attention_multiplier=0.3, layer_types=["full_attention"] * 2)
    config._attn_implementation = "eager"
    stock = GraniteSWAAttention(config, 0).eval()
    stock.load_state_dict(module.state_dict())
    x = inputs()
    expected, _ = stock(x, position_embeddings=None, attention_mask=causal_mask())
    assert torch.equal(module(x, attention_mask=causal_mask())[0], expected)


# Formulas


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("head_dim", [12, 7, 20])
def test_grouped_heads_of_any_width(kv_heads, head_dim):
    module = build(num_key_value_heads=kv_heads, head_dim=head_dim)
    x = inputs()
    query = split_heads(module.q_proj(x), HEADS)
    key, value = (split_heads(projection(x), kv_heads) for projection in (module.k_proj, module.v_proj))
    merged = attend_by_hand(query, key, value, causal_mask(), scaling=head_dim**-0.5)
    assert_close(module(x, attention_mask=causal_mask())[0], F.linear(merged, module.o_proj.weight.double()))


def test_scaled_queries():
    plain, scaled = build(attention_scaling=0.3), build(attention_scaling=0.3, scale_query=True)
    assert scaled.scaling == 1.0
    x = inputs()
    assert_close(scaled(x, attention_mask=causal_mask())[0], plain(x, attention_mask=causal_mask())[0])
    query = scaled.project_query(x)
    assert torch.equal(query, split_heads(scaled.q_proj(x) * 0.3, HEADS))


def test_clip():
    module = build(clip_qkv=0.5)
    x = inputs()
    query = split_heads(module.q_proj(x).clamp(-0.5, 0.5), HEADS)
    key, value = (
        split_heads(projection(x).clamp(-0.5, 0.5), KV_HEADS) for projection in (module.k_proj, module.v_proj)
    )
    expected = F.linear(attend_by_hand(query, key, value, causal_mask()), module.o_proj.weight.double())
    assert_close(module(x, attention_mask=causal_mask())[0], expected)


@pytest.mark.parametrize("norm_type", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["head", "full", "per_head"])
def test_qk_norm(kind, affine, norm_type):
    module = build(qk_norm=kind, qk_norm_affine=affine, qk_norm_type=norm_type, qk_norm_bias=False, qk_norm_eps=1e-3)
    x = inputs()

    def normalise(states, norm, heads):
        if kind != "full":
            states = states.view(*states.shape[:2], heads, HEAD_DIM)
        centred = states - states.mean(-1, keepdim=True) if norm_type == "layernorm" else states
        centred = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-3)
        weight = norm.weight if affine else 1.0
        return split_heads((centred * weight).flatten(2) if kind != "full" else centred * weight, heads)

    query = normalise(module.q_proj(x), module.q_norm, HEADS)
    key = normalise(module.k_proj(x), module.k_norm, KV_HEADS)
    value = split_heads(module.v_proj(x), KV_HEADS)
    expected = F.linear(attend_by_hand(query, key, value, causal_mask()), module.o_proj.weight.double())
    assert_close(module(x, attention_mask=causal_mask())[0], expected)
    if affine:
        shapes = {"head": (HEAD_DIM,), "full": (HEADS * HEAD_DIM,), "per_head": (HEADS, HEAD_DIM)}
        assert tuple(module.q_norm.weight.shape) == shapes[kind]


@pytest.mark.parametrize("gate", ["headwise", "elementwise"])
def test_gate(gate):
    module = build(attention_gate=gate)
    x = inputs()
    query = split_heads(module.q_proj(x), HEADS)
    key, value = (split_heads(projection(x), KV_HEADS) for projection in (module.k_proj, module.v_proj))
    merged = attend_by_hand(query, key, value, causal_mask()).view(BATCH, LENGTH, HEADS, HEAD_DIM)
    gates = 1 / (1 + torch.exp(-(x @ module.g_proj.weight.T).double()))
    gates = gates.view(BATCH, LENGTH, HEADS, HEAD_DIM if gate == "elementwise" else 1)
    expected = F.linear((merged * gates).flatten(2), module.o_proj.weight.double())
    assert_close(module(x, attention_mask=causal_mask())[0], expected)


def test_sub_norm_stands_before_the_output_projection():
    module = build(attention_sub_norm=True, norm_eps=1e-3)
    x = inputs()
    query = split_heads(module.q_proj(x), HEADS)
    key, value = (split_heads(projection(x), KV_HEADS) for projection in (module.k_proj, module.v_proj))
    merged = attend_by_hand(query, key, value, causal_mask())
    normed = merged / torch.sqrt(merged.square().mean(-1, keepdim=True) + 1e-3) * module.sub_norm.weight
    assert_close(module(x, attention_mask=causal_mask())[0], F.linear(normed, module.o_proj.weight.double()))


def test_attention_dropout_in_training_only():
    module = build(attention_dropout=0.5)
    x = inputs()
    assert torch.equal(module(x)[0], build()(x)[0])
    _, weights = module.train()(x)
    assert 0.3 < (weights == 0).float().mean() < 0.7


def test_cross_attention_keeps_the_encoders_keys():
    module = build(
        builder=cross_attention_part, add_cross_attention=True, cross_attention_hidden_size=20, attention_bias=True,
        attention_output_bias=False,
    )  # fmt: skip
    x, source = inputs(), inputs(length=9, width=20)
    query = split_heads(module.q_proj(x), HEADS)
    key, value = (split_heads(projection(source), KV_HEADS) for projection in (module.k_proj, module.v_proj))
    mask = torch.zeros(BATCH, 1, LENGTH, 9)
    mask[0, ..., 5:] = torch.finfo(torch.float32).min
    expected = F.linear(attend_by_hand(query, key, value, mask), module.o_proj.weight.double())
    out, _ = module(x, encoder_hidden_states=source, encoder_attention_mask=mask)
    assert_close(out, expected)

    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for start in range(LENGTH):
        step, _ = module(
            x[:, start : start + 1],
            # Once the keys are cached, the encoder's states are not read any more.
            encoder_hidden_states=source if start == 0 else None,
            encoder_attention_mask=mask[:, :, start : start + 1],
            past_key_values=cache,
        )
        assert_close(step, expected[:, start : start + 1])
    assert cache.cross_attention_cache.layers[0].keys.shape[2] == 9


def test_clipping_and_norms_apply_before_the_cache():
    """What is cached is what is attended to: keys after norm and rotation."""
    module = build(qk_norm="head", clip_qkv=0.5)
    x, cache = inputs(), DynamicCache()
    module(x, attention_mask=causal_mask(), past_key_values=cache)
    assert torch.equal(cache.layers[0].keys, module.project_key(x))
    assert cache.layers[0].values.abs().max() <= 0.5


def test_scores_of_wide_heads_stay_finite_in_half_precision():
    module = build(torch.float16)
    out, _ = module(inputs(torch.float16), attention_mask=causal_mask(torch.float16))
    assert torch.isfinite(out).all()
