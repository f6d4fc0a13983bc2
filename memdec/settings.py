"""The typed settings of every stage: what a config section holds and what the command line offers.

All of them are frozen and refuse unknown keys. Each field states its unit and its origin: the paper, its released
script, or this project.
"""

import os
import re
from typing import Annotated, Any, Literal, Self

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

from memdec.errors import ConfigError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="a name usable as a folder")]
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
DEFAULT_MEMORY = "memdec"  # the memory that 'key_model', 'memory_model' and 'memory' describe
SYSTEMS = "systems"  # folder of what is evaluated without a memory
FORGETTING = "forgetting.json"  # records of general corpora in an evaluation
UNTUNED = "-untuned"  # ending of the folder with the keys of a model as it is
System = Literal["base", "In-Context RAG", "kNN-LM", "DAPT", "LoRA", "MemDec"]


def _expanded(text: str) -> str:
    """`${NAME}` replaced by the environment variable."""
    names = re.findall(r"\$\{(\w+)\}", text)
    unset = [name for name in names if name not in os.environ]
    if unset:
        raise ValueError(f"expected the environment variable {', '.join(unset)}, found it unset; export it")
    for name in names:
        text = text.replace(f"${{{name}}}", os.environ[name])
    return text


def portable(value: Any) -> Any:
    """The same settings with `${MEMDEC_TEST_DATA}` where they name that folder: equal on every machine."""
    folder = os.environ.get("MEMDEC_TEST_DATA")
    if isinstance(value, dict):
        return {key: portable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [portable(each) for each in value]
    if isinstance(value, str) and folder and (value == folder or value.startswith(f"{folder}/")):
        return "${MEMDEC_TEST_DATA}" + value.removeprefix(folder)
    return value


Place = Annotated[str, AfterValidator(_expanded)]


class Settings(BaseModel):
    """Base of all settings: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Compute(Settings):
    """Where stages compute and in which type; `memdec.artefacts.devices` chooses."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a GPU where there is one; which one of several: CUDA_VISIBLE_DEVICES"
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="weights' type; in training that of autocast over float32 weights (released: bfloat16); auto: "
        "bfloat16 on a GPU that has it, else float32; sums are float32 or more in any case",
    )


AUTO = Compute()


class WheelFile(Settings):
    """A GGUF file inside a wheel of the package index: downloaded once, checked, never installed."""

    wheel: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9._+!-]*$", description="name==version"
    )
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the wheel, as the package index states it")
    file: str = Field(pattern=r"\.gguf$", description="path, or name alone, of the GGUF file in the wheel")


def _kind_of_source(value: object) -> str:
    return "(name)" if isinstance(value, str) else "(wheel)"


# Told apart by form, so that a problem is reported for the form that was meant; `describe` leaves the tags out.
Pretrained = Annotated[
    Annotated[Place, Tag("(name)")] | Annotated[WheelFile, Tag("(wheel)")], Discriminator(_kind_of_source)
]


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
    path: Place | None = Field(
        None, description="file or glob; documents are split 84/6/10 by hash; ${NAME} is an environment variable"
    )
    paths: dict[Split, Place] | None = Field(None, description="file or glob of each split, likewise")
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
    pretrained: Pretrained | None = Field(
        None, description="folder, Hub id, GGUF file, or GGUF file in a wheel; ${NAME} is an environment variable"
    )
    revision: str | None = None

    @model_validator(mode="after")
    def _one_of(self) -> "TokenizerSpec":
        if (self.pretrained is None) == (self.train_on is None):
            raise ValueError("give either 'train_on' with 'vocab_size', or 'pretrained'")
        if self.train_on is not None and self.vocab_size is None:
            raise ValueError("'train_on' needs 'vocab_size'")
        return self


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
    gradient_checkpointing: bool = Field(False, description="activations of the layers made again in the backward pass")
    keep_best: bool = Field(
        False, description="keep the weights of the best evaluation on valid (paper: early stopping)"
    )
    evaluate_every: PositiveFloat | None = Field(
        None, description="epochs between evaluations on valid; else every epoch with keep_best, else at the end (ours)"
    )
    patience: PositiveInt | None = Field(
        None, description="evaluations without a better one before training stops; needs keep_best (paper: no number)"
    )
    report_to: list[str] = Field([], description="where curves go: tensorboard, wandb, ... as in transformers")

    @model_validator(mode="after")
    def _stopping(self) -> Self:
        if self.patience is not None and not self.keep_best:
            raise ValueError(f"patience: expected keep_best true with patience {self.patience}, found false")
        return self


class LoraSettings(TrainSettings):
    """LoRA on query, key, value and MLP projections (paper, section 4.1)."""

    rank: PositiveInt | None = Field(
        None, description="rank of every adapter matrix; else the one nearest to the memory's size (paper, section 4.1)"
    )
    scale: PositiveFloat = Field(1.0, description="lora_alpha / rank (not printed in the paper; ours)")
    adapter_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapter (not printed; ours)")


