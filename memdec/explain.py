"""What base, memory, neighbours and their mixture say of every token of a text (paper, Table 6).

`explain` gives the numbers; `table` puts them into the terminal and `page` into one HTML file without outside parts: the
text as a heat map, blue where the memory gives a token more than the base, orange where less.
"""

import html
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from memdec import artifacts, devices, index, knn, mixing, tokens
from memdec.config import AUTO, Compute, ExplainSettings
from memdec.datastore import Datastore
from memdec.errors import ConfigError
from memdec.modeling import MemDecForCausalLM
from memdec.windows import Window, windows

_CHARACTER = 4  # most tokens, one byte each, of one character
_DEEPEST = 3.0  # log ratio (a factor of 20) from which colours do not deepen
_DISTRIBUTIONS = ("base", "memory", "knn", "joint")
_Row = tuple[float, list[tuple[int, float]]]  # log p of the actual token; (token, p) of the most probable
_TITLES = {"base": "base", "memory": "memory", "knn": "kNN", "joint": "joint"}


# --- numbers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Guess:
    """A token that a distribution holds likely."""

    token: int
    text: str
    p: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """One distribution at one position: log-probability (nats) of the actual token, and the most probable tokens."""

    log_p: float
    top: list[Guess]

    @property
    def p(self) -> float:
        """Probability of the actual token."""
        return math.exp(self.log_p)


@dataclass(frozen=True, slots=True)
class TokenReport:
    """One token of the text and what was expected in its place; `knn` is None without a datastore."""

    position: int
    token: int
    text: str
    base: Prediction
    memory: Prediction
    joint: Prediction
    knn: Prediction | None = None

    @property
    def memory_over_base(self) -> float:
        """log(p_mem / p_base), nats."""
        return self.memory.log_p - self.base.log_p

    @property
    def gain(self) -> float:
        """log(p_joint / p_base), nats: what the mixture adds to the log-likelihood."""
        return self.joint.log_p - self.base.log_p


class Neighbours:
    """p_kNN of the positions of any text, from the keys that the datastore's own model gives them.

    Args:
        datastore: Its folders.
        index_folder: Index over its keys.
        settings: k, temperature and nprobe.
        tokenizer: The text's; must be the datastore's.
        device: Of the search; None for a GPU where there is one.

    Raises:
        ArtifactError: An index of other keys, or another tokenizer.
        ConfigError: Fewer keys than neighbours, or fewer cells than nprobe.
    """

    def __init__(
        self,
        datastore: Sequence[Path],
        index_folder: Path,
        settings: ExplainSettings,
        tokenizer: Any,
        device: torch.device | None = None,
    ) -> None:
        self.store, self.settings = Datastore(datastore), settings
        if settings.neighbours > self.store.n:
            raise ConfigError(
                f"explain: expected at most {self.store.n} neighbours (keys of {self.store.folder}), found "
                f"{settings.neighbours}; lower 'neighbours'"
            )
        where = f"{self.store.folder} with the models"
        tokens.check_same(tokens.fingerprint(tokenizer), self.store.facts["tokenizer_sha256"], where)
        self.searcher = index.load(self.store, index_folder, settings.nprobe, device)

    def rows(self, ids: Int[np.ndarray, " T"], part: Window) -> knn.SparseRows:
        """p_kNN of the scored positions of a window, which has these inputs."""
        point, skip = self.store.forward.point, part.first - part.begin
        hidden = point(torch.from_numpy(ids)[None].to(point.model.device))[0, skip:]
        keys = hidden.to(getattr(torch, self.store.settings.dtype)).float().cpu().numpy()  # rounded as the stored ones
        before = np.where(np.arange(part.first, part.end) > 0, ids[skip:], -1)  # the prefix is no token of a text
        released = not self.store.parts
        sq_dist, near = self.searcher.search(keys, self.settings.neighbours, inputs=before, released=released)
        values = torch.from_numpy(self.store.values[np.maximum(near, 0)].astype(np.int64))
        counts, found, probs = knn.aggregate(torch.from_numpy(sq_dist), values, self.settings.temperature)
        return knn.SparseRows(np.concatenate([[0], np.cumsum(counts.numpy())]), found.numpy(), probs.numpy())


