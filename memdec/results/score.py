"""Stage `score`: the scores of a memory, or of p_kNN at every temperature, on one corpus, without a base.

They serve every base with these token ids: `memdec mix` chooses the weight and measures the mixture, which is arithmetic.
So a memory reads a text once, however many bases it is put beside.

Output: `scores/` (`memdec.results.scores`). The manifest has what decides whether they fit the scores of a base: hashes of
the token ids of every text, and the number of entries that the probabilities are over.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from memdec.artefacts import artefact, devices
from memdec.errors import ArtifactError, ConfigError
from memdec.harness.scores import ScoreStore, TokenScores, request_key
from memdec.harness.scoring import score_stream, score_streams
from memdec.inference.systems import SYSTEMS, Parts, System
from memdec.maths.windows import Window, windows
from memdec.models import loading
from memdec.results import scores
from memdec.results.records import VALID, Text
from memdec.settings import AUTO, SEARCHED, Compute, KnnLMSettings, ScoreSettings
from memdec.text import corpora, tokens


def run(
    corpus: Path,
    out: Path,
    settings: ScoreSettings,
    *,
    context: int,
    stride: int,
    memory: Path | None = None,
    control: bool = False,
    key_model: Path | None = None,
    datastore: Sequence[Path] = (),
    index: Path | None = None,
    also: Sequence[Path] = (),
    compute: Compute = AUTO,
) -> None:
    """Score the valid and the test text of a corpus.

    Args:
        corpus: Corpus folder.
        out: Output folder.
        settings: Temperatures of p_kNN, and so on.
        context: Longest input of a model, in tokens.
        stride: Tokens scored per window.
        memory: Memory folder, or a model after DAPT in its place.
        control: Negative control: the memory is one of another corpus. Without this, such a memory is refused.
        key_model: In place of a memory: the model that made the keys of `datastore`, whose p_kNN is scored.
        datastore: Shards of its datastore.
        index: Index over the datastore.
        also: General corpora; their test text is scored, too.
        compute: Device, and number type of the models' weights.

    Raises:
        ArtifactError: A part was made from another text or model.
        ConfigError: Neither a memory nor the parts of p_kNN are given, or both; or two corpora have the same name.
    """
    check_names("score", corpus, also)
    text = artefact.read(corpus, "corpus")
    given = {"--memory": memory, "--key-model": key_model, "--datastore": datastore, "--index": index}
    named = [name for name, part in given.items() if part]
    if named not in (["--memory"], ["--key-model", "--datastore", "--index"]):
        raise ConfigError(
            "memdec score: expected --memory, or --key-model with --datastore and --index, found "
            f"{', '.join(named) or 'none of them'}; give what is to be scored"
        )
    model = memory or key_model
    assert model is not None
    parts = Parts(
        base=model,
        datastore=tuple(datastore),
        index=index,
        knn_lm=knn_lm_settings(settings),
        dtype=devices.precision(compute),
        device=str(devices.pick(compute)),
    )
    system = SYSTEMS["base" if memory is not None else "kNN-LM"]
    made = replace(parts, memory=memory)
    inputs = {"corpus": text.recipe, **also_inputs(also), **made_of(made, system, corpus, text, control)}
    plain = {
        **(settings.model_dump(mode="json", include=set(SEARCHED)) if memory is None else {}),
        **({"control": "other domain"} if control else {}),
        "context": context,
        "stride": stride,
        "precision": devices.precision(compute),
    }
    loading.check_positions(loading.n_positions(loading.config(model)), context, "context", "lower it")
    with artefact.building(out, "scores", plain, inputs) as build:
        if build is None:
            return
        texts = Texts([corpus, *also], tokens.load_tokenizer(str(model)), context, stride)
        scorer = Scorer(texts, parts, settings, ScoreStore(build.work / "scores", {"scores": build.recipe}))
        for each in texts.all:
            scores.write_alone(build.path, scorer.by_name(each), *each)
        build.facts.update(
            texts.facts,
            corpus=corpus.name,
            also=[folder.name for folder in also],
            rows=loading.n_rows(model) if memory is not None else None,
            learning_rate=None if memory is None else tuned_rate(memory),
            corpora_sha256=texts.sha256,
            device=devices.described(torch.device(parts.device)),
        )


def knn_lm_settings(settings: ScoreSettings, weight: float = 0.0, temperature: float | None = None) -> KnnLMSettings:
    """Settings of the kNN-LM for the same search; lambda and tau are chosen later."""
    tau = settings.temperatures[0] if temperature is None else temperature
    return KnnLMSettings(weight=weight, temperature=tau, neighbours=settings.neighbours, nprobe=settings.nprobe)


def check_names(command: str, corpus: Path, also: Sequence[Path]) -> None:
    """Check that no two corpora share a name, by which their records are known; a domain may be general text of its own.

    Raises:
        ConfigError: Two do.
    """
    folders = list(dict.fromkeys(folder.resolve() for folder in (corpus, *also)))
    if len({folder.name for folder in folders}) < len(folders):
        raise ConfigError(
            f"memdec {command}: expected --corpus and --also in folders of different names, found "
            f"{', '.join(map(str, folders))}; rename one"
        )


def also_inputs(also: Sequence[Path]) -> dict[str, str]:
    """Recipes of the general corpora, as inputs of a manifest."""
    return {f"also {folder.name}": artefact.read(folder, "corpus").recipe for folder in also}


def tuned_rate(part: Path) -> float | None:
    """The learning rate of a part that was trained, if it was tuned; a plain folder does not say."""
    kind = artefact.kind_of(part)
    return None if kind is None else artefact.read(part, kind).facts.get("learning_rate")


def reached_size(adapter: Path) -> float | None:
    """The parameters of a LoRA adapter as a share of the memory's; None if its rank was given, or for a plain folder."""
    if artefact.kind_of(adapter) is None:
        return None
    manifest = artefact.read(adapter, "lora")
    wanted = manifest.settings.get("parameters_wanted")
    return None if wanted is None else float(manifest.facts["parameters"] / wanted)


