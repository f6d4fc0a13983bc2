"""Kill campaign: kill runs at random moments and stages before chosen file-system events, then run the same command again.

    python tests/campaign/kill.py        # about five minutes on two cores; a run that was stopped goes on

Part 1 kills the reduced run (tests/regression/reduced.yaml) with all its processes, 20 times at random moments. After
each kill the documented command is given again, without any help, until the table is there. The table must equal that
of an undisturbed run byte by byte.

Part 2 kills single stages of tiny size before 60 chosen file-system events in their output folder: a file is opened for
writing, synced, renamed or removed, or a folder is made or removed. The same command is then given again. It must
succeed, and the artefact must equal that of an undisturbed run, except for measured times.

It prints a line for each kill and a count, and exits 1 if anything failed. Then the folder stays, and the next call tries
again what failed; otherwise it is removed.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", MEMDEC_TEST_DATA="/")
BIN = Path(sys.executable).parent
GOOD = "the same"  # what came of a kill if nothing was lost
PATIENCE = 300  # seconds after which a command counts as stuck
# Files that hold measured times or dates; all others must be equal.
TIMES = ("results_*.json",)


# --- part 1: the reduced run at random moments --------------------------------------------------------------------


def command(folder: Path) -> list[str]:
    """The documented command for a table of one's own config: what `make table3` runs, on another folder."""
    return [
        str(ROOT / "workflow" / "run.sh"), str(folder), "--cores", "all", "--quiet", "progress", "--configfile",
        str(ROOT / "tests" / "regression" / "reduced.yaml"), "--workflow-profile", str(ROOT / "profiles" / "default"),
        "--", "results/table3.csv",
    ]  # fmt: skip


def started(folder: Path) -> subprocess.Popen[bytes]:
    """The command, in a session of its own; what it says is added to `log.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            command(folder), cwd=ROOT, env=os.environ | paths, stdout=log, stderr=log, start_new_session=True
        )


def killed_at(run: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Wait; then kill the run with all its processes and return None, or return its exit status if it ended before."""
    try:
        return run.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        while members := [
            pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _session(pid) == run.pid
        ]:
            for pid in members:
                _kill(pid)
            time.sleep(0.05)
        return None


