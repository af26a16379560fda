"""The cost of configs as one HTML page with plots, which needs nothing outside itself."""

import dataclasses
from collections.abc import Sequence
from html import escape
from typing import Any

from ..charts import Series, bar_chart, line_chart
from ..drawing import INKS
from ..model.part import Call, Part
from . import Cost
from .cache import cache_bytes
from .parameters import DTYPE_BYTES, structure
from .report import sections_of
from .speed import step
from .subject import read_subject, subject_of


LENGTHS = [2**power for power in range(8, 18)]
BATCHES = [2**power for power in range(9)]


def html_page(subjects: Sequence[Any], costs: Sequence[Cost]) -> str:
    """
    The tables of `report.print_costs`, side by side, with plots: parameters by part, memory by length, the work for a byte
    by batch, and, where a device is given, its roofline.

    Args:
        subjects: what `cost` was asked about.
        costs: what it found, in the same order.

    Returns:
        an HTML document without scripts and without references to anything outside it.
    """
    models = [structure(*(read_subject(s) if isinstance(s, str) else subject_of(s))) for s in subjects]
    names = _distinct([cost.name for cost in costs])
    title = f"What {' and '.join(names)} cost{'s' if len(names) == 1 else ''}"
    text, ground, _, frame = INKS[0]
    dark_text, dark_ground, _, dark_frame = INKS[1]
    style = (
        f"body {{ font: 15px/1.5 Helvetica, Arial, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; "
        f"color: {text}; background: {ground}; }} table {{ border-collapse: collapse; margin: 0 0 1.5em; }} "
        f"td, th {{ padding: 0.2em 1em 0.2em 0; border-bottom: 1px solid {frame}; text-align: right; }} "
        "td:first-child, th:first-child { text-align: left; } svg { max-width: 100%; height: auto; } "
        f"@media (prefers-color-scheme: dark) {{ body {{ color: {dark_text}; background: {dark_ground}; }} "
        f"td, th {{ border-color: {dark_frame}; }} }}"
    )
    plots = [
        bar_chart("Parameters by part", _parts(names, costs), "parameters"),
        *_memory_by_length(names, models, costs),
        *_work(names, models, costs),
    ]
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{style}</style></head><body>',
            f"<h1>{escape(title)}</h1>",
            *(f"<figure>{plot}</figure>" for plot in plots),
            *_tables(names, costs),
            *(f"<p>{escape(name)}: {escape(line)}</p>" for name, cost in zip(names, costs) for line in cost.advice),
            "</body></html>\n",
        ]
    )


def _distinct(names: list[str]) -> list[str]:
    """Two of one name are told apart by their places."""
    return [f"{name} ({index + 1})" if names.count(name) > 1 else name for index, name in enumerate(names)]


def _parts(names: list[str], costs: Sequence[Cost]) -> dict[str, dict[str, float]]:
    return {
        name: {part.replace("_", "-"): float(count) for part, count in cost.parameters.by_part.items()}
        for name, cost in zip(names, costs)
    }


def _memory_by_length(names: list[str], models: list[Part], costs: Sequence[Cost]) -> list[str]:
    """Weights and cache of generation."""
    series = []
    for name, model, cost in zip(names, models, costs):
        settings = cost.settings
        sizes = {
            length: cache_bytes(
                model, length, batch=settings["batch"], source=settings["source"], block_size=settings["block_size"],
                value_bytes=DTYPE_BYTES[settings["dtype"]],
            )
            for length in LENGTHS
        }  # fmt: skip
        weights = cost.weights[settings["dtype"]]
        for kind, what in (("dynamic", "DynamicCache"), ("paged", "paged")):
            points = [
                (float(at), (weights + getattr(size, kind)) / 2**30) for at, size in sizes.items() if size is not None
            ]
            series.append(Series(f"{name}, {what}", points))
    if not any(each.points for each in series):
        return []
    return [
        line_chart("Weights and cache by length", series, "tokens of each sequence", "GiB", log_x=True, log_y=True)
    ]


def _work(names: list[str], models: list[Part], costs: Sequence[Cost]) -> list[str]:
    """Operations for a byte that is read, by batch; and, of a device, what is left of its peak."""
    by_batch, roofline = [], []
    for name, model, cost in zip(names, models, costs):
        settings = cost.settings
        if cost.decode is None or cost.prefill is None:
            continue
        call = Call(
            1, 1, past=settings["length"] + settings["generate"] - 1, source=settings["source"], source_is_cached=True
        )
        steps = [
            step(model, dataclasses.replace(call, batch=batch), settings["dtype"], None, None) for batch in BATCHES
        ]
        by_batch.append(Series(name, [(batch, each.intensity) for batch, each in zip(BATCHES, steps)]))
        bandwidth, peak = settings["bandwidth"], settings["flops"]
        if bandwidth and peak:
            found = {"prefill": cost.prefill.intensity, "decoding": cost.decode.intensity}
            for what, intensity in found.items():
                roofline.append(Series(f"{name}, {what}", [(intensity, min(peak, bandwidth * intensity))]))
    plots = []
    if by_batch:
        plots.append(
            line_chart(
                "Work for a byte in decoding", by_batch, "sequences", "operations per byte", log_x=True, log_y=True
            )
        )
    if roofline:
        bandwidth, peak = costs[0].settings["bandwidth"], costs[0].settings["flops"]
        ridge = peak / bandwidth
        ends = [
            min(0.1, *(each.points[0][0] for each in roofline)),
            max(10 * ridge, *(e.points[0][0] for e in roofline)),
        ]
        roof = Series("device", [(ends[0], bandwidth * ends[0]), (ridge, peak), (ends[1], peak)])
        plots.append(
            line_chart(
                "Roofline",
                [roof, *roofline],
                "operations per byte",
                "operations a second at most",
                log_x=True,
                log_y=True,
            )
        )
    return plots


def _tables(names: list[str], costs: Sequence[Cost]) -> list[str]:
    rows = [dict(sections_of(cost)) for cost in costs]
    found = []
    for title in dict.fromkeys(title for sections in rows for title in sections):
        sections = [dict(section.get(title, [])) for section in rows]
        found += [f"<h2>{escape(title)}</h2>", "<table>"]
        if len(names) > 1:
            found.append("<tr><th></th>" + "".join(f"<th>{escape(name)}</th>" for name in names) + "</tr>")
        for row in dict.fromkeys(row for section in sections for row in section):
            cells = "".join(f"<td>{escape(section.get(row, '–'))}</td>" for section in sections)
            found.append(f"<tr><td>{escape(row)}</td>{cells}</tr>")
        found.append("</table>")
    return found
