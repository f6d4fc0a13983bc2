"""Stage `calibrate`: choose k, tau and top of the targets, and lambda and temperature of a mixed teacher, on valid.

The guide is the kNN-LM of the key model itself, lambda p_kNN + (1 - lambda) p_key: the k and tau with which it predicts
valid text best, each with its own best lambda. `top` is the smallest with which that hardly changes.

The key model has been trained on the text for which it is a teacher, so it is more certain there than on other text. So is
p_kNN: a neighbour of a position is never the position itself, but its key comes from that model. `key_temperature` divides the logits of
p_key on train such that their mean entropy is that on valid. `confidence` says how much more certain both are on train.

Inputs: key model, datastore and index of its train split, and the token stream. Output: `calibration.json`, with the
perplexities of the whole grid. `memdec targets` and `memdec teacher` read it.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memdec.artefacts import artefact, devices
from memdec.datastore import accuracy, search
from memdec.datastore.keys import Datastore, Forward
from memdec.errors import ArtifactError, ConfigError
from memdec.maths import calibration, fidelity, mixing, weighing
from memdec.maths.sparse_rows import SparseRows, probability_of
from memdec.maths.windows import Window, sample, windows
from memdec.models import loading
from memdec.settings import (
    AUTO,
    NPROBE,
    CalibrateSettings,
    Compute,
    DatastoreSettings,
    SearchSettings,
    Split,
    TargetSettings,
    TeacherSettings,
)
from memdec.text import tokens

log = logging.getLogger(__name__)
FILE = "calibration.json"
# Keys; last input tokens, or positions where the queries are keys of the datastore; true tokens; of which split.
_Asked = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64], Split]
# Squared distances and positions of the nearest neighbours, nearest first, (B, k); true tokens, (B,).
_Found = tuple[Tensor, Tensor, NDArray[np.int64]]
_CLOSE = 0.001  # relative perplexity that a smaller `top` may cost
_TEMPERATURES = np.geomspace(0.7, 3.0, 16)  # of p_key; between them the entropy is interpolated


def run(
    model_folder: Path,
    datastore: Path | Sequence[Path],
    index_folder: Path,
    stream: Path,
    out: Path,
    settings: CalibrateSettings,
    *,
    context: int,
    stride: int,
    nprobe: int | None = None,
    max_tv: float | None = None,
    compute: Compute = AUTO,
) -> None:
    """Choose the settings of the targets.

    Args:
        model_folder: The key model.
        datastore: Folders of its keys of the train split.
        index_folder: Index over these keys.
        stream: Token stream of the same text; valid is predicted, train is only for `key_temperature`.
        out: Folder to make.
        settings: The candidates.
        context: Most tokens that the model sees at once.
        stride: Tokens scored per window.
        nprobe: Cells of the index to search, as for the targets; None: 32, or as few as `max_tv` allows.
        max_tv: Instead of `nprobe`: the largest total variation at the largest k and any tau of the candidates.
        compute: Device, and the type of the model's weights.

    Raises:
        ArtifactError: The keys are of another model, or the index of other keys.
        ConfigError: There are fewer keys than the largest k, or `accuracy.within` finds no nprobe.
    """
    store, source, base = Datastore(datastore), artefact.read(stream, "tokens"), loading.known(model_folder, "model")
    if store.model != base.recipe:
        raise ArtifactError(
            f"{store.folder}: expected keys of {model_folder}, found those of another model; run `memdec datastore` with it"
        )
    tokens.check_same(source.facts["tokenizer_sha256"], base.facts["tokenizer_sha256"], f"{model_folder} with {stream}")
    most = max(settings.neighbours)
    if max_tv is not None and nprobe is not None:
        raise ConfigError(
            f"max_tv: expected it in place of nprobe, found both ({max_tv:g}, nprobe {nprobe}); leave out one"
        )
    if max_tv is not None:
        nprobe = accuracy.within(max_tv, index_folder, most, settings.temperatures).nprobe
    wanted = SearchSettings(neighbours=most, nprobe=nprobe or NPROBE)
    index = search.check(store, index_folder, wanted)
    plain = {**settings.model_dump(mode="json", exclude={"batch_size"}), "context": context, "stride": stride}
    plain["nprobe"] = wanted.nprobe
    plain["precision"] = devices.precision(compute)
    inputs = {"model": base.recipe, "datastore": store.recipe, "index": index.recipe, "tokens": source.recipe}
    with artefact.building(out, "calibration", plain, inputs) as build:
        if build is None:
            return
        passes = _Passes(model_folder, stream, settings, context, stride, compute)
        searcher = search.load(store, index_folder, wanted.nprobe, devices.pick(compute))
        log_p_key, entropy = passes.key("valid", [1.0])
        found = [_search(searcher, asked, most) for asked in passes.queries(store, "valid")]
        by = _probabilities(found, store, settings)
        grid = calibration.choose(log_p_key, by, settings.lambdas)
        best = grid[0]
        _warn(best, settings)
        log_p_train, on_train = passes.key("train", [1.0, *_TEMPERATURES])
        chosen = {
            "neighbours": best.neighbours,
            "temperature": best.temperature,
            "top": _top(found, searcher, settings, best, log_p_key),
            "knn_weight": best.weight,
            "key_temperature": calibration.crossing(_TEMPERATURES.tolist(), on_train[1:], float(entropy[0])),
        }
        alone = {
            "key": math.exp(-log_p_key.mean()),
            "mixture": best.perplexity,
        }
        confidence = {
            "key": {
                "train": {"p_true": float(np.exp(log_p_train).mean()), "entropy": float(on_train[0])},
                "valid": {"p_true": float(np.exp(log_p_key).mean()), "entropy": float(entropy[0])},
            },
            "knn": {
                "train": _confidence(
                    (_search(searcher, asked, best.neighbours) for asked in passes.queries(store, "train")),
                    searcher,
                    best,
                ),
                "valid": _confidence(found, searcher, best),
            },
        }
        artefact.write_json(
            out / FILE,
            {
                "chosen": chosen,
                "confidence": confidence,
                "perplexity": alone,
                "grid": [choice._asdict() for choice in grid],
            },
        )
        build.facts.update(**chosen, perplexity=alone, device=devices.name(compute), positions=len(log_p_key))


def read(folder: Path) -> dict[str, Any]:
    """The chosen values of a calibration: neighbours, temperature, top, knn_weight and key_temperature.

    Raises:
        ArtifactError: The folder is no whole calibration.
    """
    facts = artefact.read(folder, "calibration").facts
    return {name: facts[name] for name in ("neighbours", "temperature", "top", "knn_weight", "key_temperature")}


def _warn(best: calibration.Choice, settings: CalibrateSettings) -> None:
    for name, value, candidates, limits in (
        ("k", best.neighbours, settings.neighbours, (1, math.inf)),
        ("temperature", best.temperature, settings.temperatures, (0.0, math.inf)),
        ("lambda", best.weight, settings.lambdas, (0.0, 1.0)),
    ):
        warning = weighing.at_end(f"calibrate: {name}", value, candidates, limits)
        if warning is not None:
            log.warning("warning: %s", warning)


class _Passes:
    """Forward passes of the key model over a sample of a split."""

    def __init__(
        self, model: Path, stream: Path, settings: CalibrateSettings, context: int, stride: int, compute: Compute
    ) -> None:
        self.model, self.stream, self.settings, self.compute = model, stream, settings, compute
        self.context, self.stride = context, stride
        self.n_vocab = tokens.n_ids(tokens.load_tokenizer(str(model)))
        self._loaded: Any | None = None

    def of(self, split: Split, key_point: str) -> tuple[Forward, list[list[Window]]]:
        """The passes with the hidden states at a key point, and their windows."""
        size = self.settings.batch_size
        wanted = DatastoreSettings(split=split, key_point=key_point, batch_size=size)
        forward = Forward(self.model, self.stream, wanted, self.context, self.stride, self.compute, self._loaded)
        self._loaded = forward.point.model
        every = windows(len(forward.data), self.context, self.stride)
        some = sample(every, self.stride, self.settings.most, self.settings.seed)
        forward.batches = [some[i : i + size] for i in range(0, len(some), size)]
        return forward, forward.batches

    @torch.no_grad()
    def key(
        self, split: Split, temperatures: Sequence[float] | NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """log p_key of the true tokens at temperature 1, and the mean entropy of p_key at each temperature, in nats."""
        forward, batches = self.of(split, "final")
        loading.check_head(forward.point.model, bias=True)
        head = forward.point.model.get_output_embeddings()
        log_p, entropies = [], np.zeros(len(temperatures))
        for number, batch in enumerate(batches):
            for part, hidden in zip(batch, forward.vectors(number), strict=True):
                logits = head(hidden)[:, : self.n_vocab].float()
                truth = torch.from_numpy(forward.data[part.first : part.end].astype(np.int64)).to(logits.device)
                scores = mixing.log_softmax(logits, self.n_vocab)
                log_p.append(scores.gather(1, truth[:, None])[:, 0].double().cpu().numpy())
                entropies += [float(_entropy(logits / tau).sum()) for tau in temperatures]
        found = np.concatenate(log_p)
        return found, entropies / len(found)

    def queries(self, store: Datastore, split: Split) -> Iterator[_Asked]:
        """Keys of the sampled positions of a split, their last input tokens (-1: none) or, of train, the positions
        themselves, and their true tokens."""
        forward, batches = self.of(split, store.settings.key_point)
        for number, batch in enumerate(batches):
            positions = np.concatenate([np.arange(part.first, part.end) for part in batch])
            before = np.where(positions > 0, forward.data[np.maximum(positions, 1) - 1].astype(np.int64), -1)
            vectors = store.rounded(torch.cat(forward.vectors(number)))
            place = positions if split == "train" else before
            yield vectors, place, forward.data[positions].astype(np.int64), split


def _entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1, dtype=torch.float64)


def _search(searcher: search.Searcher, asked: _Asked, neighbours: int) -> _Found:
    queries, place, truth, split = asked
    own, inputs = (place, None) if split == "train" else (None, place)
    sq_dist, ids = searcher.search(queries, neighbours, own, inputs=inputs)
    return torch.from_numpy(sq_dist), torch.from_numpy(ids), truth


def _probabilities(
    found: Iterable[_Found], store: Datastore, settings: CalibrateSettings
) -> dict[tuple[int, float], NDArray[np.float64]]:
    """p_kNN of the true tokens for every k and tau."""
    parts: list[dict[tuple[int, float], NDArray[np.float64]]] = []
    for sq_dist, ids, truth in found:
        same = (store.values[np.maximum(ids.numpy(), 0)] == truth[:, None]) & (ids.numpy() >= 0)
        parts.append(calibration.label_probabilities(sq_dist.numpy(), same, settings.neighbours, settings.temperatures))
    return {key: np.concatenate([each[key] for each in parts]) for key in parts[0]}


def _rows(near: _Found, searcher: search.Searcher, best: calibration.Choice, top: int | None = None) -> SparseRows:
    """p_kNN with the chosen k and tau."""
    sq_dist, ids, _ = near
    k = best.neighbours
    return SparseRows.of(*searcher.rows(sq_dist[:, :k], ids[:, :k], best.temperature, top=top))


def _confidence(
    found: Iterable[_Found], searcher: search.Searcher, best: calibration.Choice
) -> dict[Literal["p_true", "entropy"], float]:
    """Mean probability of the true token under p_kNN, and its mean entropy (nats)."""
    p_true, entropy = [], []
    for near in found:
        rows = _rows(near, searcher, best)
        p_true.append(probability_of(rows, near[2]))
        entropy.append(fidelity.sparse_shape(rows, 0.0)["entropy"])
    return {"p_true": float(np.concatenate(p_true).mean()), "entropy": float(np.concatenate(entropy).mean())}


def _top(
    found: Iterable[_Found],
    searcher: search.Searcher,
    settings: CalibrateSettings,
    best: calibration.Choice,
    log_p_key: NDArray[np.float64],
) -> int | None:
    """The smallest candidate with which the best mixture hardly changes; None if none of them will do."""
    p: dict[int, list[NDArray[np.float64]]] = {top: [] for top in sorted(settings.tops)}
    for near in found:
        for top, parts in p.items():
            parts.append(probability_of(_rows(near, searcher, best, top), near[2]))
    for top, parts in p.items():
        by = {(best.neighbours, best.temperature): np.concatenate(parts)}
        (cut,) = calibration.choose(log_p_key, by, [best.weight])
        if cut.perplexity <= best.perplexity * (1 + _CLOSE):
            return top
    return None


def targets(settings: TargetSettings, folder: Path | None) -> TargetSettings:
    """The settings of p_kNN with what a calibration has chosen; as they are without one."""
    chosen = {} if folder is None else read(folder)
    return settings.model_copy(update={name: chosen[name] for name in ("neighbours", "temperature", "top") if chosen})


def teacher(settings: TeacherSettings, folder: Path | None, mixed: bool) -> TeacherSettings:
    """The settings of a teacher with what a calibration has chosen; lambda only if it is `mixed` with p_kNN."""
    if folder is None:
        return settings
    chosen = read(folder)
    update = {"temperature": chosen["key_temperature"]} | ({"knn_weight": chosen["knn_weight"]} if mixed else {})
    return settings.model_copy(update=update)
