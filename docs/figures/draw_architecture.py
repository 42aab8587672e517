"""Draws layer.svg (one Kraken layer on N devices) and timeline.svg (its AllReduce beside tensor parallelism's).

    python docs/figures/draw_architecture.py

Each figure has a white panel as background, so that it is legible on a dark page too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

FONT = "DejaVu Sans, Verdana, Helvetica, Arial, sans-serif"
INK, GREY, RULE, WHITE = "#1f2933", "#5c6773", "#c3cad3", "#ffffff"
ATTENTION, FFN, NORM = "#4c78a8", "#3f8f5f", "#e8ebef"
NETWORK, NETWORK_LIGHT, NETWORK_INK = "#f28e2b", "#fdebd6", "#a3560a"
IDLE = "url(#idle)"


@dataclass
class Drawing:
    """SVG elements on a white panel of `width` x `height` user units."""

    width: int
    height: int
    title: str
    elements: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> None:
        self.elements.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{stroke}"/>'
        )

    def labelled(self, x: float, y: float, width: float, height: float, fill: str, label: str, ink: str) -> None:
        self.box(x, y, width, height, fill)
        self.text(x + width / 2, y + height / 2, label, size=13, fill=ink)

    def text(
        self, x: float, y: float, text: str, size: int = 14, fill: str = INK, anchor: str = "middle", bold: bool = False
    ) -> None:
        """A line of text, vertically centred on y. The character after `_` is a subscript."""
        weight = ' font-weight="bold"' if bold else ""
        self.elements.append(
            f'<text x="{x}" y="{y + size * 0.36:.1f}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{weight}>'
            f"{with_subscripts(text, size)}</text>"
        )

    def line(self, *points: tuple[float, float], colour: str = INK, arrow: bool = True) -> None:
        path = " ".join(f"{x},{y}" for x, y in points)
        head = f' marker-end="url(#arrow-{colour[1:]})"' if arrow else ""
        self.elements.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{head}/>')

    def plus(self, x: float, y: float) -> None:
        self.elements.append(
            f'<circle cx="{x}" cy="{y}" r="11" fill="{WHITE}" stroke="{INK}" stroke-width="2"/>'
            f'<path d="M{x - 6},{y} h12 M{x},{y - 6} v12" stroke="{INK}" stroke-width="2"/>'
        )

    def save(self, path: Path) -> None:
        arrows = "".join(
            f'<marker id="arrow-{colour[1:]}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="11" markerHeight="11" '
            f'orient="auto" markerUnits="userSpaceOnUse"><path d="M0,0 L10,5 L0,10 z" fill="{colour}"/></marker>\n'
            for colour in (INK, NETWORK_INK, GREY)
        )
        idle = (
            '<pattern id="idle" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
            f'<rect width="7" height="7" fill="{WHITE}"/><path d="M0,0 v7" stroke="{RULE}" stroke-width="3"/></pattern>'
        )
        path.write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="img" font-family="{FONT}">\n<title>{escape(self.title)}</title>\n'
            f"<defs>\n{arrows}{idle}\n</defs>\n"
            f'<rect width="{self.width}" height="{self.height}" rx="12" fill="{WHITE}"/>\n'
            + "\n".join(self.elements)
            + "\n</svg>\n",
            encoding="utf-8",
        )


def with_subscripts(text: str, size: int) -> str:
    """`x_i` with a lowered, smaller i. All browsers understand `dy`, unlike `baseline-shift`."""
    svg, *parts = escape(text).replace(" ", "\u00a0").split("_")
    drop = round(size * 0.25, 1)
    for part in parts:
        rest = part[1:].lstrip("\u00a0")
        gap = round(size * 0.3 * (len(part) - 1 - len(rest)), 1)  # not all renderers draw a space behind a subscript
        svg += f'<tspan dy="{drop}" font-size="{round(size * 0.75)}">{part[0]}</tspan>'
        svg += f'<tspan dx="{gap}" dy="-{drop}">{rest}</tspan>' if rest else ""
    return svg


def draw_layer() -> Drawing:
    """One layer l > 1: x_i = x_i + a_i + FFN_i(LN2_i(a_i + s)), s the sum of all x_j."""
    drawing = Drawing(980, 676, "One Kraken layer: N sub-layers on N devices, one AllReduce beside their attention")
    drawing.text(490, 30, "One Kraken layer on N devices", size=18, bold=True)
    panels = ((40, "1"), (325, "2"), (690, "N"))
    for left, i in panels:
        drawing.box(left, 56, 250, 490, "#fafbfc", RULE)
        drawing.text(left + 125, 76, f"Device {i}: sub-layer {i}", bold=True)
    drawing.text(632, 300, ". . .", size=24, fill=GREY, bold=True)

    # The band of the AllReduce lies behind the attention of all devices, over the same time.
    drawing.box(24, 150, 932, 126, NETWORK_LIGHT, NETWORK)
    drawing.text(632, 186, "AllReduce", size=15, fill=NETWORK_INK, bold=True)
    drawing.text(632, 210, "s = x_1 + x_2 + … + x_N", size=13, fill=NETWORK_INK)
    drawing.text(632, 240, "in flight while", size=13, fill=NETWORK_INK)
    drawing.text(632, 257, "attention computes", size=13, fill=NETWORK_INK)

    for left, i in panels:
        stream, middle, network = left + 34, left + 118, left + 212
        drawing.line((stream, 108), (stream, 578))
        drawing.line((stream, 130), (network, 130), arrow=False)
        drawing.line((network, 129), (network, 180), colour=NETWORK_INK)
        drawing.line((middle, 130), (middle, 158))
        drawing.labelled(middle - 54, 160, 108, 28, NORM, f"LN1_{i}", INK)
        drawing.line((middle, 188), (middle, 202))
        drawing.labelled(middle - 54, 204, 108, 58, ATTENTION, f"Attention_{i}", WHITE)
        drawing.line((middle, 262), (middle, 358))
        drawing.line((middle, 306), (stream + 11, 306))
        drawing.line((network, 228), (network, 346), (middle + 11, 346), colour=NETWORK_INK)
        drawing.labelled(network - 20, 182, 40, 44, NETWORK, "Σ", INK)
        drawing.plus(stream, 306)
        drawing.plus(middle, 346)
        drawing.line((middle, 357), (middle, 382))
        drawing.labelled(middle - 54, 384, 108, 28, NORM, f"LN2_{i}", INK)
        drawing.line((middle, 412), (middle, 426))
        drawing.labelled(middle - 54, 428, 108, 58, FFN, f"FFN_{i}", WHITE)
        drawing.line((middle, 486), (middle, 514), (stream + 11, 514))
        drawing.plus(stream, 514)
        drawing.text(stream, 98, f"x_{i}", size=16)
        drawing.text(stream, 592, f"x_{i}", size=16)
        drawing.text(middle + 12, 290, f"a_{i}", size=15, anchor="start")
        drawing.text(network + 12, 320, "s", size=15, fill=NETWORK_INK)
        drawing.text(middle + 14, 368, f"a_{i} + s", size=13, fill=GREY, anchor="start")
    formula = "a_i = Attention_i(LN1_i(x_i))          x_i ← x_i + a_i + FFN_i(LN2_i(a_i + s))"
    drawing.text(490, 628, formula, size=16)
    drawing.text(490, 654, "s is needed only after the attention. A layer communicates nothing else.", fill=GREY)
    return drawing


def draw_timeline() -> Drawing:
    """What a device computes and communicates over layers 2 and 3. (Kraken's layer 1 needs no AllReduce.)"""
    drawing = Drawing(
        980, 400, "Time of a device: tensor parallelism waits for two AllReduces a layer, Kraken for none"
    )
    attention, ffn, reduce, start = 104, 104, 84, 140

    def lanes(top: float, title: str) -> None:
        drawing.text(30, top, title, size=15, anchor="start", bold=True)
        drawing.text(start - 14, top + 38, "computation", size=13, fill=GREY, anchor="end")
        drawing.text(start - 14, top + 84, "network", size=13, fill=GREY, anchor="end")
        for lane in (20, 66):
            drawing.line((start, top + lane + 36), (930, top + lane + 36), colour=RULE, arrow=False)

    def compute(at: float, top: float, width: float, part: str, layer: str) -> float:
        fill = ATTENTION if part == "Attention" else FFN
        drawing.labelled(at, top + 20, width - 2, 36, fill, f"{part} {layer}", WHITE)
        return at + width

    top = 34
    lanes(
        top, "Standard Transformer with tensor parallelism: two AllReduces in each layer, and the device waits for both"
    )
    at: float = start
    for layer in ("2", "3"):
        for part, width in (("Attention", attention), ("FFN", ffn)):
            at = compute(at, top, width, part, layer)
            drawing.box(at, top + 20, reduce - 2, 36, IDLE, RULE)
            drawing.text(at + reduce / 2 - 1, top + 38, "idle", size=12, fill=GREY)
            drawing.labelled(at, top + 66, reduce - 2, 36, NETWORK, "AllReduce", INK)
            at += reduce
    slow = at

    top = 186
    lanes(top, "Kraken: one AllReduce in each layer, which runs while its attention computes")
    at = start
    for layer in ("2", "3"):
        drawing.labelled(at, top + 66, reduce - 2, 36, NETWORK, "AllReduce", INK)
        for part, width in (("Attention", attention), ("FFN", ffn)):
            at = compute(at, top, width, part, layer)
    drawing.line((at, top + 16), (at, top + 128), colour=GREY, arrow=False)
    drawing.line((slow, 48), (slow, top + 128), colour=GREY, arrow=False)
    drawing.line((slow, top + 80), (at, top + 80), colour=GREY)
    drawing.text((at + slow) / 2, top + 64, "time saved", size=13, fill=GREY)
    drawing.line((start, 344), (930, 344), colour=GREY)
    drawing.text(922, 362, "time", size=13, fill=GREY, anchor="end")
    note = "Two layers from the middle of a model, on one of the devices. Schematic: lengths are not to scale."
    drawing.text(30, 380, note, size=12, fill=GREY, anchor="start")
    return drawing


if __name__ == "__main__":
    folder = Path(__file__).parent
    draw_layer().save(folder / "layer.svg")
    draw_timeline().save(folder / "timeline.svg")
