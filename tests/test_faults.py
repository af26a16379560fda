"""Large files and bad luck: pieces instead of tensors, changed sources, full disks, runs that are ended (tests/faults)."""

import hashlib
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_variants.conversion import checkpoint, convert, export
from hf_variants.conversion.errors import ConversionError
from tests.faults.kills import digest, faults, make


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults").resolve() / "native"
    make(folder, width=64, layers=2)
    return folder


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool]
)
def test_pieces_are_the_tensor(dtype, tmp_path, monkeypatch):
    tensors = {
        "odd": torch.randn(7, 13).to(dtype),
        "none": torch.zeros(0, 3).to(dtype),
        "one": torch.ones(()).to(dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    weights = checkpoint.Weights(tmp_path)
    for name, tensor in tensors.items():
        stored = weights.stored(name)
        pieces = [piece.clone() for piece in stored.pieces(20)]
        assert len(pieces) >= (2 if name == "odd" else 0)
        assert torch.equal(torch.cat([tensor.flatten()[:0], *pieces]), tensor.flatten())
        assert torch.equal(weights(name), tensor)
        assert weights(name).dtype is dtype
        assert torch.equal(stored.to(torch.float32).load(), tensor.float())


def test_values_that_only_move_are_never_whole_in_memory(native, tmp_path, monkeypatch):
    """Names change both ways and the dtype may; NaN in the last value of a tensor is seen all the same."""
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 256)
    monkeypatch.setattr(checkpoint.Unread.pieces, "__defaults__", (256,))

    def load(self):
        raise AssertionError("A tensor was read as a whole.")

    monkeypatch.setattr(checkpoint.Unread, "load", load)
    convert(native, tmp_path / "variant", dtype="bfloat16")
    convert(native, tmp_path / "same")
    export(tmp_path / "same", tmp_path / "native")
    stored, back = ({}, {})
    for tensors, folder in ((stored, native), (back, tmp_path / "native")):
        for path in folder.glob("*.safetensors"):
            tensors |= load_file(path)
    assert stored.keys() == back.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in stored.items())

    name, path = next(iter(stored)), next(native.glob("*.safetensors"))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((native / "config.json").read_bytes())
    stored[name].view(-1)[-1] = torch.nan
    save_file(stored, damaged / path.name.replace(path.name, "model.safetensors"), metadata={"format": "pt"})
    assert len(convert(damaged, tmp_path / "seen").non_finite) == 1


@pytest.mark.parametrize("change", ["written", "replaced", "cut", "removed", "config"])
def test_a_source_that_changes_meanwhile_is_noticed(change, native, tmp_path, monkeypatch):
    source = tmp_path / "native"
    source.mkdir()
    for path in native.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    path = source / "config.json" if change == "config" else next(source.glob("*.safetensors"))
    write, count = checkpoint._write, [0]

    def write_and_change(stream, memory):
        write(stream, memory)
        count[0] += 1
        if count[0] == 5:
            content = path.read_bytes()
            if change == "replaced":
                (source / "new").write_bytes(content)
                (source / "new").rename(path)
            elif change == "removed":
                path.unlink()
            else:
                path.write_bytes(content[: len(content) // 2] if change == "cut" else content[:-1] + b"}")

    monkeypatch.setattr(checkpoint, "_write", write_and_change)
    with pytest.raises((ConversionError, FileNotFoundError), match=path.name):
        convert(source, tmp_path / "variant")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["native"]


def test_a_full_disk_is_seen_before_the_work(native, tmp_path, monkeypatch):
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="1,000 left"):
        convert(native, tmp_path / "variant")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_is_an_error_of_the_disk(native, tmp_path):
    """A limit on the size of files is met in the middle, as a quota is."""
    done = subprocess.run(
        [sys.executable, "-m", "hf_variants_cli", "convert", str(native), str(tmp_path / "variant")],
        capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr.splitlines()[-1]
    assert "fault" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_destinations_that_are_links_and_the_working_folder(native, tmp_path, monkeypatch):
    for name in ("place", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "place")
    convert(native, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "place" / "config.json").is_file()
    monkeypatch.chdir(tmp_path / "here")
    convert(native, ".")
    assert digest(tmp_path / "here") == digest(tmp_path / "place")
    assert not list(tmp_path.rglob(".*unfinished*"))


def test_hashes_in_the_record_are_those_of_the_files(native, tmp_path):

    convert(native, tmp_path / "variant", max_shard_bytes=50_000)
    record = json.loads((tmp_path / "variant" / "conversion_report.json").read_text())
    for key, folder in (("sha256", tmp_path / "variant"), ("source_sha256", native)):
        found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
        assert record[key] == found
        assert len(found) >= 1


@pytest.mark.whole
def test_runs_that_are_ended_leave_nothing_that_looks_finished(tmp_path):
    found, ends = faults(9, tmp_path.resolve())
    assert not found, "\n".join(found)
    # Most came in the middle of the work.
    assert sum(count for end, count in ends.items() if "had ended" not in end) >= 9
