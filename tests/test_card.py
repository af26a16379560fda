"""The model card of a saved variant: complete metadata, the axes, and usage code that runs."""

import re
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

import hf_variants_cli
from hf_variants import VariantConfig, VariantForCausalLM, VariantForMaskedLM
from hf_variants.card import cache_bytes_per_token, model_card
from tests.test_custom_code import MODELS, SIZES


@pytest.mark.parametrize("auto_class", MODELS)
def test_usage_code_runs(auto_class, tmp_path, monkeypatch):
    MODELS[auto_class]().save_pretrained(tmp_path)
    card = model_card(tmp_path, license="mit")
    assert card.data.library_name == "transformers"
    assert card.data.license == "mit"
    assert auto_class in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-2000:]


def test_card_tells_the_axes_and_sizes(tmp_path):
    model = VariantForCausalLM(VariantConfig(**SIZES, num_key_value_heads=2, norm_placement="sandwich"))
    model.save_pretrained(tmp_path)
    text = model_card(tmp_path, repo_id="someone/sandwich", base_model="someone/else").content
    assert "sandwich" in text
    assert f"{model.num_parameters():,}" in text
    assert 'from_pretrained("someone/sandwich"' in text
    # 2 layers, keys and values, 2 heads of 8 channels, 2 bytes.
    assert cache_bytes_per_token(model.config) == 2 * 2 * 2 * 8 * 2
    assert "128 bytes in bfloat16" in text


def test_command_writes_it_once(tmp_path, capsys):
    VariantForMaskedLM(VariantConfig(**SIZES, is_causal=False)).save_pretrained(tmp_path)
    assert hf_variants_cli.main(["card", str(tmp_path), "--license", "apache-2.0"]) == 0
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "fill-mask"
    assert hf_variants_cli.main(["card", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
