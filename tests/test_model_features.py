"""What users of transformers expect of any model, over configs that cover the axes: caches, generation, training, saving."""

import copy
import json
import re
from unittest.mock import Mock

import pytest
import torch
import transformers
from packaging import version
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    CompileConfig,
)
from transformers.cache_utils import DynamicCache, StaticCache

from hf_variants import (
    VariantConfig,
    VariantForCausalLM,
    VariantForMultipleChoice,
    VariantForNextSentencePrediction,
    VariantForQuestionAnswering,
    VariantForSequenceClassification,
    VariantForTokenClassification,
    VariantModel,
)
from hf_variants.model.block import Block


SIZES = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 64,
    "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip

# Between them they have every axis that a cache, a mask or a position goes through.
CASES = {
    "plain": {},
    "gpt2": {
        "norm_type": "layernorm", "position_embedding_type": "learned", "ffn_type": "mlp", "hidden_act": "gelu_new",
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
    },
    "gemma2": {
        "norm_placement": "sandwich", "norm_unit_offset": True, "norm_casting_mode": "gemma", "layer_types": "SF",
        "sliding_window": 5, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0, "embedding_multiplier": 5.0,
        "embedding_multiplier_in_weight_dtype": True, "tie_word_embeddings": True,
    },
    "cohere": {
        "norm_type": "layernorm", "norm_bias": False, "norm_casting_mode": "gemma", "parallel_block": "shared_norm",
        "rope_interleaved": True, "rope_in_float32": True, "logit_scale": 0.5, "qk_norm": "per_head",
        "layer_types": "SF", "sliding_window": 5, "no_rope_layers": [1, 0, 1],
    },
    "opt": {
        "norm_type": "layernorm", "position_embedding_type": "learned", "position_offset": 2, "embedding_size": 16,
        "output_projection": True, "position_ids_source": "attention_mask", "scale_query": True, "ffn_type": "mlp",
    },
    "alibi": {"position_embedding_type": "alibi", "layer_types": "SF", "sliding_window": 5, "embedding_norm": True},
    "bloom": {"position_embedding_type": "alibi", "alibi_form": "key_position"},
    "t5 decoder": {"position_embedding_type": "relative_bias", "relative_attention_max_distance": 40},
    "sinks": {"attention_sinks": True, "attention_gate": "headwise", "layer_types": "FS", "sliding_window": 5},
    "gates and sub-norms": {
        "attention_gate": "elementwise", "attention_sub_norm": True, "ffn_sub_norm": True, "qk_norm": "full",
        "norm_placement": "branch", "learned_scale_type": "channel", "layer_scale_init": 0.5, "clip_qkv": 2.0,
    },
    "deepnorm": {"norm_placement": "deepnorm", "position_embedding_type": "sinusoidal"},
    "heterogeneous": {
        "per_layer_config": {
            1: {"num_key_value_heads": 4, "intermediate_size": 16, "skip": ["mlp"]}, 2: {"skip": ["self_attn"]},
        },
    },
}  # fmt: skip


# Before 5.23 transformers could not shorten the cache of a layer without attention.
IS_OLD = version.parse(transformers.__version__) < version.parse("5.23")


def build(case="plain", model_class=VariantForCausalLM, implementation=None, **fields):
    """A tiny model whose logits are far from uniform, and whose every weight matters."""
    torch.manual_seed(0)
    config = VariantConfig(**{**SIZES, **CASES[case], **fields})
    options = {} if implementation is None else {"attn_implementation": implementation}
    return randomise(model_class._from_config(config, **options)).eval()


