"""The command line: whatever is given, one line that helps; choices, last lines, JSON, entries by options, Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from making import made_text, run_memdec

from docs import check as docs_check
from memdec import cli, plain
from memdec.artefacts import artefact
from memdec.errors import ArtifactError

ROOT = Path(__file__).resolve().parents[2]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which a command refuses its input."""
    code, out, err = run_memdec(capsys, *words)
    lines = [line for line in err.splitlines() if "it/s]" not in line]
    assert (code, out) == (2, ""), (words, out, err)
    assert len(lines) == 1, (words, err)
    assert lines[0].startswith("error: "), err
    return lines[0]


# --- options ------------------------------------------------------------------------------------------------------


def groups() -> dict[str, Any]:
    app: Any = typer.main.get_command(cli.app)
    found = dict(app.commands)
    data = found.pop("data")
    return found | {f"data {name}": each for name, each in data.commands.items()}


def test_help_shows_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    """rich took `[a | b]` for markup, and showed none."""
    for name in ("train", "datastore", "tune", "sweep", "adapt-vocab", "index"):
        code, out, _ = run_memdec(capsys, name, "-h")
        assert code == 0
        choices = {
            "train": "hybrid|kl|ce|focal|jsd|bild|sparsity",
            "datastore": "float16|bfloat16|float32",
            "tune": "auto|float32|bfloat16|float16",
            "sweep": "train|valid|test",
            "adapt-vocab": "copy|random",
            "index": "exact|cells|ivfflat|ivfpq",
        }
        assert choices[name] in out, out


