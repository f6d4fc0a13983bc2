"""The typed settings of every stage: the sections of a config file and the options of the command line.

All of them are frozen and refuse unknown keys. Each field states its unit and its origin: the paper, its released
script, or this project ("ours").
"""

import difflib
import math
import os
import re
from collections.abc import Iterable, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from memdec import plain
from memdec.errors import ConfigError, on_one_line

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="a name usable as a folder")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy, torch and transformers all take
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
NPROBE = 32  # cells of an index that a search visits by default (released: 32)
DEFAULT_MEMORY = "memdec"  # the memory that 'key_model', 'memory_model' and 'memory' describe
WITHOUT_MEMORY = "systems"  # folder of the evaluations that use no memory
FORGETTING = "forgetting.json"  # records of general corpora in an evaluation
UNTUNED = "-untuned"  # ending of the folder with the keys of a model that was not fine-tuned
SystemName = Literal[
    "base", "In-Context RAG", "kNN-LM", "DAPT", "LoRA", "MemDec"
]  # the systems that are compared; made in `inference.systems`

# The tables and figures that a study can fill, in the numbers of arXiv v1; `results.catalogue` makes them.
TableName = Literal[
    "table1", "table2", "table3", "table4", "table5", "table6", "table7", "table8", "table9", "table10", "table11",
    "table12", "table13", "table14", "table15", "table16", "table17", "table18", "table19",
    "objectives", "rivals", "memories", "forgetting", "figure2", "figure4", "figure5", "figure6", "fidelity", "gains",
]  # fmt: skip


def _expanded(text: str) -> str:
    """Replace `${NAME}` by the environment variable NAME."""
    names = re.findall(r"\$\{(\w+)\}", text)
    unset = [name for name in names if name not in os.environ]
    if unset:
        raise ValueError(f"expected the environment variable {', '.join(unset)}, found it unset; export it")
    for name in names:
        text = text.replace(f"${{{name}}}", os.environ[name])
    return text


_FOLDERS = ("MEMDEC_TEST_DATA", "MEMDEC_SMOL")  # variables that name folders in our configs


