"""A saved checkpoint carries its code: it loads with transformers alone, offline, with every head, and again re-saved."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from hf_variants import (
    VariantConfig,
    VariantForCausalLM,
    VariantForConditionalGeneration,
    VariantForMaskedLM,
    VariantSeq2SeqConfig,
)
from hf_variants.conversion import convert
from hf_variants.model import custom_code


SIZES = {"vocab_size": 71, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
MODELS = {
    "AutoModelForCausalLM": lambda: VariantForCausalLM(
        VariantConfig(**SIZES, layer_types="SF", sliding_window=4, qk_norm="head")
    ),
    "AutoModelForMaskedLM": lambda: VariantForMaskedLM(
        VariantConfig(**SIZES, is_causal=False, type_vocab_size=2, position_embedding_type="sinusoidal")
    ),
    "AutoModelForSeq2SeqLM": lambda: VariantForConditionalGeneration(
        VariantSeq2SeqConfig(
            encoder=SIZES, decoder={**SIZES, "position_embedding_type": "alibi"}, decoder_start_token_id=1
        )
    ),
}

# Runs in a fresh interpreter in which this package cannot be imported.
WITHOUT_THE_PACKAGE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_variants":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch, transformers

def comes_back(folder, auto_class):
    ids, expected, heads = torch.load(folder + "/expected.pt")
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if "Seq2Seq" in auto_class else {})

    def check(where):
        model = getattr(transformers, auto_class).from_pretrained(where, trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
        assert torch.equal(model(**inputs).logits, expected)
        return model

    check(folder).save_pretrained(folder + "/again", max_shard_size="30KB")
    model = check(folder + "/again")
    if model.can_generate():
        model.generate(ids, max_new_tokens=3)
    for head in heads:
        # A head that is saved from here brings all the others in turn.
        auto = getattr(transformers, head)
        loaded = auto.from_pretrained(folder + "/again", trust_remote_code=True)
        loaded.save_pretrained(folder + "/" + head)
        again = auto.from_pretrained(folder + "/" + head, trust_remote_code=True)
        assert type(again).__name__ == type(loaded).__name__
        assert again.config.auto_map == model.config.auto_map
        states = loaded.state_dict(), again.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

for auto_class in sys.argv[2:]:
    comes_back(sys.argv[1] + "/" + auto_class, auto_class)
print("equal")
"""


def test_loads_where_the_package_is_absent(tmp_path, monkeypatch):
    ids = torch.randint(3, 71, (2, 9), generator=torch.Generator().manual_seed(0))
    for auto_class, make in MODELS.items():
        model = make().eval()
        model.save_pretrained(tmp_path / auto_class, max_shard_size="20KB")
        inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if "Seq2Seq" in auto_class else {})
        heads = [name for name in custom_code.auto_map_of(model.config) if name != "AutoConfig"]
        torch.save((ids, model(**inputs).logits.detach(), heads), tmp_path / auto_class / "expected.pt")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_THE_PACKAGE, str(tmp_path), *MODELS]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert finished.stdout.splitlines()[-1:] == ["equal"], finished.stderr[-2000:]


def test_every_name_in_an_auto_map_exists():
    folder = Path(custom_code.__file__).parent
    for auto_map in (custom_code.DECODER_CLASSES, custom_code.ENCODER_CLASSES, custom_code.SEQ2SEQ_CLASSES):
        assert {"AutoConfig", "AutoModel"} <= auto_map.keys()
        for target in auto_map.values():
            file, class_name = target.split(".")
            assert f"class {class_name}(" in (folder / f"{file}.py").read_text(encoding="utf-8")


def test_conversion_writes_the_code_too(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=71, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "variant")
    saved = json.loads((tmp_path / "variant" / "config.json").read_text())
    assert saved["auto_map"] == custom_code.DECODER_CLASSES
    assert (tmp_path / "variant" / "modeling_variant.py").is_file()
