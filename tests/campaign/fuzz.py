"""Random input for what people write: 300 configs, 300 row files, 300 --model_args. Two minutes on one core.

    python tests/campaign/fuzz.py [--seed N] [--n 300]

Each input must be taken, or refused with a `MemDecError` (one line, exit code 2), within 20 seconds. Anything else is a
failure: it is printed with the seed and number that make it again, and the exit code is 1.
"""

# ruff: noqa: E402 -- the folders of the modules below come first

import argparse
import contextlib
import copy
import inspect
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "campaign")]

import yaml

from memdec import config as cfg
from memdec.errors import ConfigError, MemDecError

LIMIT_S = 20
Case = tuple[str, Callable[[], object]]  # what it is, and what must be taken or refused

JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 3, 10**12, 2**63, 2**70, 0.5, -0.5, 1e308, float("nan"), float("inf"), "", " ", "x", "-1",
    "1e-3", "nan", "yes", "x" * 5000, "é\u202e", "a/b", "../..", "/", "~", "*", "[", "${UNSET_NAME}", "$(touch x)", "`x`",
    "a: b", "{x}", "\n", "\t", [], {}, [[]], {"": ""}, [None], ["a", "a"], {"a": {"b": {"c": [1]}}}, [0, 0, 0],
]  # fmt: skip


class Hang(BaseException):
    """The time is over. No library catches it by accident."""


def _alarm(*_: object) -> None:
    raise Hang


# --- configs ------------------------------------------------------------------------------------------------------

