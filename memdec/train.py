"""Training stages: base models from scratch, domain fine-tuning (DAPT), LoRA, and the memory decoder.

Inputs: a token stream, a starting model, and for the memory the target shards. Output: a model folder that
`from_pretrained` and lm-eval load, with its tokenizer and a model card; or a peft adapter folder. Every stage is
`fitting.fit` with another objective; under `torchrun` or `accelerate launch` (DDP, FSDP) the processes share the work.
The same command goes on where a killed run was.
"""

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from memdec import artifacts, cards, devices, fitting, flops, keypoints, models, resources, tokens
from memdec.config import AUTO, Compute, LoraSettings, MemorySettings, ModelSpec, TrainSettings
from memdec.errors import ArtifactError, ConfigError, ModelError
from memdec.targets import TargetReader

_SETTINGS = "settings.json"  # in the work folder: what the unfinished run was started with


def run_pretrain(
    spec: ModelSpec,
    tokenizer: Path,
    stream: Path,
    out: Path,
    *,
    context: int,
    compute: Compute = AUTO,
) -> None:
    """Stage `pretrain`: a base model from scratch (mini scale), next-token loss on a general corpus."""
    if spec.train is None:
        raise ConfigError(
            f"{out}: expected a model with 'architecture' and 'train', found a pretrained one; use `memdec model`"
        )
    words = tokens.load_tokenizer(str(tokenizer))
    settings = {**spec.model_dump(mode="json"), "train": _plain(spec.train, compute), "context": context}
    inputs = {
        "tokenizer": artifacts.read(tokenizer, "tokenizer").recipe,
        "tokens": artifacts.read(stream, "tokens").recipe,
    }
    task = fitting.Task(words, stream, context, spec.seed, compute=compute)
    _train(
        "model",
        lambda: models.from_scratch(spec, len(words), context, words.eos_token_id),
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
    compute: Compute = AUTO,
) -> None:
    """Stage `finetune`: all weights on the domain (the paper's DAPT; also the model that gives the keys).

    `budget`: most operations, as so many epochs of full training of a model; the same for `run_lora` and `run_train`.
    """
    words = _checked(model_folder, stream, context)
    plain = {**_plain(settings, compute), "context": context, "seed": seed, **_ceiling(budget, stream, context)}
    task = fitting.Task(words, stream, context, seed, ceiling=plain.get("flops_ceiling"), compute=compute)
    inputs = _inputs(model_folder, stream)
    make = partial(models.load, model_folder, dropout=settings.dropout)
    _train("model", make, settings, task, out, plain, inputs, stage="finetune")


