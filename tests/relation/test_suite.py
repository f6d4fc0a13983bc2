"""Stage `harness`: every system over a suite of tasks, against stock lm-eval, plain scores and its own store."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_results_filenames, get_sample_results_filenames
from making import CONTEXT, TASKS, run_memdec, write_task_rows

from memdec import HARNESS_TASKS
from memdec.artefacts import artefact
from memdec.datastore import index, keys, passages
from memdec.errors import MemDecError
from memdec.harness import base_lm, baselines, scores
from memdec.harness.models import MemDecInterp
from memdec.inference.mixture import MemDecForCausalLM
from memdec.inference.systems import SYSTEMS, Parts
from memdec.results import compare, harness
from memdec.settings import (
    DatastoreSettings,
    EvaluateSettings,
    IndexSettings,
    LoraSettings,
    PassageSettings,
    Suite,
    TrainSettings,
)
from memdec.tasks import domain_metrics
from memdec.tasks.rows import spread
from memdec.training import stages

FEW = ["dcpmi_cb_kl", "memdec_fpb"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path / "rows"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return write_task_rows(tmp_path / "rows")


def run(base: Path, out: Path, tasks: list[str] = FEW, alpha: Any = "paper", **more: Any) -> list[dict[str, Any]]:
    limit = more.pop("limit", None)
    harness.run(str(base), Suite(tasks=tasks, alpha=alpha, limit=limit, batch_size=4), out, seed=3, **more)
    return records_of(out)


def records_of(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "records.json").read_text())
    return found


def rows_of(out: Path, task: str, metric: str) -> tuple[list[str], list[Any]]:
    """What the samples say about each row: its hash, and what a metric keeps of it."""
    samples = compare.read_samples(compare.read_run(out)[task].file).values()
    return [each.document for each in samples], [each.values[f"{metric},none"] for each in samples]


def values(records: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    return {(each["task"], each["metric"]): each["value"] for each in records}


def write_evaluation(out: Path, base: Path, records: list[dict[str, Any]], **inputs: str) -> Path:
    """An evaluation with the tuned weights of some systems, without running one."""
    settings = EvaluateSettings(neighbours=5, nprobe=2, query=7, every=2).model_dump(mode="json")
    with artefact.building(
        out, "evaluation", settings, {"base": artefact.read(base, "model").recipe, **inputs}
    ) as build:
        assert build is not None
        artefact.write_json(out / "records.json", records)
    return out


# --- what is written --------------------------------------------------------------------------------------------------


def test_results_and_samples_are_those_of_stock_lm_eval(
    data: Path, base_folder: Path, small_folder: Path, tmp_path: Path
) -> None:
    run(base_folder, tmp_path / "run", TASKS, memory=str(small_folder))
    given = {"pretrained": str(base_folder), "memory": str(small_folder)}
    manager = TaskManager(include_path=str(HARNESS_TASKS), include_defaults=False, metadata=given)
    tracker = EvaluationTracker(output_path=str(tmp_path / "stock" / "results.json"))
    stock: Any = simple_evaluate(
        model="memdec-interp", model_args=given, tasks=TASKS, task_manager=manager, batch_size=4, device="cpu",
        bootstrap_iters=0, log_samples=True, evaluation_tracker=tracker,
    )  # fmt: skip
    samples = stock.pop("samples")
    tracker.save_results_aggregated(results=stock, samples=samples)
    for task in TASKS:
        tracker.save_results_samples(task_name=task, samples=samples[task])

    files = [str(file) for file in (tmp_path / "run").iterdir()]
    assert len(get_results_filenames(files)) == 1
    assert len(get_sample_results_filenames(files)) == len(TASKS)
    (ours,), (theirs,) = ((tmp_path / folder).glob("results_*.json") for folder in ("run", "stock"))
    found, expected = json.loads(ours.read_text()), json.loads(theirs.read_text())
    assert found.keys() == expected.keys()
    for part in ("results", "n-samples", "versions", "higher_is_better", "n-shot", "task_hashes"):
        assert found[part] == expected[part]
    run_a, run_b = (compare.read_run(tmp_path / folder) for folder in ("run", "stock"))
    for task in TASKS:
        rows, others = (
            [json.loads(line) for line in each[task].file.read_text().splitlines()] for each in (run_a, run_b)
        )
        thinned = {"arguments", "resps", "filtered_resps"} if task.startswith("dcpmi") else set()
        for row, other in zip(rows, others, strict=True):
            assert row.keys() == other.keys()
            assert {key: row[key] for key in row if key not in thinned} == {
                key: other[key] for key in other if key not in thinned
            }
        if thinned:  # the words once, and what is the same in every row in the first row
            assert [row["resps"][0] for row in rows] == [row["resps"][0] for row in others]
            assert rows[0]["resps"] == others[0]["resps"]
            assert rows[1]["resps"][1:] == [[], []]
            words = found["configs"][task]["metadata"]["scored_words"]
            assert words == others[0]["arguments"]["gen_args_0"]["arg_1"]
    table = compare.compare(tmp_path / "run", tmp_path / "stock")
    assert set(table["task"]) == set(TASKS)
    assert not table["difference"].any()


def test_records_have_all_that_a_table_prints(
    data: Path, base_folder: Path, small_folder: Path, tmp_path: Path
) -> None:
    records = run(base_folder, tmp_path / "run", TASKS, memory=str(small_folder), name="mine", limit=10)
    by_metric = {(each["task"], each["metric"]): each for each in records}
    wanted = {
        ("dcpmi_cb_kl", "acc"), ("dcpmi_cb_kl", "acc_lm"), ("memdec_scotus", "micro_f1"), ("memdec_scotus", "macro_f1"),
        ("memdec_casehold", "micro_f1"), ("memdec_fpb", "weighted_f1"), ("memdec_nq", "exact_match"), ("memdec_nq", "f1"),
        ("memdec_headline", "headline_f1"),
    }  # fmt: skip
    assert wanted <= by_metric.keys()
    for each in records:
        assert (each["method"], each["memory"], each["seed"], each["limit"]) == ("MemDec", "mine", 3, 10)
        assert each["n"] == (6 if each["task"] == "memdec_nq" else 10)
        assert each["low"] <= each["high"]
        assert each["lambda"] is None
        assert each["higher_is_better"]
        assert each["model"] == base_folder.name
    # The paper's alpha for a task that has one, else 0.6.
    assert by_metric["dcpmi_cb_kl", "acc"]["alpha"] == 0.3
    assert by_metric["memdec_fpb", "acc"]["alpha"] == by_metric["memdec_nq", "f1"]["alpha"] == 0.6
    labels = by_metric["dcpmi_cb_kl", "acc"]["labels"]
    assert list(labels) == ["entailment", "contradiction", "neutral"]
    assert sum(labels.values()) == 10
    assert list(by_metric["memdec_fpb", "acc"]["labels"]) == ["returns", "scales the window of size 4", "shifts it"]
    assert list(by_metric["memdec_usmle", "acc"]["labels"]) == ["option 1", "option 2", "option 3"]
    assert by_metric["memdec_nq", "f1"]["labels"] is None
    for each in records:
        assert each["constant"] == (each["labels"] is not None and max(each["labels"].values()) == 10)


def test_a_limit_takes_rows_from_all_over_a_file_that_is_sorted_by_label(
    data: Path, base_folder: Path, tmp_path: Path
) -> None:
    file = data / "fpb" / "adaptllm_schema.jsonl"
    lines = sorted(file.read_text().splitlines(), key=lambda line: json.loads(line)["gold_index"])
    assert {json.loads(line)["gold_index"] for line in lines[:3]} == {0}
    file.write_text("\n".join(lines) + "\n")
    (record,) = [each for each in run(base_folder, tmp_path / "run", limit=6) if each["metric"] == "weighted_f1"]
    assert record["n"] == 6
    samples = compare.read_samples(compare.read_run(tmp_path / "run")["memdec_fpb"].file)
    read = spread(len(lines), 6)
    assert [number for _, number in samples] == read
    (written,) = (tmp_path / "run").glob("samples_memdec_fpb_*.jsonl")
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert [row["doc"]["input"] for row in rows] == [json.loads(lines[number])["input"] for number in read]
    assert len({row["doc"]["gold_index"] for row in rows}) == len({json.loads(line)["gold_index"] for line in lines})


def test_rows_of_a_metric_average_to_its_value(
    data: Path, base_folder: Path, small_folder: Path, tmp_path: Path
) -> None:
    tasks = ["dcpmi_cb_kl", "memdec_scotus", "memdec_nq"]
    found = values(run(base_folder, tmp_path / "run", tasks, memory=str(small_folder)))
    run(base_folder, tmp_path / "base", tasks)
    for task in tasks:
        metric = "f1" if task == "memdec_nq" else "acc"
        rows, items = rows_of(tmp_path / "run", task, metric)
        assert np.mean(items) == pytest.approx(found[task, metric], abs=1e-12)
        assert len(set(rows)) == len(rows)
        assert rows_of(tmp_path / "base", task, metric)[0] == rows
    _, pairs = rows_of(tmp_path / "run", "memdec_scotus", "macro_f1")
    assert domain_metrics.macro_f1(pairs) == pytest.approx(found["memdec_scotus", "macro_f1"], abs=1e-12)


# --- systems ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft
def test_every_system_is_the_model_that_its_name_says(
    data: Path, base_folder: Path, small_folder: Path, dapt_folder: Path, token_folder: Path, tmp_path: Path
) -> None:
    base = run(base_folder, tmp_path / "base")
    assert {(each["method"], each["alpha"], each["lambda"]) for each in base} == {("base", None, None)}
    zero = run(base_folder, tmp_path / "zero", alpha=0.0, memory=str(small_folder))
    assert values(zero) == values(base)
    assert {each["alpha"] for each in zero} == {0.0}
    tuned = run(base_folder, tmp_path / "dapt", dapt=dapt_folder)
    assert {each["method"] for each in tuned} == {"DAPT"}
    _, of_dapt = rows_of(tmp_path / "dapt", "memdec_fpb", "acc")
    run(dapt_folder, tmp_path / "alone")
    assert of_dapt == rows_of(tmp_path / "alone", "memdec_fpb", "acc")[1]

    settings = LoraSettings(epochs=0.2, rank=2)
    stages.run_lora(base_folder, token_folder, tmp_path / "adapter", settings, context=CONTEXT, seed=0)
    assert {each["method"] for each in run(base_folder, tmp_path / "lora", lora=tmp_path / "adapter")} == {"LoRA"}
    passages.run(token_folder, tmp_path / "passages", PassageSettings(passage=12))
    evaluation = write_evaluation(
        tmp_path / "rag evaluation", base_folder, [{"method": "In-Context RAG", "memory": None}]
    )
    rag = run(base_folder, tmp_path / "rag", passages=tmp_path / "passages", evaluation=evaluation)
    assert {each["method"] for each in rag} == {"In-Context RAG"}
    assert artefact.read(tmp_path / "rag", "harness").settings["numbers"] == {"query": 7, "every": 2}

    windows = {"context": CONTEXT, "stride": CONTEXT // 2}
    keys.run(base_folder, token_folder, tmp_path / "store", DatastoreSettings(), **windows)
    index.run(tmp_path / "store", tmp_path / "index", IndexSettings())
    parts: dict[str, Any] = {"datastore": [tmp_path / "store"], "index": tmp_path / "index"}
    record = {"method": "kNN-LM", "memory": None, "lambda": 0.8, "temperature": 3.0}
    evaluation = write_evaluation(tmp_path / "evaluation", base_folder, [record])
    paper = run(base_folder, tmp_path / "knn", evaluation=evaluation, **parts)
    assert {(each["method"], each["alpha"], each["lambda"]) for each in paper} == {("kNN-LM", None, 0.25)}
    valid = run(base_folder, tmp_path / "valid", alpha="valid", evaluation=evaluation, **parts)
    assert {each["lambda"] for each in valid} == {0.8}
    said = artefact.read(tmp_path / "valid", "harness").settings
    assert said["numbers"] == {"neighbours": 5, "nprobe": 2, "temperature": 3.0}
    recipe = artefact.read(tmp_path / "index", "index").recipe
    same = write_evaluation(tmp_path / "same", base_folder, [record], index=recipe)
    run(base_folder, tmp_path / "valid", alpha="valid", evaluation=same, **parts)
    other = write_evaluation(tmp_path / "other", base_folder, [record], index="0" * 32)
    with pytest.raises(MemDecError, match="found one of another index; check the paths"):
        run(base_folder, tmp_path / "third", alpha="valid", evaluation=other, **parts)


@pytest.mark.parametrize("spread", [False, True])
def test_a_base_that_is_spread_is_spread_in_every_system(monkeypatch: pytest.MonkeyPatch, spread: bool) -> None:
    said: list[Any] = []
    for name in ("MemDecInterp", "MemDecKnnLM", "MemDecIcRag"):
        monkeypatch.setattr(baselines, name, lambda *_, **given: said.append(given.get("parallelize", False)))
    one = Path("one")
    parts = Parts(base="b", memory=one, datastore=(one,), index=one, passages=one, lora=one, dapt=one, spread=spread)
    for system in SYSTEMS:
        baselines.of_system(system, parts)
    assert said == [spread] * len(SYSTEMS)


def test_alpha_of_an_evaluation_is_used_and_must_be_of_these_models(
    data: Path, base_folder: Path, small_folder: Path, dapt_folder: Path, tmp_path: Path
) -> None:
    record = {"method": "MemDec", "memory": "mine", "alpha": 0.35}
    evaluation = write_evaluation(tmp_path / "evaluation", base_folder, [record])
    given: dict[str, Any] = {"memory": str(small_folder), "evaluation": evaluation}
    found = run(base_folder, tmp_path / "run", alpha="valid", name="mine", **given)
    assert {each["alpha"] for each in found} == {0.35}
    with pytest.raises(MemDecError, match="expected one record of MemDec with the memory other, found 0"):
        run(base_folder, tmp_path / "other", alpha="valid", name="other", **given)
    with pytest.raises(MemDecError, match="expected one record of In-Context RAG, found 0"):
        run(base_folder, tmp_path / "other", passages=tmp_path, evaluation=evaluation)
    with pytest.raises(MemDecError, match="found one of another base"):
        run(dapt_folder, tmp_path / "other", alpha="valid", name="mine", **given)
    with pytest.raises(MemDecError, match="expected --evaluation with the weight of MemDec"):
        run(base_folder, tmp_path / "other", alpha="valid", memory=str(small_folder))


def test_options_are_not_scored_behind_a_chat_template(data: Path, base_folder: Path) -> None:
    """lm-eval then leaves out the space in front of an option, whose tokens were counted with it."""
    manager = TaskManager(
        include_path=str(HARNESS_TASKS), include_defaults=False, metadata={"pretrained": str(base_folder)}
    )
    task = manager.load(["memdec_fpb"])["tasks"]["memdec_fpb"]
    with pytest.raises(
        MemDecError, match=r"memdec_fpb: expected prompts as AdaptLLM has them, found a chat template; lea"
    ):
        task.build_all_requests(rank=0, world_size=1, apply_chat_template=True)


@pytest.mark.parametrize(("given", "n"), [({"limit": 3}, 3), ({"samples": [0, 4]}, 2)])
def test_more_processes_than_rows_are_refused_before_one_waits(
    data: Path, base_folder: Path, given: Any, n: int
) -> None:
    manager = TaskManager(
        include_path=str(HARNESS_TASKS), include_defaults=False, metadata={"pretrained": str(base_folder)}
    )
    task = manager.load(["memdec_fpb"])["tasks"]["memdec_fpb"]
    task.build_all_requests(rank=n - 1, world_size=n, **given)
    for rank in range(n + 1):
        with pytest.raises(
            MemDecError, match=rf"memdec_fpb: expected at most {n} processes, .* found {n + 1}; start fewer"
        ):
            task.build_all_requests(rank=rank, world_size=n + 1, **given)


def test_alpha_is_tuned_on_rows_that_are_not_scored(
    data: Path, base_folder: Path, small_folder: Path, tmp_path: Path
) -> None:
    memory = {"memory": str(small_folder)}
    with pytest.raises(
        MemDecError, match=r"found none of dcpmi_cb_kl \(validation\); run `memdec data fetch --task cb`"
    ):
        run(base_folder, tmp_path / "run", ["dcpmi_cb_kl"], alpha="tune", **memory)
    file = data / "cb" / "validation.jsonl"
    rows = (data / "cb" / "test.jsonl").read_text().splitlines()[::-1]
    file.write_text("\n".join(rows) + "\n")
    found = run(base_folder, tmp_path / "run", ["dcpmi_cb_kl"], alpha="tune", **memory)
    (results,) = (tmp_path / "run").glob("results_*.json")
    chosen = json.loads(results.read_text())["config"]["alphas"]["dcpmi_cb_kl"]
    assert chosen["source"] == "tuned on validation"
    assert {each["alpha"] for each in found} == {chosen["alpha"]}
    recipe = artefact.read(tmp_path / "run", "harness").recipe
    file.write_text("\n".join(rows[1:]) + "\n")
    run(base_folder, tmp_path / "run", ["dcpmi_cb_kl"], alpha="tune", **memory)
    assert artefact.read(tmp_path / "run", "harness").recipe != recipe


# --- resuming, and changed rows ---------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_without_scoring_again(
    data: Path, base_folder: Path, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = {"memory": str(small_folder)}
    whole = run(base_folder, tmp_path / "whole", **memory)
    with monkeypatch.context() as patch:
        patch.setattr(harness, "_check_written", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(base_folder, tmp_path / "killed", **memory)
    with monkeypatch.context() as patch:
        patch.setattr(MemDecForCausalLM, "log_probs", None)
        assert run(base_folder, tmp_path / "killed", **memory) == whole
    assert len(list((tmp_path / "killed").glob("results_*.json"))) == 1


def test_scores_reach_the_disk_while_a_long_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(scores.time, "monotonic", lambda: clock[0])
    store = scores.ScoreStore(tmp_path, {"base": "x"})
    one = scores.TokenScores(np.zeros(3), np.zeros(3), (0.0, 1.0))
    store.put(b"a" * 16, one)
    assert len(scores.ScoreStore(tmp_path, {"base": "x"})) == 0
    clock[0] = 61
    store.put(b"b" * 16, one)
    assert len(scores.ScoreStore(tmp_path, {"base": "x"})) == 2


def test_changed_rows_are_another_run_and_rows_that_the_limit_leaves_out_are_not(
    data: Path, base_folder: Path, tmp_path: Path
) -> None:
    file = data / "fpb" / "adaptllm_schema.jsonl"
    lines = file.read_text().splitlines()
    read = spread(len(lines), 5)
    unread = next(number for number in range(len(lines)) if number not in read)
    before = run(base_folder, tmp_path / "run", limit=5)
    recipe = artefact.read(tmp_path / "run", "harness").recipe
    other = lines[read[0]]
    file.write_text("\n".join([*lines[:unread], other, *lines[unread + 1 :]]) + "\n")
    assert run(base_folder, tmp_path / "run", limit=5) == before
    assert artefact.read(tmp_path / "run", "harness").recipe == recipe
    file.write_text("\n".join([*lines[: read[1]], other, *lines[read[1] + 1 :]]) + "\n")
    after = run(base_folder, tmp_path / "run", limit=5)
    assert artefact.read(tmp_path / "run", "harness").recipe != recipe
    changed = {each["task"] for each, other in zip(after, before, strict=True) if each["rows"] != other["rows"]}
    assert changed == {"memdec_fpb"}


# --- contexts that are read once --------------------------------------------------------------------------------------


def test_a_shared_context_is_read_once_and_scores_as_alone(
    base_folder: Path, small_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["The matrix 3 returns the vector", "The token", "A token 12 reads a window"]
    pairs = [(context, f" {option}") for context in words for option in ("size 12", "matrix of size 7.", "the")]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    model = MemDecInterp(str(base_folder), str(small_folder), alpha=0.4, device="cpu", batch_size=2)
    plain = model.loglikelihood(asked, disable_tqdm=True)
    read: list[int] = []
    usual = MemDecForCausalLM.log_probs

    def counted(self: Any, ids: torch.Tensor, **how: Any) -> Any:
        read.append(ids.numel())
        return usual(self, ids, **how)

    monkeypatch.setattr(MemDecForCausalLM, "log_probs", counted)
    model.loglikelihood(asked, disable_tqdm=True)
    alone, read[:] = sum(read), []
    monkeypatch.setattr(base_lm, "_SAVED", 4)
    shared = model.loglikelihood(asked, disable_tqdm=True)
    torch.testing.assert_close(torch.tensor(shared), torch.tensor(plain), atol=1e-5, rtol=1e-6)
    assert sum(read) < 0.6 * alone
    assert not MemDecForCausalLM.reads_on.func(  # a family whose cache is not that of attention
        type("Mixture", (), {"_all_attend": lambda self: False})()
    )


# --- intervals --------------------------------------------------------------------------------------------------------


def test_an_interval_is_the_same_by_counts_and_by_the_tasks_own_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "RESAMPLES", 500)
    rng = np.random.default_rng(0)
    pairs = [(int(gold), int(gold if rng.random() < 0.6 else rng.integers(3))) for gold in rng.integers(3, size=150)]

    def slow(items: Any) -> float:
        return domain_metrics.macro_f1(items)

    fast = harness.interval(domain_metrics.macro_f1, pairs, 0)
    assert fast == pytest.approx(harness.interval(slow, pairs, 1), abs=0.03)
    assert fast[0] is not None
    assert fast[1] is not None
    assert fast[0] < slow(pairs) < fast[1]
    triples = [(number % 4, *pair) for number, pair in enumerate(pairs)]
    low, high = harness.interval(domain_metrics.headline_f1, triples, 0)
    assert low is not None
    assert high is not None
    assert low < domain_metrics.headline_f1(triples) < high
    assert harness.interval(slow, pairs[:1], 0) == (None, None)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line_before_a_model_is_loaded(
    data: Path,
    base_folder: Path,
    small_folder: Path,
    dapt_folder: Path,
    token_folder: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    def said(*words: object) -> str:
        code, _, err = run_memdec(capsys, "harness", "--base", base_folder, "--out", tmp_path / "run", *words)
        assert code == 2
        return err.strip().splitlines()[-1]

    (data / "rte" / "test.jsonl").unlink()
    names = ["dcpmi_rte_kl", "memdec_fpb", "memdec_rct", "dcpmi_sst2_kl"]
    missing = said(*(word for name in names for word in ("--tasks", name)))
    assert "found none of dcpmi_rte_kl, memdec_rct, dcpmi_sst2_kl; run" in missing
    assert "memdec data fetch --task rte --task rct --task" in missing
    assert "found memdec_fbp; did you mean memdec_fpb?" in said("--tasks", "memdec_fbp")
    assert "arc_easy" in said("--tasks", "arc_easy")
    twice = said("--tasks", "memdec_fpb", "--memory", small_folder, "--dapt", dapt_folder)
    assert "expected the parts of one system, found --dapt, --memory" in twice
    assert "found no index" in said("--tasks", "memdec_fpb", "--datastore", tmp_path)
    assert "expected --spec or single options" in said("--spec", '{"tasks": ["memdec_fpb"]}', "--limit", 3)
    assert "alpha" in said("--spec", '{"tasks": ["memdec_fpb"], "alpha": 1.5}')
    other = tmp_path / "other"
    settings = TrainSettings(epochs=0.1)
    stages.run_finetune(small_folder, token_folder, other, settings, context=CONTEXT, seed=0)
    assert "found something from another model" in said("--tasks", "memdec_fpb", "--dapt", other)
    assert not (tmp_path / "run").exists()


def test_options_say_what_a_spec_says(
    data: Path, base_folder: Path, small_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    common = ("harness", "--base", base_folder, "--memory", small_folder, "--device", "cpu", "--seed", 1)
    spec = '{"tasks": ["memdec_fpb"], "alpha": 0.3, "limit": 4}'
    code, _, err = run_memdec(capsys, *common, "--out", tmp_path / "a", "--spec", spec)
    assert code == 0
    assert "Next: memdec compare" in err
    options = ("--tasks", "memdec_fpb", "--alpha", "0.3", "--limit", "4")
    assert run_memdec(capsys, *common, "--out", tmp_path / "b", *options)[0] == 0
    assert records_of(tmp_path / "a") == records_of(tmp_path / "b")
    recipes = {artefact.read(tmp_path / name, "harness").recipe for name in ("a", "b")}
    assert len(recipes) == 1
