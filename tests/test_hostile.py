"""Damaged, hostile and odd inputs to the commands: each works, or is refused with a name and a remedy (tests/hostile)."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import hf_variants_cli
from hf_variants.conversion import convert, export, tensor_writer
from hf_variants.conversion.errors import ConversionError
from hf_variants.conversion.json_files import read_config_values
from tests.hostile import corpus, fuzz, harness
from tests.hostile.table import Bench, runs


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("hostile").resolve())


def faults_of(bench, drawn):
    found = []
    for case, command, of in drawn:
        outcome = bench.run(case, command, of)
        if outcome.faults:
            found.append(f"{command} {of} {case.kind}: {case.name}: {outcome.faults}\n{outcome.said[-300:]}")
    return found


def test_the_corpus_is_large_and_every_kind_meets_every_command():
    cases = corpus.cases()
    assert len(cases) > 300
    assert len({(case.kind, case.name, case.of) for case in cases}) == len(cases)
    assert {command for _, command, _ in runs(cases)} == {command for able in corpus.ABLE.values() for command in able}


def test_a_part_of_the_corpus(bench):
    """The rest is `make hostile`."""
    part = [run for number, run in enumerate(runs(corpus.cases())) if number % 17 == 0 and run[1] != "verify"]
    assert not (found := faults_of(bench, part)), "\n".join(found)


@pytest.mark.whole
@pytest.mark.exhaustive
def test_the_whole_corpus(bench):
    assert not (found := faults_of(bench, runs(corpus.cases()))), "\n".join(found)


@pytest.mark.parametrize("draws", [100, pytest.param(2000, marks=(pytest.mark.whole, pytest.mark.exhaustive))])
def test_random_damage(bench, draws):
    drawn = (fuzz.case(seed) for seed in range(draws))
    assert not (found := faults_of(bench, drawn)), "\n".join(found)


def test_control_characters_do_not_reach_the_terminal(monkeypatch):
    terminal = io.StringIO()
    shown = hf_variants_cli._Shown(terminal)
    print("a\x1b[31mb\x07\u202e\x9bc\r\nd\te", end="", file=shown)
    shown.write("\r 50%")
    assert terminal.getvalue() == "a\\x1b[31mb\\x07\\u202e\\x9bc\nd\te\r 50%"


@pytest.mark.parametrize("where", ["inside", "file", "link", ".", "long"])
def test_destinations(bench, tmp_path, monkeypatch, where):
    native = bench.good["native"]["llama"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("folder")
    monkeypatch.chdir(tmp_path / "folder")
    destination = {"inside": tmp_path / "file" / "x", ".": "."}.get(where, tmp_path / where)
    destination = tmp_path / ("a" * 300) if where == "long" else destination
    outcome = harness.run(["convert", str(native), str(destination)], tmp_path, writes=[tmp_path / "folder"])
    assert not outcome.faults, outcome.said
    assert outcome.label == ("works" if where in ("link", ".") else "refused")
    if where in ("link", "."):
        assert (tmp_path / "folder" / "config.json").is_file()
        assert not [path for path in (tmp_path / "folder").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("command", ["convert", "export", "bundle"])
def test_a_full_disk_is_the_disk_s(bench, tmp_path, monkeypatch, command):
    source = bench.good["native" if command == "convert" else "variant"]["llama"]

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    monkeypatch.setattr(tensor_writer, "write_safetensors", full)
    outcome = harness.run([command, str(source), str(tmp_path / "out")], tmp_path)
    assert not outcome.faults
    assert "disk is full" in outcome.said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["convert", "export", "bundle"])
def test_ctrl_c_leaves_nothing(bench, tmp_path, monkeypatch, command):
    source = bench.good["native" if command == "convert" else "variant"]["llama"]

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tensor_writer, "write_safetensors", stop)
    outcome = harness.run([command, str(source), str(tmp_path / "out")], tmp_path)
    assert outcome.label == "stopped"
    assert list(tmp_path.iterdir()) == []


def test_in_processes_of_their_own(bench, tmp_path):
    """The streams and signals of a real process."""
    config = bench.good["variant"]["llama"] / "config.json"
    (tmp_path / "config.json").write_text(config.read_text().replace('"hf_variant"', '"hf_variant\\u001b[31m"'))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "config.json").write_text("[" * 200_000)
    for folder in (tmp_path, tmp_path / "deep"):
        ended = subprocess.run(
            [sys.executable, "-m", "hf_variants_cli", "describe", str(folder)], capture_output=True, text=True, check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert ended.returncode == 2
        assert "\x1b" not in ended.stdout + ended.stderr
        assert "config.json" in ended.stderr


def test_an_odd_config_that_is_right_is_read(tmp_path):
    """Keys of no type of their own, equal keys twice, and numbers as large as tokenizers' and ids are."""
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "llama", "a": 1, "a": 1, "pad_token_id": -1, "max_position_embeddings": 1e30}')
    with pytest.raises(ConversionError, match="max_position_embeddings"):
        read_config_values(path)
    path.write_text('{"model_type": "llama", "a": 1, "a": 1, "pad_token_id": -1, "dtype": null, "é": [1.5]}')
    assert read_config_values(path)["é"] == [1.5]


