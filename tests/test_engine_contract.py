"""What serving engines and trainers rely on without calling our heads: names, shapes, keyword arguments, plain modules."""

import inspect

import pytest
import torch
from torch import fx, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_variants import VariantConfig, VariantForCausalLM, VariantModel
from hf_variants.model import normalization
from hf_variants.model.block import Block
from hf_variants.model.normalization import RMSNorm, WeightlessRMSNorm, ZeroCenteredRMSNorm


SIZES = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 64,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
CASES = {
    "plain": {},
    "learned positions": {"position_embedding_type": "learned", "position_offset": 2, "norm_type": "layernorm"},
    "gemma2 without caps": {
        "norm_placement": "sandwich", "norm_unit_offset": True, "norm_casting_mode": "gemma", "layer_types": "SF",
        "sliding_window": 5, "embedding_multiplier": 5.0, "embedding_multiplier_in_weight_dtype": True,
        "tie_word_embeddings": True,
    },
    "caps": {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0, "logit_scale": 1.5},
    "cohere": {
        "norm_type": "layernorm", "norm_bias": False, "norm_casting_mode": "gemma", "parallel_block": "shared_norm",
        "rope_interleaved": True, "rope_in_float32": True, "logit_scale": 0.25, "qk_norm": "per_head",
    },
    "multipliers": {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_scaling": 0.2, "logit_scale": 0.1,
    },
    "head bias": {"lm_head_bias": True, "final_logit_softcapping": 5.0},
    "gates": {"attention_gate": "headwise", "qk_norm": "full", "norm_placement": "branch"},
}  # fmt: skip


def build(case, model_class=VariantForCausalLM, **options):
    torch.manual_seed(0)
    model = model_class._from_config(VariantConfig(**{**SIZES, **CASES[case]}), **options).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def ids(batch=1, length=11):
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_an_engines_attention_function_gets_all_it_needs(case):
    """vLLM and SGLang call the base model so, and compute attention themselves from what the module tells them."""
    calls = []
    softcap = CASES[case].get("attn_logit_softcapping")

    def engine_attention(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=None,
        sliding_window=None,
        attention_instances=None,
        **kwargs,
    ):
        assert attention_mask is None
        assert attention_instances[module.layer_idx] == f"instance {module.layer_idx}"
        assert query.shape == (1, 4, 11, 8)
        assert key.shape == value.shape == (1, 2, 11, 8)
        assert scaling == module.scaling
        assert module.is_causal
        calls.append(module.layer_idx)
        kind = module.config.layer_types[module.layer_idx]
        assert sliding_window == (module.config.sliding_window if kind == "sliding_attention" else None)
        distance = torch.arange(11)[:, None] - torch.arange(11)[None]
        seen = (distance >= 0) & (distance < (sliding_window or 11))
        scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * scaling
        if module.config.attn_logit_softcapping is not None:
            scores = torch.tanh(scores / softcap) * softcap
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return (weights @ value.repeat_interleave(2, 1)).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("engine", engine_attention)
    model = build(case)
    expected = model.model(ids()).last_hidden_state
    served = AutoModel.from_config(model.config, attn_implementation="engine").eval()
    served.load_state_dict(model.model.state_dict())
    out = served(
        input_ids=ids(), position_ids=torch.arange(11)[None], use_cache=False, return_dict=False,
        attention_instances={i: f"instance {i}" for i in range(3)},
    )  # fmt: skip
    assert calls == [0, 1, 2]
    assert isinstance(out, tuple)
    assert (out[0] - expected).abs().max() < 1e-5 * expected.std()
    assert (out[0][0] - expected[0]).abs().max() < 1e-5 * expected.std()


@torch.no_grad()
def test_positions_are_the_ones_given():
    """Engines batch tokens of many requests side by side; index 0 of the batch says nothing about position 0."""
    model, positions = build("learned positions").model, torch.arange(11)[None] + 20
    seen = {}
    model.layers[0].register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    model(ids(), position_ids=positions, use_cache=False)
    assert torch.equal(seen["x"], model.embed_tokens(ids()) + model.embed_positions.weight[positions + 2])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_follow_from_the_base_model_and_names_in_the_config(case):
    """vLLM, SGLang and TRL rebuild the head from these names; whatever else ours did would be lost there."""
    model = build(case)
    config = model.config.to_dict()
    hidden = model.base_model(ids()).last_hidden_state
    logits = hidden @ model.get_output_embeddings().weight.T
    if model.get_output_embeddings().bias is not None:
        logits = logits + model.lm_head.bias
    logits = logits * config["logit_scale"]
    if config["final_logit_softcapping"] is not None:
        logits = torch.tanh(logits / config["final_logit_softcapping"]) * config["final_logit_softcapping"]
    expected = model(ids()).logits
    assert (logits - expected).abs().max() < 1e-5 * expected.std()


