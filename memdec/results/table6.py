"""Table 6 of the paper: what base, memory and neighbours give the marked words of a few texts."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from memdec.artefacts import artefact, devices
from memdec.config import Config
from memdec.errors import ConfigError
from memdec.inference.mixture import MemDecForCausalLM
from memdec.inference.systems import SYSTEMS, Parts
from memdec.inference.token_reports import Neighbours, TokenReport, explain
from memdec.models import loading
from memdec.results import tables
from memdec.results.explain import percent
from memdec.settings import Case, ExplainSettings
from memdec.text import tokens

_COLUMNS = {"memory": "MemDec", "knn": "kNN", "base": "BaseLM"}  # as the paper names them


def probabilities(case: Case, model: MemDecForCausalLM, tokenizer: Any, neighbours: Neighbours) -> dict[str, Any]:
    """One row: p of the marked word, the product over its tokens, in percent.

    Raises:
        ConfigError: A text that the models cannot see whole.
    """
    before, rest = case.text.split("[[")
    word, behind = rest.split("]]")
    # Tokens of the whole text, so that those of the word are the ones it has there.
    encoding = tokenizer(before + word + behind, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    first, last = len(before), len(before) + len(word)
    inside = [i for i, (low, high) in enumerate(encoding["offset_mapping"]) if low < last and high > first]
    ids = encoding["input_ids"][: inside[-1] + 1]
    loading.check_positions(model.n_positions, len(ids), f"cases: {case.text!r}", "shorten it")
    reports = explain(model, tokenizer, ids, context=len(ids), stride=len(ids), top=1, neighbours=neighbours)
    row = {"group": case.group, "text": case.text, "target": word, "tokens": len(inside)}
    return row | {title: _percent([reports[i] for i in inside], name) for name, title in _COLUMNS.items()}


def _percent(reports: Sequence[TokenReport], name: str) -> float:
    return 100 * math.exp(math.fsum(getattr(report, name).log_p for report in reports))


def run(config: Config, base: Path, memory: Path, datastore: Sequence[Path], index_folder: Path, out: Path) -> None:
    """Stage `cases`: Table 6 of a run.

    Args:
        config: Of the run; `cases` are the rows, `targets` has k, tau and nprobe of p_kNN.
        base: Model folder.
        memory: Memory decoder.
        datastore: All shards of the keys that the memory was trained on.
        index_folder: Index over them.
        out: CSV file; .md, .tex and .provenance.json are put beside it.

    Raises:
        ConfigError: No cases, or one that is too long.
        ModelError: Models of different tokenizers.
    """
    if not config.cases:
        raise ConfigError("cases: expected at least one row of Table 6, found none; add them to the config")
    folders = {"base": (base, "model"), "memory": (memory, "memory"), "index": (index_folder, "index")}
    recipes = {name: artefact.read(folder, kind).recipe for name, (folder, kind) in folders.items()}
    same = {name: getattr(config.targets, name) for name in ("neighbours", "temperature", "nprobe")}
    tokenizer = tokens.load_tokenizer(str(base))
    dtype, device = devices.precision(config.compute), str(devices.pick(config.compute))
    model = SYSTEMS["MemDec"].build(Parts(base=base, memory=memory, dtype=dtype, device=device))
    neighbours = Neighbours(datastore, index_folder, ExplainSettings(**same), tokenizer, model.device)
    frame = pd.DataFrame([probabilities(case, model, tokenizer, neighbours) for case in config.cases])
    rows = []
    for _, row in frame.iterrows():
        numbers = [row[title] for title in _COLUMNS.values()]
        text = str(row["text"]).replace("[[", "[").replace("]]", "]")
        shown = [percent(p / 100) for p in numbers]
        best = numbers.index(max(numbers))
        rows.append([str(row["group"]), text, *(f"**{p}**" if i == best else p for i, p in enumerate(shown))])
    grid = tables.Grid(["Group", "Text", *_COLUMNS.values()], 2, rows)
    note = (
        f"Probability in percent of the word in brackets, scale `{config.scale}`: memory, kNN distribution that it was "
        f"trained on ({neighbours.store.n:,} keys, k {same['neighbours']}, temperature {same['temperature']:g}) and base "
        f"model {config.key_model}. A word of several tokens has the product of their probabilities."
    )
    tables.write(out, frame, grid, note, "6", config, recipes)