LLAMA = '"model_type": "llama", "hidden_size": 8'


@pytest.mark.parametrize(
    "unread",
    [
        '"best_metric": NaN',
        '"trained": {"loss": [1.0, -Infinity]}',
        '"note": 1, "note": 2',
        '"t": {"a": 1, "a": 2}',
        '"n": 1e30',
    ],
)
def test_what_nothing_reads_is_no_obstacle(unread, tmp_path):
    """Python's reader, and so transformers, takes numbers that are none, and of two values the last."""
    path = tmp_path / "config.json"
    path.write_text("{" + LLAMA + ", " + unread + "}")
    assert read_config_values(path)["hidden_size"] == 8


@pytest.mark.parametrize(
    ("key", "read"),
    [
        ("hidden_size", '"hidden_size": 16'), ("rope_theta", '"rope_theta": NaN'),
        ("temperature", '"temperature": Infinity'),
        ("rope_scaling", '"rope_scaling": {"factor": 2.0, "factor": 4.0}'), ("num_labels", '"num_labels": NaN'),
        ("dtype", '"dtype": "float32", "dtype": "float16"'), ("pad_token_id", '"pad_token_id": 1e30'),
    ],
)  # fmt: skip
def test_what_is_read_has_one_value_that_is_a_number(key, read, tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{" + LLAMA + ", " + read + "}")
    with pytest.raises(ConversionError, match=key):
        read_config_values(path)


def test_a_checkpoint_whose_leftovers_are_no_numbers_converts_and_comes_back(bench, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(bench.good["native"]["llama"], source)
    path = source / "config.json"
    path.write_text(path.read_text().rstrip()[:-1] + ', "best_metric": NaN, "note": {"a": 1, "a": 2}}')
    convert(source, tmp_path / "variant", verify=True)
    export(tmp_path / "variant", tmp_path / "back", verify=True)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["note"] == {"a": 2}

    def refused(constant):
        raise AssertionError(f"{constant} is no JSON")

    for written in [*tmp_path.glob("variant/*.json"), *tmp_path.glob("back/*.json")]:
        json.loads(written.read_text(), parse_constant=refused)


def test_settings_are_blamed_and_a_fault_of_the_model_is_not(bench, tmp_path, monkeypatch):
    from transformers import GenerationConfig

    from hf_variants.text_generation import open_checkpoint

    generator = open_checkpoint(str(bench.good["variant"]["llama"]), device="cpu")
    with pytest.raises(ValueError, match="forced_eos_token_id"):
        generator.stream("Hello", GenerationConfig(max_new_tokens=1, forced_eos_token_id=10**9), io.StringIO())

    def broken(*_, **__):
        raise IndexError("of the model")

    monkeypatch.setattr(generator.model, "forward", broken)
    with pytest.raises(IndexError, match="of the model"):
        generator.stream("Hello", GenerationConfig(max_new_tokens=1), io.StringIO())


def test_a_table_of_positions_ends(bench, capsys):
    from transformers import GenerationConfig

    from hf_variants.text_generation import open_checkpoint

    generator = open_checkpoint(str(bench.good["variant"]["gpt2"]), device="cpu")
    length = generator.model.config.max_position_embeddings
    with pytest.raises(ValueError, match="table of positions"):
        generator.stream("a " * length, GenerationConfig(max_new_tokens=1), io.StringIO())
    options = GenerationConfig(max_new_tokens=10 * length, eos_token_id=None, pad_token_id=0)
    generator.stream("Hello", options, io.StringIO())
    assert "at most" in capsys.readouterr().err
    assert options.max_new_tokens == 10 * length


def test_weights_that_are_missing_are_not_drawn(bench, tmp_path):
    from safetensors.torch import load_file, save_file

    from hf_variants.text_generation import open_checkpoint

    folder = tmp_path / "variant"
    corpus.copy(corpus.Case("", "", lambda folder: None), bench.good["variant"]["llama"], folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"model\.norm\.weight is missing"):
        open_checkpoint(str(folder), device="cpu")
    tensors["model.norm.weight"] = torch.ones(16, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"model\.norm\.weight is int32"):
        open_checkpoint(str(folder), device="cpu")
