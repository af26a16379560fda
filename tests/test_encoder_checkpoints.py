"""Encoder checkpoints as they lie on disks: old names, names without the prefix, tensors of the pretraining heads."""

import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import hf_variants
from hf_variants.conversion import ConversionError, convert, export, verify
from hf_variants.conversion.family import family_of
from tests.native_rows import all_rows, encoders, modern_encoders
from tests.parity import hostile_, random_native


def native(model_type: str = "bert", head: str = "masked_lm", **overrides):
    """A small stock model."""
    family = family_of(model_type)
    options = all_rows()[model_type].draw(random.Random(3)) | {"pad_token_id": 1, "chunk_size_feed_forward": 0}
    config = family.config_map.native_class(**options | overrides)
    return hostile_(family.native_class(head)(config)).eval()


def rewritten(folder, change) -> None:
    """Replace the tensors of a saved checkpoint."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def assert_same(stock, folder) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    ours = hf_variants.from_native(folder)
    with torch.no_grad():
        for expected, made in zip(stock(ids).to_tuple(), ours(ids).to_tuple(), strict=True):
            assert torch.equal(expected, made)


def test_old_names_of_norms(tmp_path):
    stock = native()
    stock.save_pretrained(tmp_path)

    def old(tensors):
        names = {
            n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            for n in tensors
        }
        return {names[name]: tensor for name, tensor in tensors.items()}

    rewritten(tmp_path, old)
    assert_same(stock, tmp_path)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "electra"])
def test_bare_model_with_the_prefix_of_a_head(model_type, tmp_path):
    stock = native(model_type, "base")
    stock.save_pretrained(tmp_path)
    rewritten(tmp_path, lambda tensors: {f"{stock.base_model_prefix}.{name}": t for name, t in tensors.items()})
    assert_same(stock, tmp_path)


def test_pretraining_heads_and_stored_positions_are_left_behind(tmp_path):
    stock = native(tie_word_embeddings=True)
    stock.save_pretrained(tmp_path)
    more = {
        "bert.embeddings.position_ids": torch.arange(64)[None],
        "bert.pooler.dense.weight": torch.zeros(32, 32),
        "bert.pooler.dense.bias": torch.zeros(32),
        "cls.seq_relationship.weight": torch.zeros(2, 32),
        "cls.seq_relationship.bias": torch.zeros(2),
        # Copies of what is tied.
        "cls.predictions.decoder.weight": stock.state_dict()["bert.embeddings.word_embeddings.weight"].clone(),
        "cls.predictions.decoder.bias": stock.state_dict()["cls.predictions.bias"].clone(),
    }
    rewritten(tmp_path, lambda tensors: tensors | more)
    assert_same(stock, tmp_path)


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_of_two_biases_of_the_head_that_are_tied_and_differ_the_one_that_is_added_to_logits_is_taken(
    model_type, tmp_path
):
    stock = native(model_type, tie_word_embeddings=True)
    stock.save_pretrained(tmp_path / "native")
    tied, source = next(pair for pair in stock.all_tied_weights_keys.items() if pair[0].endswith("bias"))
    own = torch.arange(stock.config.vocab_size) / 7
    rewritten(tmp_path / "native", lambda tensors: tensors | {tied: own, source: torch.zeros_like(own)})
    report = convert(tmp_path / "native", tmp_path / "variant", verify=True)
    assert f"differs from {tied}" in report.passed_over[source]
    assert any(f"ties {tied} to {source}" in note for note in report.notes)
    ours = hf_variants.VariantForMaskedLM.from_pretrained(tmp_path / "variant")
    assert torch.equal(ours.lm_head.bias, own)
    export(tmp_path / "variant", tmp_path / "back", verify=True)
    left, right = (type(stock).from_pretrained(tmp_path / name) for name in ("native", "back"))
    ids = torch.arange(3, 20)[None]
    assert torch.equal(left(ids).logits, right(ids).logits)


def test_the_pooler_of_the_bare_model_is_kept(tmp_path):
    stock = native(head="base")
    stock.save_pretrained(tmp_path)
    rewritten(tmp_path, lambda tensors: tensors | {"embeddings.position_ids": torch.arange(64)[None]})
    assert_same(stock, tmp_path)


@pytest.mark.parametrize("model_type", ["bert", "xlm-roberta", "megatron-bert"])
def test_a_bare_model_without_a_pooler_comes_back_without(model_type, tmp_path):
    family = family_of(model_type)
    stock_class = family.native_class("base")
    stock = hostile_(stock_class(native(model_type).config, add_pooling_layer=False)).eval()
    stock.save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "variant", verify=True)
    export(tmp_path / "variant", tmp_path / "back", verify=True)
    on_disk = stock_class.from_pretrained(tmp_path / "back", add_pooling_layer=False)
    in_memory = hf_variants.to_native(hf_variants.from_native(stock))
    for back in (on_disk, in_memory):
        assert type(back) is stock_class
        assert back.pooler is None
        assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in stock.state_dict().items())


@pytest.mark.parametrize("model_type", ["bert", "roberta", "eurobert"])
def test_positions_that_restart_under_a_mask_say_nothing_of_documents(model_type):
    stock = native(model_type)
    ours = hf_variants.from_native(stock)
    ids, mask = torch.arange(6, 30).view(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    positions = torch.cat([torch.arange(2, 7), torch.arange(2, 9)]).expand(2, -1)
    with torch.no_grad():
        theirs, made = (m(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()] for m in (stock, ours))
    assert torch.equal(theirs, made)


@pytest.mark.parametrize("model_type", [row.model_type for row in (*encoders.ROWS, *modern_encoders.ROWS)])
def test_verify(model_type, tmp_path):
    random_native(all_rows()[model_type], 1).save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "variant")
    report = verify(tmp_path / "native", tmp_path / "variant", progress=False)
    assert report.ok, report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_type", "pooling"),
    [("modernbert", "cls"), ("modernbert", "mean"), ("eurobert", "bos"), ("eurobert", "mean"), ("eurobert", "late")],
)
def test_without_a_mask_the_padding_token_counts_when_a_sequence_is_classified(model_type, pooling, dtype):
    stock = native(model_type, "sequence_classification", classifier_pooling=pooling).to(dtype)
    ours = hf_variants.from_native(stock).to(dtype)
    ids = torch.randint(2, 71, (3, 33), generator=torch.Generator().manual_seed(0))
    ids[1, 20:] = stock.config.pad_token_id
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, ours(ids).logits)
        embeddings = stock.get_input_embeddings()(ids)
        assert torch.equal(stock(inputs_embeds=embeddings).logits, ours(inputs_embeds=embeddings).logits)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"position_embedding_type": "relative_key"}, "`position_embedding_type` is 'relative_key'"),
    ],
)
def test_refusals(overrides, sentence):
    with pytest.raises(ConversionError, match=sentence):
        hf_variants.from_native(native(**overrides))


def test_a_window_without_neighbours_is_refused():
    config = family_of("modernbert").config_map.native_class(local_attention=1)
    with pytest.raises(ConversionError, match="`local_attention` is 1"):
        family_of("modernbert").config_map.to_variant(config)


ENCODERS = [name for name, row in all_rows().items() if family_of(name).primary == "masked_lm"]
TASKS = {
    "sequence_classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
}


def with_trained_pooler(stock, folder) -> dict[str, torch.Tensor]:
    """Save a masked LM as pretraining leaves it: with the pooler that its bare class has, if it has one."""
    stock.save_pretrained(folder)
    prefix = stock.base_model_prefix
    bare = family_of(stock.config.model_type).native_class("base")(stock.config)
    trained = {
        f"{prefix}.{name}": torch.randn(tensor.shape)
        for name, tensor in bare.state_dict().items()
        if name.startswith("pooler.")
    }
    rewritten(folder, lambda tensors: tensors | trained)
    return trained


@pytest.mark.parametrize("model_type", ENCODERS)
def test_a_converted_masked_lm_becomes_the_classifier_that_the_stock_class_would_become(model_type, tmp_path):
    family = family_of(model_type)
    trained = with_trained_pooler(native(model_type), tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "variant")
    batch = {"input_ids": torch.arange(6, 24).view(2, 9)}
    for head, auto_class in TASKS.items():
        if family.native_class(head) is None:
            continue
        stock = auto_class.from_pretrained(tmp_path / "native")
        ours = auto_class.from_pretrained(tmp_path / "variant")
        assert type(ours) is family.variant_class(head)
        exported = hf_variants.to_native(ours)
        assert {n: t.shape for n, t in exported.state_dict().items()} == {
            n: t.shape for n, t in stock.state_dict().items()
        }
        kept = {n: t for n, t in trained.items() if n in stock.state_dict()}
        assert all(torch.equal(exported.state_dict()[name], tensor) for name, tensor in kept.items())
        # Megatron's class has no other attention.
        ours.set_attn_implementation(stock.config._attn_implementation)
        # The head is new in either; after a step it is the same model.
        stock.load_state_dict(exported.state_dict())
        with torch.no_grad():
            for expected, made in zip(stock(**batch).to_tuple(), ours(**batch).to_tuple(), strict=True):
                assert torch.equal(expected, made), head


@pytest.mark.parametrize("model_type", ["bert", "roberta", "ernie"])
def test_the_pooler_of_a_masked_lm_comes_back_with_the_export(model_type, tmp_path):
    with_trained_pooler(native(model_type), tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "variant", verify=True)
    export(tmp_path / "variant", tmp_path / "back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("native", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    bare = family_of(model_type).native_class("base").from_pretrained(tmp_path / "native")
    ours = AutoModel.from_pretrained(tmp_path / "variant")
    ids = torch.arange(6, 24).view(2, 9)
    with torch.no_grad():
        for expected, made in zip(bare(ids).to_tuple(), ours(ids).to_tuple(), strict=True):
            assert torch.equal(expected, made)
