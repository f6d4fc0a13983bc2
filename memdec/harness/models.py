"""Models of lm-evaluation-harness: `memdec-interp` (base + memory decoder), `memdec-knnlm` and `memdec-icrag`.

    lm_eval --model memdec-interp --model_args pretrained=BASE,memory=MEMORY,alpha=0.6 --tasks pubmedqa

What they have in common is in `memdec.harness.base_lm`; here is what each of them mixes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from memdec.errors import ConfigError, one_line_errors
from memdec.harness.base_lm import WrappedLM, log
from memdec.inference.mixture import MemDecForCausalLM
from memdec.inference.wrapper import Wrapper, check_room
from memdec.maths import mixing
from memdec.models import loading
from memdec.models.loading import model_identity
from memdec.settings import DEFAULT_ALPHA, PAPER_BASE, PAPER_MEMORY
from memdec.tasks.task import DECLARED
from memdec.text import tokens

TUNE = "tune"


class MemDecInterp(WrappedLM):
    """The base with its memory decoder; see `--model_args` in the README.

    Args:
        pretrained: Base model, folder or Hub id. Without it and without `memory`: the paper's pair.
        memory: Memory decoder, folder or Hub id; None is the base alone (alpha 0).
        alpha: Weight of the memory, from 0 to 1. None is the paper's for the tasks that declare one (Table 11), else its
            best single value; "tune" is the best of 0, 0.05 … 1 on the split that a task declares for it (the paper's
            where it declares none).
        memory_revision: Commit of the memory, for Hub ids.
        memory_dtype: Weights' type of the memory; default as the base's.
        kwargs: As for `WrappedLM`.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        memory: str | None = None,
        alpha: float | str | None = None,
        memory_revision: str | None = None,
        memory_dtype: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.remembers = alpha == TUNE
        self._chosen: dict[str, dict[str, Any]] = {}
        if pretrained is None:
            if memory is not None:
                raise ConfigError(
                    "memdec-interp: expected pretrained=<base model> beside memory=, found none; add it to --model_args"
                )
            pretrained, memory = PAPER_BASE, PAPER_MEMORY
            log.warning(
                "memdec-interp: no model_args, taking the paper's pair %s + %s, alpha %s",
                pretrained,
                memory,
                DEFAULT_ALPHA,
            )
        self.memory_name, self.memory_revision, self.memory_dtype = memory, memory_revision, memory_dtype
        self.second = memory is not None
        by_paper = alpha is None and self.second
        self._choose = self._tuned if alpha == TUNE else self._declared if by_paper else self._no_choice
        usual = DEFAULT_ALPHA if memory else 0.0
        weight = mixing.check_weight(usual if alpha is None or isinstance(alpha, str) else alpha)
        if isinstance(alpha, str) and (alpha != TUNE or memory is None):
            raise ConfigError(
                f"alpha: expected a number, or {TUNE} with memory=, found {alpha!r}; correct --model_args"
            )
        if memory is None and weight:
            raise ConfigError(
                f"memdec-interp: expected memory=<memory decoder> for alpha {weight}, found none; add it to --model_args"
            )
        super().__init__(pretrained, weight, **kwargs)

    def _check(self, revision: str | None, trust: bool) -> None:
        base = tokens.load_tokenizer(self.base_name, revision, trust_remote_code=trust)
        if self.memory_name is not None:
            loading.check_folder(self.memory_name)
            memory = tokens.load_tokenizer(self.memory_name, self.memory_revision, trust_remote_code=trust)
            tokens.check_same_ids(base, memory, f"{self.base_name} with {self.memory_name}")

    def _most_positions(self) -> int | None:
        if self.memory_name is None:
            return None
        return loading.n_positions(loading.config(self.memory_name, self.memory_revision))

    def _wrap(self, base: Any) -> Wrapper:
        memories = []
        if self.memory_name is not None:
            dtype = self.memory_dtype or str(base.dtype).removeprefix("torch.")
            memory = loading.load(self.memory_name, dtype=dtype, revision=self.memory_revision)
            check_room(memory, base.device, self.memory_name)
            memories = [memory.to(base.device)]
        weights = [self.alpha for _ in memories]
        return MemDecForCausalLM.from_models(base, memories, weights, n_vocab=len(self.tokenizer))

    def _set_weight(self) -> None:
        self._model.set_weights([self.alpha for _ in self._model.memories])

    # --- alpha of each task -----------------------------------------------------------------------------------------

    def set_alpha(self, alpha: float) -> None:
        self._choose = self._no_choice
        super().set_alpha(alpha)

    def _no_choice(self, task: str) -> float:
        return self.alpha

    def _declared(self, task: str) -> float:
        """The paper's alpha, where the task has one."""
        if task not in self._chosen:
            value = DECLARED.get(task, {}).get("paper_alpha")
            alpha, source = (self.alpha, "default") if value is None else (float(value), "paper")
            self._chosen[task] = {"alpha": alpha, "source": source}
            log.info("%s: alpha %g (%s)", task, alpha, source)
        return float(self._chosen[task]["alpha"])

    def _tuned(self, task: str) -> float:
        """The best alpha on the task's own split for that; scored once, on every process alike."""
        from memdec.harness.alphas import best_alpha

        metadata = DECLARED.get(task, {})
        split = metadata.get("tune_split")
        if task not in self._chosen and split is None:
            self._chosen[task] = {"alpha": float(metadata["paper_alpha"]), "source": "paper; no split to tune on"}
            log.warning("%s: alpha %g (paper): there is no split to tune on", task, metadata["paper_alpha"])
        elif task not in self._chosen:
            processes, choose, cut = (self._rank, self._world_size), self._choose, self.n_cut
            self._rank, self._world_size = 0, 1
            log.info("%s: alpha is tuned on %s", task, split)
            given = {key: value for key, value in metadata.items() if key != "rows"}
            found = best_alpha(self, task, given | {"split": split})
            (self._rank, self._world_size), self._choose, self.n_cut = processes, choose, cut
            self._chosen[task] = {**found, "source": f"tuned on {split}"}
            log.info("%s: alpha %g, %s %.4g on %s", task, *(found[key] for key in ("alpha", "metric", "value")), split)
        return float(self._chosen[task]["alpha"])

    def _by_task(self, score: Callable[[list[Any]], list[Any]], requests: list[Any]) -> list[Any]:
        """Answers to requests, those of each task at its own alpha."""
        usual = self.alpha
        names = list(dict.fromkeys(request.task_name for request in requests))
        if self._choose == self._tuned:
            wrong = [name for name in names if not {"tune_split", "paper_alpha"} & set(DECLARED.get(name, {}))]
            if wrong:
                raise ConfigError(
                    f"alpha=tune: expected tasks with a split to tune on or an alpha of the paper, found {', '.join(map(str, wrong))}; "
                    "give alpha a number"
                )
        alphas = {name: self.alpha if name is None else self._choose(name) for name in names}
        answers: dict[int, Any] = {}
        for alpha in dict.fromkeys(alphas.values()):
            numbers = [i for i, request in enumerate(requests) if alphas[request.task_name] == alpha]
            super().set_alpha(alpha)
            answers.update(zip(numbers, score([requests[i] for i in numbers]), strict=True))
        super().set_alpha(usual)
        return [answers[i] for i in range(len(requests))]

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

    def _identity(self) -> dict[str, str]:
        if self.memory_name is None:
            return {}
        memory = model_identity(self.memory_name, self.memory_revision)
        return {"memory": memory, "memory_dtype": str(self.memory_dtype)}

    def _info(self) -> dict[str, Any]:
        return {"memory": self.memory_name}

    def get_model_info(self) -> dict[str, Any]:
        """As of any model of ours; `alpha` is None where tasks were at several, `alphas` says which were at what."""
        info = super().get_model_info()
        if self._choose == self._no_choice or not self._chosen:
            return info
        values = {each["alpha"] for each in self._chosen.values()}
        return info | {"alpha": values.pop() if len(values) == 1 else None, "alphas": self._chosen}
