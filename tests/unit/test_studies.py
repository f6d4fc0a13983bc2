"""Studies: overlays of one config, the tables that they fill, and which artefacts they share."""

import itertools
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from memdec import config as cfg
from memdec.errors import ConfigError
from memdec.results import catalogue, figure_catalogue
from memdec.settings import HubCorpus, TableName
from memdec.tasks.perplexity import WIKITEXT

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


def test_what_differs_for_the_default_memory_makes_another_memory() -> None:
    studies = checked(
        same={"tables": ["table9"], "memories": {"memdec": {}}, "evaluated": ["gpt2-S"]},
        start={"tables": ["table8"], "memories": {"memdec": {"tuned_start": True}}},
        again={"tables": ["table2"], "memories": {"memdec": {"tuned_start": True}}, "evaluated": ["gpt2-S"]},
        long={"tables": ["table1"], "memories": {"memdec": {"train": {"epochs": 99}}}},
    ).every_study()
    owners = {study: cfg.owner(studies, study, "memory") for study in studies}
    assert owners == {None: None, "same": None, "start": "start", "again": "start", "long": "long"}
    assert {cfg.owner(studies, study, "targets", "finetuned") for study in studies} == {None}
    one_gpu = cfg.load(MINI.with_name("gpu.yaml")).every_study()
    assert cfg.owner(one_gpu, "gpt2", "memory") == cfg.owner(one_gpu, "nine", "memory") == "gpt2"


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
    assert [line.split(":")[0] for line in cfg.check(data)[0]] == ["key_model", "studies.b.domains"]


def test_a_memory_of_another_domain_is_another_one_where_the_domains_are_others() -> None:
    wrong = {"memories": {"far": {"other_domain": True}}}
    with pytest.raises(ConfigError, match=r"studies\.b\.memories\.far: expected the memory of a"):
        checked(a={"tables": ["table9"], **wrong}, b={"tables": ["table8"], "domains": ["torch", "sklearn"], **wrong})


def test_one_config_says_the_papers_whole_grid() -> None:
    config = cfg.load(MINI.parent / "paper.yaml")
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
        "qwen": None, "finance": None, "parts": None, "latency": None, "tasks": None, "llama": None,
        "gpt2": "gpt2", "gpt2-tuned": "gpt2", "nine": "gpt2", "nine-scores": "gpt2", "nine-tuned": "gpt2",
        "questions": "questions",
    }  # fmt: skip
    bars = figure_catalogue.figure(config, "figure2").config
    assert (bars.domains, bars.bases) == (["Fin"], [name for name in config.models if name.startswith("Qwen2.5")])
    moved = config.study("llama").variant("llama")
    assert (moved.adapt, moved.memory_model, moved.tokenizer) == ("memdec", "Qwen2.5-0.5B", "llama")
    assert moved.train.epochs == pytest.approx(1.5)
    assert config.study("llama").adapt.init == "random"  # the paper's; copied rows would be ours


def test_the_papers_tables_have_its_rows_and_columns() -> None:
    """Eleven Qwen models with one memory for each domain, and LoRA only where the paper has it."""
    config = cfg.load(MINI.parent / "paper.yaml")
    table = catalogue.table(config, "table3")
    memories = {(part.domain, part.memory) for part in table.parts if part.memory is not None}
    assert memories == {(domain, name) for domain in ("Bio", "Fin", "Law") for name in ("memdec", "dapt", "other")}
    assert len({part.model for part in table.parts if part.memory == "memdec"}) == 11
    lora = {part.model for part in table.parts if part.system == "LoRA"}
    assert lora == {f"Qwen{name}" for name in ("2-0.5B", "2-1.5B", "2-7B", "2.5-0.5B", "2.5-1.5B", "2.5-3B", "2.5-7B")}
    # Table 2 has one base, and claims about it are judged on every base that it has; Table 12 has two.
    assert {part.model for part in catalogue.table(config, "table2").parts} == {"GPT2-small"}
    scored = {(part.model, part.system) for part in catalogue.table(config, "table12").parts}
    assert scored == {*itertools.product(["GPT2-small", "GPT2-xl"], ["base", "DAPT"])}
    fixed = {model: config.study("gpt2").for_model(model).evaluate for model in config.study("gpt2").bases}
    assert [each.alphas for each in fixed.values()] == [[0.8], [0.6], [0.55], [0.55]]
    assert [each.temperatures for each in fixed.values()] == [[1], [1], [13], [13]]
    tuned = config.study("gpt2-tuned").for_model("GPT2-xl").evaluate
    assert (len(tuned.alphas), tuned.temperatures) == (11, [13])


@pytest.mark.parametrize("name", ["paper.yaml", "gpu.yaml"])
def test_the_memory_of_gpt2_is_trained_as_released(name: str) -> None:
    config = cfg.load(MINI.with_name(name)).study("gpt2")
    train = config.variant("memdec").train
    assert (train.epochs, train.learning_rate, train.dropout) == (70, 1e-3, 0.1)
    # Released: 16 windows of 1,024, of which 512 tokens are scored, by 4 forward passes and 2 processes.
    windows = train.batch_size * train.accumulation * config.gpus("GPT2-small", launched=True)
    assert windows * config.context == 16 * 4 * 2 * 512

    def spent(model: str, epochs: float) -> float:
        shape = config.models[model].shape
        assert shape is not None
        return epochs * (6 * shape.parameters + 12 * config.context * shape.width * shape.layers)

    assert config.budget is not None
    assert spent("GPT2-small", train.epochs) <= spent(config.budget.model, config.budget.epochs)
    for larger in {"medium", "large"} & {*config.memory_names}:
        memory = config.variant(larger)
        assert spent(memory.memory_model, memory.train.epochs) <= spent(config.budget.model, 1), larger


@pytest.mark.parametrize("name", ["paper.yaml", "gpu.yaml"])
def test_the_text_that_a_memory_learns_and_that_of_its_task_are_of_one_commit(name: str) -> None:
    corpus = cfg.load(MINI.with_name(name)).corpora["WikiText-103"]
    assert isinstance(corpus, HubCorpus)
    assert {(each.path, each.revision) for each in WIKITEXT.values()} == {(corpus.path, corpus.revision)}


def test_one_gpu_has_nothing_that_needs_two() -> None:
    config = cfg.load(MINI.parent / "gpu.yaml")
    assert config.systems_of("Qwen2.5-7B") == ["base", "LoRA", "MemDec"]
    assert all(each.launch is None and each.gpus == 1 and not each.compute for each in config.per_model.values())


def test_every_name_of_a_table_is_made_by_the_catalogues() -> None:
    assert {*catalogue.TABLES, *figure_catalogue.FIGURES} == {*get_args(TableName)}
