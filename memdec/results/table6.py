"""Table 6 of the paper: the probabilities of marked words in a few texts under base, memory and kNN."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memdec.artefacts import artefact, devices
from memdec.config import Config
from memdec.datastore import accuracy, calibrate
from memdec.errors import ConfigError
from memdec.inference.mixture import MemDecForCausalLM
from memdec.inference.systems import SYSTEMS, Parts
from memdec.inference.token_reports import Neighbours, TokenReport, explain
from memdec.models import loading
from memdec.settings import Case, ExplainSettings
from memdec.text import tokens

_COLUMNS = {"memory": "MemDec", "knn": "kNN", "base": "BaseLM"}  # as the paper names them


def probabilities(case: Case, model: MemDecForCausalLM, tokenizer: Any, neighbours: Neighbours) -> dict[str, Any]:
    """Make one row: the probability of the marked word, which is the product over its tokens, in percent.

    Raises:
        ConfigError: The text is longer than the context of the models.
    """
    before, rest = case.text.split("[[")
    word, behind = rest.split("]]")
    # Tokenize the whole text: the tokens of the word depend on the text after it.
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


def run(
    config: Config,
    base: Path,
    memory: Path,
    datastore: Sequence[Path],
    index_folder: Path,
    out: Path,
    calibration: Path | None = None,
) -> None:
    """Stage `cases`: compute the numbers of Table 6.

    Args:
        config: Config of the run; `cases` are the rows, `targets` has k, tau and nprobe of p_kNN.
        base: Model folder.
        memory: Memory decoder.
        datastore: All shards of the datastore whose targets trained the memory.
        index_folder: Index over the datastore.
        out: Output folder.
        calibration: Choice of k and tau, if the targets have them from one.

    Raises:
        ConfigError: There are no cases, or one is too long.
        ModelError: The models have different tokenizers.
    """
    if not config.cases:
        raise ConfigError("cases: expected at least one row of Table 6, found none; add them to the config")
    inputs = {"base": loading.known(base, "model").recipe, "memory": loading.known(memory, "memory", "model").recipe}
    inputs["index"] = artefact.read(index_folder, "index").recipe
    targets = calibrate.targets(config.targets, calibration)
    same: dict[str, Any] = {name: getattr(targets, name) for name in ("neighbours", "temperature")}
    same["nprobe"] = accuracy.of_targets(targets, index_folder).nprobe
    dtype, device = devices.precision(config.compute), str(devices.pick(config.compute))
    plain = {"cases": [case.model_dump(mode="json") for case in config.cases], **same, "precision": dtype}
    with artefact.building(out, "cases", plain, inputs) as build:
        if build is None:
            return
        tokenizer = tokens.load_tokenizer(str(base))
        model = SYSTEMS["MemDec"].build(Parts(base=base, memory=memory, dtype=dtype, device=device))
        neighbours = Neighbours(datastore, index_folder, ExplainSettings(**same), tokenizer, model.device)
        records = [probabilities(case, model, tokenizer, neighbours) for case in config.cases]
        artefact.write_json(out / "records.json", records)
        build.facts.update(keys=neighbours.store.n, device=devices.name(config.compute))