class Texts:
    """The texts that are scored, as token ids.

    Args:
        folders: Corpus folders: the one that is evaluated, with valid and test; then general ones, of which test is read.
        words: Tokenizer.
        context: Longest input of a model, in tokens.
        stride: Tokens scored per window.
    """

    def __init__(self, folders: Sequence[Path], words: Any, context: int, stride: int) -> None:
        self.folders: dict[str | None, Path] = {None: folders[0], **{folder.name: folder for folder in folders[1:]}}
        self.words, self.context, self.stride = words, context, stride
        self.tests: list[Text] = [("test", on) for on in self.folders]
        self._streams: dict[Text, NDArray[np.int64]] = {}

    @property
    def all(self) -> list[Text]:
        """Valid first, which chooses the weights."""
        return [VALID, *self.tests]

    @property
    def sha256(self) -> dict[str, str]:
        """Hashes of the texts by corpus."""
        return {each.name: artefact.read(each, "corpus").facts["sha256"] for each in self.folders.values()}

    @property
    def facts(self) -> dict[str, Any]:
        """What tells whether two models have read the same tokens: a hash of the ids of each text and of what precedes."""
        return {"ids": {scores.name(*text): xxhash.xxh3_128_hexdigest(self._read(text)) for text in self.all}}

    def _read(self, text: Text) -> bytes:
        return np.append(self.stream(text), self.prefix).astype("<i8").tobytes()

    @property
    def prefix(self) -> int:
        """The token in front of a text."""
        return tokens.prefix_id(self.words)

    def stream(self, text: Text) -> NDArray[np.int64]:
        """The token ids of a text."""
        if text not in self._streams:
            ids = self.words.encode(self.joined(text), add_special_tokens=False, verbose=False)
            self._streams[text] = np.asarray(ids, dtype=np.int64)
        return self._streams[text]

    def joined(self, text: Text) -> str:
        """A text as one string."""
        split, on = text
        return corpora.joined_split(self.folders[on], split, self.words.eos_token)

    def windows(self, text: Text) -> tuple[NDArray[np.int64], list[Window], int]:
        """The token stream of a text, windows over it, and the token in front."""
        stream = self.stream(text)
        return stream, windows(len(stream), self.context, self.stride), self.prefix


