"""`memdec-interp`: base + memory decoder as a model of lm-evaluation-harness.

    lm_eval --model memdec-interp --model_args pretrained=BASE,memory=MEMORY,alpha=0.6 --tasks pubmedqa

A subclass of the harness's own `hf` model, so everything that works there works here (batching, chat templates, peft,
`parallelize`, `accelerate launch`); what differs is that the logits are those of the mixture, and that
`loglikelihood_rolling` uses the paper's sliding windows and can store per-token scores of both models.
"""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from numpy.typing import NDArray
from tqdm import tqdm

from memdec import mixing, tokens
from memdec.errors import ConfigError, ModelError, one_line_errors
from memdec.modeling import MemDecForCausalLM, check_room
from memdec.models import check_folder, load, n_positions
from memdec.scores import ScoreStore, TokenScores, model_identity
from memdec.windows import Window, windows

log = logging.getLogger(__name__)

# The paper's own cell: Qwen2.5-7B with the released 0.5B memory, biomedical domain (Table 14).
PAPER_BASE = "Qwen/Qwen2.5-7B"
PAPER_MEMORY = "Clover-Hill/MemoryDecoder-Qwen-biomed"
DEFAULT_ALPHA = 0.6  # best single value of the paper's Table 7
DEFAULT_CONTEXT = 1024


