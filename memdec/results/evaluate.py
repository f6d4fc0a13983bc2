"""Stage `evaluate`: measure the perplexity of one system around one base model on one corpus.

The system is the one whose parts are given: a memory, a LoRA adapter, a DAPT model, a datastore with its index, or
passages; without any, it is the base alone. Every model reads a text once, and the scores of its tokens are stored
(`memdec.results.scores`). Weights are arithmetic on these scores: alpha of a memory, and lambda and tau of the kNN-LM,
are the candidates with the lowest perplexity on the valid text. The test text is measured with them.

lm-eval runs the system, too: `results_<method>_test.json` is what it returned, and its perplexity is that of the record.
Many memories beside many bases need not run together: `memdec score` and `memdec mix` (docs/evaluate.md).

Output: `scores/`, `records.json`, and `forgetting.json` if general corpora are given. A memory's evaluation has the
base's record too.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from memdec import HARNESS_TASKS
from memdec.artefacts import artefact, devices
from memdec.errors import ConfigError
from memdec.harness.scores import ScoreStore, TokenScores
from memdec.inference.systems import SYSTEMS, Parts, System
from memdec.models import loading
from memdec.results import scores
from memdec.results.records import Records, Text, write
from memdec.results.score import (
    Scorer,
    Texts,
    also_inputs,
    check_names,
    knn_lm_settings,
    made_of,
    reached_size,
    tuned_rate,
)
from memdec.settings import AUTO, DEFAULT_MEMORY, Compute, EvaluateSettings, RetrievalSettings, SystemName, of_system
from memdec.text import tokens

if TYPE_CHECKING:
    from memdec.harness.base_lm import WrappedLM

TASK = "memdec_ppl"


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
        passages: Passages of the corpus's training text: the system In-Context RAG.
        also: General corpora; their test text is measured too, with the weights tuned on `corpus`.
        compute: Device, and number type of the models' weights.

    Raises:
        ArtifactError: A part was made from another text or base.
        ConfigError: The parts are those of several systems, or only some of one; or two corpora have the same name.
    """
    check_names("evaluate", corpus, also)
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
        knn_lm=knn_lm_settings(settings, settings.lambdas[0]),
        retrieval=RetrievalSettings(query=settings.query, every=settings.every),
        dtype=devices.precision(compute),
        device=str(devices.pick(compute, spread=True)),
        spread=compute.device == "all",
    )
    system = _system(parts)
    source = loading.known(base, "model")
    inputs = {"base": source.recipe, "corpus": text.recipe, **also_inputs(also)}
    inputs |= made_of(parts, system, corpus, text, control)
    if memory is not None:
        limit = loading.n_positions(loading.config(memory))
        loading.check_positions(limit, context, "context", "lower it")
    plain = {
        **settings.model_dump(mode="json", include=of_system(system.name)),
        "context": context,
        "stride": stride,
        "precision": devices.precision(compute),
        "seed": seed,
        "system": system.name,
        "memory": name if memory is not None else None,
        **({"control": "other domain"} if control else {}),
    }
    with artefact.building(out, "evaluation", plain, inputs) as build:
        if build is None:
            return
        texts = Texts([corpus, *also], tokens.load_tokenizer(str(base)), context, stride)
        session = _Session(parts, texts, build, settings, seed)
        records = session.records(system.name, name)
        if control:
            records = [record | {"control": "other domain"} if record["memory"] else record for record in records]
        write(out, corpus.name, records)
        # Hashes of all text that the numbers depend on: the scored corpora and the base's training corpus.
        known = texts.sha256
        if "corpus" in source.facts:
            known[Path(source.facts["corpus"]).name] = source.facts["corpus_sha256"]
        build.facts.update(
            texts.facts,
            rows=loading.n_rows(base),
            methods=[record["method"] for record in records],
            corpora_sha256=known,
            device=records[-1]["device"],
        )


def _system(parts: Parts) -> System:
    """The system whose parts are given."""
    if bool(parts.datastore) != (parts.index is not None):
        raise ConfigError("memdec evaluate: expected --datastore and --index together, found one of them; give both")
    found = [system for system in SYSTEMS.values() if system.name != "base" and system.given(parts)]
    if len(found) > 1:
        raise ConfigError(
            f"memdec evaluate: expected the parts of one system, found those of {', '.join(s.name for s in found)}; "
            "evaluate each into a folder of its own"
        )
    return found[0] if found else SYSTEMS["base"]


