"""The drawing of a variant: one block and what stands around it, as an SVG made from the config."""

from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from .diagram import Box, Branch, Layer, Stack, stacks_of


# Sizes in pixels. Letters are counted as wider than most fonts draw them, since a viewer's font is not known.
LINE = 16
LETTER, BOLD_LETTER = 7.1, 7.9
ARROW = 20
MARGIN = 20
# From a block's widest box, or the line of the residual, to the frame.
FRAME = 18
BETWEEN = 28
# Where every layer is another, as in OpenELM, the config lists them better.
MAX_NOTES = 6

# kind of box -> (fill, outline), on a light and on a dark ground
COLOURS = {
    "embedding": (("#dbeafe", "#2563eb"), ("#172a4d", "#6ea8fe")),
    "added": (("#dbeafe", "#2563eb"), ("#172a4d", "#6ea8fe")),
    "norm": (("#fef3c7", "#b45309"), ("#40300a", "#e3b341")),
    "attention": (("#ffe4d6", "#c2410c"), ("#47210f", "#f59e6c")),
    "feed_forward": (("#d9f2df", "#15803d"), ("#12351d", "#57c278")),
    "projection": (("#eceef1", "#57606a"), ("#2a3038", "#9aa4af")),
    "scale": (("#eceef1", "#57606a"), ("#2a3038", "#9aa4af")),
    "head": (("#eadcfb", "#7e22ce"), ("#33204d", "#b98af5")),
}
STYLE = """
text { font: 12px Helvetica, Arial, "Liberation Sans", "DejaVu Sans", sans-serif; text-anchor: middle; }
.name { font-weight: bold; }
.note { text-anchor: start; }
.frame, .line { fill: none; stroke-width: 1.3; }
.frame { stroke-dasharray: 5 4; }
"""
# (text, ground, lines, frame), on a light and on a dark ground
INKS = (("#1f2328", "#ffffff", "#424a53", "#8b949e"), ("#e6edf3", "#0d1117", "#afb8c1", "#6e7681"))


def block_svg(config: Any, class_name: str | None = None) -> str:
    """
    One block of a variant, with its norms, residuals and multipliers, between the embeddings and the head.

    It has a ground of its own and follows the viewer's preference for light or dark.

    Args:
        config: a `VariantConfig` or `VariantSeq2SeqConfig`; of an encoder-decoder both stacks are drawn.
        class_name: of the model, whose head is drawn; by default the language-modelling head.

    Returns:
        an SVG document without references to anything outside it.
    """
    stacks = stacks_of(config, class_name)
    canvas = _Canvas()
    if len(stacks) == 1:
        _Column(canvas, stacks[0], centre=0, residual_side=-1).draw()
    else:
        encoder = _Column(canvas, stacks[0], centre=0, residual_side=-1)
        encoder.draw()
        right = canvas.bounds[2] + MARGIN
        decoder = _Column(canvas, stacks[1], centre=0, residual_side=1)
        decoder.centre = right + 2 * MARGIN + decoder.frame_extent(-1)
        decoder.draw()
        _lead_over(canvas, encoder, decoder, right)
    notes = [
        f"{stack.name.capitalize()}: {sentence[0].lower()}{sentence[1:]}" if stack.name else sentence
        for stack in stacks
        for sentence in stack.exceptions
    ]
    if len(notes) > MAX_NOTES:
        notes = [*notes[: MAX_NOTES - 1], f"{len(notes) - MAX_NOTES + 1} more kinds of layers."]
    return canvas.to_svg(_title(stacks), notes)


