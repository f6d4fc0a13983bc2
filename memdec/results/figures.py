"""Draw figures in one style, as PNG and SVG; the colours suit colour-blind readers (Okabe and Ito 2008).

Figures are at most `WIDTH` wide, so that they can be read on a phone (390 px) without scaling. Several panels stand
below each other.
"""

import textwrap
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

# The base is black; the others follow in this order. Each has its own marker, for print without colour.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BARS = (6, 2, 1)  # numbers of the colours of bars; a distribution has the same one as a line
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 4.0  # inches; an SVG has 96 px per inch
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
        figure = Figure(figsize=(WIDTH, 4.6))
        top, bottom = figure.subplots(2, 1)
        total = table[table["phase"] == "total"]
        scale, unit = (1000, "ms") if total["seconds"].max() < 1 else (1, "s")
        for number, name in enumerate(_shown(table)):
            rows = total[total["system"] == name]
            _line(top, rows, "n_tokens", ("seconds", "seconds_low", "seconds_high"), number, name, scale)
            _line(bottom, rows, "n_tokens", ("ratio_to_base", "ratio_low", "ratio_high"), number, name)
        spread = total["ratio_to_base"].max() / total["ratio_to_base"].min()
        for axes in (top, bottom):
            axes.set_xlabel("Generated tokens")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 4, 8, 10], integer=True))
            if _scale(axes, float(spread)):
                axes.set_xscale("log")  # so that a time proportional to the tokens is a straight line
                axes.set_xticks(sorted(set(total["n_tokens"])), sorted(set(total["n_tokens"])), minor=False)
                axes.xaxis.set_minor_locator(NullLocator())
        top.set_ylabel(f"Latency ({unit})")
        bottom.set_ylabel("Latency, ratio to base")
        handles, names = top.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=2)
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


def bars(table: pd.DataFrame) -> Figure:
    """Perplexity of every model in every system, with intervals: a group of bars per model, a bar per system.

    Args:
        table: Columns model, method, value, low, high, and domain.
    """
    models, methods = (list(table[name].drop_duplicates()) for name in ("model", "method"))
    with style.context(_STYLE):
        figure = Figure(figsize=(WIDTH, 0.8 + 0.17 * len(models) * (len(methods) + 0.8)))
        axes = figure.subplots()
        thick, most = 0.85 / len(methods), float(table["high"].fillna(table["value"]).max())
        for number, method in enumerate(methods):
            rows = table[table["method"] == method]
            places = [models.index(model) + (number - (len(methods) - 1) / 2) * thick for model in rows["model"]]
            values = rows["value"].to_numpy(float)
            ends = [(values - rows["low"]).fillna(0), (rows["high"] - values).fillna(0)]
            axes.barh(places, values, thick, label=method, xerr=ends, **_bar(number))
            for place, value, high in zip(places, values, rows["high"].fillna(rows["value"]), strict=True):
                axes.text(high + 0.012 * most, place, f"{value:.2f}", va="center", fontsize=7)
        _names(axes, [textwrap.fill(model, _LONGEST) for model in models])
        axes.set_xlim(0, 1.2 * most)
        axes.set_xlabel(f"Perplexity per token, {_plain(table['domain'].iloc[0])} (lower is better)")
        axes.set_ylabel("Base model")
        figure.legend(loc="outside upper center", ncols=len(methods))
        return figure


def examples(table: pd.DataFrame) -> Figure:
    """The three distributions at some positions, a panel each; the token that follows in the text is marked.

    Args:
        table: Columns example, before, next, token, and one per distribution (`DISTRIBUTIONS`).
    """
    panels, most = list(table.groupby("example", sort=True)), float(table[list(DISTRIBUTIONS)].to_numpy().max())
    tall = [0.55 + 0.36 * len(rows) for _, rows in panels]
    with style.context(_STYLE):
        figure = Figure(figsize=(WIDTH, 0.5 + sum(tall)))
        many = figure.subplots(len(panels), 1, squeeze=False, height_ratios=tall)[:, 0]
        for axes, (_, rows) in zip(many, panels, strict=True):
            labels = [_quoted(token) + (" ←" if token == rows["next"].iloc[0] else "") for token in rows["token"]]
            for number, name in enumerate(DISTRIBUTIONS):
                places = [place + (number - 1) * 0.27 for place in range(len(rows))]
                axes.barh(places, rows[name].to_numpy(float), 0.27, label=DISTRIBUTIONS[name], **_bar(number))
            _names(axes, labels)
            axes.set_xlim(0, min(1.0, 1.05 * most))
            axes.set_title(_tail(f"…{rows['before'].iloc[0]}", 58), fontsize=7, loc="right", parse_math=False)
            axes.set_ylabel("Next token")
        many[-1].set_xlabel("Probability (← the token that follows)")
        handles, names = many[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=3)
        return figure


