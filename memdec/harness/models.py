"""`memdec-interp`: a base with its memory decoder, as a model of lm-evaluation-harness.

    lm_eval --model memdec-interp --model_args pretrained=BASE,memory=MEMORY,alpha=0.6 --tasks pubmedqa

The code that it shares with the baselines is in `memdec.harness.base_lm`. `memdec.harness.alphas` chooses alpha for
each task.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lm_eval.api.model import CacheHook

from memdec.errors import ConfigError, one_line_errors
from memdec.harness.alphas import TUNE, Mode, TaskAlphas
from memdec.harness.base_lm import WrappedLM, log
from memdec.inference.systems import SYSTEMS, Parts
from memdec.maths import weighing
from memdec.settings import DEFAULT_ALPHA, PAPER_BASE, PAPER_MEMORY


class MemDecInterp(WrappedLM):
    """The base with its memory decoder; docs/evaluate.md lists all `--model_args`.

    Args:
        pretrained: Base model, folder or Hub id. If neither it nor `memory` is given: base and memory of the paper.
        memory: Memory decoder, folder or Hub id; None is the base alone (alpha 0).
        alpha: Weight of the memory, from 0 to 1. None: the paper's alpha for tasks that declare one (Table 11), else
            the paper's best single value. "tune": the best of 0, 0.05 ... 1 on the tuning split of each task, or the
            paper's alpha if the task declares no such split.
        memory_revision: Commit of the memory, for Hub ids.
        memory_dtype: Number type of the memory's weights; default as the base's.
        kwargs: As for `WrappedLM`.
    """

    name = "memdec-interp"

    def __init__(
        self,
        pretrained: str | None = None,
        memory: str | None = None,
        alpha: float | str | None = None,
        memory_revision: str | None = None,
        memory_dtype: str | None = None,
        **kwargs: Any,
    ) -> None:
        if pretrained is None:
            pretrained, memory = _paper_pair(memory)
        usual = weighing.check_weight(_usual(alpha, memory))
        if memory is None and (usual or alpha == TUNE):
            raise ConfigError(
                f"alpha: expected a number from 0 to 1 with memory=<memory decoder>, found {alpha} without one; add it to "
                "--model_args"
            )
        mode: Mode = "tune" if alpha == TUNE else "paper" if alpha is None and memory is not None else "given"
        self._alphas, self.remembers = TaskAlphas(mode, usual), mode == "tune"
        system = SYSTEMS["base" if memory is None else "MemDec"]
        parts = Parts(base=pretrained, memory=memory, memory_revision=memory_revision, memory_dtype=memory_dtype)
        super().__init__(system, parts, usual, **kwargs)

    @property
    def weight_by_task(self) -> bool:
        return self._alphas.mode != "given"

    def set_weight(self, weight: float) -> None:
        """Set one alpha for all tasks."""
        self._alphas = TaskAlphas("given", weighing.check_weight(weight))
        super().set_weight(weight)

    def get_model_info(self) -> dict[str, Any]:
        """As in `WrappedLM`; if tasks had different alphas, `alpha` is None and `alphas` has that of each task."""
        info, chosen = super().get_model_info(), self._alphas.chosen
        if not chosen:
            return info
        values = {each["alpha"] for each in chosen.values()}
        return info | {"alpha": values.pop() if len(values) == 1 else None, "alphas": chosen}

    # --- answers, with the alpha of each task -------------------------------------------------------------------------

    def _by_task(self, score: Callable[[list[Any]], list[Any]], requests: list[Any]) -> list[Any]:
        weights = self._alphas.of(requests, self._tuning_answers)
        answers: dict[int, Any] = {}
        usual = self.weight
        try:
            for alpha in dict.fromkeys(weights):
                numbers = [i for i, weight in enumerate(weights) if weight == alpha]
                super().set_weight(alpha)
                answers.update(zip(numbers, score([requests[i] for i in numbers]), strict=True))
        finally:
            super().set_weight(usual)
        return [answers[i] for i in range(len(requests))]

    def _tuning_answers(self, requests: Sequence[Any], alpha: float) -> Sequence[Any]:
        """Answers to requests of the tuning split; they do not count as cut requests of the run."""
        usual, n_cut, hook = self.weight, self.n_cut, self.cache_hook
        try:
            super().set_weight(alpha)
            self.cache_hook = CacheHook(None)  # lm-eval's cache of answers does not know alpha
            kind = requests[0].request_type
            answers: list[Any] = getattr(super(), kind)(list(requests), disable_tqdm=True)
        finally:
            super().set_weight(usual)
            self.n_cut, self.cache_hook = n_cut, hook
        return answers

    @one_line_errors()
    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._by_task(partial(super().loglikelihood, disable_tqdm=disable_tqdm), requests)

    @one_line_errors()
    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return self._by_task(partial(super().loglikelihood_rolling, disable_tqdm=disable_tqdm), requests)

    @one_line_errors()
    def label_word_probs(self, requests: list[Any], disable_tqdm: bool = False) -> list[list[float]]:
        return self._by_task(partial(super().label_word_probs, disable_tqdm=disable_tqdm), requests)

    @one_line_errors()
    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return self._by_task(partial(super().generate_until, disable_tqdm=disable_tqdm), requests)


def _usual(alpha: float | str | None, memory: str | None) -> Any:
    """alpha of tasks that declare none."""
    if alpha is None or alpha == TUNE:
        return DEFAULT_ALPHA if memory else 0.0
    if not isinstance(alpha, str):
        return alpha
    try:
        return float(alpha)
    except ValueError:
        raise ConfigError(
            f"alpha: expected a number, or {TUNE} with memory=, found {alpha!r}; correct --model_args"
        ) from None


def _paper_pair(memory: str | None) -> tuple[str, str]:
    """Base and memory of the paper, if no model is given."""
    if memory is not None:
        raise ConfigError(
            "memdec-interp: expected pretrained=<base model> beside memory=, found none; add it to --model_args"
        )
    log.warning(
        "memdec-interp: no model_args, using the paper's pair %s + %s, alpha %s",
        PAPER_BASE,
        PAPER_MEMORY,
        DEFAULT_ALPHA,
    )
    return PAPER_BASE, PAPER_MEMORY