class _Session:
    """Scores and records of one system: on the first corpus, and at the same weights on the others."""

    def __init__(
        self, parts: Parts, texts: Texts, build: artefact.Build, settings: EvaluateSettings, seed: int
    ) -> None:
        self.parts, self.texts, self.out, self.settings = parts, texts, build.path, settings
        self.work, self.recipe, self.seed = build.work / "scores", build.recipe, seed

    def records(self, system: SystemName, name: str) -> list[dict[str, Any]]:
        """Records of a system; `name` is that of a memory."""
        if system == "MemDec":
            return self._mixed(name)
        return self._knn_lm() if system == "kNN-LM" else self._records(system).alone(system, self._alone(system))

    def _records(self, system: SystemName) -> Records:
        part = {"MemDec": self.parts.memory, "LoRA": self.parts.lora, "DAPT": self.parts.dapt}.get(system)
        return Records(
            self.out,
            str(self.parts.base),
            self.texts.folders[None].name,
            self.settings,
            self.texts.stride,
            self.seed,
            devices.described(torch.device(self.parts.device)),
            self.parts.dtype,
            None if part is None else tuned_rate(Path(part)),
            None if self.parts.lora is None else reached_size(Path(self.parts.lora)),
        )

    def _alone(self, system: SystemName) -> dict[Text, TokenScores]:
        """Scores of a system without a weight to tune; the base's valid text is for alphas of memories."""
        model = self._model(system, self.parts)
        texts = self.texts.all if system == "base" else self.texts.tests
        found = {text: model.token_scores(self.texts.joined(text)) for text in texts}
        self._lm_eval(model, system)
        return found

    def _mixed(self, name: str) -> list[dict[str, Any]]:
        """Records of base and MemDec."""
        base, scorer = self._alone("base"), self._scorer(replace(self.parts, base=str(self.parts.memory)))
        found = {text: TokenScores(each.base, scorer.of_memory(text)) for text, each in base.items()}
        alone = self._records("base").alone("base", base)
        mixed = self._records("MemDec").mixed(name, found)
        self._lm_eval(self._model("MemDec", replace(self.parts, alpha=mixed[0]["alpha"])), "MemDec", found)
        return alone + mixed

    def _knn_lm(self) -> list[dict[str, Any]]:
        """Records of the kNN-LM."""
        scorer = self._scorer(self.parts)
        by_text = {text: scorer.of_neighbours(text) for text in self.texts.all}
        records = self._records("kNN-LM").with_neighbours(by_text)
        tau, weight = records[0]["temperature"], records[0]["lambda"]
        chosen = replace(self.parts, knn_lm=knn_lm_settings(self.settings, weight, tau))
        found = {text: by_tau[tau] for text, by_tau in by_text.items()}
        self._lm_eval(self._model("kNN-LM", chosen), "kNN-LM", found)
        return records

    def _scorer(self, parts: Parts) -> Scorer:
        """As in the mixture, a memory's probabilities are those over the vocabulary of the base."""
        store = ScoreStore(self.work, {"evaluation": self.recipe})
        return Scorer(self.texts, parts, self.settings, store, loading.n_rows(self.parts.base))

    def _model(self, name: SystemName, parts: Parts) -> "WrappedLM":
        from memdec.harness.baselines import of_system  # imports lm-eval, which takes a second

        return of_system(
            name,
            parts,
            context=self.texts.context,
            stride=self.texts.stride,
            scores=str(self.work),
            batch_size=self.settings.batch_size,
        )

    def _lm_eval(self, model: "WrappedLM", method: str, found: Mapping[Text, TokenScores] | None = None) -> None:
        """Let lm-eval measure the test texts, and keep what it returns; `found` are scores that were computed here."""
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        for text in self.texts.tests:
            if found is not None:
                model.keep(self.texts.stream(text), found[text])
            metadata = {
                "corpus": str(self.texts.folders[text[1]]),
                "split": text[0],
                "pretrained": str(self.parts.base),
            }
            manager = TaskManager(include_path=str(HARNESS_TASKS), include_defaults=False, metadata=metadata)
            results = simple_evaluate(
                model=model, tasks=[TASK], task_manager=manager, bootstrap_iters=0, log_samples=False
            )
            file = f"results_{method}_{scores.name(*text)}.json"
            artefact.write_json(self.out / file, json.loads(json.dumps(results, default=str)))
