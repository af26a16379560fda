"""Positions against the transformers modules that have the same ones, and against the papers' formulas."""

import math

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    Gemma3TextConfig,
    GlmConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    Ministral3Config,
    NanoChatConfig,
    Olmo2Config,
)
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as build_bloom_alibi
from transformers.models.cohere import modeling_cohere
from transformers.models.ctrl.modeling_ctrl import positional_encoding
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as build_falcon_alibi
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.glm import modeling_glm
from transformers.models.hunyuan_v1_dense import modeling_hunyuan_v1_dense
from transformers.models.llama import modeling_llama
from transformers.models.m2m_100.modeling_m2m_100 import M2M100SinusoidalPositionalEmbedding
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.ministral3 import modeling_ministral3
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from transformers.models.nanochat import modeling_nanochat
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings
from transformers.models.t5.modeling_t5 import T5Attention

from hf_variants import (
    VariantConfig,
    VariantForCausalLM,
    VariantForConditionalGeneration,
    VariantModel,
    VariantSeq2SeqConfig,
)
from hf_variants.model.builder import build_rotation, rotary_embedding_parts
from hf_variants.model.positions import (
    AlibiBias,
    GrowingSinusoidalPositions,
    InputIdPositions,
    LearnedPositions,
    RelativeBias,
    RotaryEmbedding,
    alibi_slopes,
    attention_mask_positions,
    relative_position_bucket,
    restarts,
    sinusoidal_table,
)


HEAD_DIM = 16
SIZES = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": HEAD_DIM,
    "num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 64, "max_position_embeddings": 128,
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)


def variant(**fields):
    return VariantConfig(**{**SIZES, **fields})


def queries_and_keys(length, dtype):
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(2, 4, length, HEAD_DIM, generator=generator) * 5
    key = torch.randn(2, 2, length, HEAD_DIM, generator=generator) * 5
    return query.to(dtype), key.to(dtype)


def rotate_ours(config, query, key, position_ids, layer_idx=0):
    part, names = rotary_embedding_parts(config)
    tables = part.build()
    embeddings = tables[names[layer_idx]](query, position_ids)
    return build_rotation(config, config.rope_parameters_of(layer_idx))(query, key, embeddings)


def rotate_stock(module, prefix, config, query, key, position_ids):
    cos, sin = getattr(module, f"{prefix}RotaryEmbedding")(config)(query, position_ids)
    return module.apply_rotary_pos_emb(query, key, cos, sin)