@torch.inference_mode()
def explain(
    model: MemDecForCausalLM,
    tokenizer: Any,
    ids: Sequence[int],
    *,
    context: int,
    stride: int,
    top: int = 3,
    neighbours: Neighbours | None = None,
) -> list[TokenReport]:
    """Reports of all tokens of a text; each is predicted once, with the most left context (`memdec.windows`).

    Args:
        model: A mixture; p_mem of several memories is their mixture.
        tokenizer: Of the models.
        ids: The text.
        context: Tokens of a window.
        stride: Tokens scored per window.
        top: Most probable tokens to tell of each distribution.
        neighbours: For p_kNN.

    Raises:
        ConfigError: No tokens, no memory, or windows that the models cannot see.
    """
    if not len(ids) or not model.memories:
        raise ConfigError(
            f"explain: expected a text and a mixture with a memory, found {len(ids)} tokens and {len(model.memories)} memories"
        )
    if model.n_positions is not None and context > model.n_positions:
        raise ConfigError(
            f"context: expected at most {model.n_positions} (positions of the models), found {context}; lower it"
        )
    stream, prefix = np.asarray(ids, np.int64), tokens.prefix_id(tokenizer)
    weight = min(1.0, math.fsum(model.config.weights))
    spell = _speller(tokenizer)
    reports = []
    for part in windows(len(stream), context, stride):
        inputs, labels = part.inputs(stream, prefix), stream[part.first : part.end]
        log_p = model.log_probs(torch.from_numpy(inputs)[None], logits_to_keep=part.n_scored)
        base, memory = (rows[0] for rows in log_p if rows is not None)
        told = [_dense(rows, labels, top) for rows in (base, memory, mixing.mix(base, [memory], [weight]))]
        if neighbours is not None:
            told.append(_sparse(neighbours.rows(inputs, part), labels, top))
        for position, token, *rows in zip(range(part.first, part.end), labels.tolist(), *told, strict=True):
            before = tuple(stream[max(0, position - _CHARACTER) : position].tolist())
            predictions = (Prediction(own, [Guess(t, spell(before, t), p) for t, p in best]) for own, best in rows)
            reports.append(TokenReport(position, token, spell(before, token), *predictions))
    return reports


def _dense(log_p: Float[Tensor, "n V"], labels: NDArray[np.int64], top: int) -> list[_Row]:
    own = log_p.gather(1, torch.from_numpy(labels)[:, None].to(log_p.device))[:, 0].tolist()
    best = log_p.topk(min(top, log_p.shape[1]), dim=1)
    return [
        (value, list(zip(ids, probs, strict=True)))
        for value, ids, probs in zip(own, best.indices.tolist(), best.values.double().exp().tolist(), strict=True)
    ]


def _sparse(rows: knn.SparseRows, labels: NDArray[np.int64], top: int) -> list[_Row]:
    own, found = knn.probability_of(rows, labels), []
    for row, p in enumerate(own.tolist()):
        span = slice(rows.indptr[row], rows.indptr[row + 1])
        best = np.argsort(-rows.probs[span], kind="stable")[:top]
        likely = list(zip(rows.tokens[span][best].tolist(), rows.probs[span][best].tolist(), strict=True))
        found.append((math.log(p) if p else -math.inf, likely))
    return found


def _speller(tokenizer: Any) -> Callable[[tuple[int, ...], int], str]:
    """(tokens before, token) -> what the token adds to the text.

    A token that ends within a character is U+FFFD; the one that ends the character shows all of it.
    """

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    @lru_cache(maxsize=100_000)
    def spell(before: tuple[int, ...], token: int) -> str:
        known, whole = decode(before), decode([*before, token])
        same = next((i for i, (a, b) in enumerate(zip(known, whole, strict=False)) if a != b), len(known))
        text = whole[same:]
        if text.endswith("\ufffd") or (not text and whole.endswith("\ufffd")):
            return "\ufffd"
        return text or str(tokenizer.convert_ids_to_tokens(token))

    return spell


