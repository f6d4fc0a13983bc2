"""NQ and HotpotQA against a plain greedy loop with plain scores, and against lm-eval's own `hf`."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from memdec import HARNESS_TASKS
from memdec.errors import ConfigError, CorpusError
from memdec.harness.models import MemDecInterp
from memdec.tasks import qa

TASKS = ("nq", "hotpotqa")


def evaluate(model: str, task: str, **arguments: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(HARNESS_TASKS), include_defaults=False, metadata=arguments)
    found = simple_evaluate(
        model=model, model_args={"device": "cpu", "batch_size": 4, **arguments}, tasks=[task], task_manager=manager,
        bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    assert found is not None
    results: dict[str, Any] = found
    return results


def write(folder: Path, task: str, rows: list[dict[str, Any]]) -> None:
    (folder / task).mkdir(parents=True, exist_ok=True)
    (folder / task / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def plain_text(model: MemDecInterp, question: str) -> str:
    """Greedy, 15 tokens, from the mixture of both models' softmax; the prompt's last tokens that fit."""
    if question[-1] != "?":
        question += "?"
    ids = model.tokenizer.encode(
        "Answer these questions:\nQuestion: " + question[0].lower() + question[1:] + "\nAnswer:"
    )
    ids = ids[-(model.max_length - 15) :]
    new: list[int] = []
    for _ in range(15):
        with torch.no_grad():
            p = [
                m(torch.tensor([ids + new])).logits[0, -1].softmax(-1)
                for m in (model.model.base, *model.model.memories)
            ]
        new.append(int(((1 - model.weight) * p[0] + model.weight * p[1]).argmax()))
        if new[-1] == model.eot_token_id:
            break
    return str(model.tokenizer.decode(new, skip_special_tokens=True)).split("\n")[0]


def plain_words(text: str) -> list[str]:
    text = re.sub(r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]""", "", text.lower())
    return [word for word in text.split() if word not in ("a", "an", "the")]


