"""Stage `evaluate`: perplexity of one base model on one corpus, alone and with what is compared, through lm-eval.

With a memory: base and memory score the valid and the test text once; the per-token scores are stored. Alpha is the
candidate with the lowest valid perplexity; the test perplexity at that alpha, and at alpha 0 for the base, are lm-eval
runs of `memdec-interp` that read the stored scores. Without one: the base alone and, where they are given, its LoRA, its
DAPT, the kNN-LM with the base's own keys (lambda and tau with the lowest valid perplexity) and In-Context RAG. Output:
`results_<method>_<split>.json` as lm-eval returns them, `scores/`, `records.json`, and with general corpora beside the
domain `forgetting.json`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdec.artefacts import artefact, devices
from memdec.errors import ArtifactError, ConfigError
from memdec.harness.scores import TokenScores
from memdec.maths import mixing, statistics
from memdec.settings import AUTO, DEFAULT_MEMORY, FORGETTING, Compute, EvaluateSettings, Split

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
        out: Folder to make.
        settings: Candidates for the weights, and so on.
        context: Tokens a model sees at most.
        stride: Tokens scored per window.
        seed: Of the run, written into the records.
        memory: Memory folder, or a model after DAPT to mix in; gives the methods base and MemDec.
        name: What the memory is called in the records.
        lora: LoRA folder of the base; gives the method LoRA.
        dapt: The base after DAPT; gives the method DAPT.
        datastore: Shards of the base's own keys; with `index` they give the method kNN-LM.
        index: Index over them.
        passages: Passages of the corpus's training text; give the method In-Context RAG.
        also: General corpora; everything is measured on their test text, too, at the weights tuned on `corpus`.
        compute: Device, and the type of the models' weights.
    """
    text = artefact.read(corpus, "corpus")
    inputs = {"base": artefact.read(base, "model").recipe, "corpus": text.recipe}
    others = {folder.name: artefact.read(folder, "corpus") for folder in also}
    inputs |= {f"also {name}": manifest.recipe for name, manifest in others.items()}
    memory_kind = "model" if memory is not None and artefact.kind_of(memory) == "model" else "memory"
    for label, folder, kind in (("memory", memory, memory_kind), ("lora", lora, "lora"), ("dapt", dapt, "model")):
        if folder is not None:
            inputs[label] = _trained_on(folder, kind, corpus, text)
    if bool(datastore) != (index is not None):
        raise ConfigError("memdec evaluate: expected --datastore and --index together, found one of them; give both")
    if index is not None:
        for shard in datastore:
            _trained_on(shard, "datastore", corpus, text)
        inputs["index"] = artefact.read(index, "index").recipe
    if passages is not None:
        inputs["passages"] = _trained_on(passages, "passages", corpus, text)
    plain = {
        **settings.model_dump(mode="json", exclude={"batch_size"}),
        "context": context,
        "stride": stride,
        "seed": seed,
        "memory": name if memory is not None else None,
        "precision": devices.precision(compute),
    }
    with artefact.building(out, "evaluation", plain, inputs) as build:
        if build is None:
            return
        session = _Session(base, [corpus, *also], out, settings, context, stride, seed, compute)
        records = session.single("base") if memory is None else session.interpolated(memory, name)
        if lora is not None:
            records += session.single("LoRA", peft=str(lora))
        if dapt is not None:
            records += session.single("DAPT", pretrained=str(dapt))
        if index is not None:
            records += session.knn_lm(datastore, index)
        if passages is not None:
            records += session.in_context_rag(passages)
        artefact.write_json(out / "records.json", [record for record in records if record["on"] == corpus.name])
        if also:
            artefact.write_json(out / FORGETTING, [record for record in records if record["on"] != corpus.name])
        # All text the numbers depend on: what is scored, and what the base was trained on.
        known = {corpus.name: text.facts["sha256"]} | {name: other.facts["sha256"] for name, other in others.items()}
        lineage = artefact.read(base, "model").facts
        if "corpus" in lineage:
            known[Path(lineage["corpus"]).name] = lineage["corpus_sha256"]
        build.facts.update(methods=[record["method"] for record in records], corpora_sha256=known)


def _trained_on(folder: Path, kind: str, corpus: Path, text: artefact.Manifest) -> str:
    """Recipe of something that was trained on the corpus."""
    manifest = artefact.read(folder, kind)
    if manifest.facts.get("corpus_sha256") != text.facts["sha256"]:
        raise ArtifactError(f"{folder}: expected {kind} made from {corpus}, found one from other text; check the paths")
    return manifest.recipe