def portable(value: Any) -> Any:
    """Write folders in settings by the variables that name them, so that settings are equal on all machines."""
    if isinstance(value, dict):
        return {key: portable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [portable(each) for each in value]
    if isinstance(value, str):
        for name in _FOLDERS:
            folder = os.environ.get(name)
            if folder and (value == folder or value.startswith(f"{folder}/")):
                return f"${{{name}}}{value.removeprefix(folder)}"
    return value


Place = Annotated[str, AfterValidator(_expanded)]


def each_once(values: list[Any]) -> list[Any]:
    """A list without doubles, as a check of a field."""
    twice = {value for number, value in enumerate(values) if value in values[:number]}
    if twice:
        raise ValueError(f"expected each entry once, found {', '.join(sorted(map(str, twice)))} twice")
    return values


Names = Annotated[list[Name], AfterValidator(each_once)]
Seeds = Annotated[list[Seed], AfterValidator(each_once)]


class Settings(BaseModel):
    """Base class of all settings: immutable; unknown keys and numbers that are not finite are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Compute(Settings):
    """Device and number type of a stage; `memdec.artefacts.devices` resolves `auto`."""

    device: Literal["auto", "cpu", "cuda", "all"] = Field(
        "auto",
        description="auto: a GPU if there is one, else the CPU; CUDA_VISIBLE_DEVICES chooses among several; all: spread a base "
        "model over all GPUs of the machine, in evaluations and tasks (accelerate's device_map)",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="type of the weights; in training the weights are float32 and this is the autocast type (released: "
        "bfloat16); auto: bfloat16 on a GPU that supports it, else float32; sums are always float32 or float64",
    )


AUTO = Compute()


class WheelFile(Settings):
    """A GGUF file inside a wheel of the package index. The wheel is downloaded once, checked, and never installed."""

    wheel: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9._+!-]*$", description="name==version"
    )
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="hash of the wheel, as the package index states it")
    file: str = Field(pattern=r"\.gguf$", description="path or plain name of the GGUF file in the wheel")


def _kind_of_source(value: object) -> str:
    return "(name)" if isinstance(value, str) else "(wheel)"


# The tags tell the two forms apart, so that an error is reported only for the form that the user wrote.
# `describe` leaves the tags out of messages.
Pretrained = Annotated[
    Annotated[Place, Tag("(name)")] | Annotated[WheelFile, Tag("(wheel)")], Discriminator(_kind_of_source)
]


class _Corpus(Settings):
    max_bytes: dict[Split, PositiveInt] = Field(
        default_factory=dict, description="most UTF-8 bytes of each split; whole documents are chosen by hash (ours)"
    )
    expected_bytes: PositiveInt | None = Field(
        None,
        description="UTF-8 bytes of all splits that are expected, for `memdec plan` and the requests of jobs before the corpus "
        "is there; it changes no result (ours)",
    )
    separator: Literal["eos", "none"] = Field(
        "eos", description="token after each document in the token stream; 'none' is the paper's WikiText-103"
    )
    disjoint_from: Names = Field(
        default_factory=list,
        description="corpora whose train text must not overlap the valid and test text of this corpus (ours)",
    )
    min_bytes: PositiveInt = Field(1000, description="a split with fewer bytes than this is an error (ours)")

    @model_validator(mode="after")
    def _room(self) -> Self:
        small = {split: most for split, most in self.max_bytes.items() if most < self.min_bytes}
        if small:
            raise ValueError(f"max_bytes: expected at least min_bytes ({self.min_bytes}), found {_listed(small)}")
        return self


class DocstringCorpus(_Corpus):
    """Docstrings of installed packages. They are read with `ast`, without importing the packages."""

    source: Literal["docstrings"] = Field(description="kind of corpus")
    packages: Annotated[list[str], AfterValidator(each_once)] = Field(
        min_length=1, description="top-level packages; 'stdlib' is Python's own library"
    )
    min_chars: PositiveInt = Field(160, description="shorter docstrings are left out (ours)")


class FileCorpus(_Corpus):
    """Local .txt, .jsonl, .csv, .tsv or .parquet files, optionally .gz or .xz compressed."""

    source: Literal["files"] = Field(description="kind of corpus")
    path: Place | None = Field(
        None, description="file or glob; documents are split 84/6/10 by hash; ${NAME} is an environment variable"
    )
    paths: dict[Split, Place] | None = Field(None, description="file or glob of each split; ${NAME} works as in 'path'")
    field: str = Field("text", description="text column of jsonl, csv, tsv and parquet files")
    documents: Literal["blank_line", "line", "file"] = Field(
        "blank_line", description="where documents end in a .txt file: at a blank line, a line end, or the file's end"
    )

    @model_validator(mode="after")
    def _one_of(self) -> "FileCorpus":
        if (self.path is None) == (self.paths is None):
            raise ValueError("give either 'path' (split by hash) or 'paths' (one per split)")
        if lacking := [split for split in SPLITS if self.paths is not None and split not in self.paths]:
            raise ValueError(f"paths: expected train, valid and test, found no {', '.join(lacking)}")
        return self


class HubCorpus(_Corpus):
    """A data set of the Hugging Face Hub, or a local folder in the same format."""

    source: Literal["hub"] = Field(description="kind of corpus")
    path: Place = Field(description="data set id or local folder; ${NAME} is an environment variable")
    config: str | None = Field(None, description="configuration name, e.g. wikitext-103-raw-v1")
    revision: str | None = Field(None, description="commit; pinned in the paper scale")
    splits: dict[Split, str] = Field(
        default={"train": "train", "valid": "validation", "test": "test"},
        description="name of each of our splits in the data set; with train alone, its documents are split 84/6/10 by hash",
    )
    field: str = Field("text", description="text column")

    @model_validator(mode="after")
    def _all_or_train(self) -> "HubCorpus":
        if set(self.splits) not in ({"train"}, set(SPLITS)):
            raise ValueError(f"splits: expected train, valid and test, or train alone, found {', '.join(self.splits)}")
        return self


CorpusSpec = Annotated[DocstringCorpus | FileCorpus | HubCorpus, Field(discriminator="source")]


class TokenizerSpec(Settings):
    """A byte-level BPE trained here, or one taken from a model folder or Hub id."""

    train_on: Names | None = Field(None, description="train it on the train split of these corpora")
    vocab_size: Annotated[int, Field(ge=257)] | None = Field(
        None,
        description="number of tokens of a tokenizer that is trained here; at least 257, for 256 bytes and the end of a "
        "document",
    )
    pretrained: Pretrained | None = Field(
        None, description="folder, Hub id, GGUF file, or GGUF file in a wheel; ${NAME} is an environment variable"
    )
    revision: str | None = Field(None, description="commit; pinned in the paper scale")

    @model_validator(mode="after")
    def _one_of(self) -> "TokenizerSpec":
        if (self.pretrained is None) == (self.train_on is None):
            raise ValueError("give either 'train_on' with 'vocab_size', or 'pretrained'")
        if self.train_on is not None and self.vocab_size is None:
            raise ValueError("'train_on' needs 'vocab_size'")
        return self


class TrainSettings(Settings):
    """Training of any model; the defaults are those of the released script where it has one."""

    epochs: PositiveFloat = Field(
        1, description="passes over the training windows (released: 70 for 124M, ~15 for 0.5B)"
    )
    learning_rate: PositiveFloat = Field(1e-3, description="peak learning rate; decays linearly to 0 (released: 1e-3)")
    learning_rates: Annotated[list[PositiveFloat], AfterValidator(each_once)] = Field(
        [],
        description="candidates for learning_rate: tried for `trial` of the updates from the smallest up, until one is worse "
        "on valid; the best is trained in full (ours)",
    )
    trial: float = Field(
        0.25, gt=0, lt=1, description="part of the updates for which each of learning_rates is tried (ours)"
    )
    batch_size: PositiveInt = Field(8, description="windows per forward pass and device (released: 16)")
    accumulation: PositiveInt = Field(1, description="forward passes per update of the weights (released: 4)")
    warmup: float = Field(0.0, ge=0, le=1, description="fraction of the updates with a rising rate (released: 0)")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW; none on norms and biases (released: 0)")
    max_grad_norm: PositiveFloat = Field(1.0, description="norm to which gradients are clipped (released: 1.0)")
    dropout: float = Field(0.0, ge=0, lt=1, description="all dropout rates of the model (ours; GPT-2's default is 0.1)")
    gradient_checkpointing: bool = Field(False, description="recompute the layers' activations in the backward pass")
    keep_best: bool = Field(
        False, description="keep the weights of the best evaluation on valid (paper: early stopping)"
    )
    evaluate_every: PositiveFloat | None = Field(
        None, description="epochs between evaluations on valid; default: 1 with keep_best, else only at the end (ours)"
    )
    patience: PositiveInt | None = Field(
        None,
        description="stop after this many evaluations without improvement; needs keep_best (paper: prints no number)",
    )
    report_to: list[str] = Field(
        [], description="trackers that get the training curves (tensorboard, wandb, ...), as in transformers"
    )

    @model_validator(mode="after")
    def _stopping(self) -> Self:
        if self.patience is not None and not self.keep_best:
            raise ValueError(f"patience: expected keep_best true with patience {self.patience}, found false")
        return self


class LoraSettings(TrainSettings):
    """LoRA on query, key, value and MLP projections (paper, section 4.1)."""

    rank: PositiveInt | None = Field(
        None,
        description="rank of every adapter matrix; default: the rank whose adapter has about as many "
        "parameters as the memory (paper, section 4.1)",
    )
    scale: PositiveFloat = Field(1.0, description="lora_alpha / rank (ours; the paper prints no value)")
    adapter_dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout before the adapter (ours; the paper prints no value)"
    )


class MemorySettings(TrainSettings):
    """Training of the memory decoder on the kNN targets."""

    objective: Literal["hybrid", "kl", "ce", "focal", "jsd", "bild", "sparsity"] = Field(
        "hybrid",
        description="loss: hybrid is the paper's; kl and ce are its two parts; the others failed in the paper "
        "(appendix H)",
    )
    kl_weight: float = Field(0.5, ge=0, le=1, description="hybrid: beta of the paper's equation 5 (0.5)")
    kl_weight_end: float | None = Field(
        None, ge=0, le=1, description="hybrid: beta at the last update, linear from kl_weight; default: constant (ours)"
    )
    focal_weight: float = Field(0.5, ge=0, le=1, description="focal: alpha of appendix H (0.5)")
    focal_gamma: float = Field(2.0, ge=0, description="focal: gamma of appendix H (2)")
    bild_top: int = Field(
        8, ge=2, description="bild: number of top tokens compared in pairs (BiLD paper: 8; the paper prints none)"
    )
    sparsity_weight: float = Field(0.01, ge=0, description="sparsity: alpha of appendix H (0.01)")
    alphas: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        default=[0.4, 0.6, 0.8, 0.9],
        min_length=1,
        description="weights of the memory that every evaluation tries with each base (paper: grid)",
    )


class TeacherSettings(Settings):
    """Targets from the key model's own next-token distribution p_key, which the paper lacks.

    Alone it is a control. With `knn_weight` the rows are those of the key model's kNN-LM, lambda p_kNN + (1 - lambda) p_key.
    """

    top: PositiveInt = Field(64, description="keep this many most likely tokens of each row and renormalise (ours)")
    temperature: PositiveFloat = Field(1.0, description="divides the logits (ours)")
    knn_weight: float = Field(
        0.0, ge=0, le=1, description="lambda, the weight of p_kNN; 0: the key model's distribution alone (ours)"
    )
    dtype: Literal["float32", "float16"] = Field("float32", description="type of the probabilities on disk")
    shards: PositiveInt = Field(1, description="number of parts; several jobs can make them in parallel")
    batch_size: PositiveInt = Field(16, description="windows per forward pass")


class AdaptSettings(Settings):
    """Adapting a trained memory to another tokenizer (paper, section 4.3)."""

    init: Literal["copy", "random"] = Field(
        "copy",
        description="embedding rows of the new tokens; copy: the old row of a token with the same spelling, else the "
        "mean of the rows of its pieces (ours); random: all at random (paper)",
    )


class Shape(Settings):
    """The size of a model, as far as time and memory depend on it."""

    parameters: PositiveFloat = Field(description="number of weights; those of a tied head count once")
    width: PositiveInt = Field(description="hidden size")
    layers: PositiveInt = Field(description="number of layers")
    vocabulary: PositiveInt = Field(description="rows of the head")


class ModelSpec(Settings):
    """A base model: pretrained, or (mini scale) trained from scratch on one corpus."""

    family: str = Field(description="row group of the tables")
    tokenizer: Name = Field(description="name under 'tokenizers'")
    pretrained: Pretrained | None = Field(
        None, description="folder, Hub id, GGUF file, or GGUF file in a wheel; ${NAME} is an environment variable"
    )
    revision: str | None = Field(None, description="commit; pinned in the paper scale")
    architecture: Literal["gpt2", "qwen2"] | None = Field(None, description="architecture of a model from scratch")
    width: PositiveInt | None = Field(None, description="hidden size")
    layers: PositiveInt | None = Field(
        None,
        description="number of layers of a model from scratch; with pretrained: keep only the first layers, this many "
        "(ours)",
    )
    heads: PositiveInt | None = Field(None, description="attention heads; they share the width equally")
    corpus: Name | None = Field(None, description="corpus it is trained on")
    train: TrainSettings | None = None
    seed: Seed = Field(0, description="seed of a model from scratch: initial weights and order of the data")
    shape: Shape | None = Field(
        None,
        description="size of a pretrained model that is not here yet, for `memdec plan` and the requests of jobs; it changes "
        "no result (ours)",
    )

    @model_validator(mode="after")
    def _one_of(self) -> "ModelSpec":
        scratch = [self.architecture, self.width, self.heads, self.corpus, self.train]
        if self.pretrained is not None and any(x is not None for x in scratch):
            raise ValueError("give either 'pretrained' or the fields of a model from scratch, not both")
        if self.pretrained is None and any(x is None for x in [*scratch, self.layers]):
            raise ValueError("a model from scratch needs architecture, width, layers, heads, corpus and train")
        if self.width is not None and self.heads is not None:
            self._check_heads(self.width, self.heads)
        return self

    def _check_heads(self, width: int, heads: int) -> None:
        """Heads share the width equally. Those of qwen2 are rotated in pairs, and two share one key and value head."""
        if width % heads:
            raise ValueError(f"width: expected a multiple of heads ({heads}), found {width}")
        if self.architecture != "qwen2":
            return
        if width // heads % 2:
            raise ValueError(f"width: expected an even width of each head in qwen2, found {width} / {heads}")
        if heads > 3 and heads % 2:
            raise ValueError(f"heads: expected an even number or at most 3 in qwen2, found {heads}")


class DatastoreSettings(Settings):
    """Keys of the datastore: one hidden state per position."""

    split: Split = Field("train", description="split whose keys are made; --queries makes targets for other splits")
    key_point: str = Field(
        "mlp",
        description="hidden state that is the key: input of the last layer's 'mlp' (paper) or 'attention', 'final' "
        "hidden state, or input of the module with this path",
    )
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="key type (released: float16)")
    stored: bool = Field(True, description="store the keys on disk; false: every reader recomputes them (ours)")
    shards: PositiveInt = Field(1, description="number of parts; several jobs can make them in parallel")
    batch_size: PositiveInt = Field(16, description="windows per forward pass")


FEW_KEYS = 100_000  # above so many keys, kind `cells` takes a fraction of the time of exact search on a CPU


class IndexSettings(Settings):
    """Search index over the keys; the defaults of IVFPQ are the paper's."""

    kind: Literal["auto", "exact", "cells", "ivfflat", "ivfpq"] = Field(
        "auto",
        description="exact: compare with all keys; cells: exact distances to the keys of the nearest cells, for many "
        "queries at once (ours); ivfflat, ivfpq: FAISS compares each query with the keys of the nearest cells; auto: exact "
        "up to 100,000 keys, above that cells, four times the root of their number",
    )
    centroids: PositiveInt = Field(4096, description="cells of an index that is not exact (released: 4096)")
    code_size: PositiveInt = Field(64, description="bytes of a key's compressed code in ivfpq (released: 64)")
    opq: bool = Field(False, description="rotate the keys before ivfpq (ours)")
    sample: PositiveInt = Field(
        1_000_000,
        description="keys that train the cells and codes (released: 1,000,000); kind cells takes 64 a cell at most",
    )
    seed: int = Field(0, ge=0, lt=2**31 - 1, description="seed of the sample and of k-means")
    check_queries: PositiveInt = Field(
        256, description="queries used to measure the index's recall and total variation (ours)"
    )
    check_neighbours: PositiveInt = Field(1024, description="k of that measurement (ours)")
    check_nprobe: list[PositiveInt] = Field(
        [8, 32, 128],
        min_length=1,
        description="values of nprobe to measure, which helps to choose 'targets.nprobe' (ours)",
    )

    def for_size(self, n: int) -> "IndexSettings":
        """These settings with the kind and the cells that `auto` means for n keys.

        The size alone decides, so that the same text gives the same targets on any machine.
        """
        if self.kind != "auto":
            return self
        if n <= FEW_KEYS:
            return self.model_copy(update={"kind": "exact"})
        return self.model_copy(update={"kind": "cells", "centroids": round(4 * math.sqrt(n))})

    @property
    def has_cells(self) -> bool:
        """Whether the index has cells, of which a search visits only some; `auto` has to be settled before (`for_size`)."""
        return self.kind not in ("auto", "exact")

    @property
    def training(self) -> tuple[int, int]:
        """Rounds of k-means, and the keys that train the index.

        FAISS's own rounds are 25. Kind `cells` has no codes to train; more than 6 rounds over 64 keys a cell would take most
        of the time of its index, and two more cells in the search find more than four more rounds do.
        """
        return (6, min(self.sample, 64 * self.centroids)) if self.kind == "cells" else (25, self.sample)

    @property
    def measured_neighbours(self) -> list[int]:
        """The k at which the index measures its total variation: those of `calibrate`'s candidates below the main one."""
        candidates = CalibrateSettings().neighbours if self.kind != "exact" else []
        return sorted({self.check_neighbours, *(k for k in candidates if k < self.check_neighbours)})

    @property
    def measured_temperatures(self) -> list[float]:
        """The tau at which it is measured: `calibrate`'s candidates, which contain the paper's 1 and 16."""
        return CalibrateSettings().temperatures

    def bound_fault(self, neighbours: Iterable[int], temperatures: Iterable[float]) -> str | None:
        """Why a bound of total variation says nothing about these k and tau in this index, or None."""
        for name, wanted, known in (
            ("k", neighbours, self.measured_neighbours),
            ("tau", temperatures, self.measured_temperatures),
        ):
            missing = sorted({float(each) for each in wanted} - set(map(float, known)))
            if missing and self.kind != "exact":  # an index of kind auto may get cells
                listed = ", ".join(f"{each:g}" for each in known)
                return f"expected one of {name} {listed}, at which the index measures it, found {missing[0]:g}"
        return None

    def cells_fault(self, nprobe: int) -> str | None:
        """The fault of a search of `nprobe` cells in this index, or None."""
        if not self.has_cells or nprobe <= self.centroids:
            return None
        return f"expected at most {self.centroids} cells (centroids of the index), found {nprobe}"


class _Neighbours(Settings):
    neighbours: PositiveInt = Field(1024, description="k (released: 1024; the paper prints none for the kNN-LM)")


class SearchSettings(_Neighbours):
    """The search for nearest neighbours, for targets and for the kNN-LM."""

    nprobe: PositiveInt = Field(NPROBE, description="number of cells of the index to search (released: 32)")


class _Temperature(Settings):
    temperature: PositiveFloat = Field(16.0, description="tau; divides the squared distance (released: 16)")


class KnnSettings(_Temperature, SearchSettings):
    """p_kNN as used for the targets that memories are trained on."""


class TargetSettings(_Temperature, _Neighbours):
    """kNN next-token distributions for the training positions."""

    nprobe: PositiveInt | None = Field(
        None, description="number of cells of the index to search; default: 32 (released), or as few as max_tv allows"
    )
    max_tv: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="instead of nprobe: largest mean total variation of p_kNN against exact search; the smallest nprobe "
        "that the index measured within it is taken (ours)",
    )
    top: PositiveInt | None = Field(
        None, description="keep this many most likely tokens of each row and renormalise (released: all)"
    )
    threshold: float = Field(0.0, ge=0, lt=1, description="drop probabilities at or below this (released: 0)")
    released: bool = Field(
        False,
        description="use the index's approximate distances, as the released code does; false: compute exact distances "
        "from the keys",
    )
    dtype: Literal["float32", "float16"] = Field(
        "float32", description="type of the probabilities on disk (released: float16)"
    )
    shards: PositiveInt = Field(1, description="number of parts; several jobs can make them in parallel")
    batch_size: PositiveInt = Field(1024, description="queries per search")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if self.nprobe is not None and self.max_tv is not None:
            raise ValueError(
                f"max_tv: expected it in place of nprobe, found both ({self.max_tv:g}, nprobe {self.nprobe}); leave out one"
            )
        return self


