"""Stage `shapes`: the shapes of p_kNN, of the model that gives its keys, and of the memory (paper, Figures 5 and 6).

All three are measured on the same sample of the training positions:

- `top1`: the probability of the most likely token.
- `entries`: the number of tokens with a probability of `floor` or more. A softmax is nowhere zero, and p_kNN has a token
  for every neighbour, however far; so tokens above zero, which the paper counts for p_kNN, say little about a softmax.
- `entropy`, in nats.
- `stored`, for p_kNN only: the entries above zero in the targets, after the cut to `top` tokens.

The cut leaves p_kNN a little sharper than it was: top1 is too high by at most the fraction `missing_at_most`, a fact of
the manifest, and so is every other probability.

Output: `records.json`, the mean of each with its 95 % bootstrap interval over windows; `histogram.csv`, the share of
positions in each bar; `examples.json`, the three distributions at a few positions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from memdec.artefacts import artefact
from memdec.errors import ArtifactError
from memdec.maths import fidelity
from memdec.models import loading
from memdec.results.positions import Block, Positions, plain_settings, window_means
from memdec.settings import AUTO, DEFAULT_MEMORY, Compute, ShapesSettings
from memdec.text import tokens

KNN, LM, MEMORY = DISTRIBUTIONS = ("p_kNN", "p_LM", "p_mem")
_FEW = (2, 3)  # tokens of p_kNN in the paper's examples
_BEFORE = 40  # tokens of context in an example


def run(
    model: Path,
    memory: Path,
    targets: Sequence[Path],
    stream: Path,
    out: Path,
    settings: ShapesSettings,
    *,
    context: int,
    stride: int,
    name: str = DEFAULT_MEMORY,
    compute: Compute = AUTO,
) -> None:
    """Measure the three distributions.

    Args:
        model: The model that gives the keys of the targets.
        memory: Memory folder, or a model in its place.
        targets: All shards of kNN targets.
        stream: Token stream that the targets belong to.
        out: Output folder.
        settings: Size of the sample, and so on.
        context: Most tokens that a model sees at once.
        stride: Tokens scored per window.
        name: Name of the memory in the records.
        compute: Device, and number type of the models' weights.

    Raises:
        ArtifactError: Targets, tokens and models do not belong together; found before a model is loaded.
    """
    positions = Positions(targets, stream, context, stride, settings)
    if positions.imitates != KNN:
        raise ArtifactError(
            f"{targets[0]}: expected kNN targets, found those of a teacher; give the folders that `memdec targets` made"
        )
    recipes = {
        "model": positions.check(model, "model", "memory").recipe,
        "memory": positions.check_memory(memory).recipe,
    }
    plain = {**plain_settings(settings, context, stride, compute), "memory": name}
    with artefact.building(out, "shapes", plain, positions.inputs | recipes) as build:
        if build is None:
            return
        sizes = {each: loading.n_parameters(loading.on_meta(path)) for each, path in ((LM, model), (MEMORY, memory))}
        chosen = _chosen(positions, settings)
        table, examples, missing = _measured(positions, model, memory, chosen, settings, compute)
        artefact.write_json(out / "records.json", _records(table, sizes, name, settings))
        n_vocab = tokens.n_ids(tokens.load_tokenizer(str(model)))
        artefact.write_text(out / "histogram.csv", _histograms(table, n_vocab, settings.bins).to_csv(index=False))
        artefact.write_json(out / "examples.json", examples)
        facts = {"rows_cut": float((missing > 0).mean()), "missing_at_most": float(missing.mean())}
        build.facts.update(positions.facts, parameters=sizes, **facts)


def _chosen(positions: Positions, settings: ShapesSettings) -> list[int]:
    """Positions of the examples, chosen by p_kNN, the seed and what follows.

    Those with few tokens come first, as in the paper; and each example has another next token, as far as there are any.
    """
    where, counts = [], []
    for part in positions.windows:
        rows = positions.reader.rows([(part.first, part.end)])
        where.append(np.arange(part.first, part.end))
        counts.append(fidelity.sparse_shape(rows, settings.floor)["entries"])
    place, n = np.concatenate(where), np.concatenate(counts)
    order = np.random.default_rng(settings.seed).permutation(len(place))
    few = (n[order] >= _FEW[0]) & (n[order] <= _FEW[1])
    order = order[np.argsort(~few, kind="stable")]
    _, first = np.unique(positions.data[place[order]], return_index=True)  # of each next token, in the order
    again = np.ones(len(order), bool)
    again[first] = False
    order = order[np.argsort(again, kind="stable")][: settings.examples]
    return sorted(place[order].tolist())


def _measured(
    positions: Positions,
    model: Path,
    memory: Path,
    chosen: Sequence[int],
    settings: ShapesSettings,
    compute: Compute,
) -> tuple[pd.DataFrame, list[dict[str, Any]], NDArray[np.float64]]:
    """A line per position and distribution, the examples, and the most mass that each row of p_kNN may lack."""
    parts, examples, missing, made = [], [], [], positions.made
    for block in positions.blocks([model, memory], compute):
        found = {KNN: fidelity.sparse_shape(block.rows, settings.floor)}
        found |= {
            each: fidelity.shape(log_p, settings.floor) for each, log_p in zip((LM, MEMORY), block.log_p, strict=True)
        }
        parts += [pd.DataFrame({"window": block.window, "distribution": each, **found[each]}) for each in found]
        missing.append(fidelity.cut(block.rows, made["neighbours"], made["top"], made["threshold"]))
        inside = [place for place in chosen if block.first <= place < block.first + len(block.rows)]
        examples += [_example(positions, model, block, place, settings.shown) for place in inside]
    return pd.concat(parts, ignore_index=True), examples, np.concatenate(missing)


def _records(table: pd.DataFrame, sizes: dict[str, int], name: str, settings: ShapesSettings) -> list[dict[str, Any]]:
    records = []
    for each in DISTRIBUTIONS:
        lines = table[table["distribution"] == each]
        for metric in (*fidelity.SHAPES, *(["stored"] if each == KNN else [])):
            means = window_means(
                lines[metric].to_numpy(np.float64), lines["window"].to_numpy(), np.ones(len(lines), bool),
                settings.resamples, settings.seed,
            )  # fmt: skip
            what = {"memory": name, "distribution": each, "metric": metric, "seed": settings.seed}
            records.append(what | means | {"parameters": sizes.get(each)})
    return records


def _histograms(table: pd.DataFrame, n_vocab: int, bins: int) -> pd.DataFrame:
    """Share of positions in each bar [low, high) of each measure; the last bar has its upper end too."""
    powers = 2.0 ** np.arange(int(np.ceil(np.log2(n_vocab))) + 1)  # 1, 2, 4 ... the vocabulary
    edges = {
        "top1": np.linspace(0, 1, bins + 1),
        "entries": np.array([0.0, *powers]),
        "entropy": np.linspace(0, np.log(n_vocab), bins + 1),
    }
    lines = []
    for each in DISTRIBUTIONS:
        for metric in fidelity.SHAPES:
            ends = edges[metric]
            values = table.loc[table["distribution"] == each, metric].to_numpy(np.float64)
            shares = np.histogram(np.clip(values, ends[0], ends[-1]), ends)[0] / len(values)
            lines.append(
                pd.DataFrame(
                    {"distribution": each, "metric": metric, "low": ends[:-1], "high": ends[1:], "share": shares}
                )
            )
    return pd.concat(lines, ignore_index=True)


def _example(positions: Positions, model: Path, block: Block, place: int, shown: int) -> dict[str, Any]:
    """The distributions at one position: of the token that follows and the likeliest of all three, the likeliest first."""
    words, number = tokens.load_tokenizer(str(model)), place - block.first
    span = slice(block.rows.indptr[number], block.rows.indptr[number + 1])
    knn = dict(zip(block.rows.tokens[span].tolist(), block.rows.probs[span].tolist(), strict=True))
    dense = [log_p[number].exp() for log_p in block.log_p]
    after = words.decode([int(positions.data[place])])
    best = (
        {int(positions.data[place])}
        | {token for p in dense for token in p.topk(min(shown, len(p))).indices.tolist()}
        | set(knn)
    )
    lines = [
        {
            "token": words.decode([token]),
            KNN: knn.get(token, 0.0),
            LM: float(dense[0][token]),
            MEMORY: float(dense[1][token]),
        }
        for token in sorted(best)
    ]
    lines.sort(key=lambda line: (line["token"] != after, -max(line[each] for each in DISTRIBUTIONS)))
    lines = sorted(lines[:shown], key=lambda line: -max(line[each] for each in DISTRIBUTIONS))
    return {
        "position": place,
        "before": words.decode(positions.data[max(0, place - _BEFORE) : place].tolist()),
        "next": after,
        "tokens": lines,
    }
