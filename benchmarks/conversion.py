"""Conversion of large checkpoints against `cp -r` of the same files: time, and the memory of the process's own.

Checkpoints of random bits in several shards are made first, one of a type whose tensors only change their names and one of
a type with transposed and fused tensors. Then `cp -r` and the conversion run by turns, on one disk, each until its bytes are
flushed to it. The ratio is the time of cp over that of the conversion: 1 is as fast as cp. See README.md beside this file.
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from hf_variants.conversion.checkpoint import Weights
from hf_variants.conversion.skeleton import empty_model, stored_tensors
from hf_variants.conversion.tensor_writer import write_safetensors


# What a child process runs: a conversion, whose time without Python's start it prints, with the peaks of its memory.
CHILD = """
import json, sys, threading, time
import hf_variants
from hf_variants.conversion import convert, export, verify

def memory(what):
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith(what))

function, *paths = json.loads(sys.argv[1])
run = {"convert": convert, "export": export, "verify": verify}[function]
options = {"progress": False} if function == "verify" else {"max_shard_bytes": int(sys.argv[2])}
# What transformers imports when it is first used is part of the start.
run(*json.loads(sys.argv[3]), **options)
print("ready", flush=True)
sys.stdin.readline()
before, peak, stop = memory("RssAnon"), [0, 0], threading.Event()
def watch():
    while not stop.wait(0.005):
        peak[:] = max(peak[0], memory("RssAnon")), max(peak[1], memory("VmRSS"))
watcher = threading.Thread(target=watch)
watcher.start()
start, processor = time.perf_counter(), time.process_time()
result = run(*paths, **options)
seconds, processor = time.perf_counter() - start, time.process_time() - processor
stop.set(); watcher.join()
assert function != "verify" or result.ok, result.to_markdown()
print(json.dumps({"seconds": seconds, "processor": processor, "own": peak[0] - before, "resident": peak[1]}))
"""

# What a process of another converter's environment runs, on the same checkpoint and measured in the same way.
OTHERS = {
    "mergekit": """
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from importlib.metadata import version
release = version("mergekit")

def run(source, destination, shard_bytes):
    # What takes every tensor of one model as it is.
    plan = {"models": [{"model": source}], "merge_method": "passthrough", "dtype": "bfloat16"}
    options = MergeOptions(out_shard_size=shard_bytes, copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(plan), destination, options)
""",
    "LitGPT": """
import json, os
from pathlib import Path
from litgpt import Config
from litgpt.scripts import convert_hf_checkpoint as room
from importlib.metadata import version
release = version("litgpt")

def run(source, destination, shard_bytes):
    # It reads and writes one folder, and knows sizes by the names of published models alone.
    source, destination = Path(source), Path(destination)
    destination.mkdir()
    for path in source.iterdir():
        os.link(path, destination / path.name)
    values = json.loads((source / "config.json").read_text())
    config = Config(
        name="Llama", vocab_size=values["vocab_size"], padded_vocab_size=values["vocab_size"],
        n_layer=values["num_hidden_layers"], n_head=values["num_attention_heads"], n_embd=values["hidden_size"],
        n_query_groups=values["num_key_value_heads"], intermediate_size=values["intermediate_size"], bias=False,
        rotary_percentage=1.0, parallel_residual=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
    )
    room.Config.from_name = lambda name: config
    room.convert_hf_checkpoint(destination, model_name="Llama")
""",
}
MEASURED = """
import json, os, sys, threading, time

def memory(what):
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith(what))

source, destination, small, small_destination, shard_bytes = sys.argv[1:]
run(small, small_destination, int(shard_bytes))
print("ready", flush=True)
sys.stdin.readline()
before, peak, stop = memory("RssAnon"), [0, 0], threading.Event()
def watch():
    while not stop.wait(0.005):
        peak[:] = max(peak[0], memory("RssAnon")), max(peak[1], memory("VmRSS"))
watcher = threading.Thread(target=watch)
watcher.start()
start, processor = time.perf_counter(), time.process_time()
run(source, destination, int(shard_bytes))
for name in os.listdir(destination):
    with open(os.path.join(destination, name), "rb") as stream:
        os.fsync(stream.fileno())