def assert_equal(ours, stock):
    for mine, theirs in zip(ours, stock, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


# Rotary positions. The ids start far out, and pass the trained length.


POSITIONS = torch.stack([torch.arange(90), torch.arange(90) * 13 + 1000])

STOCK_ROPE = {
    "llama": (modeling_llama, "Llama", LlamaConfig, {}),
    "olmo2": (modeling_olmo2, "Olmo2", Olmo2Config, {"rope_in_float32": True, "rope_table_in_float32": True}),
    "cohere": (modeling_cohere, "Cohere", CohereConfig, {"rope_interleaved": True, "rope_in_float32": True}),
    "nanochat": (modeling_nanochat, "NanoChat", NanoChatConfig, {"rope_reversed": True}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STOCK_ROPE)
def test_rotation_equals_stock(name, dtype):
    module, prefix, config_class, fields = STOCK_ROPE[name]
    rope = {"rope_type": "default", "rope_theta": 50000.0}
    query, key = queries_and_keys(90, dtype)
    ours = rotate_ours(variant(rope_parameters=rope, **fields), query, key, POSITIONS)
    assert_equal(
        ours, rotate_stock(module, prefix, config_class(**SIZES, rope_parameters=rope), query, key, POSITIONS)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_partial_interleaved_rotation_equals_glm(dtype):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    query, key = queries_and_keys(90, dtype)
    ours = rotate_ours(variant(rope_parameters=rope, rope_interleaved=True), query, key, POSITIONS)
    stock = rotate_stock(modeling_glm, "Glm", GlmConfig(**SIZES, rope_parameters=rope), query, key, POSITIONS)
    assert_equal(ours, stock)
    assert torch.equal(ours[0][..., HEAD_DIM // 2 :], query[..., HEAD_DIM // 2 :])


SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "yarn with all options": {
        "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7,
        "mscale_all_dim": 0.9,
    },
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    },
    "longrope": {
        "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + i for i in range(8)], "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("length", [20, 90, 200])
@pytest.mark.parametrize("name", SCALINGS)
def test_scalings_equal_llama(name, length):
    """Before and past the original context; dynamic and longrope change their frequencies there."""
    rope = {"rope_type": name.split()[0], "rope_theta": 10000.0, **SCALINGS[name]}
    config = variant(rope_parameters=dict(rope))
    stock_config = LlamaConfig(**SIZES, rope_parameters=dict(rope))
    query, key = queries_and_keys(length, torch.float32)
    positions = torch.arange(length)[None]
    ours = rotate_ours(config, query, key, positions)
    stock = rotate_stock(modeling_llama, "Llama", stock_config, query, key, positions)
    assert_equal(ours, stock)
    if name != "default":
        plain = rotate_ours(variant(), query, key, positions)
        is_short_dynamic = name == "dynamic" and length <= SIZES["max_position_embeddings"]
        assert torch.equal(ours[0], plain[0]) == is_short_dynamic


def test_dynamic_scaling_recovers_after_a_long_input():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    (ours,), stock = (
        rotary_embedding_parts(variant(num_hidden_layers=1, rope_parameters=dict(rope)))[0].build().values(),
        modeling_llama.LlamaRotaryEmbedding(LlamaConfig(**SIZES, rope_parameters=dict(rope))),
    )
    for length in (50, 300, 200, 400, 30):
        positions = torch.arange(length)[None]
        x = torch.zeros(1)
        assert_equal(ours(x, positions), stock(x, positions))


def test_tables_per_layer_type_equal_gemma3():
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    }
    layers = ["sliding_attention", "full_attention"]
    stock_config = Gemma3TextConfig(**SIZES, layer_types=layers, sliding_window=8, rope_parameters=rope)
    config = variant(layer_types="SF", sliding_window=8, rope_parameters=rope)
    stock = modeling_gemma3.Gemma3RotaryEmbedding(stock_config)
    query, key = queries_and_keys(90, torch.bfloat16)
    for layer_idx, layer_type in enumerate(layers):
        cos, sin = stock(query, POSITIONS, layer_type)
        expected = modeling_gemma3.apply_rotary_pos_emb(query, key, cos, sin)
        assert_equal(rotate_ours(config, query, key, POSITIONS, layer_idx), expected)
    assert len(rotary_embedding_parts(config)[0].children()) == 2


def test_alpha_stretch_equals_hunyuan():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0}
    query, key = queries_and_keys(100, torch.bfloat16)
    positions = torch.arange(100)[None]
    stock_config = HunYuanDenseV1Config(**SIZES, rope_parameters=dict(rope))
    stock = rotate_stock(modeling_hunyuan_v1_dense, "HunYuanDenseV1", stock_config, query, key, positions)
    config = variant(rope_parameters=dict(rope))
    assert_equal(rotate_ours(config, query, key, positions), stock)
    # The base is stretched once, so that the angles stay the same past the trained length.
    (table,) = rotary_embedding_parts(config)[0].build().values()
    base = 10000.0 * 1000.0 ** (HEAD_DIM / (HEAD_DIM - 2))
    angles = torch.arange(300)[:, None] * base ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    cos, _ = table(torch.zeros(1), torch.arange(300)[None])
    assert torch.allclose(cos[0, :, : HEAD_DIM // 2], angles.cos(), atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_query_scale_equals_ministral3(dtype):
    rope = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 32,
        "llama_4_scaling_beta": 0.1, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    }  # fmt: skip
    query, key = queries_and_keys(90, dtype)
    stock_config = Ministral3Config(**SIZES, rope_parameters=dict(rope))
    turned, key_turned = rotate_stock(modeling_ministral3, "Ministral3", stock_config, query, key, POSITIONS)
    scale = modeling_ministral3.get_llama_4_attn_scale(POSITIONS, 0.1, 32)
    ours = rotate_ours(variant(rope_parameters=dict(rope)), query, key, POSITIONS)
    assert_equal(ours, (turned * scale.to(dtype), key_turned))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_the_papers(interleaved):
    """Pair i of position p is turned by p * theta^(-2i/d), as a product of complex numbers."""
    query, key = queries_and_keys(40, torch.float32)
    positions = torch.arange(40)[None] * 3
    ours = rotate_ours(variant(rope_interleaved=interleaved), query, key, positions)
    angles = positions[0].double()[:, None] * 10000.0 ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
    for out, x in zip(ours, (query, key), strict=True):
        x = x.double()
        real, imaginary = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
        turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
        parts = (turned.real, turned.imag)
        expected = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
        assert (out - expected).abs().max() < 1e-5 * expected.std()


def test_scores_depend_on_the_distance_alone():
    query, key = queries_and_keys(1, torch.float64)
    config = variant()
    for distance in (0, 1, 17):
        scores = []
        for start in (0, 5, 40):
            turned, _ = rotate_ours(config, query, key, torch.tensor([[start + distance]]))
            _, key_turned = rotate_ours(config, query, key, torch.tensor([[start]]))
            scores.append((turned[:, :2] * key_turned).sum(-1))
        assert (scores[0] - scores[1]).abs().max() < 1e-4
        assert (scores[0] - scores[2]).abs().max() < 1e-4


def test_layers_without_rotation():
    config = variant(num_hidden_layers=3, no_rope_layers=[1, 0, 1])
    part, names = rotary_embedding_parts(config)
    tables = part.build()
    assert names == ["table_0", None, "table_0"]
    assert len(tables) == 1
    query, key = queries_and_keys(5, torch.float32)
    assert build_rotation(config, config.rope_parameters_of(1))(query, key, None) == (query, key)
    by_type = variant(
        layer_types="SF", sliding_window=4,
        rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": None},
    )  # fmt: skip
    assert by_type.rope_parameters_of(0)["rope_theta"] == 1e4
    assert by_type.rope_parameters_of(1) is None


# Absolute positions


def test_sinusoids_are_the_papers():
    table = sinusoidal_table(700, 24, "interleaved")
    for position in (0, 1, 13, 699):
        for i in range(12):
            angle = position / 10000 ** (2 * i / 24)
            assert table[position, 2 * i] == pytest.approx(math.sin(angle), abs=1e-7)
            assert table[position, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-7)
    halves = sinusoidal_table(700, 24, "half")
    assert torch.equal(halves, torch.cat((table[:, ::2], table[:, 1::2]), dim=1))


def test_half_layout_equals_marian():
    assert torch.equal(sinusoidal_table(600, 32, "half"), MarianSinusoidalPositionalEmbedding(600, 32).create_weight())


@pytest.mark.parametrize(("positions", "dim"), [(64, 32), (64, 48), (300, 1280)])
def test_half_in_float32_equals_ctrl(positions, dim):
    stock = positional_encoding(positions, dim, torch.float)
    assert torch.equal(sinusoidal_table(positions, dim, "half_in_float32"), stock)
    assert not torch.equal(sinusoidal_table(positions, dim, "half"), stock)


def test_tensor2tensor_layout_equals_m2m_100():
    stock = M2M100SinusoidalPositionalEmbedding.get_embedding(600, 32, padding_idx=1)
    assert torch.equal(sinusoidal_table(600, 32, "tensor2tensor", padding_idx=1), stock)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_growing_table_equals_a_long_one(dtype):
    positions = GrowingSinusoidalPositions(4, 8, "tensor2tensor", offset=2, padding_idx=1).to(dtype)
    table = sinusoidal_table(40, 8, "tensor2tensor", padding_idx=1).to(dtype)
    for length in (3, 30, 5):
        added = positions(torch.zeros(1, length, 8, dtype=dtype), torch.arange(length)[None])
        assert torch.equal(added[0], table[2 : length + 2])
    assert positions.weight.shape == (32, 8)
    assert "weight" not in positions.state_dict()


def test_a_stored_table_stays_frozen_and_as_it_is(tmp_path):
    fields = {"position_embedding_type": "sinusoidal", "sinusoidal_table_stored": True}
    model = VariantModel(variant(**fields))
    table = model.embed_positions.weight
    assert torch.equal(table, sinusoidal_table(128, 64, "interleaved"))
    with torch.no_grad():
        table.mul_(2.0)
    model.save_pretrained(tmp_path)
    reloaded = VariantModel.from_pretrained(tmp_path).embed_positions.weight
    assert torch.equal(reloaded, table)
    assert not table.requires_grad
    assert not reloaded.requires_grad


def test_a_rotation_in_the_checkpoint_turns_as_loaded_and_stays_frozen(tmp_path):
    plain, model = (VariantModel(variant(rope_table_in_checkpoint=stored)).eval() for stored in (False, True))
    model.load_state_dict(plain.state_dict(), strict=False)
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    computed, looked_up = (m(ids).last_hidden_state for m in (plain, model))
    assert torch.allclose(computed, looked_up, atol=1e-5)
    table = model.rotary_emb["table_0"].weight
    with torch.no_grad():
        table.copy_(table.flip(0))
    model.save_pretrained(tmp_path)
    loaded = VariantModel.from_pretrained(tmp_path).eval()
    assert not loaded.rotary_emb["table_0"].weight.requires_grad
    assert torch.equal(model(ids).last_hidden_state, loaded(ids).last_hidden_state)
    assert not torch.allclose(computed, loaded(ids).last_hidden_state, atol=1e-2)


def test_learned_positions_with_an_offset_equal_opt():
    ours, stock = LearnedPositions(20, 8, offset=2), OPTLearnedPositionalEmbedding(20, 8)
    assert ours.weight.shape == stock.weight.shape
    stock.load_state_dict(ours.state_dict())
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    embeddings = torch.randn(2, 5, 8)
    positions = attention_mask_positions(None, embeddings, mask, 0)
    assert torch.equal(ours(embeddings, positions), embeddings + stock(mask, 0))


def test_positions_counted_from_input_ids_equal_roberta():
    ids = torch.tensor([[5, 6, 7, 1, 1], [1, 1, 8, 9, 5]])
    expected = RobertaEmbeddings.create_position_ids_from_input_ids(ids, 1)
    assert torch.equal(InputIdPositions(1)(ids, torch.zeros(2, 5, 4), None, 0), expected)
    embeddings = torch.zeros(2, 5, 4)
    assert InputIdPositions(1)(None, embeddings, None, 0).tolist() == [[2, 3, 4, 5, 6]]


@pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
def test_positions_are_added_to_the_embeddings(kind):
    torch.manual_seed(0)
    model = VariantModel(variant(position_embedding_type=kind, position_offset=2)).eval()
    seen = {}
    model.layers[0].register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    ids = torch.randint(0, 64, (1, 7))
    model(ids)
    assert torch.equal(seen["x"], model.embed_tokens(ids) + model.embed_positions.weight[2:9])


# Biases on the scores


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 13, 16, 24, 40])
@pytest.mark.parametrize("bias_max", [8, 4])
def test_alibi_slopes(heads, bias_max):
    """The geometric sequence of the paper; from the next higher power for counts that are no power of two."""
    power = 2 ** math.floor(math.log2(heads))
    expected = [2 ** (-bias_max * (i + 1) / power) for i in range(power)]
    expected += [2 ** (-bias_max * (2 * i + 1) / (2 * power)) for i in range(heads - power)]
    assert alibi_slopes(heads, bias_max).tolist() == pytest.approx(expected, rel=1e-6)
    if power == heads:
        assert torch.allclose(alibi_slopes(heads, bias_max, "mpt"), alibi_slopes(heads, bias_max), rtol=1e-6)


def alibi(heads, form, order="paper", in_bfloat16=False, bias_max=8):
    return AlibiBias(heads, bias_max, order=order, form=form, in_bfloat16=in_bfloat16)


def compute(bias, length, padding_mask=None):
    return bias.compute(length, 0, length, 0, padding_mask, torch.device("cpu"), 0)


@pytest.mark.parametrize("heads", [4, 6, 12])
def test_alibi_equals_bloom(heads):
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    stock = build_bloom_alibi(mask, heads, torch.float32).view(2, heads, 1, 8)
    assert torch.equal(compute(alibi(heads, "key_position"), 8, mask), stock)


@pytest.mark.parametrize("heads", [4, 6, 12])
@pytest.mark.parametrize("bias_max", [8, 5])
def test_alibi_equals_mpt(heads, bias_max):
    stock = build_mpt_alibi_tensor(heads, 9, bias_max)
    assert torch.equal(compute(alibi(heads, "key_offset", "mpt", bias_max=bias_max), 9)[0], stock)


@pytest.mark.parametrize("heads", [4, 6, 12])
def test_alibi_equals_falcon(heads):
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    stock = build_falcon_alibi(mask, heads, torch.bfloat16).view(2, heads, 1, 8)
    assert torch.equal(compute(alibi(heads, "key_position", in_bfloat16=True), 8, mask), stock)


def test_alibi_distance():
    bias = compute(alibi(2, "distance"), 5)
    assert bias[0, 0, 4].tolist() == [-4 / 16, -3 / 16, -2 / 16, -1 / 16, 0]
    assert bias[0, 1, 2].tolist() == [-2 / 256, -1 / 256, 0, -1 / 256, -2 / 256]


def test_alibi_forms_agree_after_the_softmax():
    heads, length = 6, 9
    causal = torch.full((length, length), float("-inf")).triu(1)
    weights = [
        (compute(alibi(heads, form).double(), length) + causal).softmax(-1)
        for form in ("distance", "key_position", "key_offset")
    ]
    assert (weights[0] - weights[1]).abs().max() < 1e-6
    assert (weights[0] - weights[2]).abs().max() < 1e-6


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 20), (8, 64), (6, 11)])
def test_relative_buckets_equal_t5(buckets, max_distance, bidirectional):
    relative = torch.arange(-600, 601)
    ours = relative_position_bucket(relative, bidirectional, buckets, max_distance)
    stock = T5Attention._relative_position_bucket(relative, bidirectional, buckets, max_distance)
    assert torch.equal(ours, stock)
    assert ours.min() == 0
    assert ours.max() == buckets - 1


