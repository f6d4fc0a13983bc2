"""The config file of a whole run, as typed settings. `memdec.settings` has the settings of the single stages.

All models are frozen and refuse unknown keys. Each field states its unit and its origin: the paper, its released
script, or this project ("ours"). Snakemake validates a config against `workflow/schemas/config.schema.json`. `memdec
schema` generates that file from the classes here, and a test fails when it is out of date.
"""

import copy
import glob
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from memdec import plain
from memdec.artefacts.provenance import package_folder
from memdec.errors import ConfigError, on_one_line
from memdec.references import references
from memdec.settings import (
    DEFAULT_MEMORY,
    NPROBE,
    UNTUNED,
    AdaptSettings,
    CalibrateSettings,
    Case,
    Compute,
    CorpusSpec,
    DatastoreSettings,
    DocstringCorpus,
    EvaluateSettings,
    FileCorpus,
    IndexSettings,
    LatencySettings,
    LoraSettings,
    MemorySettings,
    ModelSpec,
    Name,
    Names,
    PassageSettings,
    SampleSettings,
    Seeds,
    Settings,
    ShapesSettings,
    Suite,
    SystemName,
    TableName,
    TargetSettings,
    TeacherSettings,
    TokenizerSpec,
    TrainSettings,
    WheelFile,
    each_once,
    locate,
    parse,
    problems,
)

# --- training -----------------------------------------------------------------------------------------------------


class Budget(Settings):
    """FLOP limit of a training run: the cost of training all weights of `model` (paper: 7B model, 1 epoch)."""

    model: Name = Field(description="model whose full training sets the limit; a name under 'models'")
    epochs: PositiveFloat = Field(1, description="passes of that training over the domain's train split")