def plain_scores(text: str, answers: list[str]) -> tuple[float, float]:
    """(exact match, F1), both the best over the answers."""
    exact, best = 0.0, 0.0
    for answer in answers:
        found, wanted = plain_words(text), plain_words(answer)
        exact = max(exact, float(found == wanted))
        if wanted in (["yes"], ["no"], ["noanswer"]):
            best = max(best, float(wanted[0] in " ".join(found)))
            continue
        left = list(wanted)
        for word in found:
            if word in left:
                left.remove(word)
        same = len(wanted) - len(left)
        if same:
            precision, recall = same / len(found), same / len(wanted)
            best = max(best, 2 * precision * recall / (precision + recall))
    return exact, best


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_both_scores_equal_a_plain_script(
    task: str, real: bool, base_folder: Path, small_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    arguments = {"pretrained": str(base_folder), "memory": str(small_folder), "alpha": 0.4}
    model = MemDecInterp(device="cpu", **arguments)
    if real:
        file = request.getfixturevalue("shared_data") / "tasks" / task / "validation.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()[:20]]
        kept = rows
    else:  # answers made of what the model says, so that right and half right ones occur
        asked = [
            "Is it",
            "Which vector?",
            "what does the kernel 3 return? ",
            "Who",
            "Why is the window of size 3",
            "which",
        ]
        words = [" ".join(plain_words(plain_text(model, question))) for question in asked]
        exact_or_half = [f"The {w}!" if i % 2 else f"{w} no" for i, w in enumerate(words)]
        listed = [[a, "nothing", a] if w else ["yes"] for a, w in zip(exact_or_half, words, strict=True)]
        rows = [{"question": q, "answer": a} for q, a in zip(asked, listed, strict=True)]
        kept = list(rows)
        if task == "hotpotqa":
            rows = kept = [row | {"answer": row["answer"][-1]} for row in rows]
        else:
            rows.insert(2, {"question": "dropped", "answer": ["one", ")"]})
    write(tmp_path, task, rows)
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    found = evaluate("memdec-interp", f"memdec_{task}", **arguments)
    samples = found["samples"][f"memdec_{task}"]
    assert len(samples) == len(kept)
    assert found["config"]["requests_cut"] == len(kept)  # no prompt fits in 32 positions with 15 new tokens
    expected = []
    for sample, row in zip(samples, kept, strict=True):
        text = plain_text(model, row["question"])
        assert sample["filtered_resps"][0].split("\n")[0] == text
        answers = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
        assert sample["doc"]["answers"] == sorted(set(answers), key=answers.index)
        expected.append(plain_scores(text, answers))
        assert (sample["exact_match"], sample["f1"]) == pytest.approx(expected[-1], abs=1e-9)
    exact, f1 = (sum(column) / len(kept) for column in zip(*expected, strict=True))
    assert found["results"][f"memdec_{task}"]["exact_match,none"] == pytest.approx(exact, abs=1e-9)
    assert found["results"][f"memdec_{task}"]["f1,none"] == pytest.approx(f1, abs=1e-9)
    if not real:
        assert 0 < exact < 1
        assert any(0 < each < 1 for _, each in expected)


def test_hf_says_the_same_as_the_mixture_at_alpha_0_and_the_group_has_both(
    base_folder: Path, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "nq", [{"question": f"what is the matrix {i}", "answer": ["The size", str(i)]} for i in range(6)])
    write(tmp_path, "hotpotqa", [{"question": f"Does it {i}?", "answer": "yes"} for i in range(5)])
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    hf = evaluate("hf", "memdec_qa", pretrained=str(base_folder), dtype="float32")
    ours = evaluate("memdec-interp", "memdec_qa", pretrained=str(base_folder), memory=str(small_folder), alpha=0.0)
    assert set(ours["results"]) == {"memdec_qa", "memdec_nq", "memdec_hotpotqa"}
    for task in ("memdec_nq", "memdec_hotpotqa"):
        texts = [[sample["filtered_resps"] for sample in run["samples"][task]] for run in (hf, ours)]
        assert texts[0] == texts[1]
        assert ours["results"][task]["f1,none"] == hf["results"][task]["f1,none"]
        assert ours["configs"][task]["metadata"]["rows"]["validation"]["n"] == len(texts[0])
    both = [ours["results"][f"memdec_{task}"]["f1,none"] for task in TASKS]
    assert ours["results"]["memdec_qa"]["f1,none"] == pytest.approx(sum(both) / 2)


@pytest.mark.parametrize(
    ("prediction", "truth", "exact", "f1"),
    [
        (" The  Eiffel-Tower.", "eiffeltower", 1, 1),
        ("Paris, France", "Paris", 0, 2 / 3),
        ("an apple a day", "Apple apple", 0, 0.5),
        (" nothing at all", "no", 0, 1),  # the letters of "no", as in the released code
        ("maybe", "No answer", 0, 0),
        ("No answer.", "noanswer", 0, 0),
        ("", "the", 1, 0),
        ("anthem of Athens", "Athens anthem", 0, 0.8),
    ],
)
def test_scores_worked_out_by_hand(prediction: str, truth: str, exact: float, f1: float) -> None:
    assert qa.exact_match(prediction, truth) == exact
    assert qa.f1(prediction, truth) == pytest.approx(f1)
    assert plain_scores(prediction, [truth]) == pytest.approx((exact, f1))


def test_only_the_first_line_counts_and_the_question_takes_its_form() -> None:
    doc = {"question": "Who won", "answers": ["Anna", "Bob Smith"]}
    assert qa.qa_results(doc, [" Bob Smith\nAnna"]) == {"exact_match": 1, "f1": 1}
    assert qa.qa_results(doc, ["\nAnna"]) == {"exact_match": 0, "f1": 0}
    assert qa.prompt(doc) == "Answer these questions:\nQuestion: who won?\nAnswer:"
    assert qa.prompt({"question": "A?"}) == "Answer these questions:\nQuestion: a?\nAnswer:"


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("nq", {"answer": ["x"]}, r"row 1: expected 'question' of type str, found None"),
        ("nq", {"question": "q", "answer": []}, r"row 1: expected texts in 'answer', found \[\]"),
        ("nq", {"question": "q", "answer": ["x", ""]}, r"row 1: expected texts in 'answer'"),
        ("nq", {"question": " ", "answer": ["x"]}, r"row 1: expected a 'question', found ' '"),
        ("nq", {"question": "q", "answer": "x"}, "row 1: expected 'answer' of one type in all rows"),
        ("hotpotqa", {"question": "q"}, r"row 1: expected 'answer' of type str, found None"),
        ("hotpotqa", {"question": "q", "answer": " "}, r"row 1: expected texts in 'answer'"),
        ("hotpotqa", {"question": "q", "answer": 3}, "row 1: expected 'answer' of one type in all rows"),
    ],
)
def test_bad_rows_are_named(
    task: str, row: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {"question": "who", "answer": ["x"] if task == "nq" else "x"}
    write(tmp_path, task, [good, row])
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    load = qa.load_nq if task == "nq" else qa.load_hotpotqa
    with pytest.raises(CorpusError, match=rf"{task}/validation\.jsonl.*{message}"):
        load()


def test_no_rows_and_no_room(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    with pytest.raises(
        CorpusError, match=r"nq_open/validation-\*\.parquet validation at 5dd9790.*: expected rows from the Hub"
    ):
        qa.load_nq()
    write(tmp_path, "nq", [{"question": "who", "answer": [")"]}])
    with pytest.raises(CorpusError, match=r"found only rows with the answer '\)'"):
        qa.load_nq()
    write(tmp_path, "nq", [])
    with pytest.raises(CorpusError, match="found none"):
        qa.load_nq()
    write(tmp_path, "nq", [{"question": "who", "answer": ["x"]}])
    with pytest.raises(ConfigError, match="expected fewer than 15 new tokens"):
        evaluate("memdec-interp", "memdec_nq", pretrained=str(base_folder), max_length=15)


def test_the_real_rows_have_what_the_specification_counts(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMDEC_DATA", str(shared_data / "tasks"))
    for load, file in ((qa.load_nq, "nq"), (qa.load_hotpotqa, "hotpotqa")):
        rows = load()["validation"].rows
        lines = (shared_data / "tasks" / file / "validation.jsonl").read_text().splitlines()
        answers = [json.loads(line)["answer"] for line in lines]
        assert len(rows) == sum(")" not in each if file == "nq" else True for each in answers)
        assert all(qa.prompt(row).endswith("?\nAnswer:") for row in rows)


def test_without_files_the_rows_are_those_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small repositories in the form of the two on the Hub."""
    for name, hub, answer in (("nq", qa.NQ, ["x", "x", "y"]), ("hotpotqa", qa.HOTPOTQA, "yes")):
        assert hub.files is not None
        file = tmp_path / name / hub.files.replace("*", "00000-of-00001")
        file.parent.mkdir(parents=True)
        pd.DataFrame({"id": [1], "question": ["who"], "answer": [answer], "context": [["long"]]}).to_parquet(file)
        monkeypatch.setattr(qa, name.upper(), replace(hub, path=str(tmp_path / name)))
    monkeypatch.delenv("MEMDEC_DATA", raising=False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    found = qa.load_nq()["validation"]
    assert list(found.rows) == [{"question": "who", "answers": ["x", "y"]}]
    assert found.source.endswith("nq_open/validation-*.parquet validation at 5dd9790a83002ad084ddeb7c420dc716852c6f28")
    assert list(qa.load_hotpotqa()["validation"].rows) == [{"question": "who", "answers": ["yes"]}]