def test_relative_bias_is_a_table_lookup_by_bucket():
    bias = RelativeBias(3, num_buckets=8, max_distance=16, bidirectional=True, num_tables=2)
    hidden = torch.zeros(2, 7, 4)
    biases = bias(hidden, None, None, ["full_attention", "full_attention"])
    relative = torch.arange(7)[None] - torch.arange(7)[:, None]
    buckets = T5Attention._relative_position_bucket(relative, True, 8, 16)
    for layer in range(2):
        assert biases[layer].shape[-3:] == (3, 7, 7)
        for head in range(3):
            assert torch.equal(biases[layer][-1, head], bias.tables[str(layer)].weight[buckets, head])


@pytest.mark.parametrize("make_cache", [
    lambda config: DynamicCache(config=config),
    lambda config: StaticCache(config=config, max_cache_len=32),
], ids=["dynamic", "static"])  # fmt: skip
@pytest.mark.parametrize("kind", ["alibi", "relative_bias"])
@pytest.mark.parametrize("form", ["distance", "key_position", "key_offset"])
def test_bias_with_a_cache_is_a_slice_of_that_without(kind, form, make_cache):
    """Token by token, in full and sliding layers, through the window and past it."""
    if kind == "relative_bias":
        form = "distance"
    torch.manual_seed(0)
    config = variant(position_embedding_type=kind, alibi_form=form, layer_types="SF", sliding_window=5)
    model = VariantModel(config).eval()
    for table in getattr(model.position_bias, "tables", {}).values():
        nn.init.normal_(table.weight, std=3.0)
    ids = torch.randint(0, 64, (2, 14))
    expected = model(ids, use_cache=False).last_hidden_state
    cache = make_cache(config)
    with torch.no_grad():
        parts = [model(part, past_key_values=cache, use_cache=True).last_hidden_state
                 for part in ids.split([6, 1, 1, 1, 1, 4], dim=1)]  # fmt: skip
    assert (torch.cat(parts, 1) - expected).abs().max() < 1e-5 * expected.std()


