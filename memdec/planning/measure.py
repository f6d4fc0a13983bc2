"""Measure the rates of this machine: small pieces of the work of each stage, in about a minute."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer

import memdec
from memdec.artefacts import artefact, provenance, resources
from memdec.maths import exact_search, knn
from memdec.maths.losses import token_log_probs
from memdec.maths.objectives import Hybrid
from memdec.models import loading
from memdec.planning.rates import Machine, Rates
from memdec.settings import ModelSpec
from memdec.training.fitting import LossModel

_MODELS = {64: (2, 2), 128: (4, 4), 768: (4, 12)}  # width: layers, heads
_VOCABULARY, _CONTEXT = 2048, 128
_HEAVY = "import peft; from memdec.training import stages"
_LIGHT = "from memdec.results import mix"
_SECONDS = 1.5  # for which a piece of work is repeated


def machine() -> Machine:
    """Rates of a core of this machine, and of its GPU if it has one."""
    torch.set_num_threads(1)
    gpu = _rates(torch.device("cuda")) if resources.has_gpu() else None
    return Machine(cpu=_rates(torch.device("cpu")), gpu=gpu)


def write(found: Machine, out: Path) -> None:
    """Write rates to a file that `rates.load` reads."""
    out.parent.mkdir(parents=True, exist_ok=True)
    artefact.write_json(out, found.model_dump(mode="json"))


def _rates(device: torch.device) -> Rates:
    on_gpu = device.type == "cuda"
    start, process = _process(_HEAVY)
    train, score = {}, {}
    for width in _MODELS:
        train[width], score[width] = _model(width, device)
    return Rates(
        device=torch.cuda.get_device_name() if on_gpu else provenance.machine(),
        source="memdec plan --measure",
        start=start,
        light=_process(_LIGHT)[0],
        train=train,
        score=score,
        search={width: _search(width, device) for width in _MODELS},
        gather=_gather(),
        text=_text(),
        process=process,
        memory=torch.cuda.get_device_properties(device).total_memory if on_gpu else resources.memory(),
    )


def _process(code: str) -> tuple[float, float]:
    """CPU seconds and peak bytes of a Python process that runs this code."""
    said = (
        "; import resource; r = resource.getrusage(resource.RUSAGE_SELF); print(r.ru_utime + r.ru_stime, r.ru_maxrss)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code + said], capture_output=True, text=True, check=True) for _ in "ab"
    ]
    seconds, kilobytes = zip(*(map(float, run.stdout.split()) for run in runs), strict=True)
    return min(seconds), max(kilobytes) * 1024  # the first may have read files from disk


def _per_second(work: Callable[[], object], device: torch.device) -> float:
    """How often a piece of work is done in a second: of the processor, or with a GPU of the clock."""

    def now() -> float:
        if device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    work()  # compiles, and fills caches
    begin, n = now(), 0
    while now() - begin < _SECONDS:
        work()
        n += 1
    return n / (now() - begin)


def _model(width: int, device: torch.device) -> tuple[float, float]:
    """FLOP/s of training steps and of forward passes of a small model."""
    layers, heads = _MODELS[width]
    spec = {"family": "", "tokenizer": "t", "architecture": "gpt2", "width": width, "layers": layers, "heads": heads}
    lm: Any = loading.from_scratch(
        ModelSpec.model_validate(spec | {"corpus": "c", "train": {}}), _VOCABULARY, _CONTEXT, 0
    ).to(device)
    batch = 64 if device.type == "cuda" else 8
    ids = torch.randint(0, _VOCABULARY, (batch, _CONTEXT), device=device)
    spans = torch.zeros(batch, 2, dtype=torch.long)
    model = LossModel(lm, Hybrid())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    cast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def step() -> None:
        with cast:
            model(ids, ids, spans)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    def score() -> None:
        with torch.no_grad(), cast:
            hidden, head = model.hidden(ids)
            token_log_probs(hidden, head, ids.flatten())

    forward = ids.numel() * (2 * loading.n_parameters(lm) + 4 * _CONTEXT * width * layers)
    return 3 * forward * _per_second(step, device), forward * _per_second(score, device)


def _search(width: int, device: torch.device) -> float:
    """FLOP/s of an exact search for 1,024 neighbours."""
    noise = torch.Generator().manual_seed(0)
    n, batch = (262_144, 4096) if device.type == "cuda" else (32_768, 512)
    keys = torch.randn(n, width, generator=noise).to(device)

    def search() -> None:
        if device.type == "cuda":
            torch.topk(keys[:batch] @ keys.T, 1024)
            return
        nearest = exact_search.Nearest(keys[:batch], 1024)
        for first in range(0, n, 16_384):
            nearest.update(keys[first : first + 16_384], first)
        nearest.result()

    return batch * n * 2 * width * _per_second(search, device)


def _gather() -> float:
    """Neighbours a second that become rows of p_kNN."""
    noise = torch.Generator().manual_seed(0)
    sq_dist = torch.rand(1024, 1024, generator=noise)
    values = torch.randint(0, _VOCABULARY // 8, sq_dist.shape, generator=noise)
    return sq_dist.numel() * _per_second(lambda: knn.aggregate(sq_dist, values, 1.0), torch.device("cpu"))


def _text() -> float:
    """Bytes a second that are tokenized: the sources of this package."""
    texts = [file.read_text() for file in sorted(Path(memdec.__file__).parent.rglob("*.py"))]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=_VOCABULARY, show_progress=False)
    size = sum(len(text.encode()) for text in texts)
    return size * _per_second(lambda: bpe.encode_batch(texts), torch.device("cpu"))
