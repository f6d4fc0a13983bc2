"""The one typed source of every setting: what Snakemake validates, what the command line offers, what stages get.

All models are frozen and refuse unknown keys. Each field has its unit and origin: the paper, its released script, or
ours. `config/schema` is generated from here (`memdec schema`), and a test fails when it is stale.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from memdec.errors import ConfigError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="a name usable as a folder")]
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


class Settings(BaseModel):
    """Base of all settings: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# --- corpora and tokenizers ---------------------------------------------------------------------------------------


class _Corpus(Settings):
    max_bytes: dict[Split, PositiveInt] = Field(
        default_factory=dict, description="cap of each split in UTF-8 bytes; whole documents, drawn by hash (ours)"
    )
    separator: Literal["eos", "none"] = Field(
        "eos", description="what stands between documents in the token stream; 'none' is the paper's WikiText-103"
    )
    disjoint_from: list[Name] = Field(
        default_factory=list, description="corpora whose train text must not overlap this one's valid and test (ours)"
    )
    min_bytes: PositiveInt = Field(1000, description="a split smaller than this is an error, bytes (ours)")


class DocstringCorpus(_Corpus):
    """Documentation inside installed packages, read statically with `ast`; nothing is imported."""

    source: Literal["docstrings"]
    packages: list[str] = Field(min_length=1, description="top-level packages; 'stdlib' is Python's own library")
    min_chars: PositiveInt = Field(160, description="shorter docstrings are left out (ours)")


class FileCorpus(_Corpus):
    """Local .txt, .jsonl or .parquet files, optionally .gz or .xz compressed."""

    source: Literal["files"]
    path: str | None = Field(None, description="file or glob; documents are split 84/6/10 by hash")
    paths: dict[Split, str] | None = Field(None, description="file or glob of each split")
    field: str = Field("text", description="text column of jsonl and parquet files")
    documents: Literal["blank_line", "line", "file"] = Field("blank_line", description="what parts documents in .txt")

    @model_validator(mode="after")
    def _one_of(self) -> "FileCorpus":
        if (self.path is None) == (self.paths is None):
            raise ValueError("give either 'path' (split by hash) or 'paths' (one per split)")
        return self


class HubCorpus(_Corpus):
    """A data set of the Hugging Face Hub, or a local folder in the same format."""

    source: Literal["hub"]
    path: str = Field(description="data set id or local folder")
    config: str | None = Field(None, description="configuration name, e.g. wikitext-103-raw-v1")
    revision: str | None = Field(None, description="commit; pinned in the paper scale")
    splits: dict[Split, str] = Field(
        default={"train": "train", "valid": "validation", "test": "test"},
        description="our split -> the data set's",
    )
    field: str = Field("text", description="text column")


CorpusSpec = Annotated[DocstringCorpus | FileCorpus | HubCorpus, Field(discriminator="source")]


class TokenizerSpec(Settings):
    """A byte-level BPE trained here, or one taken from a model folder or Hub id."""

    train_on: list[Name] | None = Field(None, description="corpora whose train split it is trained on")
    vocab_size: PositiveInt | None = Field(None, description="tokens of a trained tokenizer")
    pretrained: str | None = Field(None, description="folder or Hub id")
    revision: str | None = None

    @model_validator(mode="after")
    def _one_of(self) -> "TokenizerSpec":
        if (self.pretrained is None) == (self.train_on is None):
            raise ValueError("give either 'train_on' with 'vocab_size', or 'pretrained'")
        if self.train_on is not None and self.vocab_size is None:
            raise ValueError("'train_on' needs 'vocab_size'")
        return self


# --- training -----------------------------------------------------------------------------------------------------


class TrainSettings(Settings):
    """Optimisation of any model; defaults are the released script's where it has one."""

    epochs: PositiveFloat = Field(
        1, description="passes over the training windows (released: 70 for 124M, ~15 for 0.5B)"
    )
    learning_rate: PositiveFloat = Field(1e-3, description="peak, linear decay to 0 (released: 1e-3)")
    batch_size: PositiveInt = Field(8, description="windows per step and device (released: 16)")
    accumulation: PositiveInt = Field(1, description="steps per update (released: 4)")
    warmup: float = Field(0.0, ge=0, le=1, description="share of the steps with rising rate (released: 0)")
    weight_decay: float = Field(0.0, ge=0, description="AdamW, not on norms and biases (released: 0)")
    max_grad_norm: PositiveFloat = Field(1.0, description="gradient clipping (released: 1.0)")
    dropout: float = Field(0.0, ge=0, lt=1, description="all dropout rates of the model (ours; GPT-2's default is 0.1)")
    precision: Literal["float32", "bf16"] = Field("float32", description="autocast type (released: bf16)")
    keep_best: bool = Field(False, description="evaluate every epoch, keep the best on valid (paper: early stopping)")


