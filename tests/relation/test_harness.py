"""`memdec-interp` against lm-eval's own `hf`, plain loops, and itself under other batch sizes and alphas."""

import json
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from making import CONTEXT, launch, plain_scores, spec
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from memdec import HARNESS_TASKS
from memdec.artefacts import artefact
from memdec.errors import ArtifactError, ConfigError, CorpusError, MemDecError, ModelError, NumericsError
from memdec.harness.base_lm import WrappedLM
from memdec.harness.models import MemDecInterp
from memdec.maths import mixing, statistics
from memdec.models import loading
from memdec.results import sweep
from memdec.settings import TokenizerSpec
from memdec.tasks import perplexity
from memdec.tasks.task import Declared
from memdec.text import corpora, tokens
from memdec.training import stages

TEXT = "\n".join(f"The kernel {i} scales the window of size {i * 7 % 31}." for i in range(25))
PAIRS = [
    ("The matrix 3", " returns the token of size 4."),
    ("The matrix", " 3 returns the token of size 4."),  # the same tokens, of which more are scored
    ("", "The vector 9 reads."),
    ("word " * 80, " shifts the index"),  # longer than the context: cut from the left
    ("The sample", " writes"),
]


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def ours(base: Path, memory: Path | None = None, **kwargs: Any) -> MemDecInterp:
    return MemDecInterp(pretrained=str(base), memory=str(memory) if memory else None, device="cpu", **kwargs)


def theirs(folder: Path, **kwargs: Any) -> HFLM:
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", **kwargs)


def test_alpha_0_and_1_are_the_both_modelsalone_on_pairs(base_folder: Path, small_folder: Path) -> None:
    requests = instances("loglikelihood", PAIRS)
    for alpha, alone in ((0.0, base_folder), (1.0, small_folder)):
        mixed = ours(base_folder, small_folder, alpha=alpha).loglikelihood(requests)
        # With its cache `hf` answers for the first of two requests of the same tokens what it finds for the second.
        single = theirs(alone, logits_cache=False).loglikelihood(requests)
        for (a, greedy), (b, expected) in zip(mixed, single, strict=True):
            assert a == pytest.approx(b, abs=1e-4)
            assert greedy == expected


def test_alpha_0_and_1_are_the_both_modelsalone_on_rolling_texts(base_folder: Path, small_folder: Path) -> None:
    requests = instances("loglikelihood_rolling", [(TEXT,), ("The end.",)])
    for alpha, alone in ((0.0, base_folder), (1.0, small_folder)):
        mixed = ours(base_folder, small_folder, alpha=alpha, stride=CONTEXT).loglikelihood_rolling(requests)
        single = theirs(alone).loglikelihood_rolling(requests)
        assert mixed == pytest.approx(single, rel=1e-6, abs=1e-4)


