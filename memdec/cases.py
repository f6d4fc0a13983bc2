"""Table 6 of the paper: what base, memory and neighbours give the marked words of a few texts."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memdec import artifacts, devices, tokens
from memdec.config import Case, Config, ExplainSettings
from memdec.errors import ConfigError
from memdec.explain import Neighbours, TokenReport, explain
from memdec.modeling import MemDecForCausalLM

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
    if model.n_positions is not None and len(ids) > model.n_positions:
        raise ConfigError(
            f"cases: expected a text of at most {model.n_positions} tokens (positions of the models), found {len(ids)} "
            f"in {case.text!r}; shorten it"
        )
    reports = explain(model, tokenizer, ids, context=len(ids), stride=len(ids), top=1, neighbours=neighbours)
    row = {"group": case.group, "text": case.text, "target": word, "tokens": len(inside)}
    return row | {title: _percent([reports[i] for i in inside], name) for name, title in _COLUMNS.items()}


def _percent(reports: Sequence[TokenReport], name: str) -> float:
    return 100 * math.exp(math.fsum(getattr(report, name).log_p for report in reports))


def run(config: Config, base: Path, memory: Path, datastore: Sequence[Path], index_folder: Path, out: Path) -> None:
    """Stage `cases`: what Table 6 shows of a run.

    Args:
        config: Of the run; `cases` are the rows, `targets` has k, tau and nprobe of p_kNN.
        base: Model folder.
        memory: Memory decoder.
        datastore: All shards of the keys that the memory was trained on.
        index_folder: Index over them.
        out: Folder to make.

    Raises:
        ConfigError: No cases, or one that is too long.
        ModelError: Models of different tokenizers.
    """
    if not config.cases:
        raise ConfigError("cases: expected at least one row of Table 6, found none; add them to the config")
    folders = {"base": (base, "model"), "memory": (memory, "memory"), "index": (index_folder, "index")}
    inputs = {name: artifacts.read(folder, kind).recipe for name, (folder, kind) in folders.items()}
    same = {name: getattr(config.targets, name) for name in ("neighbours", "temperature", "nprobe")}
    plain = {"cases": [case.model_dump(mode="json") for case in config.cases], **same}
    plain["precision"] = devices.precision(config.compute)
    with artifacts.building(out, "cases", plain, inputs) as build:
        if build is None:
            return
        tokenizer = tokens.load_tokenizer(str(base))
        # Nothing is mixed, so the weight does not matter.
        model = MemDecForCausalLM.from_parts(base, [memory], [0.5], dtype=plain["precision"])
        model.to(devices.pick(config.compute))
        neighbours = Neighbours(datastore, index_folder, ExplainSettings(**same), tokenizer, model.device)
        records = [probabilities(case, model, tokenizer, neighbours) for case in config.cases]
        artifacts.write_json(out / "records.json", records)
        build.facts.update(keys=neighbours.store.n, device=devices.name(config.compute))
