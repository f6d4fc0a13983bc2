"""Draw the charts of the report as SVG that is part of the page and follows its colour scheme.

matplotlib draws them in the style of `figures`; `adaptive` turns black into the colour of the text, and the other
colours into CSS variables (`--c1`, `--c2`, ...) that the page sets for light and dark. `adaptive` also takes the figures
of other stages. Names stay text, so that they can be found and read aloud. Nothing in a chart can run or load anything.
"""

import re
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any
from xml.etree import ElementTree

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from memdec.errors import ArtifactError, on_one_line, reason
from memdec.results.figures import COLOURS, MARKERS

SIGNS = ("●", "■", "▲", "◆", "▼", "✚", "✖")  # `figures.MARKERS` as characters, for the legends in the page
PER_CHART = len(COLOURS)  # most lines in a chart: each has its own colour and marker
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"
_NARROW = 450  # CSS pixels; what is not wider is made to fit a phone, the rest is moved sideways
_FAR = 6.0  # a y axis is logarithmic if the largest value is at least this many times the smallest
_KEPT = {  # elements of shapes and text
    *("svg", "g", "path", "use", "defs", "clipPath", "pattern", "rect", "text", "tspan"),
    *("circle", "ellipse", "line", "polyline", "polygon", "title", "desc"),
}
_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "memdec",  # makes the file the same every time
    "text.parse_math": False,  # a $ in a name is a $
}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart.

    Attributes:
        label: Its name in the legend.
        x: Positions.
        y: Values.
        look: Number of its colour and marker.
        dashed: Draw it dashed and without markers.
        chosen: Position to mark with a ring.
        seed: Which of several lines of one name it is.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    look: int
    dashed: bool = False
    chosen: float | None = None
    seed: str = ""


@dataclass(frozen=True, slots=True)
class Dot:
    """One value with its interval; `row` is its place on the axis of names."""

    row: str
    label: str
    value: float
    low: float | None
    high: float | None
    look: int


def lines(found: Sequence[Line], x: str, y: str, name: str) -> str:
    """Lines over a numeric axis; `x` and `y` are the titles of the axes, `name` is unique in the page."""
    with style.context(_STYLE):
        figure = Figure(figsize=(3.6, 2.5))
        axes = figure.subplots()
        for line in found:
            look = _look(line.look)
            shape: dict[str, Any] = {"linestyle": "--", "linewidth": 1} if line.dashed else {"marker": look["marker"]}
            axes.plot(line.x, line.y, color=look["color"], **shape)
            if line.chosen is not None and line.chosen in line.x:
                place = list(line.x).index(line.chosen)
                ring: dict[str, Any] = {"marker": "o", "markersize": 10, "fillstyle": "none"}
                axes.plot([line.chosen], [line.y[place]], color=look["color"], **ring)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 4, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _scale(axes, [value for line in found for value in line.y])
        return _drawn(figure, name)