@dataclass
class _Canvas:
    """Shapes at x to the right and y upwards, and the rectangle that holds them."""

    shapes: list[tuple] = field(default_factory=list)
    bounds: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])

    def cover(self, left: float, bottom: float, right: float, top: float) -> None:
        low_x, low_y, high_x, high_y = self.bounds
        self.bounds = [min(low_x, left), min(low_y, bottom), max(high_x, right), max(high_y, top)]

    def box(self, box: Box, centre: float, bottom: float) -> float:
        """Draw a box and return its top."""
        width, height = size_of(box)
        self.shapes.append(("box", box, centre - width / 2, bottom + height, width, height))
        self.cover(centre - width / 2, bottom, centre + width / 2, bottom + height)
        return bottom + height

    def line(self, *points: tuple[float, float], arrow: bool = False) -> None:
        self.shapes.append(("line", points, arrow))
        self.cover(
            min(x for x, _ in points), min(y for _, y in points), max(x for x, _ in points), max(y for _, y in points)
        )

    def dot(self, x: float, y: float) -> None:
        self.shapes.append(("dot", x, y))

    def plus(self, x: float, y: float) -> None:
        self.shapes.append(("plus", x, y))

    def text(self, x: float, y: float, text: str, css: str = "", on_ground: bool = False) -> None:
        """A line of text whose middle is at x, y; `on_ground` hides what it lies on."""
        width = width_of(text, css == "name")
        self.shapes.append(("text", x, y, text, css, width if on_ground else 0))
        self.cover(x - width / 2, y - LINE / 2, x + width / 2, y + LINE / 2)

    def frame(self, left: float, bottom: float, right: float, top: float) -> None:
        self.shapes.append(("frame", left, bottom, right, top))
        self.cover(left, bottom, right, top)

    def to_svg(self, title: str, notes: list[str]) -> str:
        left, bottom, right, top = self.bounds
        width = max(right - left, 320) + 2 * MARGIN
        offset = (width - (right - left)) / 2 - left
        lines = [line for note in notes for line in _wrapped(note, width - 2 * MARGIN)]
        height = top - bottom + 2 * MARGIN + (LINE * len(lines) + MARGIN / 2 if lines else 0)
        drawn = [self._shape(shape, offset, top + MARGIN) for shape in self.shapes]
        first = top - bottom + 2 * MARGIN + LINE / 2
        drawn += [
            f'<text class="note" x="{MARGIN}" y="{first + LINE * index:g}">{escape(line)}</text>'
            for index, line in enumerate(lines)
        ]
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
                f'viewBox="0 0 {width:g} {height:g}" role="img">',
                f"<title>{escape(title)}</title>",
                f"<style>{STYLE}{_colours(0)}",
                f"@media (prefers-color-scheme: dark) {{\n{_colours(1)}\n}}</style>",
                '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
                'orient="auto"><path class="tip" d="M0 0 L8 4 L0 8 Z"/></marker></defs>',
                f'<rect class="ground" width="{width:g}" height="{height:g}" rx="8"/>',
                *drawn,
                "</svg>\n",
            ]
        )

    @staticmethod
    def _shape(shape: tuple, dx: float, top: float) -> str:
        kind, *values = shape
        if kind == "box":
            box, x, y, width, height = values
            x, y = x + dx, top - y
            texts = [
                f'<text x="{x + width / 2:g}" y="{y + 18 + LINE * index:g}"{css}>{escape(line)}</text>'
                for index, (line, css) in enumerate(zip(box.lines, (' class="name"', *[""] * len(box.lines))))
            ]
            return (
                f'<g data-path={quoteattr(box.path)}><rect class={quoteattr(box.kind)} x="{x:g}" y="{y:g}" '
                f'width="{width:g}" height="{height:g}" rx="6"/>{"".join(texts)}</g>'
            )
        if kind == "line":
            points, arrow = values
            path = " L".join(f"{x + dx:g} {top - y:g}" for x, y in points)
            tip = ' marker-end="url(#tip)"' if arrow else ""
            return f'<path class="line" d="M{path}"{tip}/>'
        if kind == "dot":
            x, y = values
            return f'<circle class="dot" cx="{x + dx:g}" cy="{top - y:g}" r="2.6"/>'
        if kind == "plus":
            x, y = values[0] + dx, top - values[1]
            cross = f"M{x - 4:g} {y:g} h8 M{x:g} {y - 4:g} v8"
            return f'<circle class="sum" cx="{x:g}" cy="{y:g}" r="8"/><path class="line" d="{cross}"/>'
        if kind == "text":
            x, y, text, css, ground = values
            x, y = x + dx, top - y
            hidden = (
                f'<rect class="ground" x="{x - ground / 2 - 2:g}" y="{y - LINE / 2:g}" width="{ground + 4:g}" '
                f'height="{LINE}"/>'
                if ground
                else ""
            )
            css = f" class={quoteattr(css)}" if css else ""
            return f'{hidden}<text x="{x:g}" y="{y + 4:g}"{css}>{escape(text)}</text>'
        left, low, right, high = values
        return (
            f'<rect class="frame" x="{left + dx:g}" y="{top - high:g}" width="{right - left:g}" '
            f'height="{high - low:g}" rx="10"/>'
        )


def width_of(text: str, bold: bool = False) -> float:
    return len(text) * (BOLD_LETTER if bold else LETTER)


def size_of(box: Box) -> tuple[float, float]:
    """Width and height of a box around its lines, the first of which is bold."""
    widths = [width_of(line, bold=not index) for index, line in enumerate(box.lines)]
    least = 60 if box.kind == "scale" else 150
    return max(least, *widths) + 20, LINE * len(box.lines) + 12


