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
from typing import Any

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from hf_variants.conversion.checkpoint import Weights
from hf_variants.conversion.skeleton import empty_model, stored_tensors
from hf_variants.conversion.tensor_writer import write_safetensors


# What a child process runs: `run` with its paths once in small, since what is imported when it is first used is part of the
# start, and once in earnest; it prints the time of that, without Python's start, and the peaks of its memory.
MEASURED = """
import json, sys, threading, time

def memory(what):
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith(what))

paths, small, options = json.loads(sys.argv[1])
run(*small, **options)
print("ready", flush=True)
sys.stdin.readline()
before, peak, stop = memory("RssAnon"), [0, 0], threading.Event()
def watch():
    while not stop.wait(0.005):
        peak[:] = max(peak[0], memory("RssAnon")), max(peak[1], memory("VmRSS"))
watcher = threading.Thread(target=watch)
watcher.start()
start, processor = time.perf_counter(), time.process_time()
run(*paths, **options)
flush(*paths)
seconds, processor = time.perf_counter() - start, time.process_time() - processor
stop.set(); watcher.join()
figures = {"seconds": seconds, "processor": processor, "own": peak[0] - before, "resident": peak[1], "release": release}
print(json.dumps(figures))
"""

# Ours, which flushes by itself.
OURS = """
import hf_variants
from hf_variants import conversion
release = ""

def run(*paths, function, **options):
    result = getattr(conversion, function)(*paths, **options)
    assert function != "verify" or result.ok, result.to_markdown()

def flush(*paths):
    pass
"""

# What the others leave to the system.
FLUSHED = """
import os

def flush(source, destination):
    for name in os.listdir(destination):
        with open(os.path.join(destination, name), "rb") as stream:
            os.fsync(stream.fileno())
"""

