"""Stage `evaluate`: perplexity of one base model, with and without a memory, out of lm-eval runs of `memdec-interp`.

Base and memory score the valid and the test text once; the per-token scores are stored. Alpha is the candidate with the
lowest valid perplexity; the test perplexity at that alpha, and at alpha 0 for the base, are lm-eval runs that read the
stored scores. Output: `results_<method>_<split>.json` as lm-eval returns them, `scores/`, `records.json`.
"""

import json
from pathlib import Path
from typing import Any

import torch

from memdec import artifacts, metrics, mixing
from memdec.config import EvaluateSettings
from memdec.errors import ArtifactError
from memdec.scores import TokenScores

TASK = "memdec_ppl"


def run(
    base: Path,
    corpus: Path,
    out: Path,
    settings: EvaluateSettings,
    *,
    memory: Path | None,
    lora: Path | None,
    context: int,
    stride: int,
    seed: int,
) -> None:
    """Evaluate one base model on one corpus as methods base, MemDec (with a memory) and LoRA (with an adapter)."""
    text = artifacts.read(corpus, "corpus")
    inputs = {"base": artifacts.read(base, "model").recipe, "corpus": text.recipe}
    for name, folder, kind in (("memory", memory, "memory"), ("lora", lora, "lora")):
        if folder is not None:
            manifest = artifacts.read(folder, kind)
            inputs[name] = manifest.recipe
            if manifest.facts["corpus_sha256"] != text.facts["sha256"]:
                raise ArtifactError(
                    f"{folder}: expected a {kind} trained on {corpus}, found one trained on other text; check the paths"
                )
    plain = {
        **settings.model_dump(mode="json", exclude={"batch_size"}),
        "context": context,
        "stride": stride,
        "seed": seed,
    }
    with artifacts.building(out, "evaluation", plain, inputs) as build:
        if build is None:
            return
        session = _Session(base, corpus, out, settings, context, stride)
        records = [] if memory is None else session.interpolated(memory, seed)
        if lora is not None:
            records.append(session.single("LoRA", seed, peft=lora))
        if memory is None:
            records.append(session.single("base", seed))
        artifacts.write_json(out / "records.json", records)
        # All text the numbers depend on: what is scored, and what the base was trained on.
        known = {corpus.name: text.facts["sha256"]}
        lineage = artifacts.read(base, "model").facts
        if "corpus" in lineage:
            known[Path(lineage["corpus"]).name] = lineage["corpus_sha256"]
        build.facts.update(methods=[record["method"] for record in records], corpora_sha256=known)


class _Session:
    """lm-eval runs of one base model on one corpus."""

    def __init__(
        self, base: Path, corpus: Path, out: Path, settings: EvaluateSettings, context: int, stride: int
    ) -> None:
        self.base, self.corpus, self.out, self.settings = base, corpus, out, settings
        self.context, self.stride = context, stride

    def interpolated(self, memory: Path, seed: int) -> list[dict[str, Any]]:
        """Records of the base and of base + memory, from one pass of both models over valid and test."""
        model = self._model(memory=str(memory), alpha=self.settings.alphas[0])
        self._lm_eval(model, "MemDec", "valid")
        scores = self._scores(model, "valid")
        assert scores.memory is not None
        sweep = {
            alpha: metrics.perplexity(mixing.mix_scores(scores.base, scores.memory, alpha))
            for alpha in self.settings.alphas
        }
        best = min(sweep, key=sweep.__getitem__)
        records = []
        for method, alpha in (("base", 0.0), ("MemDec", best)):
            model.set_alpha(alpha)
            results = self._lm_eval(model, method, "test")
            scores = self._scores(model, "test")
            memory_scores = scores.memory if scores.memory is not None else scores.base
            log_p = mixing.mix_scores(scores.base, memory_scores, alpha)
            extra = {"valid_sweep": sweep} if method == "MemDec" else {}
            records.append(self._record(method, alpha if method == "MemDec" else None, results, log_p, seed) | extra)
        return records

    def single(self, method: str, seed: int, peft: Path | None = None) -> dict[str, Any]:
        """Record of one model alone, without a memory."""
        model = self._model(alpha=0.0, **({"peft": str(peft)} if peft is not None else {}))
        results = self._lm_eval(model, method, "test")
        return self._record(method, None, results, self._scores(model, "test").base, seed)

    def _model(self, **kwargs: Any) -> Any:
        from memdec.harness import MemDecInterp

        return MemDecInterp(
            pretrained=str(self.base),
            context=self.context,
            stride=self.stride,
            scores=str(self.out / "scores"),
            batch_size=self.settings.batch_size,
            dtype="float32",
            device="cuda" if torch.cuda.is_available() else "cpu",
            **kwargs,
        )

    def _lm_eval(self, model: Any, method: str, split: str) -> dict[str, Any]:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from memdec import HARNESS_TASKS

        metadata = {"corpus": str(self.corpus), "split": split, "pretrained": str(self.base)}
        manager = TaskManager(include_path=str(HARNESS_TASKS), include_defaults=False, metadata=metadata)
        results = simple_evaluate(model=model, tasks=[TASK], task_manager=manager, bootstrap_iters=0, log_samples=False)
        assert results is not None
        artifacts.write_json(self.out / f"results_{method}_{split}.json", json.loads(json.dumps(results, default=str)))
        values: dict[str, Any] = results["results"][TASK]
        return values

    def _scores(self, model: Any, split: str) -> TokenScores:
        from memdec import corpora

        separator = artifacts.read(self.corpus, "corpus").facts["separator"]
        text = corpora.joined(corpora.load(self.corpus, split), separator, model.tokenizer.eos_token)  # type: ignore[arg-type]
        stored: TokenScores = model.token_scores(text, disable_tqdm=True)
        return stored

    def _record(
        self, method: str, alpha: float | None, results: dict[str, Any], log_p: Any, seed: int
    ) -> dict[str, Any]:
        low, high = metrics.bootstrap_perplexity(log_p, self.stride, self.settings.resamples, seed)
        return {
            "method": method,
            "metric": "token_perplexity",
            "value": results["token_perplexity,none"],
            "low": low,
            "high": high,
            "n": int(results["tokens,none"]),
            "alpha": alpha,
            "seed": seed,
        }
