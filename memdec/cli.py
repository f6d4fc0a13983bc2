"""Run one stage or one check of the Memory Decoder benchmark; `memdec COMMAND --help` lists the options.

Exit codes: 0 done, 1 a check found a difference, 2 bad input (one line on standard error), 3 results not comparable.
"""

import inspect
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from pydantic import BaseModel

from memdec import __version__, options
from memdec import config as cfg
from memdec.errors import ConfigError, MemDecError, on_one_line, reason
from memdec.settings import (
    AUTO,
    DEFAULT_MEMORY,
    AdaptSettings,
    CalibrateSettings,
    Compute,
    CorpusSpec,
    DatastoreSettings,
    EvaluateSettings,
    ExplainSettings,
    IndexSettings,
    LatencySettings,
    LoraSettings,
    MemorySettings,
    MixSettings,
    ModelSpec,
    PassageSettings,
    SampleSettings,
    ScoreSettings,
    ShapesSettings,
    Split,
    Suite,
    TargetSettings,
    TeacherSettings,
    TokenizerSpec,
    TrainSettings,
    parse,
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes [a|b] for markup and cuts long lists of choices
    context_settings={"help_option_names": ["-h", "--help"]},
    help=__doc__,
)

Out = Annotated[Path, typer.Option(help="output folder")]
Corpus = Annotated[Path, typer.Option(help="corpus folder")]
Model = Annotated[Path, typer.Option(help="model folder")]
Tokenizer = Annotated[Path, typer.Option(help="tokenizer folder")]
Tokens = Annotated[Path, typer.Option(help="token folder")]
Spec = Annotated[
    str | None,
    typer.Option(
        help="in the place of the options of an entry: the entry of the config as JSON, e.g. one of 'corpora'"
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="random seed")]
Context = Annotated[int, typer.Option(min=1, help="longest input of a model, in tokens (paper: 1024)")]
Datastore = Annotated[list[Path], typer.Option(help="datastore folder; repeat for every shard")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU if there is one")]
Shard = Annotated[int, typer.Option(min=0, help="number of this shard, from 0")]
Calibration = Annotated[
    Path | None, typer.Option(help="folder of `memdec calibrate`, whose choices replace the options given here")
]
BudgetModel = Annotated[Path | None, typer.Option(help="model whose training FLOPs set the budget")]
BudgetEpochs = Annotated[
    float, typer.Option(help="FLOP budget, in training epochs of --budget-model (paper: 1 epoch of a 7B model)")
]
TunedBy = Annotated[
    Path | None,
    typer.Option(help="the same training with another seed, whose choice among --learning-rates is taken"),
]
BaseName = Annotated[str, typer.Option(help="base model, folder or Hub id")]
MemoryName = Annotated[str, typer.Option(help="memory decoder, folder or Hub id")]
Alpha = Annotated[float, typer.Option(min=0, max=1, help="weight of the memory, from 0 to 1")]
Stride = Annotated[int, typer.Option(min=1, help="tokens scored per window (paper: 512)")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object, for programs")]

# Fields of an entry that are no options: the command takes them as folders or from their names, or they only plan a run.
LEFT_OUT = ("tokenizer", "corpus", "train_on", "disjoint_from", "shape", "expected_bytes")

# What comes after each command; {out} is what it wrote.
NEXT = {
    "corpus": "memdec tokenizer --corpus {out} --vocab-size 2048 --out ..., or memdec tokens --corpus {out} ...",
    "tokenizer": "memdec tokens --tokenizer {out} --corpus ... --out ...",
    "tokens": "memdec finetune --tokens {out} --model ... --out ...",
    "model": "memdec finetune --model {out} --tokens ... --out ...",
    "finetune": "memdec datastore --model {out} --tokens ... --out ...",
    "lora": "memdec evaluate --lora {out} --base ... --out ...",
    "datastore": "memdec index --datastore {out} --out ...",
    "index": "memdec targets --index {out} --datastore ... --out ...",
    "calibrate": "memdec targets --calibration {out} --datastore ... --index ... --tokens ... --out ...",
    "targets": "memdec train --targets {out} --model ... --out ...",
    "teacher": "memdec train --targets {out} --model ... --out ...",
    "passages": "memdec evaluate --passages {out} --base ... --out ...",
    "train": "memdec evaluate --memory {out} --base ... --out ..., or lm_eval --model memdec-interp",
    "adapt-vocab": "memdec train --model {out} --tokens ... --out ...",
    "evaluate": "memdec table --name table3 --cell DOMAIN:MODEL:SEED:{out} --config ... --out ...",
    "score": "memdec mix --scored {out} --base EVALUATION-OF-THE-BASE --out ...",
    "mix": "memdec table --name table3 --cell DOMAIN:MODEL:SEED:{out} --config ... --out ...",
    "harness": "memdec compare {out}, or memdec compare {out} ... for the difference of two systems",
    "sweep": "memdec tune --base ... --memory ... --corpus ..., which chooses alpha on valid text",
    "fidelity": "cat {out}/records.json",
    "shapes": "memdec figure --name figure5 --cell DOMAIN:MODEL:SEED:{out} --config ... --out ...",
    "latency": "docs/evaluate.md says how to read it",
}


def stage(
    settings: type[BaseModel] | None = None, entry: Any = None, torch: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command whose options are its parameters and the fields of `settings`.

    The function gets the fields as one object, its parameter `settings`. A parameter `compute` gets the options of
    `settings.Compute` in the same way. A command with `--out` also has `--overwrite`; without it, what was made there
    with other settings is kept. A stage that needs no torch is spared its import, which takes a second. With `entry`, a kind of entry of the config, the function gets a parameter `entry`: a
    function that makes it of the options given and of fields that the command fills in.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__.strip("_").replace("_", "-")
        takes = inspect.signature(function).parameters.values()
        own = [p for p in takes if p.name not in ("settings", "compute", "entry")]
        typed = {"settings": settings} if settings is not None else {}
        typed |= {"compute": Compute} if any(p.name == "compute" for p in takes) else {}
        of_entry = [] if entry is None else options.of_entry(entry, LEFT_OUT)

        def command(**values: Any) -> None:
            from memdec.artefacts import artefact

            begin = time.time()
            if torch:
                _limit_threads()
            replaces = values.pop("overwrite", False)
            arguments = {p.name: values.pop(p.name) for p in own}
            _check_numbers(arguments)
            for argument, kind in typed.items():
                given = {field: values[field] for field in kind.model_fields}
                arguments[argument] = parse(kind, given, f"memdec {name}")
            if entry is not None:
                given, spec = {p.name: values[p.name] for p in of_entry}, arguments.pop("spec")
                arguments["entry"] = lambda **known: options.entry(
                    entry, given, spec, known, f"memdec {name}", LEFT_OUT
                )
            with artefact.waiting() if replaces else artefact.keeping(), _on_device(name, arguments, torch):
                function(**arguments)
            if name in NEXT and "out" in arguments:
                options.wrote(arguments["out"], NEXT[name], begin)

        made = [*own, *options.of_fields(typed.values()), *of_entry]
        made += [_OVERWRITE] if any(p.name == "out" for p in own) else []
        command.__signature__ = inspect.Signature(made)  # type: ignore[attr-defined]
        command.__doc__ = function.__doc__
        app.command(name)(command)
        return function

    return register


def _on_device(name: str, arguments: dict[str, Any], torch: bool) -> AbstractContextManager[None]:
    """The context of a stage that may use a GPU: a missing one is reported at once, and a full one in one line."""
    if not torch:
        return nullcontext()
    from memdec.artefacts import devices

    if "compute" in arguments:
        devices.pick(arguments["compute"], spread=name in ("evaluate", "harness"))
    return devices.one_line_when_full(f"memdec {name}", arguments.get("settings"))


def _check_numbers(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, float) and not math.isfinite(each):
                raise ConfigError(f"--{name.replace('_', '-')}: expected a finite number, found {each}")


def _say(line: str) -> None:
    """A line for people, on standard error: standard output is for results."""
    print(line, file=sys.stderr)


_OVERWRITE = inspect.Parameter(
    "overwrite",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool,
        typer.Option("--overwrite", help="replace what other settings made in --out; wait for a process at work there"),
    ],
)


def _limit_threads() -> None:
    """Use only the threads that the caller (Snakemake) granted, not all of the machine's."""
    import torch

    granted = os.environ.get("OMP_NUM_THREADS")
    if granted and granted.isdigit():
        torch.set_num_threads(int(granted))


def _picked(device: str) -> Any:
    from memdec.artefacts import devices

    return devices.pick(parse(Compute, {"device": device}, "--device"))


@stage(entry=CorpusSpec, torch=False)
def corpus(
    entry: Callable[..., CorpusSpec],
    out: Out,
    spec: Spec = None,
    against: Annotated[list[Path], typer.Option(help="corpora that must not overlap; repeat")] = [],
) -> None:
    """Make a corpus: documents without duplicates, split into train, valid and test."""
    from memdec.text import corpora

    corpora.run(entry(), out, against)


@stage(entry=TokenizerSpec, torch=False)
def tokenizer(
    entry: Callable[..., TokenizerSpec],
    out: Out,
    spec: Spec = None,
    corpus: Annotated[
        list[Path], typer.Option("--corpus", "--train-on", help="corpus folder to train on; repeat")
    ] = [],
) -> None:
    """Train a tokenizer, or take the one of a pretrained model."""
    from memdec.text import tokens

    known = {"train_on": [options.name_of(folder) for folder in corpus]} if corpus else {}
    tokens.run_tokenizer(entry(**known), out, corpus)


@stage(torch=False)
def tokens(tokenizer: Tokenizer, corpus: Corpus, out: Out) -> None:
    """Tokenize a corpus."""
    from memdec.text import tokens as stage_tokens

    stage_tokens.run_tokens(tokenizer, corpus, out)


@stage(entry=ModelSpec)
def model(
    entry: Callable[..., ModelSpec],
    tokenizer: Tokenizer,
    out: Out,
    spec: Spec = None,
    tokens: Annotated[Path | None, typer.Option(help="token folder, for a model from scratch")] = None,
    context: Context = 1024,
    compute: Compute = AUTO,
) -> None:
    """Make a base model: link a pretrained one, convert one from GGUF, or train one from scratch."""
    known = {"family": options.name_of(out), "tokenizer": options.name_of(tokenizer)}
    made = entry(**known, **({} if tokens is None else {"corpus": options.name_of(tokens)}))
    if made.pretrained is not None:
        from memdec.models import loading

        loading.run_pretrained(made, tokenizer, out)
        return
    if tokens is None:
        raise ConfigError(
            "memdec model: expected --tokens for a model from scratch, found none; run `memdec tokens` first"
        )
    from memdec.training import stages

    stages.run_pretrain(made, tokenizer, tokens, out, context=context, compute=compute)


def _budget(model: Path | None, epochs: float) -> tuple[Path, float] | None:
    if epochs <= 0:
        raise ConfigError(f"--budget-epochs: expected more than 0, found {epochs:g}")
    return None if model is None else (model, epochs)


@stage(TrainSettings)
def finetune(
    model: Model,
    tokens: Tokens,
    out: Out,
    context: Context,
    seed: Seed,
    settings: TrainSettings,
    budget_model: BudgetModel = None,
    budget_epochs: BudgetEpochs = 1,
    tuned_by: TunedBy = None,
    compute: Compute = AUTO,
) -> None:
    """Fine-tune all weights of a model on a domain (DAPT; also the model that makes the keys)."""
    from memdec.training import stages

    budget = _budget(budget_model, budget_epochs)
    stages.run_finetune(
        model,
        tokens,
        out,
        settings,
        context=context,
        seed=seed,
        budget=budget,
        tuned_by=tuned_by,
        compute=compute,
    )


@stage(LoraSettings)
def lora(
    model: Model,
    tokens: Tokens,
    out: Out,
    context: Context,
    seed: Seed,
    settings: LoraSettings,
    match: Annotated[
        Path | None, typer.Option(help="choose the rank so that the adapter is about as large as this model")
    ] = None,
    budget_model: BudgetModel = None,
    budget_epochs: BudgetEpochs = 1,
    tuned_by: TunedBy = None,
    compute: Compute = AUTO,
) -> None:
    """Train a LoRA adapter of a model on a domain."""
    from memdec.training import stages

    budget = _budget(budget_model, budget_epochs)
    stages.run_lora(
        model,
        tokens,
        out,
        settings,
        context=context,
        seed=seed,
        budget=budget,
        tuned_by=tuned_by,
        match=match,
        compute=compute,
    )


@stage(DatastoreSettings)
def datastore(
    model: Model,
    tokens: Tokens,
    out: Out,
    context: Context,
    stride: Stride,
    settings: DatastoreSettings,
    shard: Shard = 0,
    compute: Compute = AUTO,
) -> None:
    """Store a key (a hidden state) for every position of a split."""
    from memdec.datastore import keys as stage_datastore

    stage_datastore.run(model, tokens, out, settings, context=context, stride=stride, shard=shard, compute=compute)


@stage(IndexSettings)
def index(
    datastore: Datastore,
    out: Out,
    settings: IndexSettings,
    max_tv: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="say which nprobe has at most this total variation, also of an index that is made already",
        ),
    ] = None,
    device: Device = "auto",
) -> None:
    """Build the search index over the keys and measure how true its search is."""
    from memdec.datastore import accuracy
    from memdec.datastore import index as stage_index

    stage_index.run(datastore, out, settings, _picked(device))
    for line in accuracy.advice(max_tv, out) if max_tv is not None else []:
        print(line)


