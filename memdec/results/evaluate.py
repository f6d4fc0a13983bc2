"""Stage `evaluate`: measure the perplexity of one system around one base model on one corpus.

The system is the one whose parts are given: a memory, a LoRA adapter, a DAPT model, a datastore with its index, or
passages; without any, it is the base alone. Every model reads a text once, and the scores of its tokens are stored
(`memdec.results.scores`). Weights are arithmetic on these scores: alpha of a memory, and lambda and tau of the kNN-LM,
are the candidates with the lowest perplexity on the valid text. The test text is measured with them.

The base's scores need not be computed for every memory: `base_evaluation` is the folder of the base's own evaluation.

Output: `scores/`, `records.json`, and `forgetting.json` if general corpora are given. A memory's evaluation has the
base's record too. Where the whole system ran here, lm-eval ran it, and `results_<method>_test.json` is what lm-eval
returned; its perplexity is that of the record. A memory's scores beside a base's that are stored need no lm-eval.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from memdec import HARNESS_TASKS
from memdec.artefacts import artefact, devices
from memdec.errors import ArtifactError, ConfigError
from memdec.harness.scores import ScoreStore, TokenScores, request_key
from memdec.harness.scoring import score_stream, score_streams
from memdec.inference.systems import SYSTEMS, Parts, System
from memdec.maths import statistics, weighing
from memdec.maths.windows import Window, windows
from memdec.models import loading
from memdec.results import scores
from memdec.settings import (
    AUTO,
    DEFAULT_MEMORY,
    FORGETTING,
    Compute,
    EvaluateSettings,
    KnnLMSettings,
    RetrievalSettings,
    SearchSettings,
    Split,
    SystemName,
)
from memdec.text import corpora, tokens

if TYPE_CHECKING:
    from memdec.harness.base_lm import WrappedLM

log = logging.getLogger(__name__)
TASK = "memdec_ppl"
Text = tuple[Split, Path]  # split of a corpus folder


def run(
    base: Path,
    corpus: Path,
    out: Path,
    settings: EvaluateSettings,
    *,
    context: int,
    stride: int,
    seed: int,
    memory: Path | None = None,
    name: str = DEFAULT_MEMORY,
    control: bool = False,
    lora: Path | None = None,
    dapt: Path | None = None,
    datastore: Sequence[Path] = (),
    index: Path | None = None,
    key_model: Path | None = None,
    passages: Path | None = None,
    also: Sequence[Path] = (),
    base_evaluation: Path | None = None,
    compute: Compute = AUTO,
) -> None:
    """Evaluate one system on one corpus.

    Args:
        base: Model folder.
        corpus: Corpus folder; its valid text tunes the weights, its test text is measured.
        out: Output folder.
        settings: Candidates for the weights, and so on.
        context: Longest input of a model, in tokens.
        stride: Tokens scored per window.
        seed: Seed of the run; it is written into the records.
        memory: Memory folder, or a model after DAPT in its place: the system MemDec.
        name: Name of the memory in the records.
        control: Negative control: the memory is one of another corpus. Without this, such a memory is refused.
        lora: LoRA folder of the base: the system LoRA.
        dapt: The base after DAPT: the system DAPT.
        datastore: Shards of a datastore made with the base; with `index` the system kNN-LM.
        index: Index over the datastore.
        key_model: The model that gives the keys, if it is not the base: p_kNN of its datastore in the place of a memory,
            which is what a memory of this key model imitates. Needs `base_evaluation`.
        passages: Passages of the corpus's training text: the system In-Context RAG.
        also: General corpora; their test text is measured too, with the weights tuned on `corpus`.
        base_evaluation: With a memory, the evaluation of the base alone on the same texts, in whose place the base
            would be run.
        compute: Device, and number type of the models' weights.

    Raises:
        ArtifactError: A part was made from another text or base, or `base_evaluation` is of something else.
        ConfigError: The parts are those of several systems, or only some of one.
    """
    text = artefact.read(corpus, "corpus")
    parts = Parts(
        base=base,
        dapt=dapt,
        lora=lora,
        memory=memory,
        datastore=tuple(datastore),
        index=index,
        passages=passages,
        alpha=settings.alphas[0],
        knn_lm=_knn_settings(settings, settings.lambdas[0], settings.temperatures[0]),
        retrieval=RetrievalSettings(query=settings.query, every=settings.every),
        dtype=devices.precision(compute),
        device=str(devices.pick(compute)),
    )
    system = _system(parts, base_evaluation, key_model)
    source = loading.known(base, "model")
    inputs = {"base": source.recipe, "corpus": text.recipe}
    others = {folder.name: artefact.read(folder, "corpus") for folder in also}
    inputs |= {f"also {each}": manifest.recipe for each, manifest in others.items()}
    windowed = {"context": context, "stride": stride, "precision": devices.precision(compute)}
    given = None if base_evaluation is None else _of_base(base_evaluation, inputs, windowed)
    checked = parts if key_model is None else replace(parts, base=key_model)
    inputs |= _made_of(checked, system, corpus, text, control)
    if given is not None:
        inputs["base evaluation"] = given.recipe
    if memory is not None:
        limit = loading.n_positions(loading.config(memory))
        loading.check_positions(limit, context, "context", "lower it")
    plain = {
        **settings.model_dump(mode="json", include=_own_settings(system)),
        **windowed,
        "seed": seed,
        "system": system.name,
        "memory": name if memory is not None or key_model is not None else None,
        **({"control": "other domain"} if control else {}),
    }
    with artefact.building(out, "evaluation", plain, inputs) as build:
        if build is None:
            return
        session = _Session(parts, [corpus, *also], build, settings, context, stride, seed, base_evaluation, key_model)
        records = session.records(system, name)
        if control:
            records = [record | {"control": "other domain"} if record["memory"] else record for record in records]
        artefact.write_json(out / "records.json", [record for record in records if record["on"] == corpus.name])
        if also:
            artefact.write_json(out / FORGETTING, [record for record in records if record["on"] != corpus.name])
        # Hashes of all text that the numbers depend on: the scored corpora and the base's training corpus.
        known = {corpus.name: text.facts["sha256"]} | {each: other.facts["sha256"] for each, other in others.items()}
        if "corpus" in source.facts:
            known[Path(source.facts["corpus"]).name] = source.facts["corpus_sha256"]
        build.facts.update(
            methods=[record["method"] for record in records], corpora_sha256=known, device=records[-1]["device"]
        )


def _system(parts: Parts, base_evaluation: Path | None, key_model: Path | None) -> System:
    """The system whose parts are given; the kNN-LM too if the keys are of another model."""
    if bool(parts.datastore) != (parts.index is not None):
        raise ConfigError("memdec evaluate: expected --datastore and --index together, found one of them; give both")
    found = [system for system in SYSTEMS.values() if system.name != "base" and system.given(parts)]
    if len(found) > 1:
        raise ConfigError(
            f"memdec evaluate: expected the parts of one system, found those of {', '.join(s.name for s in found)}; "
            "evaluate each into a folder of its own"
        )
    system = found[0] if found else SYSTEMS["base"]
    if key_model is not None and (system.name != "kNN-LM" or base_evaluation is None):
        raise ConfigError(
            f"memdec evaluate: expected --datastore, --index and --base-evaluation beside --key-model, found the system "
            f"{system.name} {'with' if base_evaluation is not None else 'without'} --base-evaluation; give them, or leave "
            "--key-model out"
        )
    if base_evaluation is not None and system.name != "MemDec" and key_model is None:
        raise ConfigError(
            f"memdec evaluate: expected --memory beside --base-evaluation, found the system {system.name}, which runs the "
            "base itself; leave --base-evaluation out"
        )
    return system


def _own_settings(system: System) -> set[str]:
    """Names of the settings that a system's numbers depend on."""
    own = {
        "MemDec": {"alphas"},
        "kNN-LM": {"lambdas", "temperatures", *SearchSettings.model_fields},
        "In-Context RAG": set(RetrievalSettings.model_fields),
    }
    return {"resamples", *own.get(system.name, ())}


