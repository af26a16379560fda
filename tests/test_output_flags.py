"""What a published config asks every call for: attentions, hidden states, no cache."""

import json
import random

import pytest
import torch

from hf_variants.conversion import convert, export
from hf_variants.conversion.family import family_of
from tests.native_rows import all_rows
from tests.parity import hostile_


@pytest.mark.parametrize("asked", [{"output_attentions": True}, {"output_hidden_states": True}, {"use_cache": False}])
@pytest.mark.parametrize("model_type", ["llama", "bert", "t5", "bart"])
def test_flags_of_a_config(model_type, asked, tmp_path):
    family = family_of(model_type)
    options = all_rows()[model_type].draw(random.Random(0))
    native_class = family.native_class(family.primary)
    hostile_(native_class(family.config_map.native_class(**options))).save_pretrained(tmp_path / "native")
    path = tmp_path / "native" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | asked))
    convert(tmp_path / "native", tmp_path / "variant")
    stock = native_class.from_pretrained(tmp_path / "native")
    ours = family.variant_class(family.primary).from_pretrained(tmp_path / "variant")
    ids = torch.arange(4, 16)[None]
    batch = {"input_ids": ids} | ({"decoder_input_ids": ids} if stock.config.is_encoder_decoder else {})
    with torch.no_grad():
        theirs, made = stock(**batch), ours(**batch)
    assert theirs.keys() == made.keys()
    export(tmp_path / "variant", tmp_path / "back")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: back.get(key) for key in asked} == asked