@stage(CalibrateSettings)
def calibrate(
    model: Model,
    datastore: Datastore,
    index: Annotated[Path, typer.Option(help="index folder")],
    tokens: Tokens,
    out: Out,
    context: Context,
    stride: Stride,
    settings: CalibrateSettings,
    nprobe: Annotated[
        int | None, typer.Option(min=1, help="cells of the index to search, as for the targets; default: 32 (released)")
    ] = None,
    max_tv: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="instead of --nprobe: largest total variation, as for the targets"),
    ] = None,
    compute: Compute = AUTO,
) -> None:
    """Choose k, tau and top of the targets, and lambda of a mixed teacher, on valid."""
    from memdec.datastore import calibrate as stage_calibrate

    stage_calibrate.run(
        model,
        datastore,
        index,
        tokens,
        out,
        settings,
        context=context,
        stride=stride,
        nprobe=nprobe,
        max_tv=max_tv,
        compute=compute,
    )


@stage(TargetSettings)
def targets(
    datastore: Datastore,
    index: Annotated[Path, typer.Option(help="index folder")],
    tokens: Tokens,
    out: Out,
    settings: TargetSettings,
    shard: Shard = 0,
    queries: Annotated[list[Path], typer.Option(help="other split of the same model, to search for instead")] = [],
    calibration: Calibration = None,
    device: Device = "auto",
) -> None:
    """Compute the kNN next-token distributions for one shard of the positions."""
    from memdec.datastore import calibrate
    from memdec.datastore import targets as stage_targets

    picked, settings = _picked(device), calibrate.targets(settings, calibration)
    stage_targets.run(datastore, index, tokens, out, settings, shard=shard, queries=queries, device=picked)


