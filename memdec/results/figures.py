"""Draw figures for print in one style, as PNG and SVG; the colours suit colour-blind readers (Okabe and Ito 2008)."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

# The base is black; the others follow in this order. Each has its own marker, for print without colour.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_FAR = 6.0  # axes are logarithmic if the largest value is at least this many times the smallest
_STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "memdec",  # makes the SVG file the same every time
}


def save(figure: Figure, path: Path) -> None:
    """Write the figure as `path`.png (300 dots per inch) and `path`.svg."""
    with style.context(_STYLE):
        figure.savefig(path.with_suffix(".png"), dpi=300)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def latency(table: pd.DataFrame) -> Figure:
    """Latency and its ratio to the base against the number of generated tokens, one line per system.

    Args:
        table: Rows of `memdec.results.latency.records`; if a kind has several sizes, only the largest is drawn.
    """
    with style.context(_STYLE):
        figure = Figure(figsize=(6.3, 2.5))
        left, right = figure.subplots(1, 2)
        total = table[table["phase"] == "total"]
        scale, unit = (1000, "ms") if total["seconds"].max() < 1 else (1, "s")
        for number, name in enumerate(_shown(table)):
            rows = total[total["system"] == name]
            _line(left, rows, "n_tokens", ("seconds", "seconds_low", "seconds_high"), number, name, scale)
            _line(right, rows, "n_tokens", ("ratio_to_base", "ratio_low", "ratio_high"), number, name)
        spread = total["ratio_to_base"].max() / total["ratio_to_base"].min()
        for axes in (left, right):
            axes.set_xlabel("Generated tokens")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 4, 8, 10], integer=True))
            if _scale(axes, float(spread)):
                axes.set_xscale("log")  # so that a time proportional to the tokens is a straight line
                axes.set_xticks(sorted(set(total["n_tokens"])), sorted(set(total["n_tokens"])), minor=False)
                axes.xaxis.set_minor_locator(NullLocator())
        left.set_ylabel(f"Latency ({unit})")
        right.set_ylabel("Latency relative to base")
        handles, names = left.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=min(4, len(names)))
        return figure


def growth(table: pd.DataFrame) -> Figure:
    """Decoding time relative to the base against datastore size, at the largest number of generated tokens.

    Args:
        table: Rows of `memdec.results.latency.records`; systems without several sizes are horizontal lines.
    """
    with style.context(_STYLE):
        figure = Figure(figsize=(3.3, 2.7))
        axes = figure.subplots()
        decode = table[table["phase"] == "decode"]
        decode = decode[decode["n_tokens"] == decode["n_tokens"].max()]
        sized = kinds(table)
        for number, name in enumerate(_shown(table)):
            row = decode[decode["system"] == name].iloc[0]
            if row["kind"] in sized:
                rows = decode[decode["kind"] == row["kind"]].sort_values("size")
                _line(axes, rows, "size", ("ratio_to_base", "ratio_low", "ratio_high"), number, row["kind"])
            else:
                colour = COLOURS[number % len(COLOURS)]
                axes.axhline(float(row["ratio_to_base"]), label=name, color=colour, linestyle="--", linewidth=1)
        axes.set_xscale("log")
        axes.set_xlabel("Datastore entries")
        axes.set_ylabel("Decoding time relative to base")
        _scale(axes, float(decode["ratio_to_base"].max() / decode["ratio_to_base"].min()))
        figure.legend(loc="outside upper center", ncols=2)
        return figure


def _line(
    axes: Axes, rows: pd.DataFrame, x: str, names: tuple[str, str, str], number: int, label: str, scale: float = 1
) -> None:
    """Draw values with their intervals, in the style of system `number`."""
    value, low, high = (rows[name].to_numpy(float) * scale for name in names)
    look: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
    axes.plot(rows[x], value, label=label, **look)
    axes.errorbar(rows[x], value, yerr=[value - low, high - value], fmt="none", elinewidth=0.8, ecolor=look["color"])


def _scale(axes: Axes, spread: float) -> bool:
    """Scale the y axis: from zero, or logarithmic if the spread is large; return whether it is logarithmic."""
    if not spread >= _FAR:
        axes.set_ylim(bottom=0)
        return False
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    return True


def kinds(table: pd.DataFrame) -> list[str]:
    """Kinds with systems of several sizes."""
    sizes = table.dropna(subset=["kind", "size"]).groupby("kind")["size"].nunique()
    return [str(kind) for kind in sizes.index[sizes > 1]]


def _shown(table: pd.DataFrame) -> list[str]:
    """Systems in the order of the table; if a kind has several sizes, only the largest."""
    largest = {kind: table[table["kind"] == kind]["size"].max() for kind in kinds(table)}
    keep = [
        kind not in largest or size == largest[kind] for kind, size in zip(table["kind"], table["size"], strict=True)
    ]
    return [str(name) for name in table[keep]["system"].drop_duplicates()]