@pytest.mark.parametrize("command", ["tune", "sweep"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dtype", "bf16"], "'bf16' is not one of 'auto', 'float32', 'bfloat16', 'float16'"),
        (["--precision", "half"], "'half' is not one of"),
        (["--device", "gpu"], "'gpu' is not one of 'auto', 'cpu', 'cuda'"),
        (["--device", "cuda:9"], "'cuda:9' is not one of"),
        (["--split", "dev"], "'dev' is not one of 'train', 'valid', 'test'"),
        (["--batch-size", "0"], "--batch-size"),
        (["--batch-size", "x"], "--batch-size"),
        (["--alpha", "1.5"], "--alpha"),
        (["--alpha", "nan"], "--alpha"),
        (["--device", "cuda"], "device: expected at least 1 CUDA device"),
        (["--dtpye", "float32"], "--dtpye"),
    ],
)
def test_values_that_tune_and_sweep_cannot_take(
    command: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    own = ["--out", "o", "--task", "memdec_ppl"] if command == "sweep" else []
    assert message in refused(capsys, command, "--base", "b", "--memory", "m", "--corpus", "c", *own, *words)


@pytest.mark.parametrize("flag", ["--seed", "--context", "--stride", "--shard"])
def test_numbers_out_of_range(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["datastore", "--model", "m", "--tokens", "t", "--out", "o", "--context", "8", "--stride", "4"]
    if flag == "--seed":
        words = ["finetune", "--model", "m", "--tokens", "t", "--out", "o", "--context", "8", "--seed", "0"]
    for value in ("-1", "1e3", "9" * 30 if flag == "--seed" else "-5", "nan"):
        assert flag in refused(capsys, *words, flag, value)


def arguments(command: Any, place: str) -> list[str]:
    """Words for a command's required parameters, with `place` for each path."""
    found: list[str] = []
    for parameter in command.params:
        if not parameter.required:
            continue
        value = "8" if parameter.name in ("context", "stride", "seed") else place
        value = "made" if parameter.name == "out" and place == "nothing" else value
        found += [value] if parameter.param_type_name == "argument" else [parameter.opts[0], value]
    return found


@pytest.mark.parametrize("place", ["nothing", "folder", "file", "file/below", "nul\0"])
def test_every_command_refuses_what_is_not_there_or_of_another_kind(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same wrong path for everything that a command needs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"\x00\xff not text")
    n_tried = 0
    for name, command in groups().items():
        extra = {"table": ["--name", "table3"], "latency": [], "explain": ["some text"]}.get(name, [])
        words = arguments(command, place)
        if name == "data fetch" or (name == "data verify" and place == "folder"):
            continue
        if name == "data verify":
            words = [place]
        if name in ("schema", "doctor") and place in {"schema": ("nothing", "file"), "doctor": ("folder",)}[name]:
            continue
        if name == "doctor":
            words = [place]
        code, out, err = run_memdec(capsys, *name.split(), *words, *extra)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code in (1, 2), (name, words, out, err)
        assert len(lines) == 1 or name == "data verify", (name, words, err)
        assert "Traceback" not in err
        n_tried += 1
    assert n_tried >= 20


@pytest.mark.parametrize("kind", ["memory", "evaluation", "scores", "calibration", "index"])
def test_what_is_missing_is_made_by_a_command_that_exists(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, found in (("nowhere", "nothing"), ("file", "a file")):
        with pytest.raises(ArtifactError, match=f"found {found}; run `memdec .*` first$") as caught:
            artefact.read(tmp_path / name, kind)
        assert str(caught.value).split("`")[1].removeprefix("memdec ") in groups()


def test_what_only_plans_a_run_is_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    """`memdec model --parameters 5` asked for fields of `shape` that no option could give."""
    for command, flag in (("corpus", "--expected-bytes"), ("model", "--parameters"), ("model", "--vocabulary")):
        assert f"No such option: {flag}" in refused(capsys, command, "--out", "o", flag, "5")


def test_help_version_and_completion(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_memdec(capsys, "--version")[:2] == (0, "memdec 0.1.0\n")
    for words in (["-h"], ["--help"]):
        code, out, _ = run_memdec(capsys, *words)
        assert code == 0
        assert "--install-completion" in out
    for name in groups():
        assert run_memdec(capsys, *name.split(), "-h")[0] == 0
    run = subprocess.run([sys.executable, "-m", "memdec", "--version"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "memdec 0.1.0\n")


# --- entries by options, last lines, JSON ---------------------------------------------------------------------------


def test_corpus_and_tokenizer_by_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same artefacts as by --spec, and the commands say what they wrote and what comes next."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(made_text(300, 0))
    words = ["corpus", "--source", "files", "--path", "text.txt", "--min-bytes", "99", "--max-bytes", "train=9000"]
    code, _, err = run_memdec(capsys, *words, "--max-bytes", "test=5000", "--out", "c")
    assert code == 0, err
    assert re.search(r"wrote c \(corpus; documents: train \d+, valid \d+, test \d+\)\. Next: memdec tokenizer", err)
    spec = {"source": "files", "path": "text.txt", "min_bytes": 99, "max_bytes": {"train": 9000, "test": 5000}}
    assert run_memdec(capsys, "corpus", "--spec", json.dumps(spec), "--out", "d")[0] == 0
    assert artefact.read(Path("c"), "corpus").recipe == artefact.read(Path("d"), "corpus").recipe
    assert "found finished: d (corpus" in run_memdec(capsys, "corpus", "--spec", json.dumps(spec), "--out", "d")[2]

    code, _, err = run_memdec(capsys, "tokenizer", "--train-on", "c", "--vocab-size", "300", "--out", "t")
    assert code == 0, err
    assert "wrote t (tokenizer; vocab size: 300). Next: memdec tokens --tokenizer t" in err
    spec = {"train_on": ["c"], "vocab_size": 300}
    assert run_memdec(capsys, "tokenizer", "--spec", json.dumps(spec), "--corpus", "c", "--out", "u")[0] == 0
    assert artefact.read(Path("t"), "tokenizer").recipe == artefact.read(Path("u"), "tokenizer").recipe

    for words, message in (
        (["--out", "x"], "expected the options of an entry or --spec, found neither"),
        (["--source", "files", "--spec", "{}", "--out", "x"], "found both (--spec, --source)"),
        (["--source", "file", "--out", "x"], "'file' is not one of 'docstrings', 'files', 'hub'"),
        (["--source", "files", "--paths", "a.txt", "--out", "x"], "--paths: expected SPLIT=VALUE, found a.txt"),
        (
            ["--source", "files", "--paths", "valid=a", "--paths", "valid=b", "--out", "x"],
            "--paths: expected each split once, found valid=a valid=b",
        ),
        (["--source", "files", "--path", "a", "--packages", "b", "--out", "x"], "packages: unknown key"),
        (["--path", "a", "--out", "x"], "source"),
        (["--source", "files", "--path", "none.txt", "--out", "x"], "none.txt: expected text files, found none"),
    ):
        assert message in refused(capsys, "corpus", *words)


def test_a_model_by_options(
    base_folder: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    code, _, err = run_memdec(
        capsys,
        "model",
        "--pretrained",
        str(base_folder),
        "--tokenizer",
        str(tokenizer_folder),
        "--out",
        str(tmp_path / "m"),
    )
    assert code == 0, err
    assert "wrote" in err
    made: dict[str, Any] = {}
    monkeypatch.setattr("memdec.training.stages.run_pretrain", lambda spec, *_, **__: made.update(spec=spec))
    words = ["model", "--tokenizer", "bpe", "--tokens", "t/general", "--out", "o", "--architecture", "qwen2"]
    words += ["--width", "16", "--layers", "2", "--heads", "2", "--learning-rate", "0.01", "--keep-best", "--seed", "3"]
    assert run_memdec(capsys, *words)[0] == 0
    spec = made["spec"].model_dump(exclude_unset=True)
    assert spec == {
        "family": "o", "tokenizer": "bpe", "architecture": "qwen2", "width": 16, "layers": 2, "heads": 2,
        "corpus": "general", "train": {"learning_rate": 0.01, "keep_best": True}, "seed": 3,
    }  # fmt: skip


def test_json_where_a_program_may_read_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ROOT / "results" / "reference" / "mini"
    code, out, err = run_memdec(capsys, "doctor", str(tmp_path), "--json")
    assert (code, json.loads(out)["n_damaged"]) == (0, 0), err
    mini = str(ROOT / "config" / "mini.yaml")
    assert json.loads(run_memdec(capsys, "validate", mini, "--json")[1]) == {"valid": True, "problems": []}
    (tmp_path / "a.yaml").write_text("strid: 3\n")
    code, out, err = run_memdec(capsys, "validate", mini, str(tmp_path / "a.yaml"), "--json")
    assert (code, json.loads(out)["valid"]) == (2, False)
    assert json.loads(out)["problems"] == ["strid: unknown key; did you mean stride?, found 3"]
    (tmp_path / "a.yaml").write_text("a: [")
    code, out, err = run_memdec(capsys, "validate", str(tmp_path / "a.yaml"), "--json")
    assert (code, json.loads(out)["valid"], err.count("\n")) == (2, False, 1)
    table, base = folder / "table3.csv", tmp_path / "base.json"
    code, _, err = run_memdec(capsys, "check", str(table), "--baseline", str(base), "--update", "--reason", "first")
    assert code == 0, err
    assert f"wrote {base}. Next: memdec check" in err
    code, out, _ = run_memdec(capsys, "check", str(table), "--baseline", str(base), "--json")
    assert (code, json.loads(out)["moved"]) == (0, False)
    base.write_text("[" * 10_000 + "]" * 10_000)
    assert "nested" in refused(capsys, "check", str(table), "--baseline", str(base))
    code, out, err = run_memdec(capsys, "data", "verify", str(tmp_path), "--json")
    assert {each["status"] for each in json.loads(out)["files"]} == {"missing"}
    assert "Next: " in err


# --- stopping -----------------------------------------------------------------------------------------------------


def stopped(folder: Path, code: str, number: int = signal.SIGINT) -> tuple[int, str]:
    """Run Python that prints `ready` and is then stopped; exit code and standard error."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )  # fmt: skip
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    time.sleep(0.1)
    run.send_signal(number)
    _, err = run.communicate(timeout=30)
    return run.returncode, err


SLOW = "def slow(*_, **__):\n    print('ready', flush=True)\n    time.sleep(20)\n"


@pytest.mark.parametrize(
    "code",
    [
        # a stage
        "from memdec.text import corpora\ncorpora.run = slow\nwords = ['corpus', '--source', 'files', '--path', 'x', '--out', 'o']",
        # a check
        "from memdec.results import regression\nregression.compare = slow\nwords = ['check', 'a.csv', '--baseline', 'b']",
        "from memdec.artefacts import doctor\ndoctor.run = slow\nwords = ['doctor', '.']",
    ],
)
def test_ctrl_c_ends_with_130_and_one_line(code: str, tmp_path: Path) -> None:
    """A command that was stopped was reported as done: exit code 0."""
    whole = f"import sys, time\n{SLOW}{code}\nsys.argv = ['memdec', *words]\nfrom memdec.__main__ import main\nmain()"
    assert stopped(tmp_path, whole) == (130, "interrupted; the same command goes on from what is finished\n")
    old = whole.replace("memdec.__main__", "memdec.cli")  # the console script of an older installation
    assert stopped(tmp_path, old)[0] == 130


def test_ctrl_c_during_the_imports(tmp_path: Path) -> None:
    code = (
        f"import sys, time\n{SLOW}class Finder:\n    def find_spec(self, name, path=None, target=None):\n"
        "        slow() if name == 'typer' else None\n"
        "sys.meta_path.insert(0, Finder())\nfrom memdec.__main__ import main\nmain()"
    )
    assert stopped(tmp_path, code) == (130, "interrupted; the same command goes on from what is finished\n")


# --- pages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "n_problems"),
    [
        ("snakemake --cores all --configfile my.yaml results/table3.csv", 1),
        ("snakemake --configfiles config/mini.yaml config/gpu-tiny.yaml results/table1.csv results/memories.csv", 2),
        ("snakemake --cores all --configfile config/mini.yaml -- results/table3.csv", 0),
        ("snakemake results/table3.csv --configfile config/mini.yaml", 0),
        ("snakemake --configfile config/mini.yaml --cores 8 results/table3.csv", 0),
    ],
)
def test_a_target_that_snakemake_takes_for_a_config_is_found(
    text: str, n_problems: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("Makefile", "config", "harness_tasks", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my.yaml").write_text("")
    monkeypatch.setattr(docs_check, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text(f"```bash\n{text}\n```\n")
    found = docs_check.problems(["README.md"])
    assert len(found) == n_problems, found
    assert all("is taken for a config file; put -- before the targets" in each for each in found)


def test_no_command_of_ours_gives_its_target_to_configfile() -> None:
    """Also where no page shows it: scripts, the Makefile, comments of configs, messages."""
    files = [ROOT / "Makefile", *(ROOT / "config").glob("*.yaml"), *ROOT.glob("tests/regression/*.sh")]
    files += [*ROOT.glob("benchmarks/*.sh"), *ROOT.glob("workflow/*.sh"), *(ROOT / "memdec").rglob("*.py")]
    n_found = 0
    for file in files:
        text = file.read_text(encoding="utf-8").replace("\\\n", " ").replace("\n#", " ")
        for found in re.finditer(r"--configfiles?\s+([^`\n]*)", text):
            n_found += 1
            taken = re.split(r"\s-", found[1])[0]
            assert "results/" not in taken, (file, found[0])
    assert n_found >= 10


def test_plain_reader_is_what_spec_uses(capsys: pytest.CaptureFixture[str]) -> None:
    deep = "[" * 5000 + "]" * 5000
    for spec in (
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        f'{{"a": {deep}}}',
        '{"a": ' + "9" * 6000 + "}",
        '{"a": "\\ud800"}',
        "[1",
    ):
        assert "--spec" in refused(capsys, "corpus", "--spec", spec, "--out", "o")
    assert plain.from_json('{"a": [1, 2.5, null, true, "x"]}', "here") == {"a": [1, 2.5, None, True, "x"]}
