"""The latency stage: its arithmetic on given seconds, and what it measures and writes on tiny models."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from making import CONTEXT, spec

from memdec import cli
from memdec.artefacts import artefact
from memdec.datastore import index, passages
from memdec.datastore import keys as datastore
from memdec.errors import ArtifactError, ConfigError, ModelError
from memdec.inference import speculative
from memdec.inference.mixture import MemDecForCausalLM
from memdec.inference.systems import Parts
from memdec.models import loading
from memdec.results import figures, latency
from memdec.results.latency import Entry, Timings
from memdec.settings import DatastoreSettings, IndexSettings, LatencySettings, PassageSettings
from memdec.text import tokens

TINY = LatencySettings(prompt_tokens=6, new_tokens=[9, 3], repeats=3, warmup=1, resamples=50)


def never() -> Any:
    raise AssertionError("made")


def drafted(forwards: int, accepted: int, corrected: int, bonus: int) -> speculative.Result:
    return speculative.Result(torch.zeros(1, 1), forwards, 99, accepted, corrected, bonus)


def cells(rows: list[dict[str, Any]]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Rows by system, phase and number of tokens, in their order."""
    found = {(row["system"], row["phase"], row["n_tokens"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def test_rows_from_given_seconds() -> None:
    """Two systems, 1, 3 and 9 new tokens, three turns; the second system is 2, 3 and 4 times slower in them."""
    base = np.array([[0.5, 1.0, 2.0], [1.5, 2.0, 3.0], [4.5, 5.0, 6.0]])
    seconds = np.stack([base, base * [2, 3, 4]])
    given = {"a": Entry(never), "b": Entry(never, kind="kNN-LM", size=10)}
    results = {("b", 9): [drafted(4, 6, 2, 1), drafted(5, 5, 3, 2)]}
    rows = cells(latency.records(given, Timings(["a", "b"], [1, 3, 9], seconds, results), TINY))
    assert rows["a", "prefill", 6]["seconds"] == 1.0
    assert rows["a", "prefill", 6]["tokens_per_s"] == 6.0
    assert rows["a", "decode", 3]["seconds"] == 1.0
    assert rows["a", "decode", 9]["tokens_per_s"] == 8 / 4
    assert rows["a", "total", 9]["tokens_per_s"] == 9 / 5
    assert rows["b", "total", 3]["seconds"] == 6.0
    assert [row["ratio_to_base"] for row in rows.values()] == [1.0] * 5 + [3.0] * 5
    # With three turns the interval is from the least to the most.
    last = rows.pop(("b", "total", 9))
    assert (last["kind"], last["size"]) == ("kNN-LM", 10)
    assert [last[f"seconds_{end}"] for end in ("low", "high")] == [9.0, 24.0]
    assert [last[f"ratio_{end}"] for end in ("low", "high")] == [2.0, 4.0]
    assert [last[end] for end in ("low", "high")] == [9 / 24, 9 / 9]
    assert last["tokens_per_forward"] == (6 + 2 + 1 + 5 + 3 + 2) / 9
    assert last["acceptance"] == 11 / 16
    assert {row["acceptance"] for row in rows.values()} == {None}


def test_an_interval_narrows_with_turns() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for turns in (10, 1000):
        settings = LatencySettings(repeats=turns, resamples=300)
        middle, low, high = latency._median(rng.exponential(size=(1, 1, turns)), settings)
        assert low < middle < high
        widths.append(float((high - low)[0, 0]))
    # Of an exponential the median's standard error is 1 / sqrt(turns).
    assert widths[1] == pytest.approx(2 * 1.96 / np.sqrt(1000), rel=0.3)
    assert widths[0] > 3 * widths[1]


def test_a_time_that_may_be_none_has_no_rate() -> None:
    """Decoding of 3 tokens drowns in the noise of the first one; 9 tokens do not."""
    seconds = np.array([[[1.0, 2.0, 3.0], [2.0, 3.0, 2.5], [9.0, 9.0, 9.0]]])
    rows = latency.records({"a": Entry(never)}, Timings(["a"], [1, 3, 9], seconds, {}), TINY)
    found = cells(json.loads(json.dumps(rows)))
    unclear = found.pop(("a", "decode", 3))
    columns = ["tokens_per_s", "low", "high", "ratio_to_base", "ratio_low", "ratio_high"]
    assert {unclear[name] for name in columns} == {None}
    assert unclear["seconds"] == 1.0
    assert all(row[name] is not None for row in found.values() for name in columns)


@pytest.fixture(scope="module")
def made(base_folder: Path, small_folder: Path) -> dict[str, Entry]:
    return latency.systems(Parts(base=base_folder, memory=small_folder, alpha=0.5), TINY)


def test_systems_take_turns_with_the_same_prompts(made: dict[str, Entry], token_folder: Path) -> None:
    calls: list[tuple[str, list[int], int]] = []

    def noting(name: str, system: Entry) -> Callable[..., Any]:
        def generate(model: Any, ids: torch.Tensor, n_new: int) -> Any:
            calls.append((name, ids[0].tolist(), n_new))
            return system.generate(model, ids, n_new)

        return generate

    given = {name: Entry(system.make, noting(name, system)) for name, system in made.items()}
    timings = latency.measure(given, TINY, token_folder)
    assert timings.lengths == [1, 3, 9]
    assert timings.seconds.shape == (3, 3, 3)
    assert (timings.seconds > 0).all()
    warm, timed = calls[:3], calls[3:]
    assert [(name, n) for name, _, n in warm] == [(name, 9) for name in made]
    text = tokens.load_stream(token_folder, "test")
    for turn, begin in enumerate([0, (len(text) - 6) // 2, len(text) - 6]):
        part = timed[9 * turn : 9 * (turn + 1)]
        assert {tuple(ids) for _, ids, _ in part} == {tuple(text[begin : begin + 6].tolist())}
        assert [n for _, _, n in part] == [1, 1, 1, 3, 3, 3, 9, 9, 9]
        for n in (0, 3, 6):
            assert {name for name, _, _ in part[n : n + 3]} == set(made)
    assert len({timed[9 * turn][0] for turn in range(3)}) == 3  # each is the first once
    assert sorted(timings.drafts) == [("MemDec, speculative", n) for n in (1, 3, 9)]
    assert all(r.n_accepted + r.n_corrected + r.n_bonus == 9 for r in timings.drafts["MemDec, speculative", 9])


def test_the_three_systems(made: dict[str, Entry]) -> None:
    models = {name: system.make() for name, system in made.items()}
    assert models["base"] is models["MemDec"].base  # weights are loaded once
    assert isinstance(models["MemDec"], MemDecForCausalLM)
    assert not isinstance(models["base"], MemDecForCausalLM)
    ids = torch.arange(5)[None]
    found = {name: system.generate(models[name], ids, 8) for name, system in made.items()}
    drafts = found["MemDec, speculative"]
    assert torch.equal(drafts.sequences, found["MemDec"])
    assert drafts.n_drafted > 4 or drafts.n_base_forwards > 1
    assert {text.shape for text in (found["base"], found["MemDec"])} == {(1, 13)}


def test_made_up_prompts_hang_on_the_seed_alone(made: dict[str, Entry]) -> None:
    model = made["MemDec"].make()
    first, again, other = (
        latency._prompts([model], TINY.model_copy(update={"seed": seed}), None) for seed in (0, 0, 1)
    )
    assert first.shape == (3, 6)
    assert len(first.unique(dim=0)) == 3
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert int(first.max()) < model.n_vocab


def test_made_up_prompts_have_only_tokens_that_every_model_knows() -> None:
    """The heads of some families are padded, so that a base has more rows than its memory."""
    base, memory = (loading.from_scratch(spec(8), rows, CONTEXT, 0).eval() for rows in (400, 20))
    mixture = MemDecForCausalLM.from_models(base, [memory], [0.5])

    def generate(model: Any, ids: torch.Tensor, n_new: int) -> torch.Tensor:
        mixture.check_inputs(ids)
        return torch.cat([ids, ids.new_zeros(1, n_new)], 1)

    latency.measure({"base": Entry(lambda: base, generate), "MemDec": Entry(lambda: mixture, generate)}, TINY)


def test_an_artefact_with_figures(
    made: dict[str, Entry], base_folder: Path, small_folder: Path, tmp_path: Path
) -> None:
    # Sizes of a kind: the same mixture under other names.
    sizes = {f"kNN-LM {n}": Entry(made["MemDec"].make, kind="kNN-LM", size=n) for n in (100, 10_000)}
    inputs = latency.identities(Parts(base=base_folder, memory=small_folder, alpha=0.5))
    out = tmp_path / "latency"
    latency.run(made | sizes, out, TINY, inputs=inputs)
    manifest = artefact.read(out, "latency")
    assert {"base", "memory", "alpha", "machine", "device"} <= set(manifest.inputs)
    names = {"records.json", "latency.csv", "latency.md", "seconds.json"}
    assert set(manifest.files) == names | {f"{f}.{e}" for f in ("latency", "growth") for e in ("png", "svg")}
    assert (out / "latency.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    rows = json.loads((out / "records.json").read_text())
    table = pd.read_csv(out / "latency.csv")
    assert len(rows) == len(table) == 5 * 5
    # pandas 3.0 reads a number with an error in its last digit.
    assert table["seconds"].tolist() == pytest.approx([row["seconds"] for row in rows], rel=1e-12)
    lines = (out / "latency.md").read_text().splitlines()
    assert [line.split(" | ")[0].removeprefix("| ").strip() for line in lines[2:7]] == [*made, *sizes]
    best = table[(table["system"] == "MemDec") & (table["phase"] == "total")]["ratio_to_base"].iloc[-1]
    assert f"{best:.2f}" in [cell.strip() for cell in lines[3].split("|")]
    seconds = json.loads((out / "seconds.json").read_text())
    total = table[(table["system"] == "MemDec") & (table["phase"] == "total") & (table["n_tokens"] == 9)]
    assert total["seconds"].item() == pytest.approx(np.median(seconds["MemDec"]["9"]), rel=1e-12)
    # Of a kind with two sizes the first figure has the largest, the second all; the others are level lines there.
    left, right = figures.latency(table).axes
    assert [line.get_label() for line in left.get_lines()] == [*made, "kNN-LM 10000"]
    assert left.get_lines()[1].get_ydata().tolist() == pytest.approx(
        (table[(table["system"] == "MemDec") & (table["phase"] == "total")]["seconds"] * 1000).tolist()
    )
    assert right.get_lines()[0].get_ydata().tolist() == [1.0, 1.0]
    (axes,) = figures.growth(table).axes
    lines = {line.get_label(): line.get_xdata() for line in axes.get_lines()}
    assert list(lines) == [*made, "kNN-LM"]
    assert list(lines["kNN-LM"]) == [100, 10_000]
    before = (out / "manifest.json").stat().st_mtime_ns
    latency.run(made | sizes, out, TINY, inputs=inputs)
    assert (out / "manifest.json").stat().st_mtime_ns == before


def test_the_command(
    base_folder: Path, small_folder: Path, token_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--base", base_folder, "--memory", small_folder, "--tokens", token_folder, "--out", tmp_path / "l"]
    words += ["--alpha", 0.25, "--prompt-tokens", 5, "--new-tokens", 2, "--new-tokens", 4, "--repeats", 2]
    monkeypatch.setattr(sys, "argv", ["memdec", "latency", *map(str, words), "--warmup", "1", "--n-draft", "2"])
    cli.main()
    manifest = artefact.read(tmp_path / "l", "latency")
    assert manifest.inputs["alpha"] == "0.25"
    assert manifest.inputs["tokens"] == artefact.read(token_folder, "tokens").recipe
    rows = cells(json.loads((tmp_path / "l" / "records.json").read_text()))
    assert {row["turns"] for row in rows.values()} == {2}
    phases = [("prefill", 5), ("decode", 2), ("decode", 4), ("total", 2), ("total", 4)]
    assert list(rows) == [(name, *phase) for name in ("base", "MemDec", "MemDec, speculative") for phase in phases]
    assert {key for key, row in rows.items() if row["tokens_per_forward"]} == {
        ("MemDec, speculative", "total", n) for n in (2, 4)
    }


def test_the_command_with_neighbours_and_passages(
    base_folder: Path, small_folder: Path, token_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "keys"
    datastore.run(base_folder, token_folder, home / "store", DatastoreSettings(), context=CONTEXT, stride=16)
    index.run(home / "store", home / "index", IndexSettings())
    passages.run(token_folder, home / "passages", PassageSettings(passage=8))
    words = ["--base", base_folder, "--memory", small_folder, "--out", tmp_path / "l", "--passages", home / "passages"]
    words += ["--prompt-tokens", 5, "--new-tokens", 2, "--repeats", 2, "--warmup", 1, "--neighbours", 7]
    monkeypatch.setattr(sys, "argv", ["memdec", "latency", *map(str, words), "--knn", f"{home}/store:{home}/index"])
    cli.main()
    rows = cells(json.loads((tmp_path / "l" / "records.json").read_text()))
    n = artefact.read(home / "store", "datastore").facts["positions"]
    known = ["base", "MemDec", "MemDec, speculative", f"kNN-LM, {n:,} keys", "In-Context RAG"]
    assert list(dict.fromkeys(name for name, *_ in rows)) == known
    assert {row["size"] for (name, *_), row in rows.items() if name == known[3]} == {n}
    assert {"knn 0", "passages"} <= set(artefact.read(tmp_path / "l", "latency").inputs)
    swapped = Parts(base=small_folder, memory=base_folder)
    keys = Parts(base=small_folder, datastore=(home / "store",), index=home / "index")
    with pytest.raises(ArtifactError, match=r"expected keys of .*, found those of another model"):
        latency.systems(swapped, TINY, [keys])


def test_without_sizes_there_is_no_growth() -> None:
    table = pd.DataFrame({"system": ["a", "b"], "kind": [None, "kNN-LM"], "size": [None, 5]})
    assert figures.kinds(table) == []


def test_too_long_is_an_error_before_the_first_call(made: dict[str, Entry]) -> None:
    settings = TINY.model_copy(update={"prompt_tokens": CONTEXT - 7})
    given = {"base": Entry(made["base"].make, generate=lambda *_: pytest.fail("called"))}
    with pytest.raises(
        ConfigError, match=rf"of base: expected at most {CONTEXT} tokens .*, found {CONTEXT + 1}; lower"
    ):
        latency.measure(given, settings)


def test_a_system_that_stops_early_is_an_error(made: dict[str, Entry]) -> None:
    given = {"base": Entry(made["base"].make, generate=lambda model, ids, n: ids[:, :-1])}
    with pytest.raises(ModelError, match="expected 9 new tokens of base, found -1"):
        latency.measure(given, TINY)