def _widest(boxes: list[Box | None]) -> float:
    return max((size_of(box)[0] for box in boxes if box is not None), default=0.0)


def _boxes_of(branch: Branch) -> list[Box | None]:
    return [branch.pre_norm, branch.sublayer, branch.branch_norm, branch.scale, branch.post_norm]


@dataclass
class _Column:
    """
    A stack from the token ids up.

    Args:
        canvas: to draw on.
        stack: what to draw.
        centre: x of the line that everything hangs on.
        residual_side: -1 for residuals, and for what is added to the embeddings, on the left, 1 on the right.
    """

    canvas: _Canvas
    stack: Stack
    centre: float
    residual_side: int
    # Where the line ends.
    end: float = 0.0
    # The left edge, and the middle, of the cross-attention.
    cross: tuple[float, float] | None = None

    def half_width(self) -> float:
        """Half the width of the block's boxes; parallel branches stand side by side."""
        widths = [_widest(_boxes_of(branch)) for branch in self.stack.usual.branches]
        if self.stack.usual.parallel:
            return (sum(widths) + BETWEEN * (len(widths) - 1)) / 2
        return max(widths) / 2

    def residual_room(self) -> float:
        """From the boxes to the line of the residual, on which its multiplier stands."""
        scales = [branch.residual_scale for branch in self.stack.usual.branches if branch.residual_scale]
        return max((width_of(scale) / 2 + 6 for scale in scales), default=FRAME)

    def frame_extent(self, side: int) -> float:
        """From the centre to the frame, on the left (-1) or the right."""
        room = 2 * self.residual_room() if side == self.residual_side else FRAME
        return self.half_width() + room

    def draw(self) -> None:
        self.canvas.text(self.centre, 0, "token ids")
        y = room = LINE / 2
        for box in self.stack.below:
            if box.kind == "added":
                # Boxes at the side are higher than the sums on the line.
                y, room = self._added(box, y, room)
            else:
                y = room = self._next(box, self.centre, y)
        low = max(y + ARROW / 2, room + 8)
        self.canvas.line((self.centre, y), (self.centre, low))
        y = self._layer(self.stack.usual, low)
        high = y + ARROW / 2
        left, right = (self.centre + side * self.frame_extent(side) for side in (-1, 1))
        self.canvas.frame(left, low, right, high)
        label = f"{self.stack.name.capitalize()} × {len(self.stack.layers)}".strip()
        self.canvas.text(
            (left if self.residual_side < 0 else right) - self.residual_side * (width_of(label, True) / 2 + 12),
            high, label, "name", on_ground=True,
        )  # fmt: skip
        self.canvas.line((self.centre, y), (self.centre, high))
        y = high
        for box in self.stack.above:
            y = self._next(box, self.centre, y)
        self.end = y
        if self.stack.output:
            self.canvas.line((self.centre, y), (self.centre, y + ARROW), arrow=True)
            self.canvas.text(self.centre, y + ARROW + LINE / 2 + 2, self.stack.output)

    def _next(self, box: Box, x: float, y: float) -> float:
        """An arrow and the box that it points to."""
        self.canvas.line((x, y), (x, y + ARROW), arrow=True)
        return self.canvas.box(box, x, y + ARROW)

    def _added(self, box: Box, y: float, room: float) -> tuple[float, float]:
        """A box at the side, above the one that ends at `room`, added to the line: the tops of the sum and of the box."""
        width, height = size_of(box)
        middle = max(y + ARROW + 8, room + 8 + height / 2)
        x = self.centre + self.residual_side * (width / 2 + 34)
        self.canvas.box(box, x, middle - height / 2)
        self.canvas.line((self.centre, y), (self.centre, middle - 8), arrow=True)
        self.canvas.line(
            (x - self.residual_side * width / 2, middle), (self.centre + self.residual_side * 8, middle), arrow=True
        )
        self.canvas.plus(self.centre, middle)
        return middle + 8, middle + height / 2

    def _layer(self, layer: Layer, y: float) -> float:
        if layer.parallel:
            return self._side_by_side(layer, y)
        for branch in layer.branches:
            y = self._one_after_the_other(layer, branch, y)
        return y

    def _one_after_the_other(self, layer: Layer, branch: Branch, y: float) -> float:
        x = self.centre
        start = y
        if layer.residual_from_norm and branch.pre_norm is not None:
            y = start = self._next(branch.pre_norm, x, y)
        start += ARROW / 2
        self.canvas.dot(x, start)
        self.canvas.line((x, y), (x, start))
        y = start
        if branch.pre_norm is not None and not layer.residual_from_norm:
            y = self._next(branch.pre_norm, x, y)
        y = self._sublayer(branch, x, y)
        for box in (branch.branch_norm, branch.scale):
            y = y if box is None else self._next(box, x, y)
        y = self._residual(branch.residual_scale, start, y)
        return y if branch.post_norm is None else self._next(branch.post_norm, x, y)

    def _sublayer(self, branch: Branch, x: float, y: float) -> float:
        top = self._next(branch.sublayer, x, y)
        if branch.name == "cross_attn":
            self.cross = (x - size_of(branch.sublayer)[0] / 2, (y + ARROW + top) / 2)
        return top

    def _residual(self, scale: str | None, start: float, y: float) -> float:
        """The line from `start` around what lies between, and the sum above y."""
        x, aside = self.centre, self.centre + self.residual_side * (self.half_width() + self.residual_room())
        middle = y + ARROW + 8
        self.canvas.line((x, y), (x, middle - 8), arrow=True)
        self.canvas.line((x, start), (aside, start), (aside, middle), (x + self.residual_side * 8, middle), arrow=True)
        if scale is not None:
            self.canvas.text(aside, (start + middle) / 2, scale, on_ground=True)
        self.canvas.plus(x, middle)
        return middle + 8

    def _side_by_side(self, layer: Layer, y: float) -> float:
        x = self.centre
        start = y + ARROW / 2
        self.canvas.line((x, y), (x, start))
        self.canvas.dot(x, start)
        y = start
        # Cross-attention first, where the encoder's states come in.
        branches = sorted(layer.branches, key=lambda branch: branch.name != "cross_attn")
        widths = [_widest(_boxes_of(branch)) for branch in branches]
        shared = next((branch.pre_norm for branch in branches if branch.name == "self_attn"), None)
        if layer.shared_norm and shared is not None:
            y = self._next(shared, x, y)
        fork = y + ARROW / 2
        self.canvas.line((x, y), (x, fork))
        left = x - self.half_width()
        centres, tops = [], []
        for width in widths:
            centres.append(left + width / 2)
            left += width + BETWEEN
        self.canvas.line((centres[0], fork), (centres[-1], fork))
        for branch, centre in zip(branches, centres):
            y = fork
            if branch.pre_norm is not None and not layer.shared_norm:
                y = self._next(branch.pre_norm, centre, y)
            y = self._sublayer(branch, centre, y)
            for box in (branch.branch_norm, branch.scale):
                y = y if box is None else self._next(box, centre, y)
            tops.append(y)
        middle = max(tops) + ARROW
        for centre, top in zip(centres, tops):
            if abs(centre - x) < 1:
                self.canvas.line((x, top), (x, middle - 8), arrow=True)
            else:
                side = 8 if centre > x else -8
                self.canvas.line((centre, top), (centre, middle), (x + side, middle), arrow=True)
        self.canvas.plus(x, middle)
        return self._residual(layer.branches[0].residual_scale, start, middle + 8)


