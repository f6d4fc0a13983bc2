"""Each corpus kind, the either-or rules, and references (messages of a whole file are in test_config.py)."""

from typing import Any

import pytest
from pydantic import ValidationError

from memdec import config as cfg
from memdec.errors import ConfigError
from memdec.settings import (
    SPLITS,
    CorpusSpec,
    DocstringCorpus,
    FileCorpus,
    HubCorpus,
    ModelSpec,
    TargetSettings,
    TokenizerSpec,
    _Corpus,
    parse,
)

TRAIN: dict[str, Any] = {"epochs": 1}
SCRATCH = {
    "family": "f", "tokenizer": "t", "architecture": "gpt2", "width": 8, "layers": 1, "heads": 1, "corpus": "c",
    "train": TRAIN,
}  # fmt: skip


@pytest.mark.parametrize(
    ("data", "kind", "value"),
    [
        ({"source": "docstrings", "packages": ["stdlib"]}, DocstringCorpus, 160),
        ({"source": "files", "path": "a.txt"}, FileCorpus, "blank_line"),
        ({"source": "files", "paths": {"train": "a", "valid": "b", "test": "c"}}, FileCorpus, "blank_line"),
        ({"source": "hub", "path": "wikitext"}, HubCorpus, "validation"),
    ],
)
def test_each_corpus_kind_with_its_defaults(data: dict[str, Any], kind: type[_Corpus], value: object) -> None:
    spec = parse(CorpusSpec, data, "here")
    assert type(spec) is kind
    assert (spec.separator, spec.min_bytes, spec.max_bytes) == ("eos", 1000, {})
    found = {DocstringCorpus: "min_chars", FileCorpus: "documents"}
    assert (spec.splits["valid"] if kind is HubCorpus else getattr(spec, found[kind])) == value
    assert parse(CorpusSpec, spec.model_dump(mode="json"), "again") == spec
    with pytest.raises(ValidationError, match="frozen"):
        spec.separator = "none"


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (CorpusSpec, {"source": "web"}, "web"),
        (CorpusSpec, {"path": "a.txt"}, "source"),
        (CorpusSpec, {"source": "files", "path": "a", "paths": {"train": "b"}}, "either 'path'"),
        (CorpusSpec, {"source": "files", "paths": {"train": "a", "test": "b"}}, "found no valid"),
        (
            CorpusSpec,
            {"source": "hub", "path": "a/b", "splits": {"train": "a", "test": "b"}},
            "or train alone, found train, test",
        ),
        (CorpusSpec, {"source": "files", "path": "a", "packages": ["x"]}, ": packages: unknown key"),
        (CorpusSpec, {"source": "docstrings", "packages": []}, r": packages: .* found \[\]"),
        (CorpusSpec, {"source": "hub", "path": "a", "splits": {"dev": "x"}}, "found 'dev'"),
        (CorpusSpec, {"source": "files", "path": "a", "max_bytes": {"test": 0}}, "max_bytes.test: .* found 0"),
        (TokenizerSpec, {}, "either 'train_on' with 'vocab_size', or 'pretrained'"),
        (TokenizerSpec, {"train_on": ["a"]}, "'train_on' needs 'vocab_size'"),
        (TokenizerSpec, {"train_on": ["a"], "vocab_size": 300, "pretrained": "b"}, "give either 'train_on'"),
        (ModelSpec, {**SCRATCH, "pretrained": "x"}, "not both"),
        (ModelSpec, {key: value for key, value in SCRATCH.items() if key != "heads"}, "needs architecture, width"),
        (ModelSpec, {**SCRATCH, "train": {"epochs": 0}}, "train.epochs: .* found 0"),
        (TargetSettings, {"threshold": 1.0, "temperature": 0}, "temperature: .* found 0; threshold: .* found 1.0"),
    ],
)
def test_wrong_data_is_one_line_that_names_place_and_value(kind: Any, data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(kind, data, "spec.yaml")
    assert str(caught.value).startswith("spec.yaml: ")
    assert "\n" not in str(caught.value)


def whole(**changes: Any) -> dict[str, Any]:
    return {
        "scale": "test", "context": 8, "stride": 4, "domains": ["c"], "key_model": "m", "memory_model": "m",
        "tokenizers": {"t": {"train_on": ["c"], "vocab_size": 300}},
        "corpora": {"c": {"source": "files", "path": "a.txt"}},
        "models": {"m": SCRATCH},
        **changes,
    }  # fmt: skip


def test_all_wrong_references_at_once() -> None:
    assert parse(cfg.Config, whole(), "c").context == 8
    data = whole(
        domains=["d1"], key_model="k1", memory_model="m1", stride=9,
        tokenizers={"t": {"train_on": ["c1"], "vocab_size": 300}},
        corpora={"c": {"source": "files", "path": "a.txt", "disjoint_from": ["c2"]}},
        models={"m": {**SCRATCH, "tokenizer": "t1", "corpus": "c3"}},
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        parse(cfg.Config, data, "c")
    for wrong in ("d1", "k1", "m1", "c1", "c2", "c3", "t1", "9"):
        assert f"found {wrong}" in str(caught.value)


def test_models_of_two_tokenizers_do_not_mix() -> None:
    tokenizers = {"t": {"pretrained": "x"}, "t2": {"pretrained": "y"}}
    models = {"m": SCRATCH, "n": {**SCRATCH, "tokenizer": "t2"}}
    with pytest.raises(ConfigError, match=r"models.n.tokenizer: expected the tokenizer of a memory, found t2; add"):
        parse(cfg.Config, whole(tokenizers=tokenizers, models=models), "c")
    assert parse(cfg.Config, whole(tokenizers=tokenizers, models=models, systems=["base", "LoRA"]), "c")
    assert parse(cfg.Config, whole(tokenizers=tokenizers, models=models, evaluated=["m"]), "c").bases == ["m"]
    with pytest.raises(
        ConfigError, match="memory_model: expected a model with tokenizer t as the key model m, found n"
    ):
        parse(cfg.Config, whole(tokenizers=tokenizers, models=models, memory_model="n", evaluated=["m"]), "c")


# --- memories -----------------------------------------------------------------------------------------------------


def several(**memories: dict[str, Any]) -> cfg.Config:
    """Models m, small (tokenizer t) and n (tokenizer t2), these memories, and one that serves t2."""
    models = {"m": SCRATCH, "small": SCRATCH, "n": {**SCRATCH, "tokenizer": "t2"}}
    tokenizers = {"t": {"pretrained": "x"}, "t2": {"pretrained": "y"}}
    memories = {"other": {"adapt": "memdec", "key_model": "n", "share": 0.1}, **memories}
    memory = {"epochs": 20, "dropout": 0.2}
    data = whole(models=models, tokenizers=tokenizers, memories=memories, memory=memory, memory_model="small")
    config: cfg.Config = parse(cfg.Config, data, "c")
    return config


def test_a_model_has_settings_and_systems_of_its_own() -> None:
    """What is said of a model is laid over the sections; DAPT without a section is trained as the key model is."""
    config = parse(
        cfg.Config,
        whole(
            models={"m": SCRATCH, "small": SCRATCH},
            finetune={"epochs": 3, "dropout": 0.1},
            evaluate={"alphas": [0.4, 0.6], "neighbours": 8},
            per_model={
                "m": {
                    "systems": ["MemDec", "base"],
                    "dapt": {"epochs": 1},
                    "lora": {"rank": 4},
                    "evaluate": {"alphas": [0.8], "temperatures": [13], "batch_size": 2},
                }
            },
            studies={"tuned": {"tables": ["table1"], "per_model": {"m": {"evaluate": {"alphas": [0.1, 0.9]}}}}},
        ),
        "c",
    )
    assert (config.systems_of("m"), config.systems_of("small")) == (["base", "MemDec"], ["base", "LoRA", "MemDec"])
    own = config.for_model("m")
    assert own.dapt is not None
    assert (own.dapt.epochs, own.dapt.dropout, own.finetune.epochs, own.lora.rank) == (1, 0.1, 3, 4)
    assert (own.evaluate.alphas, own.evaluate.temperatures, own.evaluate.neighbours) == ([0.8], [13], 8)
    assert config.for_model("small") is config
    tuned = config.study("tuned").for_model("m").evaluate
    assert (tuned.alphas, tuned.temperatures) == ([0.1, 0.9], [13])
    studies = config.every_study()
    assert [cfg.owner(studies, "tuned", kind) for kind in ("lora", "dapt", "evaluation")] == [None, None, "tuned"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": {}}, "per_model: expected one of m, found x"),
        ({"m": {"lora": {"ranks": 4}}}, "per_model.m.lora.ranks: unknown key; did you mean rank"),
        ({"m": {"compute": {"device": "tpu"}}}, "per_model.m.compute.device: .* found 'tpu'"),
        ({"m": {"datastore": {}}}, "per_model.m.datastore: unknown key"),
    ],
)
def test_what_is_wrong_with_one_model_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(cfg.Config, whole(per_model=given), "c")


def test_a_ready_memory_is_a_model_of_its_domain() -> None:
    config = several(memdec={"ready": {"c": "small"}}, kl={"train": {"objective": "kl"}})
    own = config.variant("memdec")
    assert (own.own, own.ready, own.targets, config.memory_names) == (
        True,
        {"c": "small"},
        "knn",
        ["memdec", "other", "kl"],
    )
    assert not config.variant("kl").ready


def test_a_memory_takes_from_the_default_what_it_does_not_say() -> None:
    config = several(
        kl={"train": {"objective": "kl", "dropout": 0.1}, "models": ["m"]},
        ce={"train": {"objective": "ce"}, "targets": "teacher"},
        plain={"key_model": "small", "tuned": False, "targets": "teacher", "tuned_start": True},
        mixed={"dapt": True, "memory_model": "n"},
    )
    assert config.memory_names == ["memdec", "other", "kl", "ce", "plain", "mixed"]
    found = {name: config.variant(name) for name in config.memory_names}
    default = found["memdec"]
    assert (default.memory_model, default.key_model, default.keys, default.targets) == ("small", "m", "m", "knn")
    assert (default.models, default.train) == (["m", "small"], config.memory)
    kl = found["kl"].train
    assert (kl.objective, kl.dropout, kl.epochs, found["kl"].models) == ("kl", 0.1, 20, ["m"])
    assert kl.model_dump(exclude_unset=True) == {"epochs": 20, "dropout": 0.1, "objective": "kl"}
    assert (found["ce"].targets, found["plain"].targets, found["mixed"].targets) == ("none", "teacher", "none")
    assert (found["plain"].keys, found["plain"].tuned_start) == ("small-untuned", True)
    other = found["other"]
    assert (other.memory_model, other.tokenizer, other.models, other.train.epochs) == ("small", "t2", ["n"], 2)
    assert (found["mixed"].tokenizer, found["mixed"].models) == ("t2", ["n"])
    named = {model: memory.name for model in config.bases if (memory := config.memory_for(model)) is not None}
    assert named == {"m": "memdec", "small": "memdec", "n": "other"}


@pytest.mark.parametrize(
    ("memories", "message"),
    [
        (
            {"memdec": {"dapt": True}},
            "memories.memdec.dapt: expected a memory in the place of the default one, found dapt",
        ),
        (
            {"a": {"ready": {"c": "n"}}},
            "memories.a.ready.c: expected a model with tokenizer t as the key model m, found n",
        ),
        ({"a": {"ready": {"c": "x"}}}, "memories.a.ready: expected one of .* found x"),
        (
            {"a": {"ready": {"c": "m"}, "share": 0.1}},
            "expected only memory_model and key_model and tuned and models beside ready, found share",
        ),
        ({"systems": {}}, "memories.systems: expected a name that is not taken, found systems"),
        ({"a": {"key_model": "x"}}, "memories.a.key_model: expected one of m, small, n, found x"),
        ({"a": {"memory_model": "x"}}, "memories.a.memory_model: expected one of m, small, n, found x"),
        ({"a": {"models": ["x"]}}, "memories.a.models: expected one of m, small, n, found x"),
        ({"a": {"models": ["n"]}}, "memories.a.models: expected models with tokenizer t, found n with t2"),
        ({"a": {"adapt": "x", "key_model": "n"}}, "memories.a.adapt: expected one of memdec, other, a, found x"),
        (
            {"a": {"adapt": "b"}, "b": {"adapt": "a"}},
            "memories.a.adapt: expected a memory that does not start .* a > b",
        ),
        (
            {"a": {"adapt": "memdec"}},
            r"memories.a.key_model: expected a model with another tokenizer than memdec \(t\)",
        ),
        (
            {"b": {"dapt": True}, "a": {"adapt": "b", "key_model": "n"}},
            "memories.a.adapt: expected a memory that is trained",
        ),
        (
            {"a": {"adapt": "memdec", "tuned_start": True}},
            "memories.a: expected no other starting model beside adapt, found tuned_start",
        ),
        (
            {"a": {"dapt": True, "share": 0.1}},
            "memories.a: expected only memory_model and models beside dapt, found share",
        ),
        (
            {"a": {"key_model": "n"}},
            "memories.a.memory_model: expected a model with tokenizer t2 .* found small with t",
        ),
        (
            {"a": {"targets": "none"}},
            "memories.a.targets: expected knn, teacher or mixture with objective hybrid, found none",
        ),
        (
            {"a": {"targets": "mixture"}},
            "memories.a.targets: expected with mixture a section calibrate, or teacher.knn_weight, found neither",
        ),
        (
            {"a": {"neighbours": True, "share": 0.1}},
            "memories.a: expected only key_model and tuned and models beside neighbours, found share",
        ),
        ({"a": {"train": {"epoch": 3}}}, "memories.a.train: epoch: unknown key"),
        ({"a": {"train": {"kl_weight": 2}}}, "memories.a.train: kl_weight: .* found 2"),
        ({"a": {"share": 2}}, "memories.a.share: .* found 2"),
    ],
)
def test_memories_that_cannot_be_are_named(memories: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        several(**memories)


def test_a_config_says_what_all_memories_imitate() -> None:
    config = parse(cfg.Config, whole(imitates="mixture", calibrate={}, memories={"a": {"targets": "knn"}}), "c")
    assert [config.variant(name).targets for name in config.memory_names] == ["mixture", "knn"]


def test_other_names_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match=r"evaluated: .* found y; budget.model: .* found x"):
        parse(cfg.Config, whole(budget={"model": "x"}, evaluated=["y"]), "c")
    with pytest.raises(ConfigError, match=r"models\.m-untuned: expected a name without -untuned"):
        parse(cfg.Config, whole(models={"m": SCRATCH, "m-untuned": SCRATCH}), "c")


def test_variables_of_the_environment_in_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMDEC_A", "/data")
    paths = {split: f"${{MEMDEC_A}}/{split}.txt" for split in SPLITS}
    corpus = parse(CorpusSpec, {"source": "files", "paths": paths}, "c")
    assert corpus.paths == {split: f"/data/{split}.txt" for split in SPLITS}
    assert parse(CorpusSpec, {"source": "hub", "path": "${MEMDEC_A}/set"}, "c").path == "/data/set"
    assert parse(TokenizerSpec, {"pretrained": "${MEMDEC_A}/${MEMDEC_A}/$x"}, "c").pretrained == "/data//data/$x"
    with pytest.raises(ConfigError, match=r"c: pretrained: expected the environment variable MEMDEC_B, found it unset"):
        parse(ModelSpec, {"family": "f", "tokenizer": "t", "pretrained": "${MEMDEC_B}/m"}, "c")
