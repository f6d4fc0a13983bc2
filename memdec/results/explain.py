"""`memdec explain`: show what base, memory, kNN and mixture predict at every token of a text (paper, Table 6).

`table` shows the predictions in the terminal. `page` writes them as one HTML file without external resources. It shows
the text as a heat map: blue if the memory gives a token a higher probability than the base, orange if lower. Every token
is isolated from its neighbours, so that one written from right to left moves nothing else.
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich.console import Console
from rich.table import Table
from rich.text import Text

from memdec.artefacts import artefact, devices
from memdec.errors import ConfigError
from memdec.inference.mixture import MemDecForCausalLM
from memdec.inference.systems import SYSTEMS, Parts
from memdec.inference.token_reports import Neighbours, Prediction, TokenReport, explain
from memdec.settings import AUTO, Compute, ExplainSettings
from memdec.text import tokens

_DEEPEST = 3.0  # log ratio (a factor of 20) of the strongest colour
_DISTRIBUTIONS = ("base", "memory", "knn", "joint")
_TITLES = {"base": "base", "memory": "memory", "knn": "kNN", "joint": "joint"}


# --- in the terminal ----------------------------------------------------------------------------------------------


def summary(reports: Sequence[TokenReport]) -> dict[str, float]:
    """Perplexity per token under base, memory and joint."""
    return {
        name: math.exp(-math.fsum(getattr(report, name).log_p for report in reports) / len(reports))
        for name in ("base", "memory", "joint")
    }


def table(reports: Sequence[TokenReport]) -> Table:
    """For each token: its probabilities in percent, the most probable tokens below them, and the gain in nats."""
    names = [name for name in _DISTRIBUTIONS if getattr(reports[0], name) is not None]
    grid = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    grid.add_column("token", no_wrap=True, max_width=14)
    for name in names:
        grid.add_column(f"{_TITLES[name]} %", no_wrap=True, max_width=15, min_width=13)
    grid.add_column("gain", justify="right", no_wrap=True)
    for report in reports:
        cells = [_cell(getattr(report, name), report.token) for name in names]
        style = "bold blue" if report.memory_over_base > 0 else "bold yellow"
        grid.add_row(Text(visible(report.text), style=style), *cells, f"{report.gain:+.2f}")
    return grid


def _cell(prediction: Prediction, token: int) -> Text:
    lines = [Text(f"{percent(prediction.p):>6}", style="bold")]
    for guess in prediction.top:
        style = "bold" if guess.token == token else "dim"
        lines.append(Text(f"{percent(guess.p):>6} {visible(guess.text)}", style=style))
    return Text("\n").join(lines)


def percent(p: float) -> str:
    """Probability in percent with two decimals, as in the paper."""
    return "<0.01" if 0 < p < 5e-5 else f"{100 * p:.2f}"


def visible(text: str) -> str:
    """Replace white space by symbols and other control characters by their codes."""
    text = text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


# --- as a page ----------------------------------------------------------------------------------------------------


def page(reports: Sequence[TokenReport], facts: dict[str, str]) -> str:
    """Make one HTML page of the text, without external resources.

    Args:
        reports: Output of `explain`.
        facts: Facts about models and settings that the page shows, by name.
    """
    source = resources.files("memdec.results").joinpath("explain.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}  # unsorted: keeps the page's order
    return environment.from_string(source).render(
        facts={name: coded(value) for name, value in facts.items()},
        direction=direction("".join(report.text for report in reports)),
        tokens=[{**_plain(report), "m": report.memory_over_base, "g": report.gain} for report in reports],
        deepest=_DEEPEST,
        factor=f"{math.exp(_DEEPEST):.0f}",
    )


# Characters without a form of their own that would change how the page looks, or hide: controls except white space, those
# that turn the direction of the text, other line ends, spaces without width, and halves of surrogate pairs.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def coded(text: str) -> str:
    """Replace characters that cannot be seen by their codes; spaces, tabs and line ends are marked by the page."""
    return _UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def direction(text: str) -> str:
    """`rtl` if the first letter of a text is of a script that is written from right to left, else `ltr`."""
    kinds = (unicodedata.bidirectional(character) for character in text)
    return "rtl" if next((kind for kind in kinds if kind in ("L", "R", "AL")), "L") != "L" else "ltr"


def _plain(report: TokenReport) -> dict[str, Any]:
    """The data of one token for the script of the page."""
    told = {name: getattr(report, name) for name in _DISTRIBUTIONS}
    return {
        "text": coded(report.text),
        "position": report.position,
        "told": {
            _TITLES[name]: {"p": each.p, "top": [asdict(guess) | {"text": coded(guess.text)} for guess in each.top]}
            for name, each in told.items()
            if each is not None
        },
        "token": report.token,
    }


# --- the command --------------------------------------------------------------------------------------------------


def run(
    base: str,
    memory: str,
    text: str,
    settings: ExplainSettings,
    *,
    alpha: float,
    datastore: Sequence[Path] = (),
    index_folder: Path | None = None,
    out: Path | None = None,
    compute: Compute = AUTO,
) -> None:
    """Explain a text in the terminal and, with `out`, as a page.

    Raises:
        ConfigError: The text is empty, or only one of datastore and index is given.
        ModelError: The models have different tokenizers.
    """
    if bool(datastore) != (index_folder is not None):
        given, missing = ("a datastore", "index") if datastore else ("an index", "datastore")
        raise ConfigError(f"explain: expected datastore and index, found {given} alone; give --{missing}, too")
    if not text:
        raise ConfigError("explain: expected a text, found an empty one; give it as an argument or by --file")
    dtype, device = devices.precision(compute), str(devices.pick(compute))
    model = SYSTEMS["MemDec"].build(Parts(base=base, memory=memory, alpha=alpha, dtype=dtype, device=device))
    tokenizer = tokens.load_tokenizer(base)
    context, stride = _window(model, settings)
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    neighbours = (
        Neighbours(datastore, index_folder, settings, tokenizer, model.device) if index_folder is not None else None
    )
    reports = explain(model, tokenizer, ids, context=context, stride=stride, top=settings.top, neighbours=neighbours)
    perplexity = ", ".join(f"{name} {value:.2f}" for name, value in summary(reports).items())
    Console().print(table(reports))
    print(f"\n{len(reports)} tokens, alpha {alpha:g}; perplexity: {perplexity}; gain: ln(p_joint / p_base)")
    if out is not None:
        facts = {"Base": base, "Memory": memory, "Alpha": f"{alpha:g}", "Tokens": f"{len(reports):,}"}
        facts |= {"Perplexity": perplexity, "Window": f"{context} tokens, {stride} scored"}
        if neighbours is not None:
            facts["Datastore"] = (
                f"{neighbours.store.n:,} keys, k {settings.neighbours}, temperature {settings.temperature:g}"
            )
        artefact.write_text(out, page(reports, facts))
        print(f"written: {out}")


def _window(model: MemDecForCausalLM, settings: ExplainSettings) -> tuple[int, int]:
    """Context and stride, with defaults for unset values."""
    context = settings.context or min(1024, model.n_positions or 1024)
    return context, settings.stride or max(1, context // 2)
