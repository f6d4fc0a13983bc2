"""`memdec <stage>`: every stage by hand, with the options that its typed settings have.

Exit codes: 0 done, 1 a check found a difference, 2 bad input (one line on standard error), 3 results that cannot be
compared.
"""

import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from memdec import config as cfg
from memdec.errors import ConfigError, MemDecError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Out = Annotated[Path, typer.Option(help="folder to make")]
Corpus = Annotated[Path, typer.Option(help="corpus folder")]
Model = Annotated[Path, typer.Option(help="model folder")]
Tokenizer = Annotated[Path, typer.Option(help="tokenizer folder")]
Tokens = Annotated[Path, typer.Option(help="token folder")]
Spec = Annotated[str, typer.Option(help="JSON of one entry of the config, e.g. of 'corpora'")]
Seed = Annotated[int, typer.Option(help="seed of this run")]
Context = Annotated[int, typer.Option(help="tokens a model sees at most (paper: 1024)")]
Datastore = Annotated[list[Path], typer.Option(help="datastore folder; repeat for every shard")]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda")]
Shard = Annotated[int, typer.Option(help="which of --shards, from 0")]
BudgetModel = Annotated[Path | None, typer.Option(help="model whose full training is the unit of the FLOP budget")]
BudgetEpochs = Annotated[
    float, typer.Option(help="most operations, in epochs of --budget-model (paper: 1 of a 7B model)")
]
BaseName = Annotated[str, typer.Option(help="base model, folder or Hub id")]
MemoryName = Annotated[str, typer.Option(help="memory decoder, folder or Hub id")]
Alpha = Annotated[float, typer.Option(help="weight of the memory, from 0 to 1")]
Stride = Annotated[int, typer.Option(help="tokens scored per window (paper: 512)")]


def stage(settings: type[BaseModel] | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command; the fields of `settings` become its options and arrive as one object `settings`.

    A command with a parameter `compute` gets the options of `config.Compute` likewise.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__.strip("_").replace("_", "-")
        takes = inspect.signature(function).parameters.values()
        own = [p for p in takes if p.name not in ("settings", "compute")]
        typed = {"settings": settings} if settings is not None else {}
        typed |= {"compute": cfg.Compute} if len(own) + len(typed) < len(takes) else {}
        options = [_option(field, info) for kind in typed.values() for field, info in kind.model_fields.items()]

        def command(**values: Any) -> None:
            from memdec import devices

            _limit_threads()
            arguments = {p.name: values.pop(p.name) for p in own}
            for argument, kind in typed.items():
                given = {field: values[field] for field in kind.model_fields}
                arguments[argument] = cfg.parse(kind, given, f"memdec {name}")
            if "compute" in arguments:
                devices.pick(arguments["compute"])  # a GPU that is not there is an error before anything is read
            with devices.one_line_when_full(f"memdec {name}", arguments.get("settings")):
                function(**arguments)

        command.__signature__ = inspect.Signature(own + options)  # type: ignore[attr-defined]
        command.__doc__ = function.__doc__
        app.command(name)(command)
        return function

    return register


def _option(name: str, field: Any) -> inspect.Parameter:
    """A typer option for a pydantic field: its type, default and description."""
    kind = field.annotation
    origin = get_origin(kind)
    if origin is Literal:
        kind = str
    elif origin is list:
        inner = get_args(kind)[0]
        kind = list[get_args(inner)[0] if get_origin(inner) is Annotated else inner]  # type: ignore[misc]
    elif type(None) in get_args(kind):  # X | None: typer's own default says that it may be left out
        inner = next(each for each in get_args(kind) if each is not type(None))
        kind = (get_args(inner)[0] if get_origin(inner) is Annotated else inner) | None
    default = inspect.Parameter.empty if field.default is PydanticUndefined else field.default
    help_text = (field.description or "") + (
        f" [{' | '.join(get_args(field.annotation))}]" if origin is Literal else ""
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, typer.Option(help=help_text)]
    )


