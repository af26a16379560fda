"""The figures of docs/foreign.md, made of a JSON file of conversion.py: python benchmarks/conversion_page.py."""

import json
from collections.abc import Sequence
from pathlib import Path


HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "conversion.json"
PAGE = HERE.parent / "docs" / "foreign.md"
BEGIN, END = "<!-- benchmarks/conversion_page.py -->", "<!-- end -->"

# In bfloat16: Llama 3.1's 70B, and what it takes of memory is its largest tensor, of 128,256 rows of 8,192 channels.
PLAN_BYTES, PLAN_LARGEST = 141.1e9, 128_256 * 8192 * 2
WHAT = {"llama": "names change alone (Llama)", "gpt2": "matrices are transposed, one is taken apart (GPT-2)"}


def load() -> dict:
    return json.loads(RESULT.read_text())


def table(report: dict) -> str:
    lines = [
        "| tensors | what | GB | `cp -r`, s | ours, s | cp / ours | processor, s | own memory, MB | largest tensor, MB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        if row["function"] in ("convert", "export"):
            cells = [
                WHAT[row["type"]], row["function"], f"{row['bytes'] / 1e9:.1f}", f"{row['cp']:.1f}",
                f"{row['seconds']:.1f}", f"{row['ratio']:.2f}", f"{row['processor']:.1f}", f"{row['own'] / 1e6:.0f}",
                f"{row['largest'] / 1e6:.0f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def beside(rows: Sequence[dict]) -> str:
    """Other converters on the same checkpoint, in the direction in which they go."""
    lines = ["| tensors | converter | GB | s | processor, s | own memory, MB |", "|---|---|---:|---:|---:|---:|"]
    for row in rows:
        if row["function"] in ("export", "verify"):
            continue
        name = (
            "ours, convert" if row["function"] == "convert" else f"{row['function']} {row.get('release', '')}".strip()
        )
        cells = [WHAT[row["type"]], name, f"{row['bytes'] / 1e9:.1f}"]
        if "absent" in row:
            cells += [f"not run: {row['absent']}", "", ""]
        else:
            cells += [f"{row['seconds']:.1f}", f"{row['processor']:.1f}", f"{row['own'] / 1e6:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plan(rows: Sequence[dict]) -> str:
    """The time and the memory of 70B, from the throughput of the largest checkpoint of each type."""
    lines = ["| 70B in bfloat16, 141 GB | minutes | MB/s | memory, MB |", "|---|---:|---:|---:|"]
    for kind in WHAT:
        for function in ("convert", "export"):
            found = [row for row in rows if (row["type"], row["function"]) == (kind, function)]
            if not found:
                continue
            row = max(found, key=lambda row: row["bytes"])
            speed = row["bytes"] / row["seconds"]
            # A tensor that only moves is never there as a whole.
            own = row["own"] + (0 if kind == "llama" else max(PLAN_LARGEST - row["largest"], 0))
            minutes = PLAN_BYTES / speed / 60
            lines.append(f"| {function}, {WHAT[kind]} | {minutes:.0f} | {speed / 1e6:.0f} | {own / 1e6:.0f} |")
    return "\n".join(lines)


def section() -> str:
    report = load()
    where = f"{report['versions']}, {report['cores']} cores, load {report['load']:.1f}"
    how = f"shards of {report['shard_gb']:g} GB, the median of {report['repeats']} runs by turns with `cp -r`"
    return f"""{BEGIN}
### Measured, and what 70B takes

Written by `python benchmarks/conversion_page.py` from `benchmarks/results/conversion.json`, which `benchmarks/conversion.py`
wrote: {where};
{how}, each until its bytes are flushed to the disk. Python's
start-up is not in it. *Own memory* is the peak of the process's anonymous memory over that before the run.

{table(report)}

Other converters on the same files and disk, flushed as well: mergekit takes every tensor as it is (`passthrough`), LitGPT
writes its one lit_model.pth. Neither looks for NaN, hashes, or proves what it wrote.

{beside(report["rows"])}

The plan for 70B is an extrapolation of these speeds, on a disk and a processor like these; nothing of that size was run.
Source and result need 282 GB of disk together. Its memory is that measured, and for tensors that are transposed or joined
the largest of them in addition. More `--workers` help until the disk is the limit; `--max-shard-size` decides how much a
run that was killed has to do again: the files that were not whole.

{plan(report["rows"])}
{END}
"""


def page() -> str:
    """The page with this section in its place."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END + "\n")
    return before + section() + after


if __name__ == "__main__":
    PAGE.write_text(page())
