"""The native comparison as a report: does every family still agree with the transformers that is installed?

    python -m tests.drift --seeds 8

prints, as markdown, one line per type that was compared and one per causal language model of the installed
transformers that is not covered. The exit status is 1 when a type no longer agrees.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context

import torch
import transformers
from tqdm.auto import tqdm

from hf_variants.conversion import refusals, supported_model_types
from hf_variants.conversion.family import all_families, known_families
from tests.native_rows import all_rows
from tests.parity import check_row


@dataclass
class Outcome:
    """What the configs of one type gave."""

    configs: int = 0
    differing: int = 0
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.configs:
            return "not run, out of time"
        if not self.differing:
            return "agrees"
        return f"**{self.differing} of {self.configs} configs differ**: {self.failures[0]}"


def compare(model_type: str, seed: int) -> list[str]:
    """What differs in one random config; an exception counts, since a class that changed may raise one."""
    try:
        return check_row(all_rows()[model_type], seed)
    except Exception as error:
        return [f"{type(error).__name__}: {error}".splitlines()[0]]


def run(seeds: int, workers: int, minutes: float) -> dict[str, Outcome]:
    """
    Compare every type that the installed transformers has.

    Args:
        seeds: random configs per type; 0 for as many as the tests draw.
        workers: processes.
        minutes: after which no further config is started.
    """
    rows = all_rows()
    outcomes = {model_type: Outcome() for model_type in rows}
    # One seed of every type comes before the second of any, in case the time runs out.
    cases = sorted((seed, name) for name, row in rows.items() for seed in range(seeds or row.seeds))
    end = time.monotonic() + 60 * minutes
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(_timed_compare, name, seed, end): name for seed, name in cases}
        for future in tqdm(as_completed(futures), total=len(futures), unit="config", file=sys.stderr):
            failures, outcome = future.result(), outcomes[futures[future]]
            if failures is None:
                continue
            outcome.configs += 1
            outcome.differing += bool(failures)
            outcome.failures += failures
    return outcomes


def _timed_compare(model_type: str, seed: int, end: float) -> list[str] | None:
    # The clock is the machine's, so that it means the same in all processes.
    return compare(model_type, seed) if time.monotonic() < end else None


def report(outcomes: dict[str, Outcome]) -> Iterator[str]:
    """Both tables, line by line."""
    yield f"# Native comparison with transformers {transformers.__version__}, torch {torch.__version__}\n"
    yield "| type | configs | result | roundings that differ by design |\n|---|---|---|---|"
    families = all_families()
    for model_type, outcome in outcomes.items():
        reasons = "; ".join(deviation.reason for deviation in families[model_type].deviations)
        yield f"| {model_type} | {outcome.configs} | {_cell(str(outcome))} | {_cell(reasons)} |"
    for model_type in sorted(set(known_families()) - set(outcomes)):
        yield f"| {model_type} | 0 | not in this transformers | |"
    yield "\n## Causal language models of this transformers that are not covered\n"
    yield "| type | missing here |\n|---|---|"
    for model_type, mechanism in refusals.uncovered(supported_model_types()).items():
        yield f"| {model_type} | {mechanism or 'no family yet'} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.drift", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=0, help="random configs per type (default: as many as the tests)")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=600.0, help="start nothing after this time")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    outcomes = run(arguments.seeds, arguments.workers, arguments.minutes)
    print("\n".join(report(outcomes)))
    return int(any(outcome.differing for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