LAYERS = [
    "mini",
    "mini,gpu-tiny",
    "paper",
    "paper,paper-shapes",
    "gpu",
    "pretrained,recipe",
    "smol,recipe",
    "smol,smol-cpu",
    "smol,smol-little,recipe",
    "smol,smol-domains,recipe",
    "smol,smol-domains,gpu-run",
]


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values inside of plain data."""
    if place:
        yield place
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in pairs:
        yield from places(each, (*place, key))


def mutated(rng: random.Random, data: Any) -> Any:
    """Plain data with one to four changes."""
    data = copy.deepcopy(data)
    for _ in range(rng.randint(1, 4)):
        where = rng.choice(list(places(data)) or [()])
        if not where:
            return data
        above = data
        for key in where[:-1]:
            above = above[key]
        key = where[-1]
        kind = rng.randrange(6)
        if kind == 0:
            del above[key]
        elif kind == 1 and isinstance(above, dict):
            above[rng.choice([f"{key}x", "", "<<", str(key).upper(), "a b", "\u202e", 7])] = above.pop(key)
        elif kind == 2 and isinstance(above, list):
            above.append(above[key])
        elif kind == 3:
            above[key] = [above[key]]
        elif kind == 4:
            above[key] = copy.deepcopy(rng.choice([data, *map(data_at(data), list(places(data))[:40])]))
        else:
            above[key] = copy.deepcopy(rng.choice(JUNK))
    return data


def data_at(data: Any) -> Callable[[tuple[Any, ...]], Any]:
    def find(place: tuple[Any, ...]) -> Any:
        found = data
        for key in place:
            found = found[key]
        return found

    return find


def spoiled(rng: random.Random, text: str) -> bytes:
    """Text with cuts, doubled lines, and characters that mean something to YAML."""
    content = bytearray(text, "utf-8")
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(content) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            del content[at : at + rng.randint(1, 40)]
        elif kind == 1:
            content[at:at] = rng.choice(
                [b"\t", b"&a ", b"*a", b"<<: ", b"!!", b"? ", b"---\n", b"\x00", b"\xff", b"{[", b"'"]
            )
        elif kind == 2:
            content[at:at] = content[max(0, at - 60) : at]
        else:
            content[at:at] = rng.choice(
                [b"1:30", b"2024-01-01", b"9" * 5000, b"[" * 400, b"\xef\xbb\xbf", b"0o7", b"%a "]
            )
    return bytes(content)


def configs(seed: int, n: int, home: Path) -> Iterator[Case]:
    rng = random.Random(seed)
    whole = [cfg.read(*(ROOT / "config" / f"{name}.yaml" for name in names.split(","))) for names in LAYERS]
    for number in range(n):
        data = rng.choice(whole)
        path = home / f"{number}.yaml"
        if rng.random() < 0.6:
            path.write_text(yaml.safe_dump(mutated(rng, data), allow_unicode=True), encoding="utf-8")
        else:
            path.write_bytes(spoiled(rng, yaml.safe_dump(data, sort_keys=False)))
        yield f"config {path}", lambda path=path: checked(path)


def checked(path: Path) -> None:
    """As `memdec validate`, and what the rules ask of a config that is accepted."""
    data = cfg.read(path)
    if problems := cfg.check(data)[0]:
        raise ConfigError("; ".join(problems))
    config = cfg.checked(data, str(path))
    for name in config.memory_names:
        config.variant(name)


def validated(home: Path, n: int) -> list[str]:
    """The command itself on some of the files; what is neither taken nor refused in one line."""
    wrong = []
    for path in sorted(home.glob("*.yaml"))[:n]:
        command = [sys.executable, "-m", "memdec", "validate", str(path)]
        run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=LIMIT_S)
        if run.returncode not in (0, 2) or run.stderr.count("\n") != 1:
            wrong.append(f"memdec validate {path}: exit {run.returncode}: {run.stderr[-500:]}")
    return wrong


# --- rows and --model_args ------------------------------------------------------------------------------------------


def row_files(seed: int, n: int, home: Path) -> Iterator[Case]:
    import fuzz_rows

    for number, (name, run) in enumerate(fuzz_rows.cases(seed, n)):
        folder = home / str(number)
        folder.mkdir()
        yield name, lambda run=run, folder=folder: run(folder)


def model_args(seed: int, n: int, home: Path) -> Iterator[Case]:
    """Arguments of the three models: known names with junk, unknown names, good ones; then one request."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from memdec.harness.baselines import MemDecIcRag, MemDecKnnLM
    from memdec.harness.models import MemDecInterp

    rng = random.Random(seed)
    good = tiny_parts(home)
    kinds: dict[Any, dict[str, Any]] = {
        MemDecInterp: {"pretrained": good["base"], "memory": good["memory"], "alpha": 0.5},
        MemDecKnnLM: {"pretrained": good["base"], "datastore": good["datastore"], "index": good["index"]},
        MemDecIcRag: {"pretrained": good["base"], "passages": good["passages"]},
    }
    theirs = [name for name in inspect.signature(HFLM.__init__).parameters if name not in ("self", "kwargs")]
    # What lm-eval's own code does with these is not ours: it starts servers, devices or other backends.
    theirs = [name for name in theirs if name not in ("parallelize", "gptqmodel", "backend", "autogptq", "gguf_file")]

    def one(kind: Any, given: dict[str, Any]) -> None:
        model = kind.create_from_arg_obj(dict(given), {"batch_size": 2, "device": "cpu"})
        request = Instance("loglikelihood", {}, ("The matrix", " returns"), 0)
        model.loglikelihood([request], disable_tqdm=True)

    for number in range(n):
        kind = rng.choice(list(kinds))
        given = dict(kinds[kind])
        ours = [name for name in inspect.signature(kind.__init__).parameters if name not in ("self", "kwargs")]
        for _ in range(rng.randint(1, 2)):
            change = rng.randrange(4)
            if change == 0:
                given.pop(rng.choice(list(given)), None) if given else None
            elif change == 1:
                given[rng.choice([*ours, "window", "context", "stride", "dtype", "scores"])] = rng.choice(ARGS)
            elif change == 2:
                name = rng.choice([*ours, *theirs])
                at = rng.randrange(len(name))
                given[name[:at] + name[at + 1 :]] = rng.choice(ARGS)
            else:
                given[rng.choice(theirs)] = rng.choice(ARGS)
        shown = ",".join(f"{key}={value}" for key, value in given.items())
        yield f"{kind.__name__} {number} {shown[:300]}", lambda kind=kind, given=given: one(kind, given)


