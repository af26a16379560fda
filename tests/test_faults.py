"""Large files and bad luck: pieces instead of tensors, changed sources, full disks, runs that are ended (tests/faults)."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_variants_cli
from hf_variants.conversion import checkpoint, convert, export, output_folder, progress, tensor_files, tensor_writer
from hf_variants.conversion.errors import ConversionError
from hf_variants.conversion.record import RECORD, read_record, speaks_of
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
    monkeypatch.setattr(tensor_writer, "PIECE_BYTES", 256)
    monkeypatch.setattr(tensor_files.Unread.pieces, "__defaults__", (256,))

    def load(self):
        raise AssertionError("A tensor was read as a whole.")

    monkeypatch.setattr(tensor_files.Unread, "load", load)
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
    write, count = tensor_writer._write, [0]

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

    monkeypatch.setattr(tensor_writer, "_write", write_and_change)
    with pytest.raises((ConversionError, FileNotFoundError), match=path.name):
        convert(source, tmp_path / "variant")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["native"]


def test_a_full_disk_is_seen_before_the_work(native, tmp_path, monkeypatch):
    usage = tensor_writer.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(tensor_writer.shutil, "disk_usage", lambda path: usage._replace(free=1000))
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


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_hashes_in_the_record_are_those_of_the_tensors(native, tmp_path, dtype):
    """Of both sides; those of files, which take another pass, where the conversion is verified or they are no tensors."""
    convert(native, tmp_path / "variant", max_shard_bytes=50_000, dtype=dtype)
    export(tmp_path / "variant", tmp_path / "native")
    for source, folder in ((native, tmp_path / "variant"), (tmp_path / "variant", tmp_path / "native")):
        record = json.loads((folder / RECORD).read_text())
        assert record["sha256"] == record["source_sha256"] == {}
        for key, place in (("tensor_sha256", folder), ("source_tensor_sha256", source)):
            tensors = {name: each for path in place.glob("*.safetensors") for name, each in load_file(path).items()}
            assert record[key] == {
                name: hashlib.sha256(tensor.view(torch.uint8).numpy()).hexdigest() for name, tensor in tensors.items()
            }
    if dtype is None:
        convert(native, tmp_path / "verified", verify=True)
        record = json.loads((tmp_path / "verified" / RECORD).read_text())
        for key, place in (("sha256", tmp_path / "verified"), ("source_sha256", native)):
            assert record[key] == {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in place.glob("*.safetensors")
            }


def test_a_record_speaks_of_the_tensors_and_not_of_their_files(native, tmp_path):
    convert(native, tmp_path / "variant", max_shard_bytes=50_000)
    folder = tmp_path / "variant"
    tensors = {name: each for path in folder.glob("*.safetensors") for name, each in load_file(path).items()}
    for path in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        path.unlink()
    record = read_record(folder)
    assert not speaks_of(record, folder)
    # Another file with other names before it, and the same tensors.
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert speaks_of(record, folder)
    next(iter(tensors.values())).view(-1)[-1] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert not speaks_of(record, folder)


def test_tensors_of_every_layout_are_written_and_hashed(tmp_path, monkeypatch):
    """Transposed, strided, empty and plain ones, by several threads, of which none waits for memory for ever."""
    monkeypatch.setattr(tensor_writer, "PIECE_BYTES", 128)
    monkeypatch.setattr(tensor_writer, "WAITING_BYTES", 64)
    tensors = {
        "transposed": torch.randn(37, 23).t(), "one row": torch.randn(40, 1).t(), "wide": torch.randn(2, 90).t(),
        "strided": torch.randn(20, 20)[::2, ::3], "cube": torch.randn(3, 4, 5).permute(2, 0, 1),
        "empty": torch.zeros(0, 3), "number": torch.ones(()), "half": torch.randn(8, 64).bfloat16().t(),
    }  # fmt: skip
    digests: dict[str, str] = {}
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        tensor_writer.write_safetensors(tensors.items(), tensors, folder, 2000, workers=workers, digests=digests)
        written = {name: each for path in folder.glob("*.safetensors") for name, each in load_file(path).items()}
        assert written.keys() == tensors.keys() == digests.keys()
        for name, tensor in tensors.items():
            assert torch.equal(written[name], tensor)
            assert digests[name] == hashlib.sha256(written[name].reshape(-1).view(torch.uint8).numpy()).hexdigest()


def killed(command, source, destination, *options):
    """The folder that a run left which was killed after three files."""
    argv = [command, str(source), str(destination), "--max-shard-size", "50KB", "--workers", "1", *options]
    # A fork of this process, in place of one that imports everything again.
    if not (child := os.fork()):
        try:
            add, count = progress.Progress.add, [0]

            def add_and_die(self, *arguments):
                add(self, *arguments)
                count[0] += 1
                if count[0] == 3:
                    os.kill(os.getpid(), signal.SIGKILL)

            progress.Progress.add = add_and_die
            hf_variants_cli.main(argv)
        finally:
            # Reached by no run that was killed; nothing of the tests may go on here.
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left,) = (
        path for path in destination.parent.iterdir() if path.name.startswith(f".{destination.name}.unfinished-")
    )
    return left


@pytest.fixture
def read_of(monkeypatch):
    """How many bytes of each file were read as tensors."""
    count: Counter[Path] = Counter()
    pieces = tensor_files.Unread.pieces

    def counted(self, *arguments):
        for piece in pieces(self, *arguments):
            count[self._path] += piece.nbytes
            yield piece

    monkeypatch.setattr(tensor_files.Unread, "pieces", counted)
    return count


@pytest.mark.parametrize("command", [convert, export])
def test_a_killed_run_is_gone_on_with(command, native, tmp_path, read_of, caplog, monkeypatch):
    source = native
    if command is export:
        source = tmp_path / "variant"
        convert(native, source, max_shard_bytes=70_000)
    command(source, tmp_path / "good", max_shard_bytes=50_000)
    whole = sum(count for path, count in read_of.items() if path.parent == source)
    left = killed(command.__name__, source, tmp_path / "out")
    finished = [path.name for path in left.glob("*.safetensors")]
    # Of the three that are whole, one lost a bit since; and a torn file lies there.
    torn, bad = left / "model.safetensors.torn", left / sorted(finished)[0]
    torn.write_bytes(b"torn")
    bad.write_bytes(bad.read_bytes()[:-1] + b"!")
    read_of.clear()
    for room in (output_folder, progress):
        monkeypatch.setattr(room.logger, "propagate", True)
    command(source, tmp_path / "out", max_shard_bytes=50_000, workers=2)
    assert f"Going on in {left}" in caplog.text
    assert "2 of" in caplog.text
    assert digest(tmp_path / "out") == digest(tmp_path / "good")
    assert read_of[bad] > 0
    again = sum(count for path, count in read_of.items() if path.parent == source)
    kept = sum(each.nbytes for name in sorted(finished)[1:3] for each in load_file(tmp_path / "out" / name).values())
    assert again == whole - kept
    records = [json.loads((tmp_path / name / RECORD).read_text()) for name in ("good", "out")]
    for key in ("tensor_sha256", "source_tensor_sha256", "non_finite"):
        assert records[0][key] == records[1][key]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("change", ["source", "options", "progress", "none of them reads"])
def test_what_a_killed_run_left_is_removed_where_it_is_of_another_task(change, native, tmp_path, caplog, monkeypatch):
    source = tmp_path / "native"
    source.mkdir()
    for path in native.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    left = killed("convert", source, tmp_path / "out")
    options = {"max_shard_bytes": 50_000}
    if change == "source":
        path = next(source.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    elif change == "options":
        options["dtype"] = "bfloat16"
    elif change == "progress":
        (left / "progress.json").write_text('{"task": [], "files": 3}')
    else:
        content = json.loads((left / "progress.json").read_text())
        (left / "progress.json").write_text(json.dumps({"task": content["task"], "files": [1], "source": 7}))
    monkeypatch.setattr(output_folder.logger, "propagate", True)
    convert(source, tmp_path / "out", **options)
    assert f"{'Going on in' if change.startswith('none') else 'Removing'} {left}" in caplog.text
    assert not list(tmp_path.glob(".*"))
    del options["max_shard_bytes"]
    convert(source, tmp_path / "good", max_shard_bytes=50_000, **options)
    assert digest(tmp_path / "out") == digest(tmp_path / "good")


@pytest.mark.whole
def test_runs_that_are_ended_leave_nothing_that_looks_finished(tmp_path):
    found, ends = faults(9, tmp_path.resolve())
    assert not found, "\n".join(found)
    # Most came in the middle of the work.
    assert sum(count for end, count in ends.items() if "had ended" not in end) >= 9