@stage(torch=False)
def free(
    datastore: Datastore,
    targets: Annotated[
        list[Path], typer.Option(help="target folder that was made from the keys; repeat for every one")
    ],
    out: Annotated[Path, typer.Option(help="JSON file to write, with the bytes that became free")],
    index: Annotated[list[Path], typer.Option(help="index folder; repeat")] = [],
) -> None:
    """Remove keys and indexes whose targets are made; their manifests stay, so that nothing is made again."""
    from memdec.datastore import free as command_free

    command_free.run(datastore, index, targets, out)


@stage(PassageSettings, torch=False)
def passages(tokens: Tokens, out: Out, settings: PassageSettings) -> None:
    """Cut the training text into passages and index them with BM25, for In-Context RAG."""
    from memdec.datastore import passages as stage_passages

    stage_passages.run(tokens, out, settings)


@stage(TeacherSettings)
def teacher(
    model: Model,
    tokens: Tokens,
    out: Out,
    context: Context,
    stride: Stride,
    settings: TeacherSettings,
    shard: Shard = 0,
    targets: Annotated[list[Path], typer.Option(help="target folder to mix in; repeat for every shard")] = [],
    calibration: Calibration = None,
    compute: Compute = AUTO,
) -> None:
    """Save a model's own next-token distributions as targets, alone (a control) or mixed with kNN targets."""
    from memdec.datastore import calibrate
    from memdec.datastore import teacher as stage_teacher

    settings = calibrate.teacher(settings, calibration, bool(targets))
    stage_teacher.run(
        model, tokens, out, settings, context=context, stride=stride, shard=shard, targets=targets, compute=compute
    )


