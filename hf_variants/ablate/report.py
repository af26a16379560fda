"""What a plan found, for people: a card with its table, plots, and a log that is only ever added to."""

import json
import math
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from ..charts import Series, line_chart
from ..cost.report import scaled
from .data import Data
from .plan import METRICS, Arm
from .statistics import LEVEL, Comparison, Results


TEST_NAMES = {
    "paired-t": "paired t-test over seeds",
    "permutation": "exact permutation of signs over seeds",
    "wilcoxon": "Wilcoxon's signed-rank test over seeds",
}


def write(results: Results, made: list[Arm], data: Data, folder: Path, *, plots: bool = True) -> None:
    """`summary.json`, `README.md`, `plots/` and a new entry of `log.md`."""
    summary = summarise(results, made, data)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    drawn = charts(summary) if plots else {}
    for name, drawing in drawn.items():
        (folder / "plots").mkdir(exist_ok=True)
        (folder / "plots" / f"{name}.svg").write_text(drawing, encoding="utf-8")
    (folder / "README.md").write_text(card(summary, {name: f"plots/{name}.svg" for name in drawn}), encoding="utf-8")
    with (folder / "log.md").open("a", encoding="utf-8") as log:
        log.write(log_entry(summary))


def summarise(results: Results, made: list[Arm], data: Data) -> dict[str, Any]:
    """Everything that a card says, as JSON."""
    plan = results.plan
    names = [arm.name for arm in made]
    control = [each["test"]["loss"] for each in results.records if each["role"] == "control"]
    metrics = list(dict.fromkeys(each.metric for each in plan.expectations()))
    noise = results.noise_comparison()
    return {
        "title": plan.title, "claim": plan.claim, "source": plan.source, "caveat": plan.caveat,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
        "equal": plan.equal, "seeds": plan.seeds, "learning_rates": list(plan.learning_rates), "test": plan.test,
        "lengths": list(plan.lengths), "reference": plan.reference, "size": data.length,
        "batch_size": made[0].training.batch_size,
        "passes": data.passes(made[0].training.steps * made[0].training.batch_size),
        "configs": {
            arm.name: {
                "parameters": arm.parameters, "flops": arm.flops, "steps": arm.training.steps,
                "fields": plan.configs[arm.name], "intermediate_size": arm.config.intermediate_size,
                "learning_rate": results.best_rate(arm.name),
                "diverged": sum(each["diverged"] for each in results.records
                                if (each["config"], each["role"]) == (arm.name, "main")),
                "metrics": {metric: _spread(results.values(arm.name, metric)) for metric in _all(metrics, results)},
                **_curves(results, arm.name),
            }
            for arm in made
        },
        "comparisons": [_compared(each) for each in results.comparisons()],
        "noise": None if noise is None else {
            "difference": noise[0], "p": noise[1], "band": results.noise_band(),
        },
        "control": None if not control else {
            "losses": control, "blind_loss": data.blind_loss, "failed": bool(min(control) >= data.blind_loss),
        },
        "runs": len(results.records), "seconds": sum(each["seconds"] for each in results.records),
        "names": names,
    }  # fmt: skip


def _all(metrics: list[str], results: Results) -> list[str]:
    """The loss, what is compared, and losses at other lengths."""
    trained = ["loss"] if results.records[0]["steps"] else []
    return list(dict.fromkeys([*trained, *metrics, *(f"loss@{size}" for size in results.plan.lengths)]))


def _spread(values: np.ndarray) -> dict[str, Any]:
    return {
        "mean": float(values.mean()),
        "sd": float(values.std(ddof=1)),
        "values": [float(f"{v:.6g}") for v in values],
    }


def _curves(results: Results, name: str) -> dict[str, Any]:
    """Means over seeds, at the best learning rate."""
    records = results.of(name)

    def mean(rows: list) -> list[float]:
        shortest = min(map(len, rows))
        return [float(f"{value:.5g}") for value in np.mean([row[:shortest] for row in rows], axis=0)]

    found: dict[str, Any] = {
        "by_rate": [[rate, float(np.mean(results_at(results, name, rate)))] for rate in results.plan.learning_rates]
    }
    if records[0]["curve"]:
        found["curve"] = {
            "steps": [point[0] for point in records[0]["curve"]][: min(len(each["curve"]) for each in records)],
            "loss": mean([[point[1] for point in each["curve"]] for each in records]),
        }
    if records[0]["probes"]:
        count = min(len(each["probes"]) for each in records)
        found["probes"] = [
            {
                "step": records[0]["probes"][index]["step"],
                "gradients": mean([each["probes"][index]["gradients"] for each in records]),
                "max_logit": float(np.mean([each["probes"][index]["max_logit"] for each in records])),
                "log_z_squared": float(np.mean([each["probes"][index]["log_z_squared"] for each in records])),
            }
            for index in range(count)
        ]
    return found