def shapes(table: pd.DataFrame) -> Figure:
    """Shape of the three distributions by the size of the model that gives the keys, a panel per measure.

    Args:
        table: Columns model, parameters, distribution, metric, floor, value, low, high; models in the order of their size.
    """
    floor = table["floor"].iloc[0]
    models = table[["model", "parameters"]].drop_duplicates()
    names = [f"{_plain(model)}\n{_count(size)}" for model, size in models.itertuples(index=False)]
    at = {model: place for place, model in enumerate(models["model"])}
    titles = {"top1": "Highest probability", "entries": f"Tokens with p ≥ {floor:g}", "entropy": "Entropy (nats)"}
    with style.context(_STYLE):
        figure = Figure(figsize=(WIDTH, 5.6))
        for axes, (metric, title) in zip(figure.subplots(3, 1, sharex=True), titles.items(), strict=True):
            shown = table[table["metric"] == metric].assign(place=lambda rows: rows["model"].map(at))
            for number, name in enumerate(DISTRIBUTIONS):
                rows = shown[shown["distribution"] == name]
                _line(axes, rows, "place", ("value", "low", "high"), BARS[number], DISTRIBUTIONS[name])
            axes.set_ylabel(title)
            if metric == "top1":
                axes.set_ylim(0, 1)
            else:
                _scale(axes, float(shown["value"].max() / max(shown["value"].min(), 1e-9)))
        axes.set_xticks(range(len(names)), names, fontsize=7)
        axes.set_xlim(-0.4, len(names) - 0.6)
        axes.set_xlabel("Model that gives the keys, parameters")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3)
        return figure


def fidelity(table: pd.DataFrame) -> Figure:
    """How well every memory imitates p_kNN: a panel per measure, a line per memory, a mark per group of positions.

    Args:
        table: Columns memory, metric, rows, value, low, high.
    """
    memories, groups = (list(table[name].drop_duplicates()) for name in ("memory", "rows"))
    titles = {
        "match": "Top token matches",
        "kl": "KL (nats)",
        "total_variation": "Total variation",
        "pearson": "Pearson r",
    }
    with style.context(_STYLE):
        figure = Figure(figsize=(WIDTH, 1.3 + 2 * (0.55 + 0.17 * len(memories))))
        panels = figure.subplots(2, 2, sharey=True).ravel()
        for axes, (metric, title) in zip(panels, titles.items(), strict=True):
            for number, group in enumerate(groups):
                rows = table[(table["metric"] == metric) & (table["rows"] == group)].dropna(subset=["value"])
                places = [memories.index(memory) + (number - 1) * 0.22 for memory in rows["memory"]]
                value, low, high = (rows[name].to_numpy(float) for name in ("value", "low", "high"))
                look: dict[str, Any] = {"color": COLOURS[number], "marker": MARKERS[number], "linestyle": "none"}
                axes.errorbar(value, places, xerr=[value - low, high - value], label=group, elinewidth=0.8, **look)
            _names(axes, [_short(memory) for memory in memories])
            axes.set_xlabel(title)
            ends = table[table["metric"] == metric]
            least, most = min(0.0, float(ends["low"].min())), float(ends["high"].max())
            axes.set_xlim(least - 0.06 * (most - least), most + 0.06 * (most - least))
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        for axes in panels[::2]:
            axes.set_ylabel("Memory")
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=3, title="Positions by the tokens of p_kNN")
        return figure


