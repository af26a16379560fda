"""Checkpoints as they lie on disks: every layout that stock transformers loads, in names, in files and in dtypes."""

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_variants
from hf_variants.conversion import ConversionError, checkpoint, convert, export, output_folder, tensor_writer, verify
from tests.layouts import differences, native_of, saved, write, write_config
from tests.parity import hostile_


SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def llama(**options):
    return hostile_(LlamaForCausalLM(LlamaConfig(**{**SMALL, "tie_word_embeddings": False, **options}))).eval()


def assert_loads_as_stock(folder, model) -> None:
    """Ours, taken back, has the tensors that the stock class has after loading the same files; nothing was random."""
    assert differences(folder, model) == []


# Names


def test_what_older_transformers_read_is_what_we_write(tmp_path):
    config = GPTNeoXConfig(**SMALL)
    saved(hostile_(GPTNeoXForCausalLM(config)), tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "variant")
    export(tmp_path / "variant", tmp_path / "back")
    assert "embed_out.weight" in load_file(tmp_path / "back" / "model.safetensors")


def test_a_head_left_in_the_file_and_a_mask_are_passed_over_and_reported(tmp_path):
    model = native_of("bert", "token_classification")
    more = {
        "cls.predictions.bias": torch.ones(71), "cls.seq_relationship.weight": torch.zeros(2, 32),
        "bert.embeddings.position_ids": torch.arange(64)[None],
    }  # fmt: skip
    write(tmp_path / "native", model, saved(model, tmp_path / "saved") | more)
    report = convert(tmp_path / "native", tmp_path / "variant")
    assert report.passed_over.keys() == more.keys()
    assert all(f"`{name}`" in report.to_markdown() for name in more)
    assert verify(tmp_path / "native", tmp_path / "variant", progress=False).ok


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.0.self_attn.sinks", torch.randn(4)),
        ("model.layers.0.self_attn.q_proj.bias", torch.randn(32)),
        ("model.layers.0.self_attn.relation", torch.randn(8, 8)),
        ("v_head.weight", torch.randn(1, 32)),
    ],
)
def test_what_transformers_has_no_place_for_is_passed_over_and_said(name, tensor, tmp_path, caplog):
    model = llama()
    write(tmp_path / "native", model, model.state_dict() | {name: tensor})
    assert_loads_as_stock(tmp_path / "native", model)
    assert convert(tmp_path / "native", tmp_path / "variant").passed_over.keys() == {name}
    assert name in caplog.text


@pytest.mark.parametrize("head", ["base", "causal_lm"])
def test_more_layers_than_the_config_has_are_refused(head, tmp_path):
    model = native_of("llama", head)
    layers = model.config.num_hidden_layers
    model.config.num_hidden_layers -= 1
    write(tmp_path / "native", model, model.state_dict())
    with pytest.raises(
        ConversionError, match=rf"makes {layers - 1} of .*layers, .*layers\.{layers - 1}\..*number of layers"
    ):
        convert(tmp_path / "native", tmp_path / "variant")


def test_two_names_for_one_tensor(tmp_path):
    model = native_of("bert", "masked_lm")
    tensors = saved(model, tmp_path / "saved")
    name = "bert.embeddings.LayerNorm.weight"
    old = name.replace("weight", "gamma")
    write(tmp_path / "native", model, tensors | {old: tensors[name] * 2})
    assert_loads_as_stock(tmp_path / "native", model)
    assert convert(tmp_path / "native", tmp_path / "variant").passed_over.keys() == {name}


def test_a_bare_encoder_without_a_pooler(tmp_path):
    model = native_of("bert", "base")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("pooler")}
    write(tmp_path / "native", model, tensors)
    report = convert(tmp_path / "native", tmp_path / "variant")
    assert "pooler" in report.to_markdown()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        ours = hf_variants.VariantModel.from_pretrained(tmp_path / "variant").eval()(ids)
        assert torch.equal(ours.last_hidden_state, model(ids).last_hidden_state)


def test_more_layers_than_tensors(tmp_path):
    model = llama()
    write(tmp_path, model, model.state_dict())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 20_000}))
    started = time.perf_counter()
    with pytest.raises(ConversionError, match="`num_hidden_layers` is 20000"):
        hf_variants.from_native(tmp_path)
    assert time.perf_counter() - started < 5


# Files


def pickled(folder, tensors, file="pytorch_model.bin"):
    torch.save(tensors, folder / file)


