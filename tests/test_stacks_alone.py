"""Classes of transformers that are one stack of a type: encoders as decoders, and the decoders of encoder-decoders."""

import inspect
import random
import sys

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

import hf_variants
from hf_variants.conversion import ConversionError, convert, export, verify
from hf_variants.conversion.family import DECODER_HEADS, all_families, family_of
from hf_variants.conversion.verification import lay_alike
from tests.native_rows import all_rows
from tests.parity import as_choices, check_generation, check_logits, check_round_trip, hostile_, set_backend


ROWS = all_rows()
DECODERS = [name for name, family in all_families().items() if family.decoder is not None]
ENCODERS = [name for name in DECODERS if not family_of(name).is_seq2seq]


def decoder(model_type: str, seed: int = 0, **overrides):
    """A small stock decoder."""
    family = family_of(model_type)
    options = ROWS[model_type].draw(random.Random(f"{model_type}-{seed}"))
    if family.is_seq2seq:
        # The stock class makes a cache of as many layers as the encoder has.
        options["encoder_layers"] = options["decoder_layers"]
        options |= {"decoder_vocab_size": options["vocab_size"]} if "decoder_vocab_size" in options else {}
    else:
        # Chunks of the FFN do not divide the single token of a decoding step.
        options |= {"is_decoder": True, "chunk_size_feed_forward": 0}
    model = family.decoder.native_class("causal_lm")(family.config_map.native_class(**options | overrides))
    return hostile_(model, seed).eval()


def reads_is_decoder(model_class) -> bool:
    """Whether a stack sees later tokens unless its config says that it is a decoder."""
    source = inspect.getsource(sys.modules[model_class.__module__])
    return "config.is_decoder" in source and "create_bidirectional_mask" in source


def test_every_type_whose_stack_transformers_uses_as_a_decoder_is_one():
    causal = {name: (family, family.heads.get("causal_lm")) for name, family in all_families().items()}
    types = {
        name
        for name, (family, listed) in causal.items()
        if not family.is_seq2seq and listed and name in listed[0] and reads_is_decoder(family.native_class("base"))
    }
    assert types == set(ENCODERS)


def test_every_decoder_of_an_encoder_decoder_that_transformers_has_is_one():
    listed = DECODER_HEADS["causal_lm"][0]
    types = {name for name, family in all_families().items() if family.is_seq2seq and name in listed}
    assert types == set(DECODERS) - set(ENCODERS)


@pytest.mark.parametrize("model_type", DECODERS)
def test_decoder_in_memory(model_type):
    row = ROWS[model_type]
    native = decoder(model_type)
    ours = hf_variants.from_native(native)
    assert type(ours) is hf_variants.VariantForCausalLM
    assert ours.num_parameters() == native.num_parameters()
    assert check_round_trip(native, ours) == []
    assert check_generation(native, ours, row) == []
    lay_alike(native, ours)
    set_backend(native, ours, "eager")
    ids = torch.arange(3, 27).view(2, 12)
    labels = ids.masked_fill(ids % 5 == 0, -100)
    assert torch.equal(native(ids, labels=labels).loss, ours(ids, labels=labels).loss)
    assert check_logits(native, ours, row, 0.0) == []


@pytest.mark.parametrize("model_type", DECODERS)
def test_decoder_on_disk(model_type, tmp_path):
    native = decoder(model_type, seed=1)
    native.save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "variant")
    report = verify(tmp_path / "native", tmp_path / "variant", progress=False)
    assert report.ok, report
    export(tmp_path / "variant", tmp_path / "back")
    back, info = type(native).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in native.state_dict().items())