class MemorySettings(TrainSettings):
    """Training of the memory decoder on the kNN targets."""

    objective: Literal["hybrid", "kl", "ce", "focal", "jsd", "bild", "sparsity"] = Field(
        "hybrid", description="loss: the paper's, its two parts, or one of those that failed (paper, appendix H)"
    )
    kl_weight: float = Field(0.5, ge=0, le=1, description="hybrid: beta of the paper's equation 5 (0.5)")
    focal_weight: float = Field(0.5, ge=0, le=1, description="focal: alpha of appendix H (0.5)")
    focal_gamma: float = Field(2.0, ge=0, description="focal: gamma of appendix H (2)")
    bild_top: int = Field(
        8, ge=2, description="bild: leading tokens compared in pairs (BiLD paper: 8; not printed here)"
    )
    sparsity_weight: float = Field(0.01, ge=0, description="sparsity: alpha of appendix H (0.01)")
    alphas: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        default=[0.4, 0.6, 0.8, 0.9],
        min_length=1,
        description="weights tried with every base at an evaluation (paper: grid)",
    )


class TeacherSettings(Settings):
    """Control that the paper lacks: the key model's own next-token distribution in the place of p_kNN."""

    top: PositiveInt = Field(64, description="most likely tokens kept of each position, then renormalised (ours)")
    temperature: PositiveFloat = Field(1.0, allow_inf_nan=False, description="divides the logits (ours)")
    dtype: Literal["float32", "float16"] = Field("float32", description="probabilities on disk")
    shards: PositiveInt = Field(1, description="parts that can be made side by side")
    batch_size: PositiveInt = Field(16, description="windows per forward pass")


class AdaptSettings(Settings):
    """A trained memory for another tokenizer (paper, section 4.3)."""

    init: Literal["copy", "random"] = Field(
        "copy", description="rows of tokens spelled the same copied and the rest means of their pieces; or all random"
    )


class ModelSpec(Settings):
    """A base model: pretrained, or (mini scale) trained from scratch on one corpus."""

    family: str = Field(description="row group of the tables")
    tokenizer: Name = Field(description="name under 'tokenizers'")
    pretrained: Pretrained | None = Field(
        None, description="folder, Hub id, GGUF file, or GGUF file in a wheel; ${NAME} is an environment variable"
    )
    revision: str | None = Field(None, description="commit; pinned in the paper scale")
    architecture: Literal["gpt2", "qwen2"] | None = Field(None, description="to train from scratch")
    width: PositiveInt | None = Field(None, description="hidden size")
    layers: PositiveInt | None = Field(
        None, description="from scratch: how many; with pretrained: only the first so many, as a smaller model (ours)"
    )
    heads: PositiveInt | None = None
    corpus: Name | None = Field(None, description="corpus it is trained on")
    train: TrainSettings | None = None
    seed: int = Field(0, description="of a model from scratch: initial weights and order of the data")

    @model_validator(mode="after")
    def _one_of(self) -> "ModelSpec":
        scratch = [self.architecture, self.width, self.heads, self.corpus, self.train]
        if self.pretrained is not None and any(x is not None for x in scratch):
            raise ValueError("give either 'pretrained' or the fields of a model from scratch, not both")
        if self.pretrained is None and any(x is None for x in [*scratch, self.layers]):
            raise ValueError("a model from scratch needs architecture, width, layers, heads, corpus and train")
        return self


class DatastoreSettings(Settings):
    """Keys of the datastore: a hidden state of each position."""

    split: Split = Field("train", description="split to take; targets of others are made with --queries")
    key_point: str = Field(
        "mlp",
        description="input of the last layer's 'mlp' (paper) or 'attention', 'final' hidden state, or path of a module",
    )
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="key type (released: float16)")
    stored: bool = Field(True, description="keys on disk; else every use makes them again by forward passes (ours)")
    shards: PositiveInt = Field(1, description="parts that can be made side by side")
    batch_size: PositiveInt = Field(16, description="windows per forward pass")