def _limit_threads() -> None:
    """Use the threads that the caller (Snakemake) granted, not all of the machine."""
    import torch

    granted = os.environ.get("OMP_NUM_THREADS")
    if granted and granted.isdigit():
        torch.set_num_threads(int(granted))


def _picked(device: str) -> Any:
    from memdec import devices

    return devices.pick(cfg.parse(cfg.Compute, {"device": device}, "--device"))


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: expected JSON, found {text[:60]!r} ({error}); quote it for the shell") from None


@stage()
def corpus(
    spec: Spec, out: Out, against: Annotated[list[Path], typer.Option(help="corpora that must not overlap")] = []
) -> None:
    """Documents of a corpus, split and deduplicated."""
    from memdec import corpora

    corpora.run(cfg.parse(cfg.CorpusSpec, _json(spec, "--spec"), "--spec"), out, against)


@stage()
def tokenizer(
    spec: Spec, out: Out, corpus: Annotated[list[Path], typer.Option(help="corpora to train on")] = []
) -> None:
    """A tokenizer, trained here or taken from a model."""
    from memdec import tokens

    tokens.run_tokenizer(cfg.parse(cfg.TokenizerSpec, _json(spec, "--spec"), "--spec"), out, corpus)


@stage()
def tokens(tokenizer: Tokenizer, corpus: Corpus, out: Out) -> None:
    """Token streams of a corpus."""
    from memdec import tokens as stage_tokens

    stage_tokens.run_tokens(tokenizer, corpus, out)


@stage()
def model(
    spec: Spec,
    tokenizer: Tokenizer,
    out: Out,
    tokens: Annotated[Path | None, typer.Option(help="token folder, for a model from scratch")] = None,
    context: Context = 1024,
    compute: cfg.Compute = cfg.AUTO,
) -> None:
    """A base model: a pretrained one (linked, or converted from GGUF), or one trained from scratch."""
    entry: cfg.ModelSpec = cfg.parse(cfg.ModelSpec, _json(spec, "--spec"), "--spec")
    if entry.pretrained is not None:
        from memdec import models

        models.run_pretrained(entry, tokenizer, out)
        return
    if tokens is None:
        raise ConfigError(
            "memdec model: expected --tokens for a model from scratch, found none; run `memdec tokens` first"
        )
    from memdec import train

    train.run_pretrain(entry, tokenizer, tokens, out, context=context, compute=compute)


def _budget(model: Path | None, epochs: float) -> tuple[Path, float] | None:
    if epochs <= 0:
        raise ConfigError(f"--budget-epochs: expected more than 0, found {epochs:g}")
    return None if model is None else (model, epochs)


@stage(cfg.TrainSettings)
def finetune(
    model: Model,
    tokens: Tokens,
    out: Out,
    context: Context,
    seed: Seed,
    settings: cfg.TrainSettings,
    budget_model: BudgetModel = None,
    budget_epochs: BudgetEpochs = 1,
    compute: cfg.Compute = cfg.AUTO,
) -> None:
    """All weights of a model on a domain (DAPT; the model that gives the keys)."""
    from memdec import train

    budget = _budget(budget_model, budget_epochs)
    train.run_finetune(model, tokens, out, settings, context=context, seed=seed, budget=budget, compute=compute)


@stage(cfg.LoraSettings)
def lora(
    model: Model,
    tokens: Tokens,
    out: Out,
    context: Context,
    seed: Seed,
    settings: cfg.LoraSettings,
    match: Annotated[Path | None, typer.Option(help="model whose number of parameters the rank is chosen by")] = None,
    budget_model: BudgetModel = None,
    budget_epochs: BudgetEpochs = 1,
    compute: cfg.Compute = cfg.AUTO,
) -> None:
    """A LoRA adapter of a model on a domain."""
    from memdec import train

    budget = _budget(budget_model, budget_epochs)
    train.run_lora(
        model, tokens, out, settings, context=context, seed=seed, budget=budget, match=match, compute=compute
    )


