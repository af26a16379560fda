"""The model that tells whether a sentence follows another, beside every stock class of the families here that does."""

import json

import pytest
import torch
from transformers import AutoModelForNextSentencePrediction, BertConfig, BertForNextSentencePrediction
from transformers.models.auto.modeling_auto import MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES

import hf_variants
from hf_variants import VariantConfig, VariantForNextSentencePrediction
from hf_variants.conversion import supported_model_types
from hf_variants.conversion.family import family_of
from hf_variants.conversion.verification import _CountedDropout
from hf_variants.standalone import NotStandalone, write_source

from .native_rows import all_rows
from .parity import check_gradients, check_round_trip, hostile_, random_native, set_backend


HEAD = "next_sentence_prediction"
ROWS = all_rows()
TYPES = [name for name in supported_model_types() if name in MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES]
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip


def pairs(config):
    """Two rows of two parts each, the second padded: (batch, length)."""
    ids = torch.randint(3, config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    types = (torch.arange(12) > 4).long().expand(2, 12) * (config.type_vocab_size > 1)
    return {
        "input_ids": ids.masked_fill(mask == 0, config.pad_token_id or 0), "attention_mask": mask,
        "token_type_ids": types, "labels": torch.tensor([1, 0]),
    }  # fmt: skip


def test_types_are_those_of_transformers():
    assert {"bert", "ernie", "megatron-bert"} <= set(TYPES)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("model_type", TYPES)
def test_stock_class(model_type, seed):
    row = ROWS[model_type]
    native = random_native(row, seed, HEAD)
    ours = hf_variants.from_native(native)
    assert type(ours) is VariantForNextSentencePrediction
    assert not check_round_trip(native, ours)
    family = family_of(model_type)
    assert not family.deviations_of(ours.config)
    assert not check_gradients(native, ours, 0.0, HEAD, pairs(native.config))
    backends = row.backends if isinstance(row.backends, tuple) else row.backends(native.config)
    for dtype in (torch.float32, torch.bfloat16):
        for backend in backends:
            set_backend(native.to(dtype), ours.to(dtype), backend)
            with torch.no_grad():
                theirs, made = (model(**pairs(model.config)) for model in (native, ours))
            assert made.logits.shape == (2, 2)
            assert torch.equal(made.logits, theirs.logits), (dtype, backend)
            assert torch.equal(made.loss, theirs.loss), (dtype, backend)


@pytest.mark.parametrize("model_type", TYPES)
def test_the_head_itself_drops_nothing(model_type):
    native = random_native(ROWS[model_type], 0, HEAD)
    native.config.classifier_dropout = 0.4
    native.config.hidden_dropout_prob = native.config.attention_probs_dropout_prob = 0.1
    native = hostile_(type(native)(native.config))
    losses = []
    for model in (native, hf_variants.from_native(native)):
        model.train().set_attn_implementation("eager")
        with torch.no_grad(), _CountedDropout() as dropout:
            losses.append((model(**pairs(model.config)).loss, dropout.calls))
    assert losses[0][1] == losses[1][1] > 0
    torch.testing.assert_close(losses[0][0], losses[1][0], rtol=1e-5, atol=1e-5)


def test_checkpoints_of_two_readers(tmp_path):
    """The Auto class reads the stock folder's conversion, and what is trained on it goes back."""
    config = BertConfig(**SIZES, type_vocab_size=2)
    native = hostile_(BertForNextSentencePrediction(config)).eval()
    native.save_pretrained(tmp_path / "stock")
    hf_variants.conversion.convert(tmp_path / "stock", tmp_path / "variant", verify=True)
    ours = AutoModelForNextSentencePrediction.from_pretrained(tmp_path / "variant")
    assert type(ours) is VariantForNextSentencePrediction
    auto_map = json.loads((tmp_path / "variant/config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForNextSentencePrediction"] == "modeling_variant.VariantForNextSentencePrediction"
    batch = pairs(config)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    ours.train()(**batch).loss.backward()
    optimizer.step()
    ours.eval().save_pretrained(tmp_path / "trained")
    hf_variants.conversion.export(tmp_path / "trained", tmp_path / "back")
    back = AutoModelForNextSentencePrediction.from_pretrained(tmp_path / "back")
    assert type(back) is BertForNextSentencePrediction
    with torch.no_grad():
        assert torch.equal(back(**batch).logits, ours(**batch).logits)


@pytest.mark.parametrize(
    "fields", [{"is_causal": True}, {"is_causal": False}, {"is_causal": False, "pooler": True}], ids=str
)
def test_fresh_variant(fields):
    """A decoder answers by its last token, as its classifier of sequences does."""
    model = VariantForNextSentencePrediction(VariantConfig(**SIZES, **fields, num_labels=5, pad_token_id=0)).eval()
    batch = pairs(model.config)
    mask = batch["attention_mask"]
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=mask).logits
        alone = model(batch["input_ids"][1:, :8]).logits
        embedded = model(inputs_embeds=model.get_input_embeddings()(batch["input_ids"]), attention_mask=mask).logits
    assert logits.shape == (2, 2)
    torch.testing.assert_close(logits[1:], alone)
    torch.testing.assert_close(embedded, logits)


def test_a_standalone_file_is_refused():
    with pytest.raises(NotStandalone, match=r"VariantForNextSentencePrediction .*hf-variants bundle"):
        write_source(VariantConfig(**SIZES, is_causal=False), "pairs", "ForNextSentencePrediction")