class CalibrateSettings(Settings):
    """The choice of k, tau, lambda and top for targets by the key model's kNN-LM on valid. All values are ours."""

    neighbours: Annotated[list[PositiveInt], AfterValidator(each_once)] = Field(
        [64, 256, 1024], min_length=1, description="candidates for k"
    )
    temperatures: Annotated[list[PositiveFloat], AfterValidator(each_once)] = Field(
        [0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256], min_length=1, description="candidates for tau"
    )
    lambdas: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], min_length=1, description="candidates for the weight of p_kNN"
    )
    tops: Annotated[list[PositiveInt], AfterValidator(each_once)] = Field(
        [64, 256],
        min_length=1,
        description="candidates for top; the smallest that costs at most 0.1 % of perplexity is chosen, or all",
    )
    most: PositiveInt = Field(
        8192, description="most positions of valid, and of train, to use; whole windows, evenly spread"
    )
    batch_size: PositiveInt = Field(16, description="windows per forward pass")
    seed: Seed = Field(0, description="seed of the sample")


class KnnLMSettings(SearchSettings):
    """The kNN-LM baseline, which searches at inference."""

    weight: float = Field(0.25, ge=0, le=1, description="lambda, the weight of p_kNN (paper: 0.25)")
    temperature: PositiveFloat = Field(
        1.0,
        description="tau; divides the squared distance (paper: 1 for GPT-2 small and medium, 13 for large and xl)",
    )