@stage(MemorySettings)
def train(
    model: Model,
    tokens: Tokens,
    out: Out,
    context: Context,
    seed: Seed,
    settings: MemorySettings,
    targets: Annotated[list[Path], typer.Option(help="target folder; repeat for every shard")] = [],
    base: Annotated[list[Path], typer.Option(help="base model to mix with when validating; repeat")] = [],
    budget_model: BudgetModel = None,
    budget_epochs: BudgetEpochs = 1,
    tuned_by: TunedBy = None,
    compute: Compute = AUTO,
) -> None:
    """Train the memory decoder."""
    from memdec.training import stages as stage_train

    budget = _budget(budget_model, budget_epochs)
    stage_train.run_train(
        model,
        tokens,
        targets,
        out,
        settings,
        context=context,
        seed=seed,
        budget=budget,
        tuned_by=tuned_by,
        bases=base,
        compute=compute,
    )


@stage(AdaptSettings)
def adapt_vocab(
    memory: Annotated[Path, typer.Option(help="memory folder")],
    tokenizer: Tokenizer,
    out: Out,
    seed: Seed,
    settings: AdaptSettings,
) -> None:
    """Give a trained memory the embeddings of another tokenizer."""
    from memdec.training import adapt_vocab

    adapt_vocab.run(memory, tokenizer, out, settings, seed=seed)


OwnMemory = Annotated[Path | None, typer.Option(help="memory folder, or a model after DAPT in its place")]
MemoryLabel = Annotated[str, typer.Option(help="name of the memory in the tables and figures")]
Control = Annotated[
    bool, typer.Option("--control", help="negative control: --memory is one of another corpus than --corpus")
]
Also = Annotated[
    list[Path], typer.Option(help="general corpus to measure on too, with the weights tuned on --corpus; repeat")
]


@stage(EvaluateSettings)
def evaluate(
    base: Annotated[Path, typer.Option(help="base model folder")],
    corpus: Corpus,
    out: Out,
    context: Context,
    stride: Stride,
    settings: EvaluateSettings,
    memory: OwnMemory = None,
    name: MemoryLabel = DEFAULT_MEMORY,
    control: Control = False,
    lora: Annotated[Path | None, typer.Option(help="LoRA folder")] = None,
    dapt: Annotated[Path | None, typer.Option(help="folder of the base after DAPT")] = None,
    datastore: Annotated[list[Path], typer.Option(help="datastore made with this base; repeat for every shard")] = [],
    index: Annotated[Path | None, typer.Option(help="index over --datastore; both together are the kNN-LM")] = None,
    passages: Annotated[Path | None, typer.Option(help="passages of the corpus, for In-Context RAG")] = None,
    also: Also = [],
    seed: Seed = 0,
    compute: Compute = AUTO,
) -> None:
    """Measure the perplexity of a base alone, or of one system; valid tunes alpha, or the kNN-LM's lambda and tau."""
    from memdec.results import evaluate as stage_evaluate

    stage_evaluate.run(
        base,
        corpus,
        out,
        settings,
        context=context,
        stride=stride,
        seed=seed,
        memory=memory,
        name=name,
        control=control,
        lora=lora,
        dapt=dapt,
        datastore=datastore,
        index=index,
        passages=passages,
        also=also,
        compute=compute,
    )


@stage(ScoreSettings)
def score(
    corpus: Corpus,
    out: Out,
    context: Context,
    stride: Stride,
    settings: ScoreSettings,
    memory: OwnMemory = None,
    control: Control = False,
    key_model: Annotated[
        Path | None, typer.Option(help="in place of a memory: the model that made --datastore, whose p_kNN is scored")
    ] = None,
    datastore: Annotated[list[Path], typer.Option(help="datastore of --key-model; repeat for every shard")] = [],
    index: Annotated[Path | None, typer.Option(help="index over --datastore")] = None,
    also: Also = [],
    compute: Compute = AUTO,
) -> None:
    """Score a corpus with a memory alone, or with p_kNN in its place, for `memdec mix` with any number of bases."""
    from memdec.results import score as stage_score

    stage_score.run(
        corpus,
        out,
        settings,
        context=context,
        stride=stride,
        memory=memory,
        control=control,
        key_model=key_model,
        datastore=datastore,
        index=index,
        also=also,
        compute=compute,
    )


@stage(MixSettings, torch=False)
def mix(
    base: Annotated[Path, typer.Option(help="the base's own evaluation, by memdec evaluate")],
    scored: Annotated[Path, typer.Option(help="scores of the memory on the same texts, by memdec score")],
    out: Out,
    settings: MixSettings,
    name: MemoryLabel = DEFAULT_MEMORY,
    seed: Seed = 0,
) -> None:
    """Measure the perplexity of a base with a memory from the scores of both; valid tunes the weight."""
    from memdec.results import mix as stage_mix

    stage_mix.run(base, scored, out, settings, name=name, seed=seed)


Targets = Annotated[list[Path], typer.Option(help="folder of kNN targets; repeat for every shard")]


@stage(SampleSettings)
def fidelity(
    memory: Annotated[Path, typer.Option(help="memory folder, or a model that is mixed in as one")],
    targets: Targets,
    tokens: Tokens,
    out: Out,
    context: Context,
    stride: Stride,
    settings: SampleSettings,
    name: MemoryLabel = DEFAULT_MEMORY,
    control: Annotated[
        bool, typer.Option("--control", help="negative control: --memory is one of another text than --tokens")
    ] = False,
    compute: Compute = AUTO,
) -> None:
    """Measure how well a memory imitates its kNN targets: top-token match, KL, total variation, Pearson correlation."""
    from memdec.results import fidelity as stage_fidelity

    what: dict[str, Any] = {"context": context, "stride": stride, "name": name, "compute": compute}
    stage_fidelity.run(memory, targets, tokens, out, settings, control=control, **what)