def results_at(results: Results, name: str, rate: float) -> list[float]:
    from .statistics import value_of

    return [value_of(each, "loss") for each in results.of(name, learning_rate=rate)]


def _compared(comparison: Comparison) -> dict[str, Any]:
    found = dict(vars(comparison))
    found["expectation"] = vars(comparison.expectation)
    return {**found, "outcome": comparison.outcome}


def charts(summary: dict[str, Any]) -> dict[str, str]:
    """Name -> SVG, of what there is to draw."""
    configs = summary["configs"]
    found: dict[str, str] = {}
    if curves := [
        Series(n, list(zip(c["curve"]["steps"], c["curve"]["loss"]))) for n, c in configs.items() if "curve" in c
    ]:
        found["loss"] = line_chart("Training loss, mean over seeds", curves, "step", "loss, nats")
    if len(summary["learning_rates"]) > 1:
        series = [Series(name, config["by_rate"]) for name, config in configs.items()]
        found["sensitivity"] = line_chart(
            "Loss by learning rate", series, "learning rate", "test loss, nats", log_x=True
        )
    if summary["lengths"]:
        sizes = [summary["size"], *summary["lengths"]]
        series = [
            Series(
                name,
                [(size, config["metrics"]["loss" if size == sizes[0] else f"loss@{size}"]["mean"]) for size in sizes],
            )
            for name, config in configs.items()
        ]
        found["lengths"] = line_chart("Loss by length", series, "tokens", "test loss, nats", log_x=True)
    probed = {name: config["probes"] for name, config in configs.items() if config.get("probes")}
    if probed:
        for when, index in (("before", 0), ("after", -1)):
            if when == "after" and len(next(iter(probed.values()))) < 2:
                continue
            series = [
                Series(name, [(layer + 1, norm) for layer, norm in enumerate(probes[index]["gradients"])])
                for name, probes in probed.items()
            ]
            found[f"gradients-{when}"] = line_chart(
                f"Gradient norm by layer, {when} training", series, "layer", "norm", log_y=True
            )
        if len(next(iter(probed.values()))) > 1:
            for key, title in (("max_logit", "Largest attention logit"), ("log_z_squared", "Mean square of log Z")):
                series = [
                    Series(name, [(each["step"], each[key]) for each in probes]) for name, probes in probed.items()
                ]
                found[key.replace("_", "-")] = line_chart(title, series, "step", title.lower())
    return found


def card(summary: dict[str, Any], plots: dict[str, str], command: str = "") -> str:
    """The page, whose every number and every verdict is the summary's."""
    lines = [f"# {summary['title']}", ""]
    if summary["claim"]:
        lines += [
            f"**Claim.** {summary['claim']} ({summary['source']})" if summary["source"] else summary["claim"],
            "",
        ]
    lines += ["**Outcome.** " + " ".join(verdicts(summary)), ""]
    if summary["caveat"]:
        lines += [summary["caveat"], ""]
    lines += [*setup(summary), ""]
    if command:
        lines += ["```", command, "```", ""]
    lines += [*table(summary), "", *comparison_table(summary), ""]
    lines += [line for check in checks(summary) for line in (check, "")]
    lines += [line for name, path in plots.items() for line in (f"![{name}]({path})", "")]
    return "\n".join(lines).rstrip() + "\n"


def verdicts(summary: dict[str, Any]) -> list[str]:
    """A sentence for every comparison."""
    found = []
    for each in summary["comparisons"]:
        asked = each["expectation"]
        what = asked["metric"]
        figures = f"{_number(each['less'])} against {_number(each['than'])}, p {_p(each['corrected'])}"
        names = f"{asked['less']} and {asked['than']}"
        if each["outcome"] in ("not at this scale", "no difference shown"):
            opening = "Not at this scale" if each["outcome"] == "not at this scale" else "No difference shown"
            found.append(f"{opening}: {what} of {names} ({figures}).")
        else:
            opening = each["outcome"].split(",")[0]
            verb = {"agrees": "Agrees", "the opposite": "The opposite"}.get(opening, "Measured")
            word = "below" if each["difference"] < 0 else "above"
            little = ", by less than seeds alone do" * (opening != each["outcome"])
            found.append(f"{verb}: {what} of {asked['less']} is {word} that of {asked['than']}{little} ({figures}).")
    return found


