"""Where norms and residuals sit: every placement written out by hand, and torch's own encoder layer."""

import pytest
import torch
from torch import nn

from hf_variants import VariantConfig, VariantModel
from hf_variants.model.block import LearnedScaleResidual, Residual


WIDTH = 24
SIZES = {
    "hidden_size": WIDTH, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 40, "intermediate_size": 32,
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)


def randomise(module):
    """Random weights, with norms and learned scales far from their initialisation."""
    generator = torch.Generator().manual_seed(11)
    for parameter in module.parameters():
        spread = 0.3 if parameter.ndim > 1 else 0.8
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * spread + 0.1)
    return module


def model_with(dtype=torch.float32, **fields):
    torch.manual_seed(0)
    model = VariantModel(VariantConfig(**{**SIZES, "position_embedding_type": "none", "is_causal": False, **fields}))
    return randomise(model).to(dtype).eval()


def states(dtype=torch.float32):
    return (torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(2)) * 2 + 0.5).to(dtype)


# The block formulas. Each takes the sublayers f (attention) and g (feed-forward), and the block for its norms.


def pre(b, f, g, x):
    x = x + f(b.self_attn_pre_norm(x))
    return x + g(b.mlp_pre_norm(x))


def post(b, f, g, x):
    x = b.self_attn_post_norm(x + f(x))
    return b.mlp_post_norm(x + g(x))


def branch(b, f, g, x):
    x = x + b.self_attn_branch_norm(f(x))
    return x + b.mlp_branch_norm(g(x))


def sandwich(b, f, g, x):
    x = x + b.self_attn_branch_norm(f(b.self_attn_pre_norm(x)))
    return x + b.mlp_branch_norm(g(b.mlp_pre_norm(x)))


def deepnorm(b, f, g, x):
    alpha = (2 * 3) ** 0.25
    x = b.self_attn_post_norm(x * alpha + f(x))
    return b.mlp_post_norm(x * alpha + g(x))


def deepnorm_given(b, f, g, x):
    x = b.self_attn_post_norm(x * 1.7 + f(x))
    return b.mlp_post_norm(x * 1.7 + g(x))


def shared_norm(b, f, g, x):
    y = b.self_attn_pre_norm(x)
    return (f(y) + g(y)) + x


def shared_norm_residual_first(b, f, g, x):
    y = b.self_attn_pre_norm(x)
    return (x + f(y)) + g(y)


def two_norms(b, f, g, x):
    return (f(b.self_attn_pre_norm(x)) + g(b.mlp_pre_norm(x))) + x


def parallel_sandwich(b, f, g, x):
    attention = b.self_attn_branch_norm(f(b.self_attn_pre_norm(x)))
    return (attention + b.mlp_branch_norm(g(b.mlp_pre_norm(x)))) + x


def parallel_multiplier(b, f, g, x):
    y = b.self_attn_pre_norm(x)
    return (f(y) * 0.3 + g(y) * 0.3) + x


def residual_from_norm(b, f, g, x):
    y = b.self_attn_pre_norm(x)
    x = y + f(y)
    y = b.mlp_pre_norm(x)
    return y + g(y)


def sandwich_residual_from_norm(b, f, g, x):
    y = b.self_attn_pre_norm(x)
    x = y + b.self_attn_branch_norm(f(y))
    y = b.mlp_pre_norm(x)
    return y + b.mlp_branch_norm(g(y))


def multiplier(b, f, g, x):
    x = x + f(b.self_attn_pre_norm(x)) * 0.3
    return x + g(b.mlp_pre_norm(x)) * 0.3


def post_multiplier(b, f, g, x):
    x = b.self_attn_post_norm(x + f(x) * 0.3)
    return b.mlp_post_norm(x + g(x) * 0.3)


def learned_scale(b, f, g, x):
    x = x + b.self_attn_residual.scale * f(b.self_attn_pre_norm(x))
    return x + b.mlp_residual.scale * g(b.mlp_pre_norm(x))


def parallel_learned_scale(b, f, g, x):
    y = b.self_attn_pre_norm(x)
    return (b.self_attn_residual.scale * f(y) + b.mlp_residual.scale * g(y)) + x


FORMULAS = {
    pre: {},
    post: {"norm_placement": "post"},
    branch: {"norm_placement": "branch"},
    sandwich: {"norm_placement": "sandwich"},
    deepnorm: {"norm_placement": "deepnorm"},
    deepnorm_given: {"norm_placement": "deepnorm", "deepnorm_alpha": 1.7},
    shared_norm: {"parallel_block": "shared_norm"},
    shared_norm_residual_first: {"parallel_block": "shared_norm", "parallel_sum_order": "residual_first"},
    two_norms: {"parallel_block": "two_norms"},
    parallel_sandwich: {"parallel_block": "two_norms", "norm_placement": "sandwich"},
    parallel_multiplier: {"parallel_block": "shared_norm", "residual_multiplier": 0.3},
    residual_from_norm: {"residual_from_norm": True},
    sandwich_residual_from_norm: {"residual_from_norm": True, "norm_placement": "sandwich"},
    multiplier: {"residual_multiplier": 0.3},
    post_multiplier: {"residual_multiplier": 0.3, "norm_placement": "post"},
    learned_scale: {"learned_scale_type": "channel"},
    parallel_learned_scale: {"learned_scale_type": "scalar", "parallel_block": "shared_norm"},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.__name__)
