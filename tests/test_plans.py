"""A plan says before a conversion what that then does, of a folder and of the Hub, and reads no weight for it."""

import json
import os
import struct
from functools import partial

import pytest
import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import hf_variants_cli
from hf_variants.conversion import ConversionError, convert, plans
from hf_variants.conversion.plans import plan
from tests.hub_server import HubServer, Repository
from tests.test_companions import in_the_old_layout, sentence_encoder


def saved(kind, folder):
    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=64,
            )
        )  # fmt: skip
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    model.save_pretrained(folder, max_shard_size="30kB")
    return folder


def tensor_bytes(path):
    with safe_open(path, framework="pt") as opened:
        return sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_what_is_planned_is_what_is_done(kind, dtype, tmp_path):
    native = saved(kind, tmp_path / "native")
    made = plan(native, tmp_path / "variant", dtype=dtype, max_shard_bytes=20_000)
    assert not (tmp_path / "variant").exists()
    assert os.listdir(tmp_path) == ["native"]
    report = convert(native, tmp_path / "variant", dtype=dtype, max_shard_bytes=20_000)
    assert (made.model_type, made.tensors, made.parameters) == (report.model_type, report.tensors, report.parameters)
    files = {path.name: tensor_bytes(path) for path in (tmp_path / "variant").glob("*.safetensors")}
    assert made.written == files
    assert len(files) > 1
    # Of GPT-2 queries, keys and values of each layer come of one, and three other matrices are transposed; with biases.
    assert made.rebuilt == (0 if kind == "llama" else 2 * (2 * 3 + 2 * 3))
    assert made.bytes_per_second > 0


def test_a_model_larger_than_memory(tmp_path):
    """Its files are holes, and nothing in them is read."""
    layers, width = 16, 8192
    config = LlamaConfig(
        vocab_size=8, hidden_size=width, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=64,
        num_key_value_heads=64, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path / "native")
    tables = {"model.embed_tokens.weight": (8, width), "lm_head.weight": (8, width), "model.norm.weight": (width,)}
    matrices = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (width,))
    shapes = dict.fromkeys(matrices, (width, width)) | norms
    files, total = {"model-00000.safetensors": tables}, 0
    for n in range(layers):
        named = {f"model.layers.{n}.{name}.weight": shape for name, shape in shapes.items()}
        files[f"model-{n + 1:05d}.safetensors"] = named
    for file, inside in files.items():
        entries, end = {}, 0
        for name, shape in inside.items():
            size = 4 * torch.Size(shape).numel()
            entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        header = json.dumps(entries).encode()
        with (tmp_path / "native" / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(header)) + header)
            stream.truncate(8 + len(header) + end)
        total += end
    index = {"metadata": {}, "weight_map": {name: file for file, inside in files.items() for name in inside}}
    (tmp_path / "native" / "model.safetensors.index.json").write_text(json.dumps(index))
    made = plan(tmp_path / "native", tmp_path / "variant", measure=False)
    assert made.write_bytes == total > 3e10
    assert (made.rebuilt, made.largest_bytes) == (0, 0)
    made.free_bytes = 10**9
    assert not made.fits
    assert "NOT ENOUGH" in made.to_markdown()
    made.free_bytes = 10**13
    assert made.fits


def of_the_hub(native, place, monkeypatch):
    """The plan for a folder that lies on the Hub, and nothing of its weights was fetched."""
    files = {path.relative_to(native).as_posix(): path.read_bytes() for path in native.rglob("*") if path.is_file()}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with HubServer() as server:
        repository = server.repositories["someone/llama"] = Repository("someone/llama")
        repository.commit("main", "weights", files)
        hub = HfApi(endpoint=server.url, token=False)
        monkeypatch.setattr(plans, "parse_safetensors_file_metadata", hub.parse_safetensors_file_metadata)
        fetch = partial(hub.snapshot_download, cache_dir=place / "cache")
        monkeypatch.setattr(plans, "snapshot_download", fetch)
        made = plan("someone/llama", place / "variant", measure=False)
    assert list((place / "cache").rglob("config.json"))
    assert not list((place / "cache").rglob("*.safetensors"))
    return made


def test_the_hub_is_asked_for_headers_alone(tmp_path, monkeypatch):
    native = saved("llama", tmp_path / "native")
    made = of_the_hub(native, tmp_path, monkeypatch)
    here = plan(native, tmp_path / "variant", measure=False)
    assert (made.tensors, made.written, made.rebuilt) == (here.tensors, here.written, here.rebuilt)


@pytest.mark.parametrize("inner", [False, True])
def test_modules_of_a_sentence_encoder_count(inner, tmp_path, monkeypatch):
    native = tmp_path / "native"
    sentence_encoder(native)
    if inner:
        in_the_old_layout(native)
    here = plan(native, tmp_path / "variant", measure=False)
    convert(native, tmp_path / "variant")
    written = {
        path.relative_to(tmp_path / "variant").as_posix(): tensor_bytes(path)
        for path in (tmp_path / "variant").rglob("*.safetensors")
    }
    assert written["2_Dense/model.safetensors"] == 32
    assert here.written == written
    made = of_the_hub(native, tmp_path, monkeypatch)
    assert (made.tensors, made.written) == (here.tensors, here.written)
    # But for spaces in headers.
    assert made.read_bytes == pytest.approx(here.read_bytes, abs=500)


@pytest.mark.parametrize("option", [("--verify",), ("--verify", "--memory", "1GB"), ("--base", "x")])
def test_options_that_do_nothing_to_a_plan(option, tmp_path, capsys):
    native = saved("llama", tmp_path / "native")
    assert hf_variants_cli.main(["convert", str(native), str(tmp_path / "variant"), "--plan", *option]) == 2
    assert option[0] in capsys.readouterr().err


def test_a_variant_needs_no_plan(tmp_path):
    convert(saved("llama", tmp_path / "native"), tmp_path / "variant")
    with pytest.raises(ConversionError, match="variant already"):
        plan(tmp_path / "variant", tmp_path / "again")