def test_rotary_buffers_and_slopes_survive_loading(tmp_path):
    """`from_pretrained` leaves memory garbage in buffers that are not saved, unless they are recomputed."""
    torch.manual_seed(0)
    rope = {"rope_type": "llama3", "rope_theta": 1e4, **SCALINGS["llama3"]}
    for fields in (
        {"rope_parameters": rope},
        {"position_embedding_type": "alibi", "num_attention_heads": 3, "num_key_value_heads": 3},
        {"position_embedding_type": "sinusoidal"},
        {"embedding_multiplier": 8.0, "embedding_multiplier_in_weight_dtype": True},
    ):
        model = VariantModel(variant(**fields))
        model.save_pretrained(tmp_path / "model")
        loaded = VariantModel.from_pretrained(tmp_path / "model")
        buffers = dict(model.named_buffers())
        for name, value in loaded.named_buffers():
            assert torch.equal(value, buffers[name]), name
        ids = torch.arange(20)[None]
        assert torch.equal(model.eval()(ids).last_hidden_state, loaded(ids).last_hidden_state)


TABLES = {
    "learned": {"position_embedding_type": "learned"},
    "sinusoidal": {"position_embedding_type": "sinusoidal"},
    "opt": {"position_embedding_type": "learned", "position_ids_source": "attention_mask", "position_offset": 2},
    "gptj": {"rope_table_stored": True},
    "roformer": {"rope_table_in_checkpoint": True, "rope_turns_values": True},
}