class MemDecInterp(HFLM):
    """The mixture as an lm-eval model; see `--model_args` in the README.

    Args:
        pretrained: Base model, folder or Hub id. Without it and without `memory`: the paper's pair.
        memory: Memory decoder, folder or Hub id; None is the base alone (alpha 0).
        alpha: Weight of the memory, from 0 to 1.
        context: Tokens of a rolling window (default 1024, or what the models hold if that is less).
        stride: Tokens scored per rolling window (default: half the context, as in the paper; `stride=context` gives
            the disjoint windows of lm-eval's `hf`).
        scores: Folder for per-token scores of rolling texts; at another alpha they are read instead of computed.
        memory_revision: Commit of the memory, for Hub ids.
        memory_dtype: Weights' type of the memory; default as the base's.
        kwargs: As for lm-eval's `hf` (dtype, device, batch_size, peft, parallelize, max_length ...).
    """

    def __init__(
        self,
        pretrained: str | None = None,
        memory: str | None = None,
        alpha: float | None = None,
        context: int | None = None,
        stride: int | None = None,
        scores: str | None = None,
        memory_revision: str | None = None,
        memory_dtype: str | None = None,
        **kwargs: Any,
    ) -> None:
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
        self.alpha = mixing.check_weight(alpha if alpha is not None else DEFAULT_ALPHA if memory else 0.0)
        if memory is None and self.alpha:
            raise ConfigError(
                f"memdec-interp: expected memory=<memory decoder> for alpha {self.alpha}, found none; add it to --model_args"
            )
        self.memory_name, self.memory_revision, self.memory_dtype = memory, memory_revision, memory_dtype
        self.base_name = pretrained
        for name in (pretrained, memory):
            if name is not None:
                check_folder(name)
        self._check_tokenizers(pretrained, kwargs.get("revision"), kwargs.get("trust_remote_code", False))
        try:
            super().__init__(pretrained=pretrained, **kwargs)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(
                f"{pretrained}: expected a causal LM, found: {reason}; check the path or the network"
            ) from error
        self.context, self.stride = self._windows(context, stride)
        self.store = self._store(scores, kwargs)

    def _check_tokenizers(self, pretrained: str, revision: str | None, trust: bool) -> None:
        base = tokens.load_tokenizer(pretrained, revision, trust_remote_code=trust)
        if self.memory_name is not None:
            memory = tokens.load_tokenizer(self.memory_name, self.memory_revision, trust_remote_code=trust)
            tokens.check_same_ids(base, memory, f"{pretrained} with {self.memory_name}")

    def _create_model(self, pretrained: str, *args: Any, **kwargs: Any) -> None:
        """Load the base as `hf` does, then put the memory beside it."""
        super()._create_model(pretrained, *args, **kwargs)
        base: Any = self._model  # type: ignore[has-type]
        memories = []
        if self.memory_name is not None:
            dtype = self.memory_dtype or str(base.dtype).removeprefix("torch.")
            memory = load(self.memory_name, dtype=dtype, revision=self.memory_revision)
            check_room(memory, base.device, self.memory_name)
            memories = [memory.to(base.device)]
        weights = [self.alpha for _ in memories]
        self._model = MemDecForCausalLM.from_models(base, memories, weights, n_vocab=len(self.tokenizer))

    def _windows(self, context: int | None, stride: int | None) -> tuple[int, int]:
        limit = min(n_positions(m.config) or sys.maxsize for m in (self.model.base, *self.model.memories))
        if context is not None and int(context) > limit:
            raise ConfigError(f"context: expected at most {limit} (positions of the models), found {context}; lower it")
        size = int(context) if context is not None else min(DEFAULT_CONTEXT, limit)
        step = int(stride) if stride is not None else max(1, size // 2)
        windows(1, size, step)  # checks both
        return size, step

    def _store(self, folder: str | None, kwargs: dict[str, Any]) -> ScoreStore | None:
        if folder is None:
            return None
        from memdec.artifacts import digest

        names = [
            (self.base_name, kwargs.get("revision")),
            (self.memory_name, self.memory_revision),
            (kwargs.get("peft"), None),
        ]
        models = [model_identity(name, revision) if name else None for name, revision in names]
        setting = [models, self.context, self.stride, str(self.model.base.dtype), self.prefix_token_id]
        return ScoreStore(Path(folder), digest(setting))

    # --- rolling log-likelihood -----------------------------------------------------------------------------------

    def token_scores(self, text: str, *, disable_tqdm: bool = False) -> TokenScores:
        """Scores of every token of a text, from the store or from the models; see `windows` for the windows."""
        stored = self.store.get(text) if self.store is not None else None
        if stored is not None:
            return stored
        stream = np.asarray(self.tokenizer.encode(text, add_special_tokens=False, verbose=False), dtype=np.int64)
        if not len(stream):
            raise ConfigError("loglikelihood_rolling: expected a text with at least one token, found an empty one")
        # With a store both models always run, so that any alpha can be read from it later.
        which = "both" if self.store is not None or 0 < self.alpha < 1 else "memory" if self.alpha else "base"
        scores = self._score(stream, which, disable_tqdm)
        if self.store is not None:
            self.store.put(text, scores)
        return scores

    @torch.inference_mode()
    def _score(self, stream: NDArray[np.int64], which: str, disable_tqdm: bool) -> TokenScores:
        parts = windows(len(stream), self.context, self.stride)
        base = np.full(len(stream), np.nan, dtype=np.float32)
        memory = np.full(len(stream), np.nan, dtype=np.float32) if self.model.memories else None
        batch_size = self.batch_size_per_gpu if isinstance(self.batch_size_per_gpu, int) else 8
        bar = tqdm(
            total=len(parts), desc="score windows", unit="window", disable=disable_tqdm or self.rank != 0, mininterval=2
        )
        for batch in _batches(parts, batch_size):
            ids = np.stack([part.inputs(stream, self.prefix_token_id) for part in batch])
            keep = max(part.n_scored for part in batch)
            log_p = self.model.log_probs(torch.from_numpy(ids), which=which, logits_to_keep=keep)
            labels = torch.from_numpy(np.stack([stream[part.end - keep : part.end] for part in batch])).to(
                self.model.device
            )
            for out, rows in zip((base, memory), log_p, strict=True):
                if out is None or rows is None:
                    continue
                gathered = rows.gather(-1, labels[..., None])[..., 0].cpu().numpy()
                for part, row in zip(batch, gathered, strict=True):
                    out[part.first : part.end] = row[keep - part.n_scored :]
            bar.update(len(batch))
        bar.close()
        return TokenScores(base, memory if which != "base" else None)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Total log-probability (nats) of each text under the mixture, every token scored exactly once."""
        results = []
        for request in requests:
            (text,) = request.args
            scores = self.token_scores(text, disable_tqdm=disable_tqdm)
            memory = scores.memory if scores.memory is not None else scores.base
            total = float(mixing.mix_scores(scores.base, memory, self.alpha).sum())
            results.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return results

    def set_alpha(self, alpha: float) -> None:
        """Use another weight from now on."""
        self.alpha = mixing.check_weight(alpha)
        self.model.set_weights([self.alpha for _ in self.model.memories])

    def get_model_info(self) -> dict[str, Any]:
        """What the results file says about the model."""
        return {
            **super().get_model_info(),
            "pretrained": self.base_name,
            "memory": self.memory_name,
            "alpha": self.alpha,
            "context": self.context,
            "stride": self.stride,
        }

    # --- errors ---------------------------------------------------------------------------------------------------

    @classmethod
    def create_from_arg_string(cls, *args: Any, **kwargs: Any) -> "MemDecInterp":
        with one_line_errors():
            model: MemDecInterp = super().create_from_arg_string(*args, **kwargs)
            return model

    @classmethod
    def create_from_arg_obj(cls, *args: Any, **kwargs: Any) -> "MemDecInterp":
        with one_line_errors():
            model: MemDecInterp = super().create_from_arg_obj(*args, **kwargs)
            return model


def _batches(parts: list[Window], batch_size: int) -> Iterator[list[Window]]:
    """Windows of equal length side by side: nothing is ever padded."""
    batch: list[Window] = []
    for part in parts:
        if batch and (len(batch) == batch_size or part.n_inputs != batch[0].n_inputs):
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch


__all__ = ["MemDecInterp"]
