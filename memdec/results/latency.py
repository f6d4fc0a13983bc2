"""Stage `latency`: prefill and decoding speed of systems that share a base, and their overhead over it (paper, Figure 4).

Systems take turns: in each, every system continues the same prompt greedily by 1 token and by each number of new
tokens, so a machine that is busy is busy for all. One new token is the prefill; what more tokens take longer is
decoding. All statistics are medians over the turns with bootstrap intervals; ratios are taken within each turn.

Output: `records.json` and `latency.csv` (one row per system, phase and number of tokens), `latency.md` (a row per
system), `seconds.json` (every single measurement) and the figures `latency` and, where several systems of one kind have
a size, `growth` (.png and .svg). Timings depend on the machine: its name is among the inputs, and on another one the
artefact is made again.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from memdec.artefacts import artefact, devices, provenance
from memdec.artefacts.markdown import table as write_markdown
from memdec.datastore.keys import Datastore
from memdec.errors import ConfigError, ModelError
from memdec.inference import speculative
from memdec.inference.mixture import MemDecForCausalLM
from memdec.inference.systems import SYSTEMS, Parts, System
from memdec.maths import statistics
from memdec.models import loading
from memdec.models.loading import model_identity
from memdec.results import figures
from memdec.settings import AUTO, Compute, KnnLMSettings, LatencySettings
from memdec.text import tokens

_MEASURED = (
    "tokens_per_s",
    "low",
    "high",
    "seconds",
    "seconds_low",
    "seconds_high",
    "ratio_to_base",
    "ratio_low",
    "ratio_high",
)


def greedy(model: Any, ids: Int[Tensor, "1 T"], n_new: int) -> Tensor:
    """Exactly `n_new` tokens by the library's own `generate`."""
    mask = torch.ones_like(ids)
    found: Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=n_new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return found


def drafted(model: Any, ids: Int[Tensor, "1 T"], n_new: int, *, n_draft: int) -> speculative.Result:
    """The same tokens by speculative decoding."""
    return speculative.generate(model, ids, max_new_tokens=n_new, n_draft=n_draft, eos_token_id=())


@dataclass(frozen=True, slots=True)
class Entry:
    """Something to measure.

    Attributes:
        make: Makes the model, with `generate` and `device`; systems may share one.
        generate: (model, prompt, number of new tokens) -> the text, greedily.
        kind: What it is a size of, for systems that differ only in that.
        size: Positions of its datastore.
    """

    make: Callable[[], Any]
    generate: Callable[[Any, Tensor, int], Tensor | speculative.Result] = greedy
    kind: str | None = None
    size: int | None = None


def identities(parts: Parts, knn: Sequence[Parts] = ()) -> dict[str, str]:
    """`inputs` of `run`: what decides the systems around one base.

    Args:
        parts: The base, its memory, and passages where In-Context RAG is measured.
        knn: The same base with datastore and index of each kNN-LM; several show how it grows with the datastore.
    """
    found = {"base": model_identity(str(parts.base)), "alpha": repr(parts.alpha)}
    for system in SYSTEMS.values():
        if system.given(parts):
            found |= system.second(parts)
    return found | {f"knn {i}": artefact.read(each.of("index"), "index").recipe for i, each in enumerate(knn)}


def systems(parts: Parts, settings: LatencySettings, knn: Sequence[Parts] = ()) -> dict[str, Entry]:
    """The base as the library runs it, and around it the systems whose parts are given; weights are loaded once.

    Args:
        parts: As for `identities`.
        settings: Of the measurement.
        knn: As for `identities`.

    Raises:
        MemDecError: Parts do not go together; nothing is loaded yet.
    """
    memdec, knn_lm, rag = SYSTEMS["MemDec"], SYSTEMS["kNN-LM"], SYSTEMS["In-Context RAG"]
    memdec.check_parts(parts)

    @cache
    def mixture() -> MemDecForCausalLM:
        made: MemDecForCausalLM = memdec.build(parts)
        return made

    def around(system: System, other: Parts) -> Any:
        return system.wrap(mixture().base, other, mixture().n_vocab)

    found = {
        "base": Entry(lambda: mixture().base),
        memdec.name: Entry(mixture),
        f"{memdec.name}, speculative": Entry(mixture, partial(drafted, n_draft=settings.n_draft)),
    }
    for each in knn:
        n = Datastore(each.datastore).n
        numbers = KnnLMSettings(neighbours=min(settings.neighbours, n), nprobe=settings.nprobe)
        own = replace(each, knn_lm=numbers)
        knn_lm.check_parts(own)
        found[f"{knn_lm.name}, {n:,} keys"] = Entry(partial(around, knn_lm, own), kind=knn_lm.name, size=n)
    if rag.given(parts):
        rag.check_parts(parts)
        found[rag.name] = Entry(partial(around, rag, parts))
    return found