class IndexSettings(Settings):
    """Search structure over the keys; defaults of IVFPQ are the paper's."""

    kind: Literal["exact", "ivfflat", "ivfpq"] = Field(
        "exact", description="exact: keys stream past; ivfflat, ivfpq: FAISS, nearest cells only"
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


class KnnLMSettings(Settings):
    """The kNN-LM at inference, as a baseline."""

    weight: float = Field(0.25, ge=0, le=1, description="lambda, of p_kNN (paper: 0.25)")
    temperature: PositiveFloat = Field(
        1.0,
        allow_inf_nan=False,
        description="tau, divides the squared distance (paper: 1 for GPT-2 small and medium, 13 for large and xl)",
    )
    neighbours: PositiveInt = Field(1024, description="k (not printed in the paper; as in targets)")
    nprobe: PositiveInt = Field(32, description="cells of an ivf index that are searched")


class PassageSettings(Settings):
    """Passages of the training text for In-Context RAG."""

    passage: PositiveInt = Field(256, description="most tokens of a passage (not printed; Ram et al. 2023: 256)")


class RetrievalSettings(PassageSettings):
    """In-Context RAG (Ram et al. 2023), as a baseline."""

    query: PositiveInt = Field(32, description="last tokens that make the query (paper: 32)")
    every: PositiveInt = Field(4, description="tokens between two retrievals (paper: 4)")


class EvaluateSettings(Settings):
    """Perplexity through lm-eval, alpha tuned on the valid split."""

    alphas: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        default=[0.4, 0.6, 0.8, 0.9], min_length=1, description="candidates for alpha (paper, section 4.1)"
    )
    lambdas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=[0.25], min_length=1, description="candidates for the weight of p_kNN in the kNN-LM (paper: 0.25)"
    )
    temperatures: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default=[1.0],
        min_length=1,
        description="candidates for tau of the kNN-LM (paper: 1 for GPT-2 small and medium, 13 for large and xl)",
    )
    neighbours: PositiveInt = Field(1024, description="k of the kNN-LM (not printed in the paper; as in targets)")
    nprobe: PositiveInt = Field(32, description="cells of an ivf index that the kNN-LM searches (released: 32)")
    query: PositiveInt = Field(32, description="last tokens that make the query of In-Context RAG (paper: 32)")
    every: PositiveInt = Field(4, description="tokens between two retrievals of In-Context RAG (paper: 4)")
    batch_size: PositiveInt = Field(16, description="windows per forward pass")
    resamples: PositiveInt = Field(
        2000, description="bootstrap resamples for the 95 % interval over test windows (ours)"
    )


class LatencySettings(Settings):
    """Speed of prefill and decoding, one text at a time (the paper gives no settings; all are ours)."""

    prompt_tokens: PositiveInt = Field(64, description="length of a prompt")
    new_tokens: list[Annotated[int, Field(ge=2)]] = Field(
        [8, 16, 32, 64], min_length=1, description="numbers of generated tokens to measure"
    )
    repeats: int = Field(15, ge=2, description="turns, each with a prompt of its own; the median counts")
    warmup: PositiveInt = Field(2, description="calls of each system before the first turn")
    n_draft: PositiveInt = Field(4, description="tokens the memory drafts per round of speculative decoding")
    neighbours: PositiveInt = Field(1024, description="k of the kNN-LM, at most the keys there are (released: 1024)")
    nprobe: PositiveInt = Field(32, description="cells of an ivf index that the kNN-LM searches (released: 32)")
    seed: int = Field(0, ge=0, description="of made-up prompts and of the bootstrap")
    resamples: PositiveInt = Field(2000, description="bootstrap resamples for the 95 % intervals over turns")


class ExplainSettings(Settings):
    """What models expect at every token of a text (paper, Table 6)."""

    top: PositiveInt = Field(3, description="most probable tokens to show of each distribution (ours)")
    context: PositiveInt | None = Field(
        None, description="tokens of a window (default: 1024, or what the models hold if that is less)"
    )
    stride: PositiveInt | None = Field(None, description="tokens scored per window (default: half of it, as the paper)")
    neighbours: PositiveInt = Field(1024, description="k of p_kNN (released: 1024)")
    temperature: PositiveFloat = Field(16.0, allow_inf_nan=False, description="tau of p_kNN (released: 16)")
    nprobe: PositiveInt = Field(32, description="cells of an ivf index that are searched (released: 32)")


class Case(Settings):
    """A row of Table 6: a text with one word marked, and what the distributions give that word."""

    group: str = Field("", description="what the row shows, in words")
    text: str = Field(description="the word stands between [[ and ]]; what is behind it changes nothing")

    @model_validator(mode="after")
    def _one_word(self) -> "Case":
        before, *rest = self.text.split("[[")
        word, *behind = rest[0].split("]]") if len(rest) == 1 else ("",)
        if not before or not word.strip() or len(behind) != 1:
            raise ValueError(f"text: expected one word between [[ and ]] after some text, found {self.text!r}")
        return self


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
        place = ".".join(str(part) for part in item["loc"] if not str(part).startswith("(")) or "(top)"
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            text = "unknown key; see `memdec schema` or config/README.md for the known ones"
        found = "" if item["type"] in ("missing", "value_error") else f", found {item['input']!r}"
        lines.append(f"{place}: {text}{found}")
    return "; ".join(lines)


# The paper's own cell: Qwen2.5-7B with the released 0.5B memory, biomedical domain (Table 14).
PAPER_BASE = "Qwen/Qwen2.5-7B"
PAPER_MEMORY = "Clover-Hill/MemoryDecoder-Qwen-biomed"
DEFAULT_ALPHA = 0.6  # best single value of the paper's Table 7