@stage(ShapesSettings)
def shapes(
    model: Annotated[Path, typer.Option(help="model that gives the keys of the targets")],
    memory: Annotated[Path, typer.Option(help="memory folder, or a model that is mixed in as one")],
    targets: Targets,
    tokens: Tokens,
    out: Out,
    context: Context,
    stride: Stride,
    settings: ShapesSettings,
    name: MemoryLabel = DEFAULT_MEMORY,
    compute: Compute = AUTO,
) -> None:
    """Measure the shapes of p_kNN, the model's and the memory's distribution on the same positions (Figures 5, 6)."""
    from memdec.results import shapes as stage_shapes

    what: dict[str, Any] = {"context": context, "stride": stride, "name": name, "compute": compute}
    stage_shapes.run(model, memory, targets, tokens, out, settings, **what)


@stage(entry=Suite)
def harness(
    entry: Callable[..., Suite],
    base: BaseName,
    out: Out,
    spec: Spec = None,
    memory: Annotated[str | None, typer.Option(help="memory, or a model after DAPT to mix in: MemDec")] = None,
    name: MemoryLabel = DEFAULT_MEMORY,
    evaluation: Annotated[
        Path | None, typer.Option(help="evaluation of the system, which tuned alpha, or lambda and tau, on valid text")
    ] = None,
    lora: Annotated[Path | None, typer.Option(help="LoRA folder: LoRA")] = None,
    dapt: Annotated[Path | None, typer.Option(help="folder of the base after DAPT: DAPT")] = None,
    datastore: Annotated[list[Path], typer.Option(help="datastore made with this base; repeat for every shard")] = [],
    index: Annotated[Path | None, typer.Option(help="index over --datastore; both together: kNN-LM")] = None,
    passages: Annotated[Path | None, typer.Option(help="passages of the corpus: In-Context RAG")] = None,
    seed: Seed = 0,
    compute: Compute = AUTO,
) -> None:
    """Run one system over lm-eval tasks, in lm-eval's own format, with an interval for every metric."""
    from memdec.results import harness as stage_harness

    stage_harness.run(
        base,
        entry(),
        out,
        seed=seed,
        memory=memory,
        name=name,
        evaluation=evaluation,
        lora=lora,
        dapt=dapt,
        datastore=datastore,
        index=index,
        passages=passages,
        compute=compute,
    )


AnyModel = Annotated[str, typer.Option(help="model folder or Hub id")]
AnyMemory = Annotated[str, typer.Option(help="memory folder or Hub id")]
Alphas = Annotated[
    list[float], typer.Option("--alpha", min=0, max=1, help="weight of the memory; repeat (default 0, 0.05 ... 1)")
]
AnySplit = Annotated[Split, typer.Option(help="split of the corpus")]
BatchSize = Annotated[int, typer.Option(min=1, help="texts per forward pass")]


def _model_arguments(batch_size: int, compute: Compute) -> dict[str, Any]:
    """Batch size, device and dtype as arguments of an lm-eval model."""
    from memdec.artefacts import devices

    device = str(devices.pick(compute))
    return {"batch_size": batch_size, "device": device, "dtype": devices.precision(compute)}


@stage()
def sweep(
    base: AnyModel,
    memory: AnyMemory,
    out: Out,
    task: Annotated[list[str], typer.Option(help="lm-eval task; repeat")],
    alpha: Alphas = [],
    corpus: Annotated[Path | None, typer.Option(help="corpus folder, for the task memdec_ppl")] = None,
    split: AnySplit = "test",
    limit: Annotated[
        int | None, typer.Option(min=1, help="use only N rows of each task, from all over its file")
    ] = None,
    batch_size: BatchSize = 8,
    compute: Compute = AUTO,
) -> None:
    """Run lm-eval tasks at every alpha with one pass of the models; write a table and a figure."""
    from memdec.harness.alphas import ALPHAS
    from memdec.results import sweep as stage_sweep

    arguments = _model_arguments(batch_size, compute)
    alphas = alpha or ALPHAS
    stage_sweep.run(base, memory, task, out, alphas=alphas, corpus=corpus, split=split, limit=limit, **arguments)
    print(stage_sweep.shown(out))


@stage()
def tune(
    base: AnyModel,
    memory: AnyMemory,
    corpus: Corpus,
    alpha: Alphas = [],
    split: AnySplit = "valid",
    batch_size: BatchSize = 8,
    compute: Compute = AUTO,
) -> None:
    """Print the alpha with the lowest perplexity on a corpus, as JSON."""
    from memdec.harness.alphas import ALPHAS
    from memdec.results import sweep as stage_sweep

    arguments = _model_arguments(batch_size, compute)
    alphas = alpha or ALPHAS
    found = stage_sweep.tune(base, memory, corpus, alphas=alphas, split=split, **arguments)
    best = next(iter(found))
    sweep = {f"{each:g}": found[each] for each in sorted(found)}
    print(json.dumps({"alpha": best, "perplexity": found[best], "split": split, "sweep": sweep}))
    models = f"pretrained={base},memory={memory},alpha={best:g}"
    _say(f"Next: lm_eval --model memdec-interp --model_args {shlex.quote(models)} --tasks ...")


@stage(LatencySettings)
def latency(
    base: BaseName,
    memory: MemoryName,
    out: Out,
    settings: LatencySettings,
    alpha: Alpha = 0.6,
    tokens: Annotated[
        Path | None, typer.Option(help="token folder; prompts are pieces of its test split (default: random tokens)")
    ] = None,
    knn: Annotated[
        list[str], typer.Option(help="STORE:INDEX made with this base, shards joined by +; repeat for other sizes")
    ] = [],
    passages: Annotated[Path | None, typer.Option(help="passages for In-Context RAG")] = None,
    compute: Compute = AUTO,
) -> None:
    """Measure prefill and decoding speed of base, MemDec, speculative decoding and, if given, kNN-LM and RAG."""
    from memdec.artefacts import devices
    from memdec.inference.systems import Parts
    from memdec.results import latency as stage_latency

    dtype, device = devices.precision(compute), str(devices.pick(compute))
    parts = Parts(base=base, memory=memory, passages=passages, alpha=alpha, dtype=dtype, device=device)
    stores = [replace(parts, datastore=shards, index=index) for shards, index in map(_store_and_index, knn)]
    systems, inputs = stage_latency.systems(parts, settings, stores), stage_latency.identities(parts, stores)
    stage_latency.run(systems, out, settings, inputs=inputs, stream=tokens, compute=compute)


