"""The domain tasks of AdaptLLM against plain scripts, `hf`, and metrics worked by hand."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from making import spec
from tokenizers import Tokenizer, normalizers
from tokenizers import models as token_models
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from memdec import HARNESS_TASKS
from memdec.errors import CorpusError
from memdec.maths import mixing
from memdec.models import loading
from memdec.settings import TrainSettings
from memdec.tasks import domain
from memdec.tasks import domain_metrics as am
from memdec.training import stages

ALPHA = 0.4
POSITIONS = 160
LOADERS = {
    "ChemProt": domain.load_choices, "MQP": domain.load_choices, "PubMedQA": domain.load_choices,
    "RCT": domain.load_choices, "USMLE": domain.load_choices, "FiQA_SA": domain.load_choices,
    "FPB": domain.load_choices, "Headline": domain.load_headlines, "NER": domain.load_entities,
    "ConvFinQA": domain.load_numbers, "SCOTUS": domain.load_choices, "CaseHOLD": domain.load_casehold,
    "UNFAIR_ToS": domain.load_multi_gold,
}  # fmt: skip
# Rows of adaptllm_schema.jsonl as SOURCES.md counts them.
COUNTS = {
    "ChemProt": 80, "MQP": 100, "PubMedQA": 100, "RCT": 77, "USMLE": 100, "FiQA_SA": 235, "FPB": 300,
    "Headline": 540, "NER": 98, "ConvFinQA": 9, "SCOTUS": 60, "CaseHOLD": 100, "UNFAIR_ToS": 200,
}  # fmt: skip
SHOTS = ["memdec_casehold_4shot", "memdec_casehold_8shot", "memdec_casehold_16shot"]
# One task of each kind: in the real run these have 20 rows, the others 2.
ORACLES = ["mqp", "fiqa_sa", "headline", "ner", "convfinqa", "casehold", "unfair_tos"]


@pytest.fixture(scope="module")
def pair(tokenizer_folder: Path, token_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Base and memory that see more than the 100 tokens of an answer."""
    folder = tmp_path_factory.mktemp("pair")
    for name, seed, epochs in (("base", 1, 6), ("memory", 7, 2)):
        made = spec(24, seed=seed, layers=1, train=TrainSettings(epochs=epochs, learning_rate=1e-2))
        stages.run_pretrain(made, tokenizer_folder, token_folder, folder / name, context=POSITIONS)
    return folder / "base", folder / "memory"


def metadata(config: str, tokenizer: Path, **more: Any) -> dict[str, Any]:
    return {
        "adaptllm_path": "none",
        "adaptllm_config": config,
        "adaptllm_revision": "0",
        "tokenizer": str(tokenizer),
        **more,
    }


