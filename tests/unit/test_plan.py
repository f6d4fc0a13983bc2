"""`memdec plan`: sizes against real models and texts, formulas against a measured run, and what does not fit."""

import csv
import json
import re
from pathlib import Path

import pytest
from safetensors.torch import save_file

from benchmarks import report
from memdec import config as cfg
from memdec.errors import ConfigError, ResourceError
from memdec.inference.systems import SYSTEMS
from memdec.models import loading
from memdec.planning import costs, plan, rates
from memdec.planning.costs import Costs, Job
from memdec.planning.sizes import Sizes, UnknownSizeError, bytes_per_token

ROOT = Path(__file__).resolve().parents[2]
MINI = cfg.load(ROOT / "config" / "mini.yaml")
PUBLISHED = rates.load(rates.DEFAULT)
TORCH = {"home": "torch", "seed": "0"}
RULES = [
    "corpus",
    "tokenizer",
    "tokens",
    "passages",
    "model",
    "finetune",
    "dapt",
    "lora",
    "train",
    "adapt",
    "datastore",
    "index",
    "calibrate",
    "targets",
    "teacher",
]


def costing(config: cfg.Config, run: Path = Path("nowhere"), gpu: bool = False) -> Costs:
    return Costs(config, PUBLISHED, run, gpu=gpu)


@pytest.mark.parametrize("name", ["gpt2-S", "gpt2-L", "qwen2-M", "qwen3k-L"])
def test_the_size_of_a_model_from_scratch_is_that_of_the_model(name: str) -> None:
    spec = MINI.models[name]
    vocabulary = MINI.tokenizers[spec.tokenizer].vocab_size
    real = loading.n_parameters(loading.from_scratch(spec, vocabulary or 0, MINI.context, 0))
    assert Sizes(MINI, Path("nowhere")).shape(name).parameters == pytest.approx(real, rel=0.01)


def hub(**more: object) -> cfg.Config:
    """A config whose model and text come from elsewhere."""
    model = {"family": "A", "tokenizer": "t", "pretrained": "owner/model", **more}
    return cfg.checked(
        {
            "scale": "far",
            "tokenizers": {"t": {"pretrained": "owner/model"}},
            "corpora": {"text": {"source": "hub", "path": "owner/text"}},
            "models": {"a": model},
            "domains": ["text"],
            "key_model": "a",
            "memory_model": "a",
        },
        "here",
    )


SHAPE = {"parameters": 1.2e8, "width": 768, "layers": 12, "vocabulary": 50257}


def test_a_model_that_is_here_is_read_from_its_files(tmp_path: Path) -> None:
    import torch

    folder = tmp_path / "models" / "a"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"n_embd": 8, "n_layer": 3, "vocab_size": 11}))
    for part in "12":  # sharded
        save_file({f"w{part}": torch.zeros(11, 8)}, folder / f"model-{part}.safetensors")
    found = Sizes(hub(), tmp_path).shape("a")
    assert (found.parameters, found.width, found.layers, found.vocabulary) == (2 * 11 * 8, 8, 3, 11)


def test_what_nothing_says_is_named_and_the_next_step_with_it() -> None:
    sizes = Sizes(hub(), Path("nowhere"))
    with pytest.raises(UnknownSizeError, match=r"^models\.a: expected its size, .* give shape: \{parameters"):
        sizes.shape("a")
    with pytest.raises(UnknownSizeError, match=r"^corpora\.text: .* give expected_bytes$"):
        sizes.n_bytes("text")
    assert Sizes(hub(shape=SHAPE), Path("nowhere")).shape("a").parameters == 1.2e8


def test_a_cut_model_keeps_its_embeddings_and_a_part_of_its_layers() -> None:
    whole = Sizes(hub(shape=SHAPE), Path("nowhere")).shape("a").parameters
    half = Sizes(hub(shape=SHAPE, layers=6), Path("nowhere")).shape("a")
    tables = 50257 * 768
    assert half.layers == 6
    assert half.parameters == pytest.approx(tables + (whole - tables) / 2)


