"""Sizes that are known before a run: the shapes of its models, and the tokens of its texts.

What is there already is read: the manifest of a token stream, the headers of safetensors files. What is not is
computed from the config, which may state it (`models.NAME.shape`, `corpora.NAME.expected_bytes`).
"""

import glob
import json
import math
import os
from functools import cache
from pathlib import Path

from memdec.config import Config
from memdec.errors import MemDecError
from memdec.settings import SPLITS, CorpusSpec, DocstringCorpus, FileCorpus, HubCorpus, ModelSpec, Shape, Split

SPLIT_HERE = {"train": 0.84, "valid": 0.06, "test": 0.10}  # parts of a text that is split here, as `text.corpora` does
SPLIT_THERE = {"train": 0.98, "valid": 0.01, "test": 0.01}  # of a data set with splits of its own, as WikiText-103's
PACKED = 3.0  # bytes of text for each byte of a .gz, .xz or .parquet file


class UnknownSizeError(MemDecError):
    """A size that the config does not say and no file here tells; the message says which field would."""


class Sizes:
    """Sizes of the models and texts of a config; `run` is the folder of its scale, where some may be there already."""

    def __init__(self, config: Config, run: Path) -> None:
        self.config, self.run = config, run

    def shape(self, model: str) -> Shape:
        """Shape of a model.

        Raises:
            UnknownSizeError: It is pretrained, not here, and without `shape` in the config.
        """
        spec = self.config.models[model]
        whole = self._scratch(spec) if spec.pretrained is None else spec.shape or self._local(model, spec)
        if spec.pretrained is None or spec.layers is None or spec.layers >= whole.layers:
            return whole
        tables = whole.vocabulary * whole.width  # the first `layers` of it are kept, and the embeddings
        kept = tables + (whole.parameters - tables) * spec.layers / whole.layers
        return whole.model_copy(update={"parameters": kept, "layers": spec.layers})

    def _scratch(self, spec: ModelSpec) -> Shape:
        width, layers, heads = spec.width or 0, spec.layers or 0, spec.heads or 1
        vocabulary = self.vocabulary(spec.tokenizer)
        if spec.architecture == "gpt2":
            weights = (vocabulary + self.config.context) * width + layers * (12 * width**2 + 13 * width) + 2 * width
        else:
            of_keys = max(1, heads // 2) * width // heads
            weights = vocabulary * width + layers * (2 * width * (width + of_keys) + 8 * width**2)
        return Shape(parameters=weights, width=width, layers=layers, vocabulary=vocabulary)

    def _local(self, model: str, spec: ModelSpec) -> Shape:
        given = [Path(spec.pretrained)] if isinstance(spec.pretrained, str) else []
        for folder in (self.run / "models" / model, *given):
            if (folder / "config.json").is_file() and (found := _read(str(folder))) is not None:
                return found
        raise UnknownSizeError(
            f"models.{model}: expected its size, found a model that is not here yet; give "
            "shape: {parameters: ..., width: ..., layers: ..., vocabulary: ...}"
        )

    def vocabulary(self, tokenizer: str) -> int:
        """Number of tokens of a tokenizer; that of a pretrained one is taken from the models that use it."""
        spec = self.config.tokenizers[tokenizer]
        if spec.vocab_size is not None:
            return spec.vocab_size
        users = [model for model in self.config.models.values() if model.tokenizer == tokenizer]
        known = [model.shape.vocabulary for model in users if model.shape is not None]
        for name, model in self.config.models.items():
            if not known and model.tokenizer == tokenizer:
                known = [self._local(name, model).vocabulary]
        if not known:
            raise UnknownSizeError(f"tokenizers.{tokenizer}: expected a model that uses it, found none")
        return max(known)

    def n_bytes(self, corpus: str, *splits: Split) -> float:
        """UTF-8 bytes of splits of a corpus (default: all), before it is there.

        Raises:
            UnknownSizeError: It is not here, and the config has neither `max_bytes` nor `expected_bytes`.
        """
        return sum(self._n_bytes(corpus, split) for split in splits or SPLITS)

    def _n_bytes(self, corpus: str, split: Split) -> float:
        spec = self.config.corpora[corpus]
        most = spec.max_bytes.get(split)
        try:
            found = _expected(spec, split)
        except LookupError:
            if most is not None:
                return most
            raise UnknownSizeError(
                f"corpora.{corpus}: expected its size, found a text that is not here yet; give expected_bytes"
            ) from None
        return found if most is None else min(most, found)

    def n_tokens(self, model: str, corpus: str, *splits: Split) -> float:
        """Tokens of splits of a corpus (default: all) in the tokenizer of a model."""
        tokenizer = self.config.models[model].tokenizer
        there = _counted(str(self.run / "tokens" / tokenizer / corpus / "manifest.json"))
        if there:
            return sum(there[split] for split in splits or SPLITS)
        return self.n_bytes(corpus, *splits) / bytes_per_token(self.vocabulary(tokenizer))


def bytes_per_token(vocabulary: int) -> float:
    """UTF-8 bytes of a token of a BPE over English text, by the number of tokens that it knows.

    A line in the logarithm through 2.8 for 2,048 (this project's `mini`) and 4.5 for 50,257 (GPT-2 on WikiText-103), and
    no more than that, since larger vocabularies spend their tokens on other languages.
    """
    return min(4.5, 2.8 + 1.7 * math.log(vocabulary / 2048) / math.log(50257 / 2048))


def _expected(spec: CorpusSpec, split: Split) -> float:
    """Bytes of a split by what the config states, or by files that are here; LookupError if neither says it."""
    if isinstance(spec, FileCorpus) and spec.paths is not None:
        return _on_disk(spec.paths.get(split))
    own = isinstance(spec, HubCorpus) and len(spec.splits) > 1
    part = (SPLIT_THERE if own else SPLIT_HERE)[split]
    if spec.expected_bytes is not None:
        return spec.expected_bytes * part
    if isinstance(spec, DocstringCorpus):
        raise LookupError
    return _on_disk(spec.path) * part


@cache
def _on_disk(place: str | None) -> float:
    files = [place] if place and os.path.isfile(place) else glob.glob(place or "", recursive=True)
    sizes = [(os.path.getsize(file), file) for file in files if os.path.isfile(file)]
    if not sizes:
        raise LookupError
    return sum(size * (PACKED if file.endswith((".gz", ".xz", ".parquet")) else 1) for size, file in sizes)


def _counted(manifest: str) -> dict[Split, int]:
    """Tokens of each split by the manifest of a token stream; none if it is not there."""
    return _of_stream(manifest) if os.path.isfile(manifest) else {}


@cache
def _of_stream(manifest: str) -> dict[Split, int]:
    try:
        found: dict[Split, int] = json.loads(Path(manifest).read_text())["facts"]["tokens"]
    except (OSError, ValueError, KeyError):
        return {}
    return found


@cache
def _read(folder: str) -> Shape | None:
    """Shape of a model in a folder with safetensors, by its config and the headers of its files."""
    try:
        config = json.loads(Path(folder, "config.json").read_text())
        names: dict[str, list[int]] = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            with file.open("rb") as data:
                header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
            names |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
        return Shape(
            parameters=sum(math.prod(shape) for shape in names.values()),
            width=config.get("hidden_size") or config["n_embd"],
            layers=config.get("num_hidden_layers") or config["n_layer"],
            vocabulary=config["vocab_size"],
        )
    except (OSError, ValueError, KeyError):
        return None
