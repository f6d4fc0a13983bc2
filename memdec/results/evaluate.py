"""Stage `evaluate`: measure the perplexity of the systems around one base model on one corpus, through lm-eval.

With a memory, base and memory score the valid and the test text once, and the per-token scores are stored. Alpha is the
candidate with the lowest valid perplexity. The test perplexities at that alpha, and at alpha 0 for the base, are
lm-eval runs of `memdec-interp` that read the stored scores. Without a memory, the base alone is measured. LoRA, DAPT,
the kNN-LM and In-Context RAG are added if their folders are given; lambda and tau of the kNN-LM are those with the
lowest valid perplexity.

Output: `results_<method>_<split>.json` as lm-eval returns them, `scores/`, `records.json`, and `forgetting.json` if
general corpora are given.
"""

import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from numpy.typing import NDArray

from memdec import HARNESS_TASKS
from memdec.artefacts import artefact, devices
from memdec.errors import ArtifactError, ConfigError
from memdec.harness.base_lm import WrappedLM
from memdec.harness.baselines import of_system
from memdec.harness.scores import TokenScores
from memdec.inference.systems import SYSTEMS, Parts
from memdec.maths import mixing, statistics
from memdec.models import loading
from memdec.settings import (
    AUTO,
    DEFAULT_MEMORY,
    FORGETTING,
    Compute,
    EvaluateSettings,
    KnnLMSettings,
    RetrievalSettings,
    Split,
    SystemName,
)
from memdec.text import corpora