class PassageSettings(Settings):
    """Passages of the training text for In-Context RAG."""

    passage: PositiveInt = Field(
        256, description="most tokens of a passage (the paper prints none; Ram et al. 2023: 256)"
    )


class RetrievalSettings(Settings):
    """The In-Context RAG baseline (Ram et al. 2023)."""

    query: PositiveInt = Field(32, description="number of last tokens that form the query (paper: 32)")
    every: PositiveInt = Field(4, description="tokens between two retrievals (paper: 4)")


class MixSettings(Settings):
    """Weights of a memory, or of p_kNN, that are chosen on the valid split."""

    alphas: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        default=[0.4, 0.6, 0.8, 0.9], min_length=1, description="candidates for alpha (paper, section 4.1)"
    )
    lambdas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=[0.25], min_length=1, description="candidates for the weight of p_kNN in the kNN-LM (paper: 0.25)"
    )
    resamples: PositiveInt = Field(
        2000, description="number of bootstrap resamples for the 95 % interval over stretches of the test text (ours)"
    )


class ScoreSettings(SearchSettings):
    """Scores of the tokens of a text."""

    temperatures: list[Annotated[float, Field(gt=0)]] = Field(
        default=[1.0],
        min_length=1,
        description="candidates for tau of the kNN-LM (paper: 1 for GPT-2 small and medium, 13 for large and xl)",
    )
    batch_size: PositiveInt = Field(16, description="windows per forward pass")


