"""Studies: overlays of one config, the tables that they fill, and which artefacts they share."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from memdec import config as cfg
from memdec.errors import ConfigError
from memdec.results import catalogue, figure_catalogue
from memdec.settings import TableName

MINI = Path(__file__).resolve().parents[2] / "config" / "mini.yaml"


def with_studies(**studies: Any) -> dict[str, Any]:
    """The default config with these studies in the place of its own."""
    common: dict[str, Any] = yaml.safe_load(MINI.read_text())
    return {**common, "studies": studies}


def checked(**studies: Any) -> cfg.Config:
    return cfg.checked(with_studies(**studies), "c")


def test_a_study_is_laid_over_the_common_part() -> None:
    config = checked(
        small={
            "tables": ["table9", "figure2"],
            "evaluated": ["gpt2-S"],
            "memory": {"epochs": 3},
            "memories": {"kl": {"train": {"objective": "kl"}}},
            "dapt": None,
        },
        other={"tables": ["table8"]},
    )
    small = config.study("small")
    assert (small.study_name, small.studies, small.evaluated) == ("small", {}, ["gpt2-S"])
    assert small.memory.epochs == 3
    assert small.memory.learning_rate == config.memory.learning_rate  # joined key by key
    assert small.variant("kl").train.epochs == 3
    assert small.dapt is None
    assert config.study_for("figure2") == small
    assert config.study_for("table8").study_name == "other"
    common = config.study_for("table3")  # no study names it
    assert (common.study_name, common.studies, common.memory) == (None, {}, config.memory)
    assert cfg.checked(small.model_dump(mode="json", exclude_unset=True), "again") == small


def test_a_config_without_studies_fills_every_table_itself() -> None:
    config = cfg.checked({key: value for key, value in with_studies().items() if key != "studies"}, "c")
    assert config.study_for("table9") is config
    assert config.study_for("no table") is config


def test_studies_share_what_they_make_with_the_same_settings() -> None:
    config = checked(
        first={"tables": ["table9"], "memories": {"kl": {"train": {"objective": "kl"}}}},
        flat={"tables": ["table8"], "targets": {"temperature": 64}},
        same={"tables": ["table17"], "targets": {"temperature": 64}, "evaluated": ["gpt2-S"]},
        tuned={"tables": ["table1"], "finetune": {"epochs": 9}, "evaluate": {"alphas": [0.5]}},
        large={"tables": ["table19"], "memory_model": "gpt2-L", "lora": {"rank": 3}},
    )
    studies = config.every_study()
    owners = {
        (study, kind): cfg.owner(studies, study, kind)
        for study in config.studies
        for kind in ("finetuned", "datastore", "targets", "memory", "lora", "evaluation")
    }
    own = {
        ("flat", "targets"): "flat",
        ("flat", "memory"): "flat",
        ("same", "targets"): "flat",
        ("same", "memory"): "flat",
        ("tuned", "finetuned"): "tuned",
        ("tuned", "datastore"): "tuned",
        ("tuned", "targets"): "tuned",
        ("tuned", "memory"): "tuned",
        ("tuned", "evaluation"): "tuned",
        ("large", "memory"): "large",
        ("large", "lora"): "large",
    }
    assert owners == dict.fromkeys(owners) | own
    assert cfg.owner(studies, "flat", "finetuned", "evaluation") is None
    assert cfg.owner(studies, "same", "memory", "evaluation") == "flat"


@pytest.mark.parametrize("watch", [None, ["gpt2-L"]])
def test_the_bases_that_judge_a_memory_make_another_memory(watch: list[str] | None) -> None:
    common = with_studies() | {"watch": watch, "memory": {"keep_best": True}}
    two = {"tables": ["table9"], "evaluated": ["gpt2-S"]}
    vocabulary = {"tables": ["table4"], "evaluated": ["qwen3k-M"], "key_model": "qwen3k-L", "memory_model": "qwen3k-M"}
    config = cfg.checked(common | {"studies": {"two": two, "vocabulary": vocabulary}}, "c")
    studies = config.every_study()
    assert studies["two"].variant("memdec").watched == (watch or ["gpt2-S"])
    assert studies["two"].variant("memdec").models == ["gpt2-S"]
    assert cfg.owner(studies, "two", "memory") == (None if watch else "two")
    assert studies["vocabulary"].variant("memdec").watched == ["qwen3k-M"]  # of its tokenizer
    unwatched = config.model_copy(update={"memory": config.memory.model_copy(update={"keep_best": False})})
    assert unwatched.variant("memdec").watched == []


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({}, "studies.b.tables: Field required"),
        ({"tables": []}, "studies.b.tables: .* at least 1 item"),
        ({"tables": ["table20"]}, "studies.b.tables.0: .* found 'table20'"),
        ({"tables": ["table9"]}, "studies.b.tables: expected tables that no other study fills, found table9 of a; leave"),
        ({"domains": ["torhc"]}, "studies.b.domains: expected one of .*, found torhc; did you mean torch?"),
        ({"evaluated": ["gpt3"]}, "studies.b.evaluated: expected one of .*, found gpt3"),
        ({"memories": {"x": {"key_model": "no"}}}, "studies.b.memories.x.key_model: expected one of .*, found no"),
        ({"memories": {"x": {"adapt": "no"}}}, "studies.b.memories.x.adapt: expected one of memdec, x, found no"),
        (
            {"memories": {"x": {"train": {"objective": "KL"}}}},
            "studies.b.memories.x.train: objective: .* found 'KL'; did you mean kl?",
        ),
        ({"memories": {"kl": {"train": {"objective": "ce"}}}}, "studies.b.memories.kl: expected the memory of a, .*rename"),
        ({"tasks": {"torch": ["ten"]}}, "studies.b.tasks.torch: expected one of nine, .*, found ten"),
        ({"tasks": {"law": []}}, "studies.b.tasks: expected one of .*, found law"),
        ({"finetune": {"epochs": 0}}, "studies.b.finetune.epochs: .* found 0"),
        ({"datastore": {"shards": 2}}, "studies.b.datastore.shards: expected it in the common part only, found 2; move"),
        ({"datastore": {"stored": False}}, "studies.b.index.kind: expected ivfpq or ivfflat"),
        ({"context": 64}, "studies.b.context: unknown key"),
    ],
)  # fmt: skip
def test_a_study_with_a_fault_names_its_place(study: dict[str, Any], message: str) -> None:
    first = {"tables": ["table9"], "memories": {"kl": {"train": {"objective": "kl"}}}}
    with pytest.raises(ConfigError, match=message) as caught:
        checked(a=first, b={"tables": ["table8"], **study} if study else study)
    assert "\n" not in str(caught.value)


def test_a_fault_of_the_common_part_is_said_once() -> None:
    data = with_studies(a={"tables": ["table9"]}, b={"tables": ["table8"], "domains": ["x"]}) | {"key_model": "no"}
    assert [line.split(":")[0] for line in cfg.check(data)] == ["key_model", "studies.b.domains"]


def test_a_memory_of_another_domain_is_another_one_where_the_domains_are_others() -> None:
    wrong = {"memories": {"far": {"other_domain": True}}}
    with pytest.raises(ConfigError, match=r"studies\.b\.memories\.far: expected the memory of a"):
        checked(a={"tables": ["table9"], **wrong}, b={"tables": ["table8"], "domains": ["torch", "sklearn"], **wrong})


def paper() -> dict[str, Any]:
    """The paper's whole grid: GPT-2 on WikiText-103, Qwen on three domains, Llama with the moved memory, and questions."""
    hub: dict[str, list[str]] = {
        "gpt2": ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"],
        "qwen": [
            *(f"Qwen2-{size}" for size in ("0.5B", "1.5B", "7B", "72B")),
            *(f"Qwen2.5-{size}" for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")),
        ],
        "llama": ["Llama-3-8B", "Llama-3-70B", "Llama-3.1-8B", "Llama-3.1-70B", "Llama-3.2-1B", "Llama-3.2-3B"],
    }
    owners = {"gpt2": "openai-community", "qwen": "Qwen", "llama": "meta-llama"}
    corpora = ("wikitext", "biomed", "finance", "law", "questions")
    controls = {"dapt": {"dapt": True}, "other": {"other_domain": True}}
    domains = ["biomed", "finance", "law"]
    tasks = {"biomed": ["biomed"], "finance": ["finance"], "law": ["law"]}
    return {
        "scale": "paper",
        "tokenizers": {name: {"pretrained": f"{owners[name]}/{names[0]}"} for name, names in hub.items()},
        "corpora": {name: {"source": "hub", "path": f"owner/{name}"} for name in corpora},
        "models": {
            name: {"family": name.rpartition("-")[0] or name, "tokenizer": kind, "pretrained": f"{owners[kind]}/{name}"}
            for kind, names in hub.items()
            for name in names
        },
        "suites": {
            "nine": {"tasks": ["memdec_dcpmi_kp"]},
            "nine-tuned": {"tasks": ["memdec_dcpmi_kp"], "alpha": "tune"},
            **{name: {"tasks": [f"memdec_{name}"]} for name in ("biomed", "finance", "law")},
            "shots": {"tasks": [f"memdec_casehold_{shots}shot" for shots in (4, 8, 16)]},
            "questions": {"tasks": ["memdec_qa"]},
        },
        "evaluated": hub["gpt2"],
        "domains": ["wikitext"],
        "key_model": "gpt2-xl",
        "memory_model": "gpt2",
        "datastore": {"stored": False},
        "index": {"kind": "ivfpq"},
        "targets": {"neighbours": 1024, "released": True},
        "memory": {"epochs": 70, "learning_rate": 1e-3, "batch_size": 16, "accumulation": 4},
        "budget": {"model": "Qwen2.5-7B"},
        "studies": {
            "gpt2": {
                "tables": ["table1", "table8", "table10", "table17", "table19", "figure5", "figure6"],
                "systems": ["base", "In-Context RAG", "kNN-LM", "DAPT", "LoRA", "MemDec"],
                "memories": {
                    "medium": {"memory_model": "gpt2-medium"},
                    "large": {"memory_model": "gpt2-large"},
                    **{f"keys-{size}": {"key_model": f"gpt2{size}"} for size in ("", "-medium", "-large")},
                    "dapt": {"dapt": True},
                },
            },
            "nine": {
                "tables": ["table2", "table12"], "evaluated": ["gpt2", "gpt2-xl"], "tasks": {"wikitext": ["nine"]},
                "systems": ["base", "kNN-LM", "DAPT", "LoRA", "MemDec"],
            },
            "nine-tuned": {"tables": ["table11"], "evaluated": ["gpt2"], "tasks": {"wikitext": ["nine-tuned"]}},
            "qwen": {
                "tables": ["table3", "table7", "table9", "figure2", "figure4"], "evaluated": hub["qwen"], "domains": domains,
                "key_model": "Qwen2.5-1.5B", "memory_model": "Qwen2.5-0.5B",
                "memory": {"epochs": 15, "learning_rate": 1e-4},
                "memories": {**controls, "kl": {"train": {"objective": "kl"}}, "ce": {"train": {"objective": "ce"}}},
            },
            "tasks": {
                "tables": ["table14", "table15", "table16", "table18"], "evaluated": ["Qwen2.5-7B"], "domains": domains,
                "key_model": "Qwen2.5-1.5B", "memory_model": "Qwen2.5-0.5B",
                "memory": {"epochs": 15, "learning_rate": 1e-4},
                "systems": ["base", "DAPT", "MemDec"], "tasks": {**tasks, "law": ["law", "shots"]},
            },
            "llama": {
                "tables": ["table4"], "evaluated": hub["llama"], "domains": domains,
                "key_model": "Qwen2.5-1.5B", "memory_model": "Qwen2.5-0.5B",
                "memory": {"epochs": 15, "learning_rate": 1e-4},
                "memories": {"llama": {"adapt": "memdec", "key_model": "Llama-3.2-1B", "share": 0.1}},
            },
            "questions": {
                "tables": ["table5", "table13"], "evaluated": ["Llama-3-8B"], "domains": ["questions"],
                "key_model": "Llama-3.2-1B", "memory_model": "Llama-3.2-1B",
                "systems": ["base", "kNN-LM", "MemDec"], "tasks": {"questions": ["questions"]},
            },
        },
    }  # fmt: skip


def test_one_config_says_the_papers_whole_grid() -> None:
    config = cfg.checked(paper(), "paper")
    for number in range(1, 20):
        if number != 6:  # its texts are not ours to copy
            name = f"table{number}"
            assert config.study_for(name).study_name is not None, name
            assert catalogue.table(config, name).parts, name
    for name in ("figure2", "figure4", "figure5", "figure6"):
        figure = figure_catalogue.figure(config, name)
        assert figure.parts or figure.tables
    studies = config.every_study()
    shared = {name: cfg.owner(studies, name, "memory") for name in config.studies}
    assert shared == {
        "gpt2": None, "nine": None, "nine-tuned": None, "qwen": "qwen", "tasks": "qwen", "llama": "qwen",
        "questions": "questions",
    }  # fmt: skip
    moved = config.study("llama").variant("llama")
    assert (moved.adapt, moved.memory_model, moved.tokenizer) == ("memdec", "Qwen2.5-0.5B", "llama")
    assert moved.train.epochs == pytest.approx(1.5)


def test_every_name_of_a_table_is_made_by_the_catalogues() -> None:
    assert {*catalogue.TABLES, *figure_catalogue.FIGURES} == {*get_args(TableName)}