def _store_and_index(text: str) -> tuple[tuple[Path, ...], Path]:
    stores, colon, index = text.rpartition(":")
    if not colon:
        raise ConfigError(f"--knn: expected STORE:INDEX, found {text!r}")
    return tuple(Path(folder) for folder in stores.split("+")), Path(index)


@stage(ExplainSettings)
def explain(
    base: BaseName,
    memory: MemoryName,
    settings: ExplainSettings,
    text: Annotated[str, typer.Argument(help="the text, unless --file gives it")] = "",
    file: Annotated[Path | None, typer.Option(help="UTF-8 file with the text")] = None,
    alpha: Alpha = 0.6,
    datastore: Annotated[list[Path], typer.Option(help="datastore folder, for p_kNN; repeat for every shard")] = [],
    index: Annotated[Path | None, typer.Option(help="index folder over the datastore")] = None,
    html: Annotated[Path | None, typer.Option(help="HTML file to write: the text as a heat map")] = None,
    compute: Compute = AUTO,
) -> None:
    """Show what base, memory and mixture predict at every token of a text."""
    from memdec.results import explain as stage_explain

    if text and file is not None:
        raise ConfigError("memdec explain: expected a text or --file, found both; leave out one")
    text = _read(file) if file is not None else text
    stage_explain.run(
        base, memory, text, settings, alpha=alpha, datastore=datastore, index_folder=index, out=html, compute=compute
    )
    if html is not None:
        options.wrote(html, "open it in a browser")


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")  # line ends as they are
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: expected a file with UTF-8 text, found {error}") from None


RunConfig = Annotated[Path, typer.Option(help="config of the run, YAML or JSON")]
Cells = Annotated[
    list[str],
    typer.Option(help="DOMAIN:MODEL:SEED:FOLDER of an evaluation or harness run (Table 6: cases; 13: corpus); repeat"),
]
TableFile = Annotated[
    Path, typer.Option(help="CSV file; .cells.csv, .items.npz, .md, .tex and .provenance.json are written beside it")
]


def _cells(texts: list[str]) -> list[tuple[str, str, int, Path]]:
    cells = []
    for text in texts:
        parts = text.split(":", 3)
        if len(parts) != 4 or not parts[2].lstrip("-").isdigit():
            raise ConfigError(f"--cell: expected DOMAIN:MODEL:SEED:FOLDER, found {text!r}")
        cells.append((parts[0], parts[1], int(parts[2]), Path(parts[3])))
    return cells


@app.command()
def table(
    name: Annotated[
        str, typer.Option(help="table1 to table19, memories, objectives, rivals or forgetting (docs/tables.md)")
    ],
    config: RunConfig,
    cell: Cells,
    out: TableFile,
) -> None:
    """Make a table from evaluations, harness runs, marked words or corpora."""
    from memdec.results import catalogue, tables

    tables.run(catalogue.table(cfg.load(config), name), _cells(cell), out)
    options.wrote(out, f"cat {shlex.quote(str(out.with_suffix('.md')))}")


@app.command()
def figure(
    name: Annotated[str, typer.Option(help="figure2, figure4, figure5, figure6, fidelity or gains")],
    config: RunConfig,
    out: Annotated[Path, typer.Option(help="CSV file; .svg, .png and .provenance.json are written beside it")],
    cell: Annotated[
        list[str],
        typer.Option(help="DOMAIN:MODEL:SEED:FOLDER of a part of the figure; repeat"),
    ] = [],
    table: Annotated[list[Path], typer.Option(help="cells of a table (.cells.csv), for Figure 2")] = [],
) -> None:
    """Draw a figure from `memdec shapes`, `fidelity` or `latency`, or Figure 2 from the cells of Table 3."""
    from memdec.results import drawing, figure_catalogue

    drawing.run(figure_catalogue.figure(cfg.load(config), name), _cells(cell), table, out)
    options.wrote(out, f"open {shlex.quote(str(out.with_suffix('.svg')))}")


@app.command()
def claims(
    config: RunConfig,
    out: Annotated[Path, typer.Option(help="CSV file, a line for each claim")],
    tables: Annotated[
        list[Path], typer.Argument(help="tables of the run: <table>.cells.csv, figure4.csv, figure6.csv")
    ] = [],
    claims: Annotated[
        Path | None, typer.Option(help="YAML file with claims (default: those of the paper, in the package)")
    ] = None,
) -> None:
    """Judge every claim of the paper by the tables of a run: holds, fails, undecided or not run, with the effect."""
    from memdec.results import claims as stage_claims

    found = stage_claims.run(cfg.load(config), tables, out, claims or stage_claims.FILE)
    print(stage_claims.shown(found))
    options.wrote(out, "memdec report, or read it with docs/claims.md")


@stage()
def cases(
    config: RunConfig,
    base: Annotated[Path, typer.Option(help="base model folder")],
    memory: Annotated[Path, typer.Option(help="memory decoder folder")],
    datastore: Annotated[list[Path], typer.Option(help="datastore of the memory's targets; repeat for every shard")],
    index: Annotated[Path, typer.Option(help="index folder over the datastore")],
    out: Out,
    calibration: Calibration = None,
) -> None:
    """Compute p(marked word) under memory, kNN and base for the texts of the config (Table 6)."""
    from memdec.results import table6 as stage_cases

    stage_cases.run(cfg.load(config).study_for("table6"), base, memory, datastore, index, out, calibration)
    options.wrote(out, "memdec table --name table6 --cell DOMAIN:MODEL:SEED:{out} --config ... --out ...")


