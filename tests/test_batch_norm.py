"""BatchNorm against torch's, given the real tokens alone, and what a stack does for it."""

import copy

import pytest
import torch
from torch import nn

import hf_variants
from hf_variants import VariantConfig, VariantForCausalLM, VariantForMaskedLM, VariantModel
from hf_variants.model.normalization import BatchNorm
from tests.strategies import hostile_


DIM = 24
SMALL = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "pad_token_id": 0, "norm_type": "batchnorm",
}  # fmt: skip


def tokens(batch: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(2))


def padding(batch: int = 3, length: int = 9) -> torch.Tensor:
    """Left, right and none."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :4], mask[1, 6:] = 0, 0
    return mask


def twins(dtype: torch.dtype = torch.float64, **options) -> tuple[BatchNorm, nn.BatchNorm1d]:
    torch.manual_seed(0)
    affine = options.pop("affine", True)
    theirs = nn.BatchNorm1d(DIM, affine=affine, **options)
    ours = BatchNorm(DIM, affine=affine, bias=affine, **options)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if (tensor := getattr(theirs, name)) is not None:
            tensor.data.uniform_(0.4, 3.0)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"momentum": 0.6, "eps": 0.1}, {"affine": False}], ids=str
)
def test_equals_torchs_on_the_real_tokens(options, dtype):
    ours, theirs = twins(dtype, **options)
    bound = 1e-13 if dtype == torch.float64 else 2e-6
    for mask in (padding(), torch.ones(3, 9), padding().flip(0)):
        real = mask.bool()
        x = (torch.randn(3, 9, DIM, dtype=dtype) * 3 + 1.5).requires_grad_()
        y = x.detach().clone().requires_grad_()
        ours.real_tokens = real
        out, expected = ours(x)[real], theirs(y[real])
        assert (out - expected).abs().max() < bound * expected.std()
        direction = torch.randn(expected.shape, dtype=dtype)
        out.backward(direction)
        expected.backward(direction)
        assert (x.grad - y.grad).abs().max() < 10 * bound * y.grad.std()
        ours.update()
        for name, buffer in theirs.named_buffers():
            assert torch.allclose(getattr(ours, name).double(), buffer.double(), rtol=bound * 10, atol=bound), name
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, DIM, dtype=dtype)
    assert torch.equal(ours.eval()(x), theirs.eval()(x.flatten(0, 1)).view(x.shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_statistics_stay_in_float32(dtype):
    ours, theirs = twins(torch.float32)
    ours.to(dtype)
    assert ours.weight.dtype == dtype
    assert {ours.running_mean.dtype, ours.running_var.dtype} == {torch.float32}
    assert torch.equal(ours.running_mean, theirs.running_mean)
    # A mean that half precision could not carry over many batches.
    x = torch.full((4, 8, DIM), 2.0, dtype=dtype) + torch.randn(4, 8, DIM).to(dtype) / 64
    for _ in range(50):
        out = ours(x)
        ours.update()
    assert out.dtype == dtype
    assert (ours.running_mean - x.float().mean((0, 1))).abs().max() < 0.05
    assert ours.eval()(x).dtype == dtype


def statistics(model: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for name, buffer in model.named_buffers() if "running" in name or "tracked" in name]


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def close(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a.double(), b.double(), atol=1e-5) for a, b in zip(one, two, strict=True))


KINDS = {
    "decoder": {},
    "encoder": {"is_causal": False, "norm_placement": "post", "embedding_norm": True},
    "sub-norms": {"ffn_sub_norm": True, "attention_sub_norm": True, "norm_placement": "sandwich"},
    "parallel": {"parallel_block": "two_norms", "per_layer_config": {1: {"parallel_block": "shared_norm"}}},
    "skips": {"per_layer_config": {1: {"skip": ["self_attn"]}, 0: {"skip": ["mlp"]}}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_padding_enters_nothing(kind):
    model = hostile_(VariantModel(VariantConfig(**SMALL, **KINDS[kind]))).train()
    other = copy.deepcopy(model)
    ids, mask = tokens(), padding()
    one = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    two = other(ids.masked_fill(mask == 0, 7), attention_mask=mask).last_hidden_state[mask.bool()]
    assert torch.equal(one, two)
    assert same(statistics(model), statistics(other))
    assert {buffer.item() for name, buffer in model.named_buffers() if "tracked" in name} == {1}
    assert not same(statistics(model), statistics(hostile_(VariantModel(model.config))))
    # Nothing is left of the batch.
    assert all(m.real_tokens is None and m.batch is None for m in model.modules() if isinstance(m, BatchNorm))


def test_the_last_norm_sees_the_real_tokens_of_all_rows():
    model = hostile_(VariantModel(VariantConfig(**SMALL))).train()
    seen = []
    model.norm.register_forward_hook(lambda module, args, output: seen.append((args[0].detach(), output.detach())))
    mask = padding()
    model(tokens(), attention_mask=mask)
    twin = nn.BatchNorm1d(32, eps=model.config.norm_eps)
    twin.weight, twin.bias = model.norm.weight, model.norm.bias
    (before, after), real = seen[0], mask.bool()
    expected = twin(before[real])
    assert (after[real] - expected).abs().max() < 1e-5 * expected.std()


def test_evaluation_knows_no_batch():
    model = hostile_(VariantForCausalLM(VariantConfig(**SMALL))).eval()
    ids, before = tokens(), statistics(model)
    whole = model(ids).logits
    bound = 1e-5 * whole.std()
    assert (whole[1:2] - model(ids[1:2]).logits).abs().max() < bound
    assert (whole[:, :4] - model(ids[:, :4]).logits).abs().max() < bound
    assert same(before, statistics(model))
    # A mask that says who sees whom says enough here.
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None].expand(3, 1, -1, -1)
    assert (model(ids, attention_mask=causal).logits - whole).abs().max() < bound


def test_what_does_not_say_which_tokens_are_real_is_refused_in_training():
    model = VariantForCausalLM(VariantConfig(**SMALL)).train()
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None].expand(3, 1, -1, -1)
    for mask in (causal, {"full_attention": causal}):
        with pytest.raises(ValueError, match=r"`norm_type` batchnorm.*2D `attention_mask`"):
            model(tokens(), attention_mask=mask)
    with pytest.raises(ValueError, match="given one token"):
        model(tokens()[:1, :1])


def test_frozen_norms_stay():
    model = hostile_(VariantForCausalLM(VariantConfig(**SMALL))).train()
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.eval()
    before = statistics(model)
    model(tokens(), labels=tokens()).loss.backward()
    assert same(before, statistics(model))


def test_an_adapter_that_would_lose_the_statistics_is_warned_of(tmp_path, caplog, monkeypatch):
    import peft

    from hf_variants.model.normalization import logger

    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "warning_once", logger.warning)
    reloaded = []
    for saves in (False, True):
        caplog.clear()
        base = hf_variants.VariantForCausalLM(VariantConfig(**SMALL))
        hostile_(base)
        names = [name.removeprefix("model.") for name, m in base.named_modules() if isinstance(m, BatchNorm)]
        options = {"modules_to_save": names} if saves else {}
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj"], **options)).train()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        assert ("adapter's file does not hold them" in caplog.text) != saves
        model.eval().save_pretrained(tmp_path / str(saves))
        again = peft.PeftModel.from_pretrained(base, tmp_path / str(saves)).eval()
        reloaded.append(torch.equal(again(input_ids=tokens()).logits, model(input_ids=tokens()).logits))
    assert reloaded == [False, True]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_a_batch_once(use_reentrant):
    plain = hostile_(VariantForCausalLM(VariantConfig(**SMALL))).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for model in (plain, checkpointed):
        loss = model(tokens(), attention_mask=padding(), labels=tokens()).loss
        # Of other shape, between a forward and its backward, as reference models of trainers are.
        model(tokens(2, 5), use_cache=False)
        loss.backward()
        model(tokens(2, 6), use_cache=False)
    assert same(statistics(plain), statistics(checkpointed))
    pairs = zip(plain.parameters(), checkpointed.parameters(), strict=True)
    assert all(torch.equal(one.grad, two.grad) for one, two in pairs)


def test_saved_and_loaded(tmp_path):
    model = VariantForCausalLM(VariantConfig(**SMALL)).train()
    model(tokens(), attention_mask=padding())
    model.eval().save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        again = VariantForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert same(statistics(model), statistics(again))
        assert torch.equal(again(tokens()).logits, copy.deepcopy(model).to(dtype)(tokens()).logits)


@pytest.mark.parametrize("gives_labels_alone", [True, False])
def test_padding_behind_an_encoder_is_seen_without_a_mask(gives_labels_alone):
    decoder = {**SMALL, "add_cross_attention": True, "norm_placement": "post"}
    config = hf_variants.VariantSeq2SeqConfig(
        encoder={**SMALL, "norm_type": "layernorm", "is_causal": False}, decoder=decoder, decoder_start_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    model = hostile_(hf_variants.VariantForConditionalGeneration(config)).train()
    other = copy.deepcopy(model)
    labels, mask = tokens(), torch.ones(3, 9, dtype=torch.long)
    labels[1, 6:] = -100
    mask[1, 7:] = 0
    decoder_inputs = model.prepare_decoder_input_ids_from_labels(labels)
    inputs = {"labels": labels} if gives_labels_alone else {"labels": labels, "decoder_input_ids": decoder_inputs}
    one = model(tokens(), **inputs).loss
    two = other(tokens(), labels=labels, decoder_input_ids=decoder_inputs, decoder_attention_mask=mask).loss
    assert torch.allclose(one, two, rtol=1e-6)
    assert close(statistics(model), statistics(other))


@pytest.mark.slow
def test_one_graph():
    model = hostile_(VariantForMaskedLM(VariantConfig(**{**SMALL, "num_hidden_layers": 1}, is_causal=False))).train()
    plain = copy.deepcopy(model)
    inputs = {"input_ids": tokens(), "attention_mask": padding(), "labels": tokens()}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        losses = [one(**inputs).loss for one in (compiled, plain)]
        assert torch.allclose(*losses)
    assert close(statistics(model), statistics(plain))


def test_decoding_reads_the_running_statistics():
    model = hostile_(VariantForCausalLM(VariantConfig(**SMALL, norm_placement="sandwich"))).eval()
    from hf_variants.fast import accelerate_decoding

    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = torch.stack(model.generate(tokens(), **options).logits)
    with accelerate_decoding(model) as acceleration:
        for _ in range(2):
            made = torch.stack(model.generate(tokens(), **options).logits)
            assert acceleration.why_plain is None
            assert (made - expected).abs().max() < 1e-4 * expected.std()
            # A step of training in between.
            model.train()(tokens(), use_cache=False)
            model.eval()
            del model.forward
            expected = torch.stack(model.generate(tokens(), **options).logits)
            acceleration = accelerate_decoding(model)