def test_block_is_its_formula(formula, norm_type, dtype):
    """Bit for bit: the order of additions is part of the formula."""
    model = model_with(dtype, norm_type=norm_type, **FORMULAS[formula])
    x = states(dtype)
    for block in model.layers:
        expected = formula(block, lambda y, block=block: block.self_attn(y)[0], block.mlp, x)
        assert torch.equal(block(x), expected)
        x = expected


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.__name__)
def test_norms_exist_exactly_where_the_formula_has_them(formula):
    used = {name for name in formula.__code__.co_names if name.endswith("_norm")}
    block = model_with(**FORMULAS[formula]).layers[1]
    norms = {name for name, child in block.named_children() if name.endswith("_norm") and list(child.parameters())}
    assert norms == used


def test_layers_are_applied_in_order_and_then_the_final_norm():
    model = model_with()
    ids = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    x = model.embed_tokens(ids)
    for block in model.layers:
        x = pre(block, lambda y, block=block: block.self_attn(y)[0], block.mlp, x)
    assert torch.equal(model(ids).last_hidden_state, model.norm(x))


@pytest.mark.parametrize(
    ("placement", "expected"),
    [("pre", True), ("branch", True), ("sandwich", True), ("post", False), ("deepnorm", False)],
)
def test_default_final_norm(placement, expected):
    for fields, has_norm in (({}, expected), ({"final_norm": not expected}, not expected)):
        children = dict(model_with(norm_placement=placement, **fields).named_children())
        assert ("norm" in children) is has_norm


def test_first_layer_without_pre_norm():
    model = model_with(first_layer_pre_norm=False)
    block, x = model.layers[0], states()
    assert "self_attn_pre_norm" not in dict(block.named_children())
    assert list(model.layers[1].self_attn_pre_norm.parameters())
    hidden = x + block.self_attn(x)[0]
    assert torch.equal(block(x), hidden + block.mlp(block.mlp_pre_norm(hidden)))


def test_embedding_norm():
    model = model_with(embedding_norm=True)
    seen = {}
    model.layers[0].register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    ids = torch.arange(6)[None]
    model(ids)
    assert torch.equal(seen["x"], model.embedding_norm(model.embed_tokens(ids)))


def test_embedding_norm_before_positions():
    positions = {"position_embedding_type": "learned"}
    model = model_with(embedding_norm=True, embedding_norm_position="before_positions", **positions)
    seen = {}
    model.layers[0].register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    ids = torch.arange(6)[None]
    model(ids)
    assert torch.equal(seen["x"], model.token_norm(model.embed_tokens(ids)) + model.embed_positions.weight[:6])


@pytest.mark.parametrize("kind", ["none", "shared_norm", "two_norms"])
def test_cross_attention_stands_between_the_two(kind):
    model = model_with(is_causal=True, add_cross_attention=True, parallel_block=kind, cross_attention_hidden_size=10)
    b, x = model.layers[0], states()
    source = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(3))
    out = b(x, encoder_hidden_states=source)

    def f(y):
        return b.self_attn(y)[0]

    def c(y):
        return b.cross_attn(y, encoder_hidden_states=source)[0]

    if kind == "none":
        expected = x + f(b.self_attn_pre_norm(x))
        expected = expected + c(b.cross_attn_pre_norm(expected))
        expected = expected + b.mlp(b.mlp_pre_norm(expected))
    else:
        shared = kind == "shared_norm"
        y = b.self_attn_pre_norm(x)
        feed_forward = b.mlp(y if shared else b.mlp_pre_norm(x))
        cross = c(y if shared else b.cross_attn_pre_norm(x))
        expected = f(y) + feed_forward + cross + x
    assert torch.equal(out, expected)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_encoder_equals_torch_transformer_encoder(norm_first, act, implementation):
    """nn.TransformerEncoderLayer with a padding mask, through copied weights."""
    model = model_with(
        norm_type="layernorm", norm_placement="pre" if norm_first else "post", ffn_type="mlp", hidden_act=act,
        mlp_bias=True, attention_bias=True, norm_eps=1e-5, final_norm=False,
        attn_implementation=implementation,
    )  # fmt: skip
    layers = []
    for block in model.layers:
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, dim_feedforward=32, dropout=0.0, activation=act, batch_first=True, norm_first=norm_first
        )
        projections = [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]
        layer.self_attn.in_proj_weight.data.copy_(torch.cat([p.weight for p in projections]))
        layer.self_attn.in_proj_bias.data.copy_(torch.cat([p.bias for p in projections]))
        layer.self_attn.out_proj.load_state_dict(block.self_attn.o_proj.state_dict())
        layer.linear1.load_state_dict(block.mlp.up_proj.state_dict())
        layer.linear2.load_state_dict(block.mlp.down_proj.state_dict())
        slot = "pre_norm" if norm_first else "post_norm"
        layer.norm1.load_state_dict(getattr(block, f"self_attn_{slot}").state_dict())
        layer.norm2.load_state_dict(getattr(block, f"mlp_{slot}").state_dict())
        layers.append(layer.train())
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    x = expected = states()
    for layer in layers:
        expected = layer(expected, src_key_padding_mask=mask == 0)
    real = mask.bool()
    ours = model(inputs_embeds=x, attention_mask=mask).last_hidden_state
    assert (ours[real] - expected[real]).abs().max() < 1e-5 * expected[real].std()