def run(
    given: Mapping[str, Entry],
    out: Path,
    settings: LatencySettings,
    *,
    inputs: Mapping[str, str],
    stream: Path | None = None,
    compute: Compute = AUTO,
) -> None:
    """Measure systems and draw the figures.

    Args:
        given: By name; the first is the base that the others are compared with.
        out: Folder to make.
        settings: Lengths, repeats and so on.
        inputs: Name and identity of what the systems are made of.
        stream: Token folder; prompts are pieces of its test split. Without it their tokens are drawn by seed.
        compute: What the systems were made with.
    """
    where = {"machine": provenance.machine(), "device": devices.name(compute), "threads": str(torch.get_num_threads())}
    where["precision"] = devices.precision(compute)
    source = {} if stream is None else {"tokens": artefact.read(stream, "tokens").recipe}
    with artefact.building(out, "latency", settings, {**inputs, **source, **where}) as build:
        if build is None:
            return
        timings = measure(given, settings, stream)
        rows = [row | where for row in records(given, timings, settings)]
        artefact.write_json(out / "records.json", rows)
        artefact.write_json(out / "seconds.json", timings.plain())
        table = pd.DataFrame(rows).astype(dict.fromkeys(_MEASURED, float))
        artefact.write_text(out / "latency.csv", table.to_csv(index=False))
        artefact.write_text(out / "latency.md", markdown(table))
        figures.save(figures.latency(table), out / "latency")
        if figures.kinds(table):
            figures.save(figures.growth(table), out / "growth")
        build.facts.update(where)


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timings:
    """What was measured.

    Attributes:
        names: Systems.
        lengths: Numbers of new tokens, the first is 1.
        seconds: Of each call.
        drafts: Results of speculative decoding by (system, number of new tokens).
    """

    names: list[str]
    lengths: list[int]
    seconds: Float[np.ndarray, "systems lengths turns"]
    drafts: dict[tuple[str, int], list[speculative.Result]]

    def plain(self) -> dict[str, dict[str, list[float]]]:
        """system -> new tokens -> seconds of each turn."""
        return {
            name: {str(n): row.tolist() for n, row in zip(self.lengths, block, strict=True)}
            for name, block in zip(self.names, self.seconds, strict=True)
        }


def measure(given: Mapping[str, Entry], settings: LatencySettings, stream: Path | None = None) -> Timings:
    """Time all systems in turn.

    Raises:
        ConfigError: Prompt and new tokens are more than a model has positions.
        ModelError: A system gives another number of tokens than asked for.
    """
    made = {name: system.make() for name, system in given.items()}
    lengths = [1, *sorted(set(settings.new_tokens))]
    for name, model in made.items():
        _check_length(name, model, settings.prompt_tokens + lengths[-1] - 1)
    prompts = _prompts(next(iter(made.values())), settings, stream)
    seconds = np.zeros((len(given), len(lengths), settings.repeats))
    drafts: dict[tuple[str, int], list[speculative.Result]] = {}
    for name, system in given.items():
        for _ in range(settings.warmup):
            _timed(name, system, made[name], prompts[:1], lengths[-1])
    names = list(given)
    for turn in tqdm(range(settings.repeats), desc="latency", unit="turn", mininterval=2):
        order = np.roll(np.arange(len(names)), turn).tolist()  # nobody always comes after the same one
        for (j, n_new), i in itertools.product(enumerate(lengths), order):
            name, ids = names[i], prompts[turn : turn + 1]
            seconds[i, j, turn], found = _timed(name, given[name], made[name], ids, n_new)
            if isinstance(found, speculative.Result):
                drafts.setdefault((name, n_new), []).append(found)
    return Timings(names, lengths, seconds, drafts)


def _check_length(name: str, model: Any, needed: int) -> None:
    what = f"latency: prompts and new tokens of {name}"
    loading.check_positions(loading.n_positions(model.config), needed, what, "lower prompt_tokens or new_tokens")


def _prompts(model: Any, settings: LatencySettings, stream: Path | None) -> Int[Tensor, "turns T"]:
    """One prompt per turn: made up, or evenly spaced pieces of a test text."""
    size = settings.prompt_tokens
    if stream is None:
        generator = torch.Generator().manual_seed(settings.seed)
        n_vocab = model.config.get_text_config().vocab_size
        return torch.randint(0, n_vocab, (settings.repeats, size), generator=generator)
    values = tokens.load_stream(stream, "test")
    if len(values) < size:
        raise ConfigError(f"{stream}: expected a test split of at least {size} tokens (a prompt), found {len(values)}")
    begins = np.linspace(0, len(values) - size, settings.repeats).astype(int)
    return torch.from_numpy(np.stack([values[begin : begin + size].astype(np.int64) for begin in begins]))


def _timed(name: str, system: Entry, model: Any, ids: Tensor, n_new: int) -> tuple[float, Tensor | speculative.Result]:
    """Seconds of one call and what it gave."""
    ids = ids.to(model.device)
    _synchronise(model)
    begin = time.perf_counter()
    found = system.generate(model, ids, n_new)
    _synchronise(model)
    took = time.perf_counter() - begin
    text = found.sequences if isinstance(found, speculative.Result) else found
    if text.shape[1] != ids.shape[1] + n_new:
        raise ModelError(
            f"latency: expected {n_new} new tokens of {name}, found {text.shape[1] - ids.shape[1]}; switch off what ends "
            "its texts early"
        )
    return took, found


