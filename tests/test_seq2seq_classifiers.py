"""Classifiers of encoder-decoders, and of their encoders alone, give the bits of their stock class, both ways."""

import random

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

import hf_variants
from hf_variants.conversion import convert, export, verify
from hf_variants.conversion.family import all_families
from tests.native_rows import all_rows
from tests.parity import check_round_trip, hostile_, set_backend
from tests.test_classifiers import LENGTH, assert_equal, losses, padded


PAD, END = 3, 2
CLASSIFIERS = ("sequence_classification", "token_classification", "question_answering")
SEQ2SEQ = [family for family in all_families().values() if family.is_seq2seq]
CASES = {
    f"{family.model_type}-{head}": (part, head)
    for family in SEQ2SEQ
    for part in (family, *family.parts)
    for head in part.converted_heads
    if head in CLASSIFIERS
}


def stock_and_ours(family, head, **options):
    drawn = all_rows()[family.model_type].draw(random.Random(f"{family.model_type}-0"))
    ends = {"pad_token_id": PAD, "eos_token_id": END}
    for stack in ("encoder", "decoder"):
        if isinstance(drawn.get(stack), dict):
            drawn[stack] |= ends
    if "classifier_dropout" not in drawn and head != "question_answering":
        options = {"classifier_dropout": 0.0, **options}
    config = family.config_map.native_class(**{**drawn, **ends, **options})
    stock = hostile_(family.native_class(head)(config)).eval()
    return stock, hf_variants.from_native(stock).eval()


def sources(rows=3):
    """(rows, LENGTH) of tokens that every vocabulary has; two of each row end a sequence, and neither becomes padding."""
    ids = torch.randint(PAD + 1, 70, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, 5] = ids[:, 7] = END
    return ids


def check(models, head, **batch):
    rows = len(batch["input_ids"])
    assert_equal(models, **batch)
    if head == "sequence_classification":
        for problem_type, labels in losses(models[0].config.num_labels, rows):
            assert_equal(models, problem_type, **batch, labels=labels)
    elif head == "token_classification":
        labels = batch.get("decoder_input_ids", batch["input_ids"]) % 5
        assert_equal(models, **batch, labels=labels.masked_fill(labels == 2, -100))
    else:
        for start, end in (([1, 2, 3], [4, 5, 6]), ([LENGTH, 1, 50], [0, 70, 2]), ([-1, 0, 1], [2, 2, 2])):
            positions = {"start_positions": torch.tensor(start)[:rows], "end_positions": torch.tensor(end)[:rows]}
            assert_equal(models, **batch, **positions)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_losses(case):
    family, head = CASES[case]
    options = {} if head == "question_answering" else {"num_labels": 5}
    models = stock_and_ours(family, head, **options)
    assert not check_round_trip(*models)
    ids = sources()
    for dtype in (torch.float32, torch.bfloat16):
        backends = all_rows()[family.model_type].backends
        for backend in backends if isinstance(backends, tuple) else backends(models[0].config):
            set_backend(*(model.to(dtype) for model in models), backend)
            check(models, head, input_ids=ids)
            for side in ("left", "right"):
                assert_equal(models, **padded(ids, side))


@pytest.mark.parametrize("model_type", ["bart", "t5", "t5gemma"])
def test_decoder_inputs_of_the_caller(model_type):
    """As long as the source, which is where BART and T5 look for its end; T5Gemma's may be shorter."""
    family = all_families()[model_type]
    models = stock_and_ours(family, "sequence_classification", num_labels=3)
    set_backend(*models, "eager")
    ids = sources()
    assert_equal(models, input_ids=ids, decoder_input_ids=ids.roll(1, dims=1))
    shorter = ids[:, :6]
    if model_type == "t5gemma":
        assert_equal(models, input_ids=ids, decoder_input_ids=shorter)
    else:
        with pytest.raises(ValueError, match="same length"):
            models[1](input_ids=ids, decoder_input_ids=shorter)


def test_no_end_of_sequence_is_refused():
    _, ours = stock_and_ours(all_families()["bart"], "sequence_classification")
    ids = sources()
    ids[1] = 9
    with pytest.raises(ValueError, match="eos_token_id"):
        ours(input_ids=ids)
    with pytest.raises(ValueError, match="input_ids"):
        ours(inputs_embeds=torch.zeros(1, 4, 32), decoder_input_ids=ids[:1, :4])


@pytest.mark.parametrize("model_type", ["mbart", "t5"])
@pytest.mark.parametrize(
    ("head", "auto_class"),
    [
        ("sequence_classification", AutoModelForSequenceClassification),
        ("question_answering", AutoModelForQuestionAnswering),
    ],
)
def test_on_disk(model_type, head, auto_class, tmp_path):
    stock, _ = stock_and_ours(all_families()[model_type], head)
    stock.save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "variant")
    assert verify(tmp_path / "native", tmp_path / "variant", progress=False).ok
    ours = auto_class.from_pretrained(tmp_path / "variant")
    assert type(ours).__name__.startswith("VariantSeq2SeqFor")
    report = export(tmp_path / "variant", tmp_path / "back")
    assert (report.model_type, report.head) == (model_type, head)
    # For those without the package.
    assert ours.config.auto_map[auto_class.__name__].endswith(type(ours).__name__)
    back = auto_class.from_pretrained(tmp_path / "back")
    assert type(back) is type(stock)
    assert_equal((stock, back), input_ids=sources())


def test_a_classifier_of_a_language_model(tmp_path):
    """A head of another task on a converted model is drawn anew under the names of export."""
    family = all_families()["bart"]
    config = family.config_map.native_class(**all_rows()["bart"].draw(random.Random(0)))
    hf_variants.from_native(family.native_class("seq2seq_lm")(config)).save_pretrained(tmp_path)
    ours = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=4)
    native = hf_variants.to_native(ours)
    assert type(native) is family.native_class("sequence_classification")
    assert torch.equal(native.classification_head.out_proj.weight, ours.score.weight)
    assert native.config.num_labels == 4