@stage(cfg.DatastoreSettings)
def datastore(
    model: Model,
    tokens: Tokens,
    out: Out,
    context: Context,
    stride: Stride,
    settings: cfg.DatastoreSettings,
    shard: Shard = 0,
    compute: cfg.Compute = cfg.AUTO,
) -> None:
    """Keys of every position of a split."""
    from memdec import datastore as stage_datastore

    stage_datastore.run(model, tokens, out, settings, context=context, stride=stride, shard=shard, compute=compute)


@stage(cfg.IndexSettings)
def index(datastore: Datastore, out: Out, settings: cfg.IndexSettings, device: Device = "auto") -> None:
    """Search structure over the keys."""
    from memdec import index as stage_index

    stage_index.run(datastore, out, settings, _picked(device))


@stage(cfg.TargetSettings)
def targets(
    datastore: Datastore,
    index: Annotated[Path, typer.Option(help="index folder")],
    tokens: Tokens,
    out: Out,
    settings: cfg.TargetSettings,
    shard: Shard = 0,
    queries: Annotated[
        list[Path], typer.Option(help="datastore of another split of the same model, for the rows of that text instead")
    ] = [],
    device: Device = "auto",
) -> None:
    """kNN next-token distributions of one shard of the positions."""
    from memdec import targets as stage_targets

    picked = _picked(device)
    stage_targets.run(datastore, index, tokens, out, settings, shard=shard, queries=queries, device=picked)


@stage(cfg.PassageSettings)
def passages(tokens: Tokens, out: Out, settings: cfg.PassageSettings) -> None:
    """Passages of the training text and their BM25 index, for In-Context RAG."""
    from memdec import passages as stage_passages

    stage_passages.run(tokens, out, settings)


@stage(cfg.TeacherSettings)
def teacher(
    model: Model,
    tokens: Tokens,
    out: Out,
    context: Context,
    stride: Stride,
    settings: cfg.TeacherSettings,
    shard: Shard = 0,
    compute: cfg.Compute = cfg.AUTO,
) -> None:
    """Next-token distributions of a model itself, as targets: the control for those of its neighbours."""
    from memdec import teacher as stage_teacher

    stage_teacher.run(model, tokens, out, settings, context=context, stride=stride, shard=shard, compute=compute)


@stage(cfg.MemorySettings)
def train(
    model: Model,
    tokens: Tokens,
    out: Out,
    context: Context,
    seed: Seed,
    settings: cfg.MemorySettings,
    targets: Annotated[list[Path], typer.Option(help="target folder; repeat for every shard")] = [],
    base: Annotated[list[Path], typer.Option(help="base model to mix with at evaluations; repeat")] = [],
    budget_model: BudgetModel = None,
    budget_epochs: BudgetEpochs = 1,
    compute: cfg.Compute = cfg.AUTO,
) -> None:
    """The memory decoder."""
    from memdec import train as stage_train

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
        bases=base,
        compute=compute,
    )


@stage(cfg.AdaptSettings)
def adapt_vocab(
    memory: Annotated[Path, typer.Option(help="memory folder")],
    tokenizer: Tokenizer,
    out: Out,
    seed: Seed,
    settings: cfg.AdaptSettings,
) -> None:
    """A trained memory with the embeddings of another tokenizer."""
    from memdec import adapt

    adapt.run(memory, tokenizer, out, settings, seed=seed)