class LoraSettings(TrainSettings):
    """LoRA on query, key, value and MLP projections (paper, section 4.1)."""

    rank: PositiveInt = Field(32, description="rank of every adapter matrix (paper: near the memory's size)")
    scale: PositiveFloat = Field(1.0, description="lora_alpha / rank (not printed in the paper; ours)")
    adapter_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapter (not printed; ours)")


class MemorySettings(TrainSettings):
    """Training of the memory decoder on the kNN targets."""

    kl_weight: float = Field(0.5, ge=0, le=1, description="beta of the paper's equation 5 (0.5); 0 is CE, 1 is KL only")


class ModelSpec(Settings):
    """A base model: pretrained, or (mini scale) trained from scratch on one corpus."""

    family: str = Field(description="row group of the tables")
    tokenizer: Name = Field(description="name under 'tokenizers'")
    pretrained: str | None = Field(None, description="folder or Hub id")
    revision: str | None = Field(None, description="commit; pinned in the paper scale")
    architecture: Literal["gpt2", "qwen2"] | None = Field(None, description="to train from scratch")
    width: PositiveInt | None = Field(None, description="hidden size")
    layers: PositiveInt | None = None
    heads: PositiveInt | None = None
    corpus: Name | None = Field(None, description="corpus it is trained on")
    train: TrainSettings | None = None
    seed: int = Field(0, description="of a model from scratch: initial weights and order of the data")

    @model_validator(mode="after")
    def _one_of(self) -> "ModelSpec":
        scratch = [self.architecture, self.width, self.layers, self.heads, self.corpus, self.train]
        if self.pretrained is not None and any(x is not None for x in scratch):
            raise ValueError("give either 'pretrained' or the fields of a model from scratch, not both")
        if self.pretrained is None and any(x is None for x in scratch):
            raise ValueError("a model from scratch needs architecture, width, layers, heads, corpus and train")
        return self


# --- the method ---------------------------------------------------------------------------------------------------


class DatastoreSettings(Settings):
    """Keys of the datastore: a hidden state of each position."""

    split: Split = Field("train", description="split to take; others are queries of the kNN-LM")
    key_point: str = Field(
        "mlp",
        description="input of the last layer's 'mlp' (paper) or 'attention', 'final' hidden state, or path of a module",
    )
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="key type (released: float16)")
    precision: Literal["float32", "bfloat16", "float16"] = Field("float32", description="weights of the key model")
    stored: bool = Field(True, description="keys on disk; else every use makes them again by forward passes (ours)")
    shards: PositiveInt = Field(1, description="parts that can be made side by side")
    batch_size: PositiveInt = Field(16, description="windows per forward pass")


class IndexSettings(Settings):
    """Search structure over the keys; defaults of IVFPQ are the paper's."""

    kind: Literal["exact", "flat", "ivfflat", "ivfpq"] = Field(
        "exact", description="exact: keys stream past; flat: FAISS, keys in memory; ivfflat, ivfpq: nearest cells only"
    )
    centroids: PositiveInt = Field(4096, description="cells of an ivf index (released: 4096)")
    code_size: PositiveInt = Field(64, description="bytes of a key's code in ivfpq (released: 64)")
    opq: bool = Field(False, description="rotate the keys before ivfpq (ours)")
    sample: PositiveInt = Field(1_000_000, description="keys that cells and codes are trained on (released: 1,000,000)")
    seed: int = Field(0, ge=0, lt=2**31 - 1, description="of the sample and of k-means")
    check_queries: PositiveInt = Field(
        256, description="queries that recall and total variation are measured on (ours)"
    )
    check_neighbours: PositiveInt = Field(1024, description="k of that measurement (ours)")
    check_nprobe: list[PositiveInt] = Field(
        [8, 32, 128],
        min_length=1,
        description="cells searched in that measurement, to choose 'targets.nprobe' by (ours)",
    )


class TargetSettings(Settings):
    """kNN next-token distributions for the training positions."""

    neighbours: PositiveInt = Field(1024, description="k (released: 1024)")
    nprobe: PositiveInt = Field(32, description="cells of an ivf index that are searched (released: 32)")
    temperature: PositiveFloat = Field(
        16.0, allow_inf_nan=False, description="tau, divides the squared distance (released: 16)"
    )
    top: PositiveInt | None = Field(None, description="tokens kept of each row, then renormalised (released: all)")
    threshold: float = Field(0.0, ge=0, lt=1, description="smallest probability kept (released: 0)")
    released: bool = Field(
        False, description="distances as the index gives them, as the released code takes them; else from the keys"
    )
    dtype: Literal["float32", "float16"] = Field("float32", description="probabilities on disk (released: float16)")
    shards: PositiveInt = Field(1, description="parts that can be made side by side")
    batch_size: PositiveInt = Field(1024, description="queries per search")


