"""Training stages: base models from scratch, domain fine-tuning (DAPT), LoRA, and the memory decoder.

Inputs: a token stream, a starting model, and for the memory the target shards. Output: a model folder that
`from_pretrained` and lm-eval load, with its tokenizer and a model card; or a peft adapter folder. Every stage calls
`fitting.fit` with its model and objective. Under `torchrun` or `accelerate launch` (DDP, FSDP) the processes share the
work. The same command resumes an interrupted run.
"""

import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from memdec.artefacts import artefact, devices, resources
from memdec.datastore.target_rows import TargetReader
from memdec.errors import ArtifactError, ConfigError, ModelError
from memdec.models import cards, flops, keypoints, loading
from memdec.settings import AUTO, Compute, LoraSettings, MemorySettings, ModelSpec, TrainSettings
from memdec.text import tokens
from memdec.training import fitting, rates

_SETTINGS = "settings.json"  # file in the work folder with the settings and inputs of the unfinished run


def run_pretrain(
    spec: ModelSpec,
    tokenizer: Path,
    stream: Path,
    out: Path,
    *,
    context: int,
    compute: Compute = AUTO,
) -> None:
    """Stage `pretrain`: train a base model from scratch (mini scale) with next-token loss on a general corpus."""
    if spec.train is None:
        raise ConfigError(
            f"{out}: expected a model with 'architecture' and 'train', found a pretrained one; use `memdec model`"
        )
    words = tokens.load_tokenizer(str(tokenizer))
    settings = {**spec.model_dump(mode="json"), "train": _plain(spec.train, compute), "context": context}
    inputs = {
        "tokenizer": artefact.read(tokenizer, "tokenizer").recipe,
        "tokens": artefact.read(stream, "tokens").recipe,
    }
    task = fitting.Task(words, stream, context, spec.seed, compute=compute)
    _train(
        "model",
        lambda: loading.from_scratch(spec, tokens.n_ids(words), context, words.eos_token_id),
        spec.train,
        task,
        out,
        settings,
        inputs,
    )


def run_finetune(
    model_folder: Path,
    stream: Path,
    out: Path,
    settings: TrainSettings,
    *,
    context: int,
    seed: int,
    budget: tuple[Path, float] | None = None,
    tuned_by: Path | None = None,
    compute: Compute = AUTO,
) -> None:
    """Stage `finetune`: train all weights on the domain (the paper's DAPT; also the model that gives the keys).

    `budget` (model folder, epochs) limits the FLOPs to those of training all weights of that model for these epochs.
    `tuned_by` is the same training with another seed, whose learning rate is taken instead of trying all candidates
    again. Both are the same in `run_lora` and `run_train`.
    """
    words = _checked(model_folder, stream, context)
    plain = {**_plain(settings, compute), "context": context, "seed": seed, **_ceiling(budget, stream, context)}
    task = fitting.Task(words, stream, context, seed, ceiling=plain.get("flops_ceiling"), compute=compute)
    inputs = _inputs(model_folder, stream)
    make = partial(loading.load, model_folder, dropout=settings.dropout)
    _train("model", make, settings, task, out, plain, inputs, tuned_by, stage="finetune")


