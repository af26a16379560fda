"""Training that keeps less gives the same losses and gradients, for every config, and stays out of all else's way."""

import copy
import gc
import pickle

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from hf_variants import (
    VariantConfig,
    VariantForCausalLM,
    VariantForMaskedLM,
    VariantForSequenceClassification,
    accelerate_decoding,
    save_training_memory,
)
from hf_variants.fast.training import FORWARDS, Kept
from hf_variants.model.normalization import BatchNorm
from hf_variants.presets import PRESETS
from tests.strategies import VOCAB, hostile_, variant_fields
from tests.test_random_configs import build, preset_config, sentences
from tests.test_seq2seq import PAIRS, VOCABULARY
from tests.test_seq2seq import build as build_seq2seq


def step(model: nn.Module, **inputs) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
    """Loss, logits and gradients in training, with the same dropout every time."""
    ids = sentences() if "input_ids" not in inputs else inputs.pop("input_ids")
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    output = model(input_ids=ids, **{"labels": ids, **inputs})
    (3 * output.loss).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), getattr(output, "logits", None), gradients


def assert_alike(gradients: dict, others: dict, tolerance: float = 1e-12) -> None:
    assert gradients.keys() == others.keys()
    # A gradient that is 0 by nature (a bias of keys) is rounding.
    rounding = tolerance * max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (others[name] - gradient).abs().max() <= 100 * tolerance * gradient.abs().max() + rounding, name


def assert_trains_alike(model: nn.Module, **inputs) -> None:
    """The same bits forward, the same gradients up to the rounding of float64."""
    model = model.double()
    loss, logits, gradients = step(model, **inputs)
    with save_training_memory(model, loss_chunk=None):
        other, other_logits, others = step(model, **inputs)
        assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(loss, other)
    assert torch.equal(logits, other_logits)
    # A norm in float32 rounds as float32 does, whatever the weights.
    casts = any(getattr(module, "statistics_dtype", None) is not None for module in model.modules())
    casts = casts or any("Float32" in type(module).__name__ for module in model.modules())
    assert_alike(gradients, others, 1e-6 if casts else 1e-12)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset(preset):
    config = preset_config(preset)
    assert_trains_alike(build(config) if config.is_causal else hostile_(VariantForMaskedLM(config)))


@given(fields=variant_fields())
def test_any_decoder(fields):
    assert_trains_alike(build(VariantConfig(**fields)))


@pytest.mark.parametrize("pair", PAIRS[:4])
def test_encoder_decoder(pair):
    assert_trains_alike(build_seq2seq(*pair), input_ids=sentences() % VOCABULARY)


def test_classifier_with_padding_and_dropout():
    config = VariantConfig(**{**preset_config("vanilla").to_dict(), "num_labels": 3, "residual_dropout": 0.2})
    config.ffn_dropout = 0.3
    model = hostile_(VariantForSequenceClassification(config))
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, :5] = 0
    assert_trains_alike(model, labels=torch.tensor([0, 2]), attention_mask=mask)


def test_the_rounding_of_float32():
    """Some 2e-7 of a tensor's largest gradient a norm: no more than another order of the same sums."""
    for name in ("llama", "gemma2", "qwen3", "command-r"):
        model = build(preset_config(name))
        loss, _, gradients = step(model)
        with save_training_memory(model, loss_chunk=None):
            other, _, others = step(model)
        assert loss == other
        for key, gradient in gradients.items():
            assert (others[key] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), key


# What is kept


def kept_bytes(model: nn.Module, monkeypatch, **inputs) -> tuple[int, int]:
    """Bytes of all storages but parameters that the graph of a step keeps: plainly, and with less kept."""
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    model.train()

    def total(tensors: list) -> int:
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(size for address, size in storages.items() if address not in parameters)

    plain: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: plain.append(tensor) or tensor, lambda x: x):
        model(**inputs)
    kept: list[torch.Tensor] = []
    keep = Kept.__init__
    monkeypatch.setattr(Kept, "__init__", lambda self, tensor: kept.append(tensor) or keep(self, tensor))
    with save_training_memory(model, loss_chunk=None):
        model(**inputs)
    monkeypatch.undo()
    return total(plain), total(kept)