def save_set(folder, model, file):
    """One of the sets of weights that a folder can have."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = sorted(state)
    suffix, save = (".safetensors", save_file) if "safetensors" in file else (".bin", torch.save)
    if not file.endswith(".json"):
        save(state, folder / file)
        return
    parts = {f"part-{number}{suffix}": names[number::2] for number in range(2)}
    for part, members in parts.items():
        save({name: state[name] for name in members}, folder / part)
    weight_map = {name: part for part, members in parts.items() for name in members}
    (folder / file).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


SETS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "model.fp16.safetensors",
)  # fmt: skip


@pytest.mark.parametrize("chosen", range(1, 32))
def test_of_several_sets_the_one_that_stock_loads(chosen, tmp_path):
    torch.manual_seed(0)
    models = {}
    for number, file in enumerate(SETS):
        if chosen >> number & 1:
            models[file] = LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 1}))
            models[file].config.save_pretrained(tmp_path)
            save_set(tmp_path, models[file], file)
    if set(models) == {SETS[-1]}:
        with pytest.raises(OSError, match="no weights"):
            hf_variants.from_native(tmp_path)
        return
    stock = LlamaForCausalLM.from_pretrained(tmp_path)
    ours = hf_variants.from_native(tmp_path)
    assert torch.equal(ours.lm_head.weight, stock.lm_head.weight)
    weights = checkpoint.Weights(tmp_path)
    assert torch.equal(models[weights.file].lm_head.weight, stock.lm_head.weight)
    assert set(weights.others) == set(models) - {weights.file, SETS[-1]}


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
@pytest.mark.parametrize("file", ["weights.pt", "weights.pth", "other.bin", "other.safetensors"])
def test_a_file_of_weights_beside_a_config(file, wrap, tmp_path):
    model = llama(tie_word_embeddings=True)
    model.config.save_pretrained(tmp_path)
    if file.endswith(".safetensors"):
        # Without the metadata that transformers writes.
        save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / file)
    else:
        pickled(tmp_path, model.state_dict() if wrap is None else {wrap: model.state_dict(), "epoch": 3}, file)
    ours = hf_variants.from_native(tmp_path / file)
    assert torch.equal(ours.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert convert(tmp_path / file, tmp_path / "variant", verify=True).exactness == "bit-exact"


def halves(model):
    """The tensors of a model in two parts."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return [{name: state[name] for name in sorted(state)[number::2]} for number in range(2)]


