"""Fast decoding computes what the plain path computes, for every config, whatever becomes of the model or its cache."""

import copy
import pickle

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_variants import VariantConfig, VariantForCausalLM, VariantForMaskedLM, accelerate_decoding
from hf_variants.fast.caches import RoomyLayer, RoomySlidingLayer
from hf_variants.fast.products import MOST_ROWS, few_rows_products
from hf_variants.presets import PRESETS
from tests.strategies import variant_fields
from tests.test_random_configs import assert_close, build, preset_config, sentences
from tests.test_seq2seq import PAIRS, VOCABULARY
from tests.test_seq2seq import build as build_seq2seq


PROMPT, NEW = 6, 8
# Norms that have no kernel of their own here and are called as they are.
CALLED_NORMS = ("norm", "q_norm", "k_norm", "sub_norm", "pre_norm", "branch_norm", "post_norm")


def decode(model: VariantForCausalLM, rows: int = 2, padded: bool = False, cache=None, **options) -> torch.Tensor:
    """Logits of `NEW` given tokens, one at a time after a prompt: (rows, NEW, vocabulary)."""
    input_ids = sentences(rows, PROMPT + NEW)
    mask = torch.ones_like(input_ids)
    if padded:
        mask[-1, :3] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits = []
    with torch.no_grad():
        for start, end in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, PROMPT + NEW))]:
            inputs = {"attention_mask": mask[:, :end], "position_ids": position_ids[:, start:end]} if padded else {}
            output = model(input_ids=input_ids[:, start:end], past_key_values=cache, **inputs, **options)
            logits.append(output.logits[:, -1])
    return torch.stack(logits[1:], dim=1)


def assert_decodes_alike(model: VariantForCausalLM, rows: int = 2, padded: bool = False) -> None:
    called = CALLED_NORMS + (("lm_head",) if model.config.lm_head_normalized else ())
    plain = decode(model, rows, padded)
    with accelerate_decoding(model) as acceleration:
        fast = decode(model, rows, padded)
        assert acceleration.steps == NEW, acceleration.why_plain
        assert [name for name in acceleration.called_modules if not name.endswith(called)] == []
    assert_close(fast, plain, plain)


@pytest.mark.parametrize("preset", [name for name in PRESETS if preset_config(name).is_causal])
def test_preset(preset):
    model = build(preset_config(preset))
    assert_decodes_alike(model, rows=1)
    assert_decodes_alike(model, rows=3, padded=True)


@given(fields=variant_fields())
def test_random(fields):
    config = VariantConfig(**fields)
    model = build(config)
    assert_decodes_alike(model, rows=1)
    assert_decodes_alike(model, padded=True)
    if not config.unsupported_attention_features("sdpa"):
        model.set_attn_implementation("sdpa")
        assert_decodes_alike(model, padded=True)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("encoder", "decoder"), PAIRS)
def test_encoder_decoder(encoder, decoder, padded):
    model = build_seq2seq(encoder, decoder)
    source = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(source)
    mask[1, 6:] = 1 - int(padded)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "num_beams": 1 + int(padded)}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(source, attention_mask=mask, **options)
    with accelerate_decoding(model) as acceleration:
        fast = model.generate(source, attention_mask=mask, **options)
        assert acceleration.steps == NEW - 1, acceleration.why_plain
    assert torch.equal(fast.sequences, plain.sequences)
    plain, fast = torch.stack(plain.logits), torch.stack(fast.logits)
    assert_close(fast, plain, plain)


GENERATIONS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "penalty": {"repetition_penalty": 1.3},
}


@pytest.mark.parametrize("kind", GENERATIONS)
@pytest.mark.parametrize("preset", ["llama", "gemma2", "bloom", "gpt2"])
def test_generate_gives_the_same_tokens(preset, kind):
    model = build(preset_config(preset))
    model.generation_config.eos_token_id = None
    prompt = sentences(batch=1 if kind == "prompt lookup" else 2, length=9)
    # Repeats itself, so that there is something to look up and to roll back.
    prompt[:, 5:] = prompt[:, :4]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **GENERATIONS[kind]}

    def generate() -> torch.Tensor:
        torch.manual_seed(0)
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)

    plain = generate()
    with accelerate_decoding(model) as acceleration:
        assert torch.equal(generate(), plain)
        assert (acceleration.steps == 0) == (kind == "static")
    assert torch.equal(generate(), plain)