def test_kept_bytes_of_a_llama_are_what_theory_says(monkeypatch):
    batch, length, width, inner, layers, heads, kv_heads, head_dim = 2, 64, 32, 96, 3, 4, 2, 8
    config = VariantConfig.from_preset(
        "llama", vocab_size=VOCAB, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=64,
    )  # fmt: skip
    model = VariantForCausalLM._from_config(config, attn_implementation="sdpa")
    ids = sentences(batch, length)
    plain, kept = kept_bytes(model, monkeypatch, input_ids=ids)
    # Both norms' inputs, q, k, v, the attention's output, gate and up; its log-sum-exp and the norms' numbers.
    values = 2 * width + 2 * heads * head_dim + 2 * kv_heads * head_dim + 2 * inner
    per_token = layers * (4 * values + 4 * (heads + 2))
    # The final norm, cos and sin, the token ids.
    per_token += 4 * (width + 1) + 8
    once = 4 * 2 * length * head_dim
    assert kept == batch * length * per_token + once
    assert kept < 0.65 * plain


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_keeps_more(preset, monkeypatch):
    config = preset_config(preset)
    model = build(config) if config.is_causal else VariantForMaskedLM(config)
    plain, kept = kept_bytes(model, monkeypatch, input_ids=sentences(2, 32))
    assert kept < 0.9 * plain


def test_what_is_kept_is_freed_on_the_way_back_and_without_a_way_back():
    model = build(preset_config("llama")).train()
    seen = []
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda *call: seen.append(StorageWeakRef(call[2].untyped_storage()))
    )
    save_training_memory(model)
    gc.collect()
    gc.disable()
    try:
        model(input_ids=sentences(), labels=sentences())
        loss = model(input_ids=sentences(), labels=sentences()).loss
        assert [reference.expired() for reference in seen] == [True, False]
        loss.backward()
        assert seen[1].expired()
    finally:
        gc.enable()
        handle.remove()


# Beside everything else


def test_adapters():
    base = build(preset_config("llama"))
    adapter = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.1)
    assert_trains_alike(peft.get_peft_model(base, adapter))
    base = build(preset_config("gemma2"))
    assert_trains_alike(peft.get_peft_model(base, peft.LNTuningConfig(target_modules=["post_norm", "norm"])))
    base = build(preset_config("qwen3"))
    saved = peft.LoraConfig(r=2, target_modules=["down_proj"], modules_to_save=["norm", "q_norm"])
    assert_trains_alike(peft.get_peft_model(base, saved))


def test_learned_activations():
    for activation in ("prelu", "xielu"):
        for kind in ("mlp", "glu"):
            fields = {**preset_config("llama").to_dict(), "hidden_act": activation, "ffn_type": kind}
            assert_trains_alike(build(VariantConfig(**fields)))


@pytest.mark.parametrize("options", [{}, {"use_reentrant": True}, {"use_reentrant": False}])
def test_gradient_checkpointing(options):
    model = build(preset_config("llama"))
    model.gradient_checkpointing_enable(options)
    assert_trains_alike(model)


def test_checkpoints_around_blocks_and_saving_elsewhere():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    from hf_variants.model.block import Block

    model = build(preset_config("llama"))
    # No layer of these notices that it is checkpointed, and a cache would be filled twice.
    model.config.use_cache = False
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    assert_trains_alike(model)
    model = build(preset_config("llama")).double()
    _, _, gradients = step(model)
    save_training_memory(model, loss_chunk=None)
    with torch.autograd.graph.save_on_cpu():
        _, _, others = step(model)
    assert_alike(gradients, others, 1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "command-r"])
def test_autocast(name):
    """bfloat16 rounds what float32 leaves in another last bit: no farther from the truth than plainly."""
    model = build(preset_config(name))
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits, gradients = step(model)
        with save_training_memory(model, loss_chunk=None):
            other, other_logits, others = step(model)
    assert torch.equal(loss, other)
    assert torch.equal(logits, other_logits)
    _, _, exact = step(model)
    errors, plain_errors = (
        torch.stack([(each[key] - exact[key]).norm() / exact[key].norm() for key in exact if exact[key].norm() > 1e-4])
        for each in (others, gradients)
    )
    assert (errors <= 1.2 * plain_errors).all()
    assert errors.mean() <= 1.02 * plain_errors.mean()


def test_in_half_precision():
    for name in ("llama", "gpt2", "gemma2", "command-r"):
        model = build(preset_config(name)).bfloat16()
        loss, logits, gradients = step(model)
        with save_training_memory(model, loss_chunk=None):
            other, other_logits, others = step(model)
        assert torch.equal(loss, other)
        assert torch.equal(logits, other_logits)
        # The same casts in the same order.
        assert all(torch.equal(gradients[key], others[key]) for key in gradients)


def test_compiled():
    model = build(preset_config("llama")).train()
    save_training_memory(model, loss_chunk=None)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    ids = sentences()
    loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
    assert counter.frame_count == 1
    assert torch.allclose(loss, model(input_ids=ids, labels=ids).loss)