@pytest.mark.parametrize(
    ("index", "files"),
    [
        ("model.safetensors.index.json", ("shards/a.safetensors", "shards/deeper/b.safetensors")),
        ("model.safetensors.index.json", ("a.bin", "b.bin")),
        ("pytorch_model.bin.index.json", ("a.safetensors", "b.safetensors")),
        ("pytorch_model.bin.index.json", ("a.pt", "b.bin")),
    ],
)
def test_the_files_of_an_index_lie_where_and_are_what_it_says(index, files, tmp_path):
    model = llama()
    model.config.save_pretrained(tmp_path)
    for file, part in zip(files, halves(model), strict=True):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (save_file if file.endswith(".safetensors") else torch.save)(part, tmp_path / file)
    weight_map = {name: file for file, part in zip(files, halves(model), strict=True) for name in part}
    (tmp_path / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_loads_as_stock(tmp_path, model)
    assert convert(tmp_path, tmp_path / "variant", verify=True).exactness == "bit-exact"


def test_an_index_with_a_variant_in_its_name_is_read_where_it_is_given(tmp_path):
    for file in ("model.safetensors.index.json", "model.safetensors"):
        model = llama()
        save_set(tmp_path, model, file)
        if file.endswith(".json"):
            expected = model.lm_head.weight
            (tmp_path / file).rename(tmp_path / "model.safetensors.index.fp16.json")
    model.config.save_pretrained(tmp_path)
    report = convert(tmp_path / "model.safetensors.index.fp16.json", tmp_path / "variant", verify=True)
    assert report.exactness == "bit-exact"
    ours = hf_variants.VariantForCausalLM.from_pretrained(tmp_path / "variant")
    assert torch.equal(ours.lm_head.weight, expected)


@pytest.mark.parametrize("named", ["special.safetensors", "special.safetensors.index.json"])
@pytest.mark.parametrize("is_alone", [True, False])
def test_the_weights_that_a_config_names(named, is_alone, tmp_path):
    """`transformers_weights`, before the usual names."""
    folder = tmp_path / "native"
    if not is_alone:
        saved(llama(), folder)
    model = llama(transformers_weights=named)
    write_config(folder, model)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": named}))
    save_set(folder, model, named)
    assert_loads_as_stock(folder, model)
    report = convert(folder, tmp_path / "variant", verify=True)
    assert report.exactness == "bit-exact"
    export(tmp_path / "variant", tmp_path / "back")
    assert "transformers_weights" not in json.loads((tmp_path / "back" / "config.json").read_text())
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "back").lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("named", ["../special.safetensors", "special.bin", "missing.safetensors", 3])
def test_a_config_names_weights_that_cannot_be_meant(named, tmp_path):
    saved(llama(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": named}))
    with pytest.raises((ConversionError, FileNotFoundError), match=r"`transformers_weights` .*usual name"):
        hf_variants.from_native(tmp_path)


def test_what_is_no_tensor_is_left_out_of_a_pickle(tmp_path, caplog):
    model = llama()
    write_config(tmp_path, model)
    pickled(tmp_path, {**model.state_dict(), "epoch": 3, "note": "trained"})
    assert_loads_as_stock(tmp_path, model)
    assert "epoch, note" in caplog.text


class Payload:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize("content", [{"a": Payload()}, {"a": 3}, [1], b"junk"])
def test_pickles_of_other_things_are_refused(content, tmp_path):
    llama().config.save_pretrained(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
    else:
        pickled(tmp_path, content)
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin"):
        hf_variants.from_native(tmp_path)


def test_an_adapter_beside_the_model_is_named(tmp_path):
    saved(llama(), tmp_path / "native")
    (tmp_path / "native" / "adapter_config.json").write_text("{}")
    for run in (hf_variants.from_native, lambda folder: convert(folder, tmp_path / "variant")):
        with pytest.raises(ConversionError, match=r"adapter_config\.json"):
            run(tmp_path / "native")


# Dtypes


def mixed(tmp_path):
    """A bfloat16 model with norms in float32 and a head in float16."""
    model = llama()
    tensors = {
        name: tensor if "norm" in name else tensor.to(torch.float16 if "lm_head" in name else torch.bfloat16)
        for name, tensor in model.state_dict().items()
    }
    model.config.dtype = torch.bfloat16
    write(tmp_path / "native", model, tensors)
    return tensors


def test_every_tensor_keeps_its_dtype(tmp_path):
    tensors = mixed(tmp_path)
    assert convert(tmp_path / "native", tmp_path / "variant").exactness == "bit-exact"
    assert export(tmp_path / "variant", tmp_path / "back").exactness == "bit-exact"
    written = load_file(tmp_path / "back" / "model.safetensors")
    ours = hf_variants.from_native(tmp_path / "native")
    back = hf_variants.to_native(ours).state_dict()
    for name, tensor in tensors.items():
        for other in (written[name], back[name]):
            assert other.dtype is tensor.dtype, name
            assert torch.equal(other, tensor), name
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype="auto")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "variant", dtype="auto")
    assert loaded.dtype is stock.dtype is loaded.config.dtype is torch.bfloat16
    made = hf_variants.to_native(loaded).state_dict()
    assert all(torch.equal(made[name], tensor) for name, tensor in stock.state_dict().items())


def test_a_cast_of_several_dtypes_says_what_it_did(tmp_path):
    tensors = mixed(tmp_path)
    norms = sum("norm" in name for name in tensors)
    report = convert(tmp_path / "native", tmp_path / "variant", dtype="float32")
    assert report.exactness == (
        f"cast from bfloat16 and float16 to float32 ({len(tensors) - norms} of {len(tensors)} tensors)"
    )
    assert {tensor.dtype for tensor in load_file(tmp_path / "variant" / "model.safetensors").values()} == {
        torch.float32
    }
    with pytest.raises(ConversionError, match="rounds"):
        convert(tmp_path / "native", tmp_path / "other", dtype="float32", verify=True)


@pytest.mark.parametrize("by_config", [True, False])
def test_the_dtype_that_auto_gives_is_that_of_the_source(by_config, tmp_path):
    tensors = mixed(tmp_path)
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    if by_config:
        config["dtype"] = "float16"
    else:
        del config["dtype"]
    (tmp_path / "native" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "native", tmp_path / "variant")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype="auto")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "variant", dtype="auto")
    assert ours.dtype is stock.dtype
    assert torch.equal(ours.lm_head.weight, stock.lm_head.weight)
    assert len({tensor.dtype for tensor in tensors.values()}) == 3


