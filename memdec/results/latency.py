"""Stage `latency`: measure prefill and decoding speed of systems around one base, and their overhead (paper, Figure 4).

Systems are timed in turn, so that background load affects all equally. In each turn every system continues the same
prompt greedily, by 1 token and by each number of new tokens. Prefill = time to generate one token; decode = total -
prefill. Times are medians over the turns, and a ratio is one median divided by another. Their bootstrap intervals draw
turns, each with the times of all systems. What else the machine did during the measurement is recorded and shown.

Output: `records.json` and `latency.csv` (one row per system, phase and number of tokens), `latency.md` (one row per
system), `seconds.json` (every measurement) and the figure `latency`. If systems of one kind differ in size, there is
also the figure `growth`. Figures are .png and .svg. Timings depend on the machine, so its name is one of the inputs and
the artefact is made again on another machine.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
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
_BUSY = 0.1  # share of the processors that others may use before the table says that it should be measured again


def greedy(model: Any, ids: Int[Tensor, "1 T"], n_new: int) -> Tensor:
    """Continue a text by exactly `n_new` tokens with `generate` of transformers."""
    mask = torch.ones_like(ids)
    found: Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=n_new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return found


def drafted(model: Any, ids: Int[Tensor, "1 T"], n_new: int, *, n_draft: int) -> speculative.Result:
    """Continue a text by the same tokens with speculative decoding."""
    return speculative.generate(model, ids, max_new_tokens=n_new, n_draft=n_draft, eos_token_id=())


@dataclass(frozen=True, slots=True)
class Entry:
    """One system to measure.

    Attributes:
        make: Makes the model, which has `generate` and `device`; systems may share a model.
        generate: (model, prompt, number of new tokens) -> prompt and greedy continuation.
        kind: Common name of systems that differ only in size.
        size: Number of keys in its datastore.
    """

    make: Callable[[], Any]
    generate: Callable[[Any, Tensor, int], Tensor | speculative.Result] = greedy
    kind: str | None = None
    size: int | None = None


def identities(parts: Parts, knn: Sequence[Parts] = ()) -> dict[str, str]:
    """Identities of everything that the systems depend on: the argument `inputs` of `run`.

    Args:
        parts: The base, its memory, and the passages if In-Context RAG is measured.
        knn: For each kNN-LM, the same base with a datastore and index; several show how time grows with the datastore.
    """
    found = {"base": model_identity(str(parts.base)), "alpha": repr(parts.alpha)}
    for system in SYSTEMS.values():
        if system.given(parts):
            found |= system.second(parts)
    return found | {f"knn {i}": artefact.read(each.of("index"), "index").recipe for i, each in enumerate(knn)}


def systems(parts: Parts, settings: LatencySettings, knn: Sequence[Parts] = ()) -> dict[str, Entry]:
    """The base in plain transformers, and the systems whose parts are given; they share one copy of the weights.

    Args:
        parts: As for `identities`.
        settings: Settings of the measurement.
        knn: As for `identities`.

    Raises:
        MemDecError: The parts do not match; nothing is loaded yet.
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
        given: Systems by name; the others are compared with the first, the base.
        out: Output folder.
        settings: Lengths, repeats and so on.
        inputs: Names and identities of everything that the systems depend on.
        stream: Token folder; prompts are pieces of its test split. None: prompts are random tokens.
        compute: Device and number type of the systems.
    """
    where = {"machine": provenance.machine(), "device": devices.name(compute), "threads": str(torch.get_num_threads())}
    where["precision"] = devices.precision(compute)
    source = {} if stream is None else {"tokens": artefact.read(stream, "tokens").recipe}
    with artefact.building(out, "latency", settings, {**inputs, **source, **where}) as build:
        if build is None:
            return
        timings = measure(given, settings, stream)
        rows = [row | timings.load | where for row in records(given, timings, settings)]
        artefact.write_json(out / "records.json", rows)
        artefact.write_json(out / "seconds.json", timings.plain())
        table = pd.DataFrame(rows).astype(dict.fromkeys(_MEASURED, float))
        artefact.write_text(out / "latency.csv", table.to_csv(index=False))
        artefact.write_text(out / "latency.md", markdown(table))
        figures.save(figures.latency(table), out / "latency")
        if figures.kinds(table):
            figures.save(figures.growth(table), out / "growth")
        build.facts.update(where | timings.load)


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timings:
    """Measured times.

    Attributes:
        names: Names of the systems.
        lengths: Numbers of new tokens; the first is 1.
        seconds: Seconds of each call.
        drafts: Results of speculative decoding by (system, number of new tokens).
        load: What else the machine did (`_Load`).
    """

    names: list[str]
    lengths: list[int]
    seconds: Float[np.ndarray, "systems lengths turns"]
    drafts: dict[tuple[str, int], list[speculative.Result]]
    load: dict[str, float] = field(default_factory=dict)

    def plain(self) -> dict[str, dict[str, list[float]]]:
        """system -> new tokens -> seconds of each turn."""
        return {
            name: {str(n): row.tolist() for n, row in zip(self.lengths, block, strict=True)}
            for name, block in zip(self.names, self.seconds, strict=True)
        }


def measure(given: Mapping[str, Entry], settings: LatencySettings, stream: Path | None = None) -> Timings:
    """Time all systems in turn.

    Raises:
        ConfigError: Prompt and new tokens are longer than the context of a model.
        ModelError: A system does not generate the requested number of tokens.
    """
    made = {name: system.make() for name, system in given.items()}
    lengths = [1, *sorted(set(settings.new_tokens))]
    for name, model in made.items():
        _check_length(name, model, settings.prompt_tokens + lengths[-1] - 1)
    prompts = _prompts(made.values(), settings, stream)
    seconds = np.zeros((len(given), len(lengths), settings.repeats))
    drafts: dict[tuple[str, int], list[speculative.Result]] = {}
    for name, system in given.items():
        for _ in range(settings.warmup):
            _timed(name, system, made[name], prompts[:1], lengths[-1])
    names, load = list(given), _Load()
    for turn in tqdm(range(settings.repeats), desc="latency", unit="turn", mininterval=2):
        order = np.roll(np.arange(len(names)), turn).tolist()  # rotate, so that no system always runs first
        for (j, n_new), i in itertools.product(enumerate(lengths), order):
            name, ids = names[i], prompts[turn : turn + 1]
            seconds[i, j, turn], found = _timed(name, given[name], made[name], ids, n_new)
            if isinstance(found, speculative.Result):
                drafts.setdefault((name, n_new), []).append(found)
    return Timings(names, lengths, seconds, drafts, load.until_now())


class _Load:
    """How busy the machine is with other things, from now on."""

    def __init__(self) -> None:
        self._average = os.getloadavg()[0]
        self._start = time.perf_counter(), *self._used()

    @staticmethod
    def _used() -> tuple[float, float]:
        """CPU seconds so far: of all processes of the machine, and of this one."""
        all_, ours = psutil.cpu_times(), os.times()
        idle = all_.idle + getattr(all_, "iowait", 0.0) + getattr(all_, "guest", 0.0) + getattr(all_, "guest_nice", 0.0)
        return sum(all_) - idle, ours.user + ours.system + ours.children_user + ours.children_system

    def until_now(self) -> dict[str, float]:
        """`load_average`: processes that wanted to run in the minute before. `others_cpu`: share of all CPU time, 0 to 1,
        that other processes used since."""
        begin, *before = self._start
        used, ours = (now - then for now, then in zip(self._used(), before, strict=True))
        passed = (time.perf_counter() - begin) * (psutil.cpu_count() or 1)
        return {"load_average": self._average, "others_cpu": min(1.0, max(0.0, (used - ours) / passed))}


def _check_length(name: str, model: Any, needed: int) -> None:
    what = f"latency: prompts and new tokens of {name}"
    loading.check_positions(loading.n_positions(model.config), needed, what, "lower prompt_tokens or new_tokens")


def _prompts(systems: Iterable[Any], settings: LatencySettings, stream: Path | None) -> Int[Tensor, "turns T"]:
    """One prompt per turn: random tokens that all systems know, or evenly spaced pieces of a test text."""
    size = settings.prompt_tokens
    if stream is None:
        generator = torch.Generator().manual_seed(settings.seed)
        readers = [model for system in systems for model in (system, *getattr(system, "memories", ()))]
        n_known = min(len(model.get_input_embeddings().weight) for model in readers)
        return torch.randint(0, n_known, (settings.repeats, size), generator=generator)
    values = tokens.load_stream(stream, "test")
    if len(values) < size:
        raise ConfigError(f"{stream}: expected a test split of at least {size} tokens (a prompt), found {len(values)}")
    begins = np.linspace(0, len(values) - size, settings.repeats).astype(int)
    return torch.from_numpy(np.stack([values[begin : begin + size].astype(np.int64) for begin in begins]))


def _timed(name: str, system: Entry, model: Any, ids: Tensor, n_new: int) -> tuple[float, Tensor | speculative.Result]:
    """Seconds and result of one call."""
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
    """Make the rows: prefill (`n_tokens` of the prompt), and decode and total for each number of generated tokens.

    `ratio_to_base` is a ratio of times (2 takes twice as long): `seconds` divided by those of the base. Decode leaves
    out the first new token, which comes with the prefill. If the interval of a time includes 0, as on a busy
    machine, rates and ratios are None. Only speculative decoding has `tokens_per_forward` (generated tokens per forward
    pass of the base) and `acceptance` (fraction of the tested drafts that were accepted).
    """
    first, more = timings.seconds[:, :1], timings.seconds[:, 1:]
    seconds = np.concatenate([first, more - first, more], axis=1)  # (systems, phases, turns)
    rest = timings.lengths[1:]
    phases = [("prefill", settings.prompt_tokens), *(("decode", n) for n in rest), *(("total", n) for n in rest)]
    work = np.array([n - (phase == "decode") for phase, n in phases])  # tokens generated or read in that phase
    median, low, high = _median(seconds, settings)
    unclear = low <= 0
    with np.errstate(divide="ignore", invalid="ignore"):
        rates = work / np.stack([median, high, low])
        ratios = np.stack([median / median[:1], *_ratio_interval(seconds, settings)])
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
    """A row per system, at the largest number of new tokens: medians with their 95 % intervals."""
    last = table["n_tokens"][table["phase"] == "total"].max()
    total = table[(table["phase"] == "total") & (table["n_tokens"] == last)]
    decode = table[(table["phase"] == "decode") & (table["n_tokens"] == last)]
    prefill = table[table["phase"] == "prefill"]
    scale, unit = (1000, "ms") if total["seconds"].max() < 10 else (1, "s")
    columns: dict[str, list[str]] = {"System": [str(name) for name in total["system"]]}
    for number, (title, rows, names, factor, least) in enumerate(
        (
            ("Prefill, tokens/s", prefill, ("tokens_per_s", "low", "high"), 1, 100),
            ("Decoding, tokens/s", decode, ("tokens_per_s", "low", "high"), 1, 100),
            (f"Time, {unit}", total, ("seconds", "seconds_low", "seconds_high"), scale, 1000),
            ("Time, ratio to base", total, ("ratio_to_base", "ratio_low", "ratio_high"), 1, np.inf),
        )
    ):
        values = rows[list(names)].astype(float) * factor
        form = ",.0f" if values[names[0]].min() >= least else ",.2f"
        columns[title] = [_shown(value, form) for value in values[names[0]]]
        ends = zip(values[names[1]], values[names[2]], strict=True)
        columns[f"95 %{' ' * number}"] = [f"{_shown(low, form)} to {_shown(high, form)}" for low, high in ends]
    for title, name in (("Tokens per forward", "tokens_per_forward"), ("Acceptance", "acceptance")):
        columns[title] = [_shown(value, ".2f") for value in total[name]]
    lines = [list(row) for row in zip(*columns.values(), strict=True)]
    return f"{write_markdown([title.strip() for title in columns], lines, 1)}\n\n{_note(table, int(last))}\n"


def _shown(value: float | None, form: str) -> str:
    return "–" if pd.isna(value) else f"{value:{form}}"


def _note(table: pd.DataFrame, n_new: int) -> str:
    """The text below the table: what was measured, on which machine, and how busy it was."""
    first = table.iloc[0]
    text = (
        f"One text at a time: {first['prompt_tokens']} tokens of prompt, {n_new} new ones, greedy; medians of "
        f"{first['turns']} turns and their 95 % intervals; the ratio is that of the medians. {first['machine']}, "
        f"{first['device']}, {first['threads']} threads."
    )
    if "others_cpu" not in table:  # measured before this was recorded
        return text
    text += (
        f" Other programs used {100 * first['others_cpu']:.0f} % of the processors; load average before: "
        f"{first['load_average']:.1f}."
    )
    return text + (" Measure again on a quiet machine." if first["others_cpu"] > _BUSY else "")


def _ratio_interval(
    values: Float[np.ndarray, "systems phases turns"], settings: LatencySettings
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ends of the interval of median / median of the base, each (systems, phases)."""

    def ratio(own: NDArray[np.float64], base: NDArray[np.float64], axis: int) -> Any:
        return np.median(own, axis=axis) / np.median(base, axis=axis)

    base = np.repeat(values[:1], len(values), axis=0)
    low, high = statistics.bootstrap(ratio, values, base, n_resamples=settings.resamples, seed=settings.seed)
    return low, high


def _median(
    values: Float[np.ndarray, "systems phases turns"], settings: LatencySettings
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Median over turns and the ends of its percentile bootstrap interval, each (systems, phases)."""
    low, high = statistics.bootstrap(np.median, values, n_resamples=settings.resamples, seed=settings.seed)
    return np.median(values, axis=-1), low, high


def _drafts(results: Sequence[speculative.Result]) -> dict[str, float | None]:
    """Statistics of speculative decoding over all turns."""
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