def test_functional_transforms():
    model = build(preset_config("qwen3")).double().train()
    ids = sentences()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(values):
        return torch.func.functional_call(model, values, (), {"input_ids": ids, "labels": ids}).loss

    expected = torch.func.grad(loss)(parameters)
    with save_training_memory(model, loss_chunk=None):
        assert all(torch.equal(value, expected[name]) for name, value in torch.func.grad(loss)(parameters).items())
        # Other weights by autograd itself, and then the model's own again.
        doubled = {name: (2 * value).requires_grad_() for name, value in parameters.items()}
        gradients = torch.autograd.grad(loss(doubled), list(doubled.values()))
    plain = torch.autograd.grad(loss(doubled), list(doubled.values()))
    assert_alike(dict(zip(doubled, plain, strict=True)), dict(zip(doubled, gradients, strict=True)), 1e-6)


def test_derivatives_of_derivatives():
    for name in ("llama", "gemma2", "gpt2", "command-r"):
        fields = {**preset_config(name).to_dict(), "norm_casting_mode": None}
        model = build(VariantConfig(**fields)).double().train()
        weights = [p for n, p in model.named_parameters() if ("layers.1" in n and "norm" in n) or "up_proj" in n]

        def penalty(model=model, weights=weights) -> list[torch.Tensor]:
            loss = model(input_ids=sentences(), labels=sentences()).loss
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
            return torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), weights)

        plain = penalty()
        with save_training_memory(model, loss_chunk=None):
            others = penalty()
        keys = map(str, range(len(plain)))
        assert_alike(dict(zip(keys, plain, strict=True)), dict(zip(map(str, range(len(plain))), others)), 1e-6)


def test_a_graph_that_is_kept():
    model = build(preset_config("llama")).double().train()
    save_training_memory(model, loss_chunk=None)
    loss = model(input_ids=sentences(), labels=sentences()).loss
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_weights_that_change_between_the_passes_are_an_error():
    model = build(preset_config("llama")).train()
    save_training_memory(model)
    loss = model(input_ids=sentences(), labels=sentences()).loss
    with torch.no_grad():
        model.model.layers[0].mlp_pre_norm.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an in-place operation"):
        loss.backward()


def test_frozen_weights():
    model = build(preset_config("llama"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "layers.2" in name and "norm" not in name
    assert_trains_alike(model)


def test_batch_norm_is_left_alone():
    assert BatchNorm not in FORWARDS
    fields = {**preset_config("llama").to_dict(), "norm_type": "batchnorm", "norm_casting_mode": None}
    model = build(VariantConfig(**fields))
    twin = copy.deepcopy(model)
    assert_trains_alike(model)
    step(twin.double()), step(twin)
    assert all(map(torch.equal, model.buffers(), twin.buffers()))


def test_nothing_is_left_of_a_forward_that_fails():
    model = build(preset_config("llama")).train()
    save_training_memory(model)
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 3), VOCAB + 5))
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    # As an interrupt leaves it, behind which no hook is called.
    model.model.norm.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=sentences())
    model.model.norm._forward_pre_hooks.clear()
    step(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def interrupt(*call) -> None:
    raise KeyboardInterrupt


def test_evaluation_decoding_copies_and_files_are_as_before(tmp_path):
    model = build(preset_config("llama"))
    expected = model(input_ids=sentences()).logits
    state = model.state_dict()
    memory = save_training_memory(model)
    loss, logits, _ = step(model)
    assert logits is None
    model.eval()
    assert torch.equal(model(input_ids=sentences(), labels=sentences()).logits, expected)
    assert model.state_dict().keys() == state.keys()
    model.save_pretrained(tmp_path)
    loaded = VariantForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(loaded(input_ids=sentences()).logits, expected)
    with accelerate_decoding(model) as acceleration:
        model.generate(sentences(1), max_new_tokens=4, do_sample=False)
        assert acceleration.steps == 3
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert step(other)[0] == loss
        assert step(other)[1] is None
    memory.restore()
    assert step(model)[1] is not None
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_replaced_forwards_win():
    model = build(preset_config("llama"))
    norm = model.model.layers[1].mlp_pre_norm
    norm.forward = lambda hidden_states: F.rms_norm(hidden_states, (32,), norm.weight, 0.5)
    mine = norm.forward
    loss, _, _ = step(model)
    with save_training_memory(model, loss_chunk=None):
        assert step(model)[0] == loss
    assert norm.forward is mine


def test_refused():
    with pytest.raises(ValueError, match="Linear is no model of ours"):
        save_training_memory(nn.Linear(2, 2))
    model = build(preset_config("llama"))
    save_training_memory(model)
    with pytest.raises(ValueError, match="saves training memory already"):
        save_training_memory(model)