class EvaluateSettings(MixSettings, ScoreSettings, RetrievalSettings):
    """Perplexity through lm-eval, with the weights tuned on the valid split."""


SEARCHED = ("temperatures", *SearchSettings.model_fields)  # what p_kNN depends on


def of_system(name: str) -> set[str]:
    """Names of the settings of an evaluation that a system's numbers depend on."""
    own = {
        "MemDec": {"alphas"},
        "kNN-LM": {"lambdas", *SEARCHED},
        "In-Context RAG": set(RetrievalSettings.model_fields),
    }
    return {"resamples", *own.get(name, ())}


class LatencySettings(SearchSettings):
    """Speed of prefill and decoding with one text at a time. All values are ours, because the paper gives none."""

    prompt_tokens: PositiveInt = Field(64, description="tokens of a prompt")
    new_tokens: list[Annotated[int, Field(ge=2)]] = Field(
        [8, 16, 32, 64], min_length=1, description="numbers of generated tokens to measure"
    )
    repeats: int = Field(
        15, ge=2, description="number of rounds, each with another prompt; the median time is reported"
    )
    warmup: PositiveInt = Field(2, description="untimed calls of each system before the first round")
    n_draft: PositiveInt = Field(4, description="tokens that the memory drafts per step of speculative decoding")
    seed: Seed = Field(0, description="seed of synthetic prompts and of the bootstrap")
    resamples: PositiveInt = Field(2000, description="number of bootstrap resamples for the 95 % intervals over rounds")