def test_tokens_are_counted_where_the_stream_is_there(tmp_path: Path) -> None:
    expected = Sizes(MINI, tmp_path).n_tokens("gpt2-L", "torch", "train")
    assert expected == pytest.approx(140_000 / bytes_per_token(2048))
    folder = tmp_path / "tokens" / "bpe2k" / "torch"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"facts": {"tokens": {"train": 7, "valid": 2, "test": 1}}}))
    assert Sizes(MINI, tmp_path).n_tokens("gpt2-L", "torch") == 10


def test_a_rate_lies_between_the_measured_widths() -> None:
    cpu = PUBLISHED.cpu.model_copy(update={"train": {64: 1e9, 256: 4e9}})
    assert cpu.at("train", 128) == pytest.approx(2e9)
    assert (cpu.at("train", 8), cpu.at("train", 4096)) == (1e9, 4e9)


def test_the_published_rates_of_a_gpu_are_those_that_were_measured() -> None:
    with (ROOT / "results/reference/gpu/gpu.csv").open(newline="") as lines:
        rows = {
            (row["benchmark"], row["against"][:8]): row
            for row in csv.DictReader(lines)
            if row["vocabulary"] != "151936"
        }
    gpu = PUBLISHED.on(True)
    parameters, context, layers, width, vocabulary = 124.4e6, 1024, 12, 768, 50257  # GPT-2 small
    step = rows["step", "the same"]
    training = float(step["n"]) * (6 * parameters + 12 * context * layers * width) / (float(step["ours"]) / 1e3)
    keys = rows["keys", "float32 "]
    without_head = 2 * (parameters - vocabulary * width) + 4 * context * layers * width
    search = rows["search", "the same"]
    assert gpu.at("train", width) == pytest.approx(training, rel=0.01)
    assert gpu.at("score", width) == pytest.approx(float(keys["ours"]) * without_head, rel=0.01)
    assert gpu.at("search", width) == pytest.approx(float(search["ours"]) * 2 * 1e6 * width, rel=0.01)
    assert gpu.device == step["device"]


def test_the_plan_of_a_run_agrees_with_what_was_measured(tmp_path: Path) -> None:
    """results/reference/plan.csv: 30 % of the time of all processors, 10 % of the largest memory and of the disk."""
    with (ROOT / "results/reference/plan.csv").open(newline="") as lines:
        measured = next(row for row in csv.DictReader(lines) if row["rule"] == "all")
    files = [ROOT / "config" / "mini.yaml"]
    found = plan.make(MINI, files, ["results/table3.csv"], tmp_path, PUBLISHED).total
    assert found.jobs == int(measured["jobs"])
    assert found.cpu_seconds == pytest.approx(float(measured["measured_s"]), rel=0.3)
    assert found.memory / 1e6 == pytest.approx(float(measured["measured_mb"]), rel=0.1)
    assert found.disk / 1e6 == pytest.approx(float(measured["measured_disk_mb"]), rel=0.1)


def test_a_share_of_the_epochs_is_counted_once() -> None:
    data = cfg.read(ROOT / "config" / "mini.yaml") | {"memories": {"tenth": {"share": 0.1}}, "budget": None}
    data = {**data, "memory": {"epochs": 10}, "studies": {}}
    costing_now = costing(cfg.checked(data, "here"))
    whole, tenth = (costing_now.of(Job("train", TORCH | {"memory": name})).seconds for name in ("memdec", "tenth"))
    start = PUBLISHED.cpu.start
    assert tenth - start == pytest.approx((whole - start) / 10, rel=0.25)  # evaluations of the bases once each


def test_more_text_epochs_and_rates_cost_more_and_a_later_seed_takes_the_first_ones_rate() -> None:
    def seconds(seed: str = "0", **changes: object) -> float:
        config = cfg.checked(cfg.read(ROOT / "config" / "mini.yaml") | changes, "here")
        return costing(config).of(Job("finetune", {"home": "torch", "seed": seed, "model": "gpt2-L"})).seconds

    start = PUBLISHED.cpu.start
    one = {"epochs": 1, "learning_rate": 1e-3}
    assert seconds(finetune=one | {"epochs": 2}) - start == pytest.approx(2 * (seconds(finetune=one) - start), rel=0.1)
    tuned = one | {"learning_rates": [1e-3, 1e-2], "trial": 0.5}
    assert seconds(finetune=tuned) - start == pytest.approx(2 * (seconds(finetune=one) - start), rel=0.1)
    assert seconds("1", finetune=tuned, seeds=[0, 1]) == pytest.approx(seconds("1", finetune=one, seeds=[0, 1]))