def gains(table: pd.DataFrame) -> Figure:
    """Gain of a memory over its twin by what a study changes: a panel per axis, a line per domain and base model.

    Corpora of one text in several lengths, called NAME-LENGTH, have one line, with the one called NAME.

    Args:
        table: Rows of `memdec.results.gains.numbers`; those of the reference belong to every panel.
    """
    first, texts = table[table["axis"] == "reference"], set(table["domain"])
    panels = [axis for axis in _GAINS if (table["axis"] == axis).any()]
    with style.context(_STYLE):
        figure = Figure(figsize=(WIDTH, 0.7 + 1.9 * max(len(panels), 1)))
        several = figure.subplots(max(len(panels), 1), 1, squeeze=False)[:, 0]
        numbers: dict[str, int] = {}
        for axes, axis in zip(several, panels or ["targets"], strict=True):
            x, title = _GAINS[axis]
            shown = pd.concat([first, table[table["axis"] == axis]])
            shown = shown.assign(text=[_text_of(domain, texts) for domain in shown["domain"]])
            shown = (
                shown[shown["text"].isin(shown["text"][shown["axis"] == axis])] if axis == "training text" else shown
            )
            places = list(dict.fromkeys(shown["study"]))
            if not x:
                shown = shown.assign(place=[places.index(study) for study in shown["study"]])
                axes.set_xticks(range(len(places)), [_plain(textwrap.fill(name, 10)) for name in places])
                axes.grid(visible=False, axis="x")
            for names, rows in shown.groupby(["text", "model"], sort=False):
                label = ", ".join(_plain(_short(str(name))) for name in names)
                number = numbers.setdefault(label, len(numbers))
                ordered = rows.sort_values(x or "place", kind="stable")
                _line(axes, ordered, x or "place", ("value", "low", "high"), number, label, joined=bool(x))
            if x:
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
                axes.xaxis.set_minor_locator(NullLocator())
                axes.set_xticks(_apart(sorted(set(shown[x]))))
                axes.tick_params(axis="x", labelrotation=30)
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set_xlabel(title)
            axes.set_ylabel("Gain over CE twin (%)")
        handles = {
            label: line for axes in several for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        narrow = max(map(len, handles)) <= _LONGEST + 4
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=2 if narrow else 1)
        return figure


def _apart(values: list[float]) -> list[float]:
    """Those of ascending values whose labels do not lie on each other on a logarithmic axis."""
    room = (values[-1] / values[0]) ** _TICK
    kept = values[:1]
    for value in values[1:]:
        if value >= kept[-1] * room:
            kept.append(value)
    return kept


def _text_of(domain: str, known: set[str]) -> str:
    """NAME of a corpus NAME-LENGTH, if there is a corpus of that name."""
    name = domain.rpartition("-")[0]
    return name if name in known else domain


_TICK = 0.06  # of an axis, for a label

# For each axis of `gains`: the column on the x axis (none: the studies), and its title.
_GAINS = {
    "key model": ("key_perplexity", "Valid perplexity of the key model"),
    "training text": ("tokens", "Training text (tokens)"),
    "size of the memory": ("memory_parameters", "Parameters of the memory"),
    "targets": ("", "Targets"),
}

# Columns of the distributions of Figures 5 and 6, and their names in the legend.
DISTRIBUTIONS = {"p_kNN": "kNN", "p_LM": "LM of the keys", "p_mem": "memory"}
_LONGEST = 18  # characters of a name beside an axis


def _bar(number: int) -> dict[str, Any]:
    """Style of the bars of system `number`; none is black, so that intervals can be seen."""
    return {"color": COLOURS[BARS[number % 3]], "error_kw": {"elinewidth": 0.8, "ecolor": "black"}}


def _names(axes: Axes, names: list[str]) -> None:
    """Label the groups of a horizontal chart, the first at the top."""
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def _quoted(token: str) -> str:
    """A token as it can be seen: with its spaces, line ends and other signs."""
    shown = repr(token)[1:-1].replace(" ", "␣") if token.strip() != token or not token else token
    return _short(shown)


def _short(name: str) -> str:
    """The first characters of a long name."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def _tail(text: str, most: int) -> str:
    """The end of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"…{line[-most + 1 :]}"


def _plain(text: object) -> str:
    """Text without a meaning for matplotlib, which reads formulas between dollar signs."""
    return str(text).replace("$", r"\$")


def _count(n: float) -> str:
    """A number of parameters: 44 k, 124 M, 1.5 B."""
    size, unit = next(((size, unit) for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if n >= size), (1, ""))
    return f"{n / size:.3g} {unit}".strip()


def _line(
    axes: Axes,
    rows: pd.DataFrame,
    x: str,
    names: tuple[str, str, str],
    number: int,
    label: str,
    scale: float = 1,
    joined: bool = True,
) -> None:
    """Draw values with their intervals, in the style of system `number`."""
    value, low, high = (rows[name].to_numpy(float) * scale for name in names)
    look: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
    axes.plot(rows[x], value, label=label, linestyle="-" if joined else "none", **look)
    axes.vlines(rows[x], low, high, colors=look["color"], linewidth=0.8)


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