@stage(cfg.EvaluateSettings)
def evaluate(
    base: Annotated[Path, typer.Option(help="base model folder")],
    corpus: Corpus,
    out: Out,
    context: Context,
    stride: Stride,
    settings: cfg.EvaluateSettings,
    memory: Annotated[Path | None, typer.Option(help="memory folder, or a model after DAPT to mix in")] = None,
    name: Annotated[str, typer.Option(help="what the memory is called in the tables")] = cfg.DEFAULT_MEMORY,
    lora: Annotated[Path | None, typer.Option(help="LoRA folder")] = None,
    dapt: Annotated[Path | None, typer.Option(help="folder of the base after DAPT")] = None,
    datastore: Annotated[list[Path], typer.Option(help="the base's own keys; repeat for every shard")] = [],
    index: Annotated[Path | None, typer.Option(help="index over them; both give the kNN-LM")] = None,
    passages: Annotated[Path | None, typer.Option(help="passages of the corpus, for In-Context RAG")] = None,
    also: Annotated[
        list[Path], typer.Option(help="general corpus to measure on as well, at the weights tuned on --corpus; repeat")
    ] = [],
    seed: Seed = 0,
    compute: cfg.Compute = cfg.AUTO,
) -> None:
    """Perplexity with and without memory through lm-eval; alpha, or lambda and tau of the kNN-LM, tuned on valid."""
    from memdec import evaluate as stage_evaluate

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
        lora=lora,
        dapt=dapt,
        datastore=datastore,
        index=index,
        passages=passages,
        also=also,
        compute=compute,
    )


AnyModel = Annotated[str, typer.Option(help="model folder or Hub id")]
AnyMemory = Annotated[str, typer.Option(help="memory folder or Hub id")]
Alphas = Annotated[list[float], typer.Option("--alpha", help="weight of the memory; repeat (default 0, 0.05 ... 1)")]
AnySplit = Annotated[str, typer.Option(help="train, valid or test")]
BatchSize = Annotated[int, typer.Option(help="texts per forward pass")]


def _model_arguments(batch_size: int, compute: cfg.Compute) -> dict[str, Any]:
    """As lm-eval's models take them."""
    from memdec import devices

    device = str(devices.pick(compute))
    return {"batch_size": batch_size, "device": device, "dtype": devices.precision(compute)}


def _split(name: str) -> cfg.Split:
    if name not in cfg.SPLITS:
        raise ConfigError(f"--split: expected {', '.join(cfg.SPLITS)}, found {name!r}")
    return name


@stage()
def sweep(
    base: AnyModel,
    memory: AnyMemory,
    out: Out,
    task: Annotated[list[str], typer.Option(help="lm-eval task; repeat")],
    alpha: Alphas = [],
    corpus: Annotated[Path | None, typer.Option(help="corpus folder, for the task memdec_ppl")] = None,
    split: AnySplit = "test",
    limit: Annotated[int | None, typer.Option(help="only the first so many rows of each task")] = None,
    batch_size: BatchSize = 8,
    compute: cfg.Compute = cfg.AUTO,
) -> None:
    """Tasks of lm-eval at every alpha, from one pass of the models: table and figure."""
    from memdec import sweep as stage_sweep

    arguments = _model_arguments(batch_size, compute)
    alphas = alpha or stage_sweep.ALPHAS
    stage_sweep.run(
        base, memory, task, out, alphas=alphas, corpus=corpus, split=_split(split), limit=limit, **arguments
    )
    print(stage_sweep.shown(out))


@stage()
def tune(
    base: AnyModel,
    memory: AnyMemory,
    corpus: Corpus,
    alpha: Alphas = [],
    split: AnySplit = "valid",
    batch_size: BatchSize = 8,
    compute: cfg.Compute = cfg.AUTO,
) -> None:
    """The alpha with the lowest perplexity on a corpus, as JSON."""
    from memdec import sweep as stage_sweep

    arguments = _model_arguments(batch_size, compute)
    alphas = alpha or stage_sweep.ALPHAS
    found = stage_sweep.tune(base, memory, corpus, alphas=alphas, split=_split(split), **arguments)
    best = next(iter(found))
    sweep = {f"{each:g}": found[each] for each in sorted(found)}
    print(json.dumps({"alpha": best, "perplexity": found[best], "split": split, "sweep": sweep}))


