"""Losses against their formulas, autograd, and transformers' own loss."""

import pytest
import torch
import torch.nn.functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_variants import VariantConfig, VariantForCausalLM
from hf_variants.model.losses import causal_lm_loss, regularised_cross_entropy, token_loss


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
