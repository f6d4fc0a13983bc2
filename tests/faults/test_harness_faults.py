"""Faults of the harness: caches of lm-eval, answers that depend on the company, float32 sums, arguments, the hook.

Each test has the right value; tests/faults/README.md lists what the code gave before.
"""

import dataclasses
import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets.arrow_writer import ArrowWriter
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from making import CONTEXT, made_text
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from memdec import HARNESS_TASKS
from memdec.errors import ConfigError, CorpusError, MemDecError
from memdec.harness import answers, arguments
from memdec.harness.baselines import MemDecIcRag, MemDecKnnLM
from memdec.harness.models import MemDecInterp
from memdec.inference.icrag import IcRagForCausalLM
from memdec.maths import kernels
from memdec.maths.windows import windows
from memdec.models import loading, rope
from memdec.results import sweep
from memdec.settings import FileCorpus, HubCorpus
from memdec.tasks import task
from memdec.tasks.rows import HubRows, hub_rows
from memdec.tasks.task import Declared
from memdec.text import corpora

SHORT, LONG = (
    ("The matrix", " returns"),
    ("The matrix returns the window of size 12. " * 3 + "The matrix returns.", " The token"),
)
TEXT = "The matrix 3 returns the window of size 12. The token reads the index.\n" * 3


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def ours(base: Path, memory: Path | None = None, **kwargs: Any) -> MemDecInterp:
    return MemDecInterp(pretrained=str(base), memory=str(memory) if memory else None, device="cpu", **kwargs)


def run(
    base: Path, memory: Path, corpus: Path, tasks: str = "memdec_ppl", metadata: Any = None, **kwargs: Any
) -> dict[str, Any]:
    how = {name: kwargs.pop(name) for name in ("use_cache", "cache_requests", "limit", "num_fewshot") if name in kwargs}
    given = {"corpus": str(corpus), "pretrained": str(base), **(metadata or {})}
    manager = TaskManager(include_path=str(HARNESS_TASKS), include_defaults=False, metadata=given)
    arguments = {"pretrained": str(base), "memory": str(memory), **kwargs}
    results = simple_evaluate(
        "memdec-interp", model_args=arguments, tasks=[tasks], task_manager=manager, device="cpu", batch_size=8,
        bootstrap_iters=0, **how,
    )  # fmt: skip
    assert results is not None
    return results


def perplexity(*args: Any, **kwargs: Any) -> float:
    return float(run(*args, **kwargs)["results"]["memdec_ppl"]["token_perplexity,none"])


# --- lm-eval's cache of answers -------------------------------------------------------------------------------------


def test_use_cache_gives_every_setting_its_own_answers(
    base_folder: Path, small_folder: Path, dapt_folder: Path, tmp_path: Path
) -> None:
    settings: list[tuple[Path, Path | None, dict[str, Any]]] = [
        (base_folder, small_folder, {"alpha": 0.2}),
        (base_folder, small_folder, {"alpha": 0.8}),
        (base_folder, dapt_folder, {"alpha": 0.2}),
        (dapt_folder, small_folder, {"alpha": 0.2}),
        (base_folder, None, {}),
        (base_folder, small_folder, {"alpha": 0.2, "stride": 8}),
        (base_folder, small_folder, {"alpha": 0.2, "context": 16}),
        (base_folder, small_folder, {"alpha": 0.2, "max_length": 16}),
        (base_folder, small_folder, {"alpha": 0.2, "dtype": "bfloat16"}),
        (base_folder, small_folder, {"alpha": 0.2, "memory_dtype": "bfloat16"}),
        (base_folder, small_folder, {"alpha": 0.2, "prefix_token_id": 9}),
    ]
    request = asked("loglikelihood_rolling", (TEXT,))
    right = [ours(base, memory, **how).loglikelihood_rolling(request) for base, memory, how in settings]
    assert len({value for (value,) in right}) >= len(right) - 1  # context=16 and max_length=16 are the same windows
    for _ in range(2):
        models = [ours(base, memory, **how) for base, memory, how in settings]
        lms = [CachingLM(model, str(tmp_path / "answers.db")) for model in models]
        assert [lm.loglikelihood_rolling(request) for lm in lms] == right
        tables = {lm.dbdict.tablename for lm in lms}
        assert len(tables) == len(settings)