def changed_in_place(model):
    model.model.layers[0].self_attn.q_proj.weight.mul_(1.5)


def changed_by_an_optimiser(model):
    with torch.enable_grad():
        model(sentences(), labels=sentences(), use_cache=False).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()


def given_other_data(model):
    model.model.layers[1].mlp.down_proj.weight.data = 1.5 * model.model.layers[1].mlp.down_proj.weight.data


def given_another_parameter(model):
    norm = model.model.layers[1].mlp_pre_norm
    norm.weight = nn.Parameter(2.0 * norm.weight)


def loaded(model):
    model.load_state_dict({name: 1.1 * tensor for name, tensor in model.state_dict().items()})


def loaded_by_assignment(model):
    model.load_state_dict({name: 1.1 * tensor for name, tensor in model.state_dict().items()}, assign=True)


def with_another_module(model):
    model.model.layers[0].mlp.up_proj = nn.Sequential(model.model.layers[0].mlp.up_proj, nn.Tanh())


def with_a_hook(model):
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda module, args, output: 2 * output)


def with_a_hook_on_the_block(model):
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))


def with_a_hook_on_the_stack(model):
    def double(module, args, output):
        output.last_hidden_state = 2 * output.last_hidden_state

    model.model.register_forward_hook(double)


def with_fewer_layers(model):
    model.model.layers = model.model.layers[:-1]
    model.config.num_hidden_layers -= 1


def with_another_attribute(model):
    model.model.layers[0].self_attn.scaling *= 3


def with_another_forward(model):
    head = model.lm_head
    head.forward = lambda x: 0.5 * F.linear(x, head.weight)


def with_dropout(model):
    model.model.layers[0].mlp.train()


def parametrised(model):
    gate_proj = model.model.layers[0].mlp.gate_proj
    nn.utils.parametrizations.weight_norm(gate_proj)
    gate_proj.parametrizations.weight.original0.mul_(2)


CHANGES = (
    changed_in_place, changed_by_an_optimiser, given_other_data, given_another_parameter, loaded, loaded_by_assignment,
    with_another_module, with_a_hook, with_a_hook_on_the_block, with_a_hook_on_the_stack, with_fewer_layers,
    with_another_attribute, with_another_forward, with_dropout, parametrised,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_decoded_as_it_is(change):
    model = build(preset_config("llama"))
    accelerate_decoding(model)
    before = decode(model)
    with torch.no_grad():
        change(model)
    fast = decode(model)
    accelerate_decoding(model).restore()
    plain = decode(model)
    assert_close(fast, plain, plain)
    if change is not with_dropout:
        assert (plain - before).abs().max() > 1e-2 * plain.std()


def test_changes_between_two_steps_are_seen():
    """Those of weights, modules and hooks, with one cache."""
    for change in (given_other_data, given_another_parameter, with_another_module, with_a_hook):
        results = []
        for accelerate in (False, True):
            model = build(preset_config("llama"))
            if accelerate:
                accelerate_decoding(model)
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                model(input_ids=sentences(), past_key_values=cache)
                model(input_ids=sentences(length=1), past_key_values=cache)
                change(model)
                results.append(model(input_ids=sentences(length=1), past_key_values=cache).logits)
        assert_close(results[1], results[0], results[0])


def test_adapters_count_and_are_merged():
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj", "lm_head"], lora_alpha=32, init_lora_weights=False
    )
    base = build(preset_config("mistral"))
    without = decode(base)
    model = peft.get_peft_model(base, config).eval()
    plain = decode(model)
    assert (plain - without).abs().max() > 1e-2 * plain.std()
    with accelerate_decoding(model) as acceleration:
        fast = decode(model)
        assert acceleration.steps == NEW
        assert {name.split(".")[-1] for name in acceleration.called_modules} == {"q_proj", "down_proj", "lm_head"}
        assert_close(fast, plain, plain)
        with model.disable_adapter():
            assert_close(decode(model), without, without)
        model.merge_adapter()
        assert_close(decode(model), plain, plain)