def run_lora(
    model_folder: Path,
    stream: Path,
    out: Path,
    settings: LoraSettings,
    *,
    context: int,
    seed: int,
    budget: tuple[Path, float] | None = None,
    tuned_by: Path | None = None,
    match: Path | None = None,
    compute: Compute = AUTO,
) -> None:
    """Stage `lora`: train a peft adapter on the query, key, value and MLP projections.

    Without `settings.rank`, the rank is chosen such that the adapter has about as many parameters as the model in
    `match` (the paper gives adapter and memory the same size). In each matrix it is at most the smaller dimension.
    """
    if settings.rank is None and match is None:
        raise ConfigError("lora: expected 'rank', or --match with a model of the memory's size, found neither")
    words = _checked(model_folder, stream, context)
    wanted = None if match is None or settings.rank is not None else loading.n_parameters(loading.on_meta(match))
    plain = {**_plain(settings, compute), "context": context, "seed": seed, **_ceiling(budget, stream, context)}
    plain |= {} if wanted is None else {"parameters_wanted": wanted}

    def adapted() -> Any:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        base = loading.load(model_folder, dropout=settings.dropout)
        modules = _projections(base)
        ranks = {} if wanted is None else matched_ranks(base, modules, wanted)
        rank = settings.rank or max(ranks.values())
        lower = {name: each for name, each in ranks.items() if each != rank}
        adapter = LoraConfig(
            r=rank,
            lora_alpha=settings.scale * rank,
            rank_pattern=lower,
            alpha_pattern={name: settings.scale * each for name, each in lower.items()},
            lora_dropout=settings.adapter_dropout,
            target_modules=modules,
            fan_in_fan_out=base.config.model_type == "gpt2",
            task_type="CAUSAL_LM",
        )
        return get_peft_model(base, adapter)

    task = fitting.Task(words, stream, context, seed, ceiling=plain.get("flops_ceiling"), compute=compute)
    _train("lora", adapted, settings, task, out, plain, _inputs(model_folder, stream), tuned_by)


def run_train(
    model_folder: Path,
    stream: Path,
    targets: Sequence[Path],
    out: Path,
    settings: MemorySettings,
    *,
    context: int,
    seed: int,
    budget: tuple[Path, float] | None = None,
    tuned_by: Path | None = None,
    bases: Sequence[Path] = (),
    compute: Compute = AUTO,
) -> None:
    """Stage `train`: train the memory decoder on beta * KL(p_kNN || p_mem) + (1 - beta) * CE or another objective.

    Every evaluation mixes the memory with each of `bases`. If there are any, the mixtures decide which evaluation is
    best.

    Raises:
        ArtifactError: The targets were made for other tokens, or do not cover the token stream. This is checked before
            the model is loaded.
    """
    words = _checked(model_folder, stream, context)
    reader, inputs = None, _inputs(model_folder, stream)
    if settings.objective == "ce":
        if targets:
            raise ConfigError(f"train: expected no --targets with objective ce, found {len(targets)}")
    else:
        reader = TargetReader(targets, expected_tokens=artefact.read(stream, "tokens").facts["sha256"]["train"])
        inputs |= {f"targets {i}": recipe for i, recipe in enumerate(reader.recipes)}
    named = {base.name: base for base in bases}
    if len(named) < len(bases):
        raise ConfigError(f"train: expected bases in folders of different names, found {', '.join(map(str, bases))}")
    for name, base in named.items():
        _checked(base, stream, context)
        inputs |= {f"base {name}": loading.known(base, "model").recipe}
    plain = {**_plain(settings, compute), "context": context, "seed": seed, **_ceiling(budget, stream, context)}
    task = fitting.Task(words, stream, context, seed, reader, named, plain.get("flops_ceiling"), compute)
    make = partial(loading.load, model_folder, dropout=settings.dropout)
    stage = "bild" if settings.objective == "bild" else None
    _train("memory", make, settings, task, out, plain, inputs, tuned_by, stage=stage)


# --- shared by the stages -----------------------------------------------------------------------------------------