def run_lora(
    model_folder: Path,
    stream: Path,
    out: Path,
    settings: LoraSettings,
    *,
    context: int,
    seed: int,
    budget: tuple[Path, float] | None = None,
    match: Path | None = None,
    compute: Compute = AUTO,
) -> None:
    """Stage `lora`: a peft adapter on the query, key, value and MLP projections.

    Without `settings.rank` the rank is the one that comes nearest to the parameters of the model in `match` (the paper
    sets it so that adapter and memory are of one size), but at most the narrowest side of an adapted matrix.
    """
    if settings.rank is None and match is None:
        raise ConfigError("lora: expected 'rank', or --match with a model of the memory's size, found neither")
    words = _checked(model_folder, stream, context)
    wanted = None if match is None or settings.rank is not None else models.n_parameters(models.on_meta(match))
    plain = {**_plain(settings, compute), "context": context, "seed": seed, **_ceiling(budget, stream, context)}
    plain |= {} if wanted is None else {"parameters_wanted": wanted}

    def adapted() -> Any:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        base = models.load(model_folder, dropout=settings.dropout)
        modules = _projections(base)
        rank = settings.rank if wanted is None else matched_rank(base, modules, wanted)
        adapter = LoraConfig(
            r=rank,
            lora_alpha=settings.scale * rank,  # type: ignore[operator]
            lora_dropout=settings.adapter_dropout,
            target_modules=modules,
            fan_in_fan_out=base.config.model_type == "gpt2",
            task_type="CAUSAL_LM",
        )
        return get_peft_model(base, adapter)

    task = fitting.Task(words, stream, context, seed, ceiling=plain.get("flops_ceiling"), compute=compute)
    _train("lora", adapted, settings, task, out, plain, _inputs(model_folder, stream))


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
    bases: Sequence[Path] = (),
    compute: Compute = AUTO,
) -> None:
    """Stage `train`: the memory decoder, on beta * KL(p_kNN || p_mem) + (1 - beta) * CE or another objective.

    `bases` are mixed with it at every evaluation; with them the best evaluation is that of the mixtures.

    Raises:
        ArtifactError: The targets were made for other tokens, or do not cover the stream; seen before the model loads.
    """
    words = _checked(model_folder, stream, context)
    reader, inputs = None, _inputs(model_folder, stream)
    if settings.objective == "ce":
        if targets:
            raise ConfigError(f"train: expected no --targets with objective ce, found {len(targets)}")
    else:
        reader = TargetReader(targets, expected_tokens=artifacts.read(stream, "tokens").facts["sha256"]["train"])
        inputs |= {f"targets {i}": recipe for i, recipe in enumerate(reader.recipes)}
    named = {base.name: base for base in bases}
    if len(named) < len(bases):
        raise ConfigError(f"train: expected bases in folders of different names, found {', '.join(map(str, bases))}")
    for name, base in named.items():
        _checked(base, stream, context)
        inputs |= {f"base {name}": artifacts.read(base, "model").recipe}
    plain = {**_plain(settings, compute), "context": context, "seed": seed, **_ceiling(budget, stream, context)}
    task = fitting.Task(words, stream, context, seed, reader, named, plain.get("flops_ceiling"), compute)
    _train("memory", lambda: models.load(model_folder, dropout=settings.dropout), settings, task, out, plain, inputs)


# --- shared by the stages -----------------------------------------------------------------------------------------


def _train(
    kind: cards.Kind,
    make: Any,
    settings: TrainSettings,
    task: fitting.Task,
    out: Path,
    plain: dict[str, Any],
    inputs: dict[str, str],
    stage: str | None = None,
) -> None:
    """Make the model, train it, save it with its tokenizer and card."""
    fitting.check_reporting(settings.report_to)
    _refuse_changes(out, {"settings": plain, "inputs": inputs})
    team = resources.team(devices.pick(task.compute).type == "cpu")
    with artifacts.building(out, kind, plain, inputs, team, stage) as build:
        if build is None:
            return
        if team.rank == 0:
            artifacts.write_json(build.work / _SETTINGS, {"settings": plain, "inputs": inputs})
        model = make()
        facts, trainer = fitting.fit(model, settings, task, build.work)
        state = _whole_state(trainer)
        if team.rank > 0:
            return
        model.save_pretrained(out, state_dict=state)
        if kind == "lora":
            facts |= {
                "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "rank": model.peft_config["default"].r,
            }
        else:
            task.words.save_pretrained(out)
            facts["parameters"] = models.n_parameters(model)
        build.facts.update(facts, device=devices.name(task.compute), **_lineage(out, task.stream))
        cards.write(out, kind=kind, facts=build.facts, settings=plain, inputs=inputs)