def test_every_rule_that_computes_has_a_formula() -> None:
    text = "\n".join(file.read_text() for file in (ROOT / "workflow" / "rules").glob("*.smk"))
    asked = set(re.findall(r'\*\*(?:computing|requested)\("(\w+)"', text))
    assert asked >= set(RULES)
    assert asked <= costs.FORMULAS.keys()
    assert all((formula.__doc__ or "").strip() for formula in costs.FORMULAS.values())


def test_tables_of_long_texts_request_what_their_scores_take() -> None:
    paper = costing(cfg.load(ROOT / "config" / "paper.yaml"))
    tokens = paper.sizes.n_tokens("Qwen2.5-7B", "Bio", "test")
    cost = paper.of(Job("table", {"table": "table3"}))
    assert cost.memory > 6 * 8 * tokens > 1e9
    assert cost.seconds > 600
    mini = costing(MINI)
    assert mini.of(Job("table", {"table": "table6"})).memory == pytest.approx(609e6, rel=0.1)  # it imports torch
    for job in (Job("table", {"table": "table3"}), Job("figure", {"figure": "figure2"}), Job("claims", {})):
        assert 0.2e9 < mini.of(job).memory < 0.5e9


def test_weights_that_are_shared_by_gpus_take_a_part_of_each() -> None:
    large = {"parameters": 7e10, "width": 8192, "layers": 80, "vocabulary": 152064}
    data = hub(shape=large).model_dump(mode="json", exclude_unset=True)
    data["corpora"]["text"]["expected_bytes"] = 10**7
    data["compute"] = {"device": "cuda"}
    job = Job("evaluate_systems", {"home": "text", "seed": "0", "system": "base", "model": "a"})

    def cost(**model: object) -> costs.Cost:
        return costing(cfg.checked(data | {"per_model": {"a": model}}, "here"), gpu=True).of(job)

    one, four = cost(evaluate={"batch_size": 1}), cost(evaluate={"batch_size": 1}, gpus=4, compute={"device": "all"})
    assert one.gpu_memory > 1.4e11 > PUBLISHED.on(True).memory > four.gpu_memory
    assert (one.gpus, four.gpus) == (1, 4)
    found = plan.Plan("", PUBLISHED, True)
    found.add(job, one)
    (fault,) = found.faults(memory=1e12, disk=1e15)
    assert fault.startswith("gpu memory of evaluate_systems text 0 base a: expected 14")
    assert "per_model: {a: {gpus: N" in fault


def test_a_baseline_that_reads_more_or_searches_costs_more() -> None:
    parts = {"home": "torch", "seed": "0", "model": "gpt2-L"}
    cost = {
        system: costing(MINI).of(Job("evaluate_systems", parts | {"system": SYSTEMS[system].slug}))
        for system in ("base", "DAPT", "In-Context RAG", "kNN-LM")
    }
    assert cost["DAPT"].seconds == cost["base"].seconds
    assert cost["In-Context RAG"].seconds > cost["base"].seconds + 1
    assert cost["kNN-LM"].seconds > cost["base"].seconds + 1


def test_memory_on_the_host_is_that_of_every_process_and_of_what_is_searched() -> None:
    data = hub(shape=SHAPE).model_dump(mode="json", exclude_unset=True)
    data["corpora"]["text"]["expected_bytes"] = 10**9
    data |= {"compute": {"device": "cuda"}, "index": {"kind": "ivfpq"}, "datastore": {"stored": False}}
    data |= {"targets": {"released": True}}

    def cost(rule: str, **model: object) -> costs.Cost:
        job = Job(
            rule, {"home": "text", "seed": "0", "model": "a", "key": "a", "memory": "memdec", "scatteritem": "1-of-1"}
        )
        return costing(cfg.checked(data | {"per_model": {"a": model}}, "here"), gpu=True).of(job)

    one, copied, shared = (
        cost("finetune", **more)
        for more in ({}, {"gpus": 4, "launch": "torchrun"}, {"gpus": 4, "launch": "config/accelerate/fsdp.yaml"})
    )
    held = 16 * SHAPE["parameters"]
    assert copied.gpu_memory == one.gpu_memory == pytest.approx(shared.gpu_memory + 3 / 4 * held)
    assert copied.memory == shared.memory == pytest.approx(4 * (PUBLISHED.on(True).process + 4 * SHAPE["parameters"]))
    codes = 0.9 * 10**9 / bytes_per_token(SHAPE["vocabulary"]) * (64 + 8)
    for rule in ("index", "targets"):
        assert cost(rule).memory > codes + 2 * SHAPE["parameters"], rule  # the keys are made again


