"""The config file of a whole run, as typed settings. `memdec.settings` has the settings of the single stages.

All models are frozen and refuse unknown keys. Each field states its unit and its origin: the paper, its released
script, or this project ("ours"). Snakemake validates a config against `workflow/schemas/config.schema.json`. `memdec
schema` generates that file from the classes here, and a test fails when it is out of date.
"""

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from memdec.errors import ConfigError
from memdec.settings import (
    DEFAULT_MEMORY,
    UNTUNED,
    WITHOUT_MEMORY,
    AdaptSettings,
    Case,
    Compute,
    CorpusSpec,
    DatastoreSettings,
    EvaluateSettings,
    IndexSettings,
    LoraSettings,
    MemorySettings,
    ModelSpec,
    Name,
    PassageSettings,
    Settings,
    SystemName,
    TargetSettings,
    TeacherSettings,
    TokenizerSpec,
    TrainSettings,
    parse,
)

# --- corpora and tokenizers ---------------------------------------------------------------------------------------


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
    targets: Literal["knn", "teacher", "none"] = Field(
        "knn",
        description="distributions to train on: knn is p_kNN (paper); teacher is the key model's softmax (control); "
        "none is for objective ce",
    )
    dapt: bool = Field(
        False,
        description="do not train a memory: mix in the memory model after DAPT (paper, DAPT interpolation)",
    )
    adapt: Name | None = Field(
        None,
        description="start from this other memory, adapted to the key model's tokenizer; 'memdec': the default memory",
    )
    share: PositiveFloat = Field(
        1, le=1, description="fraction of the default memory's epochs and FLOP budget (paper: 0.1 with adapt)"
    )
    train: dict[str, Any] = Field(default_factory=dict, description="settings that differ from section 'memory'")
    models: list[Name] | None = Field(
        None, min_length=1, description="base models it is evaluated with (default: all that share its tokenizer)"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        useless = self.model_fields_set - {"dapt", "memory_model", "models"} if self.dapt else set()
        if useless:
            raise ValueError(
                f"expected only memory_model and models beside dapt true, found {', '.join(sorted(useless))}"
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
    targets: Literal["knn", "teacher", "none"]
    dapt: bool
    adapt: Name | None
    share: float
    train: MemorySettings
    models: list[Name]
    tokenizer: Name

    @property
    def keys(self) -> str:
        """Folder name of the artefacts that its key model makes."""
        return self.key_model + ("" if self.tuned else UNTUNED)


# --- the method ---------------------------------------------------------------------------------------------------


class Config(Settings):
    """The config of a whole run; `config/mini.yaml` is the default."""

    scale: Name
    seeds: list[int] = Field(default=[0], min_length=1, description="each seed runs all stages after pretraining")
    context: PositiveInt = Field(1024, description="most tokens that a model sees at once (paper: 1024)")
    stride: PositiveInt = Field(512, description="tokens scored per window (paper: 512)")
    compute: Compute = Compute()
    tokenizers: dict[Name, TokenizerSpec]
    corpora: dict[Name, CorpusSpec]
    models: dict[Name, ModelSpec]
    evaluated: list[Name] | None = Field(None, min_length=1, description="base models in the tables (default: all)")
    domains: list[Name] = Field(min_length=1, description="corpora that get a memory; the columns of Table 3")
    forgetting: list[Name] = Field(
        default=[],
        description="general corpora on which the domain's systems are measured, too, at the domain's weights (ours)",
    )
    systems: list[SystemName] = Field(
        default=["base", "LoRA", "MemDec"], min_length=1, description="systems evaluated with every base model"
    )
    key_model: Name = Field(description="model that is fine-tuned on the domain and gives the keys")
    memory_model: Name = Field(description="model that the memory starts from")
    memories: dict[Name, MemoryVariant] = Field(
        default_factory=dict, description="memories in addition to the default one, which is called 'memdec'"
    )
    finetune: TrainSettings = TrainSettings()
    dapt: TrainSettings | None = Field(None, description="training of the DAPT baseline (default: as finetune)")
    datastore: DatastoreSettings = DatastoreSettings()
    index: IndexSettings = IndexSettings()
    targets: TargetSettings = TargetSettings()
    teacher: TeacherSettings = TeacherSettings()
    memory: MemorySettings = MemorySettings()
    adapt: AdaptSettings = AdaptSettings()
    lora: LoraSettings = LoraSettings()
    passages: PassageSettings = PassageSettings()
    budget: Budget | None = Field(
        None, description="FLOP limit of memories, LoRA and DAPT, not of the key model (paper)"
    )
    evaluate: EvaluateSettings = EvaluateSettings()
    cases: list[Case] = Field(default=[], description="rows of Table 6, measured on the first domain")

    @property
    def bases(self) -> list[str]:
        """Base models that are evaluated, in the order of the tables."""
        return list(self.models) if self.evaluated is None else self.evaluated

    @property
    def memory_names(self) -> list[str]:
        """All memories, the default one first."""
        return [DEFAULT_MEMORY, *self.memories]

    def variant(self, name: str) -> Memory:
        """The memory of this name, with all defaults filled in."""
        given = MemoryVariant() if name == DEFAULT_MEMORY else self.memories[name]
        settings = self.memory.model_dump(exclude_unset=True) | given.train
        train: MemorySettings = parse(MemorySettings, settings, f"memories.{name}.train")
        if given.share < 1:
            train = train.model_copy(update={"epochs": train.epochs * given.share})
        start = self.variant(given.adapt).memory_model if given.adapt else given.memory_model or self.memory_model
        key_model = given.key_model or self.key_model
        tokenizer = self.models[start if given.dapt else key_model].tokenizer
        return Memory(
            **given.model_dump(include={"tuned", "tuned_start", "dapt", "adapt", "share"}),
            name=name,
            memory_model=start,
            key_model=key_model,
            targets="none" if given.dapt or train.objective == "ce" else given.targets,
            train=train,
            models=given.models or [base for base in self.bases if self.models[base].tokenizer == tokenizer],
            tokenizer=tokenizer,
        )

    def memory_for(self, model: str) -> Memory | None:
        """The first trained memory with the tokenizer of a model, which is the model's row in Table 3 or 4."""
        memories = (self.variant(name) for name in self.memory_names)
        fitting = (m for m in memories if not m.dapt and m.tokenizer == self.models[model].tokenizer)
        return next(fitting, None)

    @model_validator(mode="after")
    def _references(self) -> "Config":
        wrong = [
            *_unknown("domains", self.domains, self.corpora),
            *_unknown("forgetting", self.forgetting, self.corpora),
            *_unknown("evaluated", self.evaluated or [], self.models),
            *_unknown("key_model", [self.key_model], self.models),
            *_unknown("memory_model", [self.memory_model], self.models),
            *_unknown("budget.model", [self.budget.model] if self.budget else [], self.models),
        ]
        for name, tokenizer in self.tokenizers.items():
            wrong += _unknown(f"tokenizers.{name}.train_on", tokenizer.train_on or [], self.corpora)
        for name, corpus in self.corpora.items():
            wrong += _unknown(f"corpora.{name}.disjoint_from", corpus.disjoint_from, self.corpora)
        for name, model in self.models.items():
            wrong += _unknown(f"models.{name}.tokenizer", [model.tokenizer], self.tokenizers)
            wrong += _unknown(f"models.{name}.corpus", [model.corpus] if model.corpus else [], self.corpora)
            if name.endswith(UNTUNED):
                wrong.append(f"models.{name}: expected a name without {UNTUNED}, which means keys of a plain model")
        for name, memory in self.memories.items():
            wrong += self._names(f"memories.{name}", name, memory)
        if self.stride > self.context:
            wrong.append(f"stride: expected at most context ({self.context}), found {self.stride}")
        wrong += self._search()
        wrong = wrong or [line for name in self.memory_names for line in self._memory(name)] or self._without_memory()
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def _names(self, where: str, name: str, memory: MemoryVariant) -> list[str]:
        """Faults in the names that a memory has or refers to: a name that is taken, unknown, or refers to itself."""
        wrong = (
            [f"{where}: expected a name that is not taken, found {name}"]
            if name in (DEFAULT_MEMORY, WITHOUT_MEMORY)
            else []
        )
        for field in ("memory_model", "key_model"):
            given = getattr(memory, field)
            wrong += _unknown(f"{where}.{field}", [given] if given else [], self.models)
        wrong += _unknown(f"{where}.models", memory.models or [], dict.fromkeys(self.bases))
        chain, start = [name], memory.adapt
        while start is not None and start not in chain:
            wrong += _unknown(f"{where}.adapt", [start], dict.fromkeys(self.memory_names)) if len(chain) == 1 else []
            chain.append(start)
            start = self.memories[start].adapt if start in self.memories else None
        if start is not None:
            wrong.append(
                f"{where}.adapt: expected a memory that does not start from this one, found {' > '.join(chain)}"
            )
        return wrong

    def _memory(self, name: str) -> list[str]:
        """Settings of one memory that contradict each other. `_names` must have found no fault before."""
        where = "" if name == DEFAULT_MEMORY else f"memories.{name}."
        try:
            memory = self.variant(name)
        except ConfigError as error:
            return [str(error)]
        wrong, other = [], self.models[memory.memory_model].tokenizer
        if memory.adapt is not None:
            source = self.variant(memory.adapt)
            if source.dapt:
                wrong.append(f"{where}adapt: expected a memory that is trained, found {memory.adapt} with dapt true")
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
            wrong.append(f"{where}targets: expected knn or teacher with objective {memory.train.objective}, found none")
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
            if not self.index.is_ivf:
                wrong.append(
                    f"index.kind: expected ivfpq or ivfflat with datastore.stored false, found {self.index.kind}"
                )
            if not self.targets.released:
                wrong.append("targets.released: expected true with datastore.stored false, found false")
            if self.datastore.shards > 1:
                wrong.append(f"datastore.shards: expected 1 with datastore.stored false, found {self.datastore.shards}")
        if (fault := self.index.cells_fault(self.targets.nprobe)) is not None:
            wrong.append(f"targets.nprobe: {fault}")
        if self.index.opq and self.index.kind != "ivfpq":
            wrong.append(f"index.opq: expected false with index.kind {self.index.kind}, found true")
        return wrong


def _unknown(where: str, names: list[str], known: dict[str, Any]) -> list[str]:
    return [
        f"{where}: expected one of {', '.join(known) or 'none defined'}, found {n}" for n in names if n not in known
    ]


def load(path: Path) -> Config:
    """Read and validate a YAML config file."""
    if not path.is_file():
        raise ConfigError(f"{path}: expected a YAML config file, found nothing; the default is config/mini.yaml")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    config: Config = parse(Config, data, str(path))
    return config


def json_schema() -> dict[str, Any]:
    """JSON schema of `Config`, for Snakemake and editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