def test_use_cache_in_a_whole_run(base_folder: Path, small_folder: Path, corpus_folder: Path, tmp_path: Path) -> None:
    right = [perplexity(base_folder, small_folder, corpus_folder, alpha=alpha) for alpha in (0.2, 0.8)]
    cache = str(tmp_path / "cache")
    for alpha, expected in zip((0.2, 0.8), right, strict=True):
        assert perplexity(base_folder, small_folder, corpus_folder, alpha=alpha, use_cache=cache) == expected


KINDS: dict[str, tuple[Any, ...]] = {
    "loglikelihood": SHORT,
    "loglikelihood_rolling": (TEXT,),
    "generate_until": ("The matrix", {"until": ["@"], "max_gen_toks": 8}),
    "label_word_probs": ("The", (" the", " of"), 8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_of_requests_are_cached_by_setting(
    kind: str, base_folder: Path, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(alpha: float) -> Any:
        lm = CachingLM(ours(base_folder, small_folder, alpha=alpha), str(tmp_path / "answers.db"))
        return getattr(lm, kind)(asked(kind, KINDS[kind]))

    right = [getattr(ours(base_folder, small_folder, alpha=a), kind)(asked(kind, KINDS[kind])) for a in (0.0, 1.0)]
    assert right[0] != right[1]
    assert [answer(0.0), answer(1.0)] == right
    if kind != "label_word_probs":  # which lm-eval never caches
        monkeypatch.setattr(MemDecInterp, "_load", lambda self: pytest.fail("a model was loaded"))
        assert [answer(0.0), answer(1.0)] == right


def test_another_weight_of_the_same_model_has_other_answers(
    base_folder: Path, small_folder: Path, tmp_path: Path
) -> None:
    model = ours(base_folder, small_folder, alpha=0.0)
    lm, found = CachingLM(model, str(tmp_path / "answers.db")), []
    for alpha in (0.0, 1.0):
        model.set_weight(alpha)
        found += lm.loglikelihood(asked("loglikelihood", SHORT))
    assert found == [
        ours(base_folder, small_folder, alpha=a).loglikelihood(asked("loglikelihood", SHORT))[0] for a in (0.0, 1.0)
    ]


def test_where_alpha_is_of_the_task_nothing_is_cached(
    base_folder: Path, small_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def of(name: str, alpha: float) -> Instance:
        (request,) = asked("loglikelihood", SHORT)
        request.task_name, request.declared = name, Declared(alpha)  # type: ignore[attr-defined]
        return request

    lm = CachingLM(ours(base_folder, small_folder), str(tmp_path / "answers.db"))
    assert "scores=FOLDER" in caplog.text
    right = [ours(base_folder, small_folder, alpha=a).loglikelihood([of("x", a)])[0] for a in (0.1, 0.9)]
    for _ in range(2):
        assert lm.loglikelihood([of("one", 0.1)]) == right[:1]
        assert lm.loglikelihood([of("two", 0.9)]) == right[1:]
    assert len(lm.dbdict) == 0
    assert lm.dbdict.tablename == answers.NOTHING


def test_models_of_lm_eval_keep_their_own_table(base_folder: Path, small_folder: Path, tmp_path: Path) -> None:
    hf = CachingLM(HFLM(pretrained=str(base_folder), device="cpu", dtype="float32"), str(tmp_path / "answers.db"))
    (first,) = hf.loglikelihood(asked("loglikelihood", SHORT))
    mixed = CachingLM(ours(base_folder, small_folder, alpha=1.0), str(tmp_path / "answers.db"))
    (second,) = mixed.loglikelihood(asked("loglikelihood", SHORT))
    assert abs(first[0] - second[0]) > 1e-3
    assert hf.loglikelihood(asked("loglikelihood", SHORT)) == [first]


def test_cache_requests_does_not_mix_corpora(
    base_folder: Path, small_folder: Path, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.caching import cache

    monkeypatch.setattr(cache, "PATH", str(tmp_path / "requests"))
    (tmp_path / "other.txt").write_text(made_text(120, 7).replace("matrix", "zebra").replace("window", "ocean"))
    spec = FileCorpus(source="files", path=str(tmp_path / "other.txt"), min_bytes=200)
    corpora.run(spec, tmp_path / "other")
    right = perplexity(base_folder, small_folder, tmp_path / "other", alpha=0.5)
    perplexity(base_folder, small_folder, corpus_folder, alpha=0.5, cache_requests=True)
    assert perplexity(base_folder, small_folder, tmp_path / "other", alpha=0.5, cache_requests=True) == right
    assert not (tmp_path / "requests").exists()


@pytest.mark.parametrize(("commit", "fits"), [("a" * 40, True), ("b" * 40, False)])
def test_rows_of_another_commit_in_the_cache_of_datasets_are_refused(
    commit: str, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the Hub cannot be reached, `datasets` takes the newest version that it has, whatever the revision."""
    from datasets import Dataset, config

    made = Dataset.from_list([{"text": "a"}])
    folder = tmp_path / "who___what" / "default" / "0.0.0" / ("a" * 40)
    folder.mkdir(parents=True)
    made.info.config_name, made.info.dataset_name, made.info.builder_name = "default", "what", "parquet"
    made.info.splits = {"test": {"name": "test", "num_bytes": 1, "num_examples": 1, "dataset_name": "what"}}
    made.info.version = "0.0.0"
    (folder / "dataset_info.json").write_text(json.dumps(dataclasses.asdict(made.info), default=str))
    with ArrowWriter(path=str(folder / "what-test.arrow")) as writer:
        writer.write({"text": "a"})
        writer.finalize()
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path)
    hub = HubRows("who/what", None, "test", commit)
    if fits:
        assert hub_rows(hub)["text"] == ["a"]
    else:
        with pytest.raises(CorpusError, match=f"expected rows of commit {commit}, found another version in"):
            hub_rows(hub)
    spec = HubCorpus(source="hub", path="who/what", revision=commit, splits={"train": "test"})
    if fits:
        assert [each.text for each in corpora._hub_documents(spec, "train")] == ["a"]
    else:
        with pytest.raises(CorpusError, match=f"expected rows of commit {commit}, found another version in"):
            next(corpora._hub_documents(spec, "train"))
    unnamed = spec.model_copy(update={"revision": None})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # then what is there is known by its commit
    assert corpora._version(unnamed) == f"who/what {'a' * 40}"


# --- an answer does not depend on the company -----------------------------------------------------------------------


def _rotary(kind: str, vocab: int) -> Any:
    """A model with rotary frequencies of this kind, which change after 16 tokens (Llama's: after 24)."""
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0,
        "num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3,
        "tie_word_embeddings": False,
    }  # fmt: skip
    long = {"short_factor": [1.0] * 8, "long_factor": [4.0 + i for i in range(8)]}
    if kind == "longrope":
        return Phi3ForCausalLM(
            Phi3Config(
                num_key_value_heads=2, max_position_embeddings=128, original_max_position_embeddings=16,
                rope_scaling={"rope_type": "longrope", **long}, **common,
            )
        )  # fmt: skip
    if kind == "dynamic":
        return LlamaForCausalLM(
            LlamaConfig(
                max_position_embeddings=24, rope_parameters={"rope_type": "dynamic", "factor": 8.0, "rope_theta": 1e4}, **common
            )
        )  # fmt: skip
    rotations = {
        "full_attention": {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 1e4},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            max_position_embeddings=24, head_dim=16, num_key_value_heads=1, rope_parameters=rotations, sliding_window=8,
            layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=16, **common,
        )
    )  # fmt: skip


@pytest.fixture(scope="module", params=["longrope", "dynamic", "layered"])
def rotary(request: pytest.FixtureRequest, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = AutoTokenizer.from_pretrained(tokenizer_folder)
    folder = tmp_path_factory.mktemp("rotary")
    _rotary(request.param, len(words)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def _alone(folder: Path, context: str, continuation: str) -> float:
    """log-likelihood from a new model that reads this text alone."""
    words, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids, n = words.encode(context + continuation), len(words.encode(context))
    with torch.no_grad():
        log_p = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    return float(sum(log_p[p - 1, ids[p]] for p in range(n, len(ids))))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_short_request_is_scored_as_alone_beside_and_after_a_long_one(
    rotary: Path, batch_size: int, tmp_path: Path
) -> None:
    pairs = [SHORT, LONG, (LONG[0][:60], " window"), ("The", " token")]
    right = [_alone(rotary, *pair) for pair in pairs]
    how: dict[str, Any] = {"dtype": "float32", "max_length": 128, "batch_size": batch_size}
    longrope = loading.config(rotary).max_position_embeddings > 24  # a memory of the others would limit the texts to 24
    for memory, alpha in ((None, 0.0), (rotary, 0.5))[: 1 + longrope]:
        model = ours(rotary, memory, alpha=alpha, scores=str(tmp_path), **how)
        for order in (pairs, pairs[::-1]):
            found = dict(zip(order, model.loglikelihood(asked("loglikelihood", *order)), strict=True))
            assert [found[pair][0] for pair in pairs] == pytest.approx(right, abs=1e-4)
        (again,) = ours(rotary, memory, alpha=alpha, scores=str(tmp_path), **how).loglikelihood(
            asked("loglikelihood", SHORT)
        )
        assert again[0] == pytest.approx(right[0], abs=1e-4)
    model = ours(rotary, **how)
    for pair, expected in zip(
        pairs[::-1], right[::-1], strict=True
    ):  # one call after the other, the longest in between
        assert model.loglikelihood(asked("loglikelihood", pair))[0][0] == pytest.approx(expected, abs=1e-4)


def test_a_context_of_spaces_is_scored_from_the_prefix(base_folder: Path) -> None:
    pairs = [(" ", "matrix returns"), ("\n", "The"), SHORT]
    words = AutoTokenizer.from_pretrained(base_folder)
    right = [_alone(base_folder, words.bos_token, text) for text in (" matrix returns", "\nThe")]
    for order in (pairs[:1], pairs):
        found = ours(base_folder, dtype="float32", batch_size=4).loglikelihood(asked("loglikelihood", *order))
        assert [each for each, _ in found[:2]] == pytest.approx(right[: len(found)], abs=1e-4)


def test_words_and_texts_are_scored_as_alone(rotary: Path) -> None:
    model = ours(rotary, dtype="float32", max_length=128, batch_size=4)
    contexts = [LONG[0], "The matrix", "The"]
    found = model.label_word_probs(asked("label_word_probs", *((c, (" window",), 128) for c in contexts)))
    right = [_alone(rotary, context, " window") for context in contexts]
    assert [row[0] for row in found] == pytest.approx(right, abs=1e-4)
    texts = asked("loglikelihood_rolling", (TEXT,), ("The matrix",))
    one = [ours(rotary, dtype="float32", batch_size=1, context=20).loglikelihood_rolling([text])[0] for text in texts]
    model = ours(rotary, dtype="float32", batch_size=4, context=20)
    assert model.loglikelihood_rolling(texts) == pytest.approx(one, abs=1e-4)


def test_a_text_is_generated_as_alone_in_a_batch(rotary: Path) -> None:
    prompts = ["The", "The matrix returns", LONG[0][:100]]  # the second one crosses the limit while it grows
    requests = asked("generate_until", *((p, {"until": ["@@"], "max_gen_toks": 12}) for p in prompts))
    how: dict[str, Any] = {"dtype": "float32", "max_length": 64}
    alone = [ours(rotary, batch_size=1, **how).generate_until([request])[0] for request in requests]
    assert ours(rotary, batch_size=4, **how).generate_until(requests) == alone
    assert ours(rotary, batch_size=4, **how).generate_until(requests[::-1]) == alone[::-1]


def _rwkv(vocab: int) -> Any:
    """A model whose recurrence reads padding as text."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16, "context_length": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("rwkv", vocab_size=vocab, **sizes))
    for weights in model.parameters():
        weights.data.mul_(6)  # so that what it reads decides what it says
    return model


def test_a_family_that_reads_padding_has_none(tokenizer_folder: Path, tmp_path: Path) -> None:
    words = AutoTokenizer.from_pretrained(tokenizer_folder)
    words.save_pretrained(tmp_path)
    _rwkv(len(words)).save_pretrained(tmp_path)
    prompts = ["The", "The matrix returns", "A window of the matrix returns the"]
    requests = asked("generate_until", *((p, {"until": ["@@"], "max_gen_toks": 12}) for p in prompts))
    how: dict[str, Any] = {"dtype": "float32", "max_length": 64}
    alone = [ours(tmp_path, batch_size=1, **how).generate_until([request])[0] for request in requests]
    assert ours(tmp_path, batch_size=3, **how).generate_until(requests) == alone


def test_a_prompt_that_begins_with_bos_takes_it_from_no_other(rotary: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(rotary, tmp_path / "bos")
    words = AutoTokenizer.from_pretrained(folder)
    bos = words.bos_token, words.bos_token_id
    words.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    words.save_pretrained(folder)
    prompts = [f"{bos[0]}The matrix returns", "The matrix"]
    requests = asked("generate_until", *((p, {"until": ["@@"], "max_gen_toks": 8}) for p in prompts))
    model = ours(folder, dtype="float32", batch_size=4)
    assert model.tok_encode("The")[0] == bos[1]
    assert model.generate_until(requests) == [model.generate_until([request])[0] for request in requests]


def test_an_empty_prompt_is_continued_from_the_prefix(rotary: Path) -> None:
    settings = {"until": ["@@"], "max_gen_toks": 8}
    empty, prefix, longer = asked(
        "generate_until", *((p, settings) for p in ("", "<|endoftext|>", "The matrix returns"))
    )
    model = ours(rotary, dtype="float32", batch_size=4)
    right = model.generate_until([prefix])
    assert model.generate_until([empty]) == right
    assert model.generate_until([longer, empty])[1:] == right


@pytest.mark.parametrize("kind", ["longrope", "rwkv"])
def test_passages_of_different_lengths_do_not_change_each_other(kind: str, tokenizer_folder: Path) -> None:
    words = AutoTokenizer.from_pretrained(tokenizer_folder)
    text = torch.tensor([words.encode(LONG[0])[:14]])
    passage = words.encode(TEXT)[:9]

    class Retriever:
        longest, folder, facts = len(passage), "made", {"vocab_size": len(words)}

        def best(self, query: list[int]) -> list[int]:
            return passage[: 1 + len(query)]

    base = _rwkv(len(words)) if kind == "rwkv" else _rotary(kind, len(words))
    model = IcRagForCausalLM(base.eval(), Retriever(), query=8, every=2)  # type: ignore[arg-type]
    with torch.no_grad():
        whole = model(text).logits[0]
        rows = [model(text[:, : n + 1], logits_to_keep=1).logits[0, 0] for n in range(text.shape[1])]
    assert torch.allclose(whole, torch.stack(rows), atol=1e-4)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "bloom"])  # tests/faults/test_families.py has the others
def test_routed_experts_and_linear_biases_do_not_couple_rows(kind: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    words = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "bos_token_id": 0,
        "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.3,
    }  # fmt: skip
    if kind != "bloom":
        experts = {"num_local_experts": 4} if kind == "mixtral" else {"num_experts": 4, "moe_intermediate_size": 32}
        sizes |= {
            "intermediate_size": 48,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "num_experts_per_tok": 2,
            **experts,
        }
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    pairs = [SHORT, LONG, (LONG[0][:60], " window"), ("The", " token")]
    model = ours(tmp_path, dtype="float32", batch_size=4)
    found = [log_p for log_p, _ in model.loglikelihood(asked("loglikelihood", *pairs))]
    assert found == pytest.approx([_alone(tmp_path, *pair) for pair in pairs], abs=1e-5, rel=1e-6)


def test_length_classes() -> None:
    phi, llama = _rotary("longrope", 50).config, _rotary("dynamic", 50).config
    assert [rope.length_class(phi, n) for n in (1, 16, 17, 99)] == [(0,), (0,), (1,), (1,)]
    assert [rope.length_class(llama, n) for n in (1, 24, 25, 30)] == [(24,), (24,), (25,), (30,)]
    assert rope.length_class(_rotary("layered", 50).config, 30) == (30,)
    assert rope.length_class(GPT2Config(), 5) == ()
    # A text that crosses the limit while it grows is grouped by its length.
    assert [rope.lengths_class([phi, llama], n, 4) for n in (10, 14, 30)] == [((0,), (24,)), (14, (24,)), ((1,), 30)]


def test_windows_are_of_one_length() -> None:
    """So batches of windows (datastore, teacher, training, rolling) are of one length class."""
    for n, context, stride in itertools.product((1, 5, 17, 40), (4, 16), (1, 3, 4)):
        assert len({part.n_inputs for part in windows(n, context, stride)}) == 1


# --- float64 sums ---------------------------------------------------------------------------------------------------


def test_sums_over_many_words_are_those_of_a_float64_script(base_folder: Path, tmp_path: Path) -> None:
    """The error of a float32 normaliser is common to all words of a context."""
    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(base_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6 if weight.ndim > 1 else 1)
    model.save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    some = tuple(
        text
        for token in range(len(words))
        if (text := words.decode([token])).isascii() and words.encode(text) == [token]
    )
    some = tuple(text for text in some if words.encode(":" + text)[1:] == words.encode(text))
    assert len(some) > 129
    contexts = ["The matrix" + " returns the window" * n for n in range(1, 5)]
    lm = ours(tmp_path / "base", dtype="float32", scores=str(tmp_path / "scores"))
    for _ in range(2):  # the second time from the store
        found = lm.label_word_probs(asked("label_word_probs", *((c, some, 32) for c in contexts)))
        lm = ours(tmp_path / "base", dtype="float32", scores=str(tmp_path / "scores"))
        for context, log_p in zip(contexts, found, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([words.encode(context)[-32:]]), logits_to_keep=1).logits[0, -1]
            right = logits.double().log_softmax(-1)[[words.encode(text)[0] for text in some]]
            assert sum(log_p) == pytest.approx(float(right.sum()), abs=1e-5)


def test_the_sum_over_a_text_is_that_of_float64(base_folder: Path) -> None:
    stream = np.random.default_rng(0).integers(0, 300, 4000)
    model = ours(base_folder, dtype="float32", batch_size=8)
    text = model.tokenizer.decode(stream)
    stream = np.asarray(model.tokenizer.encode(text))
    right = 0.0
    for part in windows(len(stream), CONTEXT, CONTEXT // 2):
        ids = torch.from_numpy(part.inputs(stream, model.prefix_token_id))[None]
        with torch.no_grad():
            log_p = model.model.base(ids).logits[0].double().log_softmax(-1)
        right += sum(float(log_p[p - part.begin, stream[p]]) for p in range(part.first, part.end))
    (total,) = model.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))
    assert total == pytest.approx(right, abs=3e-5)


@pytest.mark.parametrize("name", ["dcpmi_cb_kp", "dcpmi_hyp_kp"])
def test_a_label_without_words_is_an_error(
    name: str, base_folder: Path, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {
        "dcpmi_cb_kp": '{"premise": "A", "hypothesis": "B", "label": 0}',
        "dcpmi_hyp_kp": '{"text": "A", "label": 1}',
    }
    (tmp_path / name.split("_")[1]).mkdir()
    (tmp_path / name.split("_")[1] / "test.jsonl").write_text(rows[name])
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    with pytest.raises(ConfigError, match=f"{name}: expected words of one token for each label.* found none for"):
        run(base_folder, small_folder, tmp_path, name, alpha=0.5)


# --- arguments ------------------------------------------------------------------------------------------------------


def test_a_loaded_model_is_no_folder(base_folder: Path, small_folder: Path) -> None:
    model: Any = loading.load(base_folder)
    for given in ({"pretrained": model}, {"pretrained": str(base_folder), "memory": model}):
        with pytest.raises(
            ConfigError, match="expected a folder or Hub id, found GPT2LMHeadModel; save the model"
        ) as caught:
            MemDecInterp(**given, device="cpu")
        assert "\n" not in str(caught.value)


PASSED = {"batch_size": 1, "max_batch_size": None, "device": "cpu"}


def test_alpha_may_be_a_number_in_quotes(base_folder: Path, small_folder: Path) -> None:
    assert ours(base_folder, small_folder, alpha="0.3").weight == 0.3
    with pytest.raises(ConfigError, match=r"alpha: expected a number from 0 .* found 1\.3"):
        ours(base_folder, small_folder, alpha="1.3")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("alhpa=0.5", "found alhpa=; did you mean alpha=?"),
        ("strid=8", "found strid=; did you mean stride=?"),
        ("attn_implementaton=eager", "did you mean attn_implementation=?"),
        ("zzz=1", "found zzz=; known are"),
        ("weight=0.5", "found weight="),
        ("batch_size=8", "expected batch_size as an option of its own, found it in --model_args; give --batch_size 8"),
        ("device=cuda", "give --device cuda"),
        ("alpha=abc", "alpha: expected a number"),
        ("alpha=True", "alpha: expected a number"),
        ("context=1.5", "context: expected a whole number from 1 on, found 1.5"),
        ("stride=0", "stride: expected a whole number from 1 on, found 0"),
        ("context=abc", "context: expected a whole number"),
        ("max_length=abc", "max_length: expected a whole number"),
        ("max_length=999", "max_length: expected at most 32 tokens"),
        ("dtype=foo", "dtype: expected auto, float32, bfloat16 or float16, found 'foo'"),
        ("dtype=int8", "dtype: expected auto"),
        ("memory_dtype=foo", "memory_dtype: expected auto"),
        ("mixed_precision_dtype=0", "mixed_precision_dtype: expected auto"),
        ("scores={base}/config.json", "scores: expected a folder, found the file"),
        ("scores={base}/config.json/x", "scores: expected a folder, found the file"),
        ("scores=", "scores: expected a folder, found ''"),
        ("prefix_token_id=abc", "prefix_token_id: expected a token from 0 to 299"),
        ("prefix_token_id=300", "prefix_token_id: expected a token from 0 to 299"),
        ("add_bos_token=maybe", "add_bos_token: expected True or False"),
        ("truncation=1.5", "truncation: expected True or False"),
        ("peft=5", "peft: expected a text"),
        ("memory=", "memory"),
    ],
)
def test_bad_model_args_are_one_line(words: str, message: str, base_folder: Path, small_folder: Path) -> None:
    text = f"pretrained={base_folder},memory={small_folder}," + words.format(base=base_folder)
    with pytest.raises(MemDecError) as error:
        MemDecInterp.create_from_arg_string(text, PASSED)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_max_length_beyond_the_memory_is_an_error(rotary: Path, small_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_length: expected at most 32 tokens .*, found 64; lower it"):
        ours(rotary, small_folder, max_length=64)


def test_what_hf_takes_is_taken(base_folder: Path, small_folder: Path) -> None:
    given = {
        "pretrained": str(base_folder), "memory": str(small_folder), "attn_implementation": "eager", "use_cache": False,
        "attn_pdrop": 0.0, "use_safetensors": True, "logits_cache": True, "softmax_dtype": "float32", "truncation": True,
        "revision": "main", "bnb_4bit_quant_type": "nf4", "low_cpu_mem_usage": True,
    }  # fmt: skip
    arguments.check(MemDecInterp, "memdec-interp", given, PASSED)
    for name in ("bnb_4bit_quant_type", "low_cpu_mem_usage"):  # not for this model
        del given[name]
    model = MemDecInterp.create_from_arg_obj(given, PASSED)
    assert model.model.base.config.attn_pdrop == 0.0
    assert model.model.base.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (MemDecKnnLM, "pretrained=x", "memdec-knnlm: expected datastore=, index= in --model_args, found pretrained"),
        (MemDecKnnLM, "", "expected pretrained=, datastore=, index= in --model_args, found nothing"),
        (MemDecIcRag, "pretrained=x", "memdec-icrag: expected passages= in --model_args, found pretrained"),
        (MemDecKnnLM, "pretrained=x,datastore=5,index=5", "(memdec-knnlm|5|x): expected"),
    ],
)
def test_missing_arguments_are_one_line(model: Any, given: str, message: str) -> None:
    with pytest.raises(MemDecError, match=message):
        model.create_from_arg_string(given, PASSED)


def test_a_model_that_cannot_be_loaded_says_so_each_time(base_folder: Path, small_folder: Path, tmp_path: Path) -> None:
    model = ours(base_folder, small_folder, peft=str(tmp_path / "none"))
    for _ in range(2):
        with pytest.raises(MemDecError, match="none"):
            model.loglikelihood(asked("loglikelihood", SHORT))


def test_num_fewshot_changes_nothing_where_only_one_split_is_there(
    base_folder: Path, small_folder: Path, corpus_folder: Path
) -> None:
    plain, few = (run(base_folder, small_folder, corpus_folder, alpha=0.5, **how) for how in ({}, {"num_fewshot": 2}))
    assert plain["samples"]["memdec_ppl"][0]["arguments"] == few["samples"]["memdec_ppl"][0]["arguments"]
    assert plain["results"]["memdec_ppl"] == few["results"]["memdec_ppl"]
    assert few["n-shot"]["memdec_ppl"] == 0


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"corpsu": "x"}, "memdec_ppl: expected corpus in --metadata, found corpsu; did you mean corpus"),
        ({"splt": "valid"}, "did you mean split"),
        ({"corpus": 5}, "memdec_ppl: expected corpus to be text, found 5"),
        ({"split": ["valid"]}, "memdec_ppl: expected split to be text"),
        ({"corpus": "/nowhere/at/all"}, "/nowhere/at/all: expected"),
        ({"max_context": "abc"}, "memdec_ppl: expected max_context to be a whole number"),
        ({"max_context": -1}, "memdec_ppl: expected max_context to be a whole number from 1 on, found -1"),
    ],
)
def test_bad_metadata_is_one_line(
    metadata: dict[str, Any], message: str, base_folder: Path, small_folder: Path, corpus_folder: Path
) -> None:
    with pytest.raises(MemDecError, match=message):
        run(base_folder, small_folder, corpus_folder, alpha=0.5, metadata=metadata)


def test_a_mistyped_task_is_named_with_near_ones(base_folder: Path, small_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected the name of a task, found 'memdec_pl'; did you mean memdec_ppl"):
        sweep.run(str(base_folder), str(small_folder), ["memdec_pl"], tmp_path / "out", alphas=[0.5], device="cpu")
    with pytest.raises(ConfigError, match="lm_eval ls tasks"):
        task.check_names(["qqqq"], ["memdec_ppl"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "memdec_pl", "--model_args", "pretrained={base}"], "found 'memdec_pl'; did you mean memdec_ppl"),
        (["--tasks", "memdec_ppl", "--model_args", "pretrained={base},alhpa=1"], "did you mean alpha=?"),
    ],
)
def test_the_lm_eval_command_ends_with_one_line(words: list[str], message: str, base_folder: Path) -> None:
    command = [str(Path(sys.executable).parent / "lm_eval"), "run", "--model", "memdec-interp", "--device", "cpu"]
    given = [word.format(base=base_folder) for word in words]
    done = subprocess.run([*command, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


# --- the start-up hook, and numba's cache -----------------------------------------------------------------------------


@pytest.fixture
def hook() -> ModuleType:
    """A fresh copy of the hook."""
    source = Path(__file__).resolve().parents[2] / "memdec_hook.py"
    spec = importlib.util.spec_from_file_location("memdec_hook_copy", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_the_package_lm_eval_starts_with_one_warning(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manager = type("TaskManager", (), {"__init__": lambda self: None, "match_tasks": lambda self, names: names})
    before = dict(vars(manager))
    monkeypatch.setitem(sys.modules, "memdec", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    hook._try(hook._add_tasks, SimpleNamespace(TaskManager=manager))
    hook._try(hook._register_models, SimpleNamespace())
    assert dict(vars(manager)) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert "lm_eval starts without the memdec-* models and tasks" in line
    assert "MEMDEC_NO_HOOK=1" in line


def test_another_lm_eval_without_our_names_starts_with_one_warning(
    hook: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    hook._try(hook._add_tasks, SimpleNamespace())
    assert "AttributeError" in capsys.readouterr().err


def test_the_hook_passes_any_signature_through(hook: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    class Longer:
        def __init__(
            self, include_path: Any = None, *rest: Any, include_defaults: bool = True, new: int = 0, **more: Any
        ):
            self.seen = include_path, rest, include_defaults, new, more

        def match_tasks(self, names: list[str], new: int = 0) -> list[str]:
            return names

    class Other:
        def __init__(self, folders: Any, new: int = 0) -> None:
            self.seen = folders, new

        def match_tasks(self, names: list[str]) -> list[str]:
            return names

    for kind in (Longer, Other):
        hook._add_tasks(SimpleNamespace(TaskManager=kind))
    ours_first = [str(HARNESS_TASKS), "x"]
    assert Longer("x", 1, 2, new=3, other=4).seen == (ours_first, (1, 2), True, 3, {"other": 4})
    assert Longer("x", include_defaults=False).seen == ("x", (), False, 0, {})
    assert Longer().match_tasks(["a"], new=1) == ["a"]
    assert not capsys.readouterr().err
    assert Other("x", new=3).seen == ("x", 3)
    assert "KeyError" in capsys.readouterr().err


def test_a_start_without_the_module_says_nothing(tmp_path: Path) -> None:
    line = (Path(__file__).resolve().parents[2] / "memdec_hook.pth").read_text()
    code = f"import sys; sys.modules['memdec_hook'] = None; exec({line!r})"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_compiled_loops_work_where_no_folder_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = kernels.njit

    def no_locator(*signature: str, cache: bool = False, **options: Any) -> Any:
        def decorate(function: Any) -> Any:
            if cache:
                raise RuntimeError("cannot cache function 'double': no locator available for file")
            return plain(*signature, **options)(function)

        return decorate

    monkeypatch.setattr(kernels, "njit", no_locator)

    @kernels.compiled("int64(int64)")
    def double(x: int) -> int:
        return 2 * x

    assert double(21) == 42
