"""Encoder-decoders: two stacks that are free to differ, with cross-attention, caches, labels and generation."""

import random

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

import hf_variants
from hf_variants import VariantForConditionalGeneration, VariantSeq2SeqConfig
from tests.parity import hostile_


PAD, EOS, START = 0, 2, 1
VOCABULARY = 53

# Combinations that nobody ships, for either stack.
STACKS = {
    "vanilla": {
        "norm_type": "layernorm", "norm_eps": 1e-5, "norm_placement": "post", "ffn_type": "mlp", "hidden_act": "relu",
        "attention_bias": True, "mlp_bias": True, "position_embedding_type": "sinusoidal", "embedding_multiplier": 5.0,
    },
    "t5": {"position_embedding_type": "relative_bias", "attention_scaling": 1.0, "relative_attention_num_buckets": 8},
    "umt5": {"position_embedding_type": "relative_bias", "relative_attention_per_layer": True, "head_dim": 8},
    "modern": {"num_key_value_heads": 1, "qk_norm": "head", "layer_types": "SF", "sliding_window": 4},
    "sliding": {"layer_types": "S", "sliding_window": 3, "qk_norm": "full", "norm_placement": "branch"},
    "sandwich": {"norm_placement": "sandwich", "norm_unit_offset": True, "norm_casting_mode": "gemma", "head_dim": 6},
    "parallel": {"parallel_block": "two_norms", "norm_type": "layernorm", "ffn_type": "mlp"},
    "shared norm": {"parallel_block": "shared_norm", "parallel_sum_order": "residual_first", "rope_interleaved": True},
    "alibi": {"position_embedding_type": "alibi", "residual_multiplier": 0.5, "attention_gate": "headwise"},
    "deepnorm": {"norm_placement": "deepnorm", "norm_type": "layernorm", "position_embedding_type": "learned"},
    "softcap": {"attn_logit_softcapping": 4.0, "embedding_norm": True, "clip_qkv": 3.0},
    "sinks": {"attention_sinks": True, "learned_scale_type": "channel", "layer_scale_init": 0.5},
}  # fmt: skip


def stack(name: str, layers: int, **overrides) -> dict:
    return {
        "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4,
        "num_hidden_layers": layers, "max_position_embeddings": 40, "pad_token_id": PAD, **STACKS[name], **overrides,
    }  # fmt: skip


def build(encoder: str, decoder: str, seed: int = 0, **top) -> VariantForConditionalGeneration:
    config = VariantSeq2SeqConfig(
        encoder=stack(encoder, 2), decoder=stack(decoder, 3), decoder_start_token_id=START, pad_token_id=PAD,
        eos_token_id=EOS, **top,
    )  # fmt: skip
    return hostile_(VariantForConditionalGeneration(config), seed).eval()


PAIRS = [(name, other) for name, other in zip(STACKS, random.Random(0).sample(list(STACKS), len(STACKS)))]
PAIRS += [("vanilla", "vanilla"), ("sliding", "sliding")]


