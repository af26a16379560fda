"""Losses against their formulas, autograd, and transformers' own loss."""

import functools
import types

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from transformers import Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_variants import (
    VariantConfig,
    VariantForCausalLM,
    VariantForMaskedLM,
    VariantForSequenceClassification,
    chunk_loss,
)
from hf_variants.model import losses
from hf_variants.model.losses import causal_lm_loss, regularised_cross_entropy, score_in_place, token_loss
from tests.strategies import variant_fields
from tests.test_random_configs import build, preset_config
from tests.test_seq2seq import PAIRS, VOCABULARY
from tests.test_seq2seq import build as build_seq2seq


VOCAB = 37


def sample(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 11, VOCAB, generator=generator, dtype=torch.float64) * 4 + 2).to(dtype)
    labels = torch.randint(0, VOCAB, (3, 11), generator=generator)
    labels[0, :4] = -100
    labels[2, -3:] = -100
    return logits.requires_grad_(), labels


def test_without_regularisation_it_is_transformers_loss():
    logits, labels = sample(torch.float32)
    for extra in ({}, {"num_items_in_batch": 13}, {"num_items_in_batch": torch.tensor(13)}):
        ours = causal_lm_loss(logits=logits, labels=labels, vocab_size=VOCAB, **extra)
        assert torch.equal(ours, ForCausalLMLoss(logits=logits, labels=labels, vocab_size=VOCAB, **extra))


def test_z_loss_value_and_gradient():
    logits, labels = sample()
    flat, targets = logits.view(-1, VOCAB), labels.view(-1)
    coefficient = 0.3
    plain = regularised_cross_entropy(flat, targets)
    regularised = regularised_cross_entropy(flat, targets, z_loss_coefficient=coefficient)
    (gradient,) = torch.autograd.grad(regularised - plain, logits)

    kept = targets != -100
    log_z = flat.detach().exp().sum(-1).log()
    expected = coefficient * log_z[kept].square().mean()
    assert abs((regularised - plain).item() - expected.item()) < 1e-12 * expected
    # d/dlogits of log(Z)^2 is 2 log(Z) softmax(logits).
    by_hand = coefficient * 2 * log_z[:, None] * flat.detach().softmax(-1) * kept[:, None] / kept.sum()
    assert (gradient.view(-1, VOCAB) - by_hand).abs().max() < 1e-12 * by_hand.std()
    assert not gradient.view(-1, VOCAB)[~kept].any()


def test_z_loss_pulls_the_denominator_to_one():
    logits, labels = sample()
    flat = logits.detach().view(-1, VOCAB).clone().requires_grad_()
    before = flat.logsumexp(-1).abs().mean()
    for _ in range(200):
        loss = regularised_cross_entropy(flat, labels.clamp(min=0).view(-1), z_loss_coefficient=1.0)
        (gradient,) = torch.autograd.grad(loss, flat)
        flat.data -= 5 * gradient
    assert flat.logsumexp(-1).abs().mean() < 0.2 * before


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_label_smoothing(smoothing):
    logits, labels = sample()
    flat, targets = logits.view(-1, VOCAB), labels.view(-1)
    loss = regularised_cross_entropy(flat, targets, label_smoothing=smoothing)
    kept = targets != -100
    log_p = flat.log_softmax(-1)[kept]
    target = torch.full_like(log_p, smoothing / VOCAB)
    target[torch.arange(len(target)), targets[kept]] += 1 - smoothing
    expected = -(target * log_p).sum(-1).mean()
    assert abs((loss - expected).item()) < 1e-12 * expected.item()


def test_sum_over_batches_with_num_items_equals_one_batch():
    logits, labels = sample()
    options = {"vocab_size": VOCAB, "z_loss_coefficient": 0.1, "label_smoothing": 0.2}
    whole = token_loss(logits.float(), labels, **options)
    count = (labels != -100).sum()
    parts = sum(token_loss(logits[i : i + 1].float(), labels[i : i + 1], num_items_in_batch=count, **options)
                for i in range(3))  # fmt: skip
    assert abs((whole - parts).item()) < 1e-6 * whole.item()


def test_causal_shifts_and_token_loss_does_not():
    logits, labels = sample(torch.float32)
    shifted = causal_lm_loss(logits, labels, VOCAB, z_loss_coefficient=0.1)
    by_hand = token_loss(logits[:, :-1].reshape(3, -1, VOCAB), labels[:, 1:], VOCAB, z_loss_coefficient=0.1)
    assert abs((shifted - by_hand).item()) < 1e-6 * by_hand.item()
    given = causal_lm_loss(logits, None, VOCAB, shift_labels=labels, z_loss_coefficient=0.1)
    assert torch.equal(given, token_loss(logits, labels, VOCAB, z_loss_coefficient=0.1))


def test_half_precision_logits_are_scored_in_float32():
    logits, labels = sample(torch.bfloat16)
    loss = causal_lm_loss(logits, labels, VOCAB, z_loss_coefficient=0.1)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, causal_lm_loss(logits.float(), labels, VOCAB, z_loss_coefficient=0.1))