@pytest.mark.parametrize("kind", TABLES)
def test_an_input_longer_than_the_table_is_an_error_that_names_it(kind):
    """By the shapes alone, as on an accelerator, where a wrong index kills the process; by the ids in generation."""
    model = VariantForCausalLM(variant(max_position_embeddings=12, eos_token_id=None, **TABLES[kind])).eval()
    ids = torch.randint(3, 64, (1, 13))
    for passed in ({}, {"attention_mask": torch.ones_like(ids)}, {"position_ids": torch.arange(13)[None]}):
        with pytest.raises(ValueError, match="max_position_embeddings"):
            model(ids, **passed)
    cache = model(ids[:, :8]).past_key_values
    with pytest.raises(ValueError, match="13 tokens and a table of 12"):
        model(ids[:, 8:], past_key_values=cache)
    greedy = {"do_sample": False, "max_new_tokens": 9}
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        with pytest.raises(ValueError, match="max_position_embeddings"):
            model.generate(ids[:, :5], **greedy, **options)
    # The last token is never read; padding takes no position.
    assert model.generate(ids[:, :4], **greedy).shape == (1, 13)
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), ids[:, :4]], 1)
    generated = model.generate(padded, attention_mask=padded.ne(0).long(), **greedy)
    assert torch.equal(generated[:, 6:], model.generate(ids[:, :4], **greedy))