def randomise(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        spread = 0.3 if parameter.ndim > 1 else 0.5
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


def ids(batch=2, length=12, seed=3):
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_close(out, expected, tolerance=1e-5):
    assert out.shape == expected.shape
    assert (out - expected).abs().max() < tolerance * expected.std()


def greedy(model, tokens, new=9, **options):
    return model.generate(tokens, max_new_tokens=new, do_sample=False, **options)


# Caches and generation


@pytest.mark.parametrize("case", CASES)
def test_cached_generation_equals_recomputation(case):
    """Through the windows and past them, with every kind of cache, beams and assistants."""
    model, tokens = build(case), ids()
    expected = greedy(model, tokens, use_cache=False)
    assert torch.equal(greedy(model, tokens), expected)
    assert torch.equal(greedy(model, tokens, cache_implementation="static"), expected)
    assert torch.equal(greedy(model, tokens, prefill_chunk_size=4), expected)
    if not (IS_OLD and case == "heterogeneous"):
        assert torch.equal(greedy(model, tokens[:1], prompt_lookup_num_tokens=2), expected[:1])
    beams = greedy(model, tokens, num_beams=3, use_cache=False)
    assert torch.equal(greedy(model, tokens, num_beams=3), beams)


@pytest.mark.parametrize("case", CASES)
def test_left_padding_changes_nothing(case):
    model = build(case)
    short, long = ids(1, 7, seed=5), ids(1, 12, seed=6)
    batch = torch.cat((torch.cat((torch.zeros(1, 5, dtype=torch.long), short), 1), long))
    mask = (batch != 0).long()
    expected = [greedy(model, short)[0, 7:], greedy(model, long)[0, 12:]]
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        out = greedy(model, batch, attention_mask=mask, **options)[:, 12:]
        assert torch.equal(out[0], expected[0])
        assert torch.equal(out[1], expected[1])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_token_by_token_equals_one_pass(case):
    model, tokens = build(case), ids()
    expected = model(tokens, use_cache=False).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
        parts = [model(part, past_key_values=cache).logits for part in tokens.split([5, 1, 1, 3, 2], dim=1)]
        assert_close(torch.cat(parts, 1), expected, 2e-5)


def test_sliding_layers_keep_only_their_window():
    cache = build("gemma2")(ids(length=12)).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [4, 12, 4]


def test_the_quantised_cache_as_transformers_offers_it():
    """The quantised cache needs a package of its own; without it transformers says which."""
    model, tokens = build(), ids()
    try:
        out = greedy(model, tokens, cache_implementation="quantized", cache_config={"backend": "quanto", "nbits": 4})
    except ImportError as error:
        message = str(error)
        assert "quanto" in message
    else:
        assert out.shape == (2, 21)


def test_assisted_generation():
    model, tokens = build("gemma2"), ids(1)
    assistant = build("plain")
    assert torch.equal(greedy(model, tokens, assistant_model=assistant), greedy(model, tokens))


def test_sampling_is_reproducible():
    model, tokens = build(), ids()
    samples = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(model.generate(tokens, max_new_tokens=9, do_sample=True, top_k=20, temperature=2.0))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads caches from accelerators only")
def test_offloaded_caches():
    model, tokens = build("gemma2").cuda(), ids().cuda()
    for kind in ("offloaded", "offloaded_static"):
        assert torch.equal(greedy(model, tokens, cache_implementation=kind), greedy(model, tokens))


# Packing


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(case, use_cache):
    model = build(case)
    first, second = ids(1, 7, seed=5), ids(1, 6, seed=6)
    packed = torch.cat((first, second), 1)
    positions = torch.cat((torch.arange(7), torch.arange(6)))[None]
    out = model(packed, position_ids=positions, use_cache=use_cache).logits
    expected = torch.cat((model(first).logits, model(second).logits), 1)
    assert_close(out, expected, 2e-5)
    other = model(torch.cat((ids(1, 7, seed=8), second), 1), position_ids=positions, use_cache=use_cache).logits
    assert torch.equal(other[:, 7:], out[:, 7:])


# Inputs and outputs


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_inputs_embeds(case):
    model, tokens = build(case), ids()
    embeds = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(tokens).logits)
    with pytest.raises(ValueError, match="Pass exactly one"):
        model(tokens, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="Pass exactly one"):
        model()


@torch.no_grad()
def test_logits_to_keep():
    model, tokens = build("gemma2"), ids()
    logits = model(tokens).logits
    assert_close(model(tokens, logits_to_keep=1).logits, logits[:, -1:])
    assert_close(model(tokens, logits_to_keep=4).logits, logits[:, -4:])
    assert_close(model(tokens, logits_to_keep=torch.tensor([0, 5])).logits, logits[:, [0, 5]])
    rows = torch.tensor([[1, 2], [7, 3]])
    assert_close(model(tokens, logits_to_keep=rows).logits, torch.stack((logits[0, rows[0]], logits[1, rows[1]])))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_hidden_states_and_attentions(case):
    model, tokens = build(case, implementation="eager"), ids()
    out = model(tokens, output_hidden_states=True, output_attentions=True)
    attending = sum(hasattr(layer, "self_attn") for layer in model.model.layers)
    assert len(out.hidden_states) == 4
    assert all(states.shape == (2, 12, 32) for states in out.hidden_states[:-1])
    assert len(out.attentions) == attending
    assert all(weights.shape == (2, 4, 12, 12) for weights in out.attentions)
    assert all(not weights.triu(1).any() for weights in out.attentions)
    base = model.model(tokens)
    assert torch.equal(out.hidden_states[-1], base.last_hidden_state)
    assert model(tokens).hidden_states is None
    assert isinstance(model(tokens, return_dict=False), tuple)