@app.command()
def report(
    config: Annotated[
        list[Path], typer.Option(help="config of the run; repeat for overlays (default: config/mini.yaml)")
    ] = [],
    results: Annotated[Path, typer.Option(help="folder with the tables and the folder of the scale")] = Path("results"),
    out: Annotated[Path, typer.Option(help="HTML file")] = Path("results/report.html"),
) -> None:
    """Write all results of a run as one HTML page: claims, tables, curves, cost, versions and commands."""
    from memdec.results import report as stage_report

    stage_report.run(cfg.load(*cfg.with_default(config or [cfg.DEFAULT])), config, results, out)
    options.wrote(out, "open it in a browser")


@app.command()
def check(
    results: Annotated[list[Path], typer.Argument(help="tables (.csv), each with its .provenance.json beside it")],
    baseline: Annotated[Path, typer.Option(help="tests/regression/<scale>.json")],
    update: Annotated[
        bool, typer.Option("--update", help="write these results into the baseline; needs --reason")
    ] = False,
    reason: Annotated[str, typer.Option(help="with --update: why the numbers changed; the baseline keeps it")] = "",
    noise: Annotated[
        list[Path], typer.Option(help="with --update: a table of other seeds, to measure the tolerance; repeat")
    ] = [],
    as_json: AsJson = False,
) -> None:
    """Compare the numbers of tables with a baseline; exit 1 beyond the tolerance, 3 if they cannot be compared."""
    from memdec.results import regression

    shown = " ".join(shlex.quote(str(table)) for table in results)
    if update:
        regression.update(results, baseline, reason, noise)
        options.wrote(baseline, f"memdec check --baseline {{out}} {shown}")
        return
    lines, moved = regression.compare(results, baseline)
    cells = [line._asdict() for line in lines]
    _print("\n".join(str(line) for line in lines), {"moved": moved, "cells": cells} if as_json else None)
    if moved:
        _say(f"moved: at least one cell of {shown}. Next: find the change, or take it over with --update --reason TEXT")
        raise SystemExit(1)
    _say(f"unmoved: all cells of {shown} against {baseline}. Next: nothing to do")