seconds, processor = time.perf_counter() - start, time.process_time() - processor
stop.set(); watcher.join()
figures = {"seconds": seconds, "processor": processor, "own": peak[0] - before, "resident": peak[1], "release": release}
print(json.dumps(figures))
"""
# What LitGPT has no model of.
NOT_IN_LITGPT = {"gpt2": "no model of LitGPT has learned positions"}


def llama(total_bytes: int, width: int) -> PreTrainedConfig:
    # 10.6 widths^2 a layer, with a gated network of 2.7 widths and a quarter of the key-value heads.
    return LlamaConfig(
        vocab_size=32_000, hidden_size=width, intermediate_size=43 * width // 16, num_attention_heads=16,
        num_key_value_heads=4,
        num_hidden_layers=max(round((total_bytes / 2 - 2 * 32_000 * width) / (10.6 * width**2)), 1),
        dtype="bfloat16", architectures=["LlamaForCausalLM"], tie_word_embeddings=False,
    )  # fmt: skip


def gpt2(total_bytes: int, width: int) -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=50_257, n_embd=width, n_head=16, n_layer=max(round(total_bytes / 2 / (12 * width**2)) - 2, 1),
        dtype="bfloat16", architectures=["GPT2LMHeadModel"],
    )  # fmt: skip


TYPES = {"llama": (llama, LlamaForCausalLM), "gpt2": (gpt2, GPT2LMHeadModel)}


def make(kind: str, total_bytes: int, folder: Path, shard_bytes: int, width: int = 2048) -> None:
    """A checkpoint of random values, of which no two tensors have the same."""
    make_config, model_class = TYPES[kind]
    config = make_config(total_bytes, width)
    folder.mkdir()
    headers = {
        name: torch.empty(tensor.shape, dtype=torch.bfloat16, device="meta")
        for name, tensor in stored_tensors(empty_model(model_class, config)).items()
    }
    block = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for number, (name, header) in enumerate(headers.items()):
            values = block.roll(number * 4099).repeat(math.ceil(header.numel() / block.numel()))
            yield name, values[: header.numel()].view(header.shape)

    write_safetensors(tensors(), headers, folder, shard_bytes)
    config.save_pretrained(folder)


def largest_tensor(folder: Path) -> int:
    """Bytes of the largest tensor of a checkpoint, from the headers of its files."""
    weights = Weights(folder)
    return max(weights.header(name).nbytes for name in weights.names())


def copied(source: Path, destination: Path) -> float:
    """Seconds of `cp -r`, and of flushing its files to the disk."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, destination], check=True)
    subprocess.run(["sync", *destination.iterdir(), destination], check=True)
    return time.perf_counter() - start


class Child:
    """
    A process that has imported everything and waits, so that it begins at the same moment as cp does: after another's files
    were removed. A virtual machine that gives unused memory back to its host is faster then than after a pause.
    """

    def __init__(self, function: str, *paths: Path, small: Sequence[Path], shard_bytes: int = 0):
        start = time.perf_counter()
        command = [json.dumps([function, *map(str, paths)]), str(shard_bytes), json.dumps([*map(str, small)])]
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        self._start = time.perf_counter() - start

    def run(self) -> dict:
        said, _ = self._process.communicate("go\n")
        if self._process.returncode:
            raise RuntimeError("The conversion failed.")
        return {**json.loads(said.splitlines()[-1]), "start": self._start}


