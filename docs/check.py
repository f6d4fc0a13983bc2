"""The commands of the documentation: `python -m docs.check [--static] [PAGE ...]`.

Every fenced `bash` or `python` block of README.md, docs/, config/ and harness_tasks/ is run in a scratch folder that has
what `make table3` makes, only smaller (`PREPARED`). A block that is not run says why in a comment before it:

    <!-- not run: needs the Hub -->
    <!-- run by: tests/workflow/test_workflow.py::test_a_tiny_run_from_nothing -->    a test or `make TARGET` that exists

`<!-- file: my.yaml -->` before a `yaml` block writes it into the scratch folder. Of every command, run or not, the static
part (`--static`, seconds, also a test) checks what can be known: subcommands, options, tasks, configs, targets of make,
imports, and the links between the pages.
"""

import argparse
import ast
import importlib
import inspect
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CHANGELOG.md", *(f"{folder}/**/*.md" for folder in ("docs", "config", "harness_tasks"))]
NOTE = re.compile(r"<!-- (not run|run by|file): (.+) -->")
COMMANDS = (
    "memdec",
    "snakemake",
    "lm_eval",
    "make",
    "pip",
    "python",
    "torchrun",
    "accelerate",
    "bash",
    "conda",
    "pytest",
)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
# Folders of the mini scale that the pages name, made in one process; the numbers mean nothing. `memdec` command, its --spec.
SPLITS = {"train": 16000, "valid": 3000, "test": 3000}
MODEL: dict[str, Any] = {"family": "GPT-2", "tokenizer": "bpe2k", "architecture": "gpt2", "heads": 2, "layers": 2}
MODEL |= {"corpus": "general", "train": {"epochs": 0.5}}
FROM = "--tokenizer tokenizers/bpe2k --tokens tokens/bpe2k/general --context 128"
PREPARED: list[tuple[str, dict[str, Any]]] = [
    ("corpus --out corpora/general", {"source": "docstrings", "packages": ["networkx"], "max_bytes": SPLITS}),
    ("corpus --out corpora/torch", {"source": "docstrings", "packages": ["nltk"], "max_bytes": SPLITS}),
    (
        "tokenizer --corpus corpora/general --corpus corpora/torch --out tokenizers/bpe2k",
        {"train_on": ["general", "torch"], "vocab_size": 400},
    ),
    ("tokens --tokenizer tokenizers/bpe2k --corpus corpora/general --out tokens/bpe2k/general", {}),
    ("tokens --tokenizer tokenizers/bpe2k --corpus corpora/torch --out tokens/bpe2k/torch", {}),
    (f"model {FROM} --out models/gpt2-S", MODEL | {"width": 16}),
    (f"model {FROM} --out models/gpt2-L", MODEL | {"width": 32}),
    (
        "train --model models/gpt2-S --tokens tokens/bpe2k/torch --objective ce --epochs 1 --context 128 --seed 0 "
        "--out torch/seed0/memory/memdec",
        {},
    ),
]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: Path from the root.
        line: Number of its first line.
        language: Word after the fence.
        text: What is between the fences.
        note: Kind of comment before it: "not run", "run by", "file" or "".
        words: Text of that comment.
    """

    page: str
    line: int
    language: str
    text: str
    note: str = ""
    words: str = ""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.language in ("bash", "python") and self.note in ("", "file")


def pages() -> list[str]:
    """All pages, from the root."""
    found = {path.relative_to(ROOT).as_posix() for glob in PAGES for path in ROOT.glob(glob)}
    return sorted(found, key=lambda page: (page.count("/"), page))


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, each with the comment before it."""
    found, begin, language, before = [], 0, "", ""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        fence = line.strip().startswith("```")
        if fence and not begin:
            begin, language = number, line.strip().removeprefix("```")
            note = NOTE.fullmatch(before)
        elif fence:
            text = "\n".join(lines[begin : number - 1]) + "\n"
            found.append(Block(page, begin + 1, language, text, *(note.groups() if note else ())))
            begin = 0
        before = line.strip() or before
    return found


# --- what can be known without running ------------------------------------------------------------------------------


def problems(names: list[str]) -> list[str]:
    """Everything that is wrong with these pages, one line each."""
    files = {block.words for page in pages() for block in blocks(page) if block.note == "file"}
    found = []
    for page in names:
        found += [*_indented(page), *_links(page), *_inline(page, files)]
        for block in blocks(page):
            found += [f"{block.place}: {text}" for text in (*_note(block), *_content(block, files))]
    return found


def _indented(page: str) -> Iterator[str]:
    inside = False
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        inside ^= line.strip().startswith("```")
        if not inside and line.startswith("    ") and line.split()[0] in COMMANDS:
            yield f"{page}:{number}: a command outside of a ```bash block is never checked"