@app.command()
def doctor(
    folder: Annotated[Path, typer.Argument(help="folder to search")] = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Find damaged artefacts and remove their manifests, so that they are made again; exit 1 if any."""
    from memdec.artefacts import doctor as look

    lines, n_damaged = look.run(folder)
    found = {"folder": str(folder), "n_damaged": n_damaged, "problems": lines[:-1], "summary": lines[-1]}
    _print("\n".join(lines), found if as_json else None)
    if n_damaged:
        _say("Next: make repair, or run the commands that made them again")
        raise SystemExit(1)


data_app = typer.Typer(no_args_is_help=True, help="Fetch and verify the files that the tasks read.")
app.add_typer(data_app, name="data")
DataTasks = Annotated[list[str], typer.Option(help="folder of a task, e.g. pubmedqa; repeat (default: all)")]


@data_app.command("fetch")
def data_fetch(
    task: DataTasks = [],
    out: Annotated[Path | None, typer.Option(envvar="MEMDEC_DATA", help="folder to fill")] = None,
    as_json: AsJson = False,
) -> None:
    """Download task files from the Hub and GitHub, and write sources.json; correct files are kept."""
    from memdec.tasks import fetch

    folder = _data_folder(out, "--out")
    _say(fetch.origins_line(fetch.to_fetch(task)))
    _show_files(fetch.fetch(folder, task), True, as_json)
    _say(f"wrote {folder}. Next: export MEMDEC_DATA={shlex.quote(str(folder))}; memdec data verify")


@data_app.command("verify")
def data_verify(
    folder: Annotated[Path | None, typer.Argument(envvar="MEMDEC_DATA", help="folder with the files")] = None,
    task: DataTasks = [],
    as_json: AsJson = False,
) -> None:
    """Check the files of a folder; exit 1 if one is incomplete, has other rows or was changed."""
    from memdec.tasks import fetch

    folder = _data_folder(folder, "FOLDER")
    _show_files(fetch.verify(folder, task), bool(task), as_json)
    _say(f"verified {folder}. Next: export MEMDEC_DATA={shlex.quote(str(folder))}; lm_eval --tasks ...")


def _data_folder(folder: Path | None, name: str) -> Path:
    if folder is None:
        raise ConfigError(f"memdec data: expected {name} or MEMDEC_DATA, found neither; give one")
    return folder


def _show_files(found: list[Any], all_needed: bool, as_json: bool) -> None:
    from memdec.tasks import fetch

    wrong = fetch.wrong(found, all_needed)
    files = [
        {"file": each.file.file, "rows": each.rows, "status": each.status, "commit": each.commit} for each in found
    ]
    _print(fetch.shown(found), {"ok": not wrong, "files": files} if as_json else None)
    if wrong:
        _say("Next: memdec data fetch, for the files that are not ok")
        raise SystemExit(1)


def _print(text: str, data: dict[str, Any] | None) -> None:
    """Print a result: the text for people, or the data as JSON where they are given."""
    print(text if data is None else json.dumps(data, ensure_ascii=False))


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(help="folder or results file of lm_eval with --log_samples")],
    run_b: Annotated[Path | None, typer.Argument(help="the second run; without it, intervals of the first")] = None,
    csv: Annotated[Path | None, typer.Option(help="CSV file to write, with more columns than are printed")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare two lm_eval runs on the same rows: differences with 95 % intervals and p-values."""
    from memdec.artefacts import artefact
    from memdec.results import compare as stage_compare

    rows = stage_compare.compare(run_a, run_b or run_a)
    text = stage_compare.shown(rows) if run_b is not None else stage_compare.shown_alone(rows)
    _print(text, {"rows": json.loads(rows.to_json(orient="records"))} if as_json else None)
    if csv is not None:
        artefact.write_text(csv, rows.to_csv(index=False, lineterminator="\n"))
        options.wrote(csv, "its columns are explained in docs/evaluate.md")


@app.command()
def plan(
    files: Annotated[
        list[str],
        typer.Argument(
            help="config files, or overlays of the default one, and files to make such as results/table3.csv (default: "
            "results/all); may be left out with --measure"
        ),
    ] = [],
    folder: Annotated[Path, typer.Option(help="folder of the run; what is finished there costs nothing")] = Path("."),
    measure: Annotated[bool, typer.Option("--measure", help="measure this machine first, in about a minute")] = False,
    rates: Annotated[
        Path | None, typer.Option(help="rates of another machine (default: those measured here, or the published ones)")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=0, help="GB of main memory of a node (default: of this one, or by the rates)")
    ] = None,
    disk: Annotated[float | None, typer.Option(min=0, help="GB of free disk (default: in the folder)")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write, with Markdown beside it")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run costs before it starts: jobs, hours, memory, disk, downloads; exit 2 if it cannot fit."""
    from memdec.artefacts import resources
    from memdec.planning import plan as planning
    from memdec.planning import rates as planning_rates

    if measure:
        from memdec.planning import measure as planning_measure

        to = rates or planning_rates.measured()
        planning_measure.write(planning_measure.machine(), to)
        options.wrote(to, "memdec plan")
        if not files:
            return
    if not files:
        raise ConfigError("plan: expected a config file or a file to make, found none; give config/mini.yaml")
    machine = planning_rates.load(rates)
    known = rates is not None or planning_rates.measured().is_file()
    here = machine.cpu.memory if known else resources.memory()
    configs = [Path(name) for name in files if name.endswith((".yaml", ".yml", ".json"))] or [cfg.DEFAULT]
    targets = [name for name in files if Path(name) not in configs] or ["results/all"]
    configs = cfg.with_default(configs)
    found = planning.make(cfg.load(*configs), configs, targets, folder, machine)
    _print(found.text(), found.data() if as_json else None)
    if out is not None:
        planning.write(found, out)
    room = planning.free_disk(folder) if disk is None else disk * 1e9
    planning.refuse(found, here if memory is None else memory * 1e9, room)
    _say("fits. Next: snakemake with the same config and target")


@app.command()
def schema(
    out: Annotated[Path, typer.Argument(help="file to write, e.g. workflow/schemas/config.schema.json")],
    of: Annotated[
        Literal["config", "cells"], typer.Option(help="config: a config file; cells: a line of a table's .cells.csv")
    ] = "config",
) -> None:
    """Write the JSON schema of the configuration, or of the lines of a table's .cells.csv."""
    from memdec.artefacts import artefact
    from memdec.results import cells

    artefact.write_json(out, cfg.json_schema() if of == "config" else cells.json_schema())
    options.wrote(out, "memdec validate config/mini.yaml" if of == "config" else "see docs/tables.md")


@app.command()
def validate(
    config: Annotated[list[Path], typer.Argument(help="config files; each is laid over those before it")],
    as_json: AsJson = False,
) -> None:
    """Check a config and report all problems at once, among them files and folders that are not there."""
    from memdec.tasks import needed

    where, files = " + ".join(map(str, config)), shlex.join(map(str, config))
    try:
        paths = cfg.with_default(config)
        where = " + ".join(map(str, paths))
        problems, parts = cfg.check(cfg.read(*paths))
        if parts is not None:
            problems += needed.unknown({name: suite.tasks for name, suite in parts.suites.items()})
        message = f"{where}: {'; '.join(problems)}"
    except ConfigError as error:  # a file that cannot be read as plain data
        problems = [message := str(error)]
    if as_json:
        print(json.dumps({"valid": not problems, "problems": problems}, ensure_ascii=False))
    if problems:
        raise ConfigError(message)
    if not as_json:
        print(f"{where}: valid")
    _say(f"Next: snakemake --cores all --configfile {files} -- results/table3.csv")


def _version(asked: bool) -> None:
    if asked:
        print(f"memdec {__version__}")
        raise typer.Exit


@app.callback()
def _whole(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version and end")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; an error that the user can fix is printed as one line."""
    try:
        code = app(standalone_mode=False)  # an int where typer ends a command itself: 130 after Ctrl-C
    except MemDecError as error:
        _end(str(error), error.exit_code)
    except (typer.Exit, typer.Abort) as stop:
        raise SystemExit(getattr(stop, "exit_code", 1)) from None
    except KeyboardInterrupt:
        code = 130
    except OSError as error:
        place = error.filename if error.filename is not None else "memdec"
        _end(f"{place}: expected a file or folder that can be used here, found: {reason(error)}; check the path", 2)
    except RecursionError:
        _end("memdec: expected files whose lists and mappings are not nested this deep; check the JSON that is read", 2)
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            _say(str(error))
            raise SystemExit(2) from None
        if type(error).__module__.startswith(("click", "typer")):
            _end(getattr(error, "format_message", lambda: str(error))().replace("Value error, ", ""), 2)
        raise
    if code == 130:
        _say("interrupted; the same command goes on from what is finished")
    if isinstance(code, int) and code:
        raise SystemExit(code)


def _end(message: str, code: int) -> NoReturn:
    _say(f"error: {on_one_line(message)}")
    raise SystemExit(code) from None


if __name__ == "__main__":
    main()