class EvaluateSettings(Settings):
    """Perplexity through lm-eval, alpha tuned on the valid split."""

    alphas: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        default=[0.4, 0.6, 0.8, 0.9], min_length=1, description="candidates for alpha (paper, section 4.1)"
    )
    batch_size: PositiveInt = Field(16, description="windows per forward pass")
    resamples: PositiveInt = Field(
        2000, description="bootstrap resamples for the 95 % interval over test windows (ours)"
    )


class Config(Settings):
    """A whole run; `config/mini.yaml` is the default."""

    scale: Name
    seeds: list[int] = Field(default=[0], min_length=1, description="one run of everything after pretraining for each")
    context: PositiveInt = Field(1024, description="tokens a model sees at most (paper: 1024)")
    stride: PositiveInt = Field(512, description="tokens scored per window (paper: 512)")
    tokenizers: dict[Name, TokenizerSpec]
    corpora: dict[Name, CorpusSpec]
    models: dict[Name, ModelSpec]
    domains: list[Name] = Field(min_length=1, description="corpora that get a memory; the columns of Table 3")
    key_model: Name = Field(description="model that is tuned on the domain and gives the keys")
    memory_model: Name = Field(description="model that the memory starts from")
    finetune: TrainSettings = TrainSettings()
    datastore: DatastoreSettings = DatastoreSettings()
    index: IndexSettings = IndexSettings()
    targets: TargetSettings = TargetSettings()
    memory: MemorySettings = MemorySettings()
    lora: LoraSettings = LoraSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @model_validator(mode="after")
    def _references(self) -> "Config":
        wrong = [
            *_unknown("domains", self.domains, self.corpora),
            *_unknown("key_model", [self.key_model], self.models),
            *_unknown("memory_model", [self.memory_model], self.models),
        ]
        for name, tokenizer in self.tokenizers.items():
            wrong += _unknown(f"tokenizers.{name}.train_on", tokenizer.train_on or [], self.corpora)
        for name, corpus in self.corpora.items():
            wrong += _unknown(f"corpora.{name}.disjoint_from", corpus.disjoint_from, self.corpora)
        for name, model in self.models.items():
            wrong += _unknown(f"models.{name}.tokenizer", [model.tokenizer], self.tokenizers)
            wrong += _unknown(f"models.{name}.corpus", [model.corpus] if model.corpus else [], self.corpora)
        if self.stride > self.context:
            wrong.append(f"stride: expected at most context ({self.context}), found {self.stride}")
        wrong += self._search()
        if not wrong:
            wrong = [
                f"models.{name}.tokenizer: expected {self.models[self.key_model].tokenizer} as for the key model, "
                f"found {model.tokenizer}"
                for name, model in self.models.items()
                if model.tokenizer != self.models[self.key_model].tokenizer
            ]
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def _search(self) -> list[str]:
        """Settings of datastore, index and targets that do not go together."""
        wrong = []
        ivf = self.index.kind.startswith("ivf")
        if not self.datastore.stored:
            if not ivf:
                wrong.append(
                    f"index.kind: expected ivfpq or ivfflat with datastore.stored false, found {self.index.kind}"
                )
            if not self.targets.released:
                wrong.append("targets.released: expected true with datastore.stored false, found false")
            if self.datastore.shards > 1:
                wrong.append(f"datastore.shards: expected 1 with datastore.stored false, found {self.datastore.shards}")
        if ivf and self.targets.nprobe > self.index.centroids:
            wrong.append(
                f"targets.nprobe: expected at most index.centroids ({self.index.centroids}), found {self.targets.nprobe}"
            )
        if self.index.opq and self.index.kind != "ivfpq":
            wrong.append(f"index.opq: expected false with index.kind {self.index.kind}, found true")
        return wrong


def _unknown(where: str, names: list[str], known: dict[str, Any]) -> list[str]:
    return [
        f"{where}: expected one of {', '.join(known) or 'none defined'}, found {n}" for n in names if n not in known
    ]


def parse(kind: Any, data: object, where: str) -> Any:
    """Validate plain data; all problems in one message.

    Raises:
        ConfigError: Names each field, what is wrong and what was found.
    """
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe(error)}") from None


def describe(error: ValidationError) -> str:
    """One line for all problems of a validation."""
    lines = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"]) or "(top)"
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            text = "unknown key; see `memdec schema` or config/README.md for the known ones"
        found = "" if item["type"] in ("missing", "value_error") else f", found {item['input']!r}"
        lines.append(f"{place}: {text}{found}")
    return "; ".join(lines)


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
