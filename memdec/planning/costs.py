"""What one job costs: a formula for each rule, from the sizes of its model and text, its settings, and measured rates.

    P   parameters            V   vocabulary           n   tokens of the split that is read
    D   width                 T   context              N   keys
    L   layers                S   stride               k   neighbours

A forward pass costs 2 P + 4 T D L FLOPs a token, and a training step three times as much (Kaplan et al. 2020, arXiv
2001.08361; PaLM, arXiv 2204.02311, appendix B). Reading a text in windows of T by steps of S takes n T / S tokens. The
first line of each formula's docstring is what `memdec plan` prints.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

from memdec.artefacts.sources import is_gguf
from memdec.config import Config, ForModel, Memory
from memdec.errors import ConfigError
from memdec.inference.systems import SYSTEMS
from memdec.planning.rates import Machine, Rates
from memdec.planning.sizes import Sizes
from memdec.results import catalogue, figure_catalogue
from memdec.results.layout import Table
from memdec.settings import NPROBE, UNTUNED, DocstringCorpus, HubCorpus, IndexSettings, Shape, TrainSettings
from memdec.tasks import needed

DISTINCT = 0.23  # distinct next tokens among k neighbours, as a part of k: those of k = 1,024 in the scale `mini`
ROWS, PROMPTS, PROMPT = 2000, 8, 100  # of a task without a limit: rows; texts of a row, and tokens of a text
SECONDS_OF_PACKAGES = 4.0  # to find and parse the docstrings of a package
SECONDS_OF_SCORE, SECONDS_OF_WINDOW = 5e-8, 1e-4  # to mix a token's scores; for the interval and two tests of a window
BYTES_OF_SCORE, BYTES_OF_WINDOW = 48, 32
BYTES_TRAINED, BYTES_FROZEN = 16, 4  # of a weight: float32 with gradient and AdamW's two sums; float32 alone
BYTES_OF_ACTIVATIONS = 34  # of a position, layer and unit of width (Korthikanti et al. 2022, arXiv 2205.05198)


class Job(NamedTuple):
    """One job of the workflow: its rule and wildcards, and the place of its shard."""

    rule: str
    wildcards: Mapping[str, str]


@dataclass(frozen=True)
class Cost:
    """Cost of one job; bytes and seconds. `seconds` are those of a processor core, or of `gpus` GPUs where it uses any."""

    seconds: float
    memory: float
    disk: float = 0.0  # what it leaves
    gpu_memory: float = 0.0  # of each GPU
    download: float = 0.0
    gpus: int = 0
    reads: float = 0.0  # of artefacts, which a node without a shared folder has to copy first


class Costs:
    """Costs of the jobs of a config.

    Args:
        config: The config of the run.
        machine: Rates.
        run: Folder of the scale, `results/<scale>`; what is there already is read.
        gpu: Whether jobs that run a model run on a GPU.
    """

    def __init__(self, config: Config, machine: Machine, run: Path, *, gpu: bool) -> None:
        self.config, self.machine, self.gpu = config, machine, gpu
        self.sizes = Sizes(config, run)
        self.studies = config.every_study()
        self.for_model = cache(lambda study, model: self.studies[study].for_model(model))

    def of(self, job: Job) -> Cost:
        """Cost of a job.

        Raises:
            UnknownSizeError: It depends on a model or text whose size nothing says.
        """
        return FORMULAS.get(job.rule, _light)(_Formulas(self, job.wildcards))


class _Formulas:
    """The formulas, for the wildcards of one job."""

    def __init__(self, costs: Costs, wildcards: Mapping[str, str]) -> None:
        self.costs, self.sizes, self.config, self.w = costs, costs.sizes, costs.config, wildcards
        self.rates = costs.machine.on(costs.gpu)

    # --- what a job is about ---

    @cached_property
    def study(self) -> Config:
        return self.costs.studies[os.path.dirname(self.w["home"]) or None]

    def _for_model(self, name: str) -> Config:
        return self.costs.for_model(os.path.dirname(self.w["home"]) or None, name)

    @property
    def cpu(self) -> Rates:
        """Rates of the processors."""
        return self.costs.machine.cpu

    @property
    def domain(self) -> str:
        return os.path.basename(self.w["home"])

    @cached_property
    def memory(self) -> Memory:
        """The memory of a job; studies that share it give it one home, so the first that has it says what it is."""
        named = [self.study, *self.costs.studies.values()]
        return next(each.variant(self.w["memory"]) for each in named if self.w["memory"] in each.memory_names)

    @property
    def memory_model(self) -> str:
        """The model with the shape of the memory of a job: what it starts from, or what is taken in its place."""
        found = self.memory
        return found.ready.get(self.domain, found.memory_model)

    @cached_property
    def key(self) -> str:
        """The model that makes the keys."""
        return self.w["key"].removesuffix(UNTUNED) if "key" in self.w else self.memory.key_model

    def _tokens(self, model: str, *splits: str) -> float:
        return self.sizes.n_tokens(model, self.domain, *splits)  # type: ignore[arg-type]

    def _part(self) -> float:
        """The part of a stage that a shard is."""
        return 1 / int(self.w["scatteritem"].split("-of-")[1]) if "scatteritem" in self.w else 1.0

    def _forward(self, shape: Shape) -> float:
        """FLOPs of a forward pass, a token."""
        return 2 * shape.parameters + 4 * self.config.context * shape.width * shape.layers

    @property
    def _windows(self) -> float:
        """Tokens that a model reads for each token that is scored."""
        return self.config.context / self.config.stride

    def _bytes(self) -> int:
        """Bytes of a weight in a forward pass."""
        return 2 if self.costs.gpu else 4

    def _placed(self, cpu: float, weights: float, model: str, *, launched: bool = False, **more: float) -> Cost:
        """A cost whose memory is that of the GPUs, where there are any: weights in shares, and the rest on each.

        `torchrun` gives every GPU all weights. Each of its processes, and of those that shard a model, loads them in host
        memory first: `loaded` bytes (default: `weights`). What a search holds is in host memory, too: `host` bytes.
        """
        gpus = self.config.gpus(model, launched=launched) if self.costs.gpu else 0
        process = self.rates.process
        seconds, reads = more["seconds"], weights + more.get("reads", 0.0)
        if not gpus:
            return Cost(seconds, process + weights + cpu, more.get("disk", 0.0), reads=reads)
        copied = launched and self.config.per_model.get(model, ForModel()).launch == "torchrun"
        held = weights if copied else weights / gpus
        several = launched and gpus > 1
        memory = gpus * (process + more.get("loaded", weights)) if several else process + weights / gpus
        return Cost(
            self.rates.start + (seconds - self.rates.start) / (gpus if launched else 1),
            memory + more.get("host", 0.0),
            more.get("disk", 0.0),
            held + cpu,
            gpus=gpus,
            reads=reads,
        )

    # --- texts ---

    def corpus(self) -> Cost:
        """bytes / (rate of text), and 4 s for each package with docstrings; memory: 10 bytes a byte where we split it"""
        spec, cpu = self.config.corpora[self.w["corpus"]], self.cpu
        n = self.sizes.n_bytes(self.w["corpus"])
        packages = len(spec.packages) if isinstance(spec, DocstringCorpus) else 0
        seconds = cpu.light + n / cpu.text + SECONDS_OF_PACKAGES * packages
        download = n / 3 if isinstance(spec, HubCorpus) and not os.path.isdir(spec.path) else 0.0
        return Cost(seconds, cpu.process / 3 + 10 * n, n, download=download)

    def tokenizer(self) -> Cost:
        """train bytes / (rate of text)"""
        spec, cpu = self.config.tokenizers[self.w["tokenizer"]], self.cpu
        n = sum(self.sizes.n_bytes(name, "train") for name in spec.train_on or [])
        return Cost(cpu.light + n / cpu.text, cpu.process / 2 + 10 * n, 1e5)

    def tokens(self) -> Cost:
        """start + bytes / (rate of text); memory: the text and 34 bytes a token"""
        cpu, vocabulary = self.cpu, self.sizes.vocabulary(self.w["tokenizer"])
        model = next(name for name, each in self.config.models.items() if each.tokenizer == self.w["tokenizer"])
        n, n_tokens = self.sizes.n_bytes(self.w["corpus"]), self.sizes.n_tokens(model, self.w["corpus"])
        width = 2 if vocabulary < 2**16 else 4
        return Cost(cpu.start / 2 + n / cpu.text, cpu.process * 0.8 + n + 34 * n_tokens, width * n_tokens)

    def passages(self) -> Cost:
        """start + bytes / (rate of text)"""
        cpu = self.cpu
        n = self.sizes.n_bytes(self.w["domain"], "train")
        return Cost(cpu.start / 2 + n / cpu.text, cpu.process + 10 * n, 2 * n)

    # --- models ---

    def model(self) -> Cost:
        """a model from scratch: its training; a pretrained one: reading, and the download of 2 bytes a parameter"""
        name = self.w["model"]
        spec, shape = self.config.models[name], self.sizes.shape(name)
        if spec.pretrained is None and spec.train is not None and spec.corpus is not None:
            n = [self.sizes.n_tokens(name, spec.corpus, split) for split in ("train", "valid")]
            return self._training(name, spec.train, n[0], n[1])
        there = isinstance(spec.pretrained, str) and os.path.exists(spec.pretrained)
        copied = spec.layers is not None or (spec.pretrained is not None and is_gguf(spec.pretrained))
        size = 2 * shape.parameters
        rates = self.cpu
        return Cost(
            rates.start,
            rates.process + (4 * shape.parameters if copied else 0),
            4 * shape.parameters if copied else 0.0,  # float32
            download=0.0 if there else size,
        )

    def finetune(self) -> Cost:
        """start + epochs (1 + trials) n 3 (2 P + 4 T D L) / rate, and an evaluation on valid after each epoch"""
        name = self.w["model"]
        settings = self._for_model(name).finetune
        return self._training(name, settings, self._tokens(name, "train"), self._tokens(name, "valid"), tuned=True)

    def dapt(self) -> Cost:
        """as finetune, within the FLOP budget"""
        name = self.w["model"]
        config = self._for_model(name)
        n = self._tokens(name, "train"), self._tokens(name, "valid")
        return self._training(name, config.dapt or config.finetune, *n, tuned=True, share=1.0)

    def lora(self) -> Cost:
        """as finetune, with 4 P for the frozen weights and 6 for each of the adapter, within the FLOP budget"""
        name = self.w["model"]
        settings = self._for_model(name).lora
        if settings.rank is None:
            adapter = self.sizes.shape(self.study.memory_model).parameters
        else:
            shape = self.sizes.shape(name)
            adapter = settings.rank * shape.layers * 20 * shape.width  # query, key, value, two of the MLP with 4 D
        n = self._tokens(name, "train"), self._tokens(name, "valid")
        return self._training(name, settings, *n, tuned=True, share=1.0, adapter=adapter)

    def train(self) -> Cost:
        """as finetune, within the share of the FLOP budget; the mixtures with the bases that watch it are evaluated"""
        found = self.memory
        n = self._tokens(found.memory_model, "train"), self._tokens(found.memory_model, "valid")
        cost = self._training(found.memory_model, found.train, *n, tuned=True, share=found.share)
        rows = n[0] * self._row(self.sizes.shape(found.memory_model))
        cost = replace(cost, reads=cost.reads + rows * (found.targets != "none"))
        bases = [self.sizes.shape(name) for name in found.watched]
        watched = sum(n[1] * self._forward(shape) / self.rates.at("score", shape.width) for shape in bases)
        return _more(cost, watched)

    def adapt(self) -> Cost:
        """start; two models in memory"""
        shape = self.sizes.shape(self.memory.memory_model)
        rates = self.cpu
        return Cost(rates.start, rates.process + 8 * shape.parameters, 4 * shape.parameters)

    def _training(
        self, name: str, settings: TrainSettings, n: float, n_valid: float, tuned: bool = False,
        share: float | None = None, adapter: float | None = None,
    ) -> Cost:  # fmt: skip
        """Cost of a training on n tokens; `share` of the FLOP budget limits it (None: no budget), `adapter` counts LoRA's weights."""
        shape = self.sizes.shape(name)
        attention = 4 * self.config.context * shape.width * shape.layers
        weights = 6 * shape.parameters if adapter is None else 4 * shape.parameters + 6 * adapter
        step = weights + 3 * attention
        epochs, limit = settings.epochs, self.study.budget if share is not None else None
        if limit is not None:
            most = self.sizes.shape(limit.model)
            ceiling = limit.epochs * (6 * most.parameters + 3 * 4 * self.config.context * most.width * most.layers)
            epochs = min(epochs, ceiling * (share or 1.0) / step)
        first = not tuned or int(self.w["seed"]) == self.study.seeds[0]
        epochs *= 1 + settings.trial * len(settings.learning_rates) * first
        every = settings.evaluate_every or (1.0 if settings.keep_best else epochs)
        rate = self.rates.at("train", shape.width)
        scoring = n_valid * epochs / every * self._forward(shape) / self.rates.at("score", shape.width)
        seconds = self.rates.start + epochs * n * step / rate + scoring
        positions = settings.batch_size * self.config.context
        layers = 2 if settings.gradient_checkpointing else BYTES_OF_ACTIVATIONS * (1 if self.costs.gpu else 2)
        activations = positions * shape.layers * shape.width * layers
        if settings.gradient_checkpointing:  # one layer at a time is made again
            activations += positions * shape.width * BYTES_OF_ACTIVATIONS
        held = BYTES_TRAINED * shape.parameters
        if adapter is not None:
            held = BYTES_FROZEN * shape.parameters + BYTES_TRAINED * adapter
        kept = 4 * (shape.parameters if adapter is None else adapter)
        loaded = 4 * shape.parameters
        return self._placed(activations, held, name, launched=True, seconds=seconds, disk=kept, loaded=loaded)

    # --- keys and targets ---

    def datastore(self) -> Cost:
        """start + (N T / S) (2 P + 4 T D L) / rate; disk: N D bytes of a number, if keys are stored"""
        settings, shape = self.study.datastore, self.sizes.shape(self.key)
        n = self._tokens(self.key, settings.split) * self._part()
        size = self._keys_size(n, shape)
        seconds = self.rates.start + (self._reading(n, shape) if settings.stored else 0.0)
        held = settings.batch_size * self.config.context * shape.width * 40.0
        return self._placed(held, self._bytes() * shape.parameters, self.key, launched=True, seconds=seconds, disk=size)

    def index(self) -> Cost:
        """start + sample x centroids x rounds and N x centroids distances, and the queries that check it"""
        shape, n = self.sizes.shape(self.key), self._tokens(self.key, self.study.datastore.split)
        settings = self.study.index.for_size(int(n))
        rate, cells = self.rates.at("search", shape.width), settings.centroids if settings.has_cells else 0
        rounds, most = settings.training
        sample = min(most, n)
        work = (rounds * sample + n) * cells * 2 * shape.width / self.rates.at("score", shape.width)
        checks = settings.check_queries * n * 2 * shape.width / rate if settings.has_cells else 0.0
        size = {
            "exact": 0.0,
            "cells": 8 * n,
            "ivfflat": n * (shape.width * 2 + 8),
            "ivfpq": n * (settings.code_size + 8),
        }[settings.kind] + 4 * cells * shape.width
        held = sample * shape.width * 8 * settings.has_cells + (size if settings.kind != "cells" else 0)
        return self._search_cost(work + checks + self._again(n, shape), held, size)

    def calibrate(self) -> Cost:
        """start + searches for positions of train and valid, and k neighbours for each k and tau tried"""
        settings, shape = self.study.calibrate, self.sizes.shape(self.key)
        if settings is None:
            return _light(self)
        n, valid = self._tokens(self.key, "train"), self._tokens(self.key, "valid")
        queries = min(settings.most, n) + min(settings.most, valid)
        grid = queries * sum(settings.neighbours) * len(settings.temperatures) / self.rates.gather
        found = self._search(queries, n, shape, max(settings.neighbours))
        rows = queries * max(settings.neighbours) * 12.0 + self._searched(n, shape)
        return self._search_cost(found + grid + self._reading(queries, shape), rows, 1e4, reads=True)

    def targets(self) -> Cost:
        """start + (queries x keys compared) 2 D / (rate of search) + queries k / (rate of neighbours)"""
        settings, shape = self.study.targets, self.sizes.shape(self.key)
        n = self._tokens(self.key, self.study.datastore.split)
        queries, k = n * self._part(), self._k
        seconds = self._search(queries, n, shape, k) + self._again(queries, shape)
        held = settings.batch_size * k * 24.0 + self._searched(n, shape)
        return self._search_cost(seconds, held, queries * self._row(shape))

    def teacher(self) -> Cost:
        """start + (n T / S) (2 P + 4 T D L) / rate"""
        settings, shape = self.study.teacher, self.sizes.shape(self.key)
        n = self._tokens(self.key, "train") * self._part()
        size = n * _row_bytes(settings.top, settings.dtype, shape)
        seconds = self.rates.start + self._reading(n, shape)
        held = self._logits(settings.batch_size, shape)
        return self._placed(held, self._bytes() * shape.parameters, self.key, seconds=seconds, disk=size)

    @property
    def _k(self) -> int:
        """Neighbours of the targets; where they are chosen on valid, the most that may be."""
        chosen = self.study.calibrate
        return self.study.targets.neighbours if chosen is None else max(chosen.neighbours)

    def _row(self, shape: Shape) -> float:
        """Bytes of a row of the targets; where `top` is chosen on valid, it may be all tokens."""
        settings = self.study.targets
        kept = (settings.top if self.study.calibrate is None else None) or DISTINCT * self._k
        return _row_bytes(kept, settings.dtype, shape)

    def _reading(self, n: float, shape: Shape) -> float:
        """Seconds of forward passes over n scored tokens."""
        return n * self._windows * self._forward(shape) / self.rates.at("score", shape.width)

    def _again(self, n: float, shape: Shape) -> float:
        """Seconds to make n keys again, where they are not stored."""
        return 0.0 if self.study.datastore.stored else self._reading(n, shape)

    def _search(self, queries: float, n: float, shape: Shape, k: int) -> float:
        """Seconds of a search of k neighbours among n keys."""
        index = self.study.index
        compared = _compared(index, self.study.targets.nprobe or NPROBE, n)
        return (
            queries * compared * 2 * shape.width / self.rates.at("search", shape.width)
            + queries * k / self.rates.gather
        )

    def _searched(self, n: float, shape: Shape) -> float:
        """Bytes of an index of n keys while it is searched; the other kinds read their keys from disk."""
        index = self.study.index
        return n * {"ivfflat": shape.width * 2.0, "ivfpq": index.code_size + 8.0}.get(index.kind, 0.0)

    def _search_cost(self, seconds: float, held: float, disk: float, reads: bool = False) -> Cost:
        """What is held is filled in host memory and copied to a GPU. `reads`: the key model runs, as for streamed keys."""
        shape = self.sizes.shape(self.key)
        keys = self._keys_size(self._tokens(self.key, self.study.datastore.split), shape)
        weights = self._bytes() * shape.parameters if reads or not self.study.datastore.stored else 0.0
        seconds += self.rates.start
        return self._placed(held, weights, self.key, seconds=seconds, disk=disk, reads=keys, host=held)

    def _keys_size(self, n: float, shape: Shape) -> float:
        """Bytes of n stored keys."""
        settings = self.study.datastore
        return n * shape.width * (4 if settings.dtype == "float32" else 2) if settings.stored else 0.0

    def _logits(self, batch: int, shape: Shape) -> float:
        """Bytes of the log-probabilities of a batch, in float32 and once more as they are worked on."""
        return 8.0 * batch * self.config.stride * shape.vocabulary

    # --- evaluations ---

    def score(self) -> Cost:
        """start + ((valid + test) T / S) (2 P + 4 T D L) / rate, for the memory alone"""
        found = self.memory
        if found.neighbours:
            n = self._tokens(found.key_model, "valid", "test")
            shape, keys = self.sizes.shape(found.key_model), self._tokens(found.key_model, "train")
            seconds = self._reading(n, shape) + self._search(n, keys, shape, self.study.evaluate.neighbours)
            held, weights = self._searched(keys, shape), self._bytes() * shape.parameters
            seconds += self.rates.start
            return self._placed(held, weights, self.key, seconds=seconds, disk=12 * n, host=held)
        shape = self.sizes.shape(self.memory_model)
        n = self._tokens(self.memory_model, "valid", "test")
        return self._evaluated(self.memory_model, shape, n)

    def evaluate_systems(self) -> Cost:
        """start + ((valid + test) T / S) (2 P + 4 T D L) / rate; In-Context RAG reads T tokens every 4; kNN-LM searches"""
        name = self.w["model"]
        shape, n = self.sizes.shape(name), self._tokens(name, "valid", "test")
        cost = self._evaluated(name, shape, n)
        settings = self._for_model(name).evaluate
        if self.w["system"] == SYSTEMS["In-Context RAG"].slug:
            again = n / settings.every * self.config.context - n * self._windows
            return _more(cost, again * self._forward(shape) / self.rates.at("score", shape.width))
        if self.w["system"] == SYSTEMS["kNN-LM"].slug:
            keys = self._tokens(name, "train")
            grid = n * settings.neighbours * len(settings.temperatures) / self.rates.gather
            found = _more(cost, self._search(n, keys, shape, settings.neighbours) + grid)
            held = self._searched(keys, shape)
            return replace(
                found, memory=found.memory + held, gpu_memory=found.gpu_memory + (held if found.gpus else 0.0)
            )
        return cost

    def evaluate(self) -> Cost:
        """arithmetic on the scores of both"""
        cpu = self.cpu
        return Cost(cpu.light, cpu.process / 5, 12 * self._tokens(self.w["model"], "valid", "test"))

    def _evaluated(self, name: str, shape: Shape, n: float) -> Cost:
        batch = self._for_model(name).evaluate.batch_size
        seconds = self.rates.start + self._reading(n, shape)
        held = self._logits(batch, shape)
        return self._placed(held, self._bytes() * shape.parameters, name, seconds=seconds, disk=12 * n)

    def harness(self) -> Cost:
        """2 starts + rows x 8 texts x 100 tokens x (2 P + 4 T D L) / rate, for the base and the memory"""
        suite, name = self.config.suites[self.w["suite"]], self.w["model"]
        rows = (suite.limit or ROWS) * len(needed.leaves(suite.tasks))
        shapes = [self.sizes.shape(name)]
        if "memory" in self.w and not self.memory.neighbours:
            shapes.append(self.sizes.shape(self.memory_model))
        work = sum(self._forward(shape) / self.rates.at("score", shape.width) for shape in shapes)
        seconds = 2 * self.rates.start + rows * PROMPTS * min(PROMPT, self.config.context) * work
        held = 8.0 * suite.batch_size * PROMPT * shapes[0].vocabulary * len(shapes)
        weights = self._bytes() * sum(shape.parameters for shape in shapes)
        return self._placed(held, weights, name, seconds=seconds, disk=2000.0 * rows)

    def compared(self) -> Cost:
        """start + forward passes of the memory and its key model over a sample of the targets"""
        found = self.memory
        shapes = [self.sizes.shape(self.memory_model), self.sizes.shape(found.key_model)]
        n = min(self.study.shapes.most, self._tokens(found.key_model, "train"))
        seconds = self.rates.start + sum(self._reading(n, shape) for shape in shapes)
        weights = self._bytes() * sum(shape.parameters for shape in shapes)
        held = 2 * self._logits(self.study.shapes.batch_size, shapes[0])
        return self._placed(held, weights, found.key_model, seconds=seconds, disk=1e5)

    def latency(self) -> Cost:
        """start + rounds x (prompt and new tokens) of every system, one token at a time"""
        settings, shape = self.study.latency, self.sizes.shape(self.w["model"])
        tokens = (settings.repeats + settings.warmup) * (settings.prompt_tokens + sum(settings.new_tokens)) * 6
        seconds = self.rates.start + tokens * (0.002 + self._forward(shape) / self.rates.at("score", shape.width))
        return self._placed(0.0, 2 * self._bytes() * shape.parameters, self.w["model"], seconds=seconds, disk=1e5)

    # --- tables ---

    def table(self) -> Cost:
        """5e-8 s a token and 1e-4 s a window of every evaluation; memory: 48 bytes a token of the longest text, 32 a window"""
        evaluations = [part for made in self._made() for part in made.parts if part.kind == "evaluation"]
        n = [self.sizes.n_tokens(part.model, part.domain, "test") for part in evaluations]
        windows, cpu = sum(n) / self.config.stride, self.cpu
        seconds = cpu.light + SECONDS_OF_SCORE * sum(n) + SECONDS_OF_WINDOW * windows
        process = cpu.process if self.w.get("table") == "table6" else cpu.process / 2  # Table 6 alone imports torch
        scores = BYTES_OF_SCORE * max(n, default=0) if self.w else 0  # claims and report read windows of all tables
        return Cost(seconds, process + scores + BYTES_OF_WINDOW * windows, 1e5)

    def _made(self) -> Iterator[Table | figure_catalogue.Figure]:
        """The table or figure of a job; without one, every table that the config can fill."""
        if "figure" in self.w:
            yield figure_catalogue.figure(self.config, self.w["figure"])
            return
        for name in [self.w["table"]] if self.w else catalogue.TABLES:
            with nullcontext() if self.w else suppress(ConfigError):
                yield catalogue.table(self.config, name)


