"""Every native type against its stock class, on random configs with hostile weights."""

import os

import pytest

from hf_variants.conversion import supported_model_types
from tests.native_rows import all_rows
from tests.parity import check_row


ROWS = all_rows()
# Configs per type here, of which `make test` takes the first; `make drift` draws more.
SEEDS = int(os.environ.get("HF_VARIANTS_SEEDS", "2"))

CASES = [
    pytest.param(model_type, seed, marks=pytest.mark.whole if seed else ())
    for model_type in ROWS
    for seed in range(SEEDS)
]


@pytest.mark.parametrize(("model_type", "seed"), CASES)
def test_stock_class_and_variant_agree(model_type, seed):
    assert check_row(ROWS[model_type], seed) == []


def test_every_supported_type_has_a_row():
    assert sorted(ROWS) == supported_model_types()