def _synchronise(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


# --- statistics ---------------------------------------------------------------------------------------------------


def records(given: Mapping[str, Entry], timings: Timings, settings: LatencySettings) -> list[dict[str, Any]]:
    """Rows: prefill (`n_tokens` of the prompt), and decode and total by number of generated tokens.

    `ratio_to_base` is of times (2 takes twice as long), the median of the ratios within the turns. decode leaves out
    the first new token, which comes with the prefill; where it cannot be told from no time at all, on a busy machine,
    rates and ratios are None. `tokens_per_forward` (generated tokens per forward pass of the base) and `acceptance`
    (share of the drafted tokens that were looked at and accepted) are those of speculative decoding.
    """
    first, more = timings.seconds[:, :1], timings.seconds[:, 1:]
    seconds = np.concatenate([first, more - first, more], axis=1)  # (systems, phases, turns)
    rest = timings.lengths[1:]
    phases = [("prefill", settings.prompt_tokens), *(("decode", n) for n in rest), *(("total", n) for n in rest)]
    work = np.array([n - (phase == "decode") for phase, n in phases])  # tokens in that time
    median, low, high = _median(seconds, settings)
    unclear = low <= 0
    with np.errstate(divide="ignore", invalid="ignore"):
        rates = work / np.stack([median, high, low])
        ratios = np.stack(_median(seconds / seconds[:1], settings))
    rates[:, unclear] = np.nan
    ratios[:, unclear | unclear[:1]] = np.nan
    values = np.concatenate([rates, [median, low, high], ratios])
    return [
        {
            "system": name,
            "kind": given[name].kind,
            "size": given[name].size,
            "phase": phase,
            "n_tokens": n,
            "prompt_tokens": settings.prompt_tokens,
            **{key: None if np.isnan(x) else float(x) for key, x in zip(_MEASURED, values[:, i, j], strict=True)},
            "turns": settings.repeats,
        }
        | _drafts(timings.drafts.get((name, n), []) if phase == "total" else [])
        for i, name in enumerate(timings.names)
        for j, (phase, n) in enumerate(phases)
    ]


def markdown(table: pd.DataFrame) -> str:
    """A line per system, at the largest number of new tokens: medians with their 95 % intervals."""
    last = table["n_tokens"][table["phase"] == "total"].max()
    head = [
        "System",
        "Prefill, tokens/s",
        "Decoding, tokens/s",
        "Time, ratio to base",
        "Tokens per forward",
        "Acceptance",
    ]
    lines = []
    for name, rows in table.groupby("system", sort=False):
        prefill, decode, total = (
            rows[(rows["phase"] == phase) & rows["n_tokens"].isin([n])].iloc[0]
            for phase, n in (("prefill", rows["prompt_tokens"].iloc[0]), ("decode", last), ("total", last))
        )
        cells = [(prefill, "tokens_per_s", "low", "high", ",.0f"), (decode, "tokens_per_s", "low", "high", ",.0f")]
        cells.append((total, "ratio_to_base", "ratio_low", "ratio_high", ".2f"))
        shown = [
            "–" if pd.isna(row[value]) else f"{row[value]:{form}} ({row[low]:{form}}–{row[high]:{form}})"
            for row, value, low, high, form in cells
        ]
        drafts = ["–" if pd.isna(total[key]) else f"{total[key]:.2f}" for key in ("tokens_per_forward", "acceptance")]
        lines.append([str(name), *shown, *drafts])
    turns, prompt = table["turns"].iloc[0], table["prompt_tokens"].iloc[0]
    where = f"{table['machine'].iloc[0]}, {table['device'].iloc[0]}, {table['threads'].iloc[0]} threads"
    return (
        f"{write_markdown(head, lines, 1)}\n\nOne text at a time: {prompt} tokens of prompt, {last} new ones, greedy; medians of {turns} turns and their "
        f"95 % intervals. {where}.\n"
    )


def _median(
    values: Float[np.ndarray, "systems phases turns"], settings: LatencySettings
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Median over turns and the ends of its percentile bootstrap interval, each (systems, phases)."""
    low, high = statistics.bootstrap(np.median, values, n_resamples=settings.resamples, seed=settings.seed)
    return np.median(values, axis=-1), low, high


def _drafts(results: Sequence[speculative.Result]) -> dict[str, float | None]:
    """What drafting gave, over all turns."""
    if not results:
        return {"tokens_per_forward": None, "acceptance": None}
    forwards, accepted, corrected, bonus = (
        sum(getattr(result, name) for result in results)
        for name in ("n_base_forwards", "n_accepted", "n_corrected", "n_bonus")
    )
    return {
        "tokens_per_forward": (accepted + corrected + bonus) / forwards,
        "acceptance": accepted / (accepted + corrected) if accepted + corrected else None,
    }