def _compared(index: IndexSettings, nprobe: int, n: float) -> float:
    """Keys that a query is compared with, in distances to whole keys."""
    index = index.for_size(int(n))
    if not index.has_cells:
        return n
    probed = n * min(nprobe, index.centroids) / index.centroids
    return index.centroids + probed


def _row_bytes(kept: float, dtype: str, shape: Shape) -> float:
    """Bytes of a sparse row: its place, and a token and a probability for each entry."""
    token = 2 if shape.vocabulary < 2**16 else 4
    return 8 + min(kept, shape.vocabulary) * (token + (2 if dtype == "float16" else 4))


def _more(cost: Cost, seconds: float) -> Cost:
    return replace(cost, seconds=cost.seconds + seconds)


def _light(job: _Formulas) -> Cost:
    """a process without torch"""
    return Cost(job.cpu.light, job.cpu.process / 3, 1e5)


FORMULAS: dict[str, Callable[[_Formulas], Cost]] = {
    "corpus": _Formulas.corpus,
    "tokenizer": _Formulas.tokenizer,
    "tokens": _Formulas.tokens,
    "passages": _Formulas.passages,
    "model": _Formulas.model,
    "finetune": _Formulas.finetune,
    "dapt": _Formulas.dapt,
    "lora": _Formulas.lora,
    "train": _Formulas.train,
    "adapt": _Formulas.adapt,
    "datastore": _Formulas.datastore,
    "index": _Formulas.index,
    "calibrate": _Formulas.calibrate,
    "targets": _Formulas.targets,
    "teacher": _Formulas.teacher,
    "mixture": _Formulas.teacher,
    "score": _Formulas.score,
    "evaluate": _Formulas.evaluate,
    "evaluate_systems": _Formulas.evaluate_systems,
    "harness": _Formulas.harness,
    "harness_system": _Formulas.harness,
    "harness_base": _Formulas.harness,
    "fidelity": _Formulas.compared,
    "shapes": _Formulas.compared,
    "cases": _Formulas.compared,
    "latency": _Formulas.latency,
    "table": _Formulas.table,
    "figure": _Formulas.table,
    "claims": _Formulas.table,
    "report_page": _Formulas.table,
}
FORMULAS |= {f"fetch_{name}": FORMULAS[name] for name in ("corpus", "tokenizer", "model")}
