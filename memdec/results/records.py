"""Make the records of a system from the scores of its tokens: arithmetic, without a model and without torch.

    records = Records(out, "torch", settings, stride=512, seed=0, device="cpu", precision="float32")
    records.mixed("memdec", {("valid", None): scores, ("test", None): more})    # alpha by valid, measured on test

Weights are chosen on the valid text, and the test text is measured with them. The scores of every text are written into
the evaluation folder beside the records (`memdec.results.scores`).
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memdec.artefacts import artefact
from memdec.harness.scores import TokenScores
from memdec.maths import statistics, weighing
from memdec.results import scores
from memdec.settings import FORGETTING, MixSettings, Split

log = logging.getLogger(__name__)
Text = tuple[Split, str | None]  # split, and the name of a general corpus; None is the corpus that is evaluated
VALID: Text = ("valid", None)


@dataclass(frozen=True)
class Records:
    """Writes the scores of systems around one base into an evaluation folder, and makes a record of each test text.

    Attributes:
        out: Evaluation folder.
        base: The base, in warnings.
        corpus: Name of the corpus that is evaluated.
        settings: Candidates for the weights, and resamples of the intervals.
        stride: Tokens scored per window.
        seed: Seed of the run and of the bootstrap.
        device: Name of the device that computed the scores.
        precision: Number type of the models' weights.
        learning_rate: The rate of the part that was trained, if it was tuned.
        size: Parameters of a LoRA adapter as a share of the memory's, if they should be equal.
    """

    out: Path
    base: str
    corpus: str
    settings: MixSettings
    stride: int
    seed: int
    device: str
    precision: str
    learning_rate: float | None = None
    size: float | None = None

    def alone(self, method: str, found: Mapping[Text, TokenScores]) -> list[dict[str, Any]]:
        """Records of a system without a weight."""
        return self._finished(method, found, 0.0)

    def mixed(self, memory: str, found: Mapping[Text, TokenScores]) -> list[dict[str, Any]]:
        """Records of a memory; alpha is the candidate with the lowest perplexity on the valid text."""
        sweep = self._sweep(found[VALID], self.settings.alphas)
        alpha = weighing.best_weight(sweep)
        self._warn_at_end("alpha", alpha, sweep)
        tuned = {"alpha": alpha, "memory": memory, "valid_sweep": sweep, "valid": sweep[alpha]}
        return [record | tuned for record in self._finished("MemDec", found, alpha)]

    def with_neighbours(
        self, found: Mapping[Text, Mapping[float, TokenScores]], memory: str | None = None
    ) -> list[dict[str, Any]]:
        """Records of the kNN-LM, or of p_kNN in the place of the memory `memory`, from its scores at every temperature.

        Temperature and lambda are the candidates with the lowest perplexity on the valid text together.
        """
        sweeps = {tau: self._sweep(each, self.settings.lambdas) for tau, each in found[VALID].items()}
        tau = min(sweeps, key=lambda each: min(sweeps[each].values()))
        best = weighing.best_weight(sweeps[tau])
        self._warn_at_end("lambda", best, sweeps[tau])
        self._warn_at_end("temperature", tau, sweeps, (0.0, math.inf))
        tuned = {"lambda": best, "temperature": tau, "valid_sweep": sweeps[tau], "valid": sweeps[tau][best]}
        chosen = {text: by_tau[tau] for text, by_tau in found.items()}
        method, named = ("kNN-LM", {}) if memory is None else ("MemDec", {"memory": memory})
        return [record | tuned | named for record in self._finished(method, chosen, best)]

    def _sweep(self, valid: TokenScores, candidates: Sequence[float]) -> dict[float, float]:
        """Perplexity on the valid text for every weight of the second distribution."""
        assert valid.memory is not None
        return weighing.perplexities(valid.base, valid.memory, candidates)

    def _warn_at_end(
        self, name: str, chosen: float, candidates: Iterable[float], limits: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        """Say so if a weight that was tuned on the valid text is the end of its grid."""
        warning = weighing.at_end(f"{self.base} on {self.corpus}: {name}", chosen, candidates, limits)
        if warning is not None:
            log.warning("warning: %s", warning)

    def _finished(self, method: str, found: Mapping[Text, TokenScores], weight: float) -> list[dict[str, Any]]:
        """Write the scores, and make one record for each test text, at one weight."""
        for (split, on), each in found.items():
            scores.write(self.out, each, split, on)
        return [
            self._record(method, each, weight) | {"on": on or self.corpus}
            for (split, on), each in found.items()
            if split == "test"
        ]

    def _record(self, method: str, found: TokenScores, weight: float) -> dict[str, Any]:
        log_p = found.log_p(weight)
        item = statistics.item_tokens(len(log_p), self.stride)
        low, high = statistics.bootstrap_perplexity(log_p, item, self.settings.resamples, self.seed)
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
            "learning_rate": self.learning_rate,
            "size": self.size,
            "seed": self.seed,
            "device": self.device,
            "precision": self.precision,
        }


def write(out: Path, corpus: str, records: list[dict[str, Any]]) -> None:
    """Write the records of the corpus, and those of general text, if there are any."""
    artefact.write_json(out / "records.json", [record for record in records if record["on"] == corpus])
    general = [record for record in records if record["on"] != corpus]
    if general:
        artefact.write_json(out / FORGETTING, general)