def _of_base(folder: Path, inputs: Mapping[str, str], windowed: Mapping[str, Any]) -> artefact.Manifest:
    """Check that a folder is the evaluation of this base alone, on these texts and with these windows."""
    manifest = artefact.read(folder, "evaluation")
    wanted = {"system": "base", **windowed, **inputs}
    found = {**manifest.settings, **manifest.inputs}
    differ = [each for each, value in wanted.items() if found.get(each) != value]
    if differ:
        raise ArtifactError(
            f"{folder}: expected the evaluation of the base alone on the same texts, found another {', '.join(differ)}; run "
            "memdec evaluate without --memory, with the same --base, --corpus, --also, --context and --stride"
        )
    return manifest


def _knn_settings(settings: EvaluateSettings, weight: float, temperature: float) -> KnnLMSettings:
    numbers = {"neighbours": settings.neighbours, "nprobe": settings.nprobe}
    return KnnLMSettings(weight=weight, temperature=temperature, **numbers)


def _made_of(parts: Parts, system: System, corpus: Path, text: artefact.Manifest, control: bool) -> dict[str, str]:
    """Check that all parts except the base were made from the corpus, and return their recipes.

    With `control` the memory must be one made from another corpus.
    """
    if control and (parts.memory is None or not loading.is_artefact(Path(parts.memory))):
        raise ConfigError(
            f"memdec evaluate: expected with --control a memory that `memdec train` made, found {parts.memory}; give its "
            "folder, or leave out --control"
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
    same = manifest.facts.get("corpus_sha256") == text.facts["sha256"]
    if other and same:
        raise ArtifactError(
            f"{folder}: expected with --control a {kind} of another corpus than {corpus}, found one of this corpus; leave "
            "out --control"
        )
    if not other and not same:
        raise ArtifactError(f"{folder}: expected {kind} made from {corpus}, found one from other text; check the paths")
    return manifest.recipe


class _Session:
    """Scores and records of one system: on the first corpus, and at the same weights on the others."""

    def __init__(
        self,
        parts: Parts,
        corpora: Sequence[Path],
        build: artefact.Build,
        settings: EvaluateSettings,
        context: int,
        stride: int,
        seed: int,
        base_evaluation: Path | None,
        key_model: Path | None,
    ) -> None:
        self.key_model = key_model
        self.parts, self.out, self.work, self.settings = parts, build.path, build.work / "scores", settings
        self.context, self.stride, self.seed, self.base_evaluation = context, stride, seed, base_evaluation
        self.valid: Text = ("valid", corpora[0])
        self.tests: list[Text] = [("test", corpus) for corpus in corpora]
        self.words = tokens.load_tokenizer(str(parts.base))
        self._streams: dict[Text, NDArray[np.int64]] = {}
        # What the memory or the neighbours have scored so far; a killed run goes on from it.
        self.store = ScoreStore(self.work, {"evaluation": build.recipe})

    def records(self, system: System, name: str) -> list[dict[str, Any]]:
        """Records of a system; `name` is that of a memory."""
        if self.key_model is not None:
            return self._neighbours_of_key_model(name)
        if system.name == "MemDec":
            return self._mixed(name)
        return self._knn_lm() if system.name == "kNN-LM" else self._alone(system.name)[1]

    def _alone(self, name: SystemName) -> tuple[dict[Text, TokenScores], list[dict[str, Any]]]:
        """Scores and records of a system without a weight to tune; the base's valid text is for alphas of memories."""
        model = self._model(name, self.parts)
        texts = [self.valid, *self.tests] if name == "base" else self.tests
        found = {text: model.token_scores(self._joined(text)) for text in texts}
        self._lm_eval(model, name)
        return found, self._finished(name, found, 0.0)

    def _mixed(self, name: str) -> list[dict[str, Any]]:
        """Records of base and MemDec; only the memory runs if the base's scores are given."""
        base, records = self._alone("base") if self.base_evaluation is None else self._given_base(self.base_evaluation)
        found = {text: TokenScores(base[text].base, self._of_memory(text)) for text in base}
        sweep = self._sweep(found[self.valid], self.settings.alphas)
        best = weighing.best_weight(sweep)
        self._warn_at_end("alpha", best, sweep)
        if self.base_evaluation is None:
            self._lm_eval(self._model("MemDec", replace(self.parts, alpha=best)), "MemDec", found)
        tuned = {"alpha": best, "memory": name, "valid_sweep": sweep, "valid": sweep[best]}
        return records + [record | tuned for record in self._finished("MemDec", found, best)]

    def _given_base(self, folder: Path) -> tuple[dict[Text, TokenScores], list[dict[str, Any]]]:
        """Scores and records of the base from its own evaluation."""
        base = {text: self._of_base(text) for text in (self.valid, *self.tests)}
        device = artefact.read(folder, "evaluation").facts["device"]
        return base, [record | {"device": device} for record in self._finished("base", base, 0.0)]

    def _neighbours_of_key_model(self, name: str) -> list[dict[str, Any]]:
        """Records of base and p_kNN of another model's keys; lambda and tau as for the kNN-LM."""
        assert self.base_evaluation is not None
        base, records = self._given_base(self.base_evaluation)
        by_text = {
            text: {tau: TokenScores(base[text].base, each.memory) for tau, each in self._of_neighbours(text).items()}
            for text in base
        }
        found, tuned = self._tuned(by_text)
        mixed = self._finished("MemDec", found, tuned["lambda"])
        return records + [record | tuned | {"memory": name} for record in mixed]

    def _knn_lm(self) -> list[dict[str, Any]]:
        """Records of the kNN-LM; lambda and tau are the candidates with the lowest valid perplexity."""
        by_text = {text: self._of_neighbours(text) for text in (self.valid, *self.tests)}
        found, tuned = self._tuned(by_text)
        chosen = replace(self.parts, knn_lm=_knn_settings(self.settings, tuned["lambda"], tuned["temperature"]))
        self._lm_eval(self._model("kNN-LM", chosen), "kNN-LM", found)
        return [record | tuned for record in self._finished("kNN-LM", found, tuned["lambda"])]

    def _tuned(
        self, by_text: Mapping[Text, Mapping[float, TokenScores]]
    ) -> tuple[dict[Text, TokenScores], dict[str, Any]]:
        """Scores of each text at the tau that is best on valid with its best lambda, and what was chosen."""
        sweeps = {tau: self._sweep(found, self.settings.lambdas) for tau, found in by_text[self.valid].items()}
        tau = min(sweeps, key=lambda each: min(sweeps[each].values()))
        best = weighing.best_weight(sweeps[tau])
        self._warn_at_end("lambda", best, sweeps[tau])
        self._warn_at_end("temperature", tau, sweeps, (0.0, math.inf))
        found = {text: at_each[tau] for text, at_each in by_text.items()}
        return found, {"lambda": best, "temperature": tau, "valid_sweep": sweeps[tau], "valid": sweeps[tau][best]}

    def _sweep(self, valid: TokenScores, candidates: Sequence[float]) -> dict[float, float]:
        """Perplexity on the valid text for every weight of the second distribution."""
        assert valid.memory is not None
        return weighing.perplexities(valid.base, valid.memory, candidates)

    def _warn_at_end(
        self, name: str, chosen: float, candidates: Iterable[float], limits: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        """Say so if a weight that was tuned on the valid text is the end of its grid."""
        where = f"{self.parts.base} on {self.valid[1].name}: {name}"
        warning = weighing.at_end(where, chosen, candidates, limits)
        if warning is not None:
            log.warning("warning: %s", warning)

    # --- scores -----------------------------------------------------------------------------------------------------

    def _of_base(self, text: Text) -> TokenScores:
        """The base's scores from its own evaluation."""
        assert self.base_evaluation is not None
        found, _ = scores.token_scores(self.base_evaluation, text[0], self._on(text))
        if len(found.base) != len(self._stream(text)):
            raise ArtifactError(
                f"{self.base_evaluation}: expected scores of {len(self._stream(text))} tokens of {text[1]}, found "
                f"{len(found.base)}; run the base's evaluation again"
            )
        return found

    def _of_memory(self, text: Text) -> NDArray[np.float64]:
        """log-probabilities of the tokens under the memory."""
        key = self._key("memory", text)
        found = self.store.get(key)
        if found is None:
            self._memory.check_labels(self._stream(text))
            found = score_stream(self._memory, *self._windows(text), which="base", batch_size=self.settings.batch_size)
            self.store.put(key, found)
            self.store.flush()
        return found.base

    @cached_property
    def _memory(self) -> Any:
        """The memory alone. As in the mixture, its probabilities are those over the vocabulary of the base."""
        model = SYSTEMS["base"].build(replace(self.parts, base=str(self.parts.memory), tokenizer=self.words))
        model.n_vocab = loading.n_rows(self.parts.base)
        return model

    def _of_neighbours(self, text: Text) -> dict[float, TokenScores]:
        """Scores of base and p_kNN at each temperature, from one pass of the base and one search."""
        keys = {tau: self._key(f"p_kNN at {tau}", text) for tau in self.settings.temperatures}
        if any(self.store.get(key) is None for key in keys.values()):
            self._neighbours.check_labels(self._stream(text))
            log_probs = partial(self._neighbours.log_probs_at, self.settings.temperatures)
            base, *found = score_streams(log_probs, *self._windows(text), batch_size=self.settings.batch_size).values()
            for key, p_knn in zip(keys.values(), found, strict=True):
                self.store.put(key, TokenScores(base, p_knn))
            self.store.flush()
        return {tau: known for tau, key in keys.items() if (known := self.store.get(key)) is not None}

    @cached_property
    def _neighbours(self) -> Any:
        parts = self.parts if self.key_model is None else replace(self.parts, base=self.key_model, tokenizer=self.words)
        return SYSTEMS["kNN-LM"].build(parts)

    def _windows(self, text: Text) -> tuple[NDArray[np.int64], list[Window], int]:
        """The token stream of a text, windows over it, and the token in front."""
        stream = self._stream(text)
        return stream, windows(len(stream), self.context, self.stride), tokens.prefix_id(self.words)

    def _stream(self, text: Text) -> NDArray[np.int64]:
        if text not in self._streams:
            ids = self.words.encode(self._joined(text), add_special_tokens=False, verbose=False)
            self._streams[text] = np.asarray(ids, dtype=np.int64)
        return self._streams[text]

    def _joined(self, text: Text) -> str:
        split, corpus = text
        return corpora.joined_split(corpus, split, self.words.eos_token)

    def _key(self, name: str, text: Text) -> bytes:
        return request_key(name, self._stream(text), [self.context, self.stride])

    # --- lm-eval ----------------------------------------------------------------------------------------------------

    def _model(self, name: SystemName, parts: Parts) -> "WrappedLM":
        from memdec.harness.baselines import of_system  # imports lm-eval, which takes a second

        return of_system(
            name,
            parts,
            context=self.context,
            stride=self.stride,
            scores=str(self.work),
            batch_size=self.settings.batch_size,
        )

    def _lm_eval(self, model: "WrappedLM", method: str, found: Mapping[Text, TokenScores] | None = None) -> None:
        """Let lm-eval measure the test texts, and keep what it returns; `found` are scores that were computed here."""
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        for text in self.tests:
            if found is not None:
                model.keep(self._stream(text), found[text])
            metadata = {"corpus": str(text[1]), "split": text[0], "pretrained": str(self.parts.base)}
            manager = TaskManager(include_path=str(HARNESS_TASKS), include_defaults=False, metadata=metadata)
            results = simple_evaluate(
                model=model, tasks=[TASK], task_manager=manager, bootstrap_iters=0, log_samples=False
            )
            on = self._on(text)
            name = f"results_{method}_test" + ("" if on is None else f"_{on}")
            artefact.write_json(self.out / f"{name}.json", json.loads(json.dumps(results, default=str)))

    # --- records ----------------------------------------------------------------------------------------------------

    def _on(self, text: Text) -> str | None:
        """Name of a general corpus; None is the corpus that is evaluated."""
        return None if text[1] == self.valid[1] else text[1].name

    def _finished(self, method: str, found: Mapping[Text, TokenScores], weight: float) -> list[dict[str, Any]]:
        """Write the scores, and make one record for the test text of each corpus, at one weight."""
        for text, each in found.items():
            scores.write(self.out, each, text[0], self._on(text))
        return [self._record(method, found[text].log_p(weight)) | {"on": text[1].name} for text in self.tests]

    @cached_property
    def _rate(self) -> float | None:
        """The learning rate of the part that was trained, if it was tuned."""
        part = self.parts.memory or self.parts.lora or self.parts.dapt
        kind = artefact.kind_of(Path(part)) if part is not None else None
        return None if kind is None else artefact.read(Path(str(part)), kind).facts.get("learning_rate")

    def _record(self, method: str, log_p: NDArray[np.float64]) -> dict[str, Any]:
        low, high = statistics.bootstrap_perplexity(log_p, self.stride, self.settings.resamples, self.seed)
        return {
            "method": method,
            "memory": None,
            "metric": "token_perplexity",
            "value": statistics.perplexity(log_p),
            "low": low,
            "high": high,
            "n": len(log_p),
            "alpha": None,
            "lambda": None,
            "temperature": None,
            "learning_rate": self._rate if method not in ("base", "kNN-LM", "In-Context RAG") else None,
            "seed": self.seed,
            "device": devices.described(torch.device(self.parts.device)),
            "precision": self.parts.dtype,
        }
