"""One contract for everything that is compared, and what each system says when it cannot run."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from making import CONTEXT, spec
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from memdec.datastore import index, passages
from memdec.datastore import keys as datastore
from memdec.errors import ArtifactError, ConfigError
from memdec.harness.base_lm import WrappedLM
from memdec.inference.systems import SYSTEMS, Parts
from memdec.inference.wrapper import Wrapper
from memdec.models import loading
from memdec.settings import (
    DatastoreSettings,
    IndexSettings,
    KnnLMSettings,
    LoraSettings,
    PassageSettings,
    RetrievalSettings,
    SystemName,
    TokenizerSpec,
    TrainSettings,
)
from memdec.text import tokens
from memdec.training import stages

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft
NAMES = list(get_args(SystemName))
TUNE = {"epochs": 0.3, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def parts(base_folder: Path, small_folder: Path, token_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    home = tmp_path_factory.mktemp("systems")
    stages.run_finetune(base_folder, token_folder, home / "dapt", TrainSettings(**TUNE), context=CONTEXT, seed=0)
    stages.run_lora(base_folder, token_folder, home / "lora", LoraSettings(rank=2, **TUNE), context=CONTEXT, seed=0)
    datastore.run(base_folder, token_folder, home / "store", DatastoreSettings(), context=CONTEXT, stride=16)
    index.run(home / "store", home / "index", IndexSettings())
    passages.run(token_folder, home / "passages", PassageSettings(passage=12))
    return Parts(
        base=base_folder,
        dapt=home / "dapt",
        lora=home / "lora",
        memory=small_folder,
        datastore=(home / "store",),
        index=home / "index",
        passages=home / "passages",
        alpha=0.4,
        knn_lm=KnnLMSettings(temperature=0.5, neighbours=9),
        retrieval=RetrievalSettings(query=8),
    )


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str, parts: Parts) -> Wrapper:
    assert SYSTEMS[name].reason(parts) is None
    return SYSTEMS[name].build(parts)


@pytest.fixture(scope="module")
def texts(token_folder: Path) -> list[Tensor]:
    stream = tokens.load_stream(token_folder, "test")
    spans = ((0, 18), (40, 51), (90, 93), (200, 218))
    return [torch.from_numpy(stream[begin:end].astype("int64")) for begin, end in spans]


def p(model: Wrapper, input_ids: Tensor, **how: Any) -> Tensor:
    return model(input_ids=input_ids, **how).logits.exp()


def padded(texts: list[Tensor], side: str, width: int = 20) -> dict[str, Tensor]:
    """Batch as a tokenizer makes it, with the positions that `generate` gives."""
    ids, mask = torch.full((len(texts), width), 7), torch.zeros(len(texts), width, dtype=torch.long)
    for number, text in enumerate(texts):
        span = slice(width - len(text), width) if side == "left" else slice(0, len(text))
        ids[number, span], mask[number, span] = text, 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def test_all_are_known() -> None:
    assert list(SYSTEMS) == NAMES
    assert [system.name for system in SYSTEMS.values()] == NAMES


# --- the contract -------------------------------------------------------------------------------------------------


def test_probabilities_sum_to_one(model: Wrapper, texts: list[Tensor]) -> None:
    found = model(input_ids=texts[0][None]).logits
    assert found.dtype == torch.float32
    assert found.shape == (1, 18, 300)
    assert not torch.isnan(found).any()
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(1, 18), atol=1e-5, rtol=0)


def test_the_same_call_gives_the_same_bits(name: str, model: Wrapper, parts: Parts, texts: list[Tensor]) -> None:
    batch = padded(texts, "left")
    first = model(**batch).logits
    assert torch.equal(model(**batch).logits, first)
    assert torch.equal(SYSTEMS[name].build(parts)(**batch).logits, first)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_and_padding_change_nothing(model: Wrapper, texts: list[Tensor], side: str) -> None:
    batch = padded(texts, side)
    together, last = p(model, **batch), p(model, **batch, logits_to_keep=4)
    torch.testing.assert_close(last, together[:, -4:], atol=1e-5, rtol=1e-4)
    for number, text in enumerate(texts):
        real = batch["attention_mask"][number].bool()
        torch.testing.assert_close(together[number][real], p(model, text[None])[0], atol=1e-4, rtol=1e-3)


def test_what_comes_after_changes_nothing(model: Wrapper, texts: list[Tensor]) -> None:
    whole = p(model, texts[0][None])
    torch.testing.assert_close(p(model, texts[0][None, :11]), whole[:, :11], atol=1e-4, rtol=1e-3)


def test_generation_in_a_padded_batch_is_that_of_each_text(
    model: Wrapper, texts: list[Tensor], tokenizer_folder: Path
) -> None:
    words = AutoTokenizer.from_pretrained(tokenizer_folder)
    batch = padded(texts, "left")
    del batch["position_ids"]
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": words.pad_token_id}
    together = model.generate(**batch, use_cache=True, **how)[:, 20:]
    for text, row in zip(texts, together, strict=True):
        ids = text[None]
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **how)
        assert torch.equal(alone[0, len(text) :], row)
    best = p(model, texts[0][None])[0, -1].argmax()
    assert together[0, 0] == best


WITHOUT: dict[str, Callable[[Parts], Wrapper]] = {
    "MemDec": lambda parts: SYSTEMS["MemDec"].build(dataclasses.replace(parts, alpha=0.0)),
    "kNN-LM": lambda parts: SYSTEMS["kNN-LM"].build(
        dataclasses.replace(parts, knn_lm=parts.knn_lm.model_copy(update={"weight": 0.0}))
    ),
}


def test_weight_0_is_the_base_to_the_bit(name: str, model: Wrapper, parts: Parts, texts: list[Tensor]) -> None:
    base = SYSTEMS["base"].build(parts)
    batch = padded(texts, "left")
    expected = base(**batch).logits
    same = WITHOUT[name](parts) if name in WITHOUT else base
    assert torch.equal(same(**batch).logits, expected)
    assert torch.equal(model(**batch).logits, expected) == (name == "base")


def test_base_dapt_and_lora_are_those_models(parts: Parts, texts: list[Tensor]) -> None:
    from peft import PeftModel

    ids = texts[0][None]
    lm = AutoModelForCausalLM.from_pretrained(parts.base)
    plain = {"base": lm, "DAPT": AutoModelForCausalLM.from_pretrained(parts.dapt)}
    for name, expected in plain.items():
        assert torch.equal(SYSTEMS[name].build(parts)(input_ids=ids).logits, expected(ids).logits.log_softmax(-1))
    adapted = PeftModel.from_pretrained(lm, str(parts.lora)).eval()
    found = p(SYSTEMS["LoRA"].build(parts), ids)
    torch.testing.assert_close(found, adapted(ids).logits.softmax(-1), atol=1e-5, rtol=1e-4)


# --- what a system says -------------------------------------------------------------------------------------------


def test_a_base_that_is_spread_is_the_same_system(
    name: str, parts: Parts, model: Wrapper, texts: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU accelerate puts all of it on the CPU; where the weights are changes nothing."""
    asked, load = [], loading.from_pretrained

    def seen(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs.get("device_map"))
        return load(*args, **kwargs)

    monkeypatch.setattr(loading, "from_pretrained", seen)
    spread = SYSTEMS[name].build(dataclasses.replace(parts, spread=True))
    assert asked[0] == "auto"
    assert "auto" not in asked[1:]  # the memory is beside the base
    torch.testing.assert_close(p(spread, texts[0][None]), p(model, texts[0][None]), rtol=1e-6, atol=1e-8)