# Training


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_gradient_checkpointing_leaves_the_gradients_alone(case, reentrant):
    # A learned bias makes sdpa take one kernel with and another without gradients, which round differently.
    model = build(case, implementation="eager" if case == "t5 decoder" else None).train()
    tokens = ids()

    def gradients():
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    # Before the layer's last product: the second pass ends as soon as it has what the gradient needs.
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    out = gradients()
    assert len(calls) == 2  # once more in the backward pass
    assert out.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(out[name], gradient), name


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case):
    model = build(case).train()
    model(ids(), labels=ids()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("field", [
    "attention_dropout", "residual_dropout", "embedding_dropout", "activation_dropout", "layerdrop",
])  # fmt: skip
def test_regularisation_acts_in_training_only(field):
    model, plain = build(**{field: 0.4}), build()
    model.load_state_dict(plain.state_dict())
    expected = plain(ids()).logits
    assert torch.equal(model(ids()).logits, expected)
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(ids()).logits, expected)
    assert torch.equal(model.eval()(ids()).logits, expected)


def test_layerdrop_drops_whole_layers_at_its_rate():
    model = build(layerdrop=0.3, num_hidden_layers=40).train()
    calls = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    for _ in range(20):
        model(ids(1, 3))
    assert 0.65 < len(calls) / 800 < 0.75


def test_heterogeneous_layers():
    model = build("heterogeneous")
    first, second, third = model.model.layers
    assert hasattr(first, "self_attn")
    assert hasattr(first, "mlp")
    assert not hasattr(second, "mlp")
    assert second.self_attn.k_proj.out_features == 32
    assert not hasattr(third, "self_attn")
    reloaded = VariantConfig.from_dict(model.config.to_dict())
    assert reloaded.per_layer_config[1].num_key_value_heads == 4
    assert reloaded.per_layer_config[1].skip == ["mlp"]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("task", ["sequence", "token", "span"])
def test_task_heads_train(task, causal):
    model_class = {
        "sequence": VariantForSequenceClassification, "token": VariantForTokenClassification,
        "span": VariantForQuestionAnswering,
    }[task]  # fmt: skip
    torch.manual_seed(0)
    model = model_class(VariantConfig(**SIZES, num_labels=3, is_causal=causal))
    tokens = ids(6)
    targets = {
        "sequence": {"labels": tokens[:, -1] % 3},
        "token": {"labels": tokens % 3},
        "span": {"start_positions": tokens[:, 0] % 12, "end_positions": tokens[:, 1] % 12},
    }[task]
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(25):
        loss = model(tokens, **targets).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("model_class", [VariantForSequenceClassification, VariantForTokenClassification,
                                         VariantForQuestionAnswering])  # fmt: skip
def test_task_heads_have_the_width_of_the_stacks_output(model_class):
    assert build("opt", model_class)(ids())[0].shape[0] == 2


# Weights: tying, resizing, saving, loading


@pytest.mark.parametrize("case", ["gpt2", "gemma2"])
def test_tied_weights_are_saved_once(case, tmp_path):
    model = build(case)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in list(file.keys())
    loaded = VariantForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    assert build("plain").lm_head.weight is not build("plain").model.embed_tokens.weight


@pytest.mark.parametrize("case", CASES)
def test_save_and_load_are_exact(case, tmp_path):
    model = build(case)
    model.save_pretrained(tmp_path)
    loaded, report = VariantForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded.config) is VariantConfig
    ours, theirs = ({k: v for k, v in config.to_dict().items() if k != "_name_or_path"}
                    for config in (model.config, loaded.config))  # fmt: skip
    assert ours == theirs
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_loading_in_bfloat16_equals_casting(tmp_path):
    for case in ("gemma2", "alibi", "deepnorm"):
        model = build(case)
        model.save_pretrained(tmp_path / case)
        loaded = VariantForCausalLM.from_pretrained(tmp_path / case, dtype=torch.bfloat16)
        assert all(parameter.dtype == torch.bfloat16 for parameter in loaded.parameters())
        # What is computed from positions stays in float32 until it meets the activations.
        assert all(buffer.dtype == torch.float32 for buffer in loaded.buffers() if buffer.is_floating_point())
        cast = copy.deepcopy(model).to(torch.bfloat16)
        for name, value in cast.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)
        assert torch.isfinite(loaded(ids()).logits).all()