def test_the_config_reaches_the_model():
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    plain = VariantForCausalLM(VariantConfig(**sizes)).eval()
    model = VariantForCausalLM(VariantConfig(**sizes, z_loss_coefficient=0.2, label_smoothing=0.1)).eval()
    model.load_state_dict(plain.state_dict())
    out = model(ids, labels=ids)
    logits = out.logits[:, :-1].reshape(-1, VOCAB)
    expected = F.cross_entropy(logits, ids[:, 1:].reshape(-1), label_smoothing=0.1)
    expected = expected + 0.2 * logits.logsumexp(-1).square().mean()
    assert abs((out.loss - expected).item()) < 1e-6 * expected.item()
    assert torch.equal(out.logits, plain(ids).logits)
    assert torch.equal(plain(ids, labels=ids).loss, ForCausalLMLoss(plain(ids).logits, ids, VOCAB))


# In chunks


def loss_and_gradients(model, chunk: int | None, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """In training mode and float64; every case is without dropout."""
    chunk_loss(model, chunk)
    model.train()
    model.zero_grad()
    output = model(**inputs)
    assert (output.logits is None) == (chunk is not None)
    (3 * output.loss).backward()
    return output.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_chunks_are_the_whole(model, **inputs) -> None:
    loss, gradients = loss_and_gradients(model, None, **inputs)
    for chunk in (1, 5, 1000):
        other, others = loss_and_gradients(model, chunk, **inputs)
        # The sum is kept in float32.
        assert abs(other - loss) < 1e-6 * abs(loss)
        assert gradients.keys() == others.keys()
        # Logits are cast to float32, so that a gradient that is 0 by nature (a bias of keys) is rounding.
        rounding = 1e-7 * max(gradient.abs().max() for gradient in gradients.values())
        for name, gradient in gradients.items():
            allowed = 1e-5 * gradient.abs().max() + rounding
            assert (others[name] - gradient).abs().max() <= allowed, name


def tokens_and_labels(vocab_size: int, rows: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab_size, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


@given(fields=variant_fields())
def test_chunks_of_any_decoder(fields):
    config = VariantConfig(**{**fields, "z_loss_coefficient": 0.1, "label_smoothing": 0.2})
    inputs = tokens_and_labels(config.vocab_size)
    assert_chunks_are_the_whole(build(config).double(), **inputs)


@pytest.mark.parametrize("terms", [{}, {"z_loss_coefficient": 0.1, "label_smoothing": 0.2, "lm_head_bias": True}])
@pytest.mark.parametrize("hooked", [False, True])
def test_chunks_in_float32_through_a_plain_head_and_one_with_a_hook(terms, hooked):
    config = VariantConfig(**{**preset_config("llama").to_dict(), "tie_word_embeddings": hooked, **terms})
    model = build(config)
    calls = []
    if hooked:
        model.lm_head.register_forward_hook(lambda *call: calls.append(call))
    inputs = tokens_and_labels(config.vocab_size)
    loss, gradients = loss_and_gradients(model, None, **inputs)
    calls.clear()
    for chunk in (3, 1000):
        other, others = loss_and_gradients(model, chunk, **inputs)
        assert bool(calls) == hooked
        assert abs(other - loss) < 2e-6 * loss
        for name, gradient in gradients.items():
            assert (others[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-6, name


@pytest.mark.parametrize("values", [1, 2 * VOCAB, 2**20])
def test_scores_in_place_and_their_gradient(values, monkeypatch):
    """In parts of a row, of two, and whole."""
    monkeypatch.setattr(losses, "SCORED_VALUES", values)
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(5, VOCAB, generator=generator) * 4 + 2).requires_grad_()
    labels = torch.randint(0, VOCAB, (5,), generator=generator)
    for terms in (
        {},
        {"z_loss_coefficient": 0.1},
        {"label_smoothing": 0.3},
        {"z_loss_coefficient": 1, "label_smoothing": 0.1},
    ):
        expected = regularised_cross_entropy(logits, labels, num_items_in_batch=1, **terms)
        (gradient,) = torch.autograd.grad(expected, logits)
        buffer = logits.detach().clone()
        assert abs(score_in_place(buffer, labels, **terms) - expected) < 1e-6 * expected
        assert (buffer - gradient).abs().max() < 2e-6 * gradient.abs().max()


def test_chunks_of_a_frozen_head_and_of_one_with_a_second_bias():
    model = build(VariantConfig(**{**preset_config("llama").to_dict(), "tie_word_embeddings": False}))
    model.lm_head.weight.requires_grad = False
    assert_chunks_are_the_whole(model.double(), **tokens_and_labels(model.config.vocab_size))
    fields = {"tie_word_embeddings": False, "lm_head_bias": True, "lm_head_unread_bias": True}
    model = VariantForCausalLM(VariantConfig(**{**preset_config("llama").to_dict(), **fields})).double()
    assert_chunks_are_the_whole(model, **tokens_and_labels(model.config.vocab_size))


def test_chunks_of_an_encoder():
    config = VariantConfig(**{**preset_config("llama").to_dict(), "is_causal": False, "lm_head_bias": True})
    assert_chunks_are_the_whole(VariantForMaskedLM(config).double(), **tokens_and_labels(config.vocab_size))


@pytest.mark.parametrize("final_logits_bias", [False, True])
def test_chunks_of_an_encoder_decoder(final_logits_bias):
    model = build_seq2seq(*PAIRS[0], final_logits_bias=final_logits_bias).double()
    if final_logits_bias:
        model.final_logits_bias.normal_()
    assert_chunks_are_the_whole(model, **tokens_and_labels(VOCABULARY))


def test_chunks_with_a_number_of_items_and_labels_in_place():
    model = build(preset_config("llama")).double()
    inputs = tokens_and_labels(model.config.vocab_size)
    assert_chunks_are_the_whole(model, num_items_in_batch=torch.tensor(7), **inputs)
    shifted = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    assert_chunks_are_the_whole(model, shift_labels=shifted, **inputs)


def test_chunks_of_a_head_with_adapters():
    """Whose weights are found in the graph, wherever they stand."""
    base = build(preset_config("mistral")).double()
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(base, adapter).double()
    assert_chunks_are_the_whole(model, **tokens_and_labels(base.config.vocab_size))
    tokens = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[4, 5], init_lora_weights=False)
    model = peft.get_peft_model(build(preset_config("gemma2")), tokens).double()
    assert_chunks_are_the_whole(model, **tokens_and_labels(model.config.vocab_size))


def test_chunks_of_a_batch_without_labels_that_count():
    model = build(preset_config("llama"))
    inputs = tokens_and_labels(model.config.vocab_size)
    inputs["labels"][:] = -100
    loss, gradients = loss_and_gradients(model, 4, num_items_in_batch=5, **inputs)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())
    chunk_loss(model, 4)
    assert model(**inputs).loss.isnan()


def test_chunks_are_of_training_alone():
    model = build(preset_config("llama"))
    chunk_loss(model, 4)
    inputs = tokens_and_labels(model.config.vocab_size)
    expected = build(preset_config("llama")).eval()(**inputs)
    output = model.eval()(**inputs)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.logits, expected.logits)
    with torch.no_grad():
        assert model.train()(**inputs).logits is not None