def test_a_part_that_is_not_given_is_named(name: str, parts: Parts) -> None:
    system = SYSTEMS[name]
    for part in system.needs:
        less = dataclasses.replace(parts, **{part: () if part == "datastore" else None})
        expected = f"{name}: expected the parts {', '.join(system.needs)}, found no {part}; give its folder"
        assert system.reason(less) == expected
        with pytest.raises(ConfigError, match=f"found no {part}"):
            system.build(less)


def test_a_folder_that_is_not_there_is_named(name: str, parts: Parts, tmp_path: Path) -> None:
    for part in SYSTEMS[name].needs:
        nowhere: Any = tmp_path / "nowhere"
        less = dataclasses.replace(parts, **{part: (nowhere,) if part == "datastore" else nowhere})
        reason = SYSTEMS[name].reason(less)
        assert reason is not None
        assert reason.startswith(f"{name}: {nowhere}: expected a ")


def test_too_little_memory_is_named(name: str, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memdec.artefacts.resources.free_memory", lambda: 1000)
    reason = SYSTEMS[name].reason(parts)
    assert reason is not None
    assert reason.startswith(f"{name}: weights in float32: expected ")
    assert reason.endswith("of free memory, found 1 kB; use another dtype or device")
    monkeypatch.setattr("memdec.artefacts.devices.free_memory", lambda device: 1000)
    reason = SYSTEMS[name].reason(dataclasses.replace(parts, device="cuda:0"))
    assert reason is not None
    assert "free on cuda:0, found 1 kB" in reason


def test_parts_of_another_base_are_named(parts: Parts, small_folder: Path) -> None:
    other = dataclasses.replace(parts, base=small_folder)
    for name in ("DAPT", "LoRA"):
        expected = f"expected what was trained from {small_folder}, found something from another model"
        assert expected in str(SYSTEMS[name].reason(other))
    for name in ("kNN-LM",):
        assert f"expected keys of {small_folder}, found those of another model" in str(SYSTEMS[name].reason(other))
    with pytest.raises(ArtifactError):
        SYSTEMS["LoRA"].build(other)
    for name in ("base", "MemDec", "In-Context RAG"):
        assert SYSTEMS[name].reason(other) is None


def test_another_tokenizer_is_named(parts: Parts, corpus_folder: Path, tmp_path: Path) -> None:
    tokens.run_tokenizer(TokenizerSpec(train_on=["made"], vocab_size=320), tmp_path / "w", [corpus_folder])
    tokens.run_tokens(tmp_path / "w", corpus_folder, tmp_path / "t")
    stages.run_pretrain(spec(16), tmp_path / "w", tmp_path / "t", tmp_path / "foreign", context=CONTEXT)
    other = dataclasses.replace(parts, base=tmp_path / "foreign")
    for name in ("MemDec", "kNN-LM", "In-Context RAG"):
        assert "expected one tokenizer, found two" in str(SYSTEMS[name].reason(other))


def test_half_a_model_is_named(parts: Parts, tmp_path: Path) -> None:
    shutil.copytree(parts.base, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").unlink()
    reason = SYSTEMS["base"].reason(dataclasses.replace(parts, base=tmp_path / "cut"))
    assert "model.safetensors: expected" in str(reason)
    assert "found no such file" in str(reason)


# --- through lm-eval ----------------------------------------------------------------------------------------------


def lm(name: str, parts: Parts, **arguments: Any) -> WrappedLM:
    """A system as the stock lm_eval makes it, by name and a string of arguments."""
    given = {
        "kNN-LM": ("memdec-knnlm", f"datastore={parts.datastore[0]},index={parts.index},temperature=0.5,neighbours=9"),
        "In-Context RAG": ("memdec-icrag", f"passages={parts.passages},query=8"),
    }
    model, plain = given[name]
    pairs = ",".join([f"pretrained={parts.base}", plain, *(f"{key}={value}" for key, value in arguments.items())])
    made: WrappedLM = get_model(model).create_from_arg_string(pairs, {"device": "cpu", "batch_size": 3})
    return made


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


PAIRS = [
    ("The matrix 3", " returns the token"),
    ("The vector", " reads"),
    ("A token " * 8, "of size 4."),
    ("The", " end"),
]


@pytest.mark.parametrize("name", ["kNN-LM", "In-Context RAG"], scope="function")
def test_lm_eval_gets_the_probabilities_of_the_system(name: str, parts: Parts, tmp_path: Path) -> None:
    harness, model = lm(name, parts, scores=tmp_path), SYSTEMS[name].build(parts)
    found = harness.loglikelihood(requests("loglikelihood", PAIRS))
    for (context, continuation), (log_p, greedy) in zip(PAIRS, found, strict=True):
        before, after = harness._encode_pair(context, continuation)
        ids = torch.tensor([before + after])
        rows = model(input_ids=ids).logits[0, len(before) - 1 : -1]
        labels = torch.tensor(after)
        assert log_p == pytest.approx(float(rows.gather(-1, labels[:, None]).sum()), abs=1e-4)
        assert greedy == torch.equal(rows.argmax(-1), labels)
        word = tokens.text_behind(harness.tokenizer, after[0])
        ((next_log_p,),) = harness.label_word_probs(requests("label_word_probs", [(context.rstrip(), (word,), 1024)]))
        assert next_log_p == pytest.approx(float(rows[0, after[0]]), abs=1e-4)
    (text,) = harness.generate_until(
        requests("generate_until", [("The matrix 3", {"until": ["@@"], "max_gen_toks": 5})])
    )
    ids = torch.tensor([harness.tok_encode("The matrix 3")])
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert text == harness.tokenizer.decode(new, skip_special_tokens=True)
    (total,) = harness.loglikelihood_rolling(requests("loglikelihood_rolling", [("The matrix 3 returns. " * 6,)]))
    assert total < 0
    info = harness.get_model_info()
    assert info["pretrained"] == str(parts.base)
    assert info.keys() >= ({"datastore", "neighbours"} if name == "kNN-LM" else {"passages", "every"})


def test_lambda_of_the_knn_lm_is_read_from_its_scores(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests("loglikelihood", PAIRS)
    lm("kNN-LM", parts, scores=tmp_path).loglikelihood(asked)
    fresh = {weight: lm("kNN-LM", parts, weight=weight).loglikelihood(asked) for weight in (0.0, 0.6)}
    monkeypatch.setattr(WrappedLM, "_load", lambda _: pytest.fail("a model was loaded"))
    for weight, expected in fresh.items():
        found = lm("kNN-LM", parts, weight=weight, scores=tmp_path).loglikelihood(asked)
        assert [g for _, g in found] == [g for _, g in expected]
        assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], abs=1e-4)


def test_bad_arguments_through_lm_eval(parts: Parts, small_folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"expected keys of .*, found those of another model"):
        lm("kNN-LM", dataclasses.replace(parts, base=small_folder))
    with pytest.raises(ConfigError, match="weight"):
        lm("kNN-LM", parts, weight=1.5)
    with pytest.raises(ConfigError, match=r"expected no weight, found 0\.5"):
        lm("In-Context RAG", parts).set_weight(0.5)
