"""The nine zero-shot tasks against a plain script, lm-eval's own `hf`, the published constants, and bad input."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from making import launch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from memdec import HARNESS_TASKS
from memdec.errors import ConfigError, CorpusError
from memdec.harness.models import MemDecInterp
from memdec.tasks import dcpmi, dcpmi_rows, verbalizers
from memdec.text.tokens import load_tokenizer

ALPHA = 0.3
NAMES = ("sst2", "mr", "cr", "rt", "hyp", "cb", "rte", "agn", "yahoo")
FAMILIES = ("kp", "kl")

# Prompt and domain premise, written here once more.
Template = tuple[Callable[[dict[str, Any]], str], str]
WAS: Template = (lambda row: f"{row['text']} It was", " It was")


def tone(field: str, space: str) -> Template:
    end = "The sentence has a tone that is"
    return (lambda row: f"{row[field]} {end}", space + end)


PROMPTS: dict[str, tuple[Template, Template]] = {
    "sst2": (WAS, tone("text", " ")),
    "mr": (WAS, tone("text", "")),
    "cr": (WAS, WAS),
    "rt": ((lambda row: f"{row['input']} It was", " It was"), tone("input", "")),
    "hyp": (
        (lambda r: r["text"].strip() + "\n neutral or partisan? Answer:", "\n neutral or partisan? Answer:"),
        (lambda r: r["text"].strip() + " neutral or partisan? Answer:", " neutral or partisan? Answer:"),
    ),
    "cb": (
        (
            lambda r: (
                f' question: Given that "{r["premise"]}" Is "{r["hypothesis"]}" true, false, or neither?\n answer:'
            ),
            " the answer is:",
        ),
        (
            lambda r: f"premise: {r['premise']}\nhypothesis: {r['hypothesis']}\nanswer: The hypothesis is",
            "answer: The hypothesis is",
        ),
    ),
    "rte": (
        (
            lambda r: f" {r['premise']}\n question: {r['hypothesis']}  true or false?\n answer:",
            " true or false?\n answer:",
        ),
        (lambda r: f" {r['premise']}\nquestion: {r['hypothesis']} true or false?\nanswer:", "true or false?\nanswer:"),
    ),
    "agn": (
        (lambda r: f"{r['Title']} \n {r['Description']} topic:", " topic:"),
        (lambda r: f"title: {r['Title']}\nsummary: {r['Description']}\ntopic:", "topic:"),
    ),
    "yahoo": (
        (
            lambda r: (
                f"title: {r['question_title']} content: {r['question_content']} answer: {r['best_answer']} topic:"
            ),
            " topic:",
        ),
        (
            lambda r: (
                f"question: {r['question_title']}\nanswer: {r['best_answer']}\nthe topic of the question and answer is"
            ),
            "the topic of the question and answer is",
        ),
    ),
}
LISTS = {  # kp and kl
    "sst2": ("sentiment", "sentiment"), "mr": ("sentiment", "sentiment"), "cr": ("sentiment", "sentiment"),
    "rt": ("sentiment", "rt_small"), "hyp": ("hyp", "hyp"), "cb": ("cb", "cb"), "rte": ("rte", "rte"),
    "agn": ("agn", "agn"), "yahoo": ("yahoo", "yahoo_small"),
}  # fmt: skip


def made_row(name: str, number: int) -> dict[str, Any]:
    text = f"The kernel {number} scales the window of size {number * 7 % 31}."
    label: dict[str, Any] = {
        "sst2": {"label": 1 + number % 5},
        "mr": {"label": number % 2},
        "cr": {"label": number % 2},
        "rt": {"output": ["negative", "positive"][number % 2]},
        "hyp": {"label": number % 2},
        "cb": {"label": ["entailment", "contradiction", "neutral"][number % 3]},
        "rte": {"label": ["entailment", "not_entailment"][number % 2]},
        "agn": {"Class Index": 1 + number % 4},
        "yahoo": {"topic": number % 10},
    }[name]
    return {**{field: f"{text} {field[::-1]}" for field in dcpmi_rows.SETS[name].texts}, **label}


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]], split: str = "test") -> Path:
    (folder / name).mkdir(parents=True, exist_ok=True)
    file = folder / name / f"{split}.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def write_words(folder: Path, name: str, words: dict[str, list[str]]) -> None:
    (folder / "verbalizers").mkdir(parents=True, exist_ok=True)
    labels = [{"name": label, "words": each} for label, each in words.items()]
    (folder / "verbalizers" / f"{name}.json").write_text(json.dumps({"labels": labels}))


@pytest.fixture
def made_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows and long word lists of ours, for all nine."""
    for name in NAMES:
        write_rows(tmp_path, name, [made_row(name, number) for number in range(7)])
    words = ["the", "size", "matrix", "returns", "of", "token", "window", "reads", "model", "a"]
    for name, n_labels in (("sentiment", 2), ("agn", 4), ("yahoo", 10)):
        lists = {f"label {i}": words[i : i + 3 + i % 2] for i in range(n_labels)}
        write_words(tmp_path, name, lists)
        monkeypatch.setitem(verbalizers.SHA256, name, verbalizers.fingerprint(lists))
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def real_data(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twenty real rows of each set (Yahoo has none here) and the real word lists."""
    for name in NAMES:
        file = shared_data / "tasks" / name / "test.jsonl"
        lines = file.read_text().splitlines()[:20] if file.is_file() else []
        write_rows(tmp_path, name, [json.loads(line) for line in lines] or [made_row(name, i) for i in range(20)])
    (tmp_path / "verbalizers").symlink_to(shared_data / "tasks" / "verbalizers")
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def gpt2_pair(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two tiny random models with GPT-2's tokenizer, 128 positions: some prompts are cut."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "gpt2")
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("gpt2")
        plain = {
            "initializer_range": 0.3,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=128, **plain)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders.append(folder)
    return folders[0], folders[1]


def evaluate(
    model: Any, tasks: list[str], tokenizer: Path | None = None, limit: int | None = None, **arguments: Any
) -> dict[str, Any]:
    manager = TaskManager(
        include_path=str(HARNESS_TASKS),
        include_defaults=False,
        metadata={"tokenizer": str(tokenizer)} if tokenizer else arguments,
    )
    results = simple_evaluate(
        model=model,
        model_args={"device": "cpu", **arguments} if isinstance(model, str) else None,
        tasks=tasks,
        task_manager=manager,
        limit=limit,
        bootstrap_iters=0,
    )
    assert results is not None
    return results


def scores_of(results: dict[str, Any], task: str, tokenizer: Any) -> list[dict[str, list[float]]]:
    """Scores of each row from the answers that lm-eval logged."""
    metadata = results["configs"][task]["metadata"]
    lists = verbalizers.read_verbalizer(metadata)
    words = dcpmi.label_words(lists, metadata["canonical"], metadata["word_rule"], tokenizer)
    return [dcpmi.label_scores(*sample["filtered_resps"], words) for sample in results["samples"][task]]


def plain_scores(
    folders: tuple[Path, Path], rows: list[dict[str, Any]], template: Template, lists: list[list[str]], family: str
) -> list[list[float]]:
    """DCPMI of each label and row: logits of both models, one row at a time."""
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    words = AutoTokenizer.from_pretrained(folders[0])

    @torch.no_grad()
    def next_token(context: str) -> list[float]:
        ids = torch.tensor([words.encode(context)[-min(1024, models[0].config.n_positions) :]])
        base, memory = (model(ids, logits_to_keep=1).logits[0, -1].double().softmax(-1) for model in models)
        return (ALPHA * memory + (1 - ALPHA) * base).tolist()

    encoded = [[words.encode(" " + word) for word in label] for label in lists]
    tokens = [[ids[0] for ids in label if family == "kl" or len(ids) == 1] for label in encoded]
    prompt, premise = template
    prior = next_token(premise)
    table = []
    for row in rows:
        p = next_token(prompt(row))
        table.append([sum(math.log(p[t] + 1e-10) - math.log(prior[t] + 1e-10) for t in label) for label in tokens])
    return table


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_a_plain_script(family: str, real: bool, request: pytest.FixtureRequest) -> None:
    data = request.getfixturevalue("real_data" if real else "made_data")
    if real:
        folders = request.getfixturevalue("gpt2_pair")
    else:
        folders = (request.getfixturevalue("base_folder"), request.getfixturevalue("small_folder"))
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    whole = real or family == "kl"
    # The small tokenizer has no whole word for some labels of four kp tasks, which is an error.
    names = NAMES if whole else tuple(name for name in NAMES if name not in ("hyp", "cb", "rte", "yahoo"))
    group = "memdec_dcpmi" if family == "kp" else "memdec_dcpmi_kl"
    results = evaluate(
        "memdec-interp", [group] if whole else [f"dcpmi_{name}_kp" for name in names], pretrained=str(folders[0]),
        memory=str(folders[1]), alpha=ALPHA, batch_size=4,
    )  # fmt: skip
    accuracies = []
    for name in names:
        task = f"dcpmi_{name}_{family}"
        rows = [json.loads(line) for line in (data / name / "test.jsonl").read_text().splitlines()]
        kept = [row for row in rows if not (name == "sst2" and row["label"] == 3)]
        file = data / "verbalizers" / f"{LISTS[name][FAMILIES.index(family)]}.json"
        if file.is_file():
            lists = [label["words"] for label in json.loads(file.read_text())["labels"]]
        else:
            lists = results["configs"][task]["metadata"]["words"]
        expected = plain_scores(folders, kept, PROMPTS[name][FAMILIES.index(family)], lists, family)
        found = scores_of(results, task, tokenizer)
        assert len(found) == len(expected) == len(kept)
        for one, other in zip(found, expected, strict=True):
            # A batch rounds the logits of a row differently in the last bit, and a label has up to 280 words.
            n_words = results["configs"][task]["metadata"]["n_words"].values()
            means = [total / max(1, n) for total, n in zip(other, n_words, strict=True)]
            assert one["acc_mean"] == pytest.approx(means, rel=1e-7, abs=1e-6), task
            assert one["acc"] == pytest.approx(other, rel=1e-7, abs=3e-5), task
        hits = [
            max(range(len(sums)), key=sums.__getitem__) == sample["target"]
            for sums, sample in zip(expected, results["samples"][task], strict=True)
        ]
        accuracies.append(sum(hits) / len(hits))
        assert results["results"][task]["acc,none"] == pytest.approx(accuracies[-1])
    groups = {f"memdec_dcpmi_{family}"} | ({"memdec_dcpmi"} if family == "kp" else set())
    assert results.get("groups", {}).keys() == (groups if whole else set())
    for values in results.get("groups", {}).values():
        assert values["acc,none"] == pytest.approx(sum(accuracies) / 9)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_hf_gives_what_memdec_interp_gives_at_alpha_0(
    family: str, real_data: Path, gpt2_pair: tuple[Path, Path]
) -> None:
    tasks = [f"dcpmi_{name}_{family}" for name in ("rt", "cb", "hyp", "agn")]
    base, memory = gpt2_pair
    tokenizer = AutoTokenizer.from_pretrained(base)
    ours = evaluate("memdec-interp", tasks, limit=6, pretrained=str(base), memory=str(memory), alpha=0.0)
    hf = evaluate("hf", tasks, limit=6, pretrained=str(base), dtype="float32", batch_size=4)
    for task in tasks:
        for one, other in zip(scores_of(ours, task, tokenizer), scores_of(hf, task, tokenizer), strict=True):
            for rule in ("acc_mean", "acc_lm", "acc_canonical"):
                assert one[rule] == pytest.approx(other[rule], rel=1e-5, abs=2e-6)
        for metric in ours["results"][task]:
            assert ours["results"][task][metric] == hf["results"][task][metric]


class Constant(LM):
    """Prefers the words of one label, after prompts only."""

    def __init__(self, words: set[str], premises: set[str]) -> None:
        super().__init__()
        self.words, self.premises = words, premises

    def label_word_probs(self, requests: list[Instance]) -> list[list[float]]:
        return [
            [-3.0 if context in self.premises else -2.0 if word in self.words else -4.0 for word in words]
            for context, words, _ in (request.args for request in requests)
        ]

    loglikelihood = loglikelihood_rolling = generate_until = None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_papers_constant_rows(family: str, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three base rows of the paper's table are what one and the same label for all gives."""
    monkeypatch.setenv("MEMDEC_DATA", str(shared_data / "tasks"))
    first = {f" {word}" for word in ("true", "yes", "accurate", "correct", "faithful", "neutral", "fair", "objective")}
    premises = {PROMPTS[name][FAMILIES.index(family)][1] for name in ("rte", "cb", "hyp")}
    tasks = [f"dcpmi_{name}_{family}" for name in ("rte", "cb", "hyp")]
    found = evaluate(Constant(first, premises), tasks, tokenizer=shared_data / "tokenizers" / "gpt2")["results"]
    for task, (hits, n), shown, label in zip(
        tasks, [(146, 277), (23, 56), (329, 516)], [52.70, 41.07, 63.75], ["entailment", "entailment", "neutral"],
        strict=True,
    ):  # fmt: skip
        row = found[task]
        assert row["acc,none"] == row["acc_mean,none"] == pytest.approx(hits / n)
        assert math.floor(100 * 100 * hits / n) / 100 in (shown, shown - 0.01)
        assert row["predicted_majority_rate,none"] == row[f"predicted_{label},none"] == 1
    assert found[tasks[0]]["majority_class_rate,none"] == pytest.approx(146 / 277)
    assert found[tasks[1]]["majority_class_rate,none"] == pytest.approx(28 / 56)


@pytest.mark.slow
def test_another_alpha_loads_no_model(
    made_data: Path, base_folder: Path, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ["dcpmi_cb_kl", "dcpmi_agn_kl"]
    both = {"pretrained": str(base_folder), "memory": str(small_folder)}
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    fresh = {alpha: evaluate("memdec-interp", tasks, **both, alpha=alpha, batch_size=3) for alpha in (0.0, 0.6, 1.0)}
    evaluate("memdec-interp", tasks, **both, alpha=0.2, scores=str(tmp_path / "scores"))
    monkeypatch.setattr(HFLM, "_create_model", lambda *_, **__: pytest.fail("a model was loaded"))
    for alpha, expected in fresh.items():
        again = evaluate("memdec-interp", tasks, **both, alpha=alpha, scores=str(tmp_path / "scores"))
        for task in tasks:
            for one, other in zip(scores_of(again, task, tokenizer), scores_of(expected, task, tokenizer), strict=True):
                assert one["acc"] == pytest.approx(other["acc"], rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(
    made_data: Path, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ["dcpmi_cb_kl", "dcpmi_rt_kl"]
    alone = evaluate("memdec-interp", tasks, pretrained=str(base_folder))
    out = tmp_path / "out"
    arguments = ["--model", "memdec-interp", "--model_args", f"pretrained={base_folder}", "--tasks", ",".join(tasks)]
    launch(2, "-m", "lm_eval", *arguments, "--batch_size", 2, "--output_path", out, ACCELERATE_USE_CPU="true")
    (file,) = out.rglob("results_*.json")
    found = json.loads(file.read_text())["results"]
    for task in tasks:
        for metric in ("acc", "acc_lm", "acc_pmi", "predicted_majority_rate"):
            assert found[task][f"{metric},none"] == alone["results"][task][f"{metric},none"]


def test_a_context_is_read_once_and_only_its_last_position_has_logits(
    base_folder: Path, small_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MemDecInterp(pretrained=str(base_folder), memory=str(small_folder), alpha=0.3, device="cpu", batch_size=2)
    texts = ["The matrix 3", "The vector 9", "The token 4", "word " * 80 + "is", " is", ""]
    lists = [(" the", " is"), (" is", " a", " of")]
    words = [tuple(word for word in each if len(model.tokenizer.encode(word)) == 1) for each in lists]
    requests = [
        Instance("label_word_probs", {}, (text, each, 60), i)
        for i, (text, each) in enumerate((text, each) for each in words for text in [*texts, " is"])
    ]
    seen: list[tuple[int, int]] = []
    plain = model.model.log_probs

    def spy(ids: torch.Tensor, **kwargs: Any) -> Any:
        out = plain(ids, **kwargs)
        seen.append((len(ids), out[0].shape[1]))
        return out

    monkeypatch.setattr(model.model, "log_probs", spy)
    found = model.label_word_probs(requests)
    assert sum(rows for rows, _ in seen) == len({tuple(model.tok_encode(text)) for text in texts})
    assert {kept for _, kept in seen} == {1}
    assert model.n_cut == 2  # of more than 60 tokens, and of more than the model holds
    pairs = [
        Instance("loglikelihood", {}, (context, word), 0)
        for context, each, _ in (r.args for r in requests)
        for word in each
    ]
    expected = iter(model.loglikelihood(pairs))
    for row in found:
        for value in row:
            assert value == pytest.approx(next(expected)[0], abs=1e-5)
    with pytest.raises(ConfigError, match="expected words of one token, found ' the matrix the matrix'"):
        model.label_word_probs([Instance("label_word_probs", {}, ("A", (" the matrix the matrix",), 9), 0)])


COUNTS = {
    "sst2": 1821, "mr": 2000, "cr": 2000, "rt": 1066, "hyp": 516, "cb": 56, "rte": 277, "agn": 2000,
}  # fmt: skip
FIRST = {"sst2": 912, "mr": 1000, "cr": 1000, "rt": 533, "hyp": 329, "cb": 23, "rte": 146, "agn": 478}
KP_WORDS = {
    **{name: [157, 196] for name in ("sst2", "mr", "cr", "rt")}, "hyp": [3, 3], "cb": [5, 5, 1], "rte": [5, 5],
    "agn": [129, 159, 142, 175], "yahoo": [270, 270, 146, 322, 271, 166, 242, 361, 290, 279],
}  # fmt: skip
KL_WORDS = {
    **{name: [224, 224] for name in ("sst2", "mr", "cr")}, "rt": [4, 4], "hyp": [3, 3], "cb": [5, 6, 1], "rte": [5, 6],
    "agn": [287] * 4, "yahoo": [2] * 10,
}  # fmt: skip
ALPHAS = {"sst2": 0.3, "mr": 0.3, "cr": 0.05, "rt": 0.2, "hyp": 0.2, "cb": 0.3, "rte": 0.6, "agn": 0.2, "yahoo": 0.2}


@pytest.mark.slow
def test_counts_of_rows_and_words_are_the_published_ones(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMDEC_DATA", str(shared_data / "tasks"))
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "gpt2")
    seen = 0
    for name in NAMES:
        for family, expected in (("kp", KP_WORDS), ("kl", KL_WORDS)):
            seen += 1
            metadata = load_yaml(HARNESS_TASKS / "dcpmi" / f"dcpmi_{name}_{family}.yaml")["metadata"]
            assert metadata["paper_alpha"] == ALPHAS[name]
            lists = verbalizers.read_verbalizer(metadata)
            words = dcpmi.label_words(lists, metadata["canonical"], metadata["word_rule"], tokenizer)
            assert [len(label) for label in words.labels] == expected[name]
            assert len(metadata["labels"]) == len(metadata["canonical"]) == len(lists)
            if name in COUNTS:
                rows = dcpmi_rows.load_rows(**metadata)["test"].rows
                assert (len(rows), rows["gold"].count(0)) == (COUNTS[name], FIRST[name])
                assert name == "agn" or len(rows) == metadata["paper_rows"]
    assert seen == 18


def test_a_token_that_two_words_share_counts_twice(tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    words = dcpmi.label_words([["zq1", "zq2"], ["the"]], ["zq1", "the"], "first_token", tokenizer)
    assert words.labels[0][0] == words.labels[0][1] == words.canonical[0]
    p, prior = [math.log(0.5), math.log(0.1)], [math.log(0.25), math.log(0.2)]
    found = dcpmi.label_scores(p, prior, [math.log(0.125), math.log(0.1)], words)
    assert found["acc"] == pytest.approx([2 * math.log(2), -math.log(2)])
    assert found["acc_mean"] == pytest.approx([math.log(2), -math.log(2)])
    assert found["acc_lm"] == pytest.approx([1.0, 0.1])
    assert found["acc_pmi"] == pytest.approx([4 * math.log(2), 0], abs=1e-8)
    assert found["acc_canonical"] == pytest.approx([math.log(2), -math.log(2)])
    none = dcpmi.label_words([["zq1"], ["the"]], ["the", "the"], "single_token", tokenizer)
    assert dcpmi.label_scores([0.0], [0.0], [0.0], none)["acc_mean"][0] == 0


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mr", {"label": None}, r"mr/test\.jsonl, row 1: expected 'label' of type int or str, found None"),
        ("mr", {"label": 7}, r"row 1: expected 'label' to be one of \[0, 1\], found 7"),
        ("cb", {"label": "maybe"}, r"row 1: expected 'label' to be one of .*, found 'maybe'"),
        (
            "mr",
            {"label": "x"},
            r"mr/test\.jsonl, row 1: expected 'label' of one type in all rows, found 'x' here and 0 in row 0; check",
        ),
        ("mr", {"label": 1.0}, r"row 1: expected 'label' of one type in all rows, found 1\.0 here and 0 in row 0"),
        ("agn", {"Title": None}, "row 1: expected 'Title' of type str, found None"),
        ("yahoo", {"gold": 9}, "row 1: expected gold 1 for 'topic' 1, found 9"),
    ],
)
def test_bad_rows_are_named(
    name: str, change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    first = {"gold": 0} if "gold" in change else {}
    write_rows(tmp_path, name, [made_row(name, 0) | first, made_row(name, 1) | change])
    with pytest.raises(CorpusError, match=message):
        dcpmi_rows.load_rows(set=name, paper_rows=2)


def test_bad_sets_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    write_rows(tmp_path, "agn", [{"text": "joined", "label": 0}])
    with pytest.raises(CorpusError, match="row 0: expected 'Title' of type str, found None"):
        dcpmi_rows.load_rows(set="agn", paper_rows=1)
    write_rows(tmp_path, "sst2", [made_row("sst2", 2)])
    with pytest.raises(CorpusError, match="expected rows with a label that is used, found none"):
        dcpmi_rows.load_rows(set="sst2", paper_rows=1)
    write_rows(tmp_path, "cr", [])
    with pytest.raises(CorpusError, match=r"cr/test\.jsonl, found none"):
        dcpmi_rows.load_rows(set="cr", paper_rows=1)
    with pytest.raises(CorpusError, match=r"expected rows in MEMDEC_DATA/mr/validation\.jsonl, found no such file"):
        dcpmi_rows.load_rows(set="mr", split="validation", paper_rows=1)
    with pytest.raises(ConfigError, match="expected split test or validation, found 'train'"):
        dcpmi_rows.load_rows(set="mr", split="train", paper_rows=1)


def test_bad_verbalizers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    with pytest.raises(CorpusError, match=r"expected MEMDEC_DATA/verbalizers/agn\.json, found no such file"):
        verbalizers.read_verbalizer({"verbalizer": "agn"})
    write_words(tmp_path, "agn", {"World": ["politics"], "Sports": ["sports"]})
    with pytest.raises(CorpusError, match=r"expected the words with sha256 \w{16}, found \w{16} \(World 1, Sports 1\)"):
        verbalizers.read_verbalizer({"verbalizer": "agn"})
    (tmp_path / "verbalizers" / "agn.json").write_text('{"labels": [{"name": "World"}]}')
    with pytest.raises(CorpusError, match="'words'"):
        verbalizers.read_verbalizer({"verbalizer": "agn"})


def test_the_raw_word_lists_are_parsed_and_cut() -> None:
    text = "bad, awful,poor \ngood,one-hundred percent,great,fine\n\n"
    found = verbalizers.parse_text(text, ["negative", "positive"])
    assert found == {"negative": ["bad", "awful", "poor"], "positive": ["good", "one-hundred percent", "great"]}
    assert verbalizers.fingerprint(found) == verbalizers.fingerprint({k: v[::-1] for k, v in found.items()})
    assert verbalizers.fingerprint(found) != verbalizers.fingerprint(dict(reversed(found.items())))
    with pytest.raises(CorpusError, match="expected 3 lines, one per label, found 2"):
        verbalizers.parse_text(text, ["a", "b", "c"])


def test_of_all_of_yahoo_the_3000_rows_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    write_rows(tmp_path, "yahoo", [made_row("yahoo", i) for i in range(60_000)])
    rows = dcpmi_rows.load_rows(set="yahoo", paper_rows=3000)["test"].rows
    assert len(rows) == 3000
    assert rows[0]["question_title"].startswith("The kernel 12628 ")
    assert rows[1]["question_title"].startswith("The kernel 37730 ")


def test_rotten_tomatoes_of_the_hub_get_the_fields_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    names = datasets.ClassLabel(names=["neg", "pos"])
    hub = datasets.Dataset.from_dict(
        {"text": ["a fine film", "a dull one"], "label": [1, 0]},
        features=datasets.Features({"text": datasets.Value("string"), "label": names}),
    )
    monkeypatch.delenv("MEMDEC_DATA", raising=False)
    monkeypatch.setattr("memdec.tasks.rows.hub_rows", lambda _: hub)
    rows = dcpmi_rows.load_rows(set="rt", paper_rows=1066)["test"].rows
    assert [(row["input"], row["gold"]) for row in rows] == [("a fine film", 1), ("a dull one", 0)]


@pytest.mark.parametrize("model", ["memdec-interp", "hf"])
def test_a_prompt_is_read_from_its_last_1024_tokens_whatever_the_model_holds(
    model: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=1500, initializer_range=0.2
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "long")
    tokenizer.save_pretrained(tmp_path / "long")
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    text = " ".join(f"the matrix {i} of" for i in range(400))
    rows = [made_row("hyp", 0) | {"text": f"{start} {text}"} for start in ("alpha", "beta")]
    write_rows(tmp_path, "hyp", rows)
    assert len(tokenizer.encode(rows[0]["text"])) > 1024
    arguments = {"pretrained": str(tmp_path / "long")} | ({"dtype": "float32"} if model == "hf" else {})
    results = evaluate(model, ["dcpmi_hyp_kl"], **arguments)
    first, second = results["samples"]["dcpmi_hyp_kl"]
    assert first["filtered_resps"] == second["filtered_resps"]  # what is different was cut
    lists = results["configs"]["dcpmi_hyp_kl"]["metadata"]["words"]
    folder = tmp_path / "long"
    (expected,) = plain_scores((folder, folder), rows[:1], PROMPTS["hyp"][1], lists, "kl")
    (found, _) = scores_of(results, "dcpmi_hyp_kl", tokenizer)
    assert found["acc"] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    if model != "hf":
        assert results["config"]["requests_cut"] == 2
        metadata = {**arguments, "max_context": 1400}
        manager = TaskManager(include_path=str(HARNESS_TASKS), include_defaults=False, metadata=metadata)
        longer = simple_evaluate(
            model, {"device": "cpu", **arguments}, ["dcpmi_hyp_kl"], task_manager=manager, bootstrap_iters=0
        )
        assert longer is not None
        assert longer["samples"]["dcpmi_hyp_kl"][0]["filtered_resps"] != first["filtered_resps"]


def test_a_chat_template_is_put_around_the_premise_too(made_data: Path, base_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    tokenizer.save_pretrained(tmp_path)
    model = MemDecInterp(pretrained=str(base_folder), tokenizer=str(tmp_path), device="cpu")
    manager = TaskManager(
        include_path=str(HARNESS_TASKS), include_defaults=False, metadata={"tokenizer": str(base_folder)}
    )
    results = simple_evaluate(
        model=model, tasks=["dcpmi_mr_kp"], task_manager=manager, limit=2, bootstrap_iters=0, apply_chat_template=True,
        system_instruction="Be brief.",
    )  # fmt: skip
    assert results is not None
    for sample in results["samples"]["dcpmi_mr_kp"]:
        prompt, premise, colon = (
            (each["arg_0"] for each in sample["arguments"].values())
            if isinstance(sample["arguments"], dict)
            else (each[0] for each in sample["arguments"])
        )
        assert prompt.startswith("<system>Be brief.")
        assert prompt.endswith("It was<answer>")
        assert premise == "<system>Be brief.<user> It was<answer>"
        assert colon == "<system>Be brief.<user>:<answer>"


def test_alpha_is_tuned_on_prompts_as_the_run_makes_them(
    made_data: Path, base_folder: Path, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (made_data / "mr" / "validation.jsonl").write_text((made_data / "mr" / "test.jsonl").read_text())
    shutil.copytree(base_folder, tmp_path / "m")
    tokenizer = load_tokenizer(str(base_folder))  # the folder's files but for the template
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    tokenizer.save_pretrained(tmp_path / "m")
    asked: list[str] = []
    answer = MemDecInterp._tuning_answers

    def seen(model: MemDecInterp, requests: Any, alpha: float) -> Any:
        asked.extend(request.args[0] for request in requests)
        return answer(model, requests, alpha)

    monkeypatch.setattr(MemDecInterp, "_tuning_answers", seen)
    model = {"pretrained": str(tmp_path / "m"), "memory": str(small_folder), "alpha": "tune", "device": "cpu"}
    manager = TaskManager(include_path=str(HARNESS_TASKS), include_defaults=False, metadata=model)
    results = simple_evaluate(
        model="memdec-interp", model_args=model, tasks=["dcpmi_mr_kp"], task_manager=manager, limit=2, bootstrap_iters=0,
        apply_chat_template=True, system_instruction="Be brief.",
    )  # fmt: skip
    assert results is not None
    scored = {each["arguments"][0][0] for each in results["samples"]["dcpmi_mr_kp"]}
    assert asked
    assert all(text.startswith("<system>Be brief.<user>") and text.endswith("<answer>") for text in asked)
    assert scored <= set(asked)


def test_space_at_the_end_of_a_template_is_read_by_hf_too(made_data: Path, base_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(base_folder, tmp_path / "m")
    tokenizer = load_tokenizer(str(base_folder))  # the folder's files but for the template
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '\\n' }}"
    tokenizer.save_pretrained(tmp_path / "m")
    manager = TaskManager(
        include_path=str(HARNESS_TASKS), include_defaults=False, metadata={"pretrained": str(tmp_path / "m")}
    )
    found = []
    for model in ("memdec-interp", "hf"):
        results = simple_evaluate(
            model, {"pretrained": str(tmp_path / "m"), "device": "cpu", "dtype": "float32"}, ["dcpmi_cb_kl"], limit=4,
            task_manager=manager, bootstrap_iters=0, apply_chat_template=True,
        )  # fmt: skip
        assert results is not None
        found.append([each for sample in results["samples"]["dcpmi_cb_kl"] for each in sample["filtered_resps"]])
    assert found[0]
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_without_metrics_nothing_is_scored(made_data: Path, base_folder: Path) -> None:
    """`--predict_only`."""
    manager = TaskManager(
        include_path=str(HARNESS_TASKS), include_defaults=False, metadata={"pretrained": str(base_folder)}
    )
    results = simple_evaluate(
        model="memdec-interp", model_args={"pretrained": str(base_folder), "device": "cpu"}, tasks=["dcpmi_cb_kl"],
        task_manager=manager, limit=2, predict_only=True,
    )  # fmt: skip
    assert results is not None
    assert [len(sample["filtered_resps"]) for sample in results["samples"]["dcpmi_cb_kl"]] == [3, 3]
    assert not any(key.startswith("acc") for key in results["results"]["dcpmi_cb_kl"])