def _inline(page: str, files: set[str]) -> Iterator[str]:
    """Commands between the words of a sentence."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in re.finditer(r"`((?:memdec|make) [a-z][^`<]*)`", text):
        for words in commands(found[1]):
            yield from (f"{page}: {problem}" for problem in _command(words, files))


def _anchors(path: Path) -> set[str]:
    """Headings as GitHub makes anchors of them."""
    heads = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def _links(page: str) -> Iterator[str]:
    for found in LINK.finditer((ROOT / page).read_text(encoding="utf-8")):
        link = found[1] or found[2]
        if ":" in link:
            continue
        name, _, anchor = link.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if not path.exists():
            yield f"{page}: link to {link}, which is not there"
        elif anchor and anchor not in _anchors(path):
            yield f"{page}: link to {link}, a heading that is not there"


def _note(block: Block) -> Iterator[str]:
    """A reason names something that exists."""
    if block.note != "run by":
        return
    for name in re.split(r",\s*", block.words):
        file, _, test = name.partition("::")
        if name.startswith("make "):
            if name.split()[1] not in _targets():
                yield f"says that `{name}` runs it; the Makefile has no such target"
        elif not (ROOT / file).is_file() or (test and f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8")):
            yield f"says that {name} runs it, which is not there"


def _content(block: Block, files: set[str]) -> Iterator[str]:
    if block.language == "yaml":
        try:
            yaml.safe_load(block.text)
        except yaml.YAMLError as error:
            yield f"no YAML: {error}"
    elif block.language == "python":
        yield from _imports(block.text)
    elif block.language == "bash":
        for words in commands(block.text):
            yield from _command(words, files)
    elif block.language != "text":
        yield f"a block of {block.language or 'no language'}; expected bash, python, yaml or text"


def _imports(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("memdec"):
            module = importlib.import_module(node.module)
            yield from (f"{node.module} has no {a.name}" for a in node.names if not hasattr(module, a.name))


def commands(text: str) -> list[list[str]]:
    """The simple commands of a block as words, without assignments before them."""
    found: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.commenters, lexer.whitespace_split = "#", True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|"):
                found.append(words)
                words = []
            elif words or not re.match(r"\w+=", word):
                words.append(word)
    return [words for words in found if words]


def _command(words: list[str], files: set[str]) -> Iterator[str]:
    """What is wrong with one command."""
    name = words[0].rpartition("/")[2]
    if "memdec.cli" in words:  # torchrun ... -m memdec.cli train ...
        words, name = ["memdec", *words[words.index("memdec.cli") + 1 :]], "memdec"
    if name == "memdec":
        yield from _memdec(words[1:])
    elif name == "lm_eval" or "lm_eval" in words:
        yield from _lm_eval(words[words.index("lm_eval") + 1 :] if "lm_eval" in words else words[1:])
    elif name == "make":
        wrong = [w for w in words[1:] if "=" not in w and w not in _targets()]
        yield from (f"make {word}: the Makefile has no such target" for word in wrong)
    elif name == "snakemake":
        configs = [w for w in words if re.search(r"\.ya?ml$", w)]
        yield from (f"{w}: no such config" for w in configs if w not in files and not (ROOT / w).is_file())
        yield from _taken_for_configs(words)
    elif name in ("python", "bash") and len(words) > 1:
        script = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
        if script.split("/")[0] in ("docs", "benchmarks", "tests") and not (ROOT / script).is_file():
            yield f"{script}: no such file"


def _taken_for_configs(words: list[str]) -> Iterator[str]:
    """--configfile takes every word up to the next option, a target too."""
    given = itertools.dropwhile(lambda word: word not in ("--configfile", "--configfiles"), words)
    for word in itertools.takewhile(lambda word: not word.startswith("-"), itertools.islice(given, 1, None)):
        if not re.search(r"\.(ya?ml|json)$", word):
            yield f"{word}: is taken for a config file; put -- before the targets"


def _targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def _given(words: list[str]) -> Iterator[str]:
    """Options among the words, without their values."""
    return (word.partition("=")[0] for word in words if word.startswith("--") and word != "--")


def _memdec(words: list[str]) -> Iterator[str]:
    import typer

    from memdec.cli import app

    command: Any = typer.main.get_command(app)
    trail = "memdec"
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        trail += f" {words[0]}"
        if words[0] not in command.commands:
            yield f"{trail}: no such command"
            return
        command, words = command.commands[words[0]], words[1:]
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
    yield from (f"{trail} {option}: no such option" for option in _given(words) if option not in known)


def _lm_eval(words: list[str]) -> Iterator[str]:
    values = dict(itertools.pairwise(words))
    tasks = {name for path in (ROOT / "harness_tasks").rglob("*.yaml") for name in _task_names(path)}
    for task in values.get("--tasks", "").split(","):
        if task.startswith(("memdec", "dcpmi", "pubmedqa")) and task not in tasks:
            yield f"lm_eval --tasks {task}: no such task in harness_tasks"
    model = values.get("--model", "hf")
    if model in ("hf", "vllm"):
        return
    kind = _lm_eval_models().get(model)
    if kind is None:
        yield f"lm_eval --model {model}: no such model"
        return
    known = {name for each in kind.__mro__ for name in inspect.signature(each.__init__).parameters}
    given = [each.partition("=")[0] for each in values.get("--model_args", "").split(",") if each]
    yield from (f"lm_eval --model {model}: no argument {name}" for name in given if name not in known)


def _task_names(path: Path) -> list[str]:
    return re.findall(r"^(?:task|group|tag): *([\w-]+) *$", path.read_text(encoding="utf-8"), re.MULTILINE)


def _lm_eval_models() -> dict[str, Any]:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    entries = project["entry-points"]["lm_eval.models"]
    places = {name: place.split(":") for name, place in entries.items()}
    return {name: getattr(importlib.import_module(module), kind) for name, (module, kind) in places.items()}


# --- running --------------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """This interpreter's commands, this tree's modules, no network."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    modules = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    plain = {"PATH": path, "PYTHONPATH": modules, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **plain, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}