@stage(cfg.LatencySettings)
def latency(
    base: BaseName,
    memory: MemoryName,
    out: Out,
    settings: cfg.LatencySettings,
    alpha: Alpha = 0.6,
    tokens: Annotated[
        Path | None, typer.Option(help="token folder: prompts are pieces of its test split (default: made up by seed)")
    ] = None,
    knn: Annotated[
        list[str], typer.Option(help="STORE:INDEX of the base's own keys, shards joined by +; repeat for other sizes")
    ] = [],
    passages: Annotated[Path | None, typer.Option(help="passages for In-Context RAG")] = None,
    compute: cfg.Compute = cfg.AUTO,
) -> None:
    """Prefill and decoding speed of base, MemDec, speculative decoding and, given their folders, kNN-LM and RAG."""
    from memdec import latency as stage_latency

    folders = stage_latency.Folders(base, memory, [_store_and_index(each) for each in knn], passages)
    systems = stage_latency.systems(folders, alpha, settings, compute)
    stage_latency.run(systems, out, settings, inputs=folders.identities(alpha), stream=tokens, compute=compute)


def _store_and_index(text: str) -> tuple[list[Path], Path]:
    stores, colon, index = text.rpartition(":")
    if not colon:
        raise ConfigError(f"--knn: expected STORE:INDEX, found {text!r}")
    return [Path(folder) for folder in stores.split("+")], Path(index)


@stage(cfg.ExplainSettings)
def explain(
    base: BaseName,
    memory: MemoryName,
    settings: cfg.ExplainSettings,
    text: Annotated[str, typer.Argument(help="the text, unless --file gives it")] = "",
    file: Annotated[Path | None, typer.Option(help="UTF-8 file with the text")] = None,
    alpha: Alpha = 0.6,
    datastore: Annotated[list[Path], typer.Option(help="datastore folder, for p_kNN; repeat for every shard")] = [],
    index: Annotated[Path | None, typer.Option(help="index folder over the datastore")] = None,
    html: Annotated[Path | None, typer.Option(help="page to write: the text as a heat map")] = None,
    compute: cfg.Compute = cfg.AUTO,
) -> None:
    """What base, memory and their mixture expected at every token of a text."""
    from memdec import explain as stage_explain

    if text and file is not None:
        raise ConfigError("memdec explain: expected a text or --file, found both; leave out one")
    text = _read(file) if file is not None else text
    stage_explain.run(
        base, memory, text, settings, alpha=alpha, datastore=datastore, index_folder=index, out=html, compute=compute
    )


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")  # line ends as they are
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: expected a file with UTF-8 text, found {error}") from None


RunConfig = Annotated[Path, typer.Option(help="config of the run, YAML or JSON")]
Cells = Annotated[list[str], typer.Option(help="DOMAIN:MODEL:SEED:FOLDER of an evaluation or of cases; repeat")]
TableFile = Annotated[Path, typer.Option(help="CSV file; .md, .tex and .provenance.json are put beside it")]


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
    name: Annotated[str, typer.Option(help="table1, table3, table4, table6, memories or forgetting")],
    config: RunConfig,
    cell: Cells,
    out: TableFile,
) -> None:
    """A table from evaluations, or Table 6 from `memdec cases`."""
    from memdec import catalogue, tables

    tables.run(catalogue.table(cfg.load(config), name), _cells(cell), out)


@app.command()
def cases(
    config: RunConfig,
    base: Annotated[Path, typer.Option(help="base model folder")],
    memory: Annotated[Path, typer.Option(help="memory decoder folder")],
    datastore: Annotated[list[Path], typer.Option(help="keys the memory was trained on; repeat for every shard")],
    index: Annotated[Path, typer.Option(help="index folder over the datastore")],
    out: Out,
) -> None:
    """For Table 6: what memory, neighbours and base give marked words of the config's texts."""
    from memdec import cases as stage_cases

    stage_cases.run(cfg.load(config), base, memory, datastore, index, out)