def _lead_over(canvas: _Canvas, encoder: _Column, decoder: _Column, right: float) -> None:
    """The encoder's states, from its end to the decoder's cross-attention."""
    if decoder.cross is None:
        return
    edge, middle = decoder.cross
    turn = encoder.end + ARROW
    canvas.line(
        (encoder.centre, encoder.end), (encoder.centre, turn), (right, turn), (right, middle), (edge, middle), arrow=True
    )  # fmt: skip


def _title(stacks: list[Stack]) -> str:
    sizes = ", ".join(f"{stack.name or 'stack'} of {len(stack.layers)} layers" for stack in stacks)
    return f"One block of a Transformer: {sizes}"


def _colours(mode: int) -> str:
    """The style rules that differ between a light ground (0) and a dark one (1)."""
    text, ground, line, frame = INKS[mode]
    rules = [
        f"text {{ fill: {text}; }}",
        f".tip, .dot {{ fill: {line}; }}",
        f".line, .sum {{ stroke: {line}; }}",
        f".ground, .sum {{ fill: {ground}; }}",
        f".frame {{ stroke: {frame}; }}",
        *(f".{kind} {{ fill: {pair[mode][0]}; stroke: {pair[mode][1]}; }}" for kind, pair in COLOURS.items()),
    ]
    return "\n".join(rules)


def _wrapped(text: str, width: float) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and width_of(f"{lines[-1]} {word}") > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
