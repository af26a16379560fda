"""What an architectural choice is worth: configs trained beside each other, at equal cost, over seeds."""

import gc
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .data import Data
from .plan import Arm, Plan, PlanError, arms, read_plan, read_plan_data
from .statistics import Results
from .train import Settings, train_one


RECORDS = "results.jsonl"
# The reference's seeds for the noise floor begin behind all others.
NOISE_SEEDS = 1000


@dataclass(frozen=True)
class Run:
    """
    One run of a plan.

    Attributes:
        arm: its config.
        role: `"main"`, `"noise"` (the reference with other seeds) or `"control"` (on shuffled targets).
        settings: see `train.Settings`.
    """

    arm: Arm
    role: str
    settings: Settings

    def key(self, data: Data) -> str:
        """Of everything that its result hangs on: a plan that changes keeps the runs that it did not touch."""
        config = {name: value for name, value in self.arm.config.to_dict().items() if name != "transformers_version"}
        said = [config, asdict(self.arm.training), self.role, asdict(self.settings), data.digest]
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]


def ablate(
    plan: str | Path | dict[str, Any], output: str | Path, *, progress: bool = True, plots: bool = True
) -> Results:
    """
    Run a plan, or what is left of it, and write what it found.

    Every run that ends is a line of `results.jsonl` in the folder at once. A plan that was stopped goes on from there: runs
    that ended are kept, the one that was cut off is made again.

    Args:
        plan: a .yaml, .toml or .json file, or what is in one; see `plan.Plan`.
        output: folder for `results.jsonl`, `README.md` (the card, with the table), `summary.json`, `plots/` and `log.md`.
        progress: show a bar.
        plots: draw them.

    Raises:
        PlanError: for a plan that says what cannot be done.
    """
    from .report import write

    found, folder = read_plan(plan)
    data = read_plan_data(found, folder)
    made = arms(found, data)
    results = Results(found, run(found, made, data, Path(output), progress))
    write(results, made, data, Path(output), plots=plots)
    return results


def run(plan: Plan, made: list[Arm], data: Data, output: Path, progress: bool = True) -> list[dict[str, Any]]:
    """Every run of a plan: made, or found in the folder."""
    output.mkdir(parents=True, exist_ok=True)
    kept = read_records(output / RECORDS)
    records: dict[str, dict[str, Any]] = {}
    total = len(made) * plan.seeds * len(plan.learning_rates) + plan.noise * plan.seeds + plan.control
    # The Trainer collects garbage after every run: what is there before is not gone through each time.
    gc.freeze()
    try:
        with tqdm(total=total, disable=not progress, unit="run") as bar:
            for stage in (_main_runs, _runs_of_the_reference):
                for each in stage(plan, made, records):
                    key = each.key(data)
                    bar.set_description(f"{each.arm.name}, seed {each.settings.seed}, {each.settings.learning_rate:g}")
                    if key not in kept:
                        kept[key] = {"key": key, **_described(each), **train_one(each.arm, data, each.settings)}
                        with (output / RECORDS).open("a", encoding="utf-8") as sink:
                            sink.write(json.dumps(kept[key]) + "\n")
                    # A config may have another name by now.
                    records[key] = {**kept[key], **_described(each)}
                    bar.update()
    finally:
        gc.unfreeze()
    return list(records.values())


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Runs that ended, by their keys; a last line that was cut off is none."""
    kept: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return kept
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
            kept[record["key"]] = record
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number + 1 < len(lines):
                raise PlanError(
                    f"Line {number + 1} of {path} is no run ({error}). Take it out, or choose another folder."
                ) from error
            # What follows would stand on the same line.
            path.write_text("".join(f"{kept_line}\n" for kept_line in lines[:-1]), encoding="utf-8")
    return kept


def _main_runs(plan: Plan, made: list[Arm], records: dict) -> Iterator[Run]:
    # Seeds outermost: configs take turns, so that a machine that slows down slows all.
    for seed in range(plan.seeds):
        for rate in plan.learning_rates:
            for arm in made:
                yield Run(arm, "main", Settings(seed, rate, False, plan.lengths, plan.probes))


def _runs_of_the_reference(plan: Plan, made: list[Arm], records: dict) -> Iterator[Run]:
    rate = Results(plan, list(records.values())).best_rate(plan.reference)
    for seed in range(plan.seeds if plan.noise else 0):
        yield Run(made[0], "noise", Settings(NOISE_SEEDS + seed, rate, False, plan.lengths, plan.probes))
    for seed in range(plan.control if made[0].training.steps else 0):
        yield Run(made[0], "control", Settings(seed, rate, True, plan.lengths, plan.probes))


def _described(run: Run) -> dict[str, Any]:
    return {
        "config": run.arm.name,
        "role": run.role,
        "seed": run.settings.seed,
        "learning_rate": run.settings.learning_rate,
        "steps": run.arm.training.steps,
        "parameters": run.arm.parameters,
        "flops": run.arm.flops,
    }


__all__ = ["Plan", "PlanError", "Results", "ablate"]