def _session(pid: int) -> int | None:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(state[3]) if state[0] != "Z" else None
    except (OSError, IndexError):
        return None


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def last_words(folder: Path) -> str:
    lines = [line for line in (folder / "log.txt").read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(line.strip() for line in lines[-3:])[:300]


def run_kills(home: Path, n_kills: int, rng: random.Random) -> list[dict[str, Any]]:
    """Kill runs in one folder until a table is there, then in the next folder, until there were `n_kills` kills."""
    table = Path("results/table3.csv")
    right = home / "undisturbed"
    if not (right / table).is_file():
        shutil.rmtree(right, ignore_errors=True)
        if killed_at(started(right), 20 * PATIENCE) != 0:
            raise SystemExit(f"the undisturbed run failed: {last_words(right)}")
    known = home / "runs.json"
    found: list[dict[str, Any]] = json.loads(known.read_text()) if known.is_file() else []
    found = [each for each in found if each["after"] in (None, GOOD)]
    moments = [rng.uniform(2, 18) for _ in range(n_kills)]
    while len(found) < n_kills or found[-1]["after"] is None:
        folder = home / "killed"
        patience = moments[len(found)] if len(found) < n_kills else 4 * PATIENCE
        code = killed_at(started(folder), patience)
        if code is None and len(found) < n_kills:
            found.append({"run": "killed", "event": f"after {patience:.1f} s", "after": None})
        elif code == 0:
            same = (folder / table).read_bytes() == (right / table).read_bytes()
            _after(found, GOOD if same else "ANOTHER TABLE")
            shutil.rmtree(folder)
        else:
            _after(found, f"STUCK: {last_words(folder) if code is not None else 'no end'}")
            _help(folder)
        known.write_text(json.dumps(found, indent=1))
    return found


def _after(found: list[dict[str, Any]], what: str) -> None:
    """What came of all kills since the last table or failure."""
    for each in found:
        each["after"] = each["after"] or what


def _help(folder: Path) -> None:
    """What nobody should have to do: without it one failure would hide those after it."""
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    subprocess.run([*command(folder)[:-2], "--unlock"], cwd=ROOT, env=environment, capture_output=True, check=False)


# --- part 2: stages before file-system events ---------------------------------------------------------------------

TRAIN = ["--context", "32", "--seed", "0", "--epochs", "0.5", "--learning-rate", "0.01"]


def stages(home: Path) -> dict[str, list[str]]:
    """The command line of each stage without --out; a stage may read the artefacts of those before it."""

    def made(name: str) -> str:
        return str(home / "made" / name)

    def model(width: int) -> str:
        train = {"epochs": 0.3, "learning_rate": 0.01}
        plain = {
            "family": "t",
            "tokenizer": "tokenizer",
            "architecture": "gpt2",
            "width": width,
            "layers": 1,
            "heads": 2,
        }
        return json.dumps(plain | {"corpus": "corpus", "train": train})

    texts = {split: str(home / f"{split}.txt") for split in ("train", "valid", "test")}
    tokens, keys = ["--tokens", made("tokens")], ["--datastore", made("datastore"), "--index", made("index")]
    from_scratch = ["--tokenizer", made("tokenizer"), *tokens, "--context", "32"]
    windows = ["--context", "32", "--stride", "16"]
    best = ["--keep-best", "--evaluate-every", "0.25"]
    linked = json.dumps({"family": "t", "tokenizer": "tokenizer", "pretrained": made("model")})
    return {
        "corpus": ["corpus", "--spec", json.dumps({"source": "files", "paths": texts, "min_bytes": 200})],
        "tokenizer": ["tokenizer", "--spec", '{"train_on": ["corpus"], "vocab_size": 300}', "--corpus", made("corpus")],
        "other-tokenizer": ["tokenizer", "--spec", '{"train_on": ["corpus"], "vocab_size": 290}', "--corpus", made("corpus")],
        "tokens": ["tokens", "--tokenizer", made("tokenizer"), "--corpus", made("corpus")],
        "model": ["model", "--spec", model(16), *from_scratch],
        "small": ["model", "--spec", model(8), *from_scratch],
        "linked": ["model", "--spec", linked, "--tokenizer", made("tokenizer")],
        "finetune": ["finetune", "--model", made("model"), *tokens, *TRAIN, *best],
        "lora": ["lora", "--model", made("model"), *tokens, *TRAIN, "--rank", "2"],
        "datastore": ["datastore", "--model", made("model"), *tokens, *windows],
        "index": ["index", "--datastore", made("datastore"), "--kind", "ivfflat", "--centroids", "8"],
        "targets": ["targets", *keys, *tokens, "--neighbours", "8", "--nprobe", "4"],
        "teacher": ["teacher", "--model", made("model"), *tokens, *windows],
        "passages": ["passages", *tokens, "--passage", "8"],
        "train": ["train", "--model", made("small"), *tokens, "--targets", made("targets"), *TRAIN],
        "train-best": [
            "train", "--model", made("small"), *tokens, "--targets", made("targets"), *TRAIN, *best, "--base", made("model"),
        ],
        "adapt-vocab": ["adapt-vocab", "--memory", made("train"), "--tokenizer", made("other-tokenizer"), "--seed", "0"],
        "evaluate": [
            "evaluate", "--base", made("model"), "--corpus", made("corpus"), *windows, "--memory", made("train"),
            "--resamples", "20",
        ],
        "score": ["score", "--memory", made("train"), "--corpus", made("corpus"), *windows],
        "base": ["evaluate", "--base", made("model"), "--corpus", made("corpus"), *windows, "--resamples", "20"],
        "mix": ["mix", "--base", made("base"), "--scored", made("score"), "--resamples", "20"],
    }  # fmt: skip


Event = tuple[str, str]  # what happens, path inside the output folder


def watch(out: Path, at: int | None, told: Path | None) -> None:
    """Count the file-system events in a folder; kill this process before event number `at`, or write all to `told`.

    A file opened for writing is two events: before it, and when it is there without a byte.
    """
    import safetensors.torch
    import torch

    events: list[Event] = []
    inside = str(out)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    folders = {"os.mkdir": 2, "os.rmdir": 1, "os.remove": 1}  # event -> argument with the folder's descriptor

    def where(path: Any, folder: Any = None) -> str:
        name = os.fsdecode(path)
        if not os.path.isabs(name) and isinstance(folder, int) and folder >= 0:
            name = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
        return os.path.abspath(name)

    def happens(what: str, path: str) -> None:
        if len(events) == at or (path != inside and not path.startswith(f"{inside}{os.sep}")):
            return
        events.append((what, os.path.relpath(path, inside)))
        if len(events) == at:
            if what == "empty":
                os.close(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY))
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and not isinstance(arguments[0], int) and arguments[2] & writing:
            path = where(arguments[0])
            happens("write", path)
            if arguments[2] & os.O_TRUNC:
                happens("empty", path)
        elif event in folders:
            happens(event.removeprefix("os."), where(arguments[0], arguments[folders[event]]))
        elif event in ("os.rename", "os.symlink", "os.link"):
            happens(event.removeprefix("os."), where(arguments[1]))

    def watched(what: str, function: Callable[..., Any], place: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which Python does not announce, as an event."""

        def call(*arguments: Any, **named: Any) -> Any:
            path = place(*arguments, **named)
            if path is not None:
                happens(what, path)
                if what == "write":
                    happens("empty", path)
            return function(*arguments, **named)

        return call

    def descriptor(file: Any) -> str:
        return os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}")

    def second(_: Any, path: Any, *rest: Any, **named: Any) -> str | None:
        return where(path) if isinstance(path, str | os.PathLike) else None

    os.fsync = watched("fsync", os.fsync, descriptor)
    torch.save = watched("write", torch.save, second)
    safetensors.torch.save_file = watched("write", safetensors.torch.save_file, second)
    sys.addaudithook(hook)
    if told is not None:
        import atexit

        atexit.register(lambda: told.write_text(json.dumps(events)))


def forked(words: Sequence[str], out: Path, log: Path, at: int | None = None, told: Path | None = None) -> int:
    """Exit status of `memdec WORDS --out OUT` in a forked process, which has all imports already; -9 if it was killed."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with log.open("ab") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            signal.alarm(PATIENCE)
            sys.argv = ["memdec", *words, "--out", str(out)]
            watch(out, at, told)
            from memdec import cli

            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            if told is not None and code == 0:
                import atexit

                atexit._run_exitfuncs()
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def content(folder: Path) -> dict[str, Any]:
    """What an artefact holds: the hash of each file, and its manifest without versions and sizes."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name in (".memdec.lock", ".memdec") or any(path.match(each) for each in TIMES):
            continue
        if name == "manifest.json":
            whole = json.loads(path.read_text())
            found[name] = {key: whole[key] for key in ("kind", "version", "recipe", "settings", "inputs", "facts")}
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


def chosen(events: dict[str, list[Event]], n_kills: int, rng: random.Random) -> list[tuple[str, int]]:
    """(stage, number of the event, from 1): the stages in turn, each with its event of the kind that was rarest so far."""
    known = {stage: list(enumerate(each, 1)) for stage, each in events.items()}
    seen: dict[Event, int] = {}
    found: list[tuple[str, int]] = []

    def kind(event: Event) -> Event:
        return event[0], re.sub(r"[0-9a-f]{16,}|\d+", "", event[1])

    while len(found) < n_kills and any(known.values()):
        for stage, left in known.items():
            if left and len(found) < n_kills:
                rng.shuffle(left)
                left.sort(key=lambda each: -seen.get(kind(each[1]), 0))
                number, event = left.pop()
                seen[kind(event)] = seen.get(kind(event), 0) + 1
                found.append((stage, number))
    return sorted(found, key=lambda each: (list(events).index(each[0]), each[1]))


def stage_kill(home: Path, stage: str, event: int, right: dict[str, Any]) -> str:
    """Kill one stage at one event, run it again, and say what came of it."""
    out, log = home / "made" / f"{stage}.{event}", home / "logs" / f"{stage}.{event}.txt"
    shutil.rmtree(out, ignore_errors=True)
    log.unlink(missing_ok=True)
    words = stages(home)[stage]
    if forked(words, out, log, at=event) != -signal.SIGKILL:
        return "NOT KILLED"
    code = forked(words, out, log)
    if code != 0:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return f"FAILED ({code}): {lines[-1][:200] if lines else ''}"
    now = content(out)
    differ = sorted(name for name in now.keys() | right.keys() if now.get(name) != right.get(name))
    if differ:
        return f"ANOTHER RESULT: {', '.join(differ)}"
    shutil.rmtree(out)
    return GOOD


def stage_kills(home: Path, n_kills: int, rng: random.Random) -> list[dict[str, Any]]:
    """Make every stage undisturbed, then kill each before some of its events, in two processes."""
    _import_all()
    (home / "logs").mkdir(parents=True, exist_ok=True)
    (home / "events").mkdir(exist_ok=True)
    _texts(home)
    for stage, words in stages(home).items():
        out, told = home / "made" / stage, home / "events" / f"{stage}.json"
        out.parent.mkdir(exist_ok=True)
        if not told.is_file():
            shutil.rmtree(out, ignore_errors=True)
            log = home / "logs" / f"{stage}.txt"
            if forked(words, out, log, told=told) != 0:
                raise SystemExit(f"the undisturbed stage {stage} failed: {log.read_text(errors='replace')[-500:]}")
    events = {stage: json.loads((home / "events" / f"{stage}.json").read_text()) for stage in stages(home)}
    jobs = chosen(events, n_kills, rng)
    workers = []
    for worker in range(2):
        pid = os.fork()
        if pid == 0:
            for stage, number in jobs[worker::2]:
                file = home / "events" / f"{stage}.{number}.txt"
                if not file.is_file() or file.read_text() != GOOD:
                    file.write_text(stage_kill(home, stage, number, content(home / "made" / stage)))
            os._exit(0)
        workers.append(pid)
    for pid in workers:
        os.waitpid(pid, 0)
    found = []
    for stage, number in jobs:
        file, event = home / "events" / f"{stage}.{number}.txt", " ".join(events[stage][number - 1])
        after = file.read_text() if file.is_file() else "NO ANSWER"
        found.append({"stage": stage, "event": f"{number} {event}", "after": after})
    return found


def _import_all() -> None:
    """Import once what every stage needs; the forked processes then start in milliseconds."""
    import datasets
    import lm_eval
    import peft
    import torch
    import transformers
    from lm_eval.models import huggingface

    from memdec.datastore import index, keys, passages, targets, teacher
    from memdec.harness import models
    from memdec.results import evaluate
    from memdec.training import adapt_vocab, stages

    del datasets, lm_eval, peft, transformers, huggingface, index, keys, passages, targets, teacher, models, evaluate
    del adapt_vocab, stages
    torch.set_num_threads(1)


def _texts(home: Path) -> None:
    from making import made_text

    for seed, (split, n_documents) in enumerate((("train", 60), ("valid", 8), ("test", 8))):
        (home / f"{split}.txt").write_text(made_text(n_documents, seed))


# --- both ---------------------------------------------------------------------------------------------------------


def main() -> int:
    """Run both parts, print what came of each kill, and return 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "build" / "kill", help="folder for all runs")
    parser.add_argument("--runs", type=int, default=20, help="kills of the reduced run")
    parser.add_argument("--events", type=int, default=60, help="kills of stages")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    home = given.folder.resolve()
    home.mkdir(parents=True, exist_ok=True)
    parts: list[tuple[str, Callable[..., list[dict[str, Any]]], int]] = [
        ("runs", run_kills, given.runs), ("stages", stage_kills, given.events),
    ]  # fmt: skip
    failed = n = 0
    for name, part, n_kills in parts:
        if not n_kills:
            continue
        begin = time.monotonic()
        for each in part(home / name, n_kills, random.Random(given.seed)):
            print(" | ".join(str(value) for value in each.values()))
            failed += each["after"] != GOOD
            n += 1
        print(f"{name}: {time.monotonic() - begin:.0f} s")
    print(f"{n} kills, {failed} failed")
    if not failed:
        shutil.rmtree(home)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
