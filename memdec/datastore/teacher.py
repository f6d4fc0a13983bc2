"""Stage `teacher`: write the key model's own next-token distribution at every position, in the format of the targets.

This is a control that the paper lacks. It separates how much of a memory's gain comes from soft targets of a larger,
fine-tuned model, and how much from its nearest neighbours. Each row is p_key = softmax(logits / temperature) of the key
model in the windows of the datastore, cut to the most likely tokens and renormalised. `memdec train` reads it like p_kNN.

With targets of the same key model, the rows are lambda p_kNN + (1 - lambda) p_key: the kNN-LM of the key model (Khandelwal
et al. 2020, equation 3) as the teacher.

Inputs: a model folder, the token stream of its tokenizer, and targets for the mixture. Output: a folder of kind `targets`. Batches are fixed for
the whole split, so rows do not depend on the shard. The head runs on the scored positions of one window at a time, so
the largest array is [context, V].
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from memdec.artefacts import artefact, devices, resources
from memdec.datastore.keys import Forward
from memdec.datastore.target_rows import RowWriter, TargetReader
from memdec.errors import ConfigError, NumericsError
from memdec.maths.sparse_rows import SparseRows
from memdec.models import loading
from memdec.settings import AUTO, Compute, DatastoreSettings, TeacherSettings
from memdec.text import tokens


def run(
    model_folder: Path,
    stream: Path,
    out: Path,
    settings: TeacherSettings,
    *,
    context: int,
    stride: int,
    shard: int = 0,
    targets: Sequence[Path] = (),
    compute: Compute = AUTO,
) -> None:
    """Make one shard of the teacher's rows for the train split.

    Args:
        model_folder: The teacher, which is the model that also gives the keys.
        stream: Token stream of the same tokenizer.
        out: Folder to make.
        settings: top, temperature and so on; `settings.shards` is the number of shards.
        context: Most tokens that the model sees at once.
        stride: Tokens scored per window.
        shard: Number of the shard, from 0.
        targets: All shards of p_kNN at the same positions, if `settings.knn_weight` is above 0.
        compute: Device, and the type of the teacher's weights.

    Raises:
        ConfigError: The shard or context is out of range, or there are targets without a weight or the other way; checked before the model is loaded.
        ArtifactError: The tokens are of another tokenizer, or the targets of other tokens; checked before the model is loaded.
        NumericsError: The model gives NaN or inf.
    """
    if not 0 <= shard < settings.shards:
        raise ConfigError(f"teacher: expected a shard from 0 to {settings.shards - 1}, found {shard}")
    if bool(targets) != (settings.knn_weight > 0):
        raise ConfigError(
            f"teacher: expected --targets where knn_weight is above 0, and only there, found {len(targets)} with "
            f"{settings.knn_weight:g}; give the folders of p_kNN, or set knn_weight"
        )
    source, base = artefact.read(stream, "tokens"), loading.known(model_folder, "model")
    tokens.check_same(source.facts["tokenizer_sha256"], base.facts["tokenizer_sha256"], f"{model_folder} with {stream}")
    final = DatastoreSettings(split="train", key_point="final", batch_size=settings.batch_size)
    forward = Forward(model_folder, stream, final, context, stride, compute)
    n_passes = len(forward.batches)
    if settings.shards > n_passes:
        raise ConfigError(
            f"teacher: expected at most {n_passes} shards for {n_passes} forward passes, found {settings.shards}; lower "
            "'shards' or 'batch_size'"
        )
    plain = {**settings.model_dump(mode="json"), "context": context, "stride": stride, "shard": shard}
    plain["precision"] = devices.precision(compute)
    inputs = {"model": base.recipe, "tokens": source.recipe}
    neighbours = TargetReader(targets, source.facts["sha256"]["train"]) if targets else None
    inputs |= {f"targets {i}": recipe for i, recipe in enumerate(neighbours.recipes if neighbours else [])}
    with artefact.building(out, "targets", plain, inputs, stage="teacher") as build:
        if build is None:
            return
        first, last = shard * n_passes // settings.shards, (shard + 1) * n_passes // settings.shards
        n_entries = _write(forward, range(first, last), settings, neighbours, out, build.work)
        build.facts.update(
            begin=int(forward.edges[first]),
            end=int(forward.edges[last]),
            entries=n_entries,
            short_rows=0,
            positions=len(forward.data),
            device=devices.name(compute),
            tokens_sha256=source.facts["sha256"]["train"],
        )


def _write(
    forward: Forward, passes: range, settings: TeacherSettings, neighbours: TargetReader | None, out: Path, work: Path
) -> int:
    """Append the rows of the forward passes that are missing; return the number of entries of all rows."""
    begin, end = int(forward.edges[passes.start]), int(forward.edges[passes.stop])
    n_vocab = tokens.n_ids(tokens.load_tokenizer(str(forward.model_folder)))
    prob = np.dtype(settings.dtype)
    with RowWriter(out, work, forward.data.dtype, prob) as rows:
        row = 8 + min(settings.top, n_vocab) * (forward.data.dtype.itemsize + prob.itemsize)
        resources.check_disk(out, row * (end - begin - rows.n), f"{end - begin - rows.n} rows; lower 'top'")
        loading.check_head(forward.point.model, bias=True)
        bar = tqdm(total=end - begin, initial=rows.n, desc="teacher", unit="row", unit_scale=True, mininterval=2)
        # Rows are committed between passes, so the existing rows end with a whole pass.
        for number in range(int(np.searchsorted(forward.edges, begin + rows.n)), passes.stop):
            ids, probs = _rows(forward, number, settings, neighbours, n_vocab)
            rows.append(np.full(len(ids), ids.shape[1]), ids.reshape(-1), probs.reshape(-1), 0)
            bar.update(len(ids))
        bar.close()
        rows.finish()
        return rows.n_entries


@torch.no_grad()
def _rows(
    forward: Forward, number: int, settings: TeacherSettings, neighbours: TargetReader | None, n_vocab: int
) -> tuple[Int[np.ndarray, "n top"], Float[np.ndarray, "n top"]]:
    """The most likely tokens at the positions of one pass, the likeliest first, and their probabilities."""
    head = forward.point.model.get_output_embeddings()
    position = int(forward.edges[number])
    ids: list[NDArray[np.int64]] = []
    probs: list[NDArray[np.float64]] = []
    for hidden in forward.vectors(number):
        # Rows of a padded head beyond the tokenizer's vocabulary belong to no token.
        logits = head(hidden)[:, :n_vocab].float()
        check_finite(logits, position)
        if neighbours is None:
            best, p = most_likely(logits, settings.top, settings.temperature)
        else:
            rows = neighbours.rows([(position, position + len(hidden))])
            best, p = most_likely_of_mixture(logits, rows, settings.knn_weight, settings.top, settings.temperature)
        ids.append(best.cpu().numpy())
        probs.append(p.cpu().numpy())
        position += len(hidden)
    return np.concatenate(ids), np.concatenate(probs)


def check_finite(logits: Float[Tensor, "n V"], position: int) -> None:
    """Check the logits of rows of which the first is that of `position`.

    Raises:
        NumericsError: A logit is NaN or infinite.
    """
    finite = torch.isfinite(logits).all(1)
    if not finite.all():
        raise NumericsError(
            f"teacher: expected finite logits, found NaN or inf at position {position + int((~finite).nonzero()[0, 0])}; "
            "train the model again"
        )


def most_likely(
    logits: Float[Tensor, "n V"], top: int, temperature: float
) -> tuple[Int[Tensor, "n top"], Float[Tensor, "n top"]]:
    """The top tokens and their probabilities under softmax(logits / temperature), renormalised to sum to one.

    Renormalising the softmax of all logits equals the softmax of the top logits, so no [n, V] probabilities are needed.
    """
    values, ids = logits.topk(min(top, logits.shape[1]), dim=1)
    return ids, (values.double() / temperature).softmax(1)


def most_likely_of_mixture(
    logits: Float[Tensor, "n V"], rows: SparseRows, weight: float, top: int, temperature: float
) -> tuple[Int[Tensor, "n top"], Float[Tensor, "n top"]]:
    """As `most_likely`, of weight * p_kNN + (1 - weight) * softmax(logits / temperature); `rows` are p_kNN."""
    p = (logits.double() / temperature).softmax(1).mul_(1 - weight)
    row = torch.from_numpy(np.repeat(np.arange(len(rows)), np.diff(rows.indptr))).to(p.device)
    token, near = (torch.from_numpy(np.array(each)).to(p.device) for each in (rows.tokens, rows.probs))
    p.index_put_((row, token.long()), weight * near.double(), accumulate=True)
    values, ids = p.topk(min(top, p.shape[1]), dim=1)
    return ids, values / values.sum(1, keepdim=True)