def test_shapes_are_asked_not_the_device():
    """On meta tensors nothing can be read."""
    model = VariantModel(variant(max_position_embeddings=12, position_embedding_type="learned")).to("meta").eval()
    with pytest.raises(ValueError, match="13 tokens and a table of 12"):
        model(inputs_embeds=torch.zeros(2, 13, 64, device="meta"), use_cache=False)


def test_encoders_and_both_stacks_of_an_encoder_decoder_name_their_table():
    learned = {**SIZES, "max_position_embeddings": 12, "position_embedding_type": "learned"}
    ids = torch.randint(3, 64, (1, 13))
    roberta = {"is_causal": False, "pad_token_id": 1, "position_ids_source": "input_ids"}
    encoder = VariantModel(VariantConfig(**learned, **roberta)).eval()
    whole = VariantForConditionalGeneration(VariantSeq2SeqConfig(encoder=learned, decoder=learned)).eval()
    short = ids[:, :4]
    for call in (
        lambda: encoder(ids),
        lambda: encoder(inputs_embeds=torch.zeros(1, 11, 64)),
        lambda: whole(ids, decoder_input_ids=short),
        lambda: whole(short, decoder_input_ids=ids),
    ):
        with pytest.raises(ValueError, match="max_position_embeddings"):
            call()
    assert encoder(torch.cat([ids[:, :10], torch.ones(1, 20, dtype=torch.long)], 1)).last_hidden_state.shape[1] == 30
    longest = encoder(inputs_embeds=torch.zeros(1, 10, 64)).last_hidden_state
    assert longest.shape == (1, 10, 64)


@pytest.mark.parametrize(
    ("positions", "mask", "expected"),
    [
        ([0, 1, 2, 0, 1], None, True),
        ([0, 1, 2, 3, 4], None, False),
        ([0, 1, 2, 0, 1], [1, 1, 1, 1, 1], True),
        # Right padding, numbered on by `generate`.
        ([0, 1, 1, 1, 2], [1, 1, 0, 0, 1], False),
        ([0, 1, 2, 1, 0], [1, 1, 0, 1, 0], False),
        ([0, 0, 0, 1, 2], [0, 0, 1, 1, 1], False),
        ([3, 0, 1, 0, 1], [0, 1, 1, 1, 1], True),
    ],
)
def test_only_adjacent_real_tokens_restart(positions, mask, expected):
    padding_mask = None if mask is None else torch.tensor([mask])
    assert bool(restarts(torch.tensor([positions]), padding_mask)) is expected


@pytest.mark.parametrize("holes", [(5, 6, 7), (2, 3), (0, 4)])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
def test_generation_without_a_cache_takes_any_padding(holes, options):
    """As with one: a hole in the mask is no border of a document."""
    model = VariantForCausalLM(variant(eos_token_id=None, pad_token_id=0)).eval()
    ids = torch.randint(3, 64, (2, 8))
    mask = torch.ones_like(ids)
    mask[0, list(holes)] = 0
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        texts.append(model.generate(ids, attention_mask=mask, max_new_tokens=5, use_cache=use_cache, **options))
    assert torch.equal(*texts)


def test_a_rotary_embedding_is_made_from_a_config_alone():
    config = variant(rope_parameters={"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0})
    x, positions = torch.zeros(1), torch.arange(40)[None]
    table = VariantModel(config).rotary_emb["table_0"]
    assert torch.equal(RotaryEmbedding(config)(x, positions)[1], table(x, positions)[1])
