"""Each corpus kind, the either-or rules, and references (messages of a whole file are in test_config.py)."""

from typing import Any

import pytest
from pydantic import ValidationError

from memdec import config as cfg
from memdec.errors import ConfigError

TRAIN: dict[str, Any] = {"epochs": 1}
SCRATCH = {
    "family": "f", "tokenizer": "t", "architecture": "gpt2", "width": 8, "layers": 1, "heads": 1, "corpus": "c",
    "train": TRAIN,
}  # fmt: skip


@pytest.mark.parametrize(
    ("data", "kind", "value"),
    [
        ({"source": "docstrings", "packages": ["stdlib"]}, cfg.DocstringCorpus, 160),
        ({"source": "files", "path": "a.txt"}, cfg.FileCorpus, "blank_line"),
        ({"source": "files", "paths": {"train": "a", "valid": "b", "test": "c"}}, cfg.FileCorpus, "blank_line"),
        ({"source": "hub", "path": "wikitext"}, cfg.HubCorpus, "validation"),
    ],
)
def test_each_corpus_kind_with_its_defaults(data: dict[str, Any], kind: type[cfg._Corpus], value: object) -> None:
    spec = cfg.parse(cfg.CorpusSpec, data, "here")
    assert type(spec) is kind
    assert (spec.separator, spec.min_bytes, spec.max_bytes) == ("eos", 1000, {})
    found = {cfg.DocstringCorpus: "min_chars", cfg.FileCorpus: "documents"}
    assert (spec.splits["valid"] if kind is cfg.HubCorpus else getattr(spec, found[kind])) == value
    assert cfg.parse(cfg.CorpusSpec, spec.model_dump(mode="json"), "again") == spec
    with pytest.raises(ValidationError, match="frozen"):
        spec.separator = "none"


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (cfg.CorpusSpec, {"source": "web"}, "web"),
        (cfg.CorpusSpec, {"path": "a.txt"}, "source"),
        (cfg.CorpusSpec, {"source": "files", "path": "a", "paths": {"train": "b"}}, "either 'path'"),
        (cfg.CorpusSpec, {"source": "files", "path": "a", "packages": ["x"]}, "files.packages: unknown key"),
        (cfg.CorpusSpec, {"source": "docstrings", "packages": []}, r"docstrings.packages: .* found \[\]"),
        (cfg.CorpusSpec, {"source": "hub", "path": "a", "splits": {"dev": "x"}}, "found 'dev'"),
        (cfg.CorpusSpec, {"source": "files", "path": "a", "max_bytes": {"test": 0}}, "max_bytes.test: .* found 0"),
        (cfg.TokenizerSpec, {}, "either 'train_on' with 'vocab_size', or 'pretrained'"),
        (cfg.TokenizerSpec, {"train_on": ["a"]}, "'train_on' needs 'vocab_size'"),
        (cfg.TokenizerSpec, {"train_on": ["a"], "vocab_size": 300, "pretrained": "b"}, "give either 'train_on'"),
        (cfg.ModelSpec, {**SCRATCH, "pretrained": "x"}, "not both"),
        (cfg.ModelSpec, {key: value for key, value in SCRATCH.items() if key != "heads"}, "needs architecture, width"),
        (cfg.ModelSpec, {**SCRATCH, "train": {"epochs": 0}}, "train.epochs: .* found 0"),
        (cfg.TargetSettings, {"threshold": 1.0, "temperature": 0}, "temperature: .* found 0; threshold: .* found 1.0"),
    ],
)
def test_wrong_data_is_one_line_that_names_place_and_value(kind: Any, data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        cfg.parse(kind, data, "spec.yaml")
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
    assert cfg.parse(cfg.Config, whole(), "c").context == 8
    data = whole(
        domains=["d1"], key_model="k1", memory_model="m1", stride=9,
        tokenizers={"t": {"train_on": ["c1"], "vocab_size": 300}},
        corpora={"c": {"source": "files", "path": "a.txt", "disjoint_from": ["c2"]}},
        models={"m": {**SCRATCH, "tokenizer": "t1", "corpus": "c3"}},
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        cfg.parse(cfg.Config, data, "c")
    for wrong in ("d1", "k1", "m1", "c1", "c2", "c3", "t1", "9"):
        assert f"found {wrong}" in str(caught.value)


def test_models_of_two_tokenizers_do_not_mix() -> None:
    tokenizers = {"t": {"pretrained": "x"}, "t2": {"pretrained": "y"}}
    models = {"m": SCRATCH, "n": {**SCRATCH, "tokenizer": "t2"}}
    with pytest.raises(ConfigError, match=r"models.n.tokenizer: expected t as for the key model, found t2"):
        cfg.parse(cfg.Config, whole(tokenizers=tokenizers, models=models), "c")