def write(folder: Path, task: str, rows: list[dict[str, Any]], file: str = "adaptllm_schema.jsonl") -> None:
    (folder / task).mkdir(parents=True, exist_ok=True)
    (folder / task / file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def made_rows() -> dict[str, list[dict[str, Any]]]:
    """Rows of each kind, with options of different lengths."""
    options = ["returns", "scales the window of size 4", "shifts it"]
    choices = [
        {"input": f"Question: what does the token {i}?\nThe token {i}", "options": options[i % 3 :] + options[: i % 3],
         "gold_index": i * i % 3} for i in range(9)
    ]  # fmt: skip
    completions = [{"input": f"The vector {i} reads the window.\nThe" + " kernel" * (i % 3)} for i in range(4)]
    return {
        "usmle": choices,
        "fpb": choices,
        "headline": [row | {"gold_index": i % 2, "class_id": i % 9} for i, row in enumerate(choices * 2)],
        "unfair_tos": [row | {"gold_index": sorted({i % 2, i % 3})} for i, row in enumerate(choices)],
        "casehold": [
            {"input_options": [f"The index {i} writes (holding that {o}" + " " * (i == 2) for o in options],
             "output": f") and reads the token {i}.", "gold_index": i * i % 3} for i in range(18)
        ],
        "ner": [row | {"label": "The kernel (organization), Bond (person)"} for row in completions],
        "convfinqa": [row | {"label": ["12", "7"][i % 2]} for i, row in enumerate(completions)],
    }  # fmt: skip


def evaluate(model: str, tasks: list[str], **arguments: Any) -> dict[str, Any]:
    arguments = {"device": "cpu", "batch_size": 16, **arguments}
    manager = TaskManager(include_path=str(HARNESS_TASKS), include_defaults=False, metadata=arguments)
    found = simple_evaluate(
        model=model, model_args=arguments, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    assert found is not None
    result: dict[str, Any] = found
    return result


# --- plain scripts ----------------------------------------------------------------------------------------------------


class Plain:
    """Scores from the logits of both models, one text at a time."""

    def __init__(self, pair: tuple[Path, Path]) -> None:
        self.words = AutoTokenizer.from_pretrained(pair[0])
        self.both = [loading.load(folder).eval() for folder in pair]

    def mean_log_p(self, before: str, after: str) -> float:
        """Mean over the tokens after those of `before`, of the last tokens that fit."""
        whole = self.words.encode(before + after)
        n = len(whole) - len(self.words.encode(before.rstrip()))
        ids = torch.tensor([whole[-POSITIONS - 1 :]])
        with torch.no_grad():
            base, memory = (model(ids[:, :-1]).logits[0, -n:].log_softmax(-1) for model in self.both)
        log_p = mixing.mix(base, [memory], [ALPHA])
        return float(log_p[range(n), ids[0, -n:]].mean())

    def means(self, row: dict[str, Any]) -> list[float]:
        if "output" in row:
            return [self.mean_log_p(prompt, row["output"]) for prompt in row["input_options"]]
        return [self.mean_log_p(row["input"], " " + option) for option in row["options"]]

    def lines(self, prompts: list[str]) -> list[str]:
        """Greedy, 100 tokens, then cut at the end of the line; prompts are cut on the left, equal lengths go together."""
        cut = [self.words.encode(prompt)[-(POSITIONS - 100) :] for prompt in prompts]
        found = {}
        for length in {len(ids) for ids in cut}:
            members = [i for i, ids in enumerate(cut) if len(ids) == length]
            ids = torch.tensor([cut[i] for i in members])
            written, pasts = [], [None, None]
            with torch.no_grad():
                for _ in range(100):
                    outs = [
                        m(ids, past_key_values=past, use_cache=True) for m, past in zip(self.both, pasts, strict=True)
                    ]
                    pasts = [out.past_key_values for out in outs]
                    base, memory = (out.logits[:, -1:].softmax(-1) for out in outs)
                    ids = (ALPHA * memory + (1 - ALPHA) * base).argmax(-1)
                    written.append(ids)
            for i, answer in zip(members, torch.cat(written, 1), strict=True):
                text = self.words.decode(answer).split(self.words.eos_token)[0]
                found[i] = text.split("\n")[0]
        return [found[i] for i in range(len(prompts))]


def plain_f1(pairs: list[tuple[int, int]], weighted: bool) -> float:
    f1, weight = [], []
    for label in {each for pair in pairs for each in pair}:
        hits = sum(right == label == predicted for right, predicted in pairs)
        n_right, n_predicted = (sum(pair[side] == label for pair in pairs) for side in (0, 1))
        f1.append(2 * hits / (n_right + n_predicted))
        weight.append(n_right if weighted else 1)
    return float(np.average(f1, weights=weight))


def plain_scores(task: str, rows: list[dict[str, Any]], answers: list[Any]) -> dict[str, float]:
    """What the paper prints of a task, from predictions or texts."""
    name = task.removeprefix("memdec_").split("_4shot")[0].split("_8shot")[0].split("_16shot")[0]
    if name == "ner":
        return {
            "entity_f1": float(np.mean([plain_entity_f1(r["label"], a) for r, a in zip(rows, answers, strict=True)]))
        }
    if name == "convfinqa":
        hits = [plain_same_number(row["label"], answer) for row, answer in zip(rows, answers, strict=True)]
        return {"exact_match": float(np.mean(hits))}
    if name == "unfair_tos":
        return {"acc": float(np.mean([a in row["gold_index"] for row, a in zip(rows, answers, strict=True)]))}
    pairs = [(row["gold_index"], answer) for row, answer in zip(rows, answers, strict=True)]
    acc = float(np.mean([right == predicted for right, predicted in pairs]))
    if name in ("fpb", "fiqa_sa"):
        return {"weighted_f1": plain_f1(pairs, weighted=True)}
    if name == "headline":
        each = [
            plain_f1([p for p, row in zip(pairs, rows, strict=True) if row["class_id"] == question], weighted=True)
            for question in range(9)
        ]
        return {"headline_f1": sum(each) / 9}
    if name in ("scotus", "casehold"):
        return {"micro_f1": acc, "macro_f1": plain_f1(pairs, weighted=False)}
    return {"acc": acc}


def plain_entity_f1(label: str, answer: str) -> float:
    def parse(text: str) -> list[tuple[str, str]]:
        found = []
        for match in re.finditer(r"(\S+)\s+\((\S+)\)", text):
            if match.groups() not in found:
                found.append(match.groups())
        return found

    right, given = parse(label), parse(answer)
    correct = 0
    for entity in right:
        for other in given:
            if entity[0] == other[0] or entity[1] == other[1]:
                correct += (entity[0] == other[0]) + (entity[1] == other[1])
                break
    precision = correct / (2 * len(given)) if given else 0
    recall = correct / (2 * len(right)) if right else 0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def plain_same_number(label: str, answer: str) -> bool:
    def values(text: str) -> list[float]:
        found = []
        for number in re.findall(r"[-+]?\.?\d+(?:,\d{3})*\.?\d*(?:[eE][-+]?\d+)?%*", text.split("\n")[0]):
            try:
                found.append(eval(number.replace("%", "/100").replace(",", "")))
            except SyntaxError:
                found.append(math.inf)
        return found

    return (
        any(math.isclose(value, values(label)[0], abs_tol=0.01) for value in values(answer)) if values(label) else False
    )


def check_run(found: dict[str, Any], plain: Plain, tasks: list[str]) -> None:
    """Every task of a run equals the plain script on the rows that it scored."""
    for task in tasks:
        samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        rows = [sample["doc"] for sample in samples]
        if "label" in rows[0]:
            answers: list[Any] = plain.lines([row["input"] for row in rows])
            assert [sample["filtered_resps"][0] for sample in samples] == answers, task
        else:
            means = [plain.means(row) for row in rows]
            for sample, expected in zip(samples, means, strict=True):
                sums = [float(log_p) for log_p, _ in sample["filtered_resps"]]
                per_token = [total / n for total, n in zip(sums, sample["doc"]["option_tokens"], strict=True)]
                assert per_token == pytest.approx(expected, abs=1e-5), (task, sample["doc_id"])
            answers = [int(np.argmax(each)) for each in means]
            golds = [row["gold_index"] if isinstance(row["gold_index"], list) else [row["gold_index"]] for row in rows]
            hits = [answer in right for answer, right in zip(answers, golds, strict=True)]
            assert [sample["acc"] for sample in samples] == hits, task
        expected_scores = plain_scores(task, rows, answers)
        values = found["results"][task]
        for metric, value in expected_scores.items():
            assert values[f"{metric},none"] == pytest.approx(value, abs=1e-5), (task, metric)
        assert values["score,none"] == pytest.approx(np.mean(list(expected_scores.values())), abs=1e-5)


def test_made_rows_of_each_kind_equal_a_plain_script(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_rows()
    for task, rows in made.items():
        write(tmp_path, task, rows)
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    tasks = [f"memdec_{name}" for name in made]
    found = evaluate("memdec-interp", tasks, pretrained=str(pair[0]), memory=str(pair[1]), alpha=ALPHA)
    check_run(found, Plain(pair), tasks)
    # The models tell something: answers end with their line, and dividing by tokens changes what is chosen.
    words = AutoTokenizer.from_pretrained(pair[0])
    answers = [sample["filtered_resps"][0] for sample in found["samples"]["memdec_convfinqa"]]
    assert min(len(words.encode(answer)) for answer in answers) < 90
    assert found["results"]["memdec_usmle"]["acc,none"] != found["results"]["memdec_usmle"]["acc_sum,none"]


@pytest.mark.slow
def test_real_rows_of_every_task_equal_a_plain_script(
    pair: tuple[Path, Path], shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for config in LOADERS:
        name = config.lower()
        lines = (shared_data / "tasks" / name / "adaptllm_schema.jsonl").read_text().split("\n")
        write(tmp_path, name, [json.loads(line) for line in lines[: 20 if name in ORACLES else 2] if line])
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    found = evaluate(
        "memdec-interp", ["memdec_domain", *SHOTS], pretrained=str(pair[0]), memory=str(pair[1]), alpha=ALPHA
    )
    names = {config: "pubmedqa" if config == "PubMedQA" else f"memdec_{config.lower()}" for config in LOADERS}
    assert set(found["samples"]) == {*names.values(), *SHOTS}
    check_run(found, Plain(pair), [*(f"memdec_{name}" for name in ORACLES), SHOTS[0]])
    results = {task: values["score,none"] for task, values in found["results"].items() if "score,none" in values}
    for group, configs in (
        ("memdec_biomed", ["ChemProt", "MQP", "PubMedQA", "RCT", "USMLE"]),
        ("memdec_finance", ["FiQA_SA", "FPB", "Headline", "NER", "ConvFinQA"]),
        ("memdec_law", ["SCOTUS", "CaseHOLD", "UNFAIR_ToS"]),
        ("memdec_domain", list(LOADERS)),
    ):
        expected = np.mean([results[names[config]] for config in configs])
        assert found["groups"][group]["score,none"] == pytest.approx(expected), group
    facts = found["configs"]["memdec_casehold_8shot"]["metadata"]["rows"]["test"]
    assert facts["n"] == 4
    assert facts["source"].endswith("adaptllm_schema.jsonl, 8 demonstrations: rows 4 to 11, not scored")


def test_hf_gives_what_alpha_0_gives(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_rows()
    for task in ("casehold", "unfair_tos", "convfinqa"):
        write(tmp_path, task, made[task])
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    tasks = ["memdec_casehold", "memdec_unfair_tos", "memdec_convfinqa"]
    ours = evaluate("memdec-interp", tasks, pretrained=str(pair[0]), memory=str(pair[1]), alpha=0.0)
    theirs = evaluate("hf", tasks, pretrained=str(pair[0]), dtype="float32")
    for task in tasks:
        assert ours["results"][task] == theirs["results"][task]
    for one, other in zip(ours["samples"]["memdec_convfinqa"], theirs["samples"]["memdec_convfinqa"], strict=True):
        assert one["filtered_resps"] == other["filtered_resps"]


# --- metrics ----------------------------------------------------------------------------------------------------------

PAIRS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30)


@given(PAIRS)
def test_f1_equals_a_plain_one(pairs: list[tuple[int, int]]) -> None:
    assert am.weighted_f1(pairs) == pytest.approx(plain_f1(pairs, weighted=True))
    assert am.macro_f1(pairs) == pytest.approx(plain_f1(pairs, weighted=False))
    assert am.micro_f1(pairs) == pytest.approx(np.mean([a == b for a, b in pairs]))


def test_f1_by_hand() -> None:
    pairs = [(0, 0), (0, 1), (1, 1), (2, 1)]  # F1: 2/3, 2/4, 0
    assert am.weighted_f1(pairs) == pytest.approx((2 * 2 / 3 + 0.5 + 0) / 4)
    assert am.macro_f1(pairs) == pytest.approx((2 / 3 + 0.5 + 0) / 3)
    assert am.micro_f1(pairs) == 0.5
    # Question 0: only label 1 is right, found once of two times (F1 2/3); question 5: all right.
    assert am.headline_f1([(0, 1, 1), (0, 1, 0), (5, 0, 0)]) == pytest.approx((2 / 3 + 1) / 2)


@pytest.mark.parametrize(
    ("label", "answer", "f1"),
    [
        ("Evergreen Solar Inc (organization)", "Evergreen Solar Inc (organization)", 1.0),
        ("Evergreen Solar Inc (organization)", "Other Inc (organization)", 1.0),  # only the last word counts
        ("Bond (person), Rome (location)", "Bond (person)", 2 / 3),
        ("Bond (person)", "Bond (location)", 0.5),  # the name, not the type
        ("Bond (person)", "Bond (person), Bond (person)", 1.0),  # repeats are dropped
        ("Bond (person), Bell (person), Paris (location)", "Bell (person)", 3 / 4),  # its type serves Bond as well
        ("Bond (person)", "Bond  (person)", 0.5),  # one of the two spaces stays in the name
        ("Bond (person)", "nobody", 0.0),
        ("Bond (person)", "", 0.0),
    ],
)
def test_entity_f1_by_hand(label: str, answer: str, f1: float) -> None:
    assert am.entity_f1(label, answer) == pytest.approx(f1)


ENTITIES = st.lists(
    st.tuples(st.sampled_from(["Bond", "Bell", "Rome ,", "x"]), st.sampled_from(["person", "location"])), max_size=5
)


@given(ENTITIES, ENTITIES)
def test_entity_f1_equals_a_plain_one(right: list[tuple[str, str]], given_: list[tuple[str, str]]) -> None:
    label, answer = (", ".join(f"{name} ({kind})" for name, kind in each) for each in (right, given_))
    assert am.entity_f1(label, answer) == pytest.approx(plain_entity_f1(label, answer))


@pytest.mark.parametrize(
    ("label", "answer", "right"),
    [
        ("206588", " 206,588", True),
        ("0.14136", "14.1%", True),  # 0.141
        ("0.14136", "14.1", False),
        ("25587", "it is 1 or 25587.009 .", True),  # any number of the answer
        ("25587", "25587.02", False),
        ("-5", "-5", True),
        ("5", "-5", False),
        ("3 of 7", "7", False),  # the first of the label
        ("120", "nothing", False),
        ("120", "\n120", False),  # only the first line
        ("007", "008", True),  # neither is a number of Python: both infinite
        ("1e5", "100000", True),
        ("2000000000", "2000000001", True),  # relative 1e-9
        ("1" * 400, "2" * 400, True),  # too large, both
        ("yes", "yes", False),
    ],
)
def test_same_number_by_hand(label: str, answer: str, right: bool) -> None:
    assert am.same_number(label, answer) is right


@given(st.text("0123456789.,%eE-+ a\n", max_size=12), st.text("0123456789.,%eE-+ a\n", max_size=12))
def test_same_number_equals_a_plain_one(label: str, answer: str) -> None:
    assert am.same_number(label, answer) == plain_same_number(label, answer)


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def word_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Counts words, and does not see zero-width spaces."""
    made = Tokenizer(token_models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.Replace("\u200b", ""), WhitespaceSplit()
    folder = tmp_path_factory.mktemp("words")
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_counts_of_the_real_rows(word_tokenizer: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMDEC_DATA", str(shared_data / "tasks"))
    found = {config: load(**metadata(config, word_tokenizer)) for config, load in LOADERS.items()}
    assert {config: len(rows["test"].rows) for config, rows in found.items()} == COUNTS
    row = found["USMLE"]["test"].rows[0]
    assert row["option_tokens"] == [len(option.split()) for option in row["options"]]


CHOICE = {"input": "Q\nAnswer:", "options": ["No", "Yes"], "gold_index": 1}
HOLDING = {"input_options": ["a", "b"], "output": ") c", "gold_index": 0}
COMPLETION = {"input": "Q", "label": "Bond (person) 7"}
WHERE = r"adaptllm_schema\.jsonl, row 1: expected .*"


@pytest.mark.parametrize(
    ("config", "row", "change", "message"),
    [
        ("USMLE", CHOICE, {"input": None}, "'input' of type str, found None"),
        ("USMLE", CHOICE, {"input": " "}, "text in 'input', found ' '"),
        ("USMLE", CHOICE, {"gold_index": None}, "'gold_index' of type int, found None"),
        (
            "USMLE",
            CHOICE,
            {"gold_index": 2},
            r"'gold_index' from 0 to 1 \(the number of one of 'options'\), found 2; check",
        ),
        ("USMLE", CHOICE, {"gold_index": "1"}, "'gold_index' of one type in all rows, found '1' here and 1 in row 0"),
        ("USMLE", CHOICE, {"gold_index": [1]}, "'gold_index' of one type in all rows"),
        ("USMLE", CHOICE, {"options": ["Yes"], "gold_index": 0}, "at least two 'options', found 1; check"),
        ("USMLE", CHOICE, {"options": ["Yes", 3]}, r"'options' of one type in all rows, found \['Yes', 3\] here"),
        ("USMLE", CHOICE, {"options": ["Yes", ""]}, "text in 'options', found ''"),
        ("USMLE", CHOICE, {"options": ["Yes", "\u200b"]}, "at least one token in every option, found none in option 1"),
        ("Headline", CHOICE | {"class_id": 0}, {"class_id": 9}, "'class_id' from 0 to 8, found 9"),
        ("Headline", CHOICE | {"class_id": 0}, {"class_id": None}, "'class_id' of type int, found None"),
        ("UNFAIR_ToS", CHOICE | {"gold_index": [0]}, {"gold_index": []}, r"of one or more options, found \[\]"),
        ("UNFAIR_ToS", CHOICE | {"gold_index": [0]}, {"gold_index": [0, 2]}, "'gold_index' from 0 to 1 .*, found 2"),
        ("UNFAIR_ToS", CHOICE | {"gold_index": [0]}, {"gold_index": [None]}, r"one type in all rows, found \[None\]"),
        ("CaseHOLD", HOLDING, {"input_options": ["a", "b", "c"]}, "2 'input_options' as in row 0, found 3"),
        ("CaseHOLD", HOLDING, {"output": ""}, "text in 'output', found ''"),
        (
            "CaseHOLD",
            HOLDING,
            {"gold_index": -1},
            r"'gold_index' from 0 to 1 \(the number of one of 'input_options'\), found -1",
        ),
        ("NER", COMPLETION, {"label": None}, "'label' of type str, found None"),
        ("NER", COMPLETION, {"label": "Bond"}, "'label' with entities such as"),
        ("ConvFinQA", COMPLETION, {"label": "none"}, "'label' with a number in its first line"),
        ("ConvFinQA", COMPLETION, {"input": ""}, "text in 'input', found ''"),
    ],
)
def test_bad_rows_are_named(
    config: str, row: dict[str, Any], change: dict[str, Any], message: str,
    word_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    write(tmp_path, config.lower(), [row, row | change])
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    with pytest.raises(CorpusError, match=WHERE + message):
        LOADERS[config](**metadata(config, word_tokenizer))


@pytest.mark.parametrize("config", LOADERS)
def test_changed_columns_and_empty_splits_are_named(
    config: str, word_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    write(tmp_path, config.lower(), [{"question": "Q", "answers": ["A", "B"]}])
    with pytest.raises(CorpusError, match=r"row 0: expected '(input|input_options)' of type"):
        LOADERS[config](**metadata(config, word_tokenizer))
    write(tmp_path, config.lower(), [])
    with pytest.raises(CorpusError, match=f"{config}: expected rows in .* found none"):
        LOADERS[config](**metadata(config, word_tokenizer))


def test_yes_is_a_label_that_nothing_equals(
    word_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "convfinqa", [COMPLETION | {"label": "yes"}])
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    (row,) = domain.load_numbers(**metadata("ConvFinQA", word_tokenizer))["test"].rows
    assert domain.number_results(row, ["yes"]) == {"exact_match": 0.0, "score": 0.0}


# --- demonstrations of CaseHOLD ---------------------------------------------------------------------------------------


def casehold(n: int) -> list[dict[str, Any]]:
    return [
        {
            "input_options": [f"Excerpt {i} (holding that {i}{o}" for o in "abc"],
            "output": f") end {i}.",
            "gold_index": i % 3,
        }
        for i in range(n)
    ]


@pytest.fixture
def load_shots(
    word_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], list[dict[str, Any]]]:
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))

    def load(shots: int) -> list[dict[str, Any]]:
        return list(domain.load_casehold(**metadata("CaseHOLD", word_tokenizer, shots=shots))["test"].rows)

    return load


def test_demonstrations_are_last_rows_that_are_not_scored(
    load_shots: Callable[[int], list[dict[str, Any]]], tmp_path: Path
) -> None:
    rows = casehold(19)
    write(tmp_path, "casehold", rows)
    assert len(load_shots(0)) == 19
    for shots in (4, 8, 16):
        found = load_shots(shots)
        assert found == load_shots(shots)
        done = [f"Excerpt {i} (holding that {i}{'abc'[i % 3]}) end {i}." for i in range(3, 3 + shots)]
        assert [row["input_options"] for row in found] == [
            ["\n\n".join([*done, prompt]) for prompt in row["input_options"]] for row in rows[:3]
        ]
    write(tmp_path, "casehold", rows[:16])
    with pytest.raises(CorpusError, match=r"expected more than 16 rows, .* found 16"):
        load_shots(4)


def test_demonstrations_are_the_first_training_rows_where_there_are_some(
    load_shots: Callable[[int], list[dict[str, Any]]], tmp_path: Path
) -> None:
    write(tmp_path, "casehold", casehold(3))
    train_rows = [
        {"context": f"Train {i} (<HOLDING>) end." + " <HOLDING>" * (i == 1), "endings": ["x", "y"], "label": i % 2}
        for i in range(6)
    ]
    write(tmp_path, "casehold", train_rows, "train.jsonl")
    found = load_shots(4)
    assert len(found) == 3
    start = "Complete the following excerpt from a US court opinion:\n"
    done = [f"{start}Train {i} ({'xy'[i % 2]}) end." for i in (0, 2, 3, 4)]  # row 1 has two places
    assert found[2]["input_options"][0] == "\n\n".join([*done, "Excerpt 2 (holding that 2a"])
    with pytest.raises(CorpusError, match=r"train\.jsonl: expected 8 rows with one <HOLDING> in 'context', found 5"):
        load_shots(8)
    write(tmp_path, "casehold", [train_rows[0], train_rows[2] | {"label": 2}], "train.jsonl")
    with pytest.raises(CorpusError, match=r"train\.jsonl, row 1: expected 'label' from 0 to 1"):
        load_shots(4)
