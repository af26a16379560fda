"""`make hostile`: what every command does with the inputs of the corpus, as a table."""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from . import corpus, harness
from .checkpoints import make
from .corpus import Case


# Tracing a graph takes a while, however small the model.
SECONDS = {"export --engine onnx": 60}


class Bench:
    """Good checkpoints and a folder in which damaged copies of them come and go."""

    def __init__(self, root: Path):
        self.root = root
        os.environ[harness.MARK] = str(root / "mark")
        # What links and paths out of a folder could reach.
        self.good = make(root / "good")

    def run(self, case: Case, command: str, of: tuple[str, str]) -> harness.Outcome:
        sandbox = self.root / "sandbox"
        shutil.rmtree(sandbox, ignore_errors=True)
        sandbox.mkdir()
        (sandbox / "secret.json").write_text('{"secret": "of this machine"}')
        good = self.good[of[0]][of[1]]
        if (good / "model.safetensors").is_file():
            shutil.copyfile(good / "model.safetensors", sandbox / "other.safetensors")
        folder = corpus.copy(case, good, sandbox / "input")
        destination = sandbox / "output"
        argv = _command_line(case, command, folder, good, destination)

        def said_so(said: str) -> list[str]:
            if case.must_say and not any(word in said for word in case.must_say):
                return ["does not say so"]
            return self._leaks(destination)

        try:
            return harness.run(
                argv,
                sandbox,
                destination,
                mentions=case.mentions,
                may_work=command not in case.refused_by,
                writes=[folder / "README.md", folder / "block.svg"] if command == "card" else (),
                if_it_works=said_so,
                seconds=SECONDS.get(command, harness.MAX_SECONDS),
            )
        finally:
            for path in sandbox.rglob("*"):
                if not path.is_symlink():
                    path.chmod(0o755)

    def _leaks(self, destination: Path) -> list[str]:
        """What must not be in a result: what links pointed to, code, and pointers to code."""
        faults = []
        for path in destination.rglob("*") if destination.is_dir() else ():
            if path.is_symlink():
                faults.append("a link in the result")
            if path.suffix in (".json", ".md", "") and path.is_file() and b"of this machine" in path.read_bytes():
                faults.append("what a link pointed to is copied")
            if path.name == "own.py" or (
                path.is_file() and path.suffix == ".json" and b"own.Own" in path.read_bytes()
            ):
                faults.append("code of strangers is copied")
        return faults


def _command_line(case: Case, command: str, folder: Path, good: Path, destination: Path) -> list[str]:
    if command in ("generate", "chat"):
        prompt = case.options if command == "generate" else ()
        length = [] if "--max-new-tokens" in prompt else ["--max-new-tokens", "3"]
        device = [] if "--device" in prompt else ["--device", "cpu"]
        first, *more = prompt or ("Hello hello",)
        return [command, str(folder), *([first] if command == "generate" else []), *more, *length, *device]
    if command == "ablate":
        return [command, str(folder / "plan.json"), "--output", str(destination), "--no-plots"]
    if command == "verify":
        return [command, str(good), str(folder), *case.options]
    if command in ("card", "describe", "cost", "doctor"):
        return [command, str(folder)]
    if command in corpus.ENGINES:
        return ["export", str(folder), str(destination), *command.split()[1:]]
    if command == "edit":
        return [command, str(folder), str(destination), "--layers", "0"]
    return [command, str(folder), str(destination), *case.options]


def runs(cases: list[Case], whole: bool = False) -> Iterator[tuple[Case, str, tuple[str, str]]]:
    """
    Every case with commands that read such a folder.

    Args:
        whole: with all of them; else with one by turns, so that every kind of case meets every command.
    """
    turns: Counter[tuple[str, str]] = Counter()
    for case in cases:
        for of in case.of:
            able = corpus.ABLE[of[0]]
            able = tuple(command for command in able if case.commands is None or command in case.commands)
            if not able:
                continue
            turn = turns[case.kind, of[0]]
            turns[case.kind, of[0]] += 1
            for command in able if whole else (able[turn % len(able)],):
                yield case, command, of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a part of the names of kinds or cases")
    parser.add_argument("--verbose", action="store_true", help="name every fault")
    parser.add_argument("--every", type=int, default=1, help="take one in so many")
    parser.add_argument("--whole", action="store_true", help="every input with every command")
    parser.add_argument("--commands", nargs="+", help="only these")
    arguments = parser.parse_args()
    cases = [case for case in corpus.cases() if arguments.only in f"{case.kind}: {case.name}"]
    counts: dict[tuple[str, str], Counter] = {}
    start = time.perf_counter()
    slow: list[tuple[float, str]] = []
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place).resolve())
        for number, (case, command, of) in enumerate(runs(cases, arguments.whole)):
            if number % arguments.every or (arguments.commands and command not in arguments.commands):
                continue
            outcome = bench.run(case, command, of)
            counts.setdefault((case.kind, command), Counter())[outcome.label if not outcome.faults else "FAULT"] += 1
            slow.append((outcome.seconds, f"{command} {of} {case.kind}: {case.name}"))
            if outcome.faults and arguments.verbose:
                last = outcome.said.strip().splitlines()[-1:] or [""]
                print(
                    f"{command:9}{of[0][0]} {of[1]:6}{case.kind}: {case.name}: {'; '.join(outcome.faults)[:150]}\n"
                    f"      {last[0][:300]!r}"
                )
    print(markdown(counts))
    print(
        f"\n{len(cases)} inputs, {sum(sum(c.values()) for c in counts.values())} runs in {time.perf_counter() - start:.0f} s"
    )
    for seconds, name in sorted(slow, reverse=True)[:8]:
        print(f"{seconds:6.1f} s  {name[:120]}")
    return int(any("FAULT" in counter for counter in counts.values()))


def markdown(counts: dict[tuple[str, str], Counter]) -> str:
    every = dict.fromkeys(command for able in corpus.ABLE.values() for command in able)
    commands = [name for name in every if any(name == command for _, command in counts)]
    lines = ["| input | " + " | ".join(commands) + " |", "|---" * (len(commands) + 1) + "|"]
    for kind in dict.fromkeys(kind for kind, _ in counts):
        cells = [_cell(counts.get((kind, command))) for command in commands]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    total = sum(counts.values(), Counter())
    return "\n".join([*lines, "", ", ".join(f"{label}: {count}" for label, count in total.most_common())])


def _cell(counter: Counter | None) -> str:
    return "" if not counter else ", ".join(f"{count} {label}" for label, count in sorted(counter.items()))


if __name__ == "__main__":
    sys.exit(main())