class MemoryVariant(Settings):
    """An additional memory. A field that is not given has the value of the default memory."""

    memory_model: Name | None = Field(None, description="model that the memory starts from")
    key_model: Name | None = Field(None, description="model that gives the keys, or the teacher's distributions")
    tuned: bool = Field(True, description="fine-tune the key model on the domain first (paper); false: use it as it is")
    tuned_start: bool = Field(
        False, description="fine-tune the memory model on the domain before it becomes a memory (ours)"
    )
    targets: Literal["knn", "teacher", "mixture", "none"] | None = Field(
        None,
        description="distributions to train on: knn is p_kNN (paper); teacher is the key model's softmax (control); "
        "mixture is the kNN-LM of the key model, both of them by teacher.knn_weight (ours); none is for objective ce "
        "(default: 'imitates' of the config)",
    )
    dapt: bool = Field(
        False,
        description="do not train a memory: mix in the memory model after DAPT (paper, DAPT interpolation)",
    )
    ready: dict[Name, Name] = Field(
        default_factory=dict,
        description="do not train a memory: for each domain the model under 'models' that is its memory, such as a released "
        "one",
    )
    other_domain: bool = Field(
        False,
        description="do not train a memory: mix in the default memory of the next of 'domains', after the last one that "
        "of the first (negative control, ours); with one domain there is none",
    )
    neighbours: bool = Field(
        False,
        description="do not train a memory: mix in p_kNN of the key model's datastore, which a memory imitates (control: the "
        "kNN-LM with the keys of another model, lambda and tau tuned on valid; ours)",
    )
    adapt: Name | None = Field(
        None,
        description="start from this other memory, adapted to the key model's tokenizer; 'memdec': the default memory",
    )
    share: PositiveFloat = Field(
        1, le=1, description="fraction of the default memory's epochs and FLOP budget (paper: 0.1 with adapt)"
    )
    train: dict[str, Any] = Field(default_factory=dict, description="settings that differ from section 'memory'")
    models: Names | None = Field(
        None, min_length=1, description="base models it is evaluated with (default: all that share its tokenizer)"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for field, fitting in (
            ("dapt", ["memory_model", "models"]),
            ("ready", ["memory_model", "key_model", "tuned", "models"]),
            ("other_domain", ["models"]),
            ("neighbours", ["key_model", "tuned", "models"]),
        ):
            useless = self.model_fields_set - {field, *fitting} if getattr(self, field) else set()
            if useless:
                raise ValueError(
                    f"expected only {' and '.join(fitting)} beside {field}, found {', '.join(sorted(useless))}"
                )
        useless = self.model_fields_set & {"memory_model", "tuned_start"} if self.adapt is not None else set()
        if useless:
            raise ValueError(f"expected no other starting model beside adapt, found {', '.join(sorted(useless))}")
        return self


class Memory(Settings):
    """A memory with all defaults filled in; made by `Config.variant`."""

    name: Name
    memory_model: Name
    key_model: Name
    tuned: bool
    tuned_start: bool
    targets: Literal["knn", "teacher", "mixture", "none"]
    dapt: bool
    ready: dict[Name, Name]
    other_domain: bool
    neighbours: bool
    adapt: Name | None
    share: float
    train: MemorySettings
    models: list[Name]
    watched: list[Name]  # base models whose mixtures its training evaluates
    tokenizer: Name

    @property
    def own(self) -> bool:
        """Whether it is a memory of its own, trained here or ready, and nothing else that is mixed in as one."""
        return not self.dapt and not self.other_domain and not self.neighbours

    @property
    def keys(self) -> str:
        """Folder name of the artefacts that its key model makes."""
        return self.key_model + ("" if self.tuned else UNTUNED)


_MIXED_IN = ("dapt", "other_domain", "neighbours")  # what is mixed in and is no memory of its own


# --- studies and single models --------------------------------------------------------------------------------------

Section = dict[str, Any]  # settings that differ from those of the common part; checked when they are laid over it


class ForModel(Settings):
    """What differs for one model, laid over the sections of the config in every job that trains or evaluates it."""

    systems: Annotated[list[SystemName], AfterValidator(each_once)] | None = Field(
        None, min_length=1, description="systems evaluated with it, as far as 'systems' has them (default: all)"
    )
    finetune: Section = Field(default_factory=dict)
    dapt: Section = Field(default_factory=dict)
    lora: Section = Field(default_factory=dict)
    evaluate: Section = Field(
        default_factory=dict, description="one candidate makes a weight or temperature fixed: alphas: [0.8]"
    )
    compute: Section = Field(default_factory=dict, description="in the common part alone; device all for a large model")
    gpus: PositiveInt = Field(
        1, description="GPUs, in the common part alone: of a job with `launch`, or of an evaluation with device all"
    )
    launch: str | None = Field(
        None,
        description="what starts its trainings, those of memories that start from it, and its keys, in one process for each "
        "of `gpus`: torchrun, or a config of `accelerate launch` such as config/accelerate/fsdp.yaml; in the common part alone",
    )


class Study(Settings):
    """One question to the whole scale: the tables that it fills, and what differs from the common part of the config.

    What it gives is laid over the common part: mappings are joined key by key, everything else replaces. Corpora,
    tokenizers, models, suites, context, stride and numbers of shards are the same for all studies.
    """

    tables: Annotated[list[TableName], AfterValidator(each_once)] = Field(
        min_length=1, description="tables and figures that it fills; no other study may fill them, except for gains"
    )
    seeds: Seeds | None = Field(None, min_length=1)
    evaluated: Names | None = Field(None, min_length=1)
    domains: Names | None = Field(None, min_length=1)
    forgetting: Names | None = None
    systems: Annotated[list[SystemName], AfterValidator(each_once)] | None = Field(None, min_length=1)
    key_model: Name | None = None
    memory_model: Name | None = None
    imitates: Literal["knn", "teacher", "mixture"] | None = None
    memories: dict[Name, MemoryVariant] = Field(default_factory=dict)
    per_model: dict[Name, ForModel] = Field(default_factory=dict)
    finetune: Section = Field(default_factory=dict)
    dapt: Section | None = Field(default_factory=dict, description="null: as finetune")
    datastore: Section = Field(default_factory=dict)
    index: Section = Field(default_factory=dict)
    targets: Section = Field(default_factory=dict)
    teacher: Section = Field(default_factory=dict)
    calibrate: Section | None = Field(default_factory=dict, description="null: no choice of the targets' settings")
    memory: Section = Field(default_factory=dict)
    adapt: Section = Field(default_factory=dict)
    lora: Section = Field(default_factory=dict)
    budget: Section | None = Field(default_factory=dict, description="null: no limit")
    evaluate: Section = Field(default_factory=dict)
    latency: Section = Field(default_factory=dict)
    fidelity: Section = Field(default_factory=dict)
    shapes: Section = Field(default_factory=dict)
    cases: list[Case] = Field(default_factory=list)
    tasks: dict[Name, Names] = Field(default_factory=dict)


# Settings of which artefacts of each kind are made, besides the common part, their domain, seed and names. Studies that
# agree on them share the artefacts.
_KEYS = ("finetune", "datastore")
_TARGETS = (*_KEYS, "index", "calibrate", "targets")
SHARED_TABLES = ("gains",)  # made from several studies at once
MADE_OF: dict[str, tuple[str, ...]] = {
    "finetuned": ("finetune",),
    "dapt": ("finetune", "dapt", "budget"),
    "lora": ("lora", "budget", "memory_model"),
    "datastore": _KEYS,
    "index": (*_KEYS, "index"),
    "calibration": _TARGETS,
    "targets": _TARGETS,
    "teacher": (*_KEYS, "index", "calibrate", "teacher"),
    "mixture": (*_TARGETS, "teacher"),
    "memory": (
        *_TARGETS,
        "imitates",
        "teacher",
        "memory",
        "adapt",
        "budget",
        "key_model",
        "memory_model",
        "default_memory",
    ),
    "evaluation": ("evaluate", "forgetting"),
    "cases": ("cases",),
    "latency": ("latency",),
    "fidelity": ("fidelity",),
    "shapes": ("shapes",),
}


# --- the method ---------------------------------------------------------------------------------------------------


def _is_free(scale: str) -> str:
    """A scale whose folder in `results` is that of no other file, as a check of a field."""
    if scale in ("all", "reference"):
        raise ValueError(f"expected a name of no other file in results, found {scale}; choose another one")
    return scale


class Config(Settings):
    """The config of a whole run; `config/mini.yaml` is the default.

    With `studies` the fields beside it are the common part, which is itself the study of all tables that no study names.
    `study` and `study_for` give a study as a config of its own; tables and rules use nothing else.
    """

    scale: Annotated[Name, AfterValidator(_is_free)]
    study_name: Name | None = Field(None, description="the study that this config is; `Config.study` sets it")
    seeds: Seeds = Field(default=[0], min_length=1, description="each seed runs all stages after pretraining")
    context: PositiveInt = Field(1024, description="most tokens that a model sees at once (paper: 1024)")
    stride: PositiveInt = Field(512, description="tokens scored per window (paper: 512)")
    compute: Compute = Compute()
    tokenizers: dict[Name, TokenizerSpec]
    corpora: dict[Name, CorpusSpec]
    models: dict[Name, ModelSpec]
    evaluated: Names | None = Field(None, min_length=1, description="base models in the tables (default: all)")
    domains: Names = Field(min_length=1, description="corpora that get a memory; the columns of Table 3")
    forgetting: Names = Field(
        default=[],
        description="general corpora on which the domain's systems are measured, too, at the domain's weights (ours)",
    )
    systems: Annotated[list[SystemName], AfterValidator(each_once)] = Field(
        default=["base", "LoRA", "MemDec"], min_length=1, description="systems evaluated with every base model"
    )
    key_model: Name = Field(description="model that is fine-tuned on the domain and gives the keys")
    memory_model: Name = Field(description="model that the memory starts from")
    imitates: Literal["knn", "teacher", "mixture"] = Field(
        "knn",
        description="distributions that memories are trained on, where 'targets' of a memory says nothing (paper: knn)",
    )
    watch: Names | None = Field(
        None,
        min_length=1,
        description="base models whose mixtures with a memory are evaluated during its training, so that other ones do not "
        "change it (default: all that it is evaluated with)",
    )
    memories: dict[Name, MemoryVariant] = Field(
        default_factory=dict,
        description="memories in addition to the default one; an entry 'memdec' says what differs for that one",
    )
    per_model: dict[Name, ForModel] = Field(
        default_factory=dict, description="for a model: the systems it is evaluated in, and settings that differ"
    )
    finetune: TrainSettings = TrainSettings()
    dapt: TrainSettings | None = Field(None, description="training of the DAPT baseline (default: as finetune)")
    datastore: DatastoreSettings = DatastoreSettings()
    keep_keys: bool = Field(
        True,
        description="false: on the way to results/all, keys and index are removed once all targets are made from them, "
        "where nothing else reads them",
    )
    index: IndexSettings = IndexSettings()
    targets: TargetSettings = TargetSettings()
    teacher: TeacherSettings = TeacherSettings()
    calibrate: CalibrateSettings | None = Field(
        None,
        description="choose k, tau and top of the targets, and the mixture's lambda, on valid (default: as they are given)",
    )
    memory: MemorySettings = MemorySettings()
    adapt: AdaptSettings = AdaptSettings()
    lora: LoraSettings = LoraSettings()
    passages: PassageSettings = PassageSettings()
    budget: Budget | None = Field(
        None, description="FLOP limit of memories, LoRA and DAPT, not of the key model (paper)"
    )
    evaluate: EvaluateSettings = EvaluateSettings()
    latency: LatencySettings = LatencySettings()
    fidelity: SampleSettings = SampleSettings()
    shapes: ShapesSettings = ShapesSettings()
    cases: list[Case] = Field(default=[], description="rows of Table 6, measured on the first domain")
    suites: dict[Name, Suite] = Field(default_factory=dict, description="tasks of lm-eval that are run together")
    tasks: dict[Name, Names] = Field(
        default_factory=dict, description="for a domain: the suites that are run with everything made for it"
    )
    studies: dict[Name, Study] = Field(
        default_factory=dict, description="named overlays, each with the tables and figures that it fills"
    )

    @property
    def bases(self) -> list[str]:
        """Base models that are evaluated, in the order of the tables."""
        return list(self.models) if self.evaluated is None else self.evaluated

    @property
    def memory_names(self) -> list[str]:
        """All memories, the default one first."""
        return [DEFAULT_MEMORY, *self.other_memories]

    @property
    def other_memories(self) -> list[str]:
        """All memories but the default one."""
        return [name for name in self.memories if name != DEFAULT_MEMORY]

    def systems_of(self, model: str) -> list[SystemName]:
        """Systems that are evaluated with a base model, in the order of 'systems'."""
        given = self.per_model.get(model, ForModel()).systems
        return [name for name in self.systems if given is None or name in given]

    def gpus(self, model: str, *, launched: bool) -> int:
        """GPUs of a job with a model: `launched` is a stage that several processes can share, the others spread it."""
        found = self.per_model.get(model, ForModel())
        several = found.launch is not None if launched else found.compute.get("device") == "all"
        return found.gpus if several else 1

    def for_model(self, model: str) -> "Config":
        """The config of jobs that train or evaluate a model: its entry of `per_model` laid over the sections."""
        if model not in self.per_model:
            return self
        found: Config = parse(Config, self._laid_for(model), f"per_model.{model}")
        return found

    def _laid_for(self, model: str) -> dict[str, Any]:
        below = self.model_dump(exclude_unset=True, exclude={"studies", "per_model"})
        above = self.per_model[model].model_dump(exclude_unset=True, exclude={"systems", "gpus", "launch"})
        if "dapt" in above and self.dapt is None:
            below["dapt"] = below.get("finetune", {})  # DAPT is trained as the key model is
        found: dict[str, Any] = plain.merged(below, above)
        return found

    def variant(self, name: str) -> Memory:
        """The memory of this name, with all defaults filled in."""
        given = self._given(name)
        train: MemorySettings = parse(MemorySettings, self._settings(name), f"memories.{name}.train")
        if given.share < 1:
            train = train.model_copy(update={"epochs": train.epochs * given.share})
        default = self._given(DEFAULT_MEMORY)
        start = given.memory_model or default.memory_model or self.memory_model
        if given.adapt:
            start = self.variant(given.adapt).memory_model
        key_model = given.key_model or default.key_model or self.key_model
        tokenizer = self.models[start if given.dapt else key_model].tokenizer
        fitting = [base for base in self.bases if self.models[base].tokenizer == tokenizer]
        alone = given.other_domain and len(self.domains) == 1
        models = [] if alone else given.models or fitting
        watched = [base for base in self.watch or [] if self.models[base].tokenizer == tokenizer] or models
        watches = train.keep_best or train.evaluate_every is not None
        return Memory(
            **given.model_dump(include={"dapt", "ready", "other_domain", "neighbours", "adapt", "share"}),
            tuned=given.tuned if "tuned" in given.model_fields_set else default.tuned,
            tuned_start=given.tuned_start if {"tuned_start", "adapt"} & given.model_fields_set else default.tuned_start,
            name=name,
            memory_model=start,
            key_model=key_model,
            targets="none"
            if given.dapt or train.objective == "ce"
            else given.targets or default.targets or self.imitates,
            train=train,
            models=models,
            watched=watched if watches else [],
            tokenizer=tokenizer,
        )

    def _given(self, name: str) -> MemoryVariant:
        """What the config says of a memory; of the default one it may say nothing."""
        return self.memories.get(name, MemoryVariant()) if name == DEFAULT_MEMORY else self.memories[name]

    def memory_for(self, model: str) -> Memory | None:
        """The first memory of its own with the tokenizer of a model, which is the model's row in Table 3 or 4."""
        memories = (self.variant(name) for name in self.memory_names)
        fitting = (m for m in memories if m.own and m.tokenizer == self.models[model].tokenizer)
        return next(fitting, None)

    def next_domain(self, domain: str) -> str:
        """The domain whose default memory is the negative control of this one: the next, after the last the first."""
        return self.domains[(self.domains.index(domain) + 1) % len(self.domains)]

    @property
    def default_memory(self) -> Memory:
        """How the default memory is trained, whatever the bases that it is evaluated with."""
        return self.variant(DEFAULT_MEMORY).model_copy(update={"models": []})

    def study(self, name: str | None) -> "Config":
        """A study laid over the common part, as a config without studies; None: the common part alone.

        Raises:
            ConfigError: There is no such study.
        """
        if name is None and not self.studies:
            return self
        if name is not None and name not in self.studies:
            raise ConfigError(f"studies: expected one of {', '.join(self.studies) or 'none defined'}, found {name}")
        study: Config = parse(Config, self._laid(name), "config" if name is None else f"studies.{name}")
        return study

    def study_for(self, table: str) -> "Config":
        """The study that fills a table or figure, as `study` gives it; the common part if none names the table."""
        return self.study(next((name for name, study in self.studies.items() if table in study.tables), None))

    def every_study(self) -> dict[str | None, "Config"]:
        """The common part, under None, and all studies, as `study` gives them."""
        return {name: self.study(name) for name in (None, *self.studies)}

    def _laid(self, study: str | None) -> dict[str, Any]:
        """The plain data of the common part, with a study laid over it if it is named."""
        below = self.model_dump(exclude_unset=True, exclude={"studies"})
        if study is None:
            return below
        above = self.studies[study].model_dump(exclude_unset=True, exclude={"tables"})
        return {**plain.merged(below, above), "study_name": study}

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> "Config":
        if info.context is not _FIELDS_ONLY:
            wrong = [*references(self.model_dump(exclude_unset=True)), *self.contradictions()]
            if wrong:
                raise ValueError("; ".join(wrong))
        return self

    def contradictions(self) -> list[str]:
        """Settings that do not fit each other, one line each."""
        wrong = []
        if self.stride > self.context:
            wrong.append(f"stride: expected at most context ({self.context}), found {self.stride}")
        wrong += [
            f"{name}.seed: expected none, as the seed of the run is taken, found {getattr(self, name).seed}; remove it"
            for name in ("fidelity", "shapes")
            if "seed" in getattr(self, name).model_fields_set
        ]
        wrong += self._search()
        wrong += [line for name in self.memories for line in self._train(name)]
        wrong += [line for name in self.per_model for line in self._for_model(name)]
        names = references(self.model_dump(exclude_unset=True))
        if not wrong and not names:
            wrong = [line for name in self.memory_names for line in self._memory(name)] or self._without_memory()
        return wrong + self._studies({*wrong, *names})

    def _studies(self, known: set[str]) -> list[str]:
        """Faults of the studies, without those that are `known` of the common part."""
        wrong = []
        filled: dict[str, str] = {}
        for name, study in self.studies.items():
            where = f"studies.{name}"
            for table in study.tables:
                if table not in SHARED_TABLES and filled.setdefault(table, name) != name:
                    wrong.append(
                        f"{where}.tables: expected tables that no other study fills, found {table} of {filled[table]}; "
                        "leave it to one of them"
                    )
            for section in ("datastore", "targets", "teacher"):
                if "shards" in getattr(study, section):
                    wrong.append(
                        f"{where}.{section}.shards: expected it in the common part only, found "
                        f"{getattr(study, section)['shards']}; move it there"
                    )
            for model, given in study.per_model.items():
                wrong += [
                    f"{where}.per_model.{model}.{field}: expected it in the common part only, found it here; move it there"
                    for field in ("compute", "gpus", "launch")
                    if field in given.model_fields_set
                ]
            for line in faults(self._laid(name))[0]:
                if line not in known:
                    mine = line.split(".")[0].split(":")[0] in Study.model_fields
                    wrong.append(f"{where}{'.' if mine else ': '}{line}")
        return wrong if wrong or known else list(self._two_trainings())

    def _two_trainings(self) -> Iterator[str]:
        """Memories whose name means two trainings in one folder."""
        seen: dict[tuple[str | None, str, str], tuple[str, Memory, str]] = {}
        studies = self.every_study()
        for study, config in studies.items():
            home = owner(studies, study, "memory")
            for domain, name in itertools.product(config.domains, config.other_memories):
                memory = config.variant(name)
                if memory.other_domain and not memory.models:
                    continue
                train = memory.model_copy(update={"models": []})
                other = config.next_domain(domain) if memory.other_domain else ""
                first = seen.setdefault((home, domain, name), (study or "the common part", train, other))
                if first[1:] != (train, other):
                    yield (
                        f"studies.{study}.memories.{name}: expected the memory of {first[0]}, which shares the folder of "
                        f"{domain}, found another one of this name; rename it"
                    )
                    break

    def _for_model(self, model: str) -> list[str]:
        """Faults in what differs for one model."""
        try:
            Config.model_validate(self._laid_for(model), context=_FIELDS_ONLY)
        except ValidationError as error:
            return [f"per_model.{model}.{line}" for line in problems(error, Config)]
        return []

    def _train(self, name: str) -> list[str]:
        """Faults in the training settings of one memory."""
        try:
            parse(MemorySettings, self._settings(name), f"memories.{name}.train")
        except ConfigError as error:
            return [str(error)]
        return []

    def _settings(self, name: str) -> dict[str, Any]:
        return self.memory.model_dump(exclude_unset=True) | self._given(name).train

    def _memory(self, name: str) -> list[str]:
        """Settings of one memory that contradict each other. `references` must have found no fault before."""
        where = f"memories.{name}." if name in self.memories else ""
        memory = self.variant(name)
        wrong, other = [], self.models[memory.memory_model].tokenizer
        for domain in self.domains if memory.ready else []:
            if domain not in memory.ready:
                wrong.append(f"{where}ready: expected a model for every domain, found none for {domain}; add it")
            elif (found := self.models[memory.ready[domain]].tokenizer) != memory.tokenizer:
                wrong.append(
                    f"{where}ready.{domain}: expected a model with tokenizer {memory.tokenizer} as the key model "
                    f"{memory.key_model}, found {memory.ready[domain]} with {found}"
                )
        if name == DEFAULT_MEMORY and not memory.own:
            which = next(kind for kind in _MIXED_IN if getattr(memory, kind))
            wrong.append(
                f"{where}{which}: expected a memory in the place of the default one, found {which} true; rename it"
            )
        if memory.adapt is not None:
            source = self.variant(memory.adapt)
            if not source.own:
                which = next(kind for kind in _MIXED_IN if getattr(source, kind))
                wrong.append(f"{where}adapt: expected a memory that is trained, found {memory.adapt} with {which} true")
            if source.tokenizer == memory.tokenizer:
                wrong.append(
                    f"{where}key_model: expected a model with another tokenizer than {memory.adapt} ({source.tokenizer}), "
                    f"found {memory.key_model}"
                )
        elif other != memory.tokenizer:
            wrong.append(
                f"{where}memory_model: expected a model with tokenizer {memory.tokenizer} as the key model "
                f"{memory.key_model}, found {memory.memory_model} with {other}"
            )
        if memory.targets == "none" and memory.train.objective != "ce" and not memory.dapt:
            wrong.append(
                f"{where}targets: expected knn, teacher or mixture with objective {memory.train.objective}, found none"
            )
        if memory.targets == "mixture" and self.calibrate is None and not self.teacher.knn_weight:
            wrong.append(
                f"{where}targets: expected with mixture a section calibrate, or teacher.knn_weight, found neither"
            )
        wrong += [
            f"{where}models: expected models with tokenizer {memory.tokenizer}, found {base} with "
            f"{self.models[base].tokenizer}"
            for base in memory.models
            if self.models[base].tokenizer != memory.tokenizer
        ]
        return wrong

    def _without_memory(self) -> list[str]:
        if "MemDec" not in self.systems:
            return []
        return [
            f"models.{base}.tokenizer: expected the tokenizer of a memory, found {self.models[base].tokenizer}; add a "
            "memory with a key model of this tokenizer under 'memories', or leave the model out of 'evaluated'"
            for base in self.bases
            if self.memory_for(base) is None
        ]

    def _search(self) -> list[str]:
        """Settings of datastore, index and targets that contradict each other."""
        wrong = []
        if not self.datastore.stored:
            if self.index.kind in ("auto", "exact", "cells"):
                wrong.append(
                    f"index.kind: expected ivfpq or ivfflat with datastore.stored false, found {self.index.kind}"
                )
            if not self.targets.released:
                wrong.append("targets.released: expected true with datastore.stored false, found false")
            if self.calibrate is not None:
                wrong.append("calibrate: expected none with datastore.stored false, found it; leave it out")
            if self.datastore.shards > 1:
                wrong.append(f"datastore.shards: expected 1 with datastore.stored false, found {self.datastore.shards}")
        wrong += self._cells()
        if self.index.opq and self.index.kind != "ivfpq":
            wrong.append(f"index.opq: expected false with index.kind {self.index.kind}, found true")
        model = self.models.get(self.key_model)
        width = model.width if model is not None and self.index.kind == "ivfpq" else None
        if width is not None and width % self.index.code_size:
            wrong.append(
                f"index.code_size: expected a divisor of the key model's width ({width}), found {self.index.code_size}"
            )
        for domain in self.domains:
            most = self.corpora[domain].max_bytes.get("train") if domain in self.corpora else None
            if most is not None and self.targets.neighbours > most:
                wrong.append(
                    f"targets.neighbours: expected at most the bytes of {domain}'s train text ({most}), found "
                    f"{self.targets.neighbours}"
                )
        return wrong

    def _cells(self) -> list[str]:
        """Cells that the targets ask of the index but that it does not have or measure."""
        if self.targets.max_tv is None:
            fault = self.index.cells_fault(self.targets.nprobe or NPROBE)
            return [] if fault is None else [f"targets.nprobe: {fault}"]
        neighbours, temperatures = [self.targets.neighbours], [self.targets.temperature]
        if self.calibrate is not None:
            neighbours, temperatures = self.calibrate.neighbours, self.calibrate.temperatures
        fault = self.index.bound_fault(neighbours, temperatures)
        return [] if fault is None else [f"targets.max_tv: {fault}"]


def owner(studies: Mapping[str | None, Config], study: str | None, *kinds: str) -> str | None:
    """The first of the studies that makes artefacts of these kinds with the same settings as `study`; None: the common part.

    Args:
        studies: All of them, as `Config.every_study` gives them.
        study: The study that needs the artefacts.
        kinds: Kinds of artefacts, keys of `MADE_OF`.
    """

    def said(config: Config) -> list[Any]:
        fields = [field for kind in kinds for field in MADE_OF[kind]]
        single = [
            {name: getattr(each, field) for name, each in config.per_model.items() if getattr(each, field)}
            for field in fields
            if field in ForModel.model_fields
        ]
        return [getattr(config, field) for field in fields] + single

    wanted = said(studies[study])
    return next(name for name, each in studies.items() if said(each) == wanted)


DEFAULT = Path(__file__).resolve().parent.parent / "config" / "mini.yaml"  # where the package is checked out
_FIELDS_ONLY = {"fields": "only"}  # validation context: without what concerns several sections


# --- a whole config -----------------------------------------------------------------------------------------------


def load(*paths: Path) -> Config:
    """Read and validate a config; of several files each is laid over those before, as Snakemake does it.

    Raises:
        ConfigError: A file cannot be read, or the config has faults; the message has all of them.
    """
    return checked(read(*paths), " + ".join(map(str, paths)))


def read(*paths: Path) -> Any:
    """Plain data of config files, each laid over those before."""
    data: Any = None
    for path in paths:
        data = plain.merged(data, plain.read(path))
    return data


def with_default(paths: Sequence[Path]) -> list[Path]:
    """The files of a run: without a section 'models' they are laid over the default config, as the Snakefile does it."""
    data = read(*paths)
    is_overlay = isinstance(data, dict) and "models" not in data and DEFAULT.is_file()
    return [DEFAULT, *paths] if is_overlay else list(paths)


def checked(data: object, where: str) -> Config:
    """The config that plain data describe.

    Raises:
        ConfigError: There are faults; the message has all of them.
    """
    plain.check(data, where)
    found, config = faults(data)
    if found or config is None:
        raise ConfigError(f"{where}: {'; '.join(found)}")
    return config


def faults(data: object) -> tuple[list[str], Config | None]:
    """Every fault of a config, one line each, and its sound parts.

    Fields are checked first, then names in the plain data, then what the sound fields say together. The sound parts are
    None where nothing is left to look at.
    """
    try:
        config = Config.model_validate(data, strict=True, context=_FIELDS_ONLY)
    except ValidationError as error:
        found = problems(error, Config)
        if not isinstance(data, dict):
            return found, None
        parts = _sound(data, error)
        if parts is not None and any(item["loc"][:1] != ("studies",) for item in error.errors()):
            parts = parts.model_copy(update={"studies": {}})  # what a study lacks may be what was left out
        return [*found, *references(data), *(parts.contradictions() if parts is not None else [])], parts
    return [*references(data), *config.contradictions()], config


def check(data: object) -> tuple[list[str], Config | None]:
    """Every fault of a config and everything that it needs and this machine lacks, one line each, and its sound parts."""
    found, config = faults(data)
    lines = [*dict.fromkeys(found), *(missing(config) if config is not None else [])]
    return [on_one_line(line) for line in lines], config


# What stands in for a field that a config must have and that has a fault.
_EMPTY: dict[str, Any] = {
    "scale": "none",
    "tokenizers": {},
    "corpora": {},
    "models": {},
    "domains": ["none"],
    "key_model": "none",
    "memory_model": "none",
}


def _sound(data: dict[str, Any], error: ValidationError) -> Config | None:
    """The config without the entries that have a fault. Leaving one out can make another wrong, so it takes rounds."""
    data = _EMPTY | copy.deepcopy(data)
    for _ in range(20):
        for item in error.errors():
            names, _parent = locate(Config, item["loc"])
            _leave_out(data, [name for name in names if name != "[key]"])
        try:
            return Config.model_validate(data, context=_FIELDS_ONLY)
        except ValidationError as again:
            error = again
    return None


def _leave_out(data: dict[str, Any], names: list[str]) -> None:
    """Remove the value at a place; if it is not there, as it is missing, the mapping that lacks it."""
    above: list[tuple[dict[str, Any], str]] = []
    inside: Any = data
    for name in names:
        if not isinstance(inside, dict):
            break
        above.append((inside, name))
        inside = inside.get(name)
    while above and above[-1][1] not in above[-1][0]:
        above.pop()
    if above:
        place, name = above[-1]
        del place[name]
    if len(names) and names[0] in _EMPTY:
        data.setdefault(names[0], _EMPTY[names[0]])


# --- what it needs on this machine --------------------------------------------------------------------------------


def missing(config: Config) -> list[str]:
    """Files, folders and packages that a config names and this machine lacks, one line each. Hub ids are not looked up."""
    lines = []
    for name, corpus in config.corpora.items():
        if isinstance(corpus, DocstringCorpus):
            lines += [
                f"corpora.{name}.packages: expected an installed package, found none called {package}; install it"
                for package in corpus.packages
                if package != "stdlib" and package_folder(package) is None
            ]
        elif isinstance(corpus, FileCorpus):
            places = (
                {"path": corpus.path} if corpus.path else {f"paths.{k}": v for k, v in (corpus.paths or {}).items()}
            )
            lines += [
                f"corpora.{name}.{field}: expected text files at {place}, found none; check the path"
                for field, place in places.items()
                if not any(map(os.path.isfile, itertools.chain([place], glob.iglob(place, recursive=True))))
            ]
        elif (fault := _no_folder(corpus.path, "")) is not None:
            lines.append(f"corpora.{name}.path: {fault}")
    sources = [(f"models.{name}", entry.pretrained, "config.json") for name, entry in config.models.items()]
    sources += [(f"tokenizers.{name}", entry.pretrained, "tokenizer") for name, entry in config.tokenizers.items()]
    for where, place, needed in sources:
        if place is None or isinstance(place, WheelFile):
            continue
        fault = _no_folder(place, needed)
        lines += [f"{where}.pretrained: {fault}"] if fault is not None else []
    return lines


def _no_folder(place: str, needed: str) -> str | None:
    """What is wrong with a local folder or GGUF file, or None. A name that is not there may be a Hub id.

    It is taken for a local path if it cannot be an id (`owner/name`), or if its first folder is there.
    """
    path = Path(place)
    if os.path.isfile(place):
        return None if place.endswith(".gguf") else f"expected a folder or a GGUF file, found the file {place}"
    if os.path.isdir(place):
        if needed and not glob.glob(f"{glob.escape(place)}/{needed}*"):
            return f"expected a folder with a file {needed}*, found none in {place}; check the path"
        return None
    is_local = path.is_absolute() or place.startswith((".", "~")) or len(path.parts) > 2 or place.endswith(".gguf")
    if is_local or (len(path.parts) > 1 and os.path.isdir(path.parts[0])):
        return f"expected a folder or a Hub id, found nothing at {place}; check the path"
    return None


def json_schema() -> dict[str, Any]:
    """JSON schema of `Config`, for Snakemake and editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
