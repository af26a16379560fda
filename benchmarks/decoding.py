"""Generation on a CPU: our model, plain and fast, beside transformers' own classes and CTranslate2, on the same weights.

Each case (a shape, a context, a batch) is measured by turns, one short generation of each engine after the other, several
rounds. CTranslate2 has a process of its own, since two pools of threads in one process slow each other; the turns
alternate between the processes all the same. Every turn's tokens are compared with the stock class's, and the logits of
ours, before anything is timed. The bandwidth of reading memory is measured in the same run. See README.md beside this file.
"""

# Only what is light is imported here: every process imports this file, and CTranslate2's shall not hold torch's threads.
import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parent))

from shapes import SHAPES


# Engines of torch's process: name -> (ours, ours in 8 bits, or stock; attention; further options of `generate`).
TORCH_ENGINES = {
    "stock eager": ("stock", "eager", {}),
    "stock sdpa": ("stock", "sdpa", {}),
    "stock static": ("stock", "sdpa", {"cache_implementation": "static", "disable_compile": True}),
    "stock static compiled": ("stock", "sdpa", {"cache_implementation": "static"}),
    "ours plain": ("ours", None, {}),
    "ours fast": ("ours", None, {}),
    "ours fast int8": ("ours int8", None, {}),
}
# Engines of CTranslate2's process: name -> what it computes in. It rounds the same weights while it loads them.
CTRANSLATE2_ENGINES = {"CTranslate2 float32": "float32", "CTranslate2 int8": "int8_float32"}
ENGINES = [*TORCH_ENGINES, *CTRANSLATE2_ENGINES]
# Left out unless asked for: minutes of compilation.
NOT_BY_DEFAULT = ("stock static compiled",)
# After a turn, idle threads of either process go on spinning for a while.
PAUSE = 0.25
# A turn during which other programs used more of the processor than this is taken again, whoever's it is, up to so many
# turns for each that is wanted.
MOST_OF_OTHERS = 0.08
MOST_ATTEMPTS = 6
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def torch_process(connection: Any, folder: str, threads: int) -> None:
    """Answers requests for turns of the engines that run in torch."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from torch_turns import TorchTurns

    serve(connection, TorchTurns(folder, threads, TORCH_ENGINES))


def ctranslate2_process(connection: Any, folder: str, threads: int) -> None:
    """The same for CTranslate2."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from ctranslate2_turns import CTranslate2Turns

    serve(connection, CTranslate2Turns(folder, threads, CTRANSLATE2_ENGINES))