@pytest.fixture(params=PAIRS, ids="-".join)
def model(request) -> VariantForConditionalGeneration:
    return build(*request.param)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two sources, the second one padded: ids and mask, (2, 11)."""
    ids = torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return ids.masked_fill(mask == 0, PAD), mask


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    # Other shapes sum in another order; nothing else may differ.
    assert (a - b).abs().max() < 1e-4 * b.std()


def test_cached_steps_equal_the_whole(model):
    ids, mask = batch()
    target = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, decoder_input_ids=target, use_cache=False).logits
        encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)
        cache, steps = None, []
        for part in target.split([3, 1, 1, 1, 2], dim=1):
            out = model(
                encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=part, past_key_values=cache,
                use_cache=True,
            )  # fmt: skip
            cache = out.past_key_values
            steps.append(out.logits)
    assert_close(torch.cat(steps, dim=1), whole)


def test_generation_does_not_depend_on_the_cache(model):
    ids, mask = batch()
    settings = {"attention_mask": mask, "max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(model.generate(ids, **settings), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", **settings), expected)
    beams = model.generate(ids, num_beams=3, **settings)
    assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **settings))


def test_padding_changes_no_real_token(model):
    ids, mask = batch()
    target = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(4))
    target_mask = torch.ones_like(target)
    target_mask[1, 4:] = 0
    with torch.no_grad():
        padded = model(
            input_ids=ids, attention_mask=mask, decoder_input_ids=target, decoder_attention_mask=target_mask
        ).logits
        alone = model(input_ids=ids[1:, :7], decoder_input_ids=target[1:, :4]).logits
    assert_close(padded[1:, :4], alone)


def test_a_4d_mask_of_the_source_says_what_is_seen():
    source = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    model = build("alibi", "softcap")
    model.set_attn_implementation("eager")
    mask = torch.ones_like(source)
    mask[0, 4:] = 0
    states = model.get_encoder()(source, attention_mask=mask)
    outputs = [
        model(encoder_outputs=states, decoder_input_ids=source, attention_mask=given).logits
        for given in (mask, mask[:, None, None].bool(), mask[:, None, None])
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_later_decoder_tokens_change_no_earlier_logits(model):
    ids, mask = batch()
    target = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(4))
    changed = target.clone()
    changed[:, 4:] = 5
    with torch.no_grad():
        logits = [model(input_ids=ids, attention_mask=mask, decoder_input_ids=t).logits for t in (target, changed)]
    assert torch.equal(logits[0][:, :4], logits[1][:, :4])
    assert not torch.equal(logits[0], logits[1])


def test_every_encoder_token_matters(model):
    """Cross-attention sees the whole source, also where the decoder's own layers slide."""
    ids, _ = batch()
    ids = ids[:1]
    target = torch.tensor([[START, 5, 6, 7, 8]])
    with torch.no_grad():
        logits = model(input_ids=ids, decoder_input_ids=target).logits
        changed = ids.clone()
        changed[0, 0] = (ids[0, 0] + 7) % VOCABULARY
        assert not torch.equal(model(input_ids=changed, decoder_input_ids=target).logits, logits)


def test_backward_reaches_every_parameter(model):
    ids, mask = batch()
    model.train()
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []


def test_save_and_reload(model, tmp_path):
    ids, mask = batch()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert loaded.config.to_dict().keys() == model.config.to_dict().keys()
    with torch.no_grad():
        logits = [m(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits for m in (model, loaded.eval())]
    assert torch.equal(*logits)


def test_labels_are_shifted_once():
    model = build("vanilla", "modern")
    ids, mask = batch()
    labels = ids.clone()
    labels[1, 8:] = -100
    out = model(input_ids=ids, attention_mask=mask, labels=labels)
    inputs = torch.cat([torch.full((2, 1), START), labels[:, :-1].masked_fill(labels[:, :-1] == -100, PAD)], dim=1)
    logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=inputs).logits
    assert torch.equal(out.logits, logits)
    assert torch.equal(out.loss, F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1)))
    summed = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=50).loss
    expected = F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1), reduction="sum") / 50
    assert torch.equal(summed, expected)


def test_last_token_shift_wraps_the_language_code():
    model = build("vanilla", "vanilla", label_shift="last_token")
    labels = torch.tensor([[7, 8, EOS, 40], [9, EOS, 41, -100]])
    expected = torch.tensor([[40, 7, 8, EOS], [41, 9, EOS, 41]])
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(labels), expected)


def test_missing_start_token_is_named():
    model = build("vanilla", "vanilla")
    model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        model.prepare_decoder_input_ids_from_labels(torch.tensor([[5, 6]]))


def test_encoder_outputs_are_reused():
    model = build("t5", "alibi")
    ids, mask = batch()
    with torch.no_grad():
        encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)
        a = model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=ids).logits
        b = model(encoder_outputs=(encoded[0],), attention_mask=mask, decoder_input_ids=ids).logits
        c = model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits
    assert torch.equal(a, b)
    assert torch.equal(a, c)


def test_outputs_of_both_stacks():
    model = build("modern", "parallel")
    ids, mask = batch()
    model.set_attn_implementation("eager")
    out = model(
        input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :5], output_attentions=True,
        output_hidden_states=True,
    )  # fmt: skip
    assert [len(x) for x in (out.encoder_hidden_states, out.decoder_hidden_states)] == [3, 4]
    assert [len(x) for x in (out.encoder_attentions, out.decoder_attentions, out.cross_attentions)] == [2, 3, 3]
    assert out.cross_attentions[0].shape == (2, 4, 5, 11)
    assert torch.allclose(out.cross_attentions[0][1, ..., 7:], torch.zeros(()))


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_ties(share, tie, tmp_path):
    model = build("vanilla", "vanilla", share_embeddings=share, tie_word_embeddings=tie)
    encoder, decoder = model.model.encoder.embed_tokens.weight, model.model.decoder.embed_tokens.weight
    assert (encoder is decoder) == share
    assert (model.lm_head.weight is decoder) == tie
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    before, after = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (loaded.model.encoder.embed_tokens.weight is loaded.model.decoder.embed_tokens.weight) == share
    assert (loaded.lm_head.weight is loaded.model.decoder.embed_tokens.weight) == tie


