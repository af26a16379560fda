"""Verification in bounded memory: tensor by tensor, the first layers run, and no word about the others."""

import json
from bisect import bisect_left

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import hf_variants_cli
from hf_variants.conversion import ConversionError, bounded, convert, export, verify
from hf_variants.conversion.record import RECORD, claims


SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_embd=32, n_layer=4, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=96, d_model=32, encoder_layers=4, decoder_layers=3, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
        )
    ),
    "bert": lambda: BertModel(BertConfig(**SIZES, max_position_embeddings=64)),
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Native and converted checkpoints, made once each."""
    made = {}

    def pair(kind):
        if kind not in made:
            place = tmp_path_factory.mktemp(kind)
            torch.manual_seed(0)
            MODELS[kind]().save_pretrained(place / "native")
            convert(place / "native", place / "variant")
            made[kind] = place / "native", place / "variant"
        return made[kind]

    return pair


def room_for(native, variant, layers):
    """Bytes in which so many of the layers of both fit, and no more."""
    opened = [bounded.open_variant(path) for path in (native, variant)]
    sizes = range(2 * bounded.stored_bytes(native) + 1)
    return bisect_left(sizes, layers, key=lambda size: bounded._layers_that_fit(opened, size))


@pytest.mark.parametrize("kind", MODELS)
def test_the_first_layers_of_both_classes_run(kind, pairs, monkeypatch):
    native, variant = pairs(kind)
    loaded = []
    first_layers = bounded._first_layers
    monkeypatch.setattr(bounded, "_first_layers", lambda *args: loaded.append(first_layers(*args)) or loaded[-1])
    report = verify(native, variant, memory=room_for(native, variant, 2), progress=False)
    assert report.ok, report.to_markdown()
    stock, ours = loaded
    assert type(stock) is type(MODELS[kind]())
    assert type(ours).__name__.startswith("Variant")
    blocks = {name.split("layers.")[1].split(".")[0] for name in ours.state_dict() if "layers." in name}
    assert blocks == {"0", "1"}
    assert "of the first 2 of 4 layers" in report.limits[0]
    assert "Equal, as far as compared" in report.to_markdown()
    names = [check.name for check in report.checks]
    assert any(name.startswith("first 2 of 4 layers: outputs on") for name in names)
    assert not any(name.startswith("outputs") for name in names)
    assert "tensors, one by one" in next(check.detail for check in report.checks if check.name == "weights")
    said = claims(report.to_dict())
    assert said["weights"] == said["architecture"] == "verified"
    assert said["outputs"] == "verified on the first 2 of 4 layers"


@pytest.mark.parametrize("change", ["last layer", "config", "missing", "none"])
def test_what_does_not_run_is_compared_all_the_same(change, pairs, tmp_path):
    native, variant = pairs("llama")
    other = tmp_path / "variant"
    other.mkdir()
    for path in variant.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tensors = load_file(variant / "model.safetensors")
    if change == "last layer":
        tensors["model.layers.3.mlp.down_proj.weight"][-1, -1] += 1e-6
    elif change == "missing":
        del tensors["model.layers.3.mlp.down_proj.weight"]
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    if change == "config":
        config = json.loads((other / "config.json").read_text())
        config["norm_eps"] *= 2
        (other / "config.json").write_text(json.dumps(config))
    report = verify(native, other, memory=room_for(native, variant, 1), progress=False)
    assert report.ok == (change == "none"), report.to_markdown()
    if change != "none":
        assert {"last layer": "weights", "config": "config", "missing": f"tensors of {other}"}[change] in {
            check.name for check in report.checks if not check.ok
        }
        assert not any("layers:" in check.name for check in report.checks)


def test_where_no_layer_fits_nothing_is_claimed_of_outputs(pairs):
    native, variant = pairs("gpt2")
    report = verify(native, variant, memory=1000, progress=False)
    assert report.ok
    assert "nothing was run" in report.limits[0]
    said = claims(report.to_dict())
    assert said["weights"] == "verified"
    assert said["outputs"] == said["generated tokens"] == said["training loss"] == "not verified"


def test_what_fits_is_compared_whole(pairs):
    native, variant = pairs("llama")
    report = verify(native, variant, memory=10**9, progress=False)
    assert report.ok
    assert not report.limits
    assert any(check.name.startswith("outputs on") for check in report.checks)


def test_the_record_of_a_bounded_verification(pairs, tmp_path, capsys):
    native, variant = pairs("llama")
    size = room_for(native, variant, 1)
    assert export(variant, tmp_path / "native", verify=True, memory=size).verification.limits
    argv = ["convert", str(native), str(tmp_path / "made"), "--verify", "--memory", f"{-(-size // 1000)}KB"]
    assert hf_variants_cli.main(argv) == 0
    assert "Not the whole of it" in capsys.readouterr().out
    record = json.loads((tmp_path / "made" / RECORD).read_text())
    assert record["claims"]["outputs"] == "verified on the first 1 of 4 layers"
    assert record["verification"]["limits"]


def test_memory_is_for_comparisons_of_folders(pairs, tmp_path, capsys):
    native, variant = pairs("llama")
    with pytest.raises(ConversionError, match="`memory` is for checkpoints in folders"):
        verify(LlamaForCausalLM.from_pretrained(native), variant, memory=1000)
    with pytest.raises(ConversionError, match="`dtype` casts"):
        verify(native, variant, memory=1000, dtype="float64")
    assert hf_variants_cli.main(["convert", str(native), str(tmp_path / "made"), "--memory", "1GB"]) == 2
    assert "Add --verify" in capsys.readouterr().err