log = logging.getLogger(__name__)
TASK = "memdec_ppl"
_TUNED_ON: tuple[Split, Split] = ("valid", "test")


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
    passages: Path | None = None,
    also: Sequence[Path] = (),
    compute: Compute = AUTO,
) -> None:
    """Evaluate one base model on one corpus.

    Args:
        base: Model folder.
        corpus: Corpus folder; its valid text tunes the weights, its test text is measured.
        out: Output folder.
        settings: Candidates for the weights, and so on.
        context: Longest input of a model, in tokens.
        stride: Tokens scored per window.
        seed: Seed of the run; it is written into the records.
        memory: Memory folder, or a model after DAPT in its place; adds the system MemDec.
        name: Name of the memory in the records.
        control: Negative control: the memory is one of another corpus. Without this, such a memory is refused.
        lora: LoRA folder of the base; adds the system LoRA.
        dapt: The base after DAPT; adds the system DAPT.
        datastore: Shards of a datastore made with the base; with `index` they add the system kNN-LM.
        index: Index over the datastore.
        passages: Passages of the corpus's training text; they add the system In-Context RAG.
        also: General corpora; their test text is measured too, with the weights tuned on `corpus`.
        compute: Device, and number type of the models' weights.
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
    source = loading.known(base, "model")
    inputs = {"base": source.recipe, "corpus": text.recipe}
    others = {folder.name: artefact.read(folder, "corpus") for folder in also}
    inputs |= {f"also {name}": manifest.recipe for name, manifest in others.items()}
    inputs |= _made_of(parts, corpus, text, control)
    plain = {
        **settings.model_dump(mode="json", exclude={"batch_size"}),
        "context": context,
        "stride": stride,
        "seed": seed,
        "memory": name if memory is not None else None,
        "precision": devices.precision(compute),
        **({"control": "other domain"} if control else {}),
    }
    with artefact.building(out, "evaluation", plain, inputs) as build:
        if build is None:
            return
        session = _Session(parts, [corpus, *also], out, settings, context, stride, seed)
        records = session.interpolated(name) if memory is not None else session.alone("base")
        if control:
            records = [record | {"control": "other domain"} if record["memory"] else record for record in records]
        for system in SYSTEMS.values():
            if system.name not in ("base", "MemDec") and system.given(parts):
                records += session.knn_lm() if system.name == "kNN-LM" else session.alone(system.name)
        artefact.write_json(out / "records.json", [record for record in records if record["on"] == corpus.name])
        if also:
            artefact.write_json(out / FORGETTING, [record for record in records if record["on"] != corpus.name])
        # Hashes of all text that the numbers depend on: the scored corpora and the base's training corpus.
        known = {corpus.name: text.facts["sha256"]} | {name: other.facts["sha256"] for name, other in others.items()}
        if "corpus" in source.facts:
            known[Path(source.facts["corpus"]).name] = source.facts["corpus_sha256"]
        build.facts.update(methods=[record["method"] for record in records], corpora_sha256=known)


def _knn_settings(settings: EvaluateSettings, weight: float, temperature: float) -> KnnLMSettings:
    numbers = {"neighbours": settings.neighbours, "nprobe": settings.nprobe}
    return KnnLMSettings(weight=weight, temperature=temperature, **numbers)


def _made_of(parts: Parts, corpus: Path, text: artefact.Manifest, control: bool) -> dict[str, str]:
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
    if bool(parts.datastore) != (parts.index is not None):
        raise ConfigError("memdec evaluate: expected --datastore and --index together, found one of them; give both")
    if parts.index is not None:
        for shard in parts.datastore:
            _trained_on(shard, "datastore", corpus, text)
        found["index"] = artefact.read(parts.index, "index").recipe
    for system in SYSTEMS.values():
        if system.given(parts):
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
    """lm-eval runs of the systems around one base: on the first corpus, and at the same weights on the others."""

    def __init__(
        self,
        parts: Parts,
        corpora: Sequence[Path],
        out: Path,
        settings: EvaluateSettings,
        context: int,
        stride: int,
        seed: int,
    ) -> None:
        self.parts, self.corpora, self.out, self.settings = parts, corpora, out, settings
        self.context, self.stride, self.seed = context, stride, seed

    def interpolated(self, name: str) -> list[dict[str, Any]]:
        """Records of the base and of base + memory; both models read valid and test once."""
        model = self._model("MemDec", self.parts)
        self._lm_eval(model, "MemDec", "valid", self.corpora[0])
        valid = self._valid(model, self.settings.alphas)
        best = mixing.best_weight(valid)
        self._warn_at_end("alpha", best, valid)
        tuned = {"alpha": best, "memory": name, "valid_sweep": valid, "valid": valid[best]}
        model.set_weight(0.0)
        records = self._tested(model, "base", 0.0)
        model.set_weight(best)
        return records + [record | tuned for record in self._tested(model, "MemDec", best)]

    def alone(self, name: SystemName) -> list[dict[str, Any]]:
        """Records of a system without a weight to tune."""
        return self._tested(self._model(name, self.parts), name, 0.0)

    def knn_lm(self) -> list[dict[str, Any]]:
        """Records of the kNN-LM; lambda and tau are the candidates with the lowest valid perplexity."""
        sweeps = {}
        for tau in self.settings.temperatures:
            sweeps[tau] = self._valid(self._knn(tau, self.settings.lambdas[0]), self.settings.lambdas)
        tau = min(sweeps, key=lambda each: min(sweeps[each].values()))
        best = mixing.best_weight(sweeps[tau])
        self._warn_at_end("lambda", best, sweeps[tau])
        self._warn_at_end("temperature", tau, sweeps, (0.0, math.inf))
        tuned = {"lambda": best, "temperature": tau, "valid_sweep": sweeps[tau], "valid": sweeps[tau][best]}
        return [record | tuned for record in self._tested(self._knn(tau, best), "kNN-LM", best)]

    def _warn_at_end(
        self, name: str, chosen: float, candidates: Iterable[float], limits: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        """Say so if a weight that was tuned on the valid text is the end of its grid."""
        warning = mixing.at_end(f"{self.parts.base} on {self.corpora[0].name}: {name}", chosen, candidates, limits)
        if warning is not None:
            log.warning("warning: %s", warning)

    def _knn(self, temperature: float, weight: float) -> WrappedLM:
        settings = _knn_settings(self.settings, weight, temperature)
        return self._model("kNN-LM", replace(self.parts, knn_lm=settings))

    def _model(self, name: SystemName, parts: Parts) -> WrappedLM:
        return of_system(
            name,
            parts,
            context=self.context,
            stride=self.stride,
            scores=str(self.out / "scores"),
            batch_size=self.settings.batch_size,
        )

    def _valid(self, model: WrappedLM, weights: Sequence[float]) -> dict[float, float]:
        """Perplexity on the valid text for every weight of the second distribution."""
        valid = self._scores(model, "valid", self.corpora[0])
        assert valid.memory is not None
        return mixing.perplexities(valid.base, valid.memory, weights)

    def _tested(self, model: WrappedLM, method: str, weight: float) -> list[dict[str, Any]]:
        """One record for the test text of each corpus, at one weight of the second distribution."""
        records = []
        for corpus in self.corpora:
            results, scores = self._lm_eval(model, method, "test", corpus), self._scores(model, "test", corpus)
            records.append(self._record(method, results, scores.log_p(weight)) | {"on": corpus.name})
        return records

    def _lm_eval(self, model: WrappedLM, method: str, split: Split, corpus: Path) -> dict[str, Any]:
        metadata = {"corpus": str(corpus), "split": split, "pretrained": str(self.parts.base)}
        manager = TaskManager(include_path=str(HARNESS_TASKS), include_defaults=False, metadata=metadata)
        results = simple_evaluate(model=model, tasks=[TASK], task_manager=manager, bootstrap_iters=0, log_samples=False)
        assert results is not None
        name = f"results_{method}_{split}" + (f"_{corpus.name}" if corpus != self.corpora[0] else "")
        artefact.write_json(self.out / f"{name}.json", json.loads(json.dumps(results, default=str)))
        values: dict[str, Any] = results["results"][TASK]
        return values

    def _scores(self, model: WrappedLM, split: Split, corpus: Path) -> TokenScores:
        return model.token_scores(corpora.joined_split(corpus, split, model.tokenizer.eos_token), disable_tqdm=True)

    def _record(self, method: str, results: dict[str, Any], log_p: NDArray[np.floating]) -> dict[str, Any]:
        low, high = statistics.bootstrap_perplexity(log_p, self.stride, self.settings.resamples, self.seed)
        return {
            "method": method,
            "memory": None,
            "metric": "token_perplexity",
            "value": results["token_perplexity,none"],
            "low": low,
            "high": high,
            "n": int(results["tokens,none"]),
            "alpha": None,
            "lambda": None,
            "seed": self.seed,
            "device": devices.described(torch.device(self.parts.device)),
            "precision": self.parts.dtype,
        }
