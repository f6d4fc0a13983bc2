"""Which files under MEMDEC_DATA the tasks of a suite read. It is known without lm-eval, so that the rules can ask.

A file that is not there is looked up on the Hub when the task is run, where the Hub has it. `check` says before any job
starts what cannot be had at all.
"""

import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import yaml

from memdec import HARNESS_TASKS
from memdec.artefacts import artefact
from memdec.errors import ConfigError
from memdec.settings import near

DEMONSTRATIONS = "casehold/train.jsonl"  # of CaseHOLD's tasks with shots, which do without it, too
LOCAL_ONLY = ("sst2", "mr", "cr", "hyp", "agn", "verbalizers")  # folders whose files are not on the Hub
BY_HAND = ("mr/validation.jsonl", "hyp/validation.jsonl", "agn/validation.jsonl")  # of these no origin can be read
_FILES = {
    "memdec_nq": "nq/validation.jsonl",
    "memdec_hotpotqa": "hotpotqa/validation.jsonl",
}


def leaves(names: Iterable[str]) -> list[str]:
    """The tasks of these tasks and groups, each once.

    Raises:
        ConfigError: There is no task or group of a name.
    """
    found = (each for name in names for each in _leaves(name))
    return list(dict.fromkeys(found))


def _leaves(name: str) -> Iterator[str]:
    known = _definitions()
    if name not in known:
        raise ConfigError(f"tasks: expected tasks or groups of harness_tasks, found {name}{near(name, known)}")
    definition = known[name]
    if "group" not in definition:
        yield name
    for each in definition["task"] if "group" in definition else ():
        yield from _leaves(each)


def unknown(suites: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for each task or group of a suite that there is not."""
    found = []
    for suite, name in ((suite, name) for suite, names in suites.items() for name in names):
        try:
            leaves([name])
        except ConfigError as error:
            found.append(f"suites.{suite}.{error}")
    return found


def files(names: Iterable[str], *, tune: bool = False) -> list[str]:
    """Files under MEMDEC_DATA that tasks and groups read, each once; with `tune` also those that alpha is tuned on."""
    found = (each for task in leaves(names) for each in _files(task, _metadata(task), tune))
    return list(dict.fromkeys(found))


def _metadata(task: str) -> dict[str, Any]:
    found: dict[str, Any] = _definitions()[task].get("metadata", {})
    return found


def _files(task: str, metadata: dict[str, Any], tune: bool) -> Iterator[str]:
    splits = ["test", *([metadata["tune_split"]] if tune and "tune_split" in metadata else [])]
    if "adaptllm_config" in metadata:
        yield f"{metadata['adaptllm_config'].lower()}/adaptllm_schema.jsonl"
    elif "set" in metadata:
        yield from (f"{metadata['set']}/{split}.jsonl" for split in splits)
        if "verbalizer" in metadata:
            yield f"verbalizers/{metadata['verbalizer']}.json"
    elif task == "memdec_wikitext":
        yield from (f"wikitext/wikitext-103-raw-v1/{split}.parquet" for split in splits)
    elif task in _FILES:
        yield _FILES[task]


def definition(task: str) -> str:
    """Digest of a task's definition with what it includes: prompt, words, metric, metadata."""
    return artefact.digest(_definitions()[task])


def found(names: Sequence[str], *, tune: bool = False) -> list[Path]:
    """The files that are there."""
    read = files(names, tune=tune)
    casehold = (_metadata(task) for task in leaves(names) if task.startswith("memdec_casehold"))
    if any(each.get("shots") for each in casehold):
        read.append(DEMONSTRATIONS)
    return [path for path in (_folder() / name for name in read) if path.is_file()]


def check(names: Iterable[str], *, tune: bool = False, ask_hub: bool = True) -> None:
    """Check that every file is there or may be had from the Hub; without `ask_hub` that is taken for granted.

    Raises:
        ConfigError: One is not; the message says how to fetch them all.
    """
    missing = [name for name in files(names, tune=tune) if not (_folder() / name).is_file()]
    lost = [name for name in missing if name.split("/")[0] in LOCAL_ONLY or (ask_hub and not _hub_answers())]
    if lost:
        where = os.environ.get("MEMDEC_DATA")
        fetched = dict.fromkeys(name.split("/")[0] for name in lost if name not in BY_HAND)
        tasks = " ".join(f"--task {name}" for name in fetched)
        hand = [name for name in lost if name in BY_HAND]
        steps = [f"run `memdec data fetch --out {where or 'DATA'} {tasks}`"] if fetched else []
        steps += [f"put {', '.join(hand)} there by hand (harness_tasks/README.md), or tune no alpha"] if hand else []
        raise ConfigError(
            f"rows: expected {', '.join(lost)} in {where or 'MEMDEC_DATA, which is not set'}, found none; "
            f"{' and '.join(steps)}, and set MEMDEC_DATA to that folder, or leave these tasks out of the suite"
        )


def _folder() -> Path:
    return Path(os.environ.get("MEMDEC_DATA") or os.devnull)


@cache
def _hub_answers() -> bool:
    """Whether the Hub can be reached; asked once."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    address = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        with socket.create_connection((address.hostname or "", address.port or 443), timeout=3):
            return True
    except OSError:
        return False


class _Loader(yaml.SafeLoader):
    """Reads a task's YAML; the name of a function stays text."""


_Loader.add_multi_constructor("!function", lambda loader, _, node: loader.construct_scalar(node))


@cache
def _definitions() -> dict[str, dict[str, Any]]:
    """Every task and group of `harness_tasks` by name, with what it includes."""
    read = {path: _read(path) for path in sorted(HARNESS_TASKS.glob("**/*.yaml"))}

    def whole(path: Path) -> dict[str, Any]:
        above = read[path].get("include")
        below = whole(path.parent / above) if above else {}
        metadata = {**below.get("metadata", {}), **read[path].get("metadata", {})}
        return {**below, **read[path], "metadata": metadata}

    found = [whole(path) for path in read if not path.name.startswith("_")]
    return {each.get("group") or each["task"]: each for each in found}


def _read(path: Path) -> dict[str, Any]:
    loader = _Loader(path.read_text(encoding="utf-8"))
    try:
        found: dict[str, Any] = loader.get_single_data()
    finally:
        loader.dispose()
    return found
