"""
Ends conversions at random moments and looks at what is left: `python -m tests.faults.kills --kills 100`.

A checkpoint of some 200 MB in several shards is converted and exported by processes of their own, which get SIGKILL, SIGTERM
or SIGINT at a moment drawn from the time that such a run takes. After each: no destination, the source as it was, nothing
left where the process could clean up. Each run names what the one before it left, and goes on with it or removes it; the
last ones are let end, and give what an undisturbed run gave.
"""

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# Tells when the command itself begins, so that no moment is wasted on Python's start.
CHILD = """
import sys
import hf_variants, hf_variants_cli
print("started", flush=True)
sys.exit(hf_variants_cli.main(sys.argv[1:]))
"""


def make(folder: Path, width: int = 512, layers: int = 12) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="40MB")


def digest(folder: Path) -> dict[str, str]:
    """File name -> hash of its bytes, but for what says when and by what it was made."""
    names = ("README.md", "conversion_report.json")
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in names
    }


def start(command: str, source: Path, destination: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, command, str(source), str(destination), "--max-shard-size", "40MB"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


def faults(kills: int, place: Path, seed: int = 0) -> tuple[list[str], Counter[str]]:
    """What was wrong after any of so many kills of each command, and how the runs ended."""
    draw, found, ends = random.Random(seed), [], Counter[str]()
    make(place / "native")
    sources = {"convert": place / "native", "export": place / "variant"}
    assert start("convert", place / "native", place / "variant").wait() == 0
    for command, source in sources.items():
        workplace = place / command
        workplace.mkdir()
        process = start(command, source, workplace / "good")
        begun = time.monotonic()
        assert process.wait() == 0
        seconds = time.monotonic() - begun
        good, before = digest(workplace / "good"), digest(source)
        destination = workplace / "out"
        unmentioned: set[Path] = set()

        def leftovers(workplace: Path = workplace, destination: Path = destination) -> set[Path]:
            return set(workplace.iterdir()) - {workplace / "good", destination}

        for kill in range(kills):
            number = SIGNALS[kill % len(SIGNALS)]
            process = start(command, source, destination)
            moment = draw.uniform(0, seconds)
            time.sleep(moment)
            process.send_signal(number)
            _, said = process.communicate()
            what = f"{command} after {moment:.2f} of {seconds:.2f} s and {number.name}"
            ended = process.returncode == 0
            ends[f"{command}: {'had ended' if ended else number.name}"] += 1
            # Of a machine that others use, no run says how long the next one takes.
            seconds *= 0.8 if ended else 1.05
            if digest(source) != before:
                found.append(f"{what}: the source changed")
            if (destination.exists() and not ended) and digest(destination) != good:
                found.append(f"{what}: an unfinished result at the destination")
            if destination.exists():
                if digest(destination) != good:
                    found.append(f"{what}: another result")
                for path in destination.iterdir():
                    path.unlink()
                destination.rmdir()
            if not ended and number is not signal.SIGKILL and "Traceback" in said:
                found.append(f"{what}: a traceback")
            for path in unmentioned:
                # Before it came so far, a run that was ended has nothing to say.
                if not path.exists() and str(path) not in said:
                    found.append(f"{what}: {path.name} went without a word")
            new = leftovers() - unmentioned
            if new and number is not signal.SIGKILL:
                found.append(f"{what}: left {sorted(path.name for path in new)}")
            unmentioned = leftovers()
        process = start(command, source, destination)
        process.communicate()
        if process.returncode != 0 or digest(destination) != good:
            found.append(f"{command}: the last run gives another result")
        if leftovers():
            found.append(f"{command}: leftovers stay: {leftovers()}")
    return found, ends


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="of both commands together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found, ends = faults(arguments.kills // 2, Path(place).resolve(), arguments.seed)
    print("\n".join([*found, *(f"{end}: {count}" for end, count in sorted(ends.items())), f"{len(found)} faults"]))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