# What lm-eval makes of the text of an argument: text, numbers, booleans, None.
ARGS: list[Any] = [
    value for value in JUNK if isinstance(value, str | int | float | None) and value not in ("~", "/", "*")
]


def tiny_parts(home: Path) -> dict[str, str]:
    """A base, a memory, a datastore with its index, and passages, made in seconds."""
    from making import CONTEXT, made_text, spec

    from memdec.datastore import index, keys, passages
    from memdec.settings import DatastoreSettings, FileCorpus, IndexSettings, PassageSettings, TokenizerSpec
    from memdec.text import corpora, tokens
    from memdec.training import stages

    (home / "text.txt").write_text(made_text(300, 0))
    corpora.run(FileCorpus(source="files", path=str(home / "text.txt"), min_bytes=200), home / "corpus")
    tokens.run_tokenizer(TokenizerSpec(train_on=["corpus"], vocab_size=300), home / "bpe", [home / "corpus"])
    tokens.run_tokens(home / "bpe", home / "corpus", home / "tokens")
    for name, width in (("base", 16), ("memory", 8)):
        stages.run_pretrain(spec(width), home / "bpe", home / "tokens", home / name, context=CONTEXT)
    window = {"context": CONTEXT, "stride": CONTEXT // 2}
    keys.run(home / "base", home / "tokens", home / "datastore", DatastoreSettings(), **window)
    index.run(home / "datastore", home / "index", IndexSettings())
    passages.run(home / "tokens", home / "passages", PassageSettings(passage=16))
    return {name: str(home / name) for name in ("base", "memory", "datastore", "index", "passages")}


# --- running --------------------------------------------------------------------------------------------------------


def outcome(run: Callable[[], object]) -> tuple[str, str]:
    """How a case ended, and what there is to say about it."""
    signal.alarm(LIMIT_S)
    try:
        run()
        return "taken", ""
    except MemDecError as error:
        signal.alarm(0)
        return ("refused", "") if "\n" not in str(error) else ("several lines", str(error))
    except SystemExit as stop:
        return ("refused", "") if stop.code == 2 else ("exit", f"exit code {stop.code}")
    except Hang:
        return "hang", f"more than {LIMIT_S} s"
    except BaseException:
        return "traceback", traceback.format_exc()[-1500:]
    finally:
        signal.alarm(0)


def main() -> int:
    """Exit 1 where a case ended otherwise than taken or refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=300, help="cases of each kind")
    parser.add_argument("--only", choices=["configs", "rows", "model_args"])
    given = parser.parse_args()
    signal.signal(signal.SIGALRM, _alarm)
    kinds = {"configs": configs, "rows": row_files, "model_args": model_args}
    failures: list[str] = []
    print(f"{'kind':12} {'cases':>6} {'taken':>6} {'refused':>8} {'failed':>7} {'seconds':>8}")
    for name, make in kinds.items():
        if given.only not in (None, name):
            continue
        begin, counts = time.monotonic(), Counter[str]()
        with tempfile.TemporaryDirectory() as scratch:
            here = (
                Path(scratch) / "working" / "folder"
            )  # what a case writes by a relative path, `../..` too, goes with it
            here.mkdir(parents=True)
            with contextlib.chdir(here):
                for what, run in make(given.seed, given.n, Path(scratch)):
                    ended, said = outcome(run)
                    counts[ended] += 1
                    if ended not in ("taken", "refused"):
                        failures.append(f"{name}: {what}: {ended}: {said}")
            if name == "configs":
                failures += validated(Path(scratch), 8)
        failed = counts.total() - counts["taken"] - counts["refused"]
        wall_s = time.monotonic() - begin
        print(
            f"{name:12} {counts.total():6} {counts['taken']:6} {counts['refused']:8} {failed:7} {wall_s:8.1f}",
            flush=True,
        )
    print(f"{len(failures)} failures (seed {given.seed})")
    print("\n\n".join(failures), file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
