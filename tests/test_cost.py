"""What the cost model says from a config alone, against models that are built and run."""

import dataclasses
import json
import random
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import hf_variants
import hf_variants_cli
from hf_variants import VariantConfig
from hf_variants.conversion.errors import ConversionError
from hf_variants.conversion.family import family_of
from hf_variants.conversion.skeleton import empty_model
from hf_variants.cost import Plan, cost
from hf_variants.cost.activations import Kept, activations
from hf_variants.cost.cache import cache_bytes
from hf_variants.cost.compute import backward_flops, forward_flops
from hf_variants.cost.memory import rank_memory
from hf_variants.cost.parameters import count_parameters, structure, weight_bytes, weights
from hf_variants.cost.subject import subject_of
from hf_variants.cost.training_step import step_memory
from hf_variants.model.attention import seen_pairs
from hf_variants.model.block import Block
from hf_variants.model.part import Call

from .native_rows import all_rows
from .strategies import variant_fields
from .test_initialisation import OTHERS, SMALL, config_of


ROWS = all_rows()
HEADS = ("VariantModel", "VariantForSequenceClassification", "VariantForTokenClassification",
         "VariantForQuestionAnswering", "VariantForMultipleChoice", "VariantForNextSentencePrediction")  # fmt: skip
RANDOM = settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
SEQ2SEQ = {
    "plain": {},
    "all its own": {"share_embeddings": False, "unread_shared_embedding": True, "final_logits_bias": True},
    "all shared": {"share_embeddings": True, "tie_word_embeddings": True},
}


def built(config, class_name: str):
    return empty_model(getattr(hf_variants, class_name), config)


def assert_parameters(config, class_name: str | None = None) -> None:
    """Names, shapes and numbers are those of the model that is built."""
    described = structure(config, class_name)
    model = built(config, described.cls.__name__)
    # Each tied weight under all its names.
    named = dict(model.named_parameters(remove_duplicate=False))
    found = weights(described)
    assert [weight.shape for weight in found] == [tuple(named[weight.name].shape) for weight in found]
    assert sorted(id(named[weight.name]) for weight in found) == sorted(map(id, model.parameters()))
    counted = count_parameters(described)
    assert counted.total == sum(counted.by_part.values()) == model.num_parameters()
    assert counted.trainable == model.num_parameters(only_trainable=True)


def language_model(config) -> str:
    return "VariantForCausalLM" if config.is_causal else "VariantForMaskedLM"


@pytest.mark.parametrize("name", [*hf_variants.presets(), *OTHERS])
def test_parameters_of_presets(name):
    config = config_of(name)
    for class_name in (language_model(config), *HEADS):
        assert_parameters(config, class_name)


@RANDOM
@given(variant_fields())
def test_parameters_of_random_configs(fields):
    assert_parameters(VariantConfig(**fields))


def seq2seq(options: dict):
    decoder = {**SMALL, "num_key_value_heads": 2, "head_dim": 6, "qk_norm": "head"}
    return hf_variants.VariantSeq2SeqConfig(encoder=SMALL, decoder=decoder, decoder_start_token_id=1, **options)


@pytest.mark.parametrize("options", SEQ2SEQ.values(), ids=SEQ2SEQ)
def test_parameters_of_two_stacks(options):
    for class_name in ("VariantForConditionalGeneration", "VariantSeq2SeqModel"):
        assert_parameters(seq2seq(options), class_name)


@pytest.mark.parametrize("model_type", ROWS)
def test_parameters_of_native_types(model_type):
    assert_parameters(*native_subject(model_type, 0))


@pytest.mark.whole
@pytest.mark.parametrize("model_type", ROWS)
def test_flops_and_activations_of_native_types(model_type):
    for seed in range(1, 4):
        config, class_name = native_subject(model_type, seed)
        assert_parameters(config, class_name)
        config.pad_token_id = 0 if config.pad_token_id is None else config.pad_token_id
        assert_flops(config, class_name)
        assert_activations(config, class_name, dtypes=("float32",))