def test_refused_chunks():
    model = build(preset_config("llama")).train()
    with pytest.raises(ValueError, match="`positions` is 0"):
        chunk_loss(model, 0)
    with pytest.raises(ValueError, match="no language-modelling head"):
        chunk_loss(VariantForSequenceClassification(preset_config("llama")))
    chunk_loss(model, 4)
    model.loss_function = lambda logits, labels, **kwargs: logits.mean()
    with pytest.raises(ValueError, match="`loss_function` of this model was replaced"):
        model(**tokens_and_labels(model.config.vocab_size))


def test_a_fused_head_is_known_under_the_signature_of_what_it_replaces():
    config = preset_config("llama")
    config.z_loss_coefficient = 0.1
    model = VariantForCausalLM(config)

    # As TRL makes one.
    @functools.wraps(type(model).forward)
    def fused(self, *args, fused_lm_head=False, **kwargs):
        return fused_lm_head

    model.forward = types.MethodType(fused, model)
    with pytest.raises(ValueError, match="`z_loss_coefficient`"):
        model(fused_lm_head=True)


TRAINED = {
    "decoder": lambda: build(preset_config("gpt2")),
    "labels in place": lambda: build(VariantConfig(**{**preset_config("gpt2").to_dict(), "shift_labels": False})),
    "encoder": lambda: VariantForMaskedLM(VariantConfig(**{**preset_config("gpt2").to_dict(), "is_causal": False})),
    "two stacks": lambda: build_seq2seq("vanilla", "vanilla"),
}


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("kind", TRAINED)
def test_the_trainer_logs_the_mean_over_all_labels_that_count(kind, steps, tmp_path):
    """However many it accumulates, and however many labels each batch has."""
    model = TRAINED[kind]().eval()
    ids = torch.randint(5, 30, (4, 8), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[1, 2:] = labels[3, 5:] = -100
    if kind == "decoder":
        # Releases differ in whether they count the label that a shift leaves out.
        labels[:, 0] = -100
    rows = [{"input_ids": row, "labels": target} for row, target in zip(ids, labels)]
    with torch.no_grad():
        expected = model(input_ids=ids, labels=labels).loss.item()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    options = TrainingArguments(
        tmp_path, max_steps=1, logging_steps=1, per_device_train_batch_size=4 // steps, gradient_accumulation_steps=steps,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=options, train_dataset=rows)
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"] - expected) < 1e-3
