"""Encoder-decoders called without decoder inputs: with labels alone, or with nothing, every type does what stock does."""

import pytest
import torch

import hf_variants
from hf_variants.conversion import convert
from hf_variants.conversion.family import family_of
from tests.native_rows import all_rows
from tests.parity import random_native, set_backend


ROWS = all_rows()
TYPES = [name for name in ROWS if family_of(name).is_seq2seq]


def outcome(model, **inputs):
    """The first output, or the kind of error; stock classes also fail by the missing attribute of `None`."""
    try:
        with torch.no_grad():
            return model(**inputs)[0]
    except (ValueError, AttributeError):
        return ValueError


def both(model_type: str, head: str):
    stock = random_native(ROWS[model_type], 0, head)
    ours = hf_variants.from_native(stock)
    set_backend(stock, ours, "eager")
    return stock, ours


@pytest.mark.parametrize("head", ["base", "seq2seq_lm"])
@pytest.mark.parametrize("model_type", TYPES)
def test_nothing(model_type, head):
    stock, ours = both(model_type, head)
    # Short of the padding tokens in one row, which the last token of another follows.
    ids = torch.arange(6, 16).view(2, 5)
    if stock.config.pad_token_id is not None:
        ids[1, 3:] = stock.config.pad_token_id
    embeddings = stock.get_input_embeddings()(ids).detach()
    for inputs in ({"input_ids": ids}, {"inputs_embeds": embeddings}):
        expected, made = outcome(stock, **inputs), outcome(ours, **inputs)
        assert expected is made if expected is ValueError else torch.equal(expected, made), list(inputs)


@pytest.mark.parametrize("model_type", TYPES)
def test_labels_alone(model_type, tmp_path):
    stock, ours = both(model_type, "seq2seq_lm")
    stock.save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "variant")
    loaded = type(ours).from_pretrained(tmp_path / "variant", attn_implementation="eager")
    # Without the hostile tables of positions, which the class computes and does not save (Marian).
    reloaded = type(stock).from_pretrained(tmp_path / "native", attn_implementation="eager")
    labels = torch.tensor([[7, 8, 9, 4], [11, 12, -100, -100]])
    inputs = {"input_ids": torch.arange(6, 16).view(2, 5), "labels": labels}
    expected = outcome(stock, **inputs)
    assert expected is not ValueError
    assert torch.equal(expected, outcome(ours, **inputs))
    assert torch.equal(outcome(reloaded, **inputs), outcome(loaded, **inputs))