def test_the_config_has_the_names_that_engines_read():
    config = VariantConfig(**SIZES).to_dict()
    assert not {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings", "layer_types",
        "sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "rope_parameters",
    } - set(config)  # fmt: skip
    for name in ("num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings", "layer_types"):
        assert config[name] is not None


@pytest.mark.parametrize(("case", "name"), [("gemma2 without caps", "embed_scale"), ("multipliers", "embed_scale")])
@torch.no_grad()
def test_an_engines_embedding_finds_the_scale(case, name):
    """Engines replace the embedding module by a sharded one, times its `embed_scale`."""
    embedding = build(case).model.embed_tokens
    expected = nn.functional.embedding(ids(), embedding.weight) * float(getattr(embedding, name))
    assert torch.allclose(embedding(ids()), expected)


def test_one_argument_tells_which_norm_it_is():
    """SGLang probes `cls(1)` of classes whose name ends in RMSNorm: a weight of zero means 1 + w."""
    assert RMSNorm(1).weight.tolist() == [1.0]
    assert ZeroCenteredRMSNorm(1).weight.tolist() == [0.0]
    assert RMSNorm(1).with_scale
    assert not WeightlessRMSNorm(1).with_scale
    for name, cls in inspect.getmembers(normalization, inspect.isclass):
        if name.endswith("RMSNorm"):
            assert issubclass(cls, RMSNorm)
            assert isinstance(cls(1).eps, float)


@pytest.mark.parametrize("case", CASES)
def test_modules_are_plain(case):
    """Quantizers and PEFT look for exactly `nn.Linear`, pipelines for the one list of layers."""
    model = build(case)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert type(module) is nn.Linear, name
    lists = [name for name, module in model.model.named_modules() if isinstance(module, nn.ModuleList)]
    assert lists == ["layers"]
    assert all(isinstance(layer, Block) for layer in model.model.layers)
    children = [name for name, _ in model.model.named_children()]
    assert len(children) == len(set(children))
    assert model.get_decoder() is model.model
    assert model.base_model is model.model
    assert type(model.get_output_embeddings()) is nn.Linear
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model._supports_attention_backend


def operations(module):
    graph = fx.symbolic_trace(module).graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    return inputs, [getattr(node.target, "__name__", node.target) for node in graph.nodes
                    if node.op in ("call_function", "call_method")]  # fmt: skip


def test_norm_forwards_can_be_traced_and_are_straight_lines():
    """vLLM matches the traced graph of a norm's forward, which takes one input, to fuse it."""
    for norm in (RMSNorm(8), ZeroCenteredRMSNorm(8), WeightlessRMSNorm(8), RMSNorm(8, casting_mode="gemma")):
        inputs, names = operations(norm)
        assert len(inputs) == 1
        assert {"pow", "mean", "rsqrt"} <= set(names)
        assert names.count("rsqrt") == 1
        assert isinstance(norm.eps, float)
    # The plain one traces as Llama's does, so that whatever fuses Llama's fuses ours.
    assert operations(RMSNorm(8))[1] == operations(LlamaRMSNorm(8))[1]


@pytest.mark.parametrize("fields", [{}, {"ffn_type": "mlp"}, {"mlp_bias": True, "hidden_act": "gelu"}], ids=str)
def test_feed_forward_can_be_traced(fields):
    model = VariantModel(VariantConfig(**{**SIZES, **fields}))
    inputs, _ = operations(model.layers[0].mlp)
    assert len(inputs) == 1


def test_names_that_adapters_and_quantizers_use_as_an_interface():
    names = {name for name, module in build("plain").named_modules() if isinstance(module, nn.Linear)}
    expected = {f"model.layers.{i}.{leaf}" for i in range(3) for leaf in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
        "mlp.up_proj", "mlp.down_proj",
    )}  # fmt: skip
    assert names == expected | {"lm_head"}
    assert type(AutoModelForCausalLM.from_config(VariantConfig(**SIZES))) is VariantForCausalLM


@torch.no_grad()
def test_unknown_keywords_reach_the_attention_function():
    """Packing passes `cu_seq_lens_q` and its kind through every module down to the kernel."""
    seen = []

    def record(module, query, key, value, attention_mask, cu_seq_lens_q=None, max_length_q=None, **kwargs):
        seen.append((cu_seq_lens_q, max_length_q))
        return query.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("recorder", record)
    model = build("cohere", attn_implementation="recorder")
    lengths = torch.tensor([0, 5, 11])
    model(ids(), cu_seq_lens_q=lengths, max_length_q=6)
    assert len(seen) == 3
    assert all(given is lengths and longest == 6 for given, longest in seen)
