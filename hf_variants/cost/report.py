"""The cost of one or two configs as tables for people."""

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..sizes import readable
from . import Cost


Row = tuple[str, str]


def print_costs(costs: list[Cost], width: int | None = None) -> None:
    """One column for each."""
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    rows = [dict(sections_of(cost)) for cost in costs]
    for title in dict.fromkeys(title for sections in rows for title in sections):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=len(costs) > 1)
        table.add_column("")
        for cost in costs:
            table.add_column(cost.name, justify="right")
        sections = [dict(section.get(title, [])) for section in rows]
        for name in dict.fromkeys(name for section in sections for name in section):
            table.add_row(name, *(section.get(name, "–") for section in sections))
        console.print(table)
    for cost in costs:
        for sentence in cost.advice:
            console.print(f"{cost.name}: {sentence}" if len(costs) > 1 else sentence)


def sections_of(cost: Cost) -> Iterator[tuple[str, list[Row]]]:
    """Title and rows of every table."""
    settings = cost.settings
    counted = cost.parameters
    yield (
        "Parameters",
        [
            *((name.replace("_", "-"), f"{count:,}") for name, count in counted.by_part.items()),
            ("all", f"{counted.total:,}"),
            ("active for a token", f"{counted.active:,}"),
            ("trained", f"{counted.trainable:,}"),
        ],
    )
    yield "Weights", [(kind, readable(size)) for kind, size in cost.weights.items()]
    tokens = f"{settings['batch']} × {settings['length']:,} tokens"
    yield (
        f"Operations of {tokens}",
        [
            ("forward, all scores", scaled(cost.forward.dense)),
            ("forward, unmasked scores", scaled(cost.forward.masked)),
            ("backward" + (" with checkpointing" if settings["checkpointing"] else ""), scaled(cost.backward)),
            ("forward per token", scaled(cost.forward_per_token)),
        ],
    )
    if cost.cache is not None:
        end = settings["length"] + settings["generate"]
        yield (
            f"Cache of {settings['batch']} × {end:,} tokens, {settings['dtype']}",
            [
                ("theory", readable(cost.cache.theory)),
                ("DynamicCache", readable(cost.cache.dynamic)),
                ("StaticCache", readable(cost.cache.static)),
                (f"paged, blocks of {settings['block_size']}", readable(cost.cache.paged)),
                ("one more token", readable(cost.cache.per_token)),
            ],
        )
    kept = (("FlashAttention", cost.fused_activations), ("eager attention", cost.eager_activations))
    yield (
        f"Activations of {tokens}, {settings['dtype']}",
        [
            (f"{name}{suffix}", readable(size))
            for name, found in kept
            for suffix, size in (("", found.total), (", checkpointing", found.checkpointed))
        ],
    )
    yield (
        f"Training with {settings['optimizer']}, a rank's memory without activations",
        [
            (f"{f'stage {rank.stage}, ' if len(cost.memory) > 1 else ''}{what}", readable(getattr(rank, what)))
            for rank in cost.memory
            for what in ("weights", "gradients", "optimizer", "total")
        ]
        + [("whole heads on every rank", "yes")] * any(rank.gathered_heads for rank in cost.memory),
    )
    steps = (("FlashAttention", cost.fused_step), ("eager attention", cost.eager_step))
    if rows := [(f"{name}, in {found.moment}", readable(found.total)) for name, found in steps if found is not None]:
        yield f"A step of training on {tokens} at its largest, one device", rows
    for name, step in (("Prefill", cost.prefill), ("A step of decoding", cost.decode)):
        if step is not None:
            timed = [("at least", f"{step.seconds * 1e3:,.3g} ms, bound by {step.bound}")] if step.seconds else []
            yield name, [
                ("operations", scaled(step.flops)), ("bytes read", readable(step.bytes)),
                ("operations per byte", f"{step.intensity:,.3g}"), *timed,
            ]  # fmt: skip
    if cost.crossings:
        rows = [(name, f"{length:,} tokens") for name, length in cost.crossings.items()]
        yield "Decoding reads more cache than weights from", rows
    fits: list[tuple[str, Any]] = [("largest batch", cost.largest_batch), ("largest length", cost.largest_length)]
    if settings["memory"] is not None and cost.cache is not None:
        yield (
            f"Generation in {readable(int(settings['memory']))}",
            [(name, "any" if value == 2**40 else f"{value:,}") for name, value in fits],
        )
    path = "unbounded: windows do not reach" if cost.path_length is None else f"{cost.path_length}"
    yield (
        f"One layer over {settings['length']:,} tokens",
        [
            *(
                (
                    f"{kind.name}: {kind.complexity}",
                    f"{scaled(kind.operations)}, {kind.sequential:,} steps, path {kind.path:,}",
                )
                for kind in cost.layers
            ),
            ("path through this stack", path),
        ],
    )


def scaled(number: float) -> str:
    """1.5 T; 12.0 G."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number:,.0f}"