class SampleSettings(Settings):
    """A sample of the training positions on which models are compared with their targets (ours)."""

    floor: float = Field(
        0.001, ge=0, lt=1, description="tokens of at least this probability are counted (about one neighbour of 1024)"
    )
    most: PositiveInt = Field(32768, description="most positions to use; they come in whole windows, evenly spread")
    batch_size: PositiveInt = Field(16, description="windows per forward pass")
    resamples: PositiveInt = Field(2000, description="number of bootstrap resamples for the 95 % interval over windows")
    seed: Seed = Field(0, description="seed of the sample and of the bootstrap")


class ShapesSettings(SampleSettings):
    """The shapes of p_kNN, of the model that gives the keys, and of the memory (paper, Figures 5 and 6)."""

    bins: int = Field(20, ge=2, description="bars of a histogram")
    examples: PositiveInt = Field(3, description="positions whose distributions are drawn as examples")
    shown: int = Field(
        6, ge=2, description="tokens of an example: the one that follows and the most likely ones of the distributions"
    )


class ExplainSettings(KnnSettings):
    """The next-token distributions of the models at every token of a text (paper, Table 6)."""

    top: PositiveInt = Field(3, description="number of most probable tokens to show of each distribution (ours)")
    context: PositiveInt | None = Field(
        None, description="tokens of a window (default: 1024, or the models' maximum if that is less)"
    )
    stride: PositiveInt | None = Field(
        None, description="tokens scored per window (default: half of the context, as in the paper)"
    )


