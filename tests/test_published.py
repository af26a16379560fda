"""The collection of published configs: what they say is understood, and comes back; `make published` runs their models."""

import json
import warnings

import pytest
from transformers.utils import CONFIG_NAME

from hf_variants.conversion import ConversionError
from hf_variants.conversion.family import all_families, read_config
from hf_variants.conversion.native_source import native_family_and_head

from .published.__main__ import CONFIGS, OF_THE_FRAMEWORK, REFUSED, check


PUBLISHED = {path.stem: path for path in sorted(CONFIGS.glob("*.json"))}
# The stock class itself refuses these.
REFUSED_BY_STOCK = {"mpt-7b-storywriter"}
# Models that are run here as well, one of each kind of obstacle.
RUN = (
    "mistral-7b-v0.3-dumped", "bert-for-pretraining", "t5-v1_1-xxl-sd3-encoder", "llama-7b-2023", "gpt-j-as-gpt-neo",
)  # fmt: skip


def read(name, folder):
    (folder / CONFIG_NAME).write_bytes(PUBLISHED[name].read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_config(folder)


def test_every_type_has_one():
    types = {json.loads(path.read_text(encoding="utf-8")).get("model_type") for path in PUBLISHED.values()}
    assert all_families().keys() <= types


def test_the_list_of_sources_is_complete():
    listed = (CONFIGS.parent / "README.md").read_text(encoding="utf-8")
    assert [name for name in PUBLISHED if f"| {name} |" not in listed] == []


@pytest.mark.parametrize("name", sorted(PUBLISHED.keys() - REFUSED_BY_STOCK))
def test_a_config_is_understood_and_comes_back(name, tmp_path):
    native = read(name, tmp_path)
    family, head = native_family_and_head(native)
    if name in REFUSED:
        with pytest.raises(ConversionError, match=REFUSED[name]):
            family.config_map.to_variant(native, head=head)
        return
    config = family.config_map.to_variant(native, head=head)
    back, native = family.config_map.to_native(config, head).to_dict(), native.to_dict()
    assert {key for key in native if back.get(key) != native[key]} <= OF_THE_FRAMEWORK


@pytest.mark.parametrize("name", RUN)
def test_the_table(name):
    seen = check(PUBLISHED[name])
    assert not [what for what in seen.values() if what.startswith("NO")], seen