def bash(script: str, folder: Path) -> tuple[float, str]:
    """Seconds, and what it printed where it failed, else nothing."""
    begin = time.monotonic()
    command = ["bash", "-euo", "pipefail", "-c", script]
    run = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    return time.monotonic() - begin, (run.stdout + run.stderr)[-3000:] if run.returncode else ""


def prepare(folder: Path) -> tuple[float, str]:
    """The tree by links, a text of one's own, and what `make table3` makes, only smaller."""
    for path in ROOT.iterdir():
        if path.name not in ("results", "build") and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    (folder / "results").mkdir()
    (folder / "results" / "reference").symlink_to(ROOT / "results" / "reference")
    (folder / "text").mkdir()
    own = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    (folder / "text" / "notes.txt").write_text("\n\n".join(own), encoding="utf-8")
    return bash("mkdir results/mini && cd results/mini && python -c 'import docs.check; docs.check.make()'", folder)


def make() -> None:
    """`PREPARED`, here."""
    from memdec.cli import app

    for words, spec in PREPARED:
        app([*words.split(), *(["--spec", json.dumps(spec)] if spec else [])], standalone_mode=False)


def run_page(page: str, folder: Path) -> list[str]:
    """Run what a page has to run, in its order; variables that a block sets hold for those after it."""
    failed, variables = [], ""
    for block in blocks(page):
        if block.note == "file":
            (folder / block.words).write_text(block.text, encoding="utf-8")
        if not block.runs:
            continue
        script = f"python - << 'EOF'\n{block.text}EOF\n" if block.language == "python" else block.text
        wall_s, output = bash(variables + script, folder)
        print(f"{'FAILED' if output else 'ran'}  {block.place}  {wall_s:.0f} s  {_first(block)}", flush=True)
        if output:
            failed.append(f"{block.place}: {output}")
        variables += "".join(f"{line}\n" for line in block.text.splitlines() if re.match(r"(export )?\w+=\S*$", line))
    return failed


def _first(block: Block) -> str:
    return next((line.strip() for line in block.text.splitlines() if line.strip() and line[0] != "#"), "")[:70]


def main() -> int:
    """Exit 1 where a page is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--static", action="store_true", help="run nothing")
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="default: all")
    arguments = parser.parse_args()
    names = arguments.pages or pages()
    failed = problems(names)
    each = [block for page in names for block in blocks(page)]
    if not arguments.static and not failed:
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(2) as pool:
            wall_s, output = prepare(Path(scratch))
            print(f"{'FAILED' if output else 'ran'}  preparation  {wall_s:.0f} s", flush=True)
            done = [] if output else pool.map(lambda page: run_page(page, Path(scratch)), names)
            failed = [output] if output else [text for texts in done for text in texts]
        for block in each:
            if block.note in ("not run", "run by"):
                print(f"{block.note}  {block.place}  {_first(block)}  ({block.words})")
        n_run = sum(block.runs for block in each)
        n_not = sum(block.note in ("not run", "run by") for block in each)
        print(f"{n_run} blocks run, {n_not} not run for the reasons above, {time.monotonic() - begin:.0f} s")
    print("\n".join(failed), file=sys.stderr, end="\n" if failed else "")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