def native_subject(model_type: str, seed: int):
    """What stands for a native config of random options, and the class of its model."""
    row = ROWS[model_type]
    native_class = family_of(model_type).config_map.native_class
    return subject_of(native_class(**row.draw(random.Random(f"{model_type}-{seed}"))))


def test_parameters_of_lora_are_those_that_peft_adds():
    from peft import LoraConfig, get_peft_model

    config = VariantConfig(**{**SMALL, "num_key_value_heads": 2})
    model = get_peft_model(hf_variants.VariantForCausalLM(config), LoraConfig(r=3))
    added = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count_parameters(structure(config), lora_rank=3).trainable == added


def counted_flops(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def assert_flops(config, class_name: str | None = None, length: int = 12, **inputs) -> None:
    """Forward and backward, in training. Layers that are dropped at random cost nothing, which is not counted on."""
    stacks = [config.encoder, config.decoder] if config.is_encoder_decoder else [config]
    for stack in stacks:
        stack.layerdrop = 0.0
    described = structure(config, class_name)
    torch.manual_seed(0)
    model = getattr(hf_variants, described.cls.__name__)(config)
    model.set_attn_implementation("eager")
    ids = torch.randint(3, min(stack.vocab_size for stack in stacks), (2, length))
    source = 7 if config.is_encoder_decoder else 0
    if source:
        inputs = {"decoder_input_ids": ids}
        ids = ids[:, :source]
    if described.cls is hf_variants.VariantForMultipleChoice:
        # (batch, length) -> (1, batch, length): the choices of one question
        ids = ids[None]
    call = Call(2, length, source=source)
    expected = forward_flops(described, call).dense
    outputs = []
    assert counted_flops(lambda: outputs.append(model.train()(input_ids=ids, use_cache=False, **inputs))) == expected
    loss = sum(value.float().sum() for value in outputs[0].values() if torch.is_tensor(value) and value.requires_grad)
    assert counted_flops(loss.backward) == backward_flops(described, call)


@pytest.mark.parametrize("name", [*hf_variants.presets(), *OTHERS])
def test_flops_of_presets(name):
    config = config_of(name)
    assert_flops(config, language_model(config), length=6)


@pytest.mark.whole
@pytest.mark.parametrize("name", [*hf_variants.presets(), *OTHERS])
def test_flops_of_heads(name):
    config = config_of(name)
    # Two sequences need to know where each ends.
    config.pad_token_id = 0
    for class_name in HEADS:
        assert_flops(config, class_name)


@RANDOM
@given(variant_fields())
def test_flops_of_random_configs(fields):
    assert_flops(VariantConfig(**fields))


@pytest.mark.parametrize("options", SEQ2SEQ.values(), ids=SEQ2SEQ)
def test_flops_of_two_stacks(options):
    assert_flops(seq2seq(options))


@pytest.mark.whole
@settings(RANDOM, max_examples=500)
@given(variant_fields())
def test_500_random_configs(fields):
    assert_parameters(VariantConfig(**fields))
    assert_flops(VariantConfig(**fields))
    assert_activations(VariantConfig(**fields), dtypes=("float32",))


def kept_bytes(config, class_name: str, dtype: str, checkpointing: bool = False) -> int:
    """What autograd saves in a forward of the whole model."""
    torch.manual_seed(0)
    model = getattr(hf_variants, class_name)(config).to(getattr(torch, dtype)).train()
    model.set_attn_implementation("eager")
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.randint(3, 20, (2, 12))
    inputs = {"input_ids": ids, "labels": ids} if hasattr(model, "lm_head") else {"input_ids": ids}
    if config.is_encoder_decoder:
        inputs = {"input_ids": ids[:, :7], "decoder_input_ids": ids, "labels": ids}
    kept = Kept(model)
    if checkpointing:
        # What it holds without autograd's knowledge: the arguments of layers.
        for module in model.modules():
            if isinstance(module, Block):
                module.register_forward_pre_hook(
                    lambda _, given, named: kept.share(*given, *named.values()), with_kwargs=True
                )
    with kept.watching():
        model(**inputs, use_cache=False)
    return kept.total + sum(
        tensor.untyped_storage().nbytes() for key, tensor in kept.shared.items() if key not in kept.seen
    )


def assert_activations(config, class_name: str | None = None, dtypes: tuple = ("float32", "bfloat16")) -> None:
    described = structure(config, class_name)
    class_name = described.cls.__name__
    call = Call(2, 12, source=7 if config.is_encoder_decoder else 0)
    for dtype in dtypes:
        found = activations(described, call, dtype=dtype, fused=False)
        assert found.total == pytest.approx(kept_bytes(config, class_name, dtype), rel=0.01)
        forward = found.checkpointed - found.per_layer
        assert forward == pytest.approx(kept_bytes(config, class_name, dtype, checkpointing=True), rel=0.01)


@pytest.mark.parametrize("name", [*hf_variants.presets(), *OTHERS])
def test_activations_of_presets(name):
    # Wide enough for what a CPU rounds to 16 bits and other devices do not, the statistics of LayerNorm, to be little.
    config = config_of(name)
    factorised = config.embedding_size != config.hidden_size
    wide = {"hidden_size": 128, "head_dim": 64, "intermediate_size": 96, "embedding_size": 64 if factorised else None}
    assert_activations(VariantConfig.from_dict(config.to_dict() | wide))


@RANDOM
@given(variant_fields(), st.sampled_from([0.0, 0.1]))
def test_activations_of_random_configs(fields, dropout):
    rates = dict.fromkeys(("attention_dropout", "residual_dropout", "activation_dropout"), dropout)
    assert_activations(VariantConfig(**fields, **rates), dtypes=("float32",))


@pytest.mark.parametrize("options", SEQ2SEQ.values(), ids=SEQ2SEQ)
def test_activations_of_two_stacks(options):
    assert_activations(seq2seq(options))


@pytest.mark.parametrize("model_type", ["t5", "m2m_100", "bart", "llama", "bert", "gpt2"])
def test_every_head_of_a_native_type_has_a_cost(model_type):
    """Also where its forward looks at values: at the end of a sequence, at the largest position."""
    family = family_of(model_type)
    for head in family.converted_heads:
        native_class = family.native_class(head)
        config = native_class.config_class(**ROWS[model_type].draw(random.Random(0)))
        config.architectures = [native_class.__name__]
        found = cost(config, batch=2, length=8)
        assert found.class_name == family.variant_class(head).__name__
        assert found.parameters.total > 0 < found.fused_activations.total


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_activations_where_frequencies_follow_the_length(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 2, "long_factor": [2.0] * 2, "original_max_position_embeddings": 64}
    assert_activations(VariantConfig(**SMALL, rope_parameters=rope))


def test_fused_attention_keeps_no_weights_of_attention():
    """https://arxiv.org/abs/2307.08691: queries, keys, values, output, and one number per query and head."""
    config = VariantConfig(**{**SMALL, "num_hidden_layers": 1, "num_key_value_heads": 2})
    call = Call(2, 64)
    eager, fused = (
        activations(structure(config), call, dtype="float32", fused=fused).total for fused in (False, True)
    )
    heads, tokens, width = SMALL["num_attention_heads"], 2 * 64, SMALL["hidden_size"]
    weights, statistics = heads * tokens * 64 * 4, heads * tokens * 4
    # Eager attention copies keys and values for the heads of a group, and the order of its output.
    copies = 4 * tokens * (2 * width // 2)
    assert eager - fused == weights - statistics + copies


def largest_step(config, class_name: str, call: Call, dtype: str, checkpointing: bool) -> int:
    """What torch's allocator has given out at most in a real step, the second one."""
    model = getattr(hf_variants, class_name)(config).to(getattr(torch, dtype)).train()
    model.set_attn_implementation("eager")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(3, 20, (call.batch, call.length))
    inputs = {"input_ids": ids, "labels": ids}
    if config.is_encoder_decoder:
        inputs |= {"input_ids": torch.randint(3, 20, (call.batch, call.source)), "decoder_input_ids": ids}

    def step():
        model(**inputs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return sum(tensor.nbytes for tensor in (*model.parameters(), *states)) + most


LARGE_ENOUGH = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


@pytest.mark.parametrize(("moment", "length", "dtype", "checkpointing"), [
    ("head and loss", 96, "float32", False),
    ("head and loss", 96, "bfloat16", False),
    ("layers, backward", 256, "float32", True),
    ("embeddings", 4, "float32", False),
])  # fmt: skip
def test_a_step_takes_at_most_what_is_said(moment, length, dtype, checkpointing):
    # Windowed and full layers, a tied table, and a head that holds less than layers do.
    config = VariantConfig.from_preset("gemma3", **LARGE_ENOUGH, num_hidden_layers=7, head_dim=16)
    call = Call(4, length)
    found = step_memory(structure(config), call, Plan(checkpointing=checkpointing), dtype, fused=False)
    assert found.moment == moment
    assert found.total == pytest.approx(
        largest_step(config, language_model(config), call, dtype, checkpointing), rel=0.02
    )


def test_a_step_of_an_encoder_and_of_two_stacks():
    encoder = VariantConfig(**LARGE_ENOUGH, num_hidden_layers=3, is_causal=False, residual_dropout=0.1)
    stack = {**LARGE_ENOUGH, "num_hidden_layers": 3, "max_position_embeddings": 64}
    pair = hf_variants.VariantSeq2SeqConfig(encoder=stack, decoder=stack, decoder_start_token_id=1)
    for config, call in ((encoder, Call(4, 48)), (pair, Call(4, 48, source=32))):
        described = structure(config)
        found = step_memory(described, call, Plan(), "float32", fused=False)
        measured = largest_step(config, described.cls.__name__, call, "float32", False)
        assert found.total == pytest.approx(measured, rel=0.02)


def test_a_divided_model_or_adapters_have_no_step_of_one_device():
    config = VariantConfig(**SMALL)
    for options in ({"plan": Plan(fsdp=2)}, {"plan": Plan(dp=2, zero=1)}, {"lora_rank": 4}):
        assert cost(config, length=8, **options).eager_step is None
    optimizers = {
        name: cost(config, length=8, plan=Plan(optimizer=name)) for name in ("sgd", "momentum", "adamw-mixed")
    }
    for found in optimizers.values():
        assert found.fused_step.held == found.memory[0].weights + found.memory[0].optimizer
        assert found.fused_step.total >= found.memory[0].total


def test_layers_that_are_left_out_at_random_are_counted():
    plain, random_ = (
        activations(structure(VariantConfig(**SMALL, layerdrop=rate)), Call(2, 8), dtype="float32")
        for rate in (0.0, 0.9)
    )
    assert plain == random_


def cached_bytes(cache) -> int:
    """What the tensors of a cache hold."""
    if isinstance(cache, EncoderDecoderCache):
        return cached_bytes(cache.self_attention_cache) + cached_bytes(cache.cross_attention_cache)
    states = [state for layer in cache.layers if layer.is_initialized for state in (layer.keys, layer.values)]
    return sum(state.numel() * state.element_size() for state in states)


@RANDOM
@given(variant_fields(), st.integers(1, 14), st.integers(1, 3))
def test_cache_and_flops_of_generation(fields, length, batch):
    config = VariantConfig(**fields)
    described = structure(config)
    model = hf_variants.VariantForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    ids = torch.randint(3, config.vocab_size, (batch, length + 1))
    cache = DynamicCache(config=config)
    with torch.no_grad():
        prefill = counted_flops(lambda: model(input_ids=ids[:, :length], past_key_values=cache, logits_to_keep=1))
        assert prefill == forward_flops(described, Call(batch, length, logits=1)).dense
        expected = cache_bytes(described, length, batch=batch, value_bytes=4)
        assert cached_bytes(cache) == expected.dynamic
        decoded = counted_flops(lambda: model(input_ids=ids[:, length:], past_key_values=cache))
        assert decoded == forward_flops(described, Call(batch, 1, past=length)).dense
        static = StaticCache(config=config, max_cache_len=length + 3)
        model(input_ids=ids, past_key_values=static)
    assert cached_bytes(static) == cache_bytes(described, length + 3, batch=batch, value_bytes=4).static


def test_cache_of_two_stacks():
    config = seq2seq({})
    model = hf_variants.VariantForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    ids = torch.randint(3, 20, (2, 9))
    with torch.no_grad():
        cache = model(input_ids=ids, decoder_input_ids=ids[:, :5], use_cache=True).past_key_values
    assert cached_bytes(cache) == cache_bytes(structure(config), 5, batch=2, source=9, value_bytes=4).dynamic
    described = structure(config)
    call = Call(2, 1, past=5, source=9, source_is_cached=True)
    with torch.no_grad():
        encoded = model.model.encoder(input_ids=ids)
        decoded = counted_flops(
            lambda: model(encoder_outputs=encoded, decoder_input_ids=ids[:, :1], past_key_values=cache)
        )
    assert decoded == forward_flops(described, call).dense


@pytest.mark.parametrize(("is_causal", "window"), [(True, None), (True, 4), (False, None), (False, 4)])
@pytest.mark.parametrize(("past", "length"), [(0, 9), (2, 5), (7, 3), (3, 1), (0, 1)])
def test_pairs_that_a_mask_leaves(is_causal, window, past, length):
    if past and not is_causal:
        return
    fields = {} if window is None else {"layer_types": "S", "sliding_window": window}
    config = VariantConfig(**{**SMALL, "num_hidden_layers": 1, "is_causal": is_causal, **fields})
    config._attn_implementation = "eager"
    model = hf_variants.VariantModel(config).eval()
    mask = {}
    model.layers[0].register_forward_hook(lambda *args: None)
    model.layers[0].register_forward_pre_hook(lambda module, args, kwargs: mask.update(kwargs), with_kwargs=True)
    ids = torch.randint(3, 20, (1, past + length))
    cache = DynamicCache(config=config) if is_causal else None
    with torch.no_grad():
        if past:
            model(input_ids=ids[:, :past], past_key_values=cache)
        model(input_ids=ids[:, past:], past_key_values=cache)
    left = mask["attention_mask"]
    given_window = model.layers[0].self_attn.sliding_window
    call = Call(1, length, past=past)
    pairs = seen_pairs(dataclasses.replace(call, masked=True), is_causal, given_window)
    dense = seen_pairs(call, is_causal, given_window)
    if left is None:
        assert pairs == dense
    else:
        assert (dense, pairs) == (left.numel(), int((left == 0).sum()))


@pytest.mark.parametrize("window", [2, 5, 16, 17])
@pytest.mark.parametrize("block", [1, 4, 16])
def test_blocks_that_a_window_touches(window, block):
    config = VariantConfig(**{**SMALL, "num_hidden_layers": 1, "layer_types": "S", "sliding_window": window})
    width = 2 * SMALL["hidden_size"] * 2
    most = 0
    for length in range(1, 80):
        paged = cache_bytes(structure(config), length, block_size=block).paged // width // block
        last = length - 1
        touched = last // block - max(last - window + 1, 0) // block + 1
        assert touched <= paged
        most = max(most, paged - touched)
    # Nothing is reserved that no position needs.
    assert most == 0 or any(
        (length - 1) // block - max(length - window, 0) // block + 1
        == cache_bytes(structure(config), length, block_size=block).paged // width // block
        for length in range(60, 80)
    )


def test_bytes_of_weights():
    config = VariantConfig(**SMALL, tie_word_embeddings=True)
    described = structure(config)
    sizes = weight_bytes(described)
    model = hf_variants.VariantForCausalLM(config)
    for dtype in ("float32", "bfloat16", "float16"):
        model.to(getattr(torch, dtype))
        assert sizes[dtype] == sum(parameter.nbytes for parameter in model.parameters())
    assert sizes["int4"] < sizes["int8"] < sizes["bfloat16"]


def test_bytes_of_what_stays_in_float32(tmp_path):
    config = VariantConfig(**SMALL, ffn_output_in_float32=True)
    hf_variants.VariantForCausalLM(config).save_pretrained(tmp_path)
    model = hf_variants.VariantForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert weight_bytes(structure(config))["float16"] == sum(parameter.nbytes for parameter in model.parameters())


# Published sizes: fields, the model's parameters, and where they are said.
LLAMA = {"position_embedding_type": "rope", "vocab_size": 32000, "max_position_embeddings": 4096}
LLAMA_3 = {**LLAMA, "vocab_size": 128256, "num_key_value_heads": 8}
PALM = {"vocab_size": 256000, "num_key_value_heads": 1, "head_dim": 256, "tie_word_embeddings": True,
        "parallel_block": "shared_norm"}  # fmt: skip


def of(layers: int, width: int, heads: int, inner: int, **fields):
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return VariantConfig(**sizes, intermediate_size=inner, **fields)


PUBLISHED = {
    # Numbers of the model cards on the Hub, and of https://arxiv.org/abs/2307.09288, table 1, rounded.
    "Llama 2 7B": (lambda: of(32, 4096, 32, 11008, **LLAMA), 6_738_415_616),
    "Llama 2 13B": (lambda: of(40, 5120, 40, 13824, **LLAMA), 13_015_864_320),
    "Llama 2 70B": (lambda: of(80, 8192, 64, 28672, **LLAMA, num_key_value_heads=8), 68_976_648_192),
    # https://arxiv.org/abs/2407.21783, table 3.
    "Llama 3 8B": (lambda: of(32, 4096, 32, 14336, **LLAMA_3), 8_030_261_248),
    "Llama 3 70B": (lambda: of(80, 8192, 64, 28672, **LLAMA_3), 70_553_706_496),
    "Llama 3 405B": (lambda: of(126, 16384, 128, 53248, **LLAMA_3), 405_853_388_800),
}
# Billions, as https://arxiv.org/abs/2204.02311, table 1, has them.
PALM_SIZES = {"8B": (32, 4096, 16, 8.63), "62B": (64, 8192, 32, 62.50), "540B": (118, 18432, 48, 540.35)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_of_parameters(name):
    make, number = PUBLISHED[name]
    assert count_parameters(structure(make())).total == number


@pytest.mark.parametrize("name", PALM_SIZES)
def test_palm(name):
    layers, width, heads, billions = PALM_SIZES[name]
    counted = count_parameters(structure(of(layers, width, heads, 4 * width, **PALM)))
    # The paper's numbers leave the weights of norms out, which only the largest shows.
    assert round((counted.total - counted.by_part["norms"]) / 1e9, 2) == billions


def test_bert_base():
    """https://arxiv.org/abs/1810.04805: 12 layers of 768 and 3072, 110 million."""
    from transformers import BertConfig

    counted = count_parameters(structure(*subject_of(BertConfig(architectures=["BertModel"]))))
    assert counted.total == 109_482_240
    assert counted.by_part["attention"] == 12 * (4 * 768 * 768 + 4 * 768)
    assert counted.by_part["feed_forward"] == 12 * (2 * 768 * 3072 + 768 + 3072)
    assert counted.by_part["embedding"] == (30522 + 512 + 2) * 768


def test_t5_11b():
    """https://arxiv.org/abs/1910.10683, section 3.7: feed-forward networks of 65,536, 128 heads of 128."""
    from transformers import T5Config

    config, class_name = subject_of(
        T5Config(d_model=1024, d_kv=128, d_ff=65536, num_layers=24, num_heads=128, vocab_size=32128)
    )
    counted = count_parameters(structure(config, class_name))
    assert round(counted.total / 1e9, 1) == 11.3
    assert counted.by_part["feed_forward"] == 2 * 24 * 2 * 1024 * 65536
    assert any("64" in sentence for sentence in cost(config).advice)


def test_cache_of_grouped_queries():
    """https://arxiv.org/abs/2305.13245: T5-XXL's 64 heads, in 8 groups and in one, divide the cache by 8 and by 64."""
    sizes = {
        heads: cache_bytes(structure(of(24, 4096, 64, 10240, num_key_value_heads=heads, head_dim=64)), 2048).theory
        for heads in (64, 8, 1)
    }
    assert sizes[64] == 8 * sizes[8] == 64 * sizes[1]


def test_cache_of_gemma_3():
    """https://arxiv.org/abs/2503.19786: five layers of windows of 1024 to one; the 27B model's 62 layers have ten."""
    fields = {"num_key_value_heads": 16, "head_dim": 128, "sliding_window": 1024, "max_position_embeddings": 131072}
    found = cache_bytes(structure(of(62, 5376, 32, 21504, layer_types="SSSSSF", **fields)), 32768)
    per_layer = 2 * 16 * 128 * 2
    assert found.theory == per_layer * (10 * 32768 + 52 * 1024)
    assert found.dynamic == per_layer * (10 * 32768 + 52 * 1023)
    whole = cache_bytes(structure(of(62, 5376, 32, 21504, **{**fields, "sliding_window": None})), 32768)
    assert whole.theory == per_layer * 62 * 32768


@pytest.mark.parametrize("zero", range(4))
def test_memory_of_zero(zero):
    """https://arxiv.org/abs/1910.02054, figure 1: 7.5 billion parameters on 64 ranks: 120, 31.4, 16.6 and 1.9 GB."""
    published = (120, 31.4, 16.6, 1.9)[zero]
    config = of(48, 3584, 28, 14336, ffn_type="mlp", vocab_size=50304)
    model = structure(config)
    scale = 7.5e9 / count_parameters(model).total
    (rank,) = rank_memory(model, Plan(dp=64, zero=zero, optimizer="adamw-mixed"), "bfloat16")
    assert rank.total * scale / 1e9 == pytest.approx(published, abs=0.06)


def test_ranks_hold_everything_together():
    config = VariantConfig(**{**SMALL, "num_hidden_layers": 5, "tie_word_embeddings": True})
    model = structure(config)
    whole = rank_memory(model, Plan(), "float32")[0]
    stages = rank_memory(model, Plan(pp=3), "float32")
    table = SMALL["vocab_size"] * SMALL["hidden_size"] * 4
    # The last stage has a table for the head as well.
    assert sum(stage.weights for stage in stages) == whole.weights + table
    with pytest.raises(ValueError, match="`pp` is 6, and there are 5 layers"):
        rank_memory(model, Plan(pp=6), "float32")


def test_heads_that_ranks_cannot_split_are_said():
    fields = {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 1}
    assert rank_memory(structure(VariantConfig(**fields)), Plan(tp=2), "float32")[0].gathered_heads
    assert not rank_memory(structure(VariantConfig(**SMALL)), Plan(tp=2), "float32")[0].gathered_heads


def test_what_fits_fits():
    config = VariantConfig(**SMALL, max_position_embeddings=64)
    found = cost(config, length=32, memory=1e6, dtype="float32")
    described = structure(config)

    def needed(batch, length):
        cache = cache_bytes(described, length, batch=batch, value_bytes=4)
        return found.weights["float32"] + cache.dynamic

    assert needed(found.largest_batch, 32) <= 1e6 < needed(found.largest_batch + 1, 32)
    assert needed(1, found.largest_length) <= 1e6 < needed(1, found.largest_length + 1)


def test_decoding_reads_more_cache_than_weights_from_where_it_says():
    config = VariantConfig(**{**SMALL, "num_key_value_heads": 2}, max_position_embeddings=4096)
    crossings = cost(config, length=8).crossings
    assert list(crossings) == ["MHA", "GQA with 2 heads", "MQA"]
    length = crossings["GQA with 2 heads"]
    counted = count_parameters(structure(config))
    assert cache_bytes(structure(config), length).theory == pytest.approx(2 * counted.active, rel=0.01)
    assert crossings["MQA"] == pytest.approx(2 * length, abs=1)


def test_a_slow_memory_bounds_decoding_and_a_slow_processor_prefill():
    config = VariantConfig(**SMALL, max_position_embeddings=4096)
    found = cost(config, length=1024, bandwidth=1e9, flops=1e11)
    assert (found.prefill.bound, found.decode.bound) == ("compute", "memory")
    assert found.decode.seconds == found.decode.bytes / 1e9
    assert found.prefill.seconds == found.prefill.flops / 1e11


def test_path_through_windows():
    fields = {**SMALL, "num_hidden_layers": 4, "layer_types": "S", "sliding_window": 5}
    assert cost(VariantConfig(**fields), length=17).path_length == 4
    assert cost(VariantConfig(**fields), length=18).path_length is None
    assert cost(VariantConfig(**{**fields, "layer_types": "SSSF"}), length=99).path_length == 1
    assert cost(VariantConfig(**{**fields, "is_causal": False}), length=21).path_length == 4
    assert cost(VariantConfig(**{**fields, "is_causal": False}), length=22).path_length is None


def test_a_config_under_another_name_is_read_as_any_config(tmp_path):
    from transformers import LlamaConfig

    file = tmp_path / "large.json"
    LlamaConfig(**SMALL, num_key_value_heads=2).to_json_file(file, use_diff=False)
    expected = cost(LlamaConfig(**SMALL, num_key_value_heads=2), length=8)
    assert cost(str(file), length=8).parameters == expected.parameters
    file.write_text('{"model_type": "llama", "hidden_size": "wide"}')
    with pytest.raises(ConversionError, match=r"large\.json.*hidden_size"):
        cost(str(file))


def test_command(capsys, tmp_path):
    from transformers import LlamaConfig

    native = LlamaConfig(**SMALL, num_key_value_heads=2, architectures=["LlamaForCausalLM"])
    native.save_pretrained(tmp_path)
    assert hf_variants_cli.main(["cost", str(tmp_path), "--json", "--length", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["total"] == count_parameters(structure(*subject_of(native))).total
    assert found == json.loads(json.dumps(cost(str(tmp_path), length=8).to_dict()))
    assert hf_variants_cli.main(["cost", "llama", "gemma2", "--memory", "1GB"]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("gemma2", "StaticCache"))
    assert hf_variants_cli.main(["cost", "no-such-preset"]) == 2
    assert "neither a file" in capsys.readouterr().err


def test_70_billion_parameters_take_little_more_than_importing_transformers(tmp_path):
    """In a process of its own, for its peak; of time, which is the machine's, nothing is asserted."""
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    ).save_pretrained(tmp_path)
    script = f"""
import contextlib, io, resource, sys
import transformers.modeling_utils
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
before = peak()
import hf_variants_cli
with contextlib.redirect_stdout(io.StringIO()):
    assert hf_variants_cli.main(["cost", {str(tmp_path)!r}, "--json"]) == 0
print(peak() - before)
for name in ("peft", "bitsandbytes"):
    assert name not in sys.modules, name
import peft
table = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
assert table["hf_variant"] == table["hf_variant_seq2seq"] == table["llama"]
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    # In MiB; 27 where this was written.
    assert float(found.stdout) < 45


def test_page(tmp_path, capsys):
    path = tmp_path / "cost.html"
    assert (
        hf_variants_cli.main(
            ["cost", "llama", "gemma3", "--html", str(path), "--bandwidth", "1e12", "--flops", "1e14"]
        )
        == 0
    )
    page = path.read_text()
    for elsewhere in ("<script", "<link", "src=", "href=", "@import", "url("):
        assert elsewhere not in page.replace("url(#tip)", "")
    drawings = [ElementTree.fromstring(f"<svg{part.split('</svg>')[0]}</svg>") for part in page.split("<svg")[1:]]
    titles = [drawing.find("{http://www.w3.org/2000/svg}title").text for drawing in drawings]
    assert titles == ["Parameters by part", "Weights and cache by length", "Work for a byte in decoding", "Roofline"]
    # What the tables say is what the command prints.
    assert hf_variants_cli.main(["cost", "llama", "gemma3", "--json"]) == 0
    for found in json.loads(capsys.readouterr().out):
        assert f"<td>{found['parameters']['total']:,}</td>" in page
    encoder = tmp_path / "encoder"
    hf_variants.VariantConfig(is_causal=False, num_hidden_layers=1).save_pretrained(encoder)
    assert hf_variants_cli.main(["cost", str(encoder), str(encoder), "--html", str(path)]) == 0
    assert path.read_text().count("<svg") == 1
