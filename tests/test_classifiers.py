"""Classifiers of every native type give the bits of their stock class: logits, losses of each kind, and padding."""

import random

import pytest
import torch

import hf_variants
from hf_variants.conversion.family import family_of
from tests.native_rows import all_rows
from tests.parity import hostile_, set_backend


ROWS = all_rows()
# Of the length, every `chunk_size_feed_forward` is a divisor.
LENGTH, PAD = 12, 3
# Those of encoder-decoders: tests/test_seq2seq_classifiers.py.
TYPES = [name for name, row in ROWS.items() if not row.reference and not family_of(name).is_seq2seq]


def with_head(head: str) -> list[str]:
    return [name for name in TYPES if head in family_of(name).converted_heads]


def stock_and_ours(model_type: str, head: str, **options):
    family = family_of(model_type)
    drawn = ROWS[model_type].draw(random.Random(f"{model_type}-0")) | options
    stock = hostile_(family.native_class(head)(family.config_map.native_class(**drawn))).eval()
    ours = hf_variants.from_native(stock).eval()
    set_backend(stock, ours, "eager")
    return stock, ours


def token_ids(model, rows: int = 3) -> torch.Tensor:
    """(rows, LENGTH), without padding."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(PAD + 1, model.config.vocab_size, (rows, LENGTH), generator=generator)


def padded(ids: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    mask = torch.ones_like(ids)
    for row in range(1, ids.shape[0]):
        mask[row, : 2 * row] = 0
    mask = mask.flip(-1) if kind == "right" else mask
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def assert_equal(models, problem_type: str | None = None, **batch) -> None:
    """
    The same logits and loss from both, to the bound of the type where it has one; what the loss makes of an absent
    `problem_type`, too.
    """
    outputs = []
    for model in models:
        model.config.problem_type = problem_type
        with torch.no_grad():
            # Copies, since CTRL multiplies the embeddings that it is given in place.
            outputs.append(model(**{name: value.clone() for name, value in batch.items()}))
    expected, made = outputs
    for name in ("loss", "logits", "start_logits", "end_logits"):
        assert (name in expected) == (name in made), name
        if name in expected:
            assert expected[name].dtype == made[name].dtype, name
            bound = family_of(models[0].config.model_type).bound(models[1].config)
            # Of a loss, which is one number, relative to itself.
            spread = expected[name].abs().nan_to_num().item() if name == "loss" else expected[name].std().item()
            torch.testing.assert_close(
                made[name], expected[name], rtol=0, atol=bound * spread if bound else 0, equal_nan=True, msg=name
            )
    assert models[0].config.problem_type == models[1].config.problem_type


def losses(num_labels: int, rows: int) -> list[tuple[str | None, torch.Tensor]]:
    """Every `problem_type`, and for an absent one the labels that it is told by."""
    generator = torch.Generator().manual_seed(2)
    values = torch.rand(rows, num_labels, generator=generator)
    classes = torch.randint(0, num_labels, (rows,), generator=generator)
    return [
        ("regression", values[:, 0] if num_labels == 1 else values),
        ("single_label_classification", classes),
        ("multi_label_classification", values.round()),
        (None, values[:, 0] if num_labels == 1 else classes),
        (None, values),
    ]


@pytest.mark.parametrize("model_type", with_head("sequence_classification"))
def test_one_label(model_type):
    """Rerankers and regressions."""
    models = stock_and_ours(model_type, "sequence_classification", num_labels=1, pad_token_id=PAD)
    ids = token_ids(models[0])
    for problem_type, labels in losses(1, len(ids)):
        assert_equal(models, problem_type, input_ids=ids, labels=labels)
    for side in ("left", "right"):
        assert_equal(models, **padded(ids, side))
    inside = ids.clone()
    inside[0, 4], inside[1, -1], inside[2] = PAD, PAD, PAD
    assert_equal(models, input_ids=inside, attention_mask=torch.ones_like(ids))
    width = models[0].get_input_embeddings().embedding_dim
    embeddings = torch.randn(len(ids), LENGTH, width, generator=torch.Generator().manual_seed(3))
    assert_equal(models, inputs_embeds=embeddings)
    assert_equal(models, inputs_embeds=embeddings, attention_mask=padded(ids, "left")["attention_mask"])
    for model in models:
        model.bfloat16()
    if not family_of(model_type).deviations:
        assert_equal(models, "regression", **padded(ids, "right"), labels=torch.zeros(len(ids)).bfloat16())


@pytest.mark.parametrize("model_type", with_head("sequence_classification"))
def test_several_labels(model_type):
    # In turn: ids of padding that no token has, and none, with which most classes take one sequence at a time.
    num_labels, pad_token_id, rows = (2, -1, 3) if TYPES.index(model_type) % 2 else (5, None, 1)
    if getattr(family_of(model_type).config_map.native_class(), "pad_token_id", None) is not None:
        # Positions may be counted from it.
        pad_token_id, rows = PAD, 3
    models = stock_and_ours(model_type, "sequence_classification", num_labels=num_labels, pad_token_id=pad_token_id)
    ids = token_ids(models[0], rows)
    for problem_type, labels in losses(num_labels, rows):
        assert_equal(models, problem_type, input_ids=ids, labels=labels)
    assert_equal(models, input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("model_type", with_head("token_classification"))
def test_labels_of_tokens(model_type):
    models = stock_and_ours(model_type, "token_classification", num_labels=5)
    ids = token_ids(models[0])
    labels = (ids % 5).masked_fill(ids % 3 == 0, -100)
    assert_equal(models, input_ids=ids, labels=labels)
    if not family_of(model_type).deviations:
        # In float32, or as the logits are.
        assert_equal([model.bfloat16() for model in models], input_ids=ids, labels=labels)


@pytest.mark.parametrize("model_type", with_head("question_answering"))
def test_spans(model_type):
    models = stock_and_ours(model_type, "question_answering")
    ids = token_ids(models[0])
    # Inside, past the end (ignored), and before the beginning.
    for start, end in (([1, 2, 3], [4, 5, 6]), ([LENGTH, 1, 50], [0, 70, 2]), ([-1, 0, 1], [2, 2, 2])):
        positions = {"start_positions": torch.tensor(start), "end_positions": torch.tensor(end)}
        assert_equal(models, input_ids=ids, **positions)
        assert_equal(models, input_ids=ids, **{name: ends[:, None] for name, ends in positions.items()})