class _Session:
    """lm-eval runs of one base model on one corpus (the first), and on general ones at the weights tuned on it."""

    def __init__(
        self,
        base: Path,
        corpora: Sequence[Path],
        out: Path,
        settings: EvaluateSettings,
        context: int,
        stride: int,
        seed: int,
        compute: Compute,
    ) -> None:
        self.base, self.corpora, self.out, self.settings, self.compute = base, corpora, out, settings, compute
        self.context, self.stride, self.seed = context, stride, seed

    def interpolated(self, memory: Path, name: str) -> list[dict[str, Any]]:
        """Records of the base and of base + memory, from one pass of both models over valid and test."""
        model = self._model(memory=str(memory), alpha=self.settings.alphas[0])
        self._lm_eval(model, "MemDec", "valid", self.corpora[0])
        valid = self._scores(model, "valid", self.corpora[0])
        assert valid.memory is not None
        sweep = _sweep(valid.base, valid.memory, self.settings.alphas)
        best = min(sweep, key=sweep.__getitem__)
        tuned = {"alpha": best, "memory": name, "valid_sweep": sweep, "valid": sweep[best]}
        model.set_alpha(0.0)
        records = self._tested(model, "base", 0.0)
        model.set_alpha(best)
        return records + [record | tuned for record in self._tested(model, "MemDec", best)]

    def single(self, method: str, **model_args: str) -> list[dict[str, Any]]:
        """Records of one model alone, without a memory."""
        return self._tested(self._model(alpha=0.0, **model_args), method, 0.0)

    def knn_lm(self, datastore: Sequence[Path], index: Path) -> list[dict[str, Any]]:
        """Records of the base mixed with p_kNN; lambda and tau are the best candidates on valid."""
        from memdec.harness.baselines import MemDecKnnLM

        sweeps: dict[float, dict[float, float]] = {}
        for temperature in self.settings.temperatures:
            model = self._knn(MemDecKnnLM, datastore, index, temperature)
            valid = self._scores(model, "valid", self.corpora[0])
            assert valid.memory is not None
            sweeps[temperature] = _sweep(valid.base, valid.memory, self.settings.lambdas)
        tau = min(sweeps, key=lambda each: min(sweeps[each].values()))
        best = min(sweeps[tau], key=sweeps[tau].__getitem__)
        model = self._knn(MemDecKnnLM, datastore, index, tau)
        model.set_alpha(best)
        tuned = {"alpha": best, "temperature": tau, "valid_sweep": sweeps[tau], "valid": sweeps[tau][best]}
        return [record | tuned for record in self._tested(model, "kNN-LM", best)]

    def _knn(self, kind: Any, datastore: Sequence[Path], index: Path, temperature: float) -> Any:
        folders = "+".join(str(folder) for folder in datastore)
        numbers = {"neighbours": self.settings.neighbours, "nprobe": self.settings.nprobe, "temperature": temperature}
        return self._model(kind, datastore=folders, index=str(index), **numbers)

    def in_context_rag(self, passages: Path) -> list[dict[str, Any]]:
        """Records of the base with retrieved passages before the text."""
        from memdec.harness.baselines import MemDecIcRag

        numbers = {"query": self.settings.query, "every": self.settings.every}
        model = self._model(MemDecIcRag, passages=str(passages), **numbers)
        return self._tested(model, "In-Context RAG", 0.0)

    def _model(self, kind: Any = None, **kwargs: Any) -> Any:
        from memdec.harness.models import MemDecInterp

        return (kind or MemDecInterp)(
            **{"pretrained": str(self.base), **kwargs},
            context=self.context,
            stride=self.stride,
            scores=str(self.out / "scores"),
            batch_size=self.settings.batch_size,
            dtype=devices.precision(self.compute),
            device=str(devices.pick(self.compute)),
        )

    def _tested(self, model: Any, method: str, weight: float) -> list[dict[str, Any]]:
        """Record of the test text of every corpus, at one weight of the second distribution."""
        records = []
        for corpus in self.corpora:
            results, scores = self._lm_eval(model, method, "test", corpus), self._scores(model, "test", corpus)
            records.append(self._record(method, results, scores.log_p(weight)) | {"on": corpus.name})
        return records

    def _lm_eval(self, model: Any, method: str, split: Split, corpus: Path) -> dict[str, Any]:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from memdec import HARNESS_TASKS

        metadata = {"corpus": str(corpus), "split": split, "pretrained": str(self.base)}
        manager = TaskManager(include_path=str(HARNESS_TASKS), include_defaults=False, metadata=metadata)
        results = simple_evaluate(model=model, tasks=[TASK], task_manager=manager, bootstrap_iters=0, log_samples=False)
        assert results is not None
        name = f"results_{method}_{split}" + (f"_{corpus.name}" if corpus != self.corpora[0] else "")
        artefact.write_json(self.out / f"{name}.json", json.loads(json.dumps(results, default=str)))
        values: dict[str, Any] = results["results"][TASK]
        return values

    def _text(self, model: Any, split: Split, corpus: Path) -> str:
        from memdec.text import corpora

        separator = artefact.read(corpus, "corpus").facts["separator"]
        return corpora.joined(corpora.load(corpus, split), separator, model.tokenizer.eos_token)

    def _scores(self, model: Any, split: Split, corpus: Path) -> TokenScores:
        stored: TokenScores = model.token_scores(self._text(model, split, corpus), disable_tqdm=True)
        return stored

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
            "seed": self.seed,
            "device": devices.name(self.compute),
            "precision": devices.precision(self.compute),
        }


def _sweep(
    log_p_base: NDArray[np.floating], log_p_other: NDArray[np.floating], weights: list[float]
) -> dict[float, float]:
    """Perplexity at every weight."""
    return {weight: statistics.perplexity(mixing.mix_scores(log_p_base, log_p_other, weight)) for weight in weights}