def _whole_state(trainer: fitting.LossTrainer) -> dict[str, Any]:
    """All weights of the language model, gathered where processes hold parts of them."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {name.removeprefix("lm."): value for name, value in (state or {}).items()}


def _plain(settings: TrainSettings, compute: Compute) -> dict[str, Any]:
    """What decides the result; where curves are reported to does not, the number of windows in an update does."""
    team = resources.team(devices.pick(compute).type == "cpu")
    decides = {"processes": team.size, "precision": devices.precision(compute)}
    return {**settings.model_dump(mode="json", exclude={"report_to"}), **decides}


def _ceiling(budget: tuple[Path, float] | None, stream: Path, context: int) -> dict[str, float]:
    if budget is None:
        return {}
    n_tokens = artifacts.read(stream, "tokens").facts["tokens"]["train"]
    return {"flops_ceiling": flops.ceiling(budget[0], budget[1], n_tokens, context)}


def _refuse_changes(out: Path, now: Mapping[str, Any]) -> None:
    """Hours of an unfinished training are not thrown away for a changed setting.

    Raises:
        ArtifactError: A checkpoint is there that was made with other settings or inputs; names them.
    """
    file = out / artifacts.WORK / _SETTINGS
    if not file.is_file() or not list(file.parent.glob("checkpoint-*")):
        return
    there = json.loads(file.read_text(encoding="utf-8"))
    changes = [
        f"{key} ({old.get(key)} there, {new.get(key)} now)"
        for old, new in ((there["settings"], now["settings"]), (there["inputs"], now["inputs"]))
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    if changes:
        raise ArtifactError(
            f"{out}: expected the settings of the unfinished training there, found changes in {', '.join(changes)}; "
            "restore them to go on, delete the folder to start anew, or choose another --out"
        )


def _inputs(model_folder: Path, stream: Path) -> dict[str, str]:
    return {"model": artifacts.read(model_folder, "model").recipe, "tokens": artifacts.read(stream, "tokens").recipe}


def _checked(model_folder: Path, stream: Path, context: int) -> Any:
    """The model's tokenizer, which must be the one that made the stream; nothing of the model is loaded.

    Raises:
        ArtifactError: Another tokenizer.
        ModelError: A head for fewer tokens.
        ConfigError: More context than the model holds.
    """
    manifest = artifacts.read(stream, "tokens")
    artifacts.read(model_folder, "model")
    words = tokens.load_tokenizer(str(model_folder))
    tokens.check_same(manifest.facts["tokenizer_sha256"], tokens.fingerprint(words), f"{model_folder} with {stream}")
    config = models.config(model_folder)
    if config.vocab_size < len(words):
        raise ModelError(
            f"{model_folder}: expected a head for the tokenizer's {len(words)} tokens, found one for {config.vocab_size}; "
            "use a model of this tokenizer, or `memdec adapt-vocab`"
        )
    limit = models.n_positions(config)
    if limit is not None and context > limit:
        raise ConfigError(
            f"{model_folder}: expected a context of at most {limit} tokens, which is what the model holds, found "
            f"{context}; lower 'context'"
        )
    return words


def _lineage(out: Path, stream: Path) -> dict[str, Any]:
    """Which text and tokenizer this was trained on; the corpus as a path relative to the artefact."""
    facts = artifacts.read(stream, "tokens").facts
    return {
        "corpus": os.path.relpath((stream / facts["corpus"]).resolve(), out.resolve()),
        "corpus_sha256": facts["corpus_sha256"],
        "tokenizer_sha256": facts["tokenizer_sha256"],
    }


def matched_rank(model: Any, modules: Sequence[str], wanted: int) -> int:
    """Rank whose adapters have about `wanted` parameters: rank x (inputs + outputs) of every matrix.

    At most the narrowest side of a matrix, beyond which a rank adds nothing.
    """
    shapes: list[tuple[int, int]] = [tuple(model.get_submodule(name).weight.shape) for name in modules]
    return max(1, min(round(wanted / sum(map(sum, shapes))), *(min(shape) for shape in shapes)))


def _projections(model: Any) -> list[str]:
    """Names of the query, key, value and MLP projections present in a model (paper, section 4.1)."""
    known = {"c_attn", "q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value"}
    part = keypoints.last_mlp(model)
    mlp = {name for name, _ in part.named_children()} or {"fc1", "fc2"}  # a bare matrix: no module of its own
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
        "dense_h_to_4h",
        "dense_4h_to_h",
    }
    return sorted(
        name
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in (known & found)
        or (
            name.rsplit(".", 1)[-1] in mlp
            and ".attn." not in name
            and ".self_attn." not in name
            and hasattr(module, "weight")
        )
    )