class Suite(Settings):
    """Tasks of lm-eval that are run together around one base model, with models that are loaded once."""

    tasks: Names = Field(min_length=1, description="names of tasks or groups under 'harness_tasks'")
    alpha: Literal["paper", "valid", "tune"] | Annotated[float, Field(ge=0, le=1)] = Field(
        "paper",
        description="weight of the memory; paper: each task's own, as printed; tune: the best on rows of the task that are "
        "not scored; valid: the one tuned on the domain's valid text; or a number",
    )
    limit: PositiveInt | None = Field(None, description="rows of each task, from all over its file (default: all)")
    batch_size: PositiveInt = Field(16, description="requests per forward pass")


class Case(Settings):
    """A row of Table 6: a text with one marked word, whose probability under each distribution is shown."""

    group: str = Field("", description="what the row shows, in words")
    text: str = Field(description="text with one word between [[ and ]]; the text after ]] has no effect")

    @model_validator(mode="after")
    def _one_word(self) -> "Case":
        before, *rest = self.text.split("[[")
        word, *behind = rest[0].split("]]") if len(rest) == 1 else ("",)
        if not before or not word.strip() or len(behind) != 1:
            raise ValueError(f"text: expected one word between [[ and ]] after some text, found {self.text!r}")
        return self


def parse(kind: Any, data: object, where: str) -> Any:
    """Validate plain data and report all problems in one message.

    Raises:
        ConfigError: The data does not fit; the message names each field, its problem and the value found.
    """
    plain.check(data, where)
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe(error, kind)}") from None