def test_resizing_grows_tables_and_bias_together():
    model = build("vanilla", "vanilla", final_logits_bias=True)
    ids, mask = batch()
    before = model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits
    model.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
    after = model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits
    assert after.shape[-1] == VOCABULARY + 4
    assert model.final_logits_bias.shape == (1, VOCABULARY + 4)
    assert model.config.vocab_size == model.config.encoder.vocab_size == VOCABULARY + 4
    # The same rows in a wider product.
    assert_close(after[..., :VOCABULARY], before)


def test_two_vocabularies_are_resized_apart():
    config = VariantSeq2SeqConfig(
        encoder=stack("vanilla", 1), decoder=stack("vanilla", 1, vocab_size=31), share_embeddings=False
    )
    model = VariantForConditionalGeneration(config)
    assert model.lm_head.out_features == 31
    model.resize_token_embeddings(60)
    assert (model.config.encoder.vocab_size, model.lm_head.out_features) == (60, 31)


def test_forced_first_token():
    model = build("vanilla", "modern")
    ids, mask = batch()
    made = model.generate(ids, attention_mask=mask, max_new_tokens=5, forced_bos_token_id=17, do_sample=False)
    assert (made[:, 1] == 17).all()


def test_deepnorm_constants_are_the_papers():
    config = VariantSeq2SeqConfig(encoder=stack("deepnorm", 6), decoder=stack("deepnorm", 4))
    assert config.encoder.deepnorm_alpha == pytest.approx(0.81 * (6**4 * 4) ** (1 / 16))
    assert config.encoder.deepnorm_beta == pytest.approx(0.87 * (6**4 * 4) ** (-1 / 16))
    assert config.decoder.deepnorm_alpha == pytest.approx((3 * 4) ** 0.25)
    assert config.decoder.deepnorm_beta == pytest.approx((12 * 4) ** -0.25)


@pytest.mark.parametrize(
    ("top", "fragment"),
    [
        ({"decoder": stack("vanilla", 1, vocab_size=9)}, "`share_embeddings`"),
        ({"encoder": stack("vanilla", 1, output_projection=True, embedding_size=8)}, "`output_projection`"),
        ({"encoder": stack("vanilla", 1, is_causal=True, add_cross_attention=True)}, "add_cross_attention"),
        ({"unread_shared_embedding": True}, "`unread_shared_embedding`"),
        ({"hidden_size": 48}, "`hidden_size`"),
    ],
)
def test_inconsistent_stacks_are_refused(top, fragment):
    with pytest.raises(ValueError, match=fragment):
        VariantSeq2SeqConfig(**{"encoder": stack("vanilla", 1), "decoder": stack("vanilla", 1)} | top)


def reversal_batches(count: int) -> list[dict[str, torch.Tensor]]:
    """A real task: spell the source backwards."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(count):
        words = torch.randint(3, VOCABULARY, (8, 6), generator=generator)
        end = torch.full((8, 1), EOS)
        batches.append({"input_ids": torch.cat([words, end], 1), "labels": torch.cat([words.flip(1), end], 1)})
    return batches


def small_bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=16, dropout=0.0,
            pad_token_id=PAD, bos_token_id=START, eos_token_id=EOS, decoder_start_token_id=START,
            forced_eos_token_id=None,
        )
    )  # fmt: skip


def test_training_follows_the_stock_class_step_by_step():
    stock = small_bart()
    ours = hf_variants.from_native(stock)
    losses = []
    for model in (stock, ours):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        losses.append([])
        for inputs in reversal_batches(80):
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]
    assert losses[1][-1] < 0.8 * losses[1][0]


def test_seq2seq_trainer_with_generation(tmp_path):
    model = hf_variants.from_native(small_bart())
    batches = reversal_batches(4)
    examples = [
        {name: tensor[row] for name, tensor in inputs.items()}
        for inputs in batches
        for row in range(len(inputs["input_ids"]))
    ]
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=8, predict_with_generate=True,
            generation_max_length=9, report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True,
        ),
        train_dataset=examples,
        eval_dataset=examples[:8],
    )  # fmt: skip
    assert trainer.train().training_loss > 0
    predicted = trainer.predict(examples[:8])
    assert predicted.predictions.shape[0] == 8