def test_nothing_is_added_to_the_model(tmp_path):
    model = build(preset_config("llama"))
    model.save_pretrained(tmp_path / "before", safe_serialization=True)
    names = [name for name, _ in model.named_modules()]
    state = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    acceleration = accelerate_decoding(model)
    assert accelerate_decoding(model)._forward is acceleration._forward
    decode(model)
    assert [name for name, _ in model.named_modules()] == names
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == {
        name: address for name, (address, _) in state.items()
    }
    assert all(torch.equal(tensor, state[name][1]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "after", safe_serialization=True)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    acceleration.restore()
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_accelerated_by_itself(duplicate):
    model = build(preset_config("llama"))
    accelerate_decoding(model)
    expected = decode(model)
    other = duplicate(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(decode(other), expected)
    assert accelerate_decoding(other).steps == NEW


@pytest.mark.parametrize(
    "options", [{"output_hidden_states": True}, {"output_attentions": True}, {"return_dict": False}]
)
def test_what_a_step_does_not_give_is_computed_plainly(options):
    model = build(preset_config("llama"))
    acceleration = accelerate_decoding(model)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=sentences(), past_key_values=cache)
        output = model(input_ids=sentences(length=1), past_key_values=cache, **options)
    assert acceleration.steps == 0
    if "return_dict" in options:
        assert isinstance(output, tuple)
    else:
        assert len(output.hidden_states or output.attentions) >= model.config.num_hidden_layers


def test_gradients_and_training_are_plain():
    model = build(preset_config("llama"))
    acceleration = accelerate_decoding(model)
    cache = DynamicCache(config=model.config)
    model(input_ids=sentences(), past_key_values=cache)
    assert model(input_ids=sentences(length=1), past_key_values=cache).logits.requires_grad
    with torch.no_grad():
        model.train()(input_ids=sentences(length=1), past_key_values=cache)
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=sentences(length=1), past_key_values=cache)
        assert acceleration.steps == 0
        model(input_ids=sentences(length=1), past_key_values=cache)
        assert acceleration.steps == 1


def test_a_cache_without_windows_is_masked():
    """As prefix tuning and many a script make it, which keeps all keys of a sliding layer."""
    model = build(preset_config("gemma2"))
    plain = decode(model, cache=DynamicCache())
    with accelerate_decoding(model) as acceleration:
        assert_close(decode(model, cache=DynamicCache()), plain, plain)
        assert acceleration.steps == NEW


def test_refused_models():
    encoder = VariantForMaskedLM(VariantConfig(**{**preset_config("llama").to_dict(), "is_causal": False}))
    with pytest.raises(ValueError, match="VariantForMaskedLM does not generate"):
        accelerate_decoding(encoder)
    with pytest.raises(ValueError, match="bfloat16 on cpu"):
        accelerate_decoding(build(preset_config("llama")).bfloat16())
    model = build(preset_config("llama"))
    model.forward = lambda **kwargs: None
    with pytest.raises(ValueError, match="`forward` of this model was replaced"):
        accelerate_decoding(model)


def test_another_dtype_later_is_computed_plainly():
    model = build(preset_config("llama"))
    acceleration = accelerate_decoding(model)
    decode(model)
    model.bfloat16()
    fast = decode(model)
    assert acceleration.steps == NEW
    acceleration.restore()
    assert torch.equal(fast, decode(model))


# Products


