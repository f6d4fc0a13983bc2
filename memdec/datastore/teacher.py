"""Stage `teacher`: write the key model's own next-token distribution at every position, in the format of the targets.

This is a control that the paper lacks. It separates how much of a memory's gain comes from soft targets of a larger,
fine-tuned model, and how much from its nearest neighbours. Each row is softmax(logits / temperature) of the key model
in the windows of the datastore, cut to the most likely tokens and renormalised. `memdec train` reads it like p_kNN.

Inputs: a model folder and the token stream of its tokenizer. Output: a folder of kind `targets`. Batches are fixed for
the whole split, so rows do not depend on the shard. The head runs on the scored positions of one window at a time, so
the largest array is [context, V].
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from memdec.artefacts import artefact, devices, resources
from memdec.datastore.keys import Forward
from memdec.datastore.target_rows import RowWriter
from memdec.errors import ConfigError, NumericsError
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
        compute: Device, and the type of the teacher's weights.

    Raises:
        ConfigError: The shard or context is out of range; checked before the model is loaded.
        ArtifactError: The tokens are of another tokenizer; checked before the model is loaded.
        NumericsError: The model gives NaN or inf.
    """
    if not 0 <= shard < settings.shards:
        raise ConfigError(f"teacher: expected a shard from 0 to {settings.shards - 1}, found {shard}")
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
    with artefact.building(out, "targets", plain, inputs, stage="teacher") as build:
        if build is None:
            return
        first, last = shard * n_passes // settings.shards, (shard + 1) * n_passes // settings.shards
        n_entries = _write(forward, range(first, last), settings, out, build.work)
        build.facts.update(
            begin=int(forward.edges[first]),
            end=int(forward.edges[last]),
            entries=n_entries,
            short_rows=0,
            positions=len(forward.data),
            device=devices.name(compute),
            tokens_sha256=source.facts["sha256"]["train"],
        )


def _write(forward: Forward, passes: range, settings: TeacherSettings, out: Path, work: Path) -> int:
    """Append the rows of the forward passes that are missing; return the number of entries of all rows."""
    begin, end = int(forward.edges[passes.start]), int(forward.edges[passes.stop])
    n_vocab = len(tokens.load_tokenizer(str(forward.model_folder)))
    prob = np.dtype(settings.dtype)
    with RowWriter(out, work, forward.data.dtype, prob) as rows:
        row = 8 + min(settings.top, n_vocab) * (forward.data.dtype.itemsize + prob.itemsize)
        resources.check_disk(out, row * (end - begin - rows.n), f"{end - begin - rows.n} rows; lower 'top'")
        loading.check_head(forward.point.model, bias=True)
        bar = tqdm(total=end - begin, initial=rows.n, desc="teacher", unit="row", unit_scale=True, mininterval=2)
        # Rows are committed between passes, so the existing rows end with a whole pass.
        for number in range(int(np.searchsorted(forward.edges, begin + rows.n)), passes.stop):
            ids, probs = _rows(forward, number, settings, n_vocab)
            rows.append(np.full(len(ids), ids.shape[1]), ids.reshape(-1), probs.reshape(-1), 0)
            bar.update(len(ids))
        bar.close()
        rows.finish()
        return rows.n_entries


@torch.no_grad()
def _rows(
    forward: Forward, number: int, settings: TeacherSettings, n_vocab: int
) -> tuple[Int[np.ndarray, "n top"], Float[np.ndarray, "n top"]]:
    """The most likely tokens at the positions of one pass, the likeliest first, and their probabilities."""
    head = forward.point.model.get_output_embeddings()
    position = int(forward.edges[number])
    ids: list[NDArray[np.int64]] = []
    probs: list[NDArray[np.float64]] = []
    for hidden in forward.vectors(number):
        # Rows of a padded head beyond the tokenizer's vocabulary belong to no token.
        best, p = most_likely(head(hidden)[:, :n_vocab].float(), settings.top, settings.temperature, position)
        ids.append(best.cpu().numpy())
        probs.append(p.cpu().numpy())
        position += len(hidden)
    return np.concatenate(ids), np.concatenate(probs)


def most_likely(
    logits: Float[Tensor, "n V"], top: int, temperature: float, position: int
) -> tuple[Int[Tensor, "n top"], Float[Tensor, "n top"]]:
    """The top tokens and their probabilities under softmax(logits / temperature), renormalised to sum to one.

    Renormalising the softmax of all logits equals the softmax of the top logits, so no [n, V] probabilities are needed.

    Raises:
        NumericsError: A logit is NaN or infinite; `position` is that of the first row.
    """
    finite = torch.isfinite(logits).all(1)
    if not finite.all():
        raise NumericsError(
            f"teacher: expected finite logits, found NaN or inf at position {position + int((~finite).nonzero()[0, 0])}; "
            "train the model again"
        )
    values, ids = logits.topk(min(top, logits.shape[1]), dim=1)
    return ids, (values.double() / temperature).softmax(1)