# Initialisation and dropout


def test_deepnorm_alpha_and_beta():
    config = VariantConfig(**{**SIZES, "num_hidden_layers": 18}, norm_placement="deepnorm")
    assert config.deepnorm_alpha == pytest.approx(36**0.25)
    assert config.deepnorm_beta == pytest.approx(144**-0.25)


def test_deepnorm_initialises_with_xavier_gains():
    """Figure 2 of the paper: gain beta for values, outputs and the FFN, 1 for queries and keys."""
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2}
    model = VariantModel(VariantConfig(**sizes, norm_placement="deepnorm", deepnorm_beta=0.4, attention_bias=True))
    for block in model.layers:
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                gain = 1.0 if name.endswith(("q_proj", "k_proj")) else 0.4
                expected = gain * (2 / (module.in_features + module.out_features)) ** 0.5
                assert module.weight.std().item() == pytest.approx(expected, rel=0.03), name
                assert module.bias is None or not module.bias.any()
    assert model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_deepnorm_keeps_the_update_bounded_in_depth():
    """What alpha and beta are for: a 60-layer stack starts close to its input, which Post-LN's does not."""
    sizes = {**SIZES, "num_hidden_layers": 60, "position_embedding_type": "none"}
    ids = torch.randint(0, 40, (4, 16), generator=torch.Generator().manual_seed(0))
    drift = {}
    for placement in ("deepnorm", "post"):
        torch.manual_seed(0)
        model = VariantModel(VariantConfig(**sizes, norm_placement=placement, initializer_range=0.15)).eval()
        hidden = model(ids, output_hidden_states=True).hidden_states
        first, last = hidden[1].flatten(), hidden[-1].flatten()
        drift[placement] = 1 - torch.cosine_similarity(first, last, dim=0).item()
    assert drift["deepnorm"] < 0.5 * drift["post"]


@pytest.mark.parametrize(("kind", "shape", "init"), [("channel", (WIDTH,), 1e-5), ("scalar", (), 0.0)])
def test_learned_scales_start_where_the_papers_do(kind, shape, init):
    torch.manual_seed(0)
    model = VariantModel(VariantConfig(**SIZES, learned_scale_type=kind))
    scales = [module.scale for module in model.modules() if isinstance(module, LearnedScaleResidual)]
    assert len(scales) == 6
    assert all(scale.shape == shape and (scale == init).all() for scale in scales)
    given = VariantModel(VariantConfig(**SIZES, learned_scale_type=kind, layer_scale_init=0.25))
    assert given.layers[0].mlp_residual.scale.unique().tolist() == [0.25]


def test_rezero_starts_as_the_identity():
    torch.manual_seed(0)
    model = VariantModel(VariantConfig(**SIZES, learned_scale_type="scalar")).eval()
    x = states()
    for block in model.layers:
        assert torch.equal(block(x, position_embeddings=(torch.ones(1, 6, 6), torch.zeros(1, 6, 6))), x)


@pytest.mark.parametrize("parallel", ["none", "shared_norm"])
@pytest.mark.parametrize("scale", ["none", "channel"])
def test_residual_dropout_acts_on_branches_in_training_only(parallel, scale):
    model = model_with(residual_dropout=0.5, parallel_block=parallel, learned_scale_type=scale)
    block, x = model.layers[0], states()
    assert torch.equal(block(x), block(x))
    block.train()
    block.self_attn.o_proj.weight.data.zero_()
    block.mlp.down_proj.weight.data.zero_()
    assert torch.equal(block(x), x)  # the residual itself is never dropped
    branch = torch.ones(64, WIDTH)
    dropped = block.mlp_residual.scale_branch(branch) == 0
    assert 0.4 < dropped.float().mean() < 0.6


def test_residual_options():
    residual, branch = torch.full((2, 3), 2.0), torch.full((2, 3), 5.0)
    assert torch.equal(Residual().add(residual, branch), residual + branch)
    assert torch.equal(Residual(branch_multiplier=0.5).add(residual, branch), residual + 2.5)
    assert torch.equal(Residual(residual_scale=3.0).add(residual, branch), 6.0 + branch)
    assert torch.equal(LearnedScaleResidual((3,), init=0.1).add(residual, branch), residual + 0.1 * branch)