def test_fused_parts_of_two_dtypes_take_the_wider(tmp_path):
    model = native_of("gpt_neox", "causal_lm")
    hf_variants.from_native(model).save_pretrained(tmp_path / "variant")
    path = tmp_path / "variant" / "model.safetensors"
    tensors = {n: t.bfloat16() if "k_proj" in n else t for n, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    report = export(tmp_path / "variant", tmp_path / "back")
    assert "wider" in report.notes[0]
    assert {tensor.dtype for tensor in load_file(tmp_path / "back" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64]
)
def test_weights_that_are_no_floats_are_refused(dtype, tmp_path):
    model = llama()
    name = "model.layers.1.mlp.up_proj.weight"
    write(tmp_path / "native", model, model.state_dict() | {name: model.state_dict()[name].to(dtype)})
    expected = "quantised" if dtype.itemsize == 1 and dtype is not torch.bool else "floating-point numbers"
    for run in (hf_variants.from_native, lambda folder: convert(folder, tmp_path / "variant")):
        with pytest.raises(ConversionError, match=rf"up_proj.*{expected}"):
            run(tmp_path / "native")


# Writing


@pytest.mark.parametrize("limit", [1, 9_000, 20_000, 10**9])
def test_files_are_no_larger_than_asked(limit, tmp_path):
    tensors = mixed(tmp_path)
    tensors["empty"] = torch.zeros(0, 3, dtype=torch.float16)
    tensors["strided"] = torch.randn(6, 4).t()
    tensors["scalar"] = torch.tensor(3)
    folder = tmp_path / "out"
    folder.mkdir()
    headers = {name: tensor.to("meta") for name, tensor in tensors.items()}
    # They need not come in the order in which they were announced.
    tensor_writer.write_safetensors(reversed(tensors.items()), headers, folder, limit)
    reader = checkpoint.Weights(folder)
    assert set(reader.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(reader(name), tensor)
        assert reader(name).dtype is tensor.dtype
    for path in folder.glob("*.safetensors"):
        inside = load_file(path)
        assert len(inside) == 1 or sum(tensor.nbytes for tensor in inside.values()) <= limit


def test_weights_are_written_by_one_thread(tmp_path):
    """Also what is computed on the way; afterwards torch has the threads it had."""
    threads, seen = torch.get_num_threads(), []

    def tensors():
        seen.append(torch.get_num_threads())
        yield "weight", torch.ones(3)

    try:
        torch.set_num_threads(3)
        tensor_writer.write_safetensors(tensors(), {"weight": torch.empty(3, device="meta")}, tmp_path)
        assert (seen, torch.get_num_threads()) == ([1], 3)
    finally:
        torch.set_num_threads(threads)


def test_the_command_takes_a_size(tmp_path):
    from hf_variants_cli import main

    saved(llama(), tmp_path / "native")
    for command, source, destination in (("convert", "native", "variant"), ("export", "variant", "back")):
        assert main([command, str(tmp_path / source), str(tmp_path / destination), "--max-shard-size", "20KB"]) == 0
        assert len(list((tmp_path / destination).glob("*.safetensors"))) > 1


def run_on(destination, started) -> None:
    """A run that goes on until somebody ends it."""
    with output_folder.new_folder(destination) as folder:
        (folder / "model.safetensors").write_bytes(bytes(10))
        started.send(str(folder))
        time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_a_killed_run_leaves_is_removed_by_the_next(number, tmp_path):
    others = [tmp_path / ".out-backup", tmp_path / ".other.unfinished-abcdefgh", tmp_path / ".out.unfinished-old"]
    for other in others:
        other.mkdir()
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=run_on, args=(tmp_path / "out", theirs))
    process.start()
    leftover = ours.recv()
    # A run that is still going is left alone.
    with output_folder.new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("")
        assert os.path.isdir(leftover)
    os.kill(process.pid, number)
    process.join()
    assert os.path.isdir(leftover) == (number == signal.SIGKILL)
    (tmp_path / "out" / "file").unlink()
    with output_folder.new_folder(tmp_path / "out"):
        assert not os.path.isdir(leftover)
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "out", *others])