def _train(
    kind: cards.Kind,
    make: Any,
    settings: TrainSettings,
    task: fitting.Task,
    out: Path,
    plain: dict[str, Any],
    inputs: dict[str, str],
    tuned_by: Path | None = None,
    stage: str | None = None,
) -> None:
    """Make the model, train it, and save it with its tokenizer and card."""
    fitting.check_reporting(settings.report_to)
    other = None if tuned_by is None else _tuned(tuned_by, kind, plain)
    inputs = inputs if other is None else inputs | {"tuned by": other.recipe}
    _refuse_changes(out, {"settings": plain, "inputs": inputs})
    team = resources.team(devices.pick(task.compute).type == "cpu")
    with artefact.building(out, kind, plain, inputs, team, stage) as build:
        if build is None:
            return
        if team.rank == 0:
            artefact.write_json(build.work / _SETTINGS, {"settings": plain, "inputs": inputs})
        model, facts, trainer = rates.train(make, settings, task, build.work, None if other is None else other.facts)
        state = _whole_state(trainer)
        if team.rank > 0:
            return
        if kind == "lora":  # peft keeps a set, whose order depends on the process
            model.peft_config["default"].target_modules = sorted(model.peft_config["default"].target_modules)
        model.save_pretrained(out, state_dict=state)
        if kind == "lora":
            facts |= {
                "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "rank": model.peft_config["default"].r,
            }
        else:
            task.words.save_pretrained(out)
            facts["parameters"] = loading.n_parameters(model)
        build.facts.update(facts, device=devices.name(task.compute), **_lineage(out, task.stream))
        cards.write(out, kind=kind, facts=build.facts, settings=plain, inputs=inputs)


def _tuned(folder: Path, kind: str, plain: Mapping[str, Any]) -> artefact.Manifest:
    """The manifest of the same training with another seed.

    Raises:
        ArtifactError: It has other settings, or its learning rate was not tuned.
    """
    found = artefact.read(folder, kind)
    differ = sorted(
        name for name in {*plain, *found.settings} - {"seed"} if plain.get(name) != found.settings.get(name)
    )
    if differ or found.settings.get("seed") == plain["seed"]:
        raise ArtifactError(
            f"{folder}: expected the same training with another seed than {plain['seed']}, found another "
            f"{', '.join(differ) or 'with this seed'}; leave --tuned-by out"
        )
    if not found.facts.get("trials"):
        raise ArtifactError(
            f"{folder}: expected a training that tried learning_rates, found none; leave --tuned-by out"
        )
    return found