def setup(summary: dict[str, Any]) -> list[str]:
    """How it was run, in a paragraph."""
    first = summary["configs"][summary["names"][0]]
    tokens = first["steps"] * summary["batch_size"] * summary["size"]
    equal = {
        "tokens": "equal tokens",
        "parameters": "equal parameters (by the inner width) and tokens",
        "flops": "equal operations",
    }[summary["equal"]]
    rates = ", ".join(f"{rate:g}" for rate in summary["learning_rates"])
    if not first["steps"]:
        return [
            f"Untrained models, {summary['seeds']} seeds, one batch of {summary['batch_size']} × {summary['size']} tokens. "
            f"torch {summary['versions']['torch']}, transformers {summary['versions']['transformers']}, {summary['date']}."
        ]
    took = f" in {summary['seconds'] / 60:.0f} minutes" if summary["seconds"] else ""
    passes = f", {summary['passes']:.2g} passes over the data" if summary["passes"] else ""
    return [
        f"{summary['runs']} runs{took} on {summary['machine']}: {equal}, "
        f"{summary['seeds']} seeds, which configs share (initial draw and order of batches), learning rates {rates}; "
        f"{first['steps']:,} steps of {summary['batch_size']} × {summary['size']} tokens ({tokens:,} in all{passes}). "
        f"Losses are of held-out data, in nats per token. torch {summary['versions']['torch']}, "
        f"transformers {summary['versions']['transformers']}, {summary['date']}."
    ]


def table(summary: dict[str, Any]) -> list[str]:
    """A row for every config: what it is, and its means and standard deviations over seeds."""
    configs = summary["configs"]
    metrics = list(next(iter(configs.values()))["metrics"])
    trained = any(config["steps"] for config in configs.values())
    head = [
        "config",
        "parameters",
        *(["steps", "operations", "learning rate", "diverged"] if trained else []),
        *metrics,
    ]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, config in configs.items():
        cells = [name, f"{config['parameters']:,}"]
        if trained:
            runs = summary["seeds"] * len(summary["learning_rates"])
            cells += [f"{config['steps']:,}", scaled(config["flops"]), f"{config['learning_rate']:g}"]
            cells.append(f"{config['diverged']} of {runs}")
        cells += [_with_spread(config["metrics"][metric]) for metric in metrics]
        lines.append(f"| {' | '.join(cells)} |")
    said = [
        f"*{metric}*: {METRICS[metric.split('@')[0]]}" for metric in metrics if metric != "loss" and "@" not in metric
    ]
    return [*lines, "", "Mean ± standard deviation over seeds." + (f" {'; '.join(said)}." if said else "")]


def comparison_table(summary: dict[str, Any]) -> list[str]:
    """A row for every comparison, with its p-values."""
    head = ("compared", "metric", "difference", "p", "p, corrected", "seeds alone", "outcome")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for each in summary["comparisons"]:
        asked = each["expectation"]
        noise = "–" if each["noise"] is None else f"±{_number(each['noise'])}"
        cells = (
            f"{asked['less']} − {asked['than']}", asked["metric"],
            f"{_signed(each['difference'])} ± {_number(each['spread'])}", _p(each["p"]), _p(each["corrected"]), noise,
            each["outcome"],
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        f"p: {TEST_NAMES[summary['test']]}, two-sided; corrected for the {len(summary['comparisons'])} comparisons here by "
        f"Holm's method. A difference counts where the corrected p is below {LEVEL}. *Seeds alone*: what two means of one "
        "config differ by in 95 of 100 cases, seeds not paired.",
    ]


def checks(summary: dict[str, Any]) -> list[str]:
    """What the noise floor and the control say."""
    lines = []
    if (noise := summary["noise"]) is not None:
        lines.append(
            f"Noise floor: {summary['reference']} with {summary['seeds']} other seeds differs from itself by "
            f"{_signed(noise['difference'])} (p {_p(noise['p'])})."
        )
    if (control := summary["control"]) is not None:
        least, blind = min(control["losses"]), control["blind_loss"]
        did = "fails, as it must" if control["failed"] else "**does not fail: answers leak into what the model sees**"
        lines.append(
            f"Control, {summary['reference']} trained on shuffled targets: {did}: loss {least:.3f}, and {blind:.3f} for who "
            "knows only how often each token comes."
        )
    return [" ".join(lines)] if lines else []


def log_entry(summary: dict[str, Any]) -> str:
    """For the log: the date, and every verdict, whatever it is."""
    stamp = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    lines = [f"## {stamp}: {summary['title']}", "", f"{summary['runs']} runs, {summary['seeds']} seeds.", ""]
    lines += [f"- {verdict}" for verdict in verdicts(summary)]
    lines += [f"- {line}" for line in checks(summary)]
    return "\n".join(lines) + "\n\n"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"


def _signed(value: float) -> str:
    return f"{value:+.4g}".replace("-", "−")


def _p(value: float) -> str:
    return "below 0.0001" if value < 1e-4 else f"{value:.2g}"


def _with_spread(metric: dict[str, Any]) -> str:
    return f"{_number(metric['mean'])} ± {metric['sd']:.2g}"