def test_a_model_that_is_converted_takes_its_weights_in_memory_and_on_disk() -> None:
    smol = cfg.load(ROOT / "config" / "smol.yaml", ROOT / "config" / "recipe.yaml")
    found = costing(smol).of(Job("model", {"model": "smollm2"}))
    assert found.disk >= 4 * 134.5e6
    assert found.memory > 4 * 134.5e6


def test_a_ready_memory_has_its_own_size() -> None:
    data = hub(shape=SHAPE).model_dump(mode="json", exclude_unset=True)
    data["models"]["large"] = {**data["models"]["a"], "shape": SHAPE | {"parameters": 7e9, "width": 4096}}
    data["corpora"]["text"]["expected_bytes"] = 10**6
    own, ready = (
        cfg.checked(data | {"memories": {"memdec": each}}, "here") for each in ({}, {"ready": {"text": "large"}})
    )
    parts = {"home": "text", "seed": "0", "memory": "memdec", "model": "a"}
    memory = [costing(each).of(Job("score", parts)).memory for each in (own, ready)]
    assert memory[1] - memory[0] == pytest.approx(4 * (7e9 - SHAPE["parameters"]), rel=0.05)


def test_what_does_not_fit_is_one_error_with_all_of_it() -> None:
    found = plan.Plan("", PUBLISHED, False)
    found.add(Job("lora", TORCH | {"model": "gpt2-L"}), costs.Cost(10, memory=5e9, disk=2e12))
    plan.refuse(found, memory=6e9, disk=3e12)
    with pytest.raises(
        ResourceError, match=r"^plan: disk: expected 2 TB, found 1 TB; .*; memory of lora torch 0 gpt2-L: "
    ):
        plan.refuse(found, memory=4e9, disk=1e12)


def test_a_dry_run_is_read_job_by_job() -> None:
    said = [
        "localrule all:",
        "    input: results/table3.csv",
        "rule lora:",
        "    wildcards: home=domains/torch, seed=0, model=gpt2-L",
        "    resources: tmpdir=/tmp",
        "rule table:",
        "    wildcards: table=table3",
    ]
    jobs = list(plan._jobs(said))
    assert [job.rule for job in jobs] == ["all", "lora", "table"]
    assert jobs[1].wildcards == {"home": "domains/torch", "seed": "0", "model": "gpt2-L"}
    assert plan.shown(jobs[1]) == "lora domains/torch 0 gpt2-L"


def test_rates_that_are_not_rates_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    with pytest.raises(ConfigError, match="memdec plan --measure"):
        rates.load(file)
    file.write_text('{"cpu": {"start": -1}}')
    with pytest.raises(ConfigError, match=r"cpu\.start"):
        rates.load(file)


def test_the_page_on_performance_has_the_comparison() -> None:
    assert "| calibrate" in report.page(ROOT / "results" / "reference")


def test_what_a_node_without_a_shared_folder_copies_first_is_what_the_stages_before_left() -> None:
    found = costing(MINI)
    shards = found.of(Job("targets", TORCH | {"key": "gpt2-L", "scatteritem": "1-of-2"}))
    keys = found.of(Job("datastore", TORCH | {"key": "gpt2-L", "scatteritem": "1-of-1"}))
    train = found.of(Job("train", TORCH | {"memory": "memdec"}))
    assert shards.reads == pytest.approx(keys.disk)
    assert train.reads > 2 * shards.disk
