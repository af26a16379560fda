"""T5 1.1 and its kind: the config says that the LM head is the embedding, and the checkpoint has another head."""

import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

import hf_variants
from hf_variants.conversion import convert, export, verify
from hf_variants.conversion.family import all_families, family_of
from hf_variants.conversion.skeleton import stored_tensors
from hf_variants.conversion.verification import set_attention
from tests.native_rows import all_rows
from tests.parity import hostile_


LOOSE = [model_type for model_type, family in all_families().items() if family.loosely_tied]


def save_untied(model_type: str, folder, seed: int = 0):
    """A stock checkpoint whose LM head has values of its own, and what the stock class makes of it."""
    family = family_of(model_type)
    config = family.config_map.native_class(**all_rows()[model_type].draw(random.Random(seed)))
    hostile_(family.native_class("seq2seq_lm")(config)).save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    embedding = next(tensor for name, tensor in tensors.items() if tensor.shape == (config.vocab_size, config.d_model))
    head = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(seed)) / 8
    save_file(tensors | {family.loosely_tied: head}, path, metadata={"format": "pt"})
    native = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert torch.equal(native.get_parameter(family.loosely_tied), head)
    assert not torch.equal(native.get_input_embeddings().weight, head)
    return native.eval()


def logits(model) -> torch.Tensor:
    ids = torch.randint(4, 71, (2, 20), generator=torch.Generator().manual_seed(1))
    # The one attention in which UMT5's decoder is causal in every version.
    set_attention(model, "eager")
    with torch.no_grad():
        return model(input_ids=ids, decoder_input_ids=ids[:, :9]).logits


@pytest.mark.parametrize("model_type", LOOSE)
def test_in_memory(model_type, tmp_path):
    native = save_untied(model_type, tmp_path / "native")
    ours = hf_variants.from_native(native)
    assert not ours.config.tie_word_embeddings
    assert torch.equal(logits(ours), logits(native))
    assert torch.equal(logits(hf_variants.to_native(ours)), logits(native))


@pytest.mark.parametrize("model_type", LOOSE)
def test_on_disk(model_type, tmp_path):
    native = save_untied(model_type, tmp_path / "native")
    # What the stock class itself writes, which need not be what it has read.
    native.save_pretrained(tmp_path / "saved")
    for source in ("native", "saved"):
        variant, back = tmp_path / f"{source} variant", tmp_path / f"{source} back"
        convert(tmp_path / source, variant)
        ours = AutoModelForSeq2SeqLM.from_pretrained(variant)
        assert not ours.config.tie_word_embeddings
        assert torch.equal(logits(ours.eval()), logits(native))
        report = verify(tmp_path / source, variant, new_tokens=4, progress=False)
        assert report.ok, report.to_markdown()
        export(variant, back)
        restored = AutoModelForSeq2SeqLM.from_pretrained(back)
        assert type(restored) is type(native)
        assert torch.equal(logits(restored.eval()), logits(native))


@pytest.mark.parametrize("model_type", LOOSE)
def test_saved_by_us(model_type, tmp_path):
    native = save_untied(model_type, tmp_path / "native")
    hf_variants.from_native(tmp_path / "native").save_pretrained(tmp_path / "variant")
    hf_variants.to_native(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "variant")).save_pretrained(
        tmp_path / "back"
    )
    assert torch.equal(logits(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "back").eval()), logits(native))


@pytest.mark.parametrize("model_type", LOOSE)
def test_a_head_equal_to_the_embedding_stays_tied(model_type, tmp_path):
    family = family_of(model_type)
    config = family.config_map.native_class(**all_rows()[model_type].draw(random.Random(0)))
    native = hostile_(family.native_class("seq2seq_lm")(config)).eval()
    ours = hf_variants.from_native(native)
    assert ours.config.tie_word_embeddings
    assert family.loosely_tied not in stored_tensors(ours)