def serve(connection: Any, turns: Any) -> None:
    """Calls methods of `turns` as they are asked for, (name, arguments, whether ahead of others), until `None` comes."""
    while (request := connection.recv()) is not None:
        name, arguments, ahead = request
        try:
            with ahead_of_others() if ahead else contextlib.nullcontext():
                result = getattr(turns, name)(**arguments)
            connection.send((result, None))
        # Whatever it is, the table is to say it.
        except Exception as error:
            connection.send((None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"))


@contextlib.contextmanager
def ahead_of_others() -> Iterator[None]:
    """Have all threads of this process run before every other program's, for the moment; Linux alone can, for root."""
    try:
        set_policy(os.SCHED_FIFO, 1)
        yield
    finally:
        # Threads that were started meanwhile as well.
        set_policy(os.SCHED_OTHER, 0)


def set_policy(policy: int, priority: int) -> None:
    """Of all threads of this process."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setscheduler(int(thread), policy, os.sched_param(priority))


class Process:
    """Another process, whose turns are asked for."""

    def __init__(self, target: Any, folder: Path, threads: int, *more: Any):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=target, args=(other, str(folder), threads, *more), daemon=True)
        self.process.start()

    def ask(self, name: str, ahead: bool = False, **arguments: Any) -> Any:
        """
        What a method returns over there; `ahead`: with priority over all other programs.

        Raises:
            RuntimeError: with the error there.
        """
        self.connection.send((name, arguments, ahead))
        result, error = self.connection.recv()
        if error is not None:
            raise RuntimeError(error)
        return result

    def end(self) -> None:
        self.connection.send(None)
        self.process.join(30)


def processor_seconds(processes: list[Process]) -> tuple[float, float] | None:
    """Seconds of processor time used by everything, and by these processes and this one; Linux alone says so."""
    if not Path("/proc/stat").exists():
        return None
    user, nice, system, _, _, irq, softirq, steal, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    own = 0
    for pid in (os.getpid(), *(process.process.pid for process in processes)):
        # Behind the name, which may hold spaces.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        own += int(fields[11]) + int(fields[12])
    return (user + nice + system + irq + softirq + steal) / TICKS, own / TICKS


def wait_for_silence(processes: list[Process], patience: float) -> None:
    """Wait until other programs leave the processor alone, at most so many seconds."""
    begun = time.perf_counter()
    while time.perf_counter() - begun < patience:
        before = processor_seconds(processes)
        time.sleep(PAUSE)
        after = processor_seconds(processes)
        if before is None or after is None:
            return
        others = (after[0] - before[0]) - (after[1] - before[1])
        # A tick is what the clock cannot tell from none.
        if others <= MOST_OF_OTHERS * PAUSE * (os.cpu_count() or 1) + 1 / TICKS:
            return


def timed(
    process: Process, processes: list[Process], settings: argparse.Namespace, name: str, **arguments: Any
) -> dict:
    """A turn, with the share of the processor that others used meanwhile."""
    if not settings.real_time:
        wait_for_silence(processes, settings.patience)
    before, begun = processor_seconds(processes), time.perf_counter()
    turn = process.ask(name, settings.real_time, **arguments)
    after, seconds = processor_seconds(processes), time.perf_counter() - begun
    if settings.real_time:
        # Others wait no longer than a turn, and have as long.
        time.sleep(max(seconds, PAUSE))
    if before is not None and after is not None:
        others = (after[0] - before[0]) - (after[1] - before[1])
        turn["others"] = max(0.0, others / seconds / (os.cpu_count() or 1))
    return turn


def measure(shape: str, folder: Path, cases: list[tuple[int, int]], arguments: argparse.Namespace) -> dict:
    """
    All cases of one shape.

    Args:
        folder: which `prepare` filled.
        cases: (context, batch) each.
    """
    processes = {"torch": Process(torch_process, folder, arguments.threads)}
    if any(name in CTRANSLATE2_ENGINES for name in arguments.engines):
        processes["ctranslate2"] = Process(ctranslate2_process, folder, arguments.threads)
    owner = {name: processes["torch" if name in TORCH_ENGINES else "ctranslate2"] for name in arguments.engines}
    try:
        about = processes["torch"].ask("about")
        rows = []
        for context, batch in cases:
            rows.append(measure_case(shape, context, batch, owner, processes["torch"], about, arguments))
            show(rows[-1])
        return {"model": {"shape": shape, **about}, "rows": rows}
    finally:
        for process in processes.values():
            process.end()


def measure_case(
    shape: str, context: int, batch: int, owner: dict, torch_side: Process, about: dict, arguments: argparse.Namespace
) -> dict:
    """
    One case: every engine's time per step of decoding and for the prompt, and how far its tokens are the stock class's.
    """
    new_tokens = arguments.new_tokens
    prompts = torch_side.ask("prompts", context=context, batch=batch)
    bandwidths = [torch_side.ask("read_bandwidth", arguments.real_time)]
    refused, first, times = {}, {}, {}
    for name, process in owner.items():
        try:
            first[name] = process.ask(
                "turn", arguments.real_time, engine=name, prompts=prompts, new_tokens=new_tokens
            )["tokens"]
            times[name] = []
        except RuntimeError as error:
            refused[name] = str(error)
    differences = torch_side.ask("compare_logits", arguments.real_time, prompts=prompts, new_tokens=min(new_tokens, 8))
    processes = list(dict.fromkeys(owner.values()))
    for round_ in range(MOST_ATTEMPTS * arguments.rounds):
        # Every other round backwards, so that no engine has always the same one before it.
        for name in list(times) if round_ % 2 == 0 else reversed(list(times)):
            if len(times[name]) == arguments.rounds:
                continue
            turn = timed(
                owner[name], processes, arguments, "turn", engine=name, prompts=prompts, new_tokens=new_tokens
            )
            if turn["tokens"] != first[name]:
                raise RuntimeError(f"{name} gives other tokens at every turn.")
            left = MOST_ATTEMPTS * arguments.rounds - round_ - 1
            # In real time, others have what an engine leaves idle.
            if (
                arguments.real_time
                or turn.get("others", 0.0) <= MOST_OF_OTHERS
                or left < arguments.rounds - len(times[name])
            ):
                times[name].append(turn)
    bandwidths.append(torch_side.ask("read_bandwidth", arguments.real_time))
    bandwidth = max(bandwidths)
    reference = first.get("stock sdpa") or first.get("stock eager") or first["ours plain"]
    bytes_read = about["weight_bytes_per_step"] + batch * (context + new_tokens // 2) * about["cache_bytes_per_token"]
    results = {}
    for name, turns in times.items():
        decode = spread([turn["decode_s"] / (new_tokens - 1) for turn in turns])
        results[name] = {
            "decode_s_per_step": decode,
            "prefill_s": spread([turn["prefill_s"] for turn in turns]),
            "tokens_as_stock": agreement(first[name], reference),
            "processor_used_by_others": max(turn.get("others", 0.0) for turn in turns),
            "fraction_of_bandwidth": bytes_read / decode["median"] / bandwidth,
        }
    return {
        "shape": shape, "context": context, "batch": batch, "new_tokens": new_tokens, "rounds": arguments.rounds,
        "read_bandwidth": bandwidth, "float32_bytes_read_per_step": bytes_read, "logit_differences": differences,
        "engines": results, "refused": refused,
    }  # fmt: skip


def spread(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "low": low, "high": high, "best": min(values)}


def agreement(tokens: list[list[int]], reference: list[list[int]]) -> float:
    """The share of tokens up to each row's first other one."""
    total = same = 0
    for row, expected in zip(tokens, reference, strict=True):
        differing = [i for i, (a, b) in enumerate(zip(row, expected, strict=True)) if a != b]
        total += len(expected)
        same += differing[0] if differing else len(expected)
    return same / total


def show(row: dict) -> None:
    print(f"{row['shape']}, context {row['context']}, batch {row['batch']}; "
          f"reading {row['read_bandwidth'] / 1e9:.1f} GB/s; logits differ by {row['logit_differences']}")  # fmt: skip
    for name, result in row["engines"].items():
        decode, prefill = result["decode_s_per_step"], result["prefill_s"]
        print(f"  {name:22} {decode['median'] * 1e3:8.2f} ms a step ({decode['low'] * 1e3:.2f}-{decode['high'] * 1e3:.2f})"
              f" {result['fraction_of_bandwidth']:5.0%}  prompt {prefill['median'] * 1e3:8.1f} ms"
              f"  tokens {result['tokens_as_stock']:.0%}")  # fmt: skip
    for name, reason in row["refused"].items():
        print(f"  {name:22} {reason}")
    sys.stdout.flush()


def processor_name() -> str:
    """As the operating system calls it."""
    path = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in path.read_text().splitlines()
             if line.startswith("model name")] if path.exists() else []  # fmt: skip
    return names[0] if names else platform.processor() or platform.machine()


def machine(threads: int, *packages: str) -> dict[str, Any]:
    """What a report says of where it was made."""
    return {
        "device": f"{processor_name()}, {threads} threads",
        "packages": {name: version(name) for name in packages},
    }


def command(script: str) -> str:
    """What does the same elsewhere: without where things are kept."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if not skip and word not in ("--models", "--output"):
            words.append(word)
        skip = word in ("--models", "--output")
    return shlex.join(["python", f"benchmarks/{script}", *words])


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """What benchmarks ask of a machine that others use, too."""
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--patience", type=int, default=20, help="seconds to wait for a silent machine before a turn")
    parser.add_argument(
        "--real-time", action="store_true",
        help="do not wait, but run every turn ahead of all other programs, which have as long between turns (Linux, root)",
    )  # fmt: skip


def parse_turns(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Arguments of a benchmark in which engines take turns to generate, and what this parser has."""
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[1], help="sequences that are generated side by side"
    )
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7, help="timed turns of each engine in each case")
    add_machine_options(parser)
    parser.add_argument("--models", type=Path, help="folder to keep the written models in, and to find them in again")
    parser.add_argument("--prepare-only", action="store_true", help="write the models, and measure nothing")
    parser.add_argument("--output", type=Path, help="JSON file to write; those in results/ are in docs/speed.md")
    arguments = parser.parse_args()
    if arguments.rounds < 3 or arguments.new_tokens < 4:
        parser.error("A median needs at least 3 rounds, and a time per step at least 4 tokens.")
    return arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama-135m"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[64], help="tokens of the prompt, or of the source")
    parser.add_argument("--engines", nargs="+", choices=ENGINES,
                        default=[name for name in ENGINES if name not in NOT_BY_DEFAULT])  # fmt: skip
    arguments = parse_turns(parser)

    from torch_turns import prepare

    started = time.perf_counter()
    cases = [(context, batch) for context in arguments.contexts for batch in arguments.batches]
    measured = []
    for shape in arguments.shapes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (arguments.models or Path(temporary)) / shape
            if not folder.exists():
                prepare(shape, folder)
            if arguments.prepare_only:
                continue
            measured.append(measure(shape, folder, cases, arguments))
        if arguments.output:
            # After every shape, so that what was measured is there if the next one is cut short.
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            report = {
                "kind": "decoding",
                "machine": machine(arguments.threads, "torch", "transformers", "ctranslate2", "hf-variants"),
                "date": datetime.now(timezone.utc).date().isoformat(),
                "seconds": round(time.perf_counter() - started),
                "command": command("decoding.py"),
                "measured": measured,
            }
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