def test_fault_26_every_token_is_scored_once_with_its_whole_left_context(base_folder: Path, small_folder: Path) -> None:
    model = ours(base_folder, small_folder, alpha=0.3)
    assert (model.context, model.stride) == (CONTEXT, CONTEXT // 2)
    stream = model.tokenizer.encode(TEXT)
    base, memory = (plain_scores(f, stream, model.prefix_token_id, CONTEXT // 2) for f in (base_folder, small_folder))
    assert len(model.token_scores(TEXT).base) == len(stream) == len(base)
    expected = np.log(0.3 * np.exp(memory) + 0.7 * np.exp(base)).sum()
    (found,) = model.loglikelihood_rolling(instances("loglikelihood_rolling", [(TEXT,)]))
    assert found == pytest.approx(expected, rel=1e-6)
    with torch.no_grad():
        p = [
            model.model.base(torch.tensor([stream[:9]])).logits[0, -1].softmax(-1),
            model.model.memories[0](torch.tensor([stream[:9]])).logits[0, -1].softmax(-1),
        ]
        mixed = model.model(torch.tensor([stream[:9]])).logits[0, -1].exp()
    assert torch.allclose(mixed, 0.7 * p[0] + 0.3 * p[1], atol=1e-6)
    assert float(mixed.sum()) == pytest.approx(1, abs=1e-5)


def test_fault_25_results_do_not_depend_on_the_batch_size(base_folder: Path, small_folder: Path) -> None:
    rolling, pairs = instances("loglikelihood_rolling", [(TEXT,)]), instances("loglikelihood", PAIRS)
    found = []
    for size in (1, 4, 16):
        model = ours(base_folder, small_folder, alpha=0.6, batch_size=size)
        found.append([*model.loglikelihood_rolling(rolling), *(x for x, _ in model.loglikelihood(pairs))])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


def test_generation_equals_a_plain_greedy_loop_in_a_left_padded_batch(base_folder: Path, small_folder: Path) -> None:
    model = ours(base_folder, small_folder, alpha=0.5, batch_size=4)
    prompts = ["The matrix", "The token 12 returns the", "A", "The vector 7 reads the index of size 4.\nThe"]
    requests = instances(
        "generate_until", [(p, {"until": ["@@"], "max_gen_toks": 9, "do_sample": False}) for p in prompts]
    )
    plain = []
    for prompt in prompts:
        ids = model.tokenizer.encode(prompt)
        for _ in range(9):
            with torch.no_grad():
                x = torch.tensor([ids])
                p = 0.5 * model.model.base(x).logits[0, -1].softmax(-1) + 0.5 * model.model.memories[0](x).logits[
                    0, -1
                ].softmax(-1)
            ids.append(int(p.argmax()))
            if ids[-1] == model.eot_token_id:
                break
        plain.append(model.tokenizer.decode(ids[len(model.tokenizer.encode(prompt)) :], skip_special_tokens=True))
    assert model.generate_until(requests) == plain
    alone = instances("generate_until", [(p, {"until": ["."], "max_gen_toks": 9}) for p in prompts])
    assert ours(base_folder, small_folder, alpha=0.0).generate_until(alone) == theirs(base_folder).generate_until(alone)


ALPHAS = [0.0, 0.05, 0.3, 0.55, 0.8, 1.0]


def test_another_alpha_is_read_from_the_store_without_a_model(
    base_folder: Path, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rolling = instances("loglikelihood_rolling", [(TEXT,)])
    words = AutoTokenizer.from_pretrained(base_folder)
    context = "The matrix 3"
    ids = torch.tensor([words.encode(context)])
    likely = {words.decode(loading.load(f)(ids).logits[0, -1].argmax()) for f in (base_folder, small_folder)}
    pairs = instances("loglikelihood", [*PAIRS, *((context, word) for word in likely)])
    fresh = {}
    for alpha in ALPHAS:
        model = ours(base_folder, small_folder, alpha=alpha, batch_size=3)
        fresh[alpha] = model.loglikelihood_rolling(rolling), model.loglikelihood(pairs)
    first = ours(base_folder, small_folder, alpha=0.2, scores=str(tmp_path))
    first.loglikelihood_rolling(rolling)
    first.loglikelihood(pairs)
    (store,) = tmp_path.iterdir()
    assert json.loads((store / "manifest.json").read_text())["setting"].keys() >= {"base", "memory"}

    with monkeypatch.context() as patch:
        patch.setattr(HFLM, "_create_model", lambda *_, **__: pytest.fail("a model was loaded"))
        for alpha, (texts, answers) in fresh.items():
            again = ours(base_folder, small_folder, alpha=alpha, scores=str(tmp_path))
            assert again.loglikelihood_rolling(rolling) == pytest.approx(texts, rel=2e-6)
            for (log_p, greedy), (expected, also) in zip(again.loglikelihood(pairs), answers, strict=True):
                assert log_p == pytest.approx(expected, rel=1e-5)
                assert greedy == also
            assert again.get_model_info()["alpha"] == alpha
    assert len({greedy for _, answers in fresh.values() for _, greedy in answers}) == 2

    other = ours(base_folder, small_folder, alpha=0.9, scores=str(tmp_path), stride=3)  # other windows: other scores
    assert other.loglikelihood_rolling(rolling) != pytest.approx(fresh[0.8][0], rel=1e-6)
    assert other.loglikelihood(pairs[:1])[0][0] == pytest.approx(
        ours(base_folder, small_folder, alpha=0.9).loglikelihood(pairs[:1])[0][0]
    )
    assert list(tmp_path.iterdir()) == [store]


def test_a_damaged_part_and_other_weights_count_as_no_scores(
    base_folder: Path, small_folder: Path, tmp_path: Path
) -> None:
    request = instances("loglikelihood_rolling", [(TEXT,)])
    (expected,) = ours(base_folder, small_folder, alpha=0.4, scores=str(tmp_path)).loglikelihood_rolling(request)
    (part,) = tmp_path.glob("*/*.safetensors")
    part.write_bytes(part.read_bytes()[:100])
    with pytest.warns(UserWarning, match="not whole, its scores are made again"):
        again = ours(base_folder, small_folder, alpha=0.4, scores=str(tmp_path))
    assert len(again.store or []) == 0
    assert again.loglikelihood_rolling(request) == [expected]
    swapped = ours(small_folder, base_folder, alpha=0.4, scores=str(tmp_path))
    assert swapped.loglikelihood_rolling(request) != [expected]
    another = ours(base_folder, base_folder, alpha=0.4, scores=str(tmp_path))  # only the memory is another one
    assert another.loglikelihood_rolling(request) != [expected]
    assert len(list(tmp_path.iterdir())) == 3


def test_equal_inputs_run_once_and_logits_only_where_they_are_scored(
    base_folder: Path, small_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = "The matrix 3 returns the token of size 4.\nThe"
    requests = instances("loglikelihood", [(context, f" {word}") for word in ("a", "b", "c", "c")])
    model = ours(base_folder, small_folder, alpha=0.5, batch_size=8)
    expected = [ours(base_folder, small_folder, alpha=0.5).loglikelihood([each])[0] for each in requests]
    seen = []
    plain = model.model.log_probs

    def spy(ids: torch.Tensor, **kwargs: Any) -> Any:
        out = plain(ids, **kwargs)
        seen.append((len(ids), out[0].shape[1]))
        return out

    monkeypatch.setattr(model.model, "log_probs", spy)
    found = model.loglikelihood(requests)
    for (a, x), (b, y) in zip(found, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
        assert x == y
    inputs = {tuple(model._item(*model._encode_pair(*each.args))[1]) for each in requests}
    assert len(inputs) < len(requests)
    assert [rows for rows, _ in seen] == [len(inputs)]
    assert all(kept < 4 for _, kept in seen)


def test_fault_24_bf16_base_and_float32_memory_mix_in_float32(base_folder: Path, small_folder: Path) -> None:
    model = ours(base_folder, small_folder, alpha=0.5, dtype="bfloat16", memory_dtype="float32")
    out = model.model(torch.tensor([[1, 2, 3]])).logits
    assert (model.model.base.dtype, model.model.memories[0].dtype, out.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    assert float(out[0, -1].exp().sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "kind", "message"),
    [
        ({"alpha": 1.5}, ConfigError, "alpha: expected a number from 0 .* found 1.5"),
        ({"alpha": "x"}, ConfigError, "found 'x'"),
        ({"context": 999}, ConfigError, "context: expected at most 32 .* found 999"),
        ({"stride": 40}, ConfigError, "stride 40"),
    ],
)
def test_bad_arguments(
    base_folder: Path, small_folder: Path, kwargs: dict[str, Any], kind: type[MemDecError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        ours(base_folder, small_folder, **kwargs)


def test_bad_models(base_folder: Path, corpus_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"expected a model folder with config\.json, found no such folder"):
        ours(base_folder, tmp_path / "none")
    with pytest.raises(ConfigError, match=r"with memory=<memory decoder>, found 0\.5 without one"):
        ours(base_folder, alpha=0.5)
    with pytest.raises(ConfigError, match="expected pretrained="):
        MemDecInterp(memory=str(base_folder))
    tokens.run_tokenizer(TokenizerSpec(train_on=["made"], vocab_size=290), tmp_path / "t", [corpus_folder])
    tokens.run_tokens(tmp_path / "t", corpus_folder, tmp_path / "s")
    stages.run_pretrain(spec(16), tmp_path / "t", tmp_path / "s", tmp_path / "m", context=CONTEXT)
    with pytest.raises(ModelError, match=r"expected one tokenizer, found two: .* adapt-vocab"):
        ours(base_folder, tmp_path / "m")


def test_nan_weights_are_an_error(base_folder: Path, small_folder: Path) -> None:
    model = ours(base_folder, small_folder, alpha=0.5)
    model.model.memories[0].get_output_embeddings().weight.data[0, 0] = math.nan
    with pytest.raises(NumericsError, match="logits hold NaN"):
        model.loglikelihood_rolling(instances("loglikelihood_rolling", [(TEXT,)]))


def test_without_arguments_it_is_the_papers_pair_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)  # lm_eval unsets it
    with caplog.at_level(logging.WARNING), pytest.raises(ModelError, match=r"Qwen/Qwen2\.5-7B: expected") as caught:
        MemDecInterp()
    assert "Clover-Hill/MemoryDecoder-Qwen-biomed" in caplog.text
    assert "\n" not in str(caught.value)


# --- through lm_eval, by name -------------------------------------------------------------------------------------


def evaluate(model: str, tasks: str, everything: bool = False, **arguments: Any) -> dict[str, Any]:
    """`everything` builds lm-eval's own task list too, as the executable does (seconds)."""
    arguments = {"device": "cpu", **arguments}
    manager = (
        None if everything else TaskManager(include_path=str(HARNESS_TASKS), include_defaults=False, metadata=arguments)
    )
    results = simple_evaluate(model=model, model_args=arguments, tasks=[tasks], task_manager=manager, bootstrap_iters=0)
    assert results is not None
    values: dict[str, Any] = results["results"][tasks]
    return values


@pytest.mark.slow
def test_memdec_ppl_by_name_equals_hf_and_the_stream(
    base_folder: Path, corpus_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hook, the task and the model together; the corpus is the one the model was trained on."""
    mixed = evaluate("memdec-interp", "memdec_ppl", everything=True, pretrained=str(base_folder), stride=CONTEXT)
    single = evaluate("hf", "memdec_ppl", pretrained=str(base_folder), dtype="float32")
    assert mixed["token_perplexity,none"] == pytest.approx(single["token_perplexity,none"], rel=1e-6)
    model = ours(base_folder, stride=CONTEXT)
    text = corpora.joined(corpora.load(corpus_folder, "test"), "eos", model.tokenizer.eos_token)
    log_p = model.token_scores(text).base
    assert mixed["tokens,none"] == len(log_p)
    assert mixed["token_perplexity,none"] == pytest.approx(statistics.perplexity(log_p), rel=1e-6)
    monkeypatch.setenv("MEMDEC_CORPUS", str(corpus_folder.parent / "nothing"))
    with pytest.raises(ArtifactError, match="nothing"):
        evaluate("memdec-interp", "memdec_ppl", pretrained=str(base_folder))


def test_wikitext_from_local_parquet(
    base_folder: Path, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pandas as pd

    folder = tmp_path / "wikitext" / "wikitext-103-raw-v1"
    folder.mkdir(parents=True)
    lines = ["", " = Title = \n", " Some words of text . \n"]
    pd.DataFrame({"text": lines}).to_parquet(folder / "test.parquet")
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    found = evaluate("memdec-interp", "memdec_wikitext", pretrained=str(base_folder))
    assert found["tokens,none"] == len(ours(base_folder).tokenizer.encode("".join(lines)))
    assert found["word_perplexity,none"] == pytest.approx(found["token_perplexity,none"] ** (found["tokens,none"] / 8))
    pd.DataFrame({"text": ["The matrix returns the window .\n"]}).to_parquet(folder / "validation.parquet")
    tuned = evaluate(
        "memdec-interp", "memdec_wikitext", alpha="tune", pretrained=str(base_folder), memory=str(small_folder)
    )
    assert tuned["tokens,none"] == found["tokens,none"]
    for frame, message in (
        ({"text": ["x", None]}, r"test\.parquet, row 1: expected 'text' of type str, found None"),
        ({"lines": ["x"]}, r"test\.parquet: expected a parquet file with the field 'text', found"),
    ):
        pd.DataFrame(frame).to_parquet(folder / "test.parquet")
        with pytest.raises(CorpusError, match=message):
            perplexity.load_wikitext(tokenizer=str(base_folder))
    with pytest.raises(ConfigError, match="expected split test or validation, found 'train'"):
        perplexity.load_wikitext(tokenizer=str(base_folder), split="train")


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adaptllm_schema.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def plain_choice(model: MemDecInterp, row: dict[str, Any]) -> int:
    """AdaptLLM's rule, from logits: mean log-likelihood per token of " " + option."""
    means = []
    for option in row["options"]:
        whole = model.tokenizer.encode(f"{row['input']} {option}")
        n_input = len(model.tokenizer.encode(row["input"]))
        ids = whole[-(model.max_length + 1) :]
        cut = len(whole) - len(ids)
        with torch.no_grad():
            x = torch.tensor([ids[:-1]])
            base, memory = (m(x).logits[0].log_softmax(-1) for m in (model.model.base, *model.model.memories))
            log_p = mixing.mix(base, [memory], [model.weight])
        means.append(np.mean([float(log_p[i - cut - 1, whole[i]]) for i in range(n_input, len(whole))]))
    return int(np.argmax(means))


@pytest.mark.parametrize("real", [False, True])
def test_pubmedqa_equals_a_plain_script(
    real: bool,
    base_folder: Path,
    small_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if real:
        file = request.getfixturevalue("shared_data") / "tasks" / "pubmedqa" / "adaptllm_schema.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()[:20]]
    else:
        rows = [
            {"input": f"Question {i}: is {i} even?\nAnswer:", "options": ["No", "Maybe so", "Yes"], "gold_index": i % 3}
            for i in range(9)
        ]
    write_rows(tmp_path / "pubmedqa", rows)
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    found = evaluate("memdec-interp", "pubmedqa", pretrained=str(base_folder), memory=str(small_folder), alpha=0.4)
    model = ours(base_folder, small_folder, alpha=0.4)
    hits = [plain_choice(model, row) == row["gold_index"] for row in rows]
    assert found["acc,none"] == pytest.approx(np.mean(hits))


@pytest.mark.parametrize("change", [{"gold_index": None}, {"options": ["Yes"]}, {"gold_index": 7}])
def test_bad_rows_are_named(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    row = {"input": "Q\nAnswer:", "options": ["No", "Yes"], "gold_index": 1}
    write_rows(tmp_path / "pubmedqa", [row, row | change])
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    with pytest.raises(CorpusError, match=r"adaptllm_schema\.jsonl, row 1: expected"):
        evaluate("memdec-interp", "pubmedqa", pretrained=str(base_folder))


def test_models_load_when_the_first_request_comes(
    base_folder: Path, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a fault in the rows is found before."""
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    write_rows(tmp_path / "pubmedqa", [{"input": "Q", "options": ["No", "Yes"], "gold_index": 2}])
    with monkeypatch.context() as patch:
        patch.setattr(WrappedLM, "_load", pytest.fail)
        with pytest.raises(
            CorpusError,
            match=r"row 0: expected 'gold_index' from 0 to 1 \(the number of one of 'options'\), found 2; check",
        ):
            evaluate("memdec-interp", "pubmedqa", pretrained=str(base_folder), memory=str(small_folder))
    model = ours(base_folder, small_folder)
    assert model.get_model_info()["pretrained"] == str(base_folder)
    assert isinstance(model.model.base, torch.nn.Module)


def test_a_half_written_memory_is_refused(base_folder: Path, small_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(small_folder, tmp_path / "m")
    (tmp_path / "m" / artefact.MANIFEST).unlink()
    with pytest.raises(ArtifactError, match="unfinished"):
        ours(base_folder, tmp_path / "m", alpha=0.5)


def own_tasks(folder: Path) -> list[str]:
    """Three of lm-eval's own multiple-choice tasks, on rows of ours."""
    words = ["matrix", "vector", "window", "kernel", "token"]
    rows = {
        "boolq": [
            {"passage": f"The {w} {i} returns the size.", "question": f"does the {w} return", "label": i % 2}
            for i, w in enumerate(words * 3)
        ],
        "copa": [
            {"premise": f"The {w} {i} scales.", "question": ["cause", "effect"][i % 2], "choice1": f"It reads {i}.",
             "choice2": f"The {w} shifts the index of size {i}.", "label": i % 2}
            for i, w in enumerate(words * 3)
        ],
        "arc_easy": [
            {"question": f"What does the {w} {i} do?", "answerKey": "ABC"[i % 3],
             "choices": {"text": ["returns", f"reads the {w}", "shifts"], "label": ["A", "B", "C"]}}
            for i, w in enumerate(words * 3)
        ],
    }  # fmt: skip
    source = Path(lm_eval.__file__).parent / "tasks"
    theirs = {"boolq": "super_glue/boolq/default", "copa": "super_glue/copa/default", "arc_easy": "arc/arc_easy"}
    tasks = []
    for name, docs in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, docs)))
        files = dict.fromkeys(("train", "validation", "test"), str(folder / f"{name}.jsonl"))
        task = {"include": f"{source / theirs[name]}.yaml", "task": name, "dataset_path": "json", "dataset_name": None}
        (folder / f"{name}.yaml").write_text(json.dumps(task | {"dataset_kwargs": {"data_files": files}}))
        tasks.append(str(folder / f"{name}.yaml"))
    return tasks


def test_at_alpha_0_lm_evals_own_tasks_give_what_hf_gives(
    base_folder: Path, small_folder: Path, tmp_path: Path
) -> None:
    found = []
    for model, arguments in (
        ("hf", {"dtype": "float32"}),
        ("memdec-interp", {"memory": str(small_folder), "alpha": 0.0, "scores": str(tmp_path / "scores")}),
    ):
        results = simple_evaluate(
            model=model, model_args={"pretrained": str(base_folder), "device": "cpu", "batch_size": 4, **arguments},
            tasks=own_tasks(tmp_path), bootstrap_iters=0, log_samples=True,
        )  # fmt: skip
        assert results is not None
        found.append(results)
    hf, mixed = found
    for task in ("boolq", "copa", "arc_easy"):
        for metric in hf["results"][task]:
            if metric.startswith("acc"):
                assert mixed["results"][task][metric] == hf["results"][task][metric]
        pairs = list(zip(mixed["samples"][task], hf["samples"][task], strict=True))
        assert len(pairs) == 15
        for one, other in pairs:
            for (log_p, greedy), (expected, also) in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
                assert float(log_p) == pytest.approx(float(expected), abs=1e-4)
                assert greedy == also


@pytest.mark.slow
def test_two_processes_share_the_requests_and_their_scores(
    base_folder: Path, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"input": f"Question {i}: is {i} even?\nAnswer:", "options": ["No", "Maybe so", "Yes"], "gold_index": i % 3}
        for i in range(7)
    ]
    scores, out = tmp_path / "scores", tmp_path / "out"
    both_models = {"pretrained": str(base_folder), "memory": str(small_folder)}
    write_rows(tmp_path / "some" / "pubmedqa", rows[::2])
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path / "some"))
    evaluate("memdec-interp", "pubmedqa", scores=str(scores), **both_models)  # the rows that the first process gets
    write_rows(tmp_path / "pubmedqa", rows)
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    alone = evaluate("memdec-interp", "pubmedqa", alpha=0.4, **both_models)
    arguments = f"pretrained={base_folder},memory={small_folder},alpha=0.4,scores={scores}"
    words = ["--model", "memdec-interp", "--tasks", "pubmedqa", "--output_path", out, "--model_args", arguments]
    words += ["--batch_size", "auto"]  # which only the other process has to find
    # As after `pip install memdec` without an extra: nothing here searches.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules.update(dict.fromkeys(['faiss', 'numba']))\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    # `accelerate launch --cpu` starts one process.
    text = launch(2, "-m", "lm_eval", *words, ACCELERATE_USE_CPU="true", PYTHONPATH=path)
    assert text.count(f"loaded {base_folder}") == 1
    (file,) = out.rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["pubmedqa"]["acc,none"] == alone["acc,none"]
    (store,) = scores.iterdir()
    assert sorted(len(load_file(part)["keys"]) for part in store.glob("*.safetensors")) == [9, 12]
    monkeypatch.setattr(WrappedLM, "_load", pytest.fail)  # one process reads what both wrote
    assert "acc,none" in evaluate(
        "memdec-interp", "pubmedqa", alpha=0.9, scores=str(scores), device="cpu", **both_models
    )


def asked(task: str, number: int, says: Declared | None = None) -> Instance:
    """A request as a task of lm-eval makes it; one of ours says what it declares of alpha."""
    request = Instance("loglikelihood", {}, PAIRS[number], number, (task, number, 1))
    if says is not None:
        request.declared = says
    return request


def test_tasks_may_declare_their_alpha(base_folder: Path, small_folder: Path) -> None:
    model = ours(base_folder, small_folder)
    named = [
        asked("declares", i, Declared(0.05)) if i % 2 else asked("does not", i, Declared()) for i in range(len(PAIRS))
    ]
    found = model.loglikelihood(named)
    for alpha, some in ((0.6, slice(0, None, 2)), (0.05, slice(1, None, 2))):
        plain = ours(base_folder, small_folder, alpha=alpha).loglikelihood(instances("loglikelihood", PAIRS[some]))
        assert found[some] == pytest.approx(np.array(plain), rel=1e-5)
    assert model.weight == 0.6
    info = model.get_model_info()
    assert (info["alpha"], info["alphas"]) == (
        None, {"declares": {"alpha": 0.05, "source": "paper"}, "does not": {"alpha": 0.6, "source": "default"}}
    )  # fmt: skip
    alone = ours(base_folder, small_folder)
    alone.loglikelihood(named[1::2])
    assert alone.get_model_info()["alpha"] == 0.05  # of all tasks
    given = ours(base_folder, small_folder, alpha=0.3)
    assert given.loglikelihood(named) == given.loglikelihood(instances("loglikelihood", PAIRS))


def test_of_a_long_context_only_what_is_read_is_kept_and_once(base_folder: Path) -> None:
    model, context = ours(base_folder), "a long text of many words " * 50
    (one, _), (other, _) = (model._encode_pair(context, option) for option in (" a", " the"))
    assert one is other
    assert one == model.tok_encode(context.rstrip())[-(model.max_length + 1) :]
    model.loglikelihood(instances("loglikelihood", [(context, " a"), (context, " the"), ("a", " the")]))
    assert model.n_cut == 2


def test_a_model_object_has_no_tokenizer_of_another_model(
    base_folder: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    model, words = ours(base_folder), tokens.load_tokenizer(str(base_folder))
    words.save_pretrained(tmp_path / "ids")
    file = tmp_path / "ids" / "tokenizer.json"
    known = json.loads(file.read_text())
    vocab = known["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
    file.write_text(json.dumps(known))
    words.eos_token = "!"
    words.save_pretrained(tmp_path / "end")

    def run(**named: Any) -> Any:
        given = {"corpus": str(corpus_folder), **named}
        manager = TaskManager(include_path=str(HARNESS_TASKS), include_defaults=False, metadata=given)
        return simple_evaluate(model=model, tasks=["memdec_ppl"], task_manager=manager, bootstrap_iters=0)

    with pytest.raises(
        ConfigError, match="expected pretrained or tokenizer in --model_args or metadata, found neither"
    ):
        run()
    for wrong in ("ids", "end"):
        with pytest.raises(ConfigError, match=rf"memdec_ppl: expected the model's tok.*'pretrained': '{base_folder}'"):
            run(tokenizer=str(tmp_path / wrong))
    assert run(pretrained=str(base_folder))["results"]["memdec_ppl"]["token_perplexity,none"] > 1


def test_a_text_of_another_number_of_tokens_has_no_perplexity() -> None:
    total = perplexity.WindowSum(-9.0)
    total.windows = {"log_p": [-5.0, -4.0], "tokens": [2, 1], "begins": None}
    doc = {"text": "a b c", "n_tokens": 3, "n_words": 3, "n_bytes": 5}
    assert perplexity.rolling_results(doc, [total])["windows"]["tokens"] == [2, 1]
    with pytest.raises(ConfigError, match=r"expected 4 scored tokens .* found 3"):
        perplexity.rolling_results(doc | {"n_tokens": 4}, [total])


def test_alpha_is_tuned_on_the_split_that_a_task_declares(
    base_folder: Path, dapt_folder: Path, corpus_folder: Path
) -> None:
    best, on_test = (
        next(iter(sweep.tune(str(base_folder), str(dapt_folder), corpus_folder, split=split, device="cpu")))
        for split in ("valid", "test")
    )
    assert best != on_test
    model = ours(base_folder, dapt_folder, alpha="tune")
    arguments = {"pretrained": str(base_folder), "corpus": str(corpus_folder)}
    manager = TaskManager(include_path=str(HARNESS_TASKS), include_defaults=False, metadata=arguments)
    results = simple_evaluate(model=model, tasks=["memdec_ppl"], task_manager=manager, bootstrap_iters=0)
    assert results is not None
    (chosen,) = results["config"]["alphas"].values()
    assert results["config"]["alpha"] == best
    assert (chosen["alpha"], chosen["source"], len(chosen["sweep"])) == (best, "tuned on valid", 21)
    at_best = evaluate("memdec-interp", "memdec_ppl", pretrained=str(base_folder), memory=str(dapt_folder), alpha=best)
    assert results["results"]["memdec_ppl"]["token_perplexity,none"] == pytest.approx(at_best["token_perplexity,none"])
    with pytest.raises(ConfigError, match="a split to tune on or an alpha of the paper, found declares none; give"):
        model.loglikelihood([asked("declares none", 0)])
    model.loglikelihood([asked("has one of the paper", 0, Declared(0.05))])
    assert model.get_model_info()["alphas"]["has one of the paper"] == {
        "alpha": 0.05,
        "source": "paper; no split to tune on",
    }
    for wrong in ({"alpha": "best", "memory": dapt_folder}, {"alpha": "tune"}):
        with pytest.raises(ConfigError, match="alpha: expected a number"):
            ours(base_folder, **wrong)