# --- in the terminal ----------------------------------------------------------------------------------------------


def summary(reports: Sequence[TokenReport]) -> dict[str, float]:
    """Perplexity per token under base, memory and joint."""
    return {
        name: math.exp(-math.fsum(getattr(report, name).log_p for report in reports) / len(reports))
        for name in ("base", "memory", "joint")
    }


def table(reports: Sequence[TokenReport]) -> Table:
    """Per token its probabilities in percent, the most probable tokens below each, and the gain in nats."""
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
    lines = [Text(percent(prediction.p), style="bold")]
    for guess in prediction.top:
        style = "bold" if guess.token == token else "dim"
        lines.append(Text(f"{percent(guess.p):>5} {visible(guess.text)}", style=style))
    return Text("\n").join(lines)


def percent(p: float) -> str:
    """Probability in percent with two decimals, as in the paper."""
    return "<0.01" if 0 < p < 5e-5 else f"{100 * p:.2f}"


def visible(text: str) -> str:
    """White space as signs, other control characters as their code."""
    text = text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


# --- as a page ----------------------------------------------------------------------------------------------------


def page(reports: Sequence[TokenReport], facts: dict[str, str]) -> str:
    """The text as one HTML file that needs nothing else.

    Args:
        reports: Of `explain`.
        facts: What to say about models and settings, by name.
    """
    data = [{**_plain(report), "m": report.memory_over_base, "g": report.gain} for report in reports]
    # Inside a script element only "<" can end or change it.
    parts = {
        "facts": "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items()),
        "tokens": "".join(_span(i, report) for i, report in enumerate(reports)),
        "data": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
        "deepest": f"{_DEEPEST:g}",
        "factor": f"{math.exp(_DEEPEST):.0f}",
    }
    template = resources.files("memdec").joinpath("explain.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _plain(report: TokenReport) -> dict[str, Any]:
    """What the page's script reads of one token."""
    told = {name: getattr(report, name) for name in _DISTRIBUTIONS}
    return {
        "text": report.text,
        "position": report.position,
        "told": {
            _TITLES[name]: {"p": each.p, "top": [asdict(guess) for guess in each.top]}
            for name, each in told.items()
            if each is not None
        },
        "token": report.token,
    }


def _span(number: int, report: TokenReport) -> str:
    """One token of the heat map; white space keeps its place and shows faintly."""
    text = html.escape(report.text)
    if not report.text.strip(" "):
        text = text.replace(" ", '<i class="s"> </i>')
    text = (
        text.replace("\r", '<i class="r"></i>')
        .replace("\n", '<i class="n"></i>\n')
        .replace("\t", '<i class="t">\t</i>')
    )
    depth = min(1.0, abs(report.memory_over_base) / _DEEPEST)
    kind = "more" if report.memory_over_base > 0 else "less"
    return f'<span class="{kind}" style="--d:{depth:.2f}" data-i="{number}">{text}</span>'


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
        ConfigError: An empty text, or a datastore without an index or the other way round.
        ModelError: The models have different tokenizers.
    """
    if bool(datastore) != (index_folder is not None):
        given, missing = ("a datastore", "index") if datastore else ("an index", "datastore")
        raise ConfigError(f"explain: expected datastore and index, found {given} alone; give --{missing}, too")
    if not text:
        raise ConfigError("explain: expected a text, found an empty one; give it as an argument or by --file")
    model = MemDecForCausalLM.from_parts(base, [memory], [alpha], dtype=devices.precision(compute))
    model.to(devices.pick(compute))
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
        artifacts.write_text(out, page(reports, facts))
        print(f"written: {out}")


def _window(model: MemDecForCausalLM, settings: ExplainSettings) -> tuple[int, int]:
    """Context and stride, with what is not set filled in."""
    context = settings.context or min(1024, model.n_positions or 1024)
    return context, settings.stride or max(1, context // 2)