def _whole_state(trainer: fitting.LossTrainer) -> dict[str, Any]:
    """All weights of the language model, gathered if they are sharded over processes."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    model: Any = trainer.model
    once = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}  # tied weights by their first name
    return {name.removeprefix("lm."): value for name, value in state.items() if name in once}


def _plain(settings: TrainSettings, compute: Compute) -> dict[str, Any]:
    """The settings that decide the result, with the number of processes and the precision.

    `report_to` is left out because it does not change the result. The number of processes does, as it multiplies the
    windows of an update.
    """
    team = resources.team(devices.pick(compute).type == "cpu")
    decides = {"processes": team.size, "precision": devices.precision(compute)}
    return {**settings.model_dump(mode="json", exclude={"report_to"}), **decides}


def _ceiling(budget: tuple[Path, float] | None, stream: Path, context: int) -> dict[str, float]:
    if budget is None:
        return {}
    n_tokens = artefact.read(stream, "tokens").facts["tokens"]["train"]
    return {"flops_ceiling": flops.ceiling(budget[0], budget[1], n_tokens, context)}


def _refuse_changes(out: Path, now: Mapping[str, Any]) -> None:
    """Refuse to discard the checkpoints of an unfinished training run because a setting has changed.

    Raises:
        ArtifactError: A checkpoint was made with other settings or inputs; the message names them.
    """
    file = out / artefact.WORK / _SETTINGS
    if not file.is_file() or not [*file.parent.glob("checkpoint-*"), *file.parent.glob("rate-*")]:
        return
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return  # a damaged file; `building` removes work of another recipe
    changes = [
        f"{key} ({old.get(key)} there, {new.get(key)} now)"
        for old, new in ((there["settings"], now["settings"]), (there["inputs"], now["inputs"]))
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    if changes:
        raise ArtifactError(
            f"{out}: expected the settings of the unfinished training there, found changes in {', '.join(changes)}; "
            "restore them to resume, delete the folder to start again, or choose another --out"
        )


def _inputs(model_folder: Path, stream: Path) -> dict[str, str]:
    return {"model": loading.known(model_folder, "model").recipe, "tokens": artefact.read(stream, "tokens").recipe}


def _checked(model_folder: Path, stream: Path, context: int) -> Any:
    """Check that a model fits a token stream, and return the model's tokenizer; the weights are not loaded.

    Raises:
        ArtifactError: The token stream was made with another tokenizer.
        ModelError: The model's head has fewer rows than the tokenizer has tokens.
        ConfigError: The context is longer than the model's positions.
    """
    manifest = artefact.read(stream, "tokens")
    loading.known(model_folder, "model")
    words = tokens.load_tokenizer(str(model_folder))
    ours = loading.tokenizer_sha256(model_folder, words)
    tokens.check_same(manifest.facts["tokenizer_sha256"], ours, f"{model_folder} with {stream}")
    config = loading.config(model_folder)
    if config.vocab_size < tokens.n_needed(words):
        raise ModelError(
            f"{model_folder}: expected a head for the tokenizer's {tokens.n_needed(words)} tokens, found one for {config.vocab_size}; "
            "use a model of this tokenizer, or `memdec adapt-vocab`"
        )
    loading.check_positions(loading.n_positions(config), context, f"{model_folder}: context", "lower 'context'")
    return words


def _lineage(out: Path, stream: Path) -> dict[str, Any]:
    """The corpus and tokenizer of the training run; the corpus is a path relative to the artefact."""
    facts = artefact.read(stream, "tokens").facts
    return {
        "corpus": os.path.relpath((stream / facts["corpus"]).resolve(), out.resolve()),
        "corpus_sha256": facts["corpus_sha256"],
        "tokenizer_sha256": facts["tokenizer_sha256"],
    }


def matched_ranks(model: Any, modules: Sequence[str], wanted: int) -> dict[str, int]:
    """A rank for each matrix, such that their adapters have about `wanted` parameters in all.

    A matrix with I inputs and O outputs gets min(r, I, O), because a larger rank adds nothing, and r is the same for all:
    the one for which the sum of min(r, I, O) (I + O) is nearest to `wanted`. Narrow matrices, such as the keys and values
    of grouped attention, do not hold back the others.
    """
    shapes: dict[str, tuple[int, int]] = {name: tuple(model.get_submodule(name).weight.shape) for name in modules}
    groups = Counter(shapes.values())

    def missed(rank: int) -> int:
        return abs(wanted - sum(n * min(rank, *shape) * sum(shape) for shape, n in groups.items()))

    rank = min(range(1, max(map(min, groups)) + 1), key=missed)
    return {name: min(rank, *shape) for name, shape in shapes.items()}


def _projections(model: Any) -> list[str]:
    """Names of a model's query, key, value and MLP projections (paper, section 4.1).

    Raises:
        ModelError: It has none that are known.
    """
    known = {"c_attn", "q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "Wqkv"}
    part = keypoints.last_mlp(model)
    mlp = {name for name, _ in part.named_children()} or {"fc1", "fc2"}  # OPT has bare matrices without an MLP module
    found = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    mlp &= {
        "c_fc",
        "c_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "gate_up_proj",
        "fc1",
        "fc2",
        "fc_in",
        "fc_out",
        "dense_h_to_4h",
        "dense_4h_to_h",
    }
    of_attention = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in known & found}
    of_mlp = {
        name
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in mlp
        and ".attn." not in name
        and ".self_attn." not in name
        and hasattr(module, "weight")
    }
    family = type(model).__name__
    if not of_attention | of_mlp:
        raise ModelError(
            f"lora: expected query, key, value and MLP projections, found none that are known in {family}; leave LoRA out of "
            "'systems', or use another model"
        )
    for what, names in (("attention", of_attention), ("MLP", of_mlp)):
        if not names:
            warnings.warn(
                f"lora: knows no projection of the {what} of {family}; only the others are adapted", stacklevel=3
            )
    return sorted(of_attention | of_mlp)
