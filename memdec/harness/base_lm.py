"""The common lm-eval model of all systems: a base mixed with a second distribution; scoring, score store, generation.

It is a subclass of lm-eval's `hf` model, so all features of `hf` work (batching, chat templates, peft, `parallelize`,
`accelerate launch`). It differs in five ways:
- The logits are those of the mixture.
- Logits are computed only for the positions that a continuation needs, and a long context is read once for all of its
  continuations.
- `loglikelihood_rolling` uses the paper's sliding windows.
- `label_word_probs` gives the probabilities of many next words from one pass.
- A score store keeps the scores of both distributions, so a run at another weight loads no model.

A request's answer is what it would be alone: where the frequencies of a model depend on the length, only requests of
one length class share a pass (`memdec.models.rope`). Log-probabilities are computed in float64, because many of them
are added.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from itertools import groupby, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import simple_parse_args_string
from numpy.typing import NDArray
from tqdm import tqdm

from memdec.artefacts import sources
from memdec.errors import ConfigError, ModelError, one_line_errors, outside
from memdec.harness import answers, arguments
from memdec.harness.scores import FORMAT as SCORES_FORMAT
from memdec.harness.scores import ScoreStore, TokenScores, request_key
from memdec.harness.scoring import score_labels, score_stream, score_words
from memdec.inference.systems import Parts, System
from memdec.inference.wrapper import Which
from memdec.maths import weighing
from memdec.maths.windows import windows
from memdec.models import loading, rope
from memdec.models.loading import model_identity
from memdec.tasks import task
from memdec.tasks.perplexity import WindowSum
from memdec.text import tokens

log = logging.getLogger("lm_eval.models.memdec")  # the `lm_eval` command only shows loggers below lm_eval

DEFAULT_CONTEXT = 1024
# Arguments of `hf` that are not part of the score store's setting: given the token ids, they change no score.
_NO_NUMBERS = {
    "backend", "batch_size", "max_batch_size", "device", "revision", "trust_remote_code", "max_length", "truncation",
    "logits_cache", "parallelize", "max_memory_per_gpu", "max_cpu_memory", "offload_folder", "tp_plan", "tokenizer",
    "use_fast_tokenizer", "add_bos_token", "prefix_token_id", "think_end_token", "enable_thinking", "chat_template_args",
}  # fmt: skip
# With these arguments the place of the base, or its size in bytes, is not known before it is loaded.
_ELSEWHERE = (
    "parallelize", "tp_plan", "subfolder", "gguf_file", "autogptq", "gptqmodel", "load_in_4bit", "load_in_8bit", "trust_remote_code",
)  # fmt: skip
_SAVED = 512  # tokens of a context that need not be read again, from which on its items share one pass
_REMEMBERED = 1 << 20  # most tokens of texts that are remembered: 40 MB
_LOGITS = 1 << 27  # most log-probabilities of one model in memory at a time (1 GiB in float64)

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # strings, context, continuation
Item = tuple[bytes, list[int], list[int]]  # key, input of the model, labels of its last positions
WordItem = tuple[bytes, tuple[int, ...], torch.Tensor]  # key, input of the model, candidates for the next token
AnyItem = TypeVar("AnyItem", Item, WordItem)
Family = tuple[tuple[int, ...], list[Item]]  # a context, and the items that begin with it


class WrappedLM(HFLM):
    """A system as an lm-eval model; a subclass chooses the system and takes its parts as arguments.

    Args:
        system: The system.
        parts: Its parts.
        weight: Weight of the second distribution, from 0 to 1: alpha of a memory, lambda of p_kNN.
        context: Tokens of a rolling window (default 1024, or the context of the models if that is less).
        stride: Tokens scored per rolling window (default: half the context, as in the paper; `stride=context` gives
            the disjoint windows of lm-eval's `hf`).
        scores: Folder for per-token scores; a run at another weight reads them instead of computing them.
        kwargs: As for lm-eval's `hf` (dtype, device, batch_size, peft, parallelize, max_length ...).
    """

    AUTO_MODEL_CLASS: Any  # whose `from_pretrained` makes the base
    name = "memdec"  # of the model in lm-eval, for messages
    cache_hook: Any  # of lm-eval's cache of answers
    remembers = False  # whether scores are kept in memory if no folder is given

    def __init__(
        self,
        system: System,
        parts: Parts,
        weight: float,
        context: int | None = None,
        stride: int | None = None,
        scores: str | None = None,
        **kwargs: Any,
    ) -> None:
        for role, model in (("pretrained", parts.base), ("memory", parts.memory)):
            if not isinstance(model, str | os.PathLike | int | None):  # lm-eval reads a name of digits as a number
                raise ConfigError(
                    f"{role}: expected a folder or Hub id, found {type(model).__name__}; save the model and give its folder"
                )
        self.system, self.weight = system, weighing.check_weight(weight)
        self.n_cut = 0  # requests that were cut on the left
        self._same_tokenizers: set[str | None] = {None}  # of tasks, which were checked
        self._encoded: dict[Any, list[int]] = {}
        self._n_encoded = 0  # their tokens
        self._read: list[int] = []  # the last context
        self._given, scores = kwargs, arguments.folder("scores", scores)
        arguments.check_types({"context": context, "stride": stride, **kwargs})
        if kwargs.get("revision") is not None:
            kwargs["revision"] = str(kwargs["revision"])  # lm-eval reads a commit of digits as a number
        self.base_name = pretrained = _in_subfolder(str(parts.base), kwargs)
        own_words = any(kwargs.get(key) for key in ("tokenizer", "gguf_file", "subfolder"))  # not in the base's folder
        if not kwargs.get("gguf_file"):
            loading.check_folder(pretrained, kwargs.get("subfolder") or "", any_weights=True)
        self._spread = any(kwargs.get(key) for key in _ELSEWHERE)
        kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))  # without a value transformers would ask
        own = ("revision", "subfolder", "trust_remote_code", "device")
        given = {key: kwargs[key] for key in own if kwargs.get(key) is not None}
        dtype = arguments.dtype("dtype", kwargs.get("dtype") or "auto")
        for name, value in {"memory_dtype": parts.memory_dtype, **kwargs}.items():
            if name.endswith("_dtype") and name not in ("torch_dtype", "bnb_4bit_compute_dtype") and value is not None:
                arguments.dtype(name, value)
        self.parts = replace(parts, base=pretrained, dtype=dtype, **given)
        if not own_words:
            system.check_parts(self.parts)
        self._load_base: Callable[[], None] | None = None
        self._configuring = True
        with _loading(pretrained):
            super().__init__(pretrained=pretrained, **kwargs)
            self._configs = [self.config] + ([self._memory_config()] if parts.memory is not None else [])
            known = [loading.n_positions(config) for config in self._configs[1:]]
            self._n_positions = min(int(super().max_length), *(n or sys.maxsize for n in known), sys.maxsize)
        self._configuring = False
        if own_words:
            self.parts = replace(self.parts, tokenizer=self.tokenizer)
            system.check_parts(self.parts)
        if self.backend != "causal":
            raise ModelError(
                f"{pretrained}: expected a causal LM, found one of the kind {self.backend}; use another base"
            )
        self._check_numbers()
        if hasattr(self, "accelerator"):
            # `hf` distributes requests only if a process sees several GPUs, and it uses the local rank.
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.context, self.stride = self._windows(context, stride)
        self.store = None
        if scores is not None or self.remembers:
            self.store = ScoreStore(Path(scores) if scores is not None else None, self._setting)
        if self.store is not None:
            log.info("scores: %d requests known in %s", len(self.store), self.store.folder or "memory")

    def _memory_config(self) -> Any:
        assert self.parts.memory is not None
        trust = self.parts.trust_remote_code
        return loading.config(self.parts.memory, self.parts.memory_revision, trust_remote_code=trust)

    def _check_numbers(self) -> None:
        """Check what `hf` would only notice in the middle of the requests."""
        if isinstance(self.batch_size, int):
            arguments.whole("batch_size", self.batch_size)
        if (wanted := self._given.get("max_length")) is not None:
            limit = None if rope.has_rotations(self.config) else loading.n_positions(self.config)
            for most in (limit, self._n_positions):  # the second one has those of the memory
                loading.check_positions(most, wanted, "max_length", "lower it")
        prefix, n = self._given.get("prefix_token_id"), tokens.n_ids(self.tokenizer)
        if prefix is not None and not (isinstance(prefix, int) and 0 <= prefix < n):
            raise ConfigError(
                f"prefix_token_id: expected a token from 0 to {n - 1}, found {prefix!r}; correct --model_args"
            )

    # --- the models, when they are needed ---------------------------------------------------------------------------

    def _create_model(self, pretrained: str, *args: Any, **kwargs: Any) -> None:
        """Delay loading the base: with stored scores it may not be needed."""
        self._load_base = partial(self._checked_base, pretrained, *args, **kwargs)
        # The attributes that the constructor of `hf` uses.
        self._model = SimpleNamespace(to=lambda *_: None, config=self.config)

    def _checked_base(self, pretrained: str, *args: Any, peft: str | None = None, **kwargs: Any) -> None:
        """Load the base as `hf` does, but check the report of every load, and do not resize the vocabulary for peft."""
        delta, kind = kwargs.get("delta"), self.AUTO_MODEL_CLASS
        if peft and delta:
            raise ConfigError("peft, delta: expected one of them, found both; leave one out of --model_args")
        if delta:
            where = {name: kwargs.get(name) for name in ("subfolder", "trust_remote_code") if kwargs.get(name)}
            loading.check_delta(pretrained, delta, kwargs.get("revision"), **where)
        folders = [] if kwargs.get("gguf_file") else [(pretrained, kwargs.get("subfolder") or "")]
        for folder, inside in folders + ([(delta, "")] if delta else []):
            loading.check_folder(folder, inside, any_weights=True, whole=True)
        # `hf` calls `from_pretrained` of this class for base and delta.
        self.AUTO_MODEL_CLASS = SimpleNamespace(from_pretrained=partial(loading.from_pretrained, kind))
        try:
            super()._create_model(pretrained, *args, **kwargs)
        finally:
            self.AUTO_MODEL_CLASS = kind
        if peft:
            self._model = loading.adapted(self._model, peft, revision=kwargs.get("revision"))

    def _load(self) -> None:
        """Load base and memory when the first request needs them; errors in the requests show before that."""
        if self._load_base is None:
            return
        start = time.perf_counter()
        if not self._spread:  # if the base is spread, its share of each device is unknown
            self.system.check_room(replace(self.parts, device=str(self._device)))
        self._configuring = True  # `hf` asks for its model while it makes it
        try:
            with _loading(self.base_name):
                self._load_base()
            base: Any = self._model
            if not getattr(base, "hf_device_map", None):
                base.to(self._device)
            self._model = self.system.wrap(base.eval(), self.parts, tokens.n_needed(self.tokenizer))
            if self._given.get("max_length") is not None:
                self._model.n_positions = self._n_positions  # rotations exist beyond the positions of the configuration
        finally:
            self._configuring = False
        self._load_base = None  # last, or what fails above would be hidden by errors of a model that is not wrapped
        if self.system.weight is not None:
            self._model.set_weight(self.weight)
        log.info("loaded %s in %.1f s", self.base_name, time.perf_counter() - start)

    @property
    def model(self) -> Any:
        """The mixture; it is loaded on first use."""
        if not self._configuring:
            self._load()
        return self._model

    @property
    def max_length(self) -> int:
        """The longest input, in tokens, that base and memory accept."""
        return self._n_positions

    def _windows(self, context: int | None, stride: int | None) -> tuple[int, int]:
        limit = self._n_positions
        if context is not None:
            loading.check_positions(limit, int(context), "context", "lower it")
        size = int(context) if context is not None else min(DEFAULT_CONTEXT, limit)
        step = int(stride) if stride is not None else max(1, size // 2)
        windows(1, size, step)  # raises if context or stride is invalid
        return size, step

    @cached_property
    def _setting(self) -> dict[str, str]:
        """Everything that the scores of given token ids depend on, except the weight."""
        kwargs = self._given
        revision = kwargs.get("revision")
        named: dict[str, Any] = {"peft": kwargs.get("peft"), "delta": kwargs.get("delta")}
        setting = {"base": model_identity(self.base_name, revision, kwargs.get("subfolder") or "")}
        setting |= {key: model_identity(name, revision) for key, name in named.items() if name}
        if isinstance(kwargs.get("tokenizer"), str):
            setting["tokenizer"] = model_identity(kwargs["tokenizer"], revision, weights=False)
        numbers = {key: str(value) for key, value in kwargs.items() if key not in (*named, *_NO_NUMBERS)}
        return setting | self.system.second(self.parts) | numbers

    # --- lm-eval's own cache of answers ------------------------------------------------------------------------------

    @property
    def weight_by_task(self) -> bool:
        """Whether tasks of one run may have different weights."""
        return False

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Use lm-eval's cache of answers (`--use_cache`), in a table for this setting and weight alone."""
        super().set_cache_hook(cache_hook)
        if getattr(cache_hook, "dbdict", None) is not None and self.weight_by_task:
            log.warning(
                "--use_cache: answers are neither kept nor reused, because alpha depends on the task; give alpha= a "
                "number, or use scores=FOLDER, which serves every alpha"
            )
        with one_line_errors():
            self._use_own_answers()

    def _use_own_answers(self) -> None:
        cache = getattr(self.cache_hook, "dbdict", None)
        if cache is not None:
            answers.use_table(cache, None if self.weight_by_task else self._answer_setting())

    def _answer_setting(self) -> dict[str, Any]:
        """Everything that the answer to a text depends on."""
        given = {key: str(value) for key, value in self._given.items() if key not in ("batch_size", "max_batch_size")}
        return {
            "format": SCORES_FORMAT,
            "scores": self._setting,
            "given": given,
            "weight": self.weight,
            "windows": [self.context, self.stride],
            "max_length": self.max_length,
            "prefix": self.prefix_token_id,
            "tokenizer": tokens.whole_fingerprint(self.tokenizer),
        }

    def _check_tokenizer(self, requests: Sequence[Any]) -> None:
        """Check that the tasks of the requests counted tokens with the tokenizer of this model.

        Raises:
            ConfigError: A task's tokenizer gives other ids, or another EOS.
        """
        asked = {task.declared(request).tokenizer: request for request in requests}
        for key in asked.keys() - self._same_tokenizers:
            name, words = asked[key].task_name, task.tokenizer(task.declared(asked[key]).metadata)
            same = words.eos_token == self.tokenizer.eos_token
            try:
                tokens.check_same_ids(self.tokenizer, words, name)
            except ModelError:
                same = False
            if not same:
                own = {"tokenizer": self.tokenizer.name_or_path} if self._given.get("tokenizer") else {}
                raise ConfigError(
                    f"{name}: expected the model's tokenizer in the task, found that of {words.name_or_path}; give "
                    f"metadata={own or {'pretrained': self.base_name}}"
                )
            self._same_tokenizers.add(key)

    # --- scoring ----------------------------------------------------------------------------------------------------

    @property
    def _which(self) -> Which:
        """Models that run. With a score store both always run, so that it serves every weight later."""
        if self.system.weight is None:
            return "base"
        return "both" if self.store is not None or 0 < self.weight < 1 else "memory" if self.weight else "base"

    def _keep(self, key: bytes, scores: TokenScores) -> None:
        if self.store is not None:
            self.store.put(key, scores)

    def _known(self, key: bytes) -> TokenScores | None:
        return self.store.get(key) if self.store is not None else None

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether it is the greedy choice) of each continuation.

        As in `hf`, with three differences. Equal inputs run once. Logits are computed only from the first scored position
        of a batch on. Stored scores are reused.
        """
        items = [self._item(context, continuation) for _, context, continuation in requests]

        def score(missing: list[Item]) -> Iterator[tuple[bytes, TokenScores]]:
            families, others = self._families(missing)
            size = override_bs or (self._rows_at_once(families[0][0], families[0][1][0][2]) if families else 0)
            for _, same in groupby(families, key=lambda family: len(family[0])):  # so that nothing is padded
                for batch in _parts(same, size):
                    yield from self._score_families(batch, size)
            for rows in self._request_batches(others, override_bs):
                yield from self._score_batch(rows)

        found = self._scores(items, score, disable_tqdm)
        answers = []
        for (strings, _, _), (key, _, _) in zip(requests, items, strict=True):
            answer = float(found[key].log_p(self.weight).sum()), found[key].is_greedy(self.weight)
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
            answers.append(answer)
        return answers

    def _scores(
        self, items: list[AnyItem], score: Callable[[list[AnyItem]], Iterator[tuple[bytes, TokenScores]]], quiet: bool
    ) -> dict[bytes, TokenScores]:
        """Scores of items by key (their first entry); stored scores are reused, and equal items are scored once."""
        found: dict[bytes, TokenScores] = {}
        missing: dict[bytes, AnyItem] = {}
        for item in items:
            known = self._known(item[0])
            if known is None:
                missing[item[0]] = item
            else:
                found[item[0]] = known
        bar = tqdm(
            total=len(items),
            desc="score requests",
            unit="request",
            disable=quiet or self.rank != 0 or not missing,
            mininterval=2,
        )
        bar.update(len(items) - len(missing))
        for key, scores in score(list(missing.values())):
            found[key] = scores
            self._keep(key, scores)
            bar.update(1)
        bar.close()
        if self.store is not None:
            self.store.flush()
        return found

    def _item(self, context: list[int], continuation: list[int]) -> Item:
        """Key, input and labels of a request; the input is cut on the left to fit into the context.

        lm-eval gives an empty context where its text is only spaces, which go to the continuation.
        """
        context = context or [self.prefix_token_id]
        if not 0 < len(continuation) <= self.max_length:
            raise ConfigError(
                f"loglikelihood: expected a continuation of 1 to {self.max_length} tokens (positions of the models), found "
                f"{len(continuation)}; shorten it"
            )
        self.n_cut += len(context) + len(continuation) > self.max_length + 1
        whole = (context + continuation)[-(self.max_length + 1) :]
        labels = whole[-len(continuation) :]
        return request_key("pair", whole, [len(labels)]), whole[:-1], labels

    def _families(self, items: list[Item]) -> tuple[list[Family], list[Item]]:
        """Items that share a long context, longest first, and the other items.

        The models read the context of a family once and keep it in their cache. Two passes for one context take longer
        than one pass for all of its texts if these are short.
        """
        groups: dict[tuple[int, ...], list[Item]] = {}
        for item in items:
            groups.setdefault(_context(item), []).append(item)
        families, others = [], []
        for context, group in groups.items():
            longest = max(len(read) for _, read, _ in group)
            classes = {rope.lengths_class(self._configs, n) for n in (len(context), longest)}
            saved = (len({tuple(read) for _, read, _ in group}) - 1) * len(context)
            shares = saved >= _SAVED and len(classes) == 1 and self.model.reads_on
            families += [(context, group)] if shares else []
            others += [] if shares else group
        return sorted(families, key=lambda family: (-len(family[0]), family[0])), others

    @torch.no_grad()
    def _score_families(self, batch: list[Family], size: int) -> Iterator[tuple[bytes, TokenScores]]:
        """Scores of the items of families whose contexts have one length, from a cache of the contexts."""
        cache = self.model.new_cache()
        first = self._last(torch.tensor([context for context, _ in batch]), 1, cache)
        rows = [(number, item) for number, (_, items) in enumerate(batch) for item in items]
        for number, (key, _, scored) in rows:
            self.model.check_labels(scored)
            if len(scored) == 1:
                yield key, self._labelled([None if each is None else each[number] for each in first], scored)
        longer = sorted((row for row in rows if len(row[1][2]) > 1), key=lambda row: len(row[1][2]))
        most = max(1, _LOGITS // (len(longer[-1][1][2]) * self._n_logits)) if longer else 1
        for part in _parts(longer, min(size, most)):
            steps = len(part[-1][1][2]) - 1
            ids = torch.zeros(len(part), steps, dtype=torch.long)  # right padding changes no earlier logits
            for row, (_, (_, _, scored)) in zip(ids, part, strict=True):
                row[: len(scored) - 1] = torch.tensor(scored[:-1])
            numbers = torch.tensor([number for number, _ in part])
            after = self._last(ids, steps, self.model.taken(cache, numbers))
            for row, (number, (key, _, scored)) in enumerate(part):
                log_p = [
                    None if begin is None or rest is None else torch.cat([begin[number], rest[row, : len(scored) - 1]])
                    for begin, rest in zip(first, after, strict=True)
                ]
                yield key, self._labelled(log_p, scored)

    def _labelled(self, log_p: Sequence[torch.Tensor | None], scored: list[int]) -> TokenScores:
        base, memory = log_p
        return score_labels(base, memory, torch.tensor(scored, device=self.model.device))

    def _request_batches(self, items: list[Item], size: int | None) -> Iterator[list[list[Item]]]:
        """Batches of groups, longest inputs first; the items of a group have the same input but different labels.

        The inputs of a batch are of one length class (`memdec.models.rope`).
        """
        groups: dict[tuple[int, ...], list[Item]] = {}
        for item in items:
            groups.setdefault(tuple(item[1]), []).append(item)
        ordered = [groups[ids] for ids in sorted(groups, key=lambda ids: (-len(ids), ids))]
        if not ordered:
            return
        if size is None:
            size = self._rows_at_once(ordered[0][0][1], ordered[0][0][2])
        batch: list[list[Item]] = []
        for _, same in groupby(ordered, key=lambda group: rope.lengths_class(self._configs, len(group[0][1]))):
            for group in same:
                if batch and (
                    len(batch) == size or (len(batch) + 1) * _kept([*batch, group]) * self._n_logits > _LOGITS
                ):
                    yield batch
                    batch = []
                batch.append(group)
            yield batch
            batch = []

    def _rows_at_once(self, longest: Sequence[int], scored: Sequence[int]) -> int:
        """The batch size; "auto" finds it with the longest input."""
        size = self.batch_size
        return self._detect_batch_size([(None, list(longest), list(scored))]) if size == "auto" else int(size)

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        """As in `hf`, but without waiting for other processes: with stored scores, some have no requests."""
        processes, self._world_size = self._world_size, 1
        try:
            return int(super()._detect_batch_size(requests, pos))
        finally:
            self._world_size = processes

    @property
    def _n_logits(self) -> int:
        return len(self.tokenizer)

    @torch.no_grad()
    def _score_batch(self, batch: list[list[Item]]) -> Iterator[tuple[bytes, TokenScores]]:
        longest, keep = len(batch[0][0][1]), _kept(batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)  # right padding changes no earlier logits
        for row, group in zip(ids, batch, strict=True):
            row[: len(group[0][1])] = torch.tensor(group[0][1])
        base, memory = self._last(ids, keep)
        for row, group in enumerate(batch):
            for key, read, scored in group:
                self.model.check_labels(scored)
                span = slice(len(read) - len(scored) - (longest - keep), len(read) - (longest - keep))
                yield (
                    key,
                    self._labelled([None if each is None else each[row, span] for each in (base, memory)], scored),
                )

    def _last(
        self, ids: torch.Tensor, keep: int, cache: Any | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(log p_base, log p_mem) of the last positions of a batch, each (B, keep, V), after the text in a cache."""
        found: tuple[torch.Tensor | None, torch.Tensor | None]
        wide = torch.float32 if self.model.device.type == "mps" else torch.float64  # mps has no float64
        read = {} if cache is None else {"cache": cache}
        with self._precision():
            found = self.model.log_probs(ids, which=self._which, logits_to_keep=keep, dtype=wide, **read)
        return found

    def _precision(self) -> AbstractContextManager[Any]:
        """The context of `mixed_precision_dtype`, as `hf` has it."""
        dtype = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    # --- probabilities of next words --------------------------------------------------------------------------------

    @one_line_errors()
    def label_word_probs(self, requests: list[Any], disable_tqdm: bool = False) -> list[list[float]]:
        """log-probability (nats) of each word as the next token; requests are (context, words, limit).

        A word must be one token, including its leading space; a context ends without a space. Each context is read once
        for all its requests and words. It is cut on the left to `limit` tokens, or to the context of the models.

        Raises:
            ConfigError: A word is not one token.
        """
        self._check_tokenizer(requests)
        ids = {words: self._word_ids(words) for words in {request.args[1] for request in requests}}
        contexts: dict[str, tuple[int, ...]] = {}
        items = []
        for request in requests:
            context, words, limit = request.args
            limit = min(limit, self.max_length)
            if context not in contexts:
                contexts[context] = tuple(self.tok_encode(context) or [self.prefix_token_id])
            self.n_cut += len(contexts[context]) > limit
            read = contexts[context][-limit:]
            items.append((request_key("words", read, ids[words]), read, ids[words]))
        found = self._scores(items, self._score_words, disable_tqdm)
        answers = {key: scores.log_p(self.weight).tolist() for key, scores in found.items()}
        return [answers[key] for key, _, _ in items]

    def _word_ids(self, words: tuple[str, ...]) -> torch.Tensor:
        rows = tokens.behind(self.tokenizer, words)
        for word, ids in zip(words, rows, strict=True):
            if len(ids) != 1:
                raise ConfigError(
                    f"label_word_probs: expected words of one token, found {word!r} of {len(ids)}; the task has another "
                    "tokenizer than the model: give it with --metadata '{\"tokenizer\": ...}'"
                )
        return torch.tensor([ids[0] for ids in rows])

    @torch.no_grad()
    def _score_words(self, items: list[WordItem]) -> Iterator[tuple[bytes, TokenScores]]:
        """Score batches of inputs of equal length: there is no padding, and logits exist only for the last position."""
        groups: dict[tuple[int, ...], list[WordItem]] = {}
        for item in items:
            groups.setdefault(item[1], []).append(item)
        ordered = sorted(groups, key=lambda read: (-len(read), read))
        if not ordered:
            return
        size = min(self._rows_at_once(ordered[0], [0]), max(1, _LOGITS // self._n_logits))
        for _, same in groupby(ordered, key=len):
            rows = list(same)
            for first in range(0, len(rows), size):
                batch = rows[first : first + size]
                log_p = self._last(torch.tensor(batch), 1)
                for row, read in enumerate(batch):
                    base, memory = (None if each is None else each[row, -1] for each in log_p)
                    for key, _, words in groups[read]:
                        self.model.check_labels(words)
                        yield key, score_words(base, memory, words)

    # --- rolling log-likelihood -----------------------------------------------------------------------------------

    def token_scores(self, text: str, *, disable_tqdm: bool = False) -> TokenScores:
        """Scores of every token of a text, from the store or from the models, with sliding windows (`windows`)."""
        stream = self.stream(text)
        scores = self._known(self._stream_key(stream))
        if scores is None:
            size = self.batch_size_per_gpu if isinstance(self.batch_size_per_gpu, int) else 8
            parts = windows(len(stream), self.context, self.stride)
            quiet = disable_tqdm or self.rank != 0
            self.model.check_labels(stream)
            with self._precision():
                scores = score_stream(
                    self.model, stream, parts, self.prefix_token_id, which=self._which, batch_size=size, quiet=quiet
                )
            self.keep(stream, scores)
        return scores

    def stream(self, text: str) -> NDArray[np.int64]:
        """The token ids of a text.

        Raises:
            ConfigError: It has no token.
        """
        stream = np.asarray(self.tokenizer.encode(text, add_special_tokens=False, verbose=False), dtype=np.int64)
        if not len(stream):
            raise ConfigError("loglikelihood_rolling: expected a text with at least one token, found an empty one")
        return stream

    def keep(self, stream: NDArray[np.int64], scores: TokenScores) -> None:
        """Put the scores of a token stream into the score store, if there is one."""
        self._keep(self._stream_key(stream), scores)
        if self.store is not None:
            self.store.flush()

    def _stream_key(self, stream: NDArray[np.int64]) -> bytes:
        return request_key("rolling", stream, [self.context, self.stride, self.prefix_token_id])

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As in `hf`, but only the tokens of the context that can be read; the options of one prompt share them.

        lm-eval holds those of all requests at once, at 36 bytes a token.
        """
        read, continued = super()._encode_pair(context, continuation)
        read = read[-(self.max_length + 1) :]
        self._read = self._read if read == self._read else read
        return self._read, continued

    @one_line_errors()
    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As in `hf`."""
        self._check_tokenizer(requests)
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return found

    def tok_encode(self, string: Any, *args: Any, **kwargs: Any) -> list[int]:
        """As in `hf`; the last texts are remembered.

        A context comes again with each of its continuations, and a tuning split with each alpha.
        """
        ids: list[int]
        if not isinstance(string, str):
            ids = super().tok_encode(string, *args, **kwargs)
            return ids
        key = string, args, tuple(kwargs.items())
        if key not in self._encoded:
            ids = super().tok_encode(string, *args, **kwargs)
            self._encoded[key] = ids
            self._n_encoded += len(ids)
            while self._n_encoded > _REMEMBERED and len(self._encoded) > 1:
                self._n_encoded -= len(self._encoded.pop(next(iter(self._encoded))))
        return list(self._encoded[key])

    @one_line_errors()
    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Total log-probability (nats) of each text under the mixture; every token is scored exactly once."""
        self._check_tokenizer(requests)
        results: list[float] = []
        for request in requests:
            (text,) = request.args
            total = self._window_sum(text, self.token_scores(text, disable_tqdm=disable_tqdm).log_p(self.weight))
            results.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return results

    def _window_sum(self, text: str, log_p: NDArray[np.float64]) -> WindowSum:
        """The total of a text, with that of each window, for the task to log."""
        parts = windows(len(log_p), self.context, self.stride)
        encoding = self.tokenizer(text, add_special_tokens=False, verbose=False)
        spans: list[Any] = [encoding.token_to_chars(part.first) for part in parts] if self.tokenizer.is_fast else [None]
        total = WindowSum(log_p.sum())
        total.windows = {
            "context": self.context,
            "stride": self.stride,
            "ids": request_key("ids", encoding["input_ids"]).hex(),
            "log_p": np.add.reduceat(log_p, [part.first for part in parts]).tolist(),
            "tokens": [part.n_scored for part in parts],
            "begins": None if None in spans else [span.start for span in spans],
        }
        return total

    @one_line_errors()
    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As in `hf`: greedy or sampled text from the mixture; prompts are cut on the left to fit.

        Prompts share a batch only if they are of one length class up to their last new token, and all or none begin with
        BOS.
        """
        groups: dict[Any, list[int]] = {}
        requests = list(requests)
        for number, request in enumerate(requests):
            prompt, settings = request.args
            ids = self.tok_encode(prompt)
            if not ids:  # a row of padding alone would depend on its batch
                prompt, ids = self.tokenizer.decode(self.prefix_token_id), [self.prefix_token_id]
                requests[number] = replace(request, arguments=(prompt, settings))
            n_new = normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
            if n_new >= self.max_length:
                raise ConfigError(
                    f"generate_until: expected fewer than {self.max_length} new tokens (positions of the models), found "
                    f"{n_new}; set max_gen_toks"
                )
            n, room = len(ids), self.max_length - n_new
            self.n_cut += n > room
            # `hf` asks the first prompt of a batch alone whether it begins with BOS, which is then added to none.
            begins = has_bos_prefix(prompt, self.tokenizer.bos_token)
            groups.setdefault((begins, rope.padded_class(self._configs, min(n, room), n_new)), []).append(number)
        texts: dict[int, str] = {}
        for numbers in groups.values():
            found = super().generate_until([requests[number] for number in numbers], disable_tqdm)
            texts.update(zip(numbers, found, strict=True))
        return [texts[number] for number in range(len(requests))]

    def set_weight(self, weight: float) -> None:
        """Set the weight of the second distribution.

        Raises:
            ConfigError: It is not a number from 0 to 1, or the system has no second distribution.
        """
        if weight and self.system.weight is None:
            raise ConfigError(f"{self.system.name}: expected no weight, found {weight}: nothing is mixed")
        self.weight = weighing.check_weight(weight)
        if self._load_base is None:
            self._model.set_weight(self.weight)
        self._use_own_answers()

    def get_model_info(self) -> dict[str, Any]:
        """Information about the model for the results file; the weight is named `alpha` or `lambda`."""
        loaded = super().get_model_info() if self._load_base is None else {}
        named = {name: self.parts.of(name) for name in self.system.needs if name != "base"}
        folders = {
            key: [str(each) for each in value] if isinstance(value, tuple) else str(value)
            for key, value in named.items()
        }
        weight = {} if self.system.weight is None else {self.system.weight: self.weight}
        return {
            **loaded,
            "pretrained": self.base_name,
            **folders,
            **self.system.numbers(self.parts),
            **weight,
            "context": self.context,
            "stride": self.stride,
            "requests_cut": self.n_cut,
        }

    # --- errors ---------------------------------------------------------------------------------------------------

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "WrappedLM":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "WrappedLM":
        with one_line_errors():
            arguments.check(cls, cls.name, arg_dict, additional_config)
            with outside(ConfigError, cls.name, "arguments that `hf` takes", "correct --model_args"):
                model: WrappedLM = super().create_from_arg_obj(arg_dict, additional_config)
            return model


def _in_subfolder(base: str, kwargs: dict[str, Any]) -> str:
    """The base's folder; a local `subfolder` is part of it, and a tokenizer is read from its own, as in `hf`."""
    if not kwargs.get("subfolder") or not Path(base).is_dir():
        return base
    inner = kwargs.pop("subfolder")
    if isinstance(words := kwargs.get("tokenizer"), str) and Path(words, inner).is_dir():
        kwargs["tokenizer"] = str(Path(words, inner))
    return str(Path(base, inner))


def _loading(name: str) -> AbstractContextManager[None]:
    return sources.reading(name, "a causal LM")


def _parts(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive lists of at most `size` values."""
    left = iter(values)
    while part := list(islice(left, size)):
        yield part


def _context(item: Item) -> tuple[int, ...]:
    """The tokens of an input up to the first one that is scored."""
    _, read, scored = item
    return tuple(read[: len(read) - len(scored) + 1])


def _kept(batch: list[list[Item]]) -> int:
    """Number of positions from the first scored one of a batch to the end of its longest input."""
    longest = max(len(group[0][1]) for group in batch)
    return longest - min(len(read) - len(scored) for group in batch for _, read, scored in group)