class Other:
    """A process of another converter's environment, which waits as ours does."""

    def __init__(self, name: str, python: Path, *paths: Path, shard_bytes: int):
        self._process = subprocess.Popen(
            [str(python), "-c", OTHERS[name] + MEASURED, *map(str, paths), str(shard_bytes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._name = name
        assert self._process.stdout is not None
        # It may print while it gets ready.
        while (line := self._process.stdout.readline()) != "ready\n":
            if not line:
                raise RuntimeError(f"{name} failed: {self._process.communicate()[1][-500:]}")

    def run(self) -> dict:
        said, errors = self._process.communicate("go\n")
        if self._process.returncode:
            raise RuntimeError(f"{self._name} failed: {errors[-500:]}")
        return json.loads(said.splitlines()[-1])


def others(kind: str, arguments: argparse.Namespace, place: Path, native: Path, small: Path, size: int) -> list[dict]:
    """Rows of the converters whose environments were given, and of those that cannot be measured, with why."""
    rows = []
    result, shard_bytes = place / "result", int(arguments.shard_gb * 1e9)
    for name, python in (("mergekit", arguments.mergekit), ("LitGPT", arguments.litgpt)):
        row = {"type": kind, "function": name, "bytes": size}
        why = NOT_IN_LITGPT.get(kind) if name == "LitGPT" else None
        if python is None:
            why = "no environment with it was given"
        if why is not None:
            rows.append({**row, "absent": why})
            continue
        runs = []
        for _ in range(arguments.repeats):
            small_result = place / "small-other"
            other = Other(name, python, native, result, small, small_result, shard_bytes=shard_bytes)
            shutil.rmtree(small_result)
            runs.append(other.run())
            shutil.rmtree(result)
        rows.append(
            {
                **row, "release": runs[0]["release"],
                **{key: statistics.median(run[key] for run in runs) for key in ("seconds", "processor")},
                **{key: max(run[key] for run in runs) for key in ("own", "resident")},
            }
        )  # fmt: skip
    return rows


def measure(kind: str, gb: float, arguments: argparse.Namespace, place: Path) -> list[dict]:
    native, variant, result, copy = (place / name for name in ("native", "variant", "result", "copy"))
    shard_bytes = int(arguments.shard_gb * 1e9)
    make(kind, int(gb * 1e9), native, shard_bytes)
    size = sum(path.stat().st_size for path in native.iterdir())
    largest = largest_tensor(native)
    small = [place / name for name in ("small-native", "small-variant", "small-result")]
    make(kind, 0, small[0], shard_bytes, width=64)
    Child("convert", native, variant, small=small[:2], shard_bytes=shard_bytes).run()
    rows = []
    for function, source, first in (("convert", native, small[0]), ("export", variant, small[1])):
        ours: list[dict] = []
        theirs: list[float] = []
        # Once for nothing, so that every run follows one of the other's.
        copied(source, copy)
        for _ in range(arguments.repeats):
            child = Child(function, source, result, small=(first, small[2]), shard_bytes=shard_bytes)
            shutil.rmtree(small[2])
            shutil.rmtree(copy)
            ours.append(child.run())
            shutil.rmtree(result)
            theirs.append(copied(source, copy))
        shutil.rmtree(copy)
        rows.append(
            {
                "type": kind, "function": function, "bytes": size, "largest": largest, "cp": statistics.median(theirs),
                "seconds": statistics.median(run["seconds"] for run in ours),
                "ratio": statistics.median(cp / run["seconds"] for cp, run in zip(theirs, ours, strict=True)),
                "processor": statistics.median(run["processor"] for run in ours),
                "start": statistics.median(run["start"] for run in ours),
                "own": max(run["own"] for run in ours), "resident": max(run["resident"] for run in ours),
            }
        )  # fmt: skip
    rows += others(kind, arguments, place, native, small[0], size)
    if arguments.verify:
        run = Child("verify", native, variant, small=small[:2]).run()
        rows.append({"type": kind, "function": "verify", "bytes": size, **run})
    return rows


def markdown(rows: list[dict]) -> str:
    lines = [
        "| type | what | GB | cp -r, s | ours, s | cp / ours | processor, s | start, s | own memory, MB | resident, MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "absent" in row:
            lines.append(
                f"| {row['type']} | {row['function']} | {row['bytes'] / 1e9:.2f} | not run: {row['absent']} |"
            )
            continue
        cp, ratio = (f"{row[key]:.2f}" if key in row else "" for key in ("cp", "ratio"))
        lines.append(
            f"| {row['type']} | {row['function']} | {row['bytes'] / 1e9:.2f} | {cp} | {row['seconds']:.2f} | {ratio} | "
            f"{row['processor']:.2f} | {row.get('start', 0):.1f} | {row['own'] / 1e6:.0f} | {row['resident'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--gb", type=float, nargs="+", default=[6], help="sizes of the checkpoints (default: 6)"
    )  # fmt: skip
    parser.add_argument("--shard-gb", type=float, default=1, help="size of a shard (default: %(default)s)")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--verify", action="store_true", help="time and memory of `verify` as well")
    parser.add_argument(
        "--place", type=Path, help="a folder on the disk to measure (default: the one for temporary files)"
    )
    parser.add_argument("--mergekit", type=Path, metavar="PYTHON", help="of an environment that has mergekit")
    parser.add_argument("--litgpt", type=Path, metavar="PYTHON", help="of an environment that has LitGPT")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    arguments = parser.parse_args()
    rows = []
    for kind in arguments.types:
        for gb in arguments.gb:
            with tempfile.TemporaryDirectory(dir=arguments.place) as place:
                rows += measure(kind, gb, arguments, Path(place))
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    )
    print(f"{versions}, shards of {arguments.shard_gb} GB, {arguments.repeats} runs\n\n{markdown(rows)}")
    if arguments.output:
        machine = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "shard_gb": arguments.shard_gb}
        content = {"kind": "conversion", "versions": versions, **machine, "repeats": arguments.repeats, "rows": rows}
        arguments.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