def dots(found: Sequence[Dot], x: str, name: str) -> str:
    """Values with intervals, a row for each name, so that systems of one model stand beside each other."""
    rows = list(dict.fromkeys(dot.row for dot in found))
    with style.context(_STYLE):
        figure = Figure(figsize=(3.7, 0.7 + 0.15 * len(rows) + 0.11 * len(found)))
        axes = figure.subplots()
        per_row = {row: [dot for dot in found if dot.row == row] for row in rows}
        for number, row in enumerate(rows):
            for place, dot in enumerate(per_row[row]):
                look = _look(dot.look)
                y = number + 0.7 * ((place + 0.5) / len(per_row[row]) - 0.5)
                axes.hlines(y, dot.low or dot.value, dot.high or dot.value, colors=look["color"], linewidth=1.4)
                axes.plot([dot.value], [y], look["marker"], color=look["color"], markersize=6)
        axes.set_yticks(range(len(rows)), [textwrap.fill(row, 18) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        for edge in range(len(rows) - 1):
            axes.axhline(edge + 0.5, color="#e4e4e4", linewidth=0.7)
        axes.set_xlabel(x)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        return _drawn(figure, name)


def _look(number: int) -> dict[str, str]:
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Make the y axis logarithmic if the values are far apart; ticks are plain numbers either way."""
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    if min(values) > 0 and max(values) >= _FAR * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _drawn(figure: Figure, name: str) -> str:
    text = StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the browser has other fonts
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    return adaptive(text.getvalue(), name, name)


# --- SVG ------------------------------------------------------------------------------------------------------------


def adaptive(svg: str, name: str, where: object) -> str:
    """SVG to be put into a page: no scripts, links, styles or ids of its own; colours of the page.

    Args:
        svg: The text of an SVG file, as matplotlib writes it.
        name: Put before ids, which have to be unique in the page.
        where: File that it is from, for messages.

    Raises:
        ArtifactError: The text is no SVG.
    """
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise ArtifactError(f"{where}: expected SVG, found: {reason(error)}; delete it and make it again") from None
    if root.tag != f"{{{_SVG}}}svg":
        raise ArtifactError(f"{where}: expected SVG, found <{root.tag}>; delete it and make it again")
    _keep(root)
    used = set(re.findall(r"(?:url\(#|href=\")#?([^)\"]+)", ElementTree.tostring(root, encoding="unicode")))
    for each in root.iter():
        _clean(each, name, used)
    width = _points(root)
    root.attrib = {
        key: value for key, value in root.attrib.items() if key == "viewBox"
    }  # the page gives it its size and its name
    root.attrib |= {
        "class": "chart" if width > _NARROW else "chart narrow",
        "aria-hidden": "true",
        "focusable": "false",
    }
    root.attrib |= {"style": f"width:{width:.0f}px", "stroke-linejoin": "round", "stroke-linecap": "butt"}
    text = ElementTree.tostring(root, encoding="unicode")
    text = re.sub(r"<(/?)(?:\w+:)?(?=[a-zA-Z])", r"<\1", text)  # HTML knows these names without a namespace
    text = re.sub(r' xmlns(?::\w+)?="[^"]*"', "", text)
    return re.sub(r"\b([1-9]\d*\.\d\d)\d+", r"\1", text)  # hundredths of a point; not the small factors of scale()


def _keep(parent: ElementTree.Element) -> None:
    for child in list(parent):
        known = isinstance(child.tag, str) and child.tag.removeprefix(f"{{{_SVG}}}") in _KEPT
        if known and child.tag.startswith("{"):
            _keep(child)
        else:
            parent.remove(child)


def _clean(element: ElementTree.Element, name: str, used: set[str]) -> None:
    """Keep the attributes of shapes and text; text is on one line and has no characters that cannot be seen."""
    element.text, element.tail, kept = on_one_line(element.text or ""), "", {}
    for key, value in element.attrib.items():
        if key in (_XLINK, "href"):
            if value.startswith("#"):
                kept["href"] = f"#{name}-{value[1:]}"
        elif key == "id":
            if value in used:
                kept[key] = f"{name}-{value}"
        elif not key.startswith(("on", "{")) and key not in ("class", "gid"):
            value = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", value)
            kept[key] = _styled(value) if key == "style" else _coloured(value)
    element.attrib = kept


def _styled(text: str) -> str:
    """A style attribute with the colours and the font of the page."""
    text = re.sub(r"font: (?:[\w ]*? )?([\d.]+)px [^;]*", r"font-size: \1px", text)
    text = re.sub(r"font-family: [^;]*;?", "", text)
    if re.search(r"url\((?!#)", text):  # an address outside of the page
        return ""
    return re.sub(r"#[0-9a-fA-F]{6}\b", lambda match: _coloured(match[0]), text)


def _coloured(value: str) -> str:
    """A colour of `figures` as one of the page: dark greys are its ink, light ones its grid."""
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        return value
    known = [colour.lower() for colour in COLOURS]
    if value.lower() in known[1:]:
        return f"var(--c{known.index(value.lower())})"
    red, green, blue = (int(value[at : at + 2], 16) for at in (1, 3, 5))
    if max(red, green, blue) - min(red, green, blue) > 24:
        return value
    return "currentColor" if red < 0x99 else "var(--paper)" if red > 0xF8 else "var(--grid)"


def _points(root: ElementTree.Element) -> float:
    """Width in CSS pixels, from the size in points that matplotlib writes."""
    match = re.fullmatch(r"([\d.]+)pt", root.get("width", ""))
    return float(match[1]) * 96 / 72 if match else 480.0