@pytest.mark.parametrize("rows", [1, 2, 3, 8, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize(("in_size", "out_size"), [(16, 48), (48, 16), (7, 13), (13, 7), (5, 1)])
@pytest.mark.parametrize("threads_used", [1, 2, 3])
def test_products_of_few_rows(rows, in_size, out_size, threads_used):
    torch.manual_seed(0)
    layers = [(torch.randn(out_size, in_size), torch.randn(out_size)), (torch.randn(4, in_size), None)]
    x = torch.randn(rows, in_size)
    torch.set_num_threads(threads_used)
    try:
        products = few_rows_products(*layers)
        results = products(x)
        for result, (weight, bias) in zip(results, layers):
            assert result.is_contiguous()
            torch.testing.assert_close(result, F.linear(x, weight, bias))
        # The weights are read where they lie.
        layers[0][0].mul_(2)
        torch.testing.assert_close(products(x)[0], F.linear(x, *layers[0]))
    finally:
        torch.set_num_threads(1)


# Caches


def states(rows: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, 2, length, 4, generator=generator) for _ in range(2))


OPERATIONS = {
    "one token": lambda layer, rows, seed: layer.update(*states(rows, 1, seed)),
    "five tokens": lambda layer, rows, seed: layer.update(*states(rows, 5, seed)),
    "crop": lambda layer, rows, seed: layer.crop(-2),
    "reorder": lambda layer, rows, seed: layer.reorder_cache(torch.arange(rows).flip(0) // 2),
    "repeat": lambda layer, rows, seed: layer.batch_repeat_interleave(2),
    "select": lambda layer, rows, seed: layer.batch_select_indices(torch.tensor([0])),
}  # fmt: skip


@pytest.mark.parametrize("window", [None, 2, 6])
@pytest.mark.parametrize("seed", range(20))
def test_a_roomy_layer_is_a_dynamic_layer(window, seed):
    plain = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    plain.update(*states(2, 3, seed))
    roomy = (RoomyLayer if window is None else RoomySlidingLayer).taking_over(copy.copy(plain))
    generator = torch.Generator().manual_seed(seed)
    shown, at_the_time = [], []
    for step in range(150):
        name = "one token"
        if torch.rand((), generator=generator) < 0.2:
            name = list(OPERATIONS)[torch.randint(len(OPERATIONS), (), generator=generator)]
        rows = plain.keys.shape[0]
        if name == "repeat" and rows > 4:
            name = "select"
        if name == "crop" and window is not None and plain.get_seq_length() >= window:
            # Which a window refuses that did not record its past.
            continue
        if name == "crop" and plain.get_seq_length() <= 2:
            continue
        outputs = [OPERATIONS[name](layer, rows, step) for layer in (plain, roomy)]
        if outputs[0] is not None:
            assert all(map(torch.equal, *outputs))
            shown.append(outputs[1])
            at_the_time.append(outputs[0])
        assert torch.equal(roomy.keys, plain.keys)
        assert torch.equal(roomy.values, plain.values)
        assert roomy.get_seq_length() == plain.get_seq_length()
        assert roomy.get_mask_sizes(1) == plain.get_mask_sizes(1)
    # What was handed out has not changed since.
    for then, now in zip(at_the_time, shown):
        assert all(map(torch.equal, then, now))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_copies_of_a_roomy_layer_do_not_meet(duplicate):
    layer = RoomyLayer()
    layer.update(*states(1, 3, 0))
    other = duplicate(layer)
    mine, theirs = layer.update(*states(1, 1, 1))[0], other.update(*states(1, 1, 2))[0]
    assert torch.equal(mine[:, :, 3:], states(1, 1, 1)[0])
    assert torch.equal(theirs[:, :, 3:], states(1, 1, 2)[0])


def test_a_window_records_its_past():
    plain, roomy = DynamicSlidingWindowLayer(4), RoomySlidingLayer(4)
    for layer in (plain, roomy):
        layer.update(*states(1, 6, 0))
        layer.activate_past_recording()
        layer.update(*states(1, 3, 1))
        layer.crop(-2)
    assert all(map(torch.equal, plain.update(*states(1, 1, 2)), roomy.update(*states(1, 1, 2))))


# What a cache holds


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_key_value_heads": 4}, [(4, 20)] * 4),
        ({"num_key_value_heads": 2}, [(2, 20)] * 4),
        ({"num_key_value_heads": 1}, [(1, 20)] * 4),
        ({"layer_types": "SSSF", "sliding_window": 6}, [(4, 5)] * 3 + [(4, 20)]),
        (
            {"per_layer_config": {1: {"skip": ["self_attn"]}, 2: {"num_key_value_heads": 1}}},
            [(4, 20), (0, 0), (1, 20), (4, 20)],
        ),
    ],
    ids=["MHA", "GQA", "MQA", "windows", "skips"],
)  # fmt: skip
@pytest.mark.parametrize("fast", [False, True])
def test_a_cache_holds_the_bytes_of_its_theory(fields, expected, fast):
    """Keys and values of the layers that attend, of as many heads and positions as they keep."""
    config = VariantConfig(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
        **fields,
    )  # fmt: skip
    model = build(config)
    if fast:
        accelerate_decoding(model)
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(input_ids=sentences(length=19), past_key_values=cache)
        model(input_ids=sentences(length=1), past_key_values=cache)
    held = [layer.keys.nbytes + layer.values.nbytes if layer.is_initialized else 0 for layer in cache.layers]
    assert held == [2 * 2 * heads * positions * 8 * 4 for heads, positions in expected]