def test_a_device_map_and_the_meta_device(tmp_path):
    model = build("gemma2")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = VariantForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    with torch.device("meta"):
        empty = VariantForCausalLM(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    devices = {name: "cpu" for name, module in model.model.named_children() if list(module.parameters())}
    del devices["layers"]
    devices |= {"layers.0": "cpu", "layers.1": "disk", "layers.2": "cpu"}
    offloaded = VariantForCausalLM.from_pretrained(
        tmp_path, offload_folder=str(tmp_path / "offload"),
        device_map={"lm_head": "cpu"} | {f"model.{name}": device for name, device in devices.items()},
    )  # fmt: skip
    assert torch.equal(offloaded(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("case", ["plain", "gpt2", "gemma2", "opt"])
def test_resizing_the_vocabulary(case):
    model = build(case, lm_head_bias=not CASES[case].get("tie_word_embeddings", False))
    embedding_class = type(model.model.embed_tokens)
    expected = model(ids()).logits
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == model.vocab_size == 70
    assert type(model.model.embed_tokens) is embedding_class
    logits = model(ids()).logits
    assert logits.shape[-1] == 70
    assert_close(logits[..., :64], expected)
    model.resize_token_embeddings(64)
    assert torch.equal(model(ids()).logits, expected)
    model(ids(), labels=ids()).loss.backward()


def test_initialisation_leaves_nothing_undefined():
    """From the meta device every parameter goes through the initialisation, or would keep what memory held."""
    for case in CASES:
        model = VariantForCausalLM(VariantConfig(**{**SIZES, **CASES[case]}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        for module in model.modules():
            model._init_weights(module)
        for name, parameter in model.named_parameters():
            assert torch.isfinite(parameter).all(), (case, name)


AUTO_CLASSES = {
    AutoModel: VariantModel,
    AutoModelForCausalLM: VariantForCausalLM,
    AutoModelForSequenceClassification: VariantForSequenceClassification,
    AutoModelForMultipleChoice: VariantForMultipleChoice,
    AutoModelForNextSentencePrediction: VariantForNextSentencePrediction,
    AutoModelForTokenClassification: VariantForTokenClassification,
    AutoModelForQuestionAnswering: VariantForQuestionAnswering,
}


def test_auto_classes(tmp_path):
    build().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is VariantConfig
    for auto, expected in AUTO_CLASSES.items():
        assert type(auto.from_pretrained(tmp_path)) is expected
        assert type(auto.from_config(VariantConfig(**SIZES))) is expected
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "hf_variant"


# Compilation and export


@pytest.mark.parametrize("case", ["gemma2", "cohere", "sinks", "gates and sub-norms"])
@torch.no_grad()
def test_the_whole_graph_compiles(case):
    model, tokens = build(case, num_hidden_layers=2, no_rope_layers=None), ids()
    expected = model(tokens, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(tokens, use_cache=False).logits, expected)


# A sliding cache layer has three states of its own: filling, full, and the step between.
@pytest.mark.parametrize(("case", "graphs"), [("plain", 1), ("bloom", 1), ("gemma2", 3)])
def test_decoding_with_a_static_cache_compiles_once(case, graphs):
    model, tokens = build(case, num_hidden_layers=2), ids(1, 3)
    expected = greedy(model, tokens, new=14)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compile_config._compile_all_devices = True
    out = greedy(model, tokens, new=14, cache_implementation="static", compile_config=compile_config)
    assert torch.equal(out, expected)
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= graphs


@torch.no_grad()
def test_export():
    model, tokens = build(), ids()
    exported = torch.export.export(model, (tokens,), {"use_cache": False})
    assert_close(exported.module()(tokens, use_cache=False).logits, model(tokens).logits)


# Parallel plans


def plan_names(model):
    modules = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in model.named_modules()}
    parameters = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in model.named_parameters()}
    return modules | parameters


@pytest.mark.parametrize("case", CASES)
def test_fsdp_plan_names_what_exists(case):
    model = build(case)
    names = plan_names(model) | {name for name, _ in model.model.named_children()}
    for name in [*(getattr(model, "_fsdp_plan", None) or {}), *(model.config.base_model_fsdp_plan or {})]:
        assert name in names or f"model.{name}" in names, name
    assert all(isinstance(layer, Block) for layer in model.model.layers)


def test_attributes_that_answer_to_every_name_can_be_set():
    """As transformers' own tests do, to count the calls of `_gradient_checkpointing_func`."""
    model = VariantForQuestionAnswering(VariantConfig(**SIZES)).train()
    model.gradient_checkpointing_enable()
    model.qa_outputs_mock = Mock()
    for module in model.modules():
        if isinstance(module, (Block, VariantModel)):
            module._gradient_checkpointing_func = Mock(wraps=lambda function, *args: function(*args))
    ids = torch.randint(3, 64, (2, 5))
    model(ids).start_logits.sum().backward()
    assert all(layer._gradient_checkpointing_func.call_count == 1 for layer in model.model.layers)
