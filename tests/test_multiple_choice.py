"""The model that chooses among sequences, beside every stock class of the families here that does."""

import json

import pytest
import torch
from transformers import AutoModelForMultipleChoice, BertConfig, BertForMultipleChoice, ElectraConfig

import hf_variants
from hf_variants import VariantConfig, VariantForMultipleChoice
from hf_variants.conversion import ConversionError, supported_model_types
from hf_variants.conversion.engines import onnx
from hf_variants.conversion.family import family_of
from hf_variants.conversion.verification import _CountedDropout

from .native_rows import all_rows
from .parity import check_gradients, check_round_trip, hostile_, random_native, set_backend


ROWS = all_rows()
TYPES = [name for name in supported_model_types() if family_of(name).native_class("multiple_choice") is not None]
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip


def choices(config, padded="right"):
    """Three choices each for two questions, (batch, choices, length)."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, config.vocab_size, (2, 3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, 1, slice(0, 4) if padded == "left" else slice(8, None)] = 0
    ids = ids.masked_fill(mask == 0, config.pad_token_id or 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([2, 0])}


def check_outputs(native, ours, backends, bound):
    for dtype in (torch.float32, torch.bfloat16):
        native, ours = native.to(dtype), ours.to(dtype)
        for backend in backends:
            if backend == "sdpa" and not (ours._supports_sdpa and native._supports_sdpa):
                continue
            set_backend(native, ours, backend)
            for padded in ("right", "left"):
                with torch.no_grad():
                    theirs, made = (model(**choices(model.config, padded)) for model in (native, ours))
                assert made.logits.shape == (2, 3)
                for name in ("logits", "loss"):
                    if bound and dtype is torch.float32:
                        torch.testing.assert_close(made[name], theirs[name], rtol=bound, atol=bound)
                    elif not bound:
                        assert torch.equal(made[name], theirs[name]), (dtype, backend, padded, name)


def test_types_are_those_of_transformers():
    assert {"bert", "roberta", "electra", "modernbert", "distilbert", "roformer"} <= set(TYPES)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("model_type", TYPES)
def test_stock_class(model_type, seed):
    row = ROWS[model_type]
    native = random_native(row, seed, "multiple_choice")
    ours = hf_variants.from_native(native)
    assert type(ours) is VariantForMultipleChoice
    assert not check_round_trip(native, ours)
    family = family_of(model_type)
    deviations = family.deviations_of(ours.config)
    bound = max((deviation.bound for deviation in deviations), default=0.0)
    assert not check_gradients(native, ours, bound, "multiple_choice", choices(native.config))
    backends = row.backends if isinstance(row.backends, tuple) else row.backends(native.config)
    check_outputs(native, ours, backends, family.bound(ours.config))


@pytest.mark.parametrize("model_type", TYPES)
def test_dropout_is_that_of_the_stock_class(model_type):
    """Of a rate of its own for each key, so that one in place of another would show."""
    config_class = family_of(model_type).config_map.native_class
    names = [name for name in vars(config_class()) if "dropout" in name and getattr(config_class(), name) is not True]
    rates = {name: 0.1 + 0.05 * i for i, name in enumerate(names) if name != "embedding_dropout"}
    native = random_native(ROWS[model_type], 0, "multiple_choice")
    for name, rate in rates.items():
        setattr(native.config, name, rate)
    native = hostile_(type(native)(native.config))
    ours = hf_variants.from_native(native)
    losses = []
    for model in (native, ours):
        model.train().set_attn_implementation("eager")
        with torch.no_grad(), _CountedDropout() as dropout:
            losses.append((model(**choices(model.config)).loss, dropout.calls))
    assert losses[0][1] == losses[1][1] > 0
    torch.testing.assert_close(losses[0][0], losses[1][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "summary",
    [
        {"summary_type": "last"},
        {"summary_type": "mean", "summary_activation": "tanh"},
        {"summary_type": "cls_index", "summary_activation": ""},
        {"summary_use_proj": False, "summary_activation": "linear"},
    ],
)
def test_summaries_of_electra(summary):
    config = ElectraConfig(**SIZES, embedding_size=16, **summary)
    native = hostile_(family_of("electra").native_class("multiple_choice")(config)).eval()
    ours = hf_variants.from_native(native)
    assert not check_round_trip(native, ours)
    check_outputs(native, ours, ("eager",), 0.0)


def test_what_no_field_says_of_a_summary_is_refused():
    """Of the model that reads it, and of no other."""
    config = ElectraConfig(**SIZES, embedding_size=16, summary_use_proj=False)
    family = family_of("electra")
    with pytest.raises(ConversionError, match="summary_use_proj"):
        hf_variants.from_native(family.native_class("multiple_choice")(config))
    other = hf_variants.from_native(family.native_class("sequence_classification")(config))
    assert not hf_variants.to_native(other, "electra").config.summary_use_proj


def test_checkpoints_of_two_readers(tmp_path):
    """The Auto class reads the stock folder's conversion, and what is trained on it goes back."""
    config = BertConfig(**SIZES, type_vocab_size=2, classifier_dropout=0.3)
    native = hostile_(BertForMultipleChoice(config)).eval()
    native.save_pretrained(tmp_path / "stock")
    hf_variants.conversion.convert(tmp_path / "stock", tmp_path / "variant", verify=True)
    ours = AutoModelForMultipleChoice.from_pretrained(tmp_path / "variant")
    assert type(ours) is VariantForMultipleChoice
    auto_map = json.loads((tmp_path / "variant/config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForMultipleChoice"] == "modeling_variant.VariantForMultipleChoice"
    assert "pipeline_tag: multiple-choice" in (tmp_path / "variant/README.md").read_text()
    batch = choices(config)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    ours.train()(**batch).loss.backward()
    optimizer.step()
    ours.eval().save_pretrained(tmp_path / "trained")
    hf_variants.conversion.export(tmp_path / "trained", tmp_path / "back")
    back = AutoModelForMultipleChoice.from_pretrained(tmp_path / "back")
    assert type(back) is BertForMultipleChoice
    with torch.no_grad():
        assert torch.equal(back(**batch).logits, ours(**batch).logits)


@pytest.mark.parametrize("is_causal", [True, False])
def test_fresh_variant(is_causal):
    """A decoder scores a choice by its last token, as its classifier of sequences does."""
    model = VariantForMultipleChoice(VariantConfig(**SIZES, is_causal=is_causal, pad_token_id=0)).eval()
    batch = choices(model.config)
    with torch.no_grad():
        logits = model(**batch).logits
        alone = model(batch["input_ids"][:1, 1:2, :8]).logits
        embedded = model(
            inputs_embeds=model.get_input_embeddings()(batch["input_ids"]), attention_mask=batch["attention_mask"]
        )
    torch.testing.assert_close(logits[0, 1], alone[0, 0])
    torch.testing.assert_close(embedded.logits, logits)


def test_other_formats_refuse_it():
    with pytest.raises(ConversionError, match="VariantForMultipleChoice"):
        onnx.losses(VariantForMultipleChoice(VariantConfig(**SIZES)))