class Scorer:
    """Scores texts under one memory or under the neighbours; what is scored is stored, and a killed run goes on from it.

    Args:
        texts: The texts.
        parts: `base` is the memory or the key model; with an index p_kNN is scored.
        settings: Temperatures, and windows per forward pass.
        store: Store of the scores.
        rows: Entries of the base's head, if the probabilities are to be over those; None: over the memory's own.
    """

    def __init__(
        self, texts: Texts, parts: Parts, settings: ScoreSettings, store: ScoreStore, rows: int | None = None
    ) -> None:
        self.texts, self.parts, self.settings, self.store, self.rows = texts, parts, settings, store, rows

    def by_name(self, text: Text) -> Mapping[str, NDArray[np.float64]]:
        """The arrays of a text in an artefact of scores."""
        if self.parts.index is None:
            return {scores.MEMORY: self.of_memory(text)}
        return {scores.tau(at): each.memory for at, each in self.of_neighbours(text).items() if each.memory is not None}

    def of_memory(self, text: Text) -> NDArray[np.float64]:
        """log-probabilities of the tokens under the memory."""
        key = self._key("memory", text)
        found = self.store.get(key)
        if found is None:
            self._memory.check_labels(self.texts.stream(text))
            size = self.settings.batch_size
            found = score_stream(self._memory, *self.texts.windows(text), which="base", batch_size=size)
            self.store.put(key, found)
            self.store.flush()
        return found.base

    @cached_property
    def _memory(self) -> Any:
        model = SYSTEMS["base"].build(replace(self.parts, tokenizer=self.texts.words))
        if self.rows is not None:
            model.n_vocab = self.rows
        return model

    def of_neighbours(self, text: Text) -> dict[float, TokenScores]:
        """Scores of the key model and p_kNN at each temperature, from one pass of the model and one search."""
        keys = {tau: self._key(f"p_kNN at {tau}", text) for tau in self.settings.temperatures}
        if any(self.store.get(key) is None for key in keys.values()):
            self._neighbours.check_labels(self.texts.stream(text))
            log_probs = partial(self._neighbours.log_probs_at, self.settings.temperatures)
            base, *found = score_streams(
                log_probs, *self.texts.windows(text), batch_size=self.settings.batch_size
            ).values()
            for key, p_knn in zip(keys.values(), found, strict=True):
                self.store.put(key, TokenScores(base, p_knn))
            self.store.flush()
        return {tau: known for tau, key in keys.items() if (known := self.store.get(key)) is not None}

    @cached_property
    def _neighbours(self) -> Any:
        return SYSTEMS["kNN-LM"].build(replace(self.parts, tokenizer=self.texts.words))

    def _key(self, name: str, text: Text) -> bytes:
        return request_key(name, self.texts.stream(text), [self.texts.context, self.texts.stride])


# --- what parts were made from -----------------------------------------------------------------------------------------


def made_of(parts: Parts, system: System, corpus: Path, text: artefact.Manifest, control: bool) -> dict[str, str]:
    """Check that all parts except the base were made from the corpus, and return their recipes.

    With `control` the memory must be one made from another corpus.
    """
    if control and (parts.memory is None or not loading.is_artefact(Path(parts.memory))):
        raise ConfigError(
            f"--control: expected a memory that `memdec train` made, found {parts.memory}; give its folder, or leave out "
            "--control"
        )
    kinds = {"lora": "lora", "dapt": "model", "passages": "passages"}
    mixed_in = parts.memory is not None and artefact.kind_of(Path(parts.memory)) == "model"
    kinds["memory"] = "model" if mixed_in else "memory"
    found = {
        name: _trained_on(parts.of(name), kind, corpus, text, other=control and name == "memory")
        for name, kind in kinds.items()
        if parts.of(name)
    }
    if parts.index is not None:
        for shard in parts.datastore:
            _trained_on(shard, "datastore", corpus, text)
        found["index"] = artefact.read(parts.index, "index").recipe
    system.check_parts(parts)
    return found


def _trained_on(folder: Path, kind: str, corpus: Path, text: artefact.Manifest, *, other: bool = False) -> str:
    """Check that an artefact was made from the corpus, and return its recipe; a plain folder says nothing about that.

    With `other` it must be one from another corpus.
    """
    if kind in ("model", "memory", "lora") and not loading.is_artefact(folder):
        return loading.model_identity(folder)
    manifest = artefact.read(folder, kind, whole=kind in ("model", "memory", "lora"))
    if "source" in manifest.facts:
        return manifest.recipe  # pretrained elsewhere, on what it does not say
    same = manifest.facts.get("corpus_sha256") == text.facts["sha256"]
    if other and same:
        raise ArtifactError(
            f"{folder}: expected with --control a {kind} of another corpus than {corpus}, found one of this corpus; leave "
            "out --control"
        )
    if not other and not same:
        raise ArtifactError(f"{folder}: expected {kind} made from {corpus}, found one from other text; check the paths")
    return manifest.recipe