# Other converters on the same checkpoint, in environments of their own.
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

    Args:
        code: that defines `run` and `flush`.
        paths, small: of the run that is measured, and of the one before.
        options: of both.
    """

    def __init__(self, code: str, paths: Sequence[Path], small: Sequence[Path], python: Path, **options: Any):
        start = time.perf_counter()
        said = json.dumps([[*map(str, paths)], [*map(str, small)], options])
        self._process = subprocess.Popen(
            [str(python), "-c", code + MEASURED, said],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        # Some print while they get ready.
        while (line := self._process.stdout.readline()) != "ready\n":
            if not line:
                raise RuntimeError(f"It failed: {self._process.communicate()[1][-500:]}")
        self._start = time.perf_counter() - start

    def run(self) -> dict:
        said, errors = self._process.communicate("go\n")
        if self._process.returncode:
            raise RuntimeError(f"It failed: {errors[-500:]}")
        return {**json.loads(said.splitlines()[-1]), "start": self._start}


def ours(function: str, *paths: Path, small: Sequence[Path], **options: Any) -> Child:
    """A process of `convert`, `export` or `verify`."""
    return Child(OURS, paths, small, Path(sys.executable), function=function, **options)


def others(
    kind: str, arguments: argparse.Namespace, place: Path, native: Path, small: Path, size: int
) -> Iterator[dict]:
    """Rows of the converters whose environments were given, and of those that cannot be measured, with why."""
    result, shard_bytes = place / "result", int(arguments.shard_gb * 1e9)
    for name, python in (("mergekit", arguments.mergekit), ("LitGPT", arguments.litgpt)):
        row = {"type": kind, "function": name, "bytes": size}
        why = NOT_IN_LITGPT.get(kind) if name == "LitGPT" else None
        if python is None:
            why = "no environment with it was given"
        if why is not None:
            yield {**row, "absent": why}
            continue
        runs = []
        for _ in range(arguments.repeats):
            small_result = place / "small-other"
            other = Child(
                OTHERS[name] + FLUSHED, (native, result), (small, small_result), python, shard_bytes=shard_bytes
            )
            shutil.rmtree(small_result)
            runs.append(other.run())
            shutil.rmtree(result)
        yield {
            **row, "release": runs[0]["release"],
            **{key: statistics.median(run[key] for run in runs) for key in ("seconds", "processor")},
            **{key: max(run[key] for run in runs) for key in ("own", "resident")},
        }  # fmt: skip


def measure(kind: str, gb: float, arguments: argparse.Namespace, place: Path) -> Iterator[dict]:
    """Rows as they are measured."""
    native, variant, result, copy = (place / name for name in ("native", "variant", "result", "copy"))
    shard_bytes = int(arguments.shard_gb * 1e9)
    make(kind, int(gb * 1e9), native, shard_bytes)
    size = sum(path.stat().st_size for path in native.iterdir())
    largest = largest_tensor(native)
    small = [place / name for name in ("small-native", "small-variant", "small-result")]
    make(kind, 0, small[0], shard_bytes, width=64)
    ours("convert", native, variant, small=small[:2], max_shard_bytes=shard_bytes).run()
    for function, source, first in (("convert", native, small[0]), ("export", variant, small[1])):
        runs: list[dict] = []
        theirs: list[float] = []
        # Once for nothing, so that every run follows one of the other's.
        copied(source, copy)
        for _ in range(arguments.repeats):
            child = ours(function, source, result, small=(first, small[2]), max_shard_bytes=shard_bytes)
            shutil.rmtree(small[2])
            shutil.rmtree(copy)
            runs.append(child.run())
            shutil.rmtree(result)
            theirs.append(copied(source, copy))
        shutil.rmtree(copy)
        yield {
            "type": kind, "function": function, "bytes": size, "largest": largest, "cp": statistics.median(theirs),
            "seconds": statistics.median(run["seconds"] for run in runs),
            "ratio": statistics.median(cp / run["seconds"] for cp, run in zip(theirs, runs, strict=True)),
            "processor": statistics.median(run["processor"] for run in runs),
            "start": statistics.median(run["start"] for run in runs),
            "own": max(run["own"] for run in runs), "resident": max(run["resident"] for run in runs),
        }  # fmt: skip
    yield from others(kind, arguments, place, native, small[0], size)
    if arguments.verify:
        run = ours("verify", native, variant, small=small[:2], progress=False).run()
        yield {"type": kind, "function": "verify", "bytes": size, **run}


HEAD = """\
| type | what | GB | cp -r, s | ours, s | cp / ours | processor, s | start, s | own memory, MB | resident, MB |
|---|---|---|---|---|---|---|---|---|---|"""


def line(row: dict) -> str:
    """A row of the table."""
    cells = [row["type"], row["function"], f"{row['bytes'] / 1e9:.2f}"]
    if "absent" in row:
        cells.append(f"not run: {row['absent']}")
    else:
        cells += [f"{row[key]:.2f}" if key in row else "" for key in ("cp", "seconds", "ratio", "processor")]
        cells += [f"{row.get('start', 0):.1f}", f"{row['own'] / 1e6:.0f}", f"{row['resident'] / 1e6:.0f}"]
    return f"| {' | '.join(cells)} |"


def written(output: Path, settings: dict, rows: list[dict]) -> None:
    """Write the figures, with those that an earlier run of the same settings left of other types and sizes."""
    if output.exists():
        earlier = json.loads(output.read_text())
        if {key: earlier[key] for key in settings} == settings:
            known = {(row["type"], row["function"], round(row["bytes"], -8)) for row in rows}
            others = [
                row for row in earlier["rows"]
                if (row["type"], row["function"], round(row["bytes"], -8)) not in known
            ]  # fmt: skip
            rows = sorted([*others, *rows], key=lambda row: list(TYPES).index(row["type"]))
    content = {**settings, "load": os.getloadavg()[0], "rows": rows}
    output.write_text(json.dumps(content, indent=2) + "\n")


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
    parser.add_argument("--output", type=Path, help="also write the figures as JSON, beside those of earlier runs")
    arguments = parser.parse_args()
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    )
    settings = {
        "kind": "conversion", "versions": versions,
        "cores": os.cpu_count(), "shard_gb": arguments.shard_gb, "repeats": arguments.repeats,
    }  # fmt: skip
    print(f"{versions}, shards of {arguments.shard_gb} GB, {arguments.repeats} runs\n\n{HEAD}", flush=True)
    rows: list[dict] = []
    for kind in arguments.types:
        for gb in arguments.gb:
            with tempfile.TemporaryDirectory(dir=arguments.place) as place:
                # Each as soon as it is there: a run that is cut short loses what it was at.
                for row in measure(kind, gb, arguments, Path(place)):
                    rows.append(row)
                    print(line(row), flush=True)
                    if arguments.output:
                        written(arguments.output, settings, rows)


if __name__ == "__main__":
    main()