def describe(error: ValidationError, kind: Any = None) -> str:
    """All problems of a validation as one line."""
    return "; ".join(problems(error, kind))


def problems(error: ValidationError, kind: Any = None) -> list[str]:
    """Each problem of a validation as one line; `kind` is the type that was validated, for the names in the message."""
    return [on_one_line(_described(item, *locate(kind, item["loc"]))) for item in error.errors()]


def _described(item: Any, names: list[str], parent: Any) -> str:
    place, text = ".".join(names) or "(top)", item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        field = re.match(r"(\w+): expected", text)  # a validator of several fields names the one that is wrong
        return f"{'.'.join([*names, ''])}{text}" if field else f"{place}: {text}"
    if item["type"] == "missing":
        return f"{place}: {text}"
    if item["type"] == "union_tag_not_found":
        return f"{place}: expected {item['ctx']['discriminator']} to say the kind, found none; see config/README.md"
    if item["type"] == "union_tag_invalid":
        known = item["ctx"]["expected_tags"].replace("'", "")
        return f"{place}: expected a source of {known}, found {item['ctx']['tag']}{near(item['ctx']['tag'], known.split(', '))}"
    if item["type"] == "extra_forbidden":
        known = list(getattr(parent, "model_fields", {}))
        guess = near(names[-1], known) or "; see `memdec schema` or config/README.md for the known ones"
        return f"{place}: unknown key{guess}, found {_short(item['input'])}"
    guess = near(item["input"], get_args(item_kind(parent, names))) if item["type"] == "literal_error" else ""
    number = _as_yaml(item["input"]) if item["type"] == "float_type" else ""
    return f"{place}: {text}, found {_short(item['input'])}{guess or number}"


def _as_yaml(given: object) -> str:
    """How to write a number that YAML takes for text, such as 1e-3, to end a message with; empty for anything else."""
    found = re.fullmatch(r"([+-]?\d+)(\.\d*)?[eE]([+-]?)(\d+)", given) if isinstance(given, str) else None
    if found is None:
        return ""
    return f"; YAML takes that for text, write {found[1]}{found[2] or '.0'}e{found[3] or '+'}{found[4]}"


def item_kind(parent: Any, names: Sequence[str]) -> Any:
    """The type of the field that the last name is, or of the entries if it is a list."""
    field = getattr(parent, "model_fields", {}).get(names[-1] if names else "")
    return _bare(field.annotation) if field is not None else _bare(parent)


def near(name: object, known: Iterable[object]) -> str:
    """The question whether a known name was meant, to end a message with; empty if none is like this one."""
    plainly = {str(each).lower(): str(each) for each in known}
    found = difflib.get_close_matches(str(name).lower(), plainly, 1)
    return f"; did you mean {plainly[found[0]]}?" if found else ""


def locate(kind: Any, loc: Sequence[int | str]) -> tuple[list[str], Any]:
    """Follow the location of an error into a type.

    Returns:
        The names on the way, without the tags of unions; and the type that the last name is a part of.
    """
    names, parent = [], kind
    for part in loc:
        kind = _bare(kind)
        if get_origin(kind) in (Union, UnionType):
            kind = _tagged(kind, part)
            continue
        names.append(str(part))
        parent = kind
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[str(part)].annotation if part in kind.model_fields else None
        else:
            kind = (get_args(kind) or (None,))[-1]
    return names, parent


def _bare(kind: Any) -> Any:
    """A type without its metadata and without None."""
    while True:
        inner = [each for each in get_args(kind) if each is not type(None)]
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        elif get_origin(kind) in (Union, UnionType) and len(inner) == 1:
            kind = inner[0]
        else:
            return kind


def _tagged(union: Any, tag: object) -> Any:
    """The member of a union with this tag: a value of its field `source`, or a `Tag`."""
    for member in get_args(union):
        source = getattr(_bare(member), "model_fields", {}).get("source")
        if tag in get_args(source.annotation if source is not None else None) or Tag(str(tag)) in get_args(member)[1:]:
            return member
    return None


def _listed(values: dict[Any, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


# The default models are a cell of the paper's Table 14: Qwen2.5-7B with the released 0.5B memory, biomedical domain.
PAPER_BASE = "Qwen/Qwen2.5-7B"
PAPER_MEMORY = "Clover-Hill/MemoryDecoder-Qwen-biomed"
DEFAULT_ALPHA = 0.6  # best single value of the paper's Table 7