@app.command()
def check(
    results: Annotated[Path, typer.Argument(help="a table3.csv with its .provenance.json beside it")],
    baseline: Annotated[Path, typer.Option(help="tests/regression/<scale>.json")],
    write: Annotated[bool, typer.Option("--write", help="make the baseline from these results instead")] = False,
    noise: Annotated[
        list[Path], typer.Option(help="with --write: tables of other seeds, to measure the tolerance")
    ] = [],
) -> None:
    """Compare perplexities with a baseline: exit 1 beyond the tolerance, 3 where they cannot be compared."""
    from memdec import regression

    if write:
        regression.write(results, noise, baseline)
        return
    lines, moved = regression.compare(results, baseline)
    print("\n".join(lines))
    if moved:
        raise SystemExit(1)


@app.command()
def doctor(
    folder: Annotated[Path, typer.Argument(help="folder to look through")] = Path("results"),
) -> None:
    """Find artefacts that are cut: exit 1 where there are; without their manifests nobody reads them any more."""
    from memdec import doctor as look

    lines, n_damaged = look.run(folder)
    print("\n".join(lines))
    if n_damaged:
        raise SystemExit(1)


data_app = typer.Typer(no_args_is_help=True, help="Files that the tasks read.")
app.add_typer(data_app, name="data")
DataTasks = Annotated[list[str], typer.Option(help="folder of a task, e.g. pubmedqa; repeat (default: all)")]


@data_app.command("fetch")
def data_fetch(
    task: DataTasks = [],
    out: Annotated[Path | None, typer.Option(envvar="MEMDEC_DATA", help="folder to fill")] = None,
) -> None:
    """Bring what the Hub and GitHub have into a folder, with sources.json; what is there and right stays."""
    from memdec import data

    folder = _data_folder(out, "--out")
    print(data.origins_line(data.to_fetch(task)), file=sys.stderr)
    _show_files(data.fetch(folder, task), True)


@data_app.command("verify")
def data_verify(
    folder: Annotated[Path | None, typer.Argument(envvar="MEMDEC_DATA", help="folder with the files")] = None,
    task: DataTasks = [],
) -> None:
    """Check the files of a folder: exit 1 where one is not whole, has other rows or was changed."""
    from memdec import data

    _show_files(data.verify(_data_folder(folder, "FOLDER"), task), bool(task))


def _data_folder(folder: Path | None, name: str) -> Path:
    if folder is None:
        raise ConfigError(f"memdec data: expected {name} or MEMDEC_DATA, found neither; give one")
    return folder


def _show_files(found: list[Any], all_needed: bool) -> None:
    from memdec import data

    print(data.shown(found))
    if data.wrong(found, all_needed):
        raise SystemExit(1)


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(help="folder or results file of lm_eval with --log_samples")],
    run_b: Annotated[Path | None, typer.Argument(help="the other one")] = None,
    csv: Annotated[Path | None, typer.Option(help="file to write the rows to, with more columns")] = None,
) -> None:
    """Two runs of lm_eval on the same rows: differences with 95 % intervals and p-values; of one run its intervals."""
    from memdec import artifacts
    from memdec import compare as stage_compare

    rows = stage_compare.compare(run_a, run_b or run_a)
    print(stage_compare.shown(rows) if run_b is not None else stage_compare.shown_alone(rows))
    if csv is not None:
        artifacts.write_text(csv, rows.to_csv(index=False, lineterminator="\n"))


@app.command()
def schema(
    out: Annotated[Path, typer.Argument(help="file to write, e.g. workflow/schemas/config.schema.json")],
) -> None:
    """JSON schema of the configuration."""
    from memdec import artifacts

    artifacts.write_json(out, cfg.json_schema())


@app.command()
def validate(config: Annotated[Path, typer.Argument(help="config file")]) -> None:
    """Check a config file: all problems at once."""
    cfg.load(config)
    print(f"{config}: valid")


def main() -> None:
    """Entry point: errors the user can act on are one line."""
    try:
        app(standalone_mode=False)
    except MemDecError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except (typer.Exit, typer.Abort) as stop:
        raise SystemExit(getattr(stop, "exit_code", 1)) from None
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            print(f"error: {getattr(error, 'format_message', lambda: error)()}", file=sys.stderr)
            raise SystemExit(2) from None
        raise


if __name__ == "__main__":
    main()
