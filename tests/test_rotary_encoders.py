"""Encoders beyond BERT's shape: the layouts that their checkpoints are stored in, and where they drop out."""

import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hf_variants
from hf_variants.conversion import convert, verify
from hf_variants.conversion.family import family_of
from hf_variants.conversion.verification import set_attention
from tests.native_rows import all_rows, encoders, rotary_encoders
from tests.parity import hostile_, random_native


ROTARY = [row for row in rotary_encoders.ROWS if row.model_type in all_rows()]
# transformers saves these under the names, and with the fused projections, of the original code.
CASES = [
    (row.model_type, head)
    for row in ROTARY
    if row.model_type in ("nomic_bert", "gte")
    for head in ("masked_lm", *row.heads)
]
GTE_CASES = [case for case in CASES if case[0] == "gte"]


def saved(model_type: str, head: str, folder):
    stock = random_native(all_rows()[model_type], 1, head)
    stock.save_pretrained(folder)
    return stock


def assert_same(stock, folder) -> None:
    restored = hf_variants.to_native(hf_variants.from_native(folder)).state_dict()
    assert restored.keys() == stock.state_dict().keys()
    for name, tensor in stock.state_dict().items():
        assert torch.equal(restored[name], tensor), name


@pytest.mark.parametrize(("model_type", "head"), CASES)
def test_names_of_the_original_code(model_type, head, tmp_path):
    stock = saved(model_type, head, tmp_path)
    assert any("encoder.layer" in name for name in load_file(tmp_path / "model.safetensors"))
    assert_same(stock, tmp_path)


@pytest.mark.parametrize(("model_type", "head"), GTE_CASES)
def test_prefix_of_the_original_code(model_type, head, tmp_path):
    stock = saved(model_type, head, tmp_path)
    prefix = "" if head == "base" else "gte."
    path = tmp_path / "model.safetensors"
    tensors = {
        f"new.{name.removeprefix(prefix)}" if name.startswith(prefix) else name: tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    assert_same(stock, tmp_path)


@pytest.mark.parametrize("model_type", [row.model_type for row in ROTARY])
def test_verify(model_type, tmp_path):
    saved(model_type, "masked_lm", tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "variant")
    report = verify(tmp_path / "native", tmp_path / "variant", progress=False)
    assert report.ok, report


@pytest.mark.parametrize(
    ("model_type", "head"),
    [
        (row.model_type, head)
        for row in (*encoders.ROWS, *ROTARY)
        for head in (family_of(row.model_type).primary, *row.heads)
    ],
)
def test_dropout_is_where_the_stock_class_has_it(model_type, head):
    family = family_of(model_type)
    options = all_rows()[model_type].draw(random.Random(2))
    options |= {name: 0.2 for name in options if "dropout" in name}
    stock = hostile_(family.native_class(head)(family.config_map.native_class(**options)), seed=2)
    ours = hf_variants.from_native(stock)
    ids = torch.arange(6, 38).view(2, 16)
    outputs = []
    for model in (stock, ours):
        set_attention(model, "eager")
        assert any(isinstance(module, nn.Dropout) and module.p == 0.2 for module in model.modules())
        torch.manual_seed(0)
        outputs.append(model.train()(ids).to_tuple())
    for expected, made in zip(*outputs, strict=True):
        assert torch.equal(expected, made)