@pytest.mark.parametrize("model_type", sorted({*DECODERS} - {*ENCODERS}))
def test_decoder_attends_to_another_stack_and_counts_padding(model_type):
    # Of no effect on the class, and often in its configs.
    native = decoder(model_type, seed=2, add_cross_attention=True)
    ours = hf_variants.from_native(native)
    assert check_round_trip(native, ours) == []
    lay_alike(native, ours)
    set_backend(native, ours, "eager")
    size = native.config.hidden_size
    source = torch.randn(2, 7, size, generator=torch.Generator().manual_seed(0))
    ids, mask = torch.arange(3, 23).view(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    theirs, made = (model(ids, attention_mask=mask, encoder_hidden_states=source).logits for model in (native, ours))
    assert torch.equal(theirs[mask.bool()], made[mask.bool()])


def test_head_of_marians_decoder_has_the_rows_of_its_embedding_or_is_refused():
    native = decoder("marian", decoder_vocab_size=83, share_encoder_decoder_embeddings=False, tie_word_embeddings=True)
    ours = hf_variants.from_native(native)
    ids = torch.arange(60, 80).view(2, 10)
    assert torch.equal(native(ids).logits, ours(ids).logits)
    assert check_round_trip(native, ours) == []
    native = decoder(
        "marian", decoder_vocab_size=83, share_encoder_decoder_embeddings=False, tie_word_embeddings=False
    )
    with pytest.raises(ConversionError, match="`decoder_vocab_size` 83"):
        hf_variants.from_native(native)


# Megatron's cross-attention in transformers takes sources as long as the target only.
@pytest.mark.parametrize("model_type", sorted({*ENCODERS} - {"megatron-bert"}))
def test_encoder_as_a_decoder_attends_to_another_stack(model_type):
    native = decoder(model_type, add_cross_attention=True)
    ours = hf_variants.from_native(native)
    assert check_round_trip(native, ours) == []
    lay_alike(native, ours)
    set_backend(native, ours, "eager")
    source = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    ids, mask = torch.arange(3, 27).view(2, 12), torch.ones(2, 7)
    mask[1, 4:] = 0
    caches = [EncoderDecoderCache(DynamicCache(), DynamicCache()) for _ in range(2)]
    for tokens in (ids[:, :9], ids[:, 9:]):
        theirs, made = (
            model(tokens, encoder_hidden_states=source, encoder_attention_mask=mask, past_key_values=cache).logits
            for model, cache in zip((native, ours), caches)
        )
        assert torch.equal(theirs, made)


@pytest.mark.parametrize("model_type", ENCODERS)
def test_language_model_of_an_encoder_that_is_no_decoder(model_type, tmp_path):
    # What stock computes: every token sees all, the labels are shifted, and generation goes on behind a cache.
    native = decoder(model_type, is_decoder=False)
    native.save_pretrained(tmp_path / "native")
    report = convert(tmp_path / "native", tmp_path / "variant", verify=model_type == "bert")
    assert (report.head, report.part) == ("causal_lm", "")
    ours = hf_variants.VariantForCausalLM.from_pretrained(tmp_path / "variant")
    assert not ours.config.is_causal
    assert "AutoModelForCausalLM" in ours.config.auto_map
    lay_alike(native, ours)
    ids = torch.arange(3, 27).view(2, 12)
    theirs, made = (model(ids, labels=ids.flip(1)) for model in (native, ours))
    assert torch.equal(theirs.logits, made.logits)
    assert torch.equal(theirs.loss, made.loss)
    theirs, made = (model.generate(ids, max_new_tokens=5, do_sample=False) for model in (native, ours))
    assert torch.equal(theirs, made)
    assert check_round_trip(native, ours) == []


HEADS = [
    (model_type, head)
    for model_type in ENCODERS
    for head in family_of(model_type).decoder.converted_heads
    if head != "causal_lm"
]


def loss(model, head: str, ids: torch.Tensor) -> torch.Tensor | None:
    if head == "question_answering":
        return model(ids, start_positions=ids[:, 0] % 5, end_positions=ids[:, 1] % 9).loss
    if head == "base":
        return None
    if head == "multiple_choice":
        return model(ids[None], labels=torch.tensor([1])).loss
    of_rows = dict.fromkeys(("sequence_classification", "next_sentence_prediction"), ids[:, 0] % 2)
    labels = {**of_rows, "token_classification": ids % 2}.get(head, ids)
    return model(ids, labels=labels).loss


@pytest.mark.parametrize(("model_type", "head"), HEADS)
def test_other_classes_of_an_encoder_as_a_decoder(model_type, head, tmp_path):
    family = family_of(model_type)
    native = hostile_(family.native_class(head)(decoder(model_type).config)).eval()
    ours = hf_variants.from_native(native)
    assert ours.config.is_causal
    assert type(ours) is family.variant_class(head)
    assert check_round_trip(native, ours) == []
    lay_alike(native, ours)
    ids = torch.arange(3, 27).view(2, 12)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    batch = as_choices(head, {"input_ids": ids, "attention_mask": mask})
    theirs, made = (model(**batch) for model in (native, ours))
    for name in ("last_hidden_state", "pooler_output", "logits", "start_logits", "end_logits"):
        if name in theirs:
            assert torch.equal(theirs[name], made[name]), name
    theirs, made = loss(native, head, ids), loss(ours, head, ids)
    assert theirs is made is None or torch.equal(theirs, made)
    if model_type == "bert":
        native.save_pretrained(tmp_path / "native")
        report = convert(tmp_path / "native", tmp_path / "variant", verify=True)
        assert (report.head, report.verification.ok) == (head, True)


def test_bare_decoder_with_a_pooler_gives_its_cache():
    native = family_of("bert").native_class("base")(decoder("bert", add_cross_attention=True).config).eval()
    ours = hf_variants.from_native(native)
    source = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(3, 27).view(2, 12)
    lay_alike(native, ours)
    for model in (native, ours):
        first = model(ids[:, :9], encoder_hidden_states=source, use_cache=True)
        second = model(ids[:, 9:], encoder_hidden_states=source, past_key_values=first.past_key_values)
        whole = model(ids, encoder_hidden_states=source)
        assert torch.allclose(second.last_hidden_state, whole.last_hidden_state[:, 9:], atol=1e-5)
        assert torch.equal(whole.pooler_output, native(ids, encoder_hidden_states=source).pooler_output)


@pytest.mark.parametrize("rows", [83, 60])
def test_marians_one_table_has_the_rows_that_the_class_gives_it(rows):
    options = ROWS["marian"].draw(random.Random(0)) | {"vocab_size": 71, "tie_word_embeddings": True}
    options |= {"share_encoder_decoder_embeddings": True, "decoder_vocab_size": rows}
    family = family_of("marian")
    native = hostile_(family.native_class("seq2seq_lm")(family.config_map.native_class(**options))).eval()
    ours = hf_variants.from_native(native)
    ids = torch.arange(40, 60).view(2, 10)
    assert torch.equal(native(ids, decoder_input_ids=ids).logits, ours(ids, decoder_input_ids=ids).logits)
    assert check_round_trip(native, ours) == []


def test_a_decoder_with_more_layers_than_its_encoder_is_verified_without_the_cache_that_stock_gets_wrong(tmp_path):
    native = decoder("pegasus", encoder_layers=1, decoder_layers=3)
    native.save_pretrained(tmp_path / "native")
    report = convert(tmp_path / "native", tmp_path / "variant", verify=True).verification
    assert any("without caches, with which PegasusForCausalLM stops" in reason for reason in report.deviations)
    ids = torch.arange(3, 15)[None]
    ours = hf_variants.VariantForCausalLM.from_pretrained(tmp_path / "variant")
    assert ours.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 16)
    native.generation_config.use_cache = False
    theirs = native.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(theirs, ours.generate(ids, max_new_tokens=4, do_sample=False))


def test_a_decoder_whose_stock_class_takes_its_logits_for_others_is_verified_without_a_loss(tmp_path):
    native = decoder("marian", decoder_vocab_size=83, share_encoder_decoder_embeddings=False, tie_word_embeddings=True)
    with pytest.raises(RuntimeError, match="shape"):
        native(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]]))
    native.save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "variant")
    report = verify(tmp_path / "native", tmp_path / "variant", progress=False)
    assert report.ok, report
    assert "MarianForCausalLM stops" in {check.name: check.detail for check in report.checks}["training loss"]


@pytest.mark.parametrize("chunk", [3, 7])
def test_feed_forward_in_chunks_is_verified_on_whole_ones(chunk, tmp_path):
    """Decoding has one token at a time, which stock refuses as we do."""
    native = decoder("bert", chunk_size_feed_forward=chunk)
    native.save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "variant")
    report = verify(tmp_path / "native", tmp_path / "variant", progress=False)
    assert report.ok, report
    seen = {check.name: check.detail for check in report.checks}
    assert f"multiple of the chunk size {chunk}" in seen["32 greedy tokens"]
